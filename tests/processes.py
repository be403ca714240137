"""Processes that tests start."""

import contextlib
import os
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
