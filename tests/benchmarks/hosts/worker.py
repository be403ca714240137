"""What torchrun starts on every host: a rank that has made its imports, and forks a child for each task."""

from __future__ import annotations

import datetime as dt
import itertools
import multiprocessing
import os
import re
import resource
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.device_mesh import init_device_mesh

from loader.place.state_dict import empty_state_dict
from tests.benchmarks.contenders import Job
from tests.benchmarks.frameworks import ALL
from tests.benchmarks.hosts.tasks import POLL, Failed, Measured, Task, put, take
from tests.benchmarks.peers import DTYPE, compare


def serve(folder: Path) -> None:
    """Do task after task, until there is one that is None."""
    rank = int(os.environ["RANK"])
    put(folder / f"ready.{rank}", None)
    for number in itertools.count():
        while not (folder / str(number)).exists():
            time.sleep(POLL)
        task: Task | None = take(folder / str(number))
        if task is None:
            return
        child = multiprocessing.get_context("fork").Process(target=_run, args=(task, folder, number, rank))
        child.start()
        _watch(child, folder, number, task.timeout)
        result = folder / f"{number}.{rank}"
        if not result.exists():
            put(result, Failed(f"ended with {child.exitcode}"))


def _watch(child: Any, folder: Path, number: int, timeout: float) -> None:
    """Wait for the child; end it where it takes too long, or another rank has failed and it does not end by itself."""
    until = time.monotonic() + timeout
    while child.is_alive() and time.monotonic() < until:
        child.join(POLL)
        if (folder / f"{number}.failed").exists():
            until = min(until, time.monotonic() + 2)
    child.kill()
    child.join()


def _run(task: Task, folder: Path, number: int, rank: int) -> None:
    try:
        result: Measured | Failed = _measure(task, folder, number)
    except BaseException:  # noqa: BLE001 - told to whoever asked
        result = Failed(traceback.format_exc())
        (folder / f"{number}.failed").touch()
    put(folder / f"{number}.{rank}", result)


def _measure(task: Task, folder: Path, number: int) -> Measured:
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    patience = dt.timedelta(seconds=task.timeout)
    dist.init_process_group(
        "gloo", timeout=patience, store=PrefixStore(f"{number}", store), rank=rank, world_size=world_size
    )
    mesh = init_device_mesh("cpu", tuple(task.mesh.values()), mesh_dim_names=tuple(task.mesh))
    state = empty_state_dict({key: (shape, DTYPE) for key, shape in task.shapes.items()}, mesh, task.rules, "cpu")
    for tensor in state.values():
        tensor.to_local().zero_()
    scratch = folder / f"{number}-{os.environ['GROUP_RANK']}"
    scratch.mkdir(exist_ok=True)
    job = Job(task.uri, task.storage_options, task.budget, scratch, task.read)
    with _peak_memory() as peak:
        dist.barrier()
        links, cpu, begun = _links(), _cpu(), time.perf_counter()
        report = ALL[task.contender](job, state)
        dist.barrier()
        seconds = time.perf_counter() - begun
        cpu, links = _cpu() - cpu, [after - before for after, before in zip(_links(), links, strict=True)]
    compared = compare(state, task.compare_with) if task.compare_with is not None else 0
    dist.barrier()
    shutil.rmtree(scratch, ignore_errors=True)
    dist.destroy_process_group()
    start_up = report.seconds.catalog + report.seconds.plan if report else 0.0
    return Measured(seconds, cpu, peak[0], *links, start_up, compared)


def _links() -> list[int]:
    """Bytes that came over the host's link to the bucket, and went over that to its peers. Its first rank tells."""
    if os.environ["LOCAL_RANK"] != "0":
        return [0, 0]
    found = psutil.net_io_counters(pernic=True)
    return [found["bucket"].bytes_recv, found["peer"].bytes_sent]


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """The peak of this process's proportional share of memory, mapped files among it, above what it has now.

    The kernel adds it up page by page, 8 ms of CPU for 0.5 GB, so it is asked only twice a second.
    """

    def look() -> int:
        found = re.search(r"^Pss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
        assert found
        return int(found[1]) << 10

    def sample() -> None:
        while not done.wait(0.5):
            peak[0] = max(peak[0], look() - before)

    done, before, peak = threading.Event(), look(), [0]
    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
