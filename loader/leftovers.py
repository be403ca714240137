"""`python -m loader.leftovers DIRECTORY`: remove the shards of `output.local` here that no trainer took over."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from loader.errors import LoaderError
from loader.sinks.directory import SHARDS, exists, remove


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, remove what is there, and return the exit code. Others' files stay."""
    parser = argparse.ArgumentParser(
        prog="python -m loader.leftovers",
        description="Remove the shards that the init step left on this node (output.local) and no trainer took over.",
    )
    parser.add_argument("directory")
    directory = parser.parse_args(argv).directory
    try:
        if exists(directory, SHARDS) != "absent":
            remove(directory)
    except LoaderError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201 - a command
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
