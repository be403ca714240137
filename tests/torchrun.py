"""Run a script or a module under the real torchrun, as a user does."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import psutil

from launch.local_s3 import free_ports
from tests.processes import ROOT, kill_tree, python_path


@dataclasses.dataclass(frozen=True)
class Finished:
    """A torchrun that has ended: the agents' outputs one after the other, and the first exit code that is not 0."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def exit_codes(self) -> dict[int, int]:
        """Exit codes by rank, of the ranks that torchrun lists as failed."""
        return exit_codes(self.stderr)


def exit_codes(stderr: str) -> dict[int, int]:
    """By rank, as torchrun's summaries have them."""
    return {int(r): int(code) for r, code in re.findall(r"rank\s*: (\d+) .*\n\s*exitcode\s*: (-?\d+)", stderr)}


class Host(Protocol):
    """Where an agent runs: its address for the others, and the interface that has it."""

    @property
    def peer_address(self) -> str: ...
    @property
    def peer_interface(self) -> str: ...
    def command(self, *args: str) -> list[str]:
        """What runs `args` there."""


@dataclasses.dataclass(frozen=True)
class Here:
    """This machine, over loopback."""

    peer_address = "127.0.0.1"
    peer_interface = "lo"

    def command(self, *args: str) -> list[str]:
        return list(args)


TWO_HOSTS = (Here(), Here())


@contextlib.contextmanager
def agents(
    hosts: Sequence[Host],
    nproc: int,
    args: Sequence[str | Path],
    folder: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | str = ROOT,
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start `python -m torch.distributed.run` with `args` on each of `hosts`, with `nproc` ranks there, and one
    rendezvous on the first. What they and their ranks print is in `folder`, host by host. All are killed at the end.
    """
    several = len(hosts) > 1
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}"]
    endpoint = f"--rdzv-endpoint={hosts[0].peer_address}:{free_ports(1)[0]}"
    meeting = [f"--nnodes={len(hosts)}", "--rdzv-backend=c10d", endpoint] if several else ["--standalone"]
    environ = {**os.environ, "PYTHONPATH": python_path(), "PYTHONFAULTHANDLER": "1", **(env or {})}
    with contextlib.ExitStack() as stack:
        started = []
        for number, host in enumerate(hosts):
            # Files, not pipes: a pipe stays open as long as any descendant lives.
            out, err = (stack.enter_context(path.open("w")) for path in logs_of(folder, number))
            own = [f"--local-addr={host.peer_address}", *([f"--rdzv-conf=is_host={number == 0}"] if several else [])]
            agent = subprocess.Popen(
                host.command(*command, *meeting, *own, *map(str, args)),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={"GLOO_SOCKET_IFNAME": host.peer_interface, "TP_SOCKET_IFNAME": host.peer_interface, **environ},
                cwd=cwd,
            )
            stack.callback(kill_tree, agent.pid)
            started.append(agent)
        yield started


def logs_of(folder: Path, number: int) -> tuple[Path, Path]:
    """The stdout and stderr of the agent on the host of that number."""
    return folder / f"{number}.out", folder / f"{number}.err"


def torchrun(
    nproc: int,
    args: Sequence[str | Path],
    *,
    hosts: Sequence[Host] = (Here(),),
    env: Mapping[str, str] | None = None,
    cwd: Path | str = ROOT,
    timeout: float = 240,
    meanwhile: Callable[[Sequence[subprocess.Popen[bytes]]], object] = lambda _: None,
) -> Finished:
    """Run torchrun with `args` (`["-m", "loader.init_from_hf", …]`) on `hosts`, as `agents` does, and wait for the end.
    After `timeout` seconds all are killed, and TimeoutError has their stacks. `meanwhile` is called with the agents
    when all have started.
    """
    with tempfile.TemporaryDirectory(prefix="torchrun-") as scratch:
        with agents(hosts, nproc, args, Path(scratch), env=env, cwd=cwd) as started:
            meanwhile(started)
            late = not _all_end(started, timeout)
        logs = zip(*(logs_of(Path(scratch), number) for number in range(len(hosts))), strict=True)
        stdout, stderr = ("".join(path.read_text(errors="replace") for path in stream) for stream in logs)
    if late:
        raise TimeoutError(f"torchrun had not ended after {timeout} s\n{stdout}\n{stderr}")
    return Finished(next((agent.returncode for agent in started if agent.returncode), 0), stdout, stderr)


def _all_end(agents: Sequence[subprocess.Popen[bytes]], timeout: float) -> bool:
    """Wait for all; where they do not end, kill them with their workers, which write their stacks."""
    deadline = time.monotonic() + timeout
    try:
        for agent in agents:
            agent.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        workers = [worker for agent in agents for worker in psutil.Process(agent.pid).children(recursive=True)]
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.send_signal(signal.SIGABRT)
        psutil.wait_procs(workers, timeout=2)
        for agent in agents:
            kill_tree(agent.pid)
            agent.wait()
        return False
    return True
