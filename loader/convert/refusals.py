"""What a conversion may not do, and what to write instead."""

from __future__ import annotations

import difflib
from typing import Any

import torch

from loader.convert.ops import RULES
from loader.errors import ConversionError

LOOKS = (
    torch.ops.aten._local_scalar_dense.default,  # noqa: SLF001
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
)
"""Ops whose result is a value."""


def looks_at_values(what: str, origin: str) -> ConversionError:
    return ConversionError(
        f"{what} on {origin!r}: a conversion may not look at values: it runs once, before anything is read. "
        "Decide by names, shapes and the config instead"
    )


def is_in_place(func: Any) -> bool:
    name = func.__name__.split(".")[0]
    return name.endswith("_") and not name.startswith("_")


def in_place(func: Any, origin: str) -> ConversionError:
    name = func.__name__.split(".")[0][:-1]
    instead = "make a new tensor with torch.cat or torch.stack" if name == "copy" else f"write `x = x.{name}(...)`"
    return ConversionError(f"{func} on {origin!r}: an in-place op: {instead} instead")


def no_rule(func: Any, origin: str) -> ConversionError:
    known = sorted({str(op).split(".")[1] for op in RULES})
    near = difflib.get_close_matches(func.__name__.split(".")[0], known, n=3)
    hint = f"; near it there are {', '.join(near)}" if near else ""
    return ConversionError(
        f"{func} on {origin!r}: no rule pulls it back to the checkpoint{hint}. Write it with these: {', '.join(known)}"
    )
