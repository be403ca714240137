"""Claims against files in memory: whatever was read by whom, what is found is the CRC of the file's own bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loader.errors import ConfigError
from loader.ground.crc import ALGORITHMS, crc
from loader.plan.catalog import Catalog, Entry, File
from loader.plan.claims import Claim, Claims, Cuts, Part, Spans, checkable, differing, found_values, unread

SIZE = 400


def _data(file: int) -> bytes:
    return np.random.default_rng(file).bytes(SIZE)


def _spans(reads: list[tuple[int, int, int]]) -> Spans:
    columns = np.array(reads, np.int64).reshape(-1, 3).T
    return Spans(*columns)


def _claim(file: int, start: int, stop: int, known: int, algorithm: str = "CRC32C") -> Claim:
    data = _data(file)
    return Claim(
        file, start, stop, algorithm, crc(algorithm, data[start:stop]), known, crc(algorithm, data[start:known])
    )


@st.composite
def _claimed(draw: st.DrawFn) -> list[Claim]:
    """Disjoint, of two files, some of whose first bytes are known."""
    claims = []
    for file in range(2):
        ends = sorted(draw(st.sets(st.integers(0, SIZE), min_size=2, max_size=6)))
        for start, stop in zip(ends[::2], ends[1::2], strict=False):
            claims.append(_claim(file, start, stop, draw(st.integers(start, stop)), draw(st.sampled_from(ALGORITHMS))))
    return claims


_reads = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, SIZE), st.integers(0, SIZE)).filter(lambda each: each[1] < each[2]),
    max_size=12,
)


@given(
    claims=_claimed(),
    domains=st.lists(_reads, min_size=1, max_size=3),
    damaged=st.none() | st.integers(0, 2 * SIZE - 1),
)
def test_what_is_read_in_full_has_the_crc_of_the_file_and_a_flipped_bit_is_seen(claims, domains, damaged):
    reads = [_spans(each) for each in domains]
    held = [{n for n, a, b in each for n in range(n * SIZE + a, n * SIZE + b)} for each in domains]
    gaps = unread(claims, reads)
    for claim, gap in zip(claims, gaps, strict=True):
        missing = [
            at for at in range(claim.known, claim.stop) if not any(claim.file * SIZE + at in each for each in held)
        ]
        assert (gap[0] if gap else None) == (missing[0] if missing else None)
        assert gap is None or set(range(*gap)) <= set(missing)
    whole = [number for number, gap in enumerate(gaps) if gap is None]
    cuts = Cuts(claims, whole, reads)
    last = bytearray(_data(0) + _data(1))
    if damaged is not None:
        last[damaged] ^= 4  # as the last domain reads it
    ranks = []
    for number, each in enumerate(domains):
        bits = last if number == len(domains) - 1 else _data(0) + _data(1)
        parts = [(part, file) for file, start, stop in each for part in cuts.of(file, start, stop)]
        ranks.append(
            [
                Part(n, a, b, crc(claims[n].algorithm, bytes(bits[f * SIZE + a : f * SIZE + b])))
                for (n, a, b), f in parts
            ]
        )
    checked = [(claims[n], n) for n in whole]
    seen = damaged is not None and damaged in held[-1]
    seen = seen and any(c.file == damaged // SIZE and c.known <= damaged % SIZE < c.stop for c, _ in checked)
    if differing(ranks) is None:
        found = found_values(claims, whole, [part for parts in ranks for part in parts])
        assert {n: found[n] == c.value for c, n in checked} == {
            n: not (seen and c.file == damaged // SIZE and c.known <= damaged % SIZE < c.stop) for c, n in checked
        }
    else:
        assert seen


def test_two_that_read_the_same_bytes_otherwise_are_told():
    ranks = [[Part(0, 0, 9, 1)], [Part(0, 9, 20, 5)], [Part(0, 0, 9, 2)]]
    assert differing(ranks) == (Part(0, 0, 9, 2), 0, 2)
    assert differing(ranks[:2]) is None


def _catalog() -> Catalog:
    files = tuple(File(f"{n}.safetensors", SIZE, "pin", 40) for n in range(2))
    keys = {"a": (0, 40, 100), "b": (0, 100, SIZE), "c": (1, 40, SIZE)}
    return Catalog(files, {key: Entry(torch.uint8, (b - a,), file, a, b) for key, (file, a, b) in keys.items()})


def test_what_is_not_read_in_full_is_told_with_the_key():
    claims = Claims((_claim(0, 0, SIZE, 40), _claim(1, 0, SIZE, 40)))
    found = checkable(claims, [_spans([(0, 40, 90), (1, 40, 300)]), _spans([(1, 290, SIZE)])], _catalog())
    assert found == ([1], {0: f"bytes 90-{SIZE} are not read, which nobody needs (key a)"})


def test_where_nothing_can_be_checked_it_is_an_error_that_tells_of_each_file():
    claims = Claims((_claim(0, 0, SIZE, 40),), {1: "the bucket has none"})
    with pytest.raises(ConfigError, match=r"0.safetensors: bytes 40-400 .*key a\); 1.safetensors: the bucket has none"):
        checkable(claims, [_spans([])], _catalog())
