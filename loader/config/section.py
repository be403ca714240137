"""What every section of the YAML is, and the one that the command and the library have in common: the proof."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from loader.config.explain import explain
from loader.config.values import parse_fingerprint
from loader.errors import ConfigError


class Section(BaseModel):
    """A mapping of the YAML: frozen, and without a key it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    def __init__(self, **values: Any) -> None:
        """Build from keywords that take the YAML's values. Raises ConfigError naming the key."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain(error, type(self)) from None

    # As pydantic's RootModel does: without the mark a section inside another would be built through __init__, and an
    # error in it would lose its path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class Proof(Section):
    """What is to be proved of what landed."""

    verify: Literal["fingerprint", "checksum"] | None = Field(
        default=None,
        description="fingerprint: of what landed, the same for every mesh, and replicas are compared; "
        "checksum: of what was read, held against the bucket's",
    )
    expect: Annotated[str, AfterValidator(parse_fingerprint)] | None = Field(
        default=None,
        description="the fingerprint that the load must have, as an earlier report tells it; another one is an error",
    )

    @field_validator("expect")
    @classmethod
    def _is_compared(cls, expect: str | None, info: ValidationInfo) -> str | None:
        if expect is not None and info.data.get("verify", "fingerprint") != "fingerprint":
            raise ConfigError("has no fingerprint to be compared with: set verify to fingerprint, or leave expect out")
        return expect
