"""Values that YAML has no type for: sizes, durations, dtypes, names of functions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

import torch

from loader.errors import ConfigError

# Exact case: "Mb" would be megabits to some.
BYTE_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", 1)
}
SECOND_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}

_QUANTITY = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", re.ASCII)
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def show(value: object) -> str:
    """`value` as YAML writes it. Only scalars: a mapping or a list may hold what must not be shown."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return json.dumps(value, default=lambda other: f"{other} (a {type(other).__name__})", ensure_ascii=False)


def parse_fingerprint(value: str) -> str:
    """A fingerprint, in small letters: "f1" (the version) and 16 hex digits. Raises ConfigError."""
    if re.fullmatch("f1[0-9a-f]{16}", value.lower()) is None:
        raise ConfigError(f'should be "f1" and 16 hex digits, as a report\'s fingerprint is, found {show(value)}')
    return value.lower()


def parse_bytes(value: object) -> int:
    """A size in bytes: "512MiB" (binary), "8MB" (decimal) or 1048576. Raises ConfigError."""
    size = _quantity(value, BYTE_UNITS)
    if size is None or size != int(size):
        raise ConfigError(f'should be a size such as "512MiB", "8MB" or 1048576 (bytes), found {show(value)}')
    return int(size)


def parse_seconds(value: object) -> float:
    """A duration above zero, in seconds: "500ms", "30s", "30min", "1.5h" or 30. Raises ConfigError."""
    seconds = _quantity(value, SECOND_UNITS)
    if not seconds:
        raise ConfigError(
            f'should be a duration above zero such as "30s", "30min", "1.5h" or 30 (seconds), found {show(value)}'
        )
    return float(seconds)


def _quantity(value: object, units: Mapping[str, float]) -> float | None:
    """A finite number, or a number and one of `units`; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value if math.isfinite(value) and value >= 0 else None
    if isinstance(value, str) and (match := _QUANTITY.fullmatch(value)) and match[2] in units:
        number = float(match[1]) if "." in match[1] else int(match[1])
        return number * units[match[2]]
    return None


def parse_dtype(value: object) -> torch.dtype:
    """A floating-point dtype by torch's name for it. Raises ConfigError."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"should be a dtype of torch such as bfloat16 or float32, found {show(value)}")
    return dtype


def parse_function(value: str) -> str:
    """The name of a function as "package.module:function"; nothing is imported yet. Raises ConfigError."""
    if not _FUNCTION.fullmatch(value):
        raise ConfigError(f'should be "package.module:function", found {show(value)}')
    return value
