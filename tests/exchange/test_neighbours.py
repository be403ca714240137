"""Ranks of one node, as processes, that take bytes from each other's memory."""

from __future__ import annotations

import gc
import itertools
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import loader
from loader.errors import CatalogError, LoaderError, LostRankError, StoreError
from loader.exchange import shared
from loader.exchange.control import Control
from loader.exchange.inbox import Inbox
from loader.exchange.neighbours import Neighbours
from loader.store.store import Store
from loader.stream import connect, watched
from tests.ranks import run_ranks
from tests.shards import blank, differences, shard, write_file

RANKS = 3
ODD = 4093
"""Bytes: no multiple of a page, so that hardly an extent begins with one."""


def _meet(control: Control) -> Neighbours:
    found = Neighbours.meet(control, range(control.world_size), willing=True)
    assert found is not None
    return found


def _extent(number: int, sender: int, size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.int64).add(31 * number + 7 * sender).to(torch.uint8)


def _held() -> tuple[int, int]:
    """Files that this process has open, and memory files that it maps."""
    maps = Path("/proc/self/maps").read_text()
    return len(list(Path("/proc/self/fd").iterdir())), maps.count("memfd:loader")


def _pass_round(sizes: list[int]) -> list[str]:
    """Each rank offers extents of these sizes to both others, and takes theirs in another order."""
    with Control.of_group() as control, control.phase("all"):
        before = _held()
        neighbours = _meet(control)
        memory = neighbours.allocate(sum(sizes))
        at, wrong, takings = 0, [], []
        for number, size in enumerate(sizes):
            view = memory.host[at : at + size]
            view.copy_(_extent(number, control.rank, size))
            takings.append(neighbours.offer(number + 100 * control.rank, view, neighbours.ranks))
            at += size
        for number, size in reversed(list(enumerate(sizes))):
            for sender in neighbours.ranks:
                found = neighbours.look(number + 100 * sender, sender)
                if not torch.equal(found, _extent(number, sender, size)):
                    wrong.append(f"extent {number} of rank {sender}")
                del found
                neighbours.took(number + 100 * sender, sender)
        for taking in takings:
            taking.wait()
        control.agree("taken")
        del view
        neighbours.close()
        assert not neighbours._inbox._told, "what was told is forgotten"
        assert _held() == before, (before, _held())
        return wrong


def test_each_takes_what_another_has_read_and_nothing_stays_open():
    assert run_ranks(RANKS, _pass_round, [ODD, 1, 5 * ODD, 64, 1 << 20]) == [[]] * RANKS


def _hold_back() -> bool:
    """Rank 0 offers to both; rank 1 takes at once, rank 2 when it is told. Whether rank 0 waited for both."""
    with Control.of_group() as control, control.phase("all"):
        neighbours = _meet(control)
        waited = True
        if control.rank == 0:
            memory = neighbours.allocate(ODD)
            taking = neighbours.offer(1, memory.host, [1, 2])
            waiting = threading.Thread(target=taking.wait)
            waiting.start()
            control.take("took", [1])
            waiting.join(0.5)
            waited = waiting.is_alive()
            control.broadcast("go on", b"1")
            waiting.join()
        else:
            if control.rank == 2:
                control.broadcast("go on", None)
            neighbours.look(1, 0)
            neighbours.took(1, 0)
            control.put("took", b"1")
        control.agree("taken")
        neighbours.close()
        return waited


def test_memory_is_not_free_before_all_have_taken_their_part():
    assert run_ranks(RANKS, _hold_back) == [True] * RANKS


def _offer_many() -> int:
    """Rank 0 offers more than rank 1's inbox holds, which is not looked into for a while. How many came."""
    many, size = 3000, 16
    with Control.of_group() as control, control.phase("all"):
        take_in = Inbox._take_in

        def late(self: Inbox, data: bytes) -> bool:
            Inbox._take_in = take_in
            time.sleep(1)
            return take_in(self, data)

        Inbox._take_in = late
        neighbours = _meet(control)
        if control.rank == 0:
            memory = neighbours.allocate(many * size).host
            takings = [neighbours.offer(n, memory[n * size : (n + 1) * size], [1]) for n in range(many)]
            for taking in takings:
                taking.wait()
        else:
            for number in range(many):
                neighbours.look(number, 0)
                neighbours.took(number, 0)
        control.agree("taken")
        neighbours.close()
        return many


