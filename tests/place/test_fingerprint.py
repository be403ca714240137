"""The sum that a fingerprint is made of, against plain Python, and against what it must not miss."""

from __future__ import annotations

import hashlib
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.ground.memory import PeakMemory
from loader.place import fingerprint as module
from loader.place.fingerprint import box_sum, tensor_term, written
from loader.plan.geometry import Box, portions, whole
from tests.checkpoints import random_tensor
from tests.shards import DTYPES, bits

SHAPES = [(), (1,), (7,), (0, 4), (3, 5), (6, 1), (4, 8), (2, 3, 5), (1, 9), (2, 1, 2, 3)]


def slow_sum(fqn: str, tensor: torch.Tensor) -> int:
    """Element by element, bit for bit as the module's first lines say it."""
    size, columns = tensor.element_size(), tensor.shape[-1] if tensor.ndim else 1
    seed = int.from_bytes(hashlib.blake2b(fqn.encode(), digest_size=8).digest(), "little")
    data, total = bytes(bits(tensor).tolist()), 0
    for flat in range(tensor.numel()):
        row, column = divmod(flat, columns)
        for at in range(size):
            word, byte = divmod(column * size + at, 4)
            value = data[flat * size + at] << 8 * byte
            value -= (1 << 32) if value >> 31 else 0
            total += factor(seed, row) * factor(0x243F6A8885A308D3, word) * value
    return total % (1 << 64)


def factor(seed: int, index: int) -> int:
    mask = (1 << 64) - 1
    z = ((index + 1) * 0x9E3779B97F4A7C15 + seed) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) | 1


def full_sum(tensor: torch.Tensor, fqn: str = "a.weight") -> int:
    return box_sum(fqn, tuple(tensor.shape), whole(tensor.shape), tensor)


@pytest.mark.parametrize("name", DTYPES)
def test_it_is_what_plain_python_makes_of_it(name):
    generator = torch.Generator().manual_seed(1)
    for shape in SHAPES:
        if name == "F4" and shape == ():
            continue  # it packs pairs
        tensor = random_tensor(DTYPES[name], shape, generator)
        assert full_sum(tensor) == slow_sum("a.weight", tensor), shape


def test_it_stays_what_it_is():
    """Known answers: reports of other years are compared with."""
    tensor = torch.arange(60, dtype=torch.float32).view(3, 4, 5).bfloat16()
    total = full_sum(tensor, "model.embed_tokens.weight")
    term = tensor_term("model.embed_tokens.weight", "torch.bfloat16", (3, 4, 5))
    assert (written(total), written(term), written(-1)) == KNOWN


KNOWN = ("f104bf58c7b0bf0e44", "f1bdfcf3e4f130345b", "f1ffffffffffffffff")


def test_larger_than_a_portion_and_wider_than_the_kept_factors(monkeypatch):
    monkeypatch.setattr(module, "PORTION", 64)
    monkeypatch.setattr(module, "_TABLE", 8)
    module._kept_factors.cache_clear()
    tensor = random_tensor(torch.bfloat16, (5, 3, 77), torch.Generator().manual_seed(2))
    try:
        assert full_sum(tensor) == slow_sum("a.weight", tensor)
    finally:
        module._kept_factors.cache_clear()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_pieces_sum_to_the_whole(data):
    dtype = data.draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.complex64]))
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    tensor = random_tensor(dtype, shape, torch.Generator().manual_seed(3))
    dim = data.draw(st.integers(0, len(shape) - 1))
    cut = data.draw(st.integers(0, shape[dim]))
    total = 0
    for first, stop in ((0, cut), (cut, shape[dim])):
        box = Box(
            tuple(first if d == dim else 0 for d in range(len(shape))),
            tuple(stop - first if d == dim else n for d, n in enumerate(shape)),
        )
        for part in portions(box, data.draw(st.integers(1, 9))) if box.numel else ():
            total += box_sum("x", shape, part, tensor[part.slices()])
    assert total % (1 << 64) == box_sum("x", shape, whole(shape), tensor)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
def test_every_single_flipped_bit_changes_it(dtype):
    tensor = random_tensor(dtype, (3, 5), torch.Generator().manual_seed(4))
    data = tensor.view(torch.uint8)
    seen = {full_sum(tensor)}
    for at in range(data.numel()):
        for bit in range(8):
            data.view(-1)[at] ^= 1 << bit
            seen.add(full_sum(tensor))
            data.view(-1)[at] ^= 1 << bit
    assert len(seen) == 1 + 8 * data.numel()


def _negated_halves(t):
    return torch.cat([-t[:, ::2], t[:, 1::2]], 1)


CHANGES = {
    "two rows swapped": lambda t: t[[1, 0, *range(2, len(t))]],
    "two columns swapped": lambda t: t[:, [1, 0, *range(2, t.shape[1])]],
    "neighbours in a word swapped": lambda t: t.view(-1, 2).flip(1).view(t.shape),
    "halves swapped": lambda t: torch.cat(t.chunk(2)[::-1]),
    "a row moved on": lambda t: t.roll(1, 0),
    "an element moved on": lambda t: t.flatten().roll(1).view(t.shape),
    "transposed": lambda t: t.t().contiguous(),
    "every sign": torch.neg,
    "signs of every other column": _negated_halves,
    "one row's signs": lambda t: torch.cat([-t[:1], t[1:]]),
    "a row twice": lambda t: torch.cat([t[:1], t[:-1]]),
    "the last row zeros": lambda t: torch.cat([t[:-1], torch.zeros_like(t[:1])]),
    "added one": lambda t: t + 1,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_goes_wrong_in_loads_changes_it(change, dtype):
    tensor = torch.randn(64, 64, generator=torch.Generator().manual_seed(5)).to(dtype)
    assert full_sum(CHANGES[change](tensor)) != full_sum(tensor)


def test_two_signs_cancel_nowhere_among_many_pairs():
    """The weakest spot: the top bit of a word's last element reaches the highest bits of the sum alone."""
    tensor = torch.zeros(256, 256, dtype=torch.bfloat16)
    random.seed(6)
    seen = set()
    for _ in range(2000):
        flipped = random.sample(range(tensor.numel()), 2)
        tensor.view(-1)[flipped] = -0.0
        seen.add(full_sum(tensor))
        tensor.view(-1)[flipped] = 0.0
    assert len(seen) == 2000
    assert 0 not in seen


def test_the_name_counts_and_zeros_of_another_name_dtype_or_shape_differ():
    tensor = torch.ones(4, 4)
    assert full_sum(tensor, "a") != full_sum(tensor, "b")
    kinds = [(n, d, s) for n in "ab" for d in ("torch.float32", "torch.bfloat16") for s in ((4, 4), (2, 8))]
    assert len({tensor_term(*kind) for kind in kinds}) == len(kinds)


def test_a_tensor_is_read_in_bounded_memory():
    """64 MiB that do not lie row by row, and rows that end within a word."""
    tensor = torch.zeros(4096, 8191, dtype=torch.bfloat16).t()
    full_sum(tensor[:8])  # makes the kept factors
    with PeakMemory() as memory:
        full_sum(tensor)
    assert memory.stop() < 6 << 20


def test_views_of_any_alignment_and_stride():
    generator = torch.Generator().manual_seed(7)
    base = random_tensor(torch.bfloat16, (9, 10), generator)
    for view in (base.t(), base[1:, 1:], base[:, 1::2], base.flatten()[1:].view(89), base[:, :5].unsqueeze(1)):
        assert full_sum(view) == slow_sum("a.weight", view.contiguous()), view.shape
    assert math.prod(base.shape) == 90
