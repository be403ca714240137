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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
        return {int(r): int(code) for r, code in re.findall(r"rank\s*: (\d+) .*\n\s*exitcode\s*: (-?\d+)", self.stderr)}


def torchrun(
    nproc: int,
    args: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | str = ROOT,
    nnodes: int = 1,
    timeout: float = 120,
    meanwhile: Callable[[Sequence[subprocess.Popen[bytes]]], object] = lambda _: None,
) -> Finished:
    """Run `python -m torch.distributed.run` with `args` (`["-m", "loader.init_from_hf", …]`): `nproc` ranks on each of
    `nnodes` agents, all on this machine. After `timeout` seconds all are killed, and TimeoutError has their stacks.
    `meanwhile` is called with the agents when all have started.
    """
    meeting = ["--standalone"]
    if nnodes > 1:
        meeting = [f"--nnodes={nnodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_ports(1)[0]}"]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={nproc}", *map(str, args)]
    environ = {
        **os.environ,
        "PYTHONPATH": python_path(),
        "PYTHONFAULTHANDLER": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        **(env or {}),
    }
    with tempfile.TemporaryDirectory(prefix="torchrun-") as scratch, contextlib.ExitStack() as stack:
        agents, logs = [], []
        for node in range(nnodes):
            # Files, not pipes: a pipe stays open as long as any descendant lives.
            out, err = (stack.enter_context(Path(scratch, f"{node}.{name}").open("w+")) for name in ("out", "err"))
            agent = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environ, cwd=cwd)
            stack.callback(kill_tree, agent.pid)
            agents.append(agent)
            logs.append((out, err))
        meanwhile(agents)
        late = not _all_end(agents, timeout)
        stdout, stderr = ("".join(_contents(log[stream]) for log in logs) for stream in (0, 1))
    if late:
        raise TimeoutError(f"torchrun had not ended after {timeout} s\n{stdout}\n{stderr}")
    return Finished(next((agent.returncode for agent in agents if agent.returncode), 0), stdout, stderr)


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


def _contents(file: Any) -> str:
    file.seek(0)
    return str(file.read())
