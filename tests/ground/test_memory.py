import threading

import torch

from loader.ground.memory import PeakMemory, untouched_bytes
from loader.stream.buffers import own_memory
from tests.ranks import run_ranks

MIB = 1 << 20


def _touch(mebibytes: int) -> torch.Tensor:
    return torch.ones(mebibytes * MIB, dtype=torch.uint8)


def _hold_until_sampled(mebibytes: int) -> None:
    """Keep memory until the sampling thread has seen it: two samples have begun since."""
    held = _touch(mebibytes)
    for _ in range(2):
        SAMPLED.clear()
        assert SAMPLED.wait(60)
    del held


SAMPLED = threading.Event()


def _landed() -> int:
    SAMPLED.set()
    return LANDED[0]


LANDED = [0]


def _peak_of_what_came_and_went() -> int | None:
    before = _touch(50)  # in the baseline
    memory = PeakMemory(_landed)
    with memory:
        _hold_until_sampled(100)
        _hold_until_sampled(60)
    del before
    return memory.stop()


def _peak_beside_shards() -> int | None:
    shard = torch.empty(200 * MIB, dtype=torch.uint8)
    with PeakMemory(_landed) as memory:
        for part in shard.chunk(20):
            LANDED[0] += part.nbytes
            part.fill_(1)
            _hold_until_sampled(40)  # glibc returns what is above 32 MiB to the system at once
    return memory.stop()


# A process of its own: what other tests leave to the allocator would be used again, and not be seen to grow.
def test_the_peak_is_what_was_held_at_once():
    (peak,) = run_ranks(1, _peak_of_what_came_and_went, init=False)
    assert 100 * MIB <= peak <= 104 * MIB


def test_what_landed_in_shards_is_not_counted():
    (peak,) = run_ranks(1, _peak_beside_shards, init=False)
    assert 39 * MIB <= peak <= 44 * MIB


def test_fresh_storage_is_untouched_until_it_is_written():
    tensor = own_memory(64 * MIB)  # malloc may hand out what another test has touched
    page = 4096 * 512  # of transparent huge pages, too
    assert 63 * MIB <= untouched_bytes([tensor]) <= 64 * MIB
    tensor[: 32 * MIB] = 1
    assert abs(untouched_bytes([tensor]) - 32 * MIB) <= 2 * page
    tensor[:] = 1
    assert untouched_bytes([tensor]) == 0


def test_shared_storage_counts_once_and_whole():
    tensor = torch.empty(64 * MIB, dtype=torch.uint8)
    once = untouched_bytes([tensor])
    assert untouched_bytes([tensor, tensor[5:9], tensor.view(torch.int16)]) == once
    assert untouched_bytes([tensor[5:9]]) == once
    inner = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()[MIB : 2 * MIB])
    assert untouched_bytes([inner, tensor]) == once


def test_what_is_not_host_memory_counts_nothing():
    assert untouched_bytes([]) == 0
    assert untouched_bytes([torch.empty(5, device="meta"), torch.empty(0), torch.ones(3)]) == 0