def test_an_inbox_that_is_full_holds_nothing_up():
    assert run_ranks(2, _offer_many) == [3000] * 2


def _outgrow() -> list[int]:
    """Rank 0 offers from memory that it frees and makes anew, larger; how many of these files are mapped after each."""
    with Control.of_group() as control, control.phase("all"):
        neighbours, mapped = _meet(control), []
        for number in range(4):
            if control.rank == 0:
                memory = neighbours.allocate(ODD << number)
                neighbours.offer(number, memory.host, neighbours.ranks).wait()
                memory.free()
            else:
                assert neighbours.look(number, 0).numel() == ODD << number
                neighbours.took(number, 0)
            control.agree("next")
            mapped.append(_held()[1])
        neighbours.close()
        return mapped


def test_memory_that_was_given_back_is_held_by_nobody():
    assert run_ranks(2, _outgrow) == [[0] * 4] * 2


# ---------------------------------------------------------------- where memory cannot be shared


def _no_memory_files() -> None:
    def refuse(_: str) -> int:
        raise PermissionError(1, "memfd_create")

    os.memfd_create = refuse  # type: ignore[assignment]


def _small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _not_to_be_opened() -> None:
    shared.file_of = lambda pid, number: f"/proc/{pid}/fd/not-here"


def _another_process() -> None:
    """As where process ids are those of another namespace: there is a process of that number, and files of it."""
    parent = os.getppid()
    os.getpid = lambda: parent  # type: ignore[assignment]


OBSTACLES: dict[str, Callable[[], None]] = {
    "no memory files": _no_memory_files,
    "small files": _small_files,
    "not to be opened": _not_to_be_opened,
    "another process": _another_process,
}


def _meet_nevertheless(obstacle: str) -> bool:
    willing = True
    if dist.get_rank() == 1:
        OBSTACLES.get(obstacle, lambda: None)()
        willing = obstacle != "unwilling"
    with Control.of_group() as control, control.phase("all"):
        found = Neighbours.meet(control, range(control.world_size), willing=willing)
        control.agree("met")
        if found is not None:
            found.close()
        return found is None


@pytest.mark.parametrize("obstacle", [*OBSTACLES, "unwilling"])
def test_where_one_cannot_none_does(obstacle):
    assert run_ranks(RANKS, _meet_nevertheless, obstacle) == [True] * RANKS


def _load(directory: str, obstacle: str) -> list[str]:
    if dist.get_rank() == 1:
        OBSTACLES[obstacle]()
    mesh = init_device_mesh("cpu", (2, 2))
    generator = torch.Generator().manual_seed(3)
    full = {key: torch.randn(64, 33, generator=generator) for key in ("a", "b")}
    expected = {key: shard(tensor, mesh, [Replicate(), Shard(1)]) for key, tensor in full.items()}
    state = {key: blank(each) for key, each in expected.items()}
    if dist.get_rank() == 0:
        write_file(Path(directory, "model.safetensors"), full)
    dist.barrier()
    loader.load(state, directory)
    return differences(state, expected)


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_load_goes_on_with_messages(obstacle, tmp_path):
    assert run_ranks(4, _load, str(tmp_path), obstacle) == [[]] * 4


# ---------------------------------------------------------------- errors


def _lose(where: str) -> tuple[str, float]:
    """Rank 2 is killed; the others wait for an offer of it, or for it to take theirs. What they are told, and when."""
    control, told, seconds = Control.of_group(), "", 0.0
    with suppress(LostRankError), control, control.phase("all"):
        neighbours = _meet(control)
        taking = neighbours.offer(control.rank, neighbours.allocate(ODD).host, neighbours.ranks)
        control.agree("met")
        if control.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        begun = time.monotonic()
        try:
            if where == "wait":
                taking.wait()
            neighbours.look(2, 2)  # it was offered, and may be there still
            neighbours.look(99, 2)
        except LostRankError as error:
            told, seconds = str(error), time.monotonic() - begun
            raise
    return told, seconds


