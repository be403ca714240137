"""Messages between real ranks: who connects, a bit that flips on the wire, and what an error leaves behind."""

from __future__ import annotations

import os
import re
import resource
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import loader
from loader.errors import CorruptionError, StoreError, UserError
from loader.exchange import gloo
from loader.exchange.device import DeviceTransport
from loader.exchange.gloo import GlooTransport, GlooWork
from loader.store.store import Store
from loader.store.tally import Asked
from loader.stream import connect, watched
from tests.checkpoints import random_checkpoint
from tests.ranks import run_ranks
from tests.shards import blank, shard

SIZE = 1 << 20


def _messages(size: int, flipped: int | None, device: bool) -> str | None:
    """Rank 0 sends two messages to ranks 1 and 2; a bit of the second flips on its way to rank 2."""
    rank, store = dist.get_rank(), PrefixStore("here", dist.distributed_c10d._get_default_store())
    transport = DeviceTransport(30, torch.device("cpu")) if device else GlooTransport(store, rank, 3, 30, _others(3))
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


def _connect() -> int:
    os.environ.pop("TORCH_GLOO_LAZY_INIT", None)  # a trainer's group may have its mesh
    rank, world_size = dist.get_rank(), dist.get_world_size()
    store = PrefixStore("here", dist.distributed_c10d._get_default_store())
    before = _sockets()
    transport = GlooTransport(store, rank, world_size, 30, [1 - rank] if rank < 2 else [])
    made = _sockets() - before
    transport.close()
    return len(made)


def _sockets() -> set[str]:
    def kind(path: Path) -> str:
        with suppress(OSError):
            return str(path.readlink())
        return ""

    return {name for name in map(kind, Path("/proc/self/fd").iterdir()) if name.startswith("socket")}


def test_ranks_connect_with_their_partners_alone():
    """Beside a listener each."""
    assert run_ranks(5, _connect) == [2, 2, 1, 1, 1]


def _in_a_mesh(directory: str) -> int:
    devices = gloo._devices

    def no_others(*, lazy: bool) -> list[Any]:
        if lazy:
            raise RuntimeError("this transport does not support lazy init")
        return devices(lazy=lazy)

    gloo._devices = no_others
    return loader.load({"weight": torch.zeros(64, 33)}, directory, share="world", range_size="64KiB").exchanged_bytes


def test_where_gloo_connects_all_with_all_at_once_it_does(tmp_path):
    """Over TLS, and on macOS."""
    random_checkpoint(tmp_path, {"weight": (torch.float32, (64, 33))})
    assert run_ranks(3, _in_a_mesh, str(tmp_path), nodes=3) == [2 * 64 * 33 * 4] * 3


def _with_files(most: int, allowed: int, directory: str) -> tuple[int, int]:
    """What a soft limit of `most` files beyond those that are open is after a load, and a hard one of `allowed`."""
    opened = sum(1 for _ in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + most, opened + allowed))
    loader.load({"weight": torch.zeros(64, 33)}, directory, share="world", range_size="64KiB")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft - opened, hard - opened


def test_a_rank_lets_itself_open_a_socket_for_each_partner(tmp_path):
    random_checkpoint(tmp_path, {"weight": (torch.float32, (64, 33))})
    for soft, hard in run_ranks(3, _with_files, 100, 2_000, str(tmp_path), nodes=3):
        assert 256 < soft < 500
        assert hard == 2_000


def test_who_may_not_open_as_many_says_what_to_raise(tmp_path):
    random_checkpoint(tmp_path, {"weight": (torch.float32, (64, 33))})
    found = run_ranks(3, _with_files, 100, 250, str(tmp_path), nodes=3, outcomes=True)
    assert [type(each.error) for each in found] == [UserError] * 3, found
    told = {str(each.error) for each in found}
    assert len(told) == 1
    words = r"rank [012] connects with .* \d+ files open, [12] of them new sockets: it may have \d+ \(ulimit -Hn\); ra"
    assert re.match(words, told.pop())


def _in_a_circle() -> bool:
    """Each waits for one message before it sends its own: where two connected only then, one of them could not go on
    to what a third waits for."""
    rank, store = dist.get_rank(), PrefixStore("here", dist.distributed_c10d._get_default_store())
    transport = GlooTransport(store, rank, 3, 120, _others(3))
    memory, sent = torch.zeros(8, dtype=torch.uint8), torch.full((8,), rank, dtype=torch.uint8)
    coming = transport.receive(0, memory, (rank + 1) % 3)
    dist.barrier()  # all have asked for theirs
    for work in (*transport.send(0, sent, [(rank - 1) % 3]), coming):
        work.wait()
    transport.close()
    return bool((memory == (rank + 1) % 3).all())


def test_a_message_is_asked_for_without_a_wait():
    assert run_ranks(3, _in_a_circle) == [True] * 3


def _others(world_size: int) -> list[int]:
    return [rank for rank in range(world_size) if rank != dist.get_rank()]


def _left_behind(directory: str) -> tuple[str, bool, set[bool], float]:
    """Rank 0 fails to read, while rank 1 waits for a message for longer than the end of the rounds is waited for."""
    watched.DRAIN = 0.2
    rank, ended, groups = dist.get_rank(), threading.Event(), set()
    wait, read, isend, irecv = GlooWork.wait, Store.read, dist.isend, dist.irecv

    def slow(self: GlooWork) -> None:
        wait(self)
        assert rank == 0 or ended.wait(60)

    def failing(self: Store, name: str, pin: str, start: int, buffer: memoryview) -> Asked:
        if rank == 0 and start > SIZE:
            raise StoreError("nothing there")
        return read(self, name, pin, start, buffer)

    def seen(way: Any) -> Any:
        def call(*args: Any, group: Any, **kwargs: Any) -> Any:
            groups.add(group is None)
            return way(*args, group=group, **kwargs)

        return call

    GlooWork.wait, Store.read, dist.isend, dist.irecv = slow, failing, seen(isend), seen(irecv)
    try:
        loader.load(
            {"weight": torch.zeros(4 * SIZE // 1024, 256)}, directory, range_size="64KiB", memory_budget="16MiB"
        )
        said = "loaded"
    except StoreError as error:
        said = error.message
    rounds = [thread for thread in threading.enumerate() if thread.name == "loader-rounds"]
    ended.set()
    for thread in rounds:
        thread.join(60)
    GlooWork.wait, dist.isend, dist.irecv = wait, isend, irecv
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    return said, bool(rounds), groups, total.item()


def test_rounds_that_an_error_has_left_behind_keep_to_the_loaders_own_group(tmp_path):
    random_checkpoint(tmp_path, {"weight": (torch.float32, (4 * SIZE // 1024, 256))})
    found = run_ranks(2, _left_behind, str(tmp_path), nodes=2)
    assert [said for said, *_ in found] == ["nothing there"] * 2
    assert found[1][1], "rank 1's rounds were not left behind"
    assert [groups for _, _, groups, _ in found] == [{False}] * 2
    assert [total for *_, total in found] == [1.0, 1.0]


def _without_messages(directory: str) -> int:
    connect.GlooTransport = None
    report = loader.load({"weight": torch.zeros(64, 33)}, directory, share="node", range_size="64KiB")
    return report.exchanged_bytes


def test_where_all_who_share_are_neighbours_nobody_connects(tmp_path):
    random_checkpoint(tmp_path, {"weight": (torch.float32, (64, 33))})
    assert sum(run_ranks(4, _without_messages, str(tmp_path), nodes=2)) > 0
