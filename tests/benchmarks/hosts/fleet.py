"""torchrun on every host, with one rendezvous on the first, over the links between hosts."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks.hosts.tasks import POLL, Failed, Measured, Task, put, take
from tests.hosts.links import Host
from tests.torchrun import agents

START = 300.0
"""Seconds for all ranks to make their imports."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCH_GLOO_LAZY_INIT": "1",
    "RES_OPTIONS": "timeout:1 attempts:1",  # no name server is there
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}


class FleetError(RuntimeError):
    """A rank did not do its task."""


class Fleet:
    """Ranks that wait for tasks; `start_up` is the seconds from starting torchrun to the last rank's imports."""

    def __init__(self, folder: Path, agents: Sequence[subprocess.Popen[bytes]], world_size: int) -> None:
        self._folder = folder
        self._agents = agents
        self._world_size = world_size
        self._tasks = 0
        self.start_up = self._wait(lambda rank: f"ready.{rank}", START)

    def run(self, task: Task | None) -> list[Measured]:
        """Every rank's measures, in rank order. Raises FleetError."""
        number, self._tasks = self._tasks, self._tasks + 1
        put(self._folder / str(number), task)
        if task is None:
            return []
        self._wait(lambda rank: f"{number}.{rank}", task.timeout + 30)
        results = [take(self._folder / f"{number}.{rank}") for rank in range(self._world_size)]
        for result in results:
            if isinstance(result, Failed):
                raise FleetError(f"{task.contender}: {result.report}")
        return results

    def _wait(self, name: Callable[[int], str], timeout: float) -> float:
        begun = time.monotonic()
        while not all((self._folder / name(rank)).exists() for rank in range(self._world_size)):
            ended = [agent for agent in self._agents if agent.poll() is not None]
            if ended or time.monotonic() - begun > timeout:
                logs = "\n".join(path.read_text()[-4000:] for path in self._folder.glob("*.err"))
                raise FleetError(f"torchrun {'ended' if ended else 'takes too long'}:\n{logs}")
            time.sleep(POLL)
        return time.monotonic() - begun


@contextmanager
def fleet(hosts: Sequence[Host], ranks_per_host: int, folder: Path) -> Iterator[Fleet]:
    """Start torchrun on all hosts; `folder` is an empty one that all of them see."""
    worker = ("-m", "tests.benchmarks.hosts.worker", str(folder))
    with agents(hosts, ranks_per_host, worker, folder, env=ENVIRONMENT) as started:
        made = Fleet(folder, started, len(hosts) * ranks_per_host)
        yield made
        made.run(None)
        for agent in started:
            agent.wait(30)