@pytest.mark.parametrize("where", ["look", "wait"])
def test_a_rank_that_is_killed_is_missed_at_once(where):
    found = run_ranks(RANKS, _lose, where, outcomes=True, patient=False)
    for outcome in found[:2]:
        assert outcome.error is None, found
        told, seconds = outcome.value
        assert told.startswith("the connection to rank 2 broke (")
        assert seconds < 5, "before a beat is missed"


def _fail() -> str:
    """Rank 0 fails; rank 1 waits for its offer, and rank 2 for rank 1 to take its own."""
    with suppress(CatalogError), Control.of_group() as control, control.phase("all"):
        neighbours = _meet(control)
        try:
            if control.rank == 0:
                control.fail(CatalogError("nothing there"))
            elif control.rank == 1:
                neighbours.look(1, 0)
            else:
                neighbours.offer(2, neighbours.allocate(ODD).host, [1]).wait()
        finally:
            neighbours.close()
    return str(control.error)


def test_the_jobs_error_ends_every_wait():
    assert run_ranks(RANKS, _fail) == ["nothing there"] * RANKS


def _whole() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {f"k{n}": torch.randn(512, 1024, generator=generator) for n in range(12)}


def _fail_and_load_again(directory: str) -> tuple[float, list[str], list[str]]:
    """Rank 0 fails with many extents that others wait for. When this rank is told, which threads are left, and what is
    wrong in the same shards after another load."""
    mesh = init_device_mesh("cpu", (2,))
    expected = {key: shard(tensor, mesh, [Replicate()]) for key, tensor in _whole().items()}
    state = {key: blank(each) for key, each in expected.items()}
    read, reads = Store.read, itertools.count()

    def failing(self: Store, *what: Any) -> Any:
        if dist.get_rank() == 0 and next(reads) >= 3:
            time.sleep(1)
            raise StoreError("nothing there")
        return read(self, *what)

    Store.read, watched.DRAIN = failing, 90.0  # which would cut short what is looked for here
    settings = {"range_size": "64KiB", "memory_budget": "64MiB"}
    with pytest.raises(StoreError):
        loader.load(state, directory, **settings)
    told = time.monotonic()
    Store.read = read
    left = [thread.name for thread in threading.enumerate() if thread.name in {"loader-write", "loader-inbox"}]
    loader.load(state, directory, **settings)
    return told, left, differences(state, expected)


def test_after_an_error_nobody_waits_for_each_extent_in_turn_and_nothing_lands(tmp_path):
    write_file(tmp_path / "model.safetensors", _whole())
    found = run_ranks(2, _fail_and_load_again, str(tmp_path))
    assert abs(found[0][0] - found[1][0]) < 20, "of one clock"
    assert [rest for _, *rest in found] == [[[], []]] * 2


def _no_way_to_the_other_node(directory: str) -> list[str]:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no interface")

    if dist.get_rank() == 3:
        connect.GlooTransport = refuse
    state = {"k0": blank(shard(_whole()["k0"], init_device_mesh("cpu", (4,)), [Replicate()]))}
    with pytest.raises(LoaderError, match="no interface"):
        loader.load(state, directory, ignore=[f"k{n}" for n in range(1, 12)])
    return [thread.name for thread in threading.enumerate() if thread.name == "loader-inbox"]


def test_neighbours_part_where_there_is_no_way_to_the_other_node(tmp_path):
    write_file(tmp_path / "model.safetensors", _whole())
    assert run_ranks(4, _no_way_to_the_other_node, str(tmp_path), nodes=2) == [[]] * 4


def _keep(directory: str) -> int:
    """How much of a load's shared memory is mapped after it, with nothing collected."""
    state = {key: blank(shard(each, init_device_mesh("cpu", (4,)), [Shard(1)])) for key, each in _whole().items()}
    gc.disable()
    loader.load(state, directory, range_size="64KiB")
    return _held()[1]


@pytest.mark.parametrize("nodes", [1, 2])
def test_after_a_load_its_memory_is_given_back(nodes, tmp_path):
    write_file(tmp_path / "model.safetensors", _whole())
    assert run_ranks(4, _keep, str(tmp_path), nodes=nodes) == [0] * 4
