"""Processes that tests start."""

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]


def python_path() -> str:
    """PYTHONPATH for a child that imports `loader` and `tests` as this process does."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def kill_tree(pid: int) -> None:
    """Kill a process that we started and its descendants, those in sessions of their own (torchrun's workers) too."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


LOOK = 0.05
"""Seconds between looks at whether processes have ended."""


def seconds_to_end(processes: Iterable[psutil.Process], since: float, timeout: float = 60) -> list[float]:
    """Seconds from `since`, on the monotonic clock, to the end of each process, whether its parent has looked or not.

    How late this process is itself does not count, for all it does is sleep and look: a busy machine may have kept the
    others waiting for as long.
    """
    ended: dict[psutil.Process, float] = dict.fromkeys(processes, 0.0)
    late, now = 0.0, time.monotonic()
    while running := [process for process, seconds in ended.items() if not seconds]:
        assert now - since < timeout, f"after {timeout} s still there: {running}"
        for process in running:
            if not _runs(process):
                ended[process] = now - since - late
        time.sleep(LOOK)
        before, now = now, time.monotonic()
        late += now - before - LOOK
    return list(ended.values())


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
