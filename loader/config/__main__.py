"""`python -m loader.config`: print the reference of the YAML's keys."""

from loader.config.reference import reference

print(reference())  # noqa: T201
