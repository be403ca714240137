"""Messages between real ranks, with a bit that flips on the wire."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import loader
from loader.errors import CorruptionError
from loader.exchange.device import DeviceTransport
from loader.exchange.gloo import GlooTransport
from tests.checkpoints import random_checkpoint
from tests.ranks import run_ranks
from tests.shards import blank, shard


def _messages(size: int, flipped: int | None, device: bool) -> str | None:
    """Rank 0 sends two messages to ranks 1 and 2; a bit of the second flips on its way to rank 2."""
    rank, store = dist.get_rank(), PrefixStore("here", dist.distributed_c10d._get_default_store())
    transport = DeviceTransport(30, torch.device("cpu")) if device else GlooTransport(store, rank, 3, 30)
    batch = transport.batch()
    sent = [torch.arange(size, dtype=torch.uint8) + number for number in range(2)]
    said = None
    if rank == 0:
        works = [*batch.send(1, sent[1], [1, 2]), *batch.send(0, sent[0], [1, 2])]  # as they came
        batch.start()
        for work in works:
            work.wait()
    else:
        memories = [torch.zeros_like(expected) for expected in sent]
        works = [batch.receive(number, memory, 0) for number, memory in enumerate(memories)]
        batch.start()
        for number, (expected, memory, work) in enumerate(zip(sent, memories, works, strict=True)):
            work.wait()
            if flipped is not None and (rank, number) == (2, 1):
                memory[flipped // 8] ^= 1 << flipped % 8
            try:
                work.check(memory, lambda: "a key")
                assert torch.equal(memory, expected)
            except CorruptionError as error:
                said = str(error)
    transport.close()
    return said


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("flipped", [None, 0, 7, 8 * 99_996 + 4])
def test_a_bit_that_flips_on_the_way_is_told_where_it_arrives(flipped, device):
    found = run_ranks(3, _messages, 99_997, flipped, device)
    assert found[:2] == [None, None]
    assert (found[2] is None) == (flipped is None)
    check = "the check" if device else "CRC-32C"
    assert flipped is None or found[2].startswith(f"a key: a message of 99997 bytes from rank 0 has {check}")


def _load(directory: str, flips: bool) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    full = {key: torch.zeros(64, 33) for key in ("a", "b")}
    state = {key: blank(shard(tensor, mesh, [Replicate(), Shard(1)])) for key, tensor in full.items()}
    send, left = dist.isend, [1]

    def damage(view, *args, **kwargs):
        if flips and view.dtype is torch.uint8 and left and view.numel() > 9:
            left.clear()
            view = view.clone()
            view[9] ^= 0x20
        return send(view, *args, **kwargs)

    dist.isend = damage
    loader.load(state, directory)


def test_a_load_ends_on_every_rank_with_the_key_the_file_and_the_rank(tmp_path):
    random_checkpoint(tmp_path, dict.fromkeys(("a", "b"), (torch.float32, (64, 33))))
    assert run_ranks(4, _load, str(tmp_path), False, nodes=4) == [None] * 4
    found = run_ranks(4, _load, str(tmp_path), True, nodes=4, outcomes=True)
    assert [type(each.error) for each in found] == [CorruptionError] * 4, found
    told = {str(each.error) for each in found}
    assert len(told) == 1
    assert " of model.safetensors: a message of " in told.pop()
