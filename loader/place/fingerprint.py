"""A tensor's part in the model's fingerprint: a sum over its elements, whatever holds them and in what pieces.

Version 1. A tensor is a matrix whose rows run along its last dim (a vector or a scalar is one row). A row's bytes,
little-endian and zero-padded to a multiple of 4, are words x[c], signed 32-bit. The tensor's sum under an FQN is

    sum over r of u(FQN, r) * (sum over c of v(c) * x[r, c])   mod 2**64

with odd pseudo-random 64-bit factors: u from the FQN's hash and the row, v from the column. A row and a column are what
a flat index is, so each element adds its bits times a factor of its FQN and its flat index: multilinear hashing (Lemire
and Kaser, "Strongly universal string hashing is fast", 2012). As it is linear, elements may be summed in any pieces; as
factors are odd, a change of a single word always shows. Elements that are swapped, moved or changed together cancel by
a chance of 2**-32 where only two sign bits differ (these reach the sum's highest bits alone), of 2**-26 where four do
that are the corners of a rectangle (two even differences multiply), and of less elsewhere. What is zero adds nothing:
so each tensor adds a hash of its FQN, dtype and shape as well. It is a check against accidents, not adversaries.

It costs about 0.35 s of one core for a GB, a fifth of what loading that costs; twice to four times as much for rows of
a few elements, and for a vector of more than 512 KiB, whose factors are not kept.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loader.plan.geometry import Box, contiguous_strides, portions

VERSION = "f1"
"""In front of the sum's 16 hex digits. The letter keeps YAML from taking one for a number."""
WORD = 4
"""Bytes."""
PORTION = 1 << 19
"""Bytes that are looked at together: as 64-bit numbers they are 1 MiB more."""

_TABLE = 1 << 17
"""Columns whose factors are kept, 1 MiB of them: enough for rows of 512 KiB."""
_COLUMNS = 0x243F6A8885A308D3
"""The seed of v: the first digits of pi's fraction."""
_MASK = (1 << 64) - 1

Sums = npt.NDArray[np.uint64]


def written(total: int) -> str:
    """The fingerprint as people compare it: 18 hex digits, the version first."""
    return f"{VERSION}{total & _MASK:016x}"


def tensor_term(fqn: str, dtype: str, shape: Sequence[int]) -> int:
    """What a tensor adds to the fingerprint whatever its elements are."""
    return _hash(f"{fqn}\n{dtype}\n{list(shape)}")


def box_sum(fqn: str, shape: Sequence[int], box: Box, values: Tensor) -> int:
    """The sum of the elements of `box` of the tensor `fqn` of `shape`: `values`, of the box's sizes, on any device."""
    if not shape:
        return box_sum(fqn, (1,), Box((0,), (1,)), values.view(1))
    strides = contiguous_strides(shape[:-1])
    seed, total = _hash(fqn), 0
    for part in portions(box, max(1, PORTION // values.element_size())):
        sums = _row_sums(values[part.slices(box.offsets)], part.offsets[-1])
        factors = _factors(seed, _rows(strides, part))
        total += int(np.sum(sums * factors, dtype=np.uint64))
    return total & _MASK


def _rows(strides: Sequence[int], box: Box) -> Sums:
    """The numbers of the matrix's rows that the box is in, in order."""
    rows = np.zeros(1, np.uint64)
    for offset, size, stride in zip(box.offsets, box.sizes, strides, strict=False):  # strides are of all dims but one
        rows = np.add.outer(rows, np.arange(offset, offset + size, dtype=np.uint64) * np.uint64(stride)).ravel()
    return rows


def _row_sums(values: Tensor, column: int) -> Sums:
    """For each row its words times their columns' factors, summed; `column` is the first one's element."""
    words, first = _words(values, column * values.element_size())
    wide = words.to(torch.int64)
    factors = _column_factors(first, first + words.shape[1], words.device)
    sums = wide.mv(factors) if wide.is_cpu else wide.mul_(factors).sum(1)  # CUDA has no mv of integers
    return sums.cpu().numpy().view(np.uint64)


def _words(values: Tensor, at: int) -> tuple[Tensor, int]:
    """The rows of `values`, which stand `at` bytes from their rows' begin, as int32; and the first word's column."""
    width = values.shape[-1] * values.element_size()
    found = values.contiguous().view(torch.uint8).view(math.prod(values.shape[:-1]), width)
    lead, first = at % WORD, at // WORD
    padded = -(-(lead + width) // WORD) * WORD
    if padded != width or found.storage_offset() % WORD:  # zeros add nothing: neighbours add what is theirs
        aligned = torch.zeros(len(found), padded, dtype=torch.uint8, device=values.device)
        aligned[:, lead : lead + width] = found
        found = aligned
    return found.view(torch.int32), first


def _column_factors(first: int, stop: int, device: torch.device) -> Tensor:
    if stop <= _TABLE:
        return _kept_factors(device)[first:stop]
    return _as_tensor(_factors(_COLUMNS, np.arange(first, stop, dtype=np.uint64)), device)


@cache
def _kept_factors(device: torch.device) -> Tensor:
    return _as_tensor(_factors(_COLUMNS, np.arange(_TABLE, dtype=np.uint64)), device)


def _as_tensor(factors: Sums, device: torch.device) -> Tensor:
    return torch.from_numpy(factors.view(np.int64)).to(device)


def _factors(seed: int, index: Sums) -> Sums:
    """SplitMix64 (Steele, Lea and Flood, 2014; constants of its reference code by Vigna) at `index`, made odd."""
    z = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
