"""The kinds of value that keys of the YAML have, beside those that it has a type for."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, WithJsonSchema

from loader.config.values import parse_bytes, parse_dtype, parse_function, parse_seconds, show
from loader.convert.named import NAMED
from loader.errors import ConfigError
from loader.ground.uri import public_uri


def _builder(value: str) -> str:
    if value == "transformers" or ":" in value:
        return value if value == "transformers" else parse_function(value)
    raise ConfigError(f'should be transformers, "package.module:function" or null, found {show(value)}')


def _directory(path: str) -> str:
    if "://" in path:
        raise ConfigError(
            f"should be a directory of the node, such as /dev/shm/init, found {public_uri(path)}: shards are mapped "
            "into memory where they are; for a bucket, set output.checkpoint"
        )
    return path


def at_least(least: str) -> AfterValidator:
    """For a size: at least `least`, which is one itself."""

    def check(size: int) -> int:
        if size < parse_bytes(least):
            raise ConfigError(f"should be at least {least}, found {size} bytes")
        return size

    return AfterValidator(check)


# A format is the word that the reference has for what JSON has no type for.
_FUNCTION = {"type": "string", "format": "package.module:function"}
_SIZE = {"type": ["string", "integer"], "format": "size"}
_DURATION = {"type": ["string", "number"], "format": "duration"}

Text = Annotated[str, Field(min_length=1)]
Function = Annotated[str, AfterValidator(parse_function), WithJsonSchema(_FUNCTION)]
Builder = Annotated[str, AfterValidator(_builder), WithJsonSchema({"anyOf": [{"const": "transformers"}, _FUNCTION]})]
Conversion = Annotated[str, WithJsonSchema({"anyOf": [{"enum": list(NAMED)}, _FUNCTION]})]
Directory = Annotated[Text, AfterValidator(_directory)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), WithJsonSchema(_SIZE)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), WithJsonSchema(_DURATION)]
Dtype = Annotated[torch.dtype, PlainValidator(parse_dtype), WithJsonSchema({"type": "string", "format": "dtype"})]
