"""torchrun on every host, with one rendezvous on the first, over the links between hosts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.benchmarks.hosts.links import Host
from tests.benchmarks.hosts.tasks import POLL, Failed, Measured, Task, put, take
from tests.processes import kill_tree, python_path

PORT = 29400
START = 300.0
"""Seconds for all ranks to make their imports."""

ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "peer",
    "TP_SOCKET_IFNAME": "peer",
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
                logs = "\n".join(path.read_text()[-4000:] for path in self._folder.glob("log.*"))
                raise FleetError(f"torchrun {'ended' if ended else 'takes too long'}:\n{logs}")
            time.sleep(POLL)
        return time.monotonic() - begun


@contextmanager
def fleet(hosts: Sequence[Host], ranks_per_host: int, folder: Path) -> Iterator[Fleet]:
    """Start torchrun on all hosts; `folder` is an empty one that all of them see."""
    agents = []
    with ExitStack() as stack:
        for host in hosts:
            meeting = (
                f"--nnodes={len(hosts)}",
                f"--nproc-per-node={ranks_per_host}",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={hosts[0].peer_address}:{PORT}",
                f"--rdzv-conf=is_host={host.number == 0}",
                f"--local-addr={host.peer_address}",
            )
            worker = ("-m", "tests.benchmarks.hosts.worker", str(folder))
            command = host.command(sys.executable, "-m", "torch.distributed.run", *meeting, *worker)
            log = stack.enter_context(Path(folder, f"log.{host.number}").open("wb"))
            environ = {**os.environ, **ENVIRONMENT, "PYTHONPATH": python_path()}
            agents.append(subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
            stack.callback(kill_tree, agents[-1].pid)
        made = Fleet(folder, agents, len(hosts) * ranks_per_host)
        yield made
        made.run(None)
        for agent in agents:
            agent.wait(30)
