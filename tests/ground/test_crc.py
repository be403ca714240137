"""CRCs against the check values that each algorithm is published with, and joined against those of the whole."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader.ground.crc import ALGORITHMS, crc, joined, written

CHECKS = {"CRC32": 0xCBF43926, "CRC32C": 0xE3069283, "CRC64NVME": 0xAE8B14860A799888}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_is_what_the_field_calls_so(algorithm):
    assert crc(algorithm, b"123456789") == crc(algorithm, memoryview(bytearray(b"123456789"))) == CHECKS[algorithm]
    assert crc(algorithm, b"") == 0
    assert written(algorithm, 10).endswith("0a")
    assert int(written(algorithm, CHECKS[algorithm]), 16) == CHECKS[algorithm]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(data=st.binary(max_size=3000), at=st.floats(0, 1))
def test_two_stretches_are_joined_to_the_whole(algorithm, data, at):
    cut = int(at * len(data))
    first, second = data[:cut], data[cut:]
    assert joined(algorithm, crc(algorithm, first), crc(algorithm, second), len(second)) == crc(algorithm, data)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_single_flipped_bit_is_seen_wherever_it_is(algorithm):
    data = bytearray(1 << 17)
    whole = crc(algorithm, data)
    for at in (0, 63, 64, 65_535, 65_536, len(data) - 1):
        data[at] ^= 1 << at % 8
        assert crc(algorithm, data) != whole
        data[at] ^= 1 << at % 8
    assert crc(algorithm, data) == whole


def test_stretches_longer_than_any_memory_are_joined_in_any_order():
    size, value = 1 << 20, crc("CRC32", bytes(1 << 20))
    assert value == zlib.crc32(bytes(1 << 20))
    while size < 1 << 40:
        value, size = joined("CRC32", value, value, size), 2 * size
    rest = crc("CRC32", b"rest")
    assert joined("CRC32", joined("CRC32", rest, value, size), rest, 4) == joined(
        "CRC32", rest, joined("CRC32", value, rest, 4), size + 4
    )
