"""A real Slurm on this machine: a controller and several nodes, each a slurmd, from Debian's packages."""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from launch.local_s3 import die_with_parent, free_ports
from tests.debian import install

PORTS = 20000
"""Where the script's ports begin: a job's is this and its number, which here begins where that port is free."""

# Everything as one user and in one directory. Nodes are addresses of loopback, so that their names need no name server.
# Without munge, for all that could be forged here is a test; and without cgroups, which a container may not make.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdSpoolDir={directory}/%n
SlurmdPidFile={directory}/%n.pid
SlurmdLogFile={directory}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
KillWait=2
FirstJobId={first}
PartitionName=all Nodes=ALL Default=YES
"""


class Slurm:
    """A cluster that runs."""

    def __init__(self, directory: Path, nodes: int) -> None:
        self.nodes = [f"127.0.0.{number}" for number in range(1, nodes + 1)]
        self._conf = str(directory / "slurm.conf")
        self._jobs: list[str] = []
        self.environ = {**os.environ, "SLURM_CONF": self._conf}

    def tell(self, *command: str) -> str:
        """What one of Slurm's commands prints. Raises CalledProcessError."""
        return subprocess.run(command, check=True, env=self.environ, capture_output=True, text=True, timeout=120).stdout

    def submit(self, script: Path, *, cwd: Path, env: Mapping[str, str]) -> str:
        """Submit `script` from `cwd`, where its log will be job.log, and return the job's number."""
        environ = {**self.environ, **env}
        command = ["sbatch", "--parsable", "--output=job.log", str(script)]
        self._jobs.append(subprocess.check_output(command, cwd=cwd, env=environ, text=True, timeout=120).strip())
        return self._jobs[-1]

    def code(self, job: str, timeout: float = 240) -> int:
        """Wait for the job's end, and return its exit code: 128 + n where signal n ended it."""
        deadline = time.monotonic() + timeout
        while True:
            about = self.tell("scontrol", "show", "--oneliner", "job", job)
            ended = re.search(r"JobState=(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL) .* ExitCode=(\d+):(\d+)", about)
            if ended:
                return int(ended[2]) or (128 + int(ended[3]) if ended[3] != "0" else 0)
            if time.monotonic() > deadline:
                raise TimeoutError(f"the job has not ended after {timeout} s: {about}")
            time.sleep(0.2)

    def end(self) -> None:
        """Kill all that was started under this Slurm: daemons, their steps and the jobs' processes."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                step = re.match(r"slurmstepd: \[(\d+)\.", " ".join(process.cmdline()))  # has no environment to look at
                if (step and step[1] in self._jobs) or process.environ().get("SLURM_CONF") == self._conf:
                    process.kill()
                    process.wait(10)


@contextlib.contextmanager
def slurm(directory: Path, nodes: int) -> Iterator[Slurm]:
    """Start a Slurm of that many nodes, all of them this machine, with its files in `directory`."""
    install(["slurmctld", "slurmd", "sbatch"], ["slurmctld", "slurmd", "slurm-client"])
    cluster = Slurm(directory, nodes)
    control, *ports = free_ports(1 + nodes)
    host, user = socket.gethostname(), getpass.getuser()
    conf = CONF.format(host=host, user=user, port=control, directory=directory, first=_free_port() - PORTS)
    for node, port in zip(cluster.nodes, ports, strict=True):
        conf += f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2\n"
    (directory / "slurm.conf").write_text(conf)
    (directory / "state").mkdir()
    daemons = [["slurmctld", "-D", "-i"], *(["slurmd", "-D", "-N", node] for node in cluster.nodes)]
    try:
        with contextlib.ExitStack() as stack:
            logs = [directory / f"daemon-{number}.log" for number in range(len(daemons))]
            for command, log in zip(daemons, logs, strict=True):
                out = stack.enter_context(log.open("w"))
                options = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
                subprocess.Popen(command, env=cluster.environ, preexec_fn=die_with_parent, **options)  # noqa: PLW1509
            _wait_until_idle(cluster, logs)
            yield cluster
    finally:
        cluster.end()


def _free_port() -> int:
    """A port for a first job, and for the next after it, that were free a moment ago."""
    while True:
        first = random.randrange(PORTS + 1, PORTS + 9990)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + 4):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def _wait_until_idle(cluster: Slurm, logs: Sequence[Path]) -> None:
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(subprocess.CalledProcessError):  # the controller does not answer yet
            if set(cluster.tell("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}:
                return
        if time.monotonic() > deadline:
            said = "".join(f"\n== {log.name}\n{log.read_text()[-2000:]}" for log in logs)
            raise RuntimeError(f"Slurm's nodes are not idle after 120 s{said}")
        time.sleep(0.1)
