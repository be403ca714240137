"""Hosts as network namespaces, each with a rate-limited link to the bucket and another to its peers.

To be called in a network namespace of its own (see `sealed`), which is the bucket's side. The bucket's address there
is BUCKET; a host has the interfaces `bucket` and `peer`. Both directions of a link have its rate.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

BUCKET = "10.77.0.1"
KINDS = ("bucket", "peer")
MTU = 9000
"""Bytes: jumbo frames, as in cloud networks, so that headers are 1 % of what a link carries and not 5."""
BURST = "96kb"
"""A little more than the largest packet that a sender hands down at once (64 KiB)."""
QUEUE = "150ms"
"""What may wait for the link before packets are dropped."""


@dataclass(frozen=True)
class Host:
    """One host, by the process that keeps its namespace."""

    number: int
    pid: int
    peer_interface = "peer"

    @property
    def name(self) -> str:
        return f"host-{self.number}"

    @property
    def peer_address(self) -> str:
        return f"10.78.0.{10 + self.number}"

    def command(self, *args: str) -> list[str]:
        """What runs `args` on this host."""
        return ["nsenter", f"--target={self.pid}", "--net", "--uts", *args]

    def processes(self) -> list[psutil.Process]:
        """All that runs on this host."""
        own = Path(f"/proc/{self.pid}/ns/net").readlink()
        found = []
        for process in psutil.process_iter():
            with suppress(OSError):  # it has just ended
                if process.pid != self.pid and Path(f"/proc/{process.pid}/ns/net").readlink() == own:
                    found.append(process)
        return found

    def set_rate(self, kind: str, mbit: float) -> None:
        """From now on its link of that kind carries `mbit` Mbit/s each way."""
        limit = ("root", "tbf", "rate", f"{mbit}mbit", "burst", BURST, "latency", QUEUE)
        _run(["tc", "qdisc", "replace", "dev", f"{kind}{self.number}", *limit])
        _run(self.command("tc", "qdisc", "replace", "dev", kind, *limit))

    def pull_cables(self) -> None:
        """From now on nothing that is sent to or from this host arrives, and nobody is told so."""
        for kind in KINDS:
            _ip("link", "set", f"{kind}{self.number}", "down")

    def plug_cables_in(self) -> None:
        for kind in KINDS:
            _ip("link", "set", f"{kind}{self.number}", "up")


@contextmanager
def hosts(count: int, bucket_mbit: float, peer_mbit: float) -> Iterator[list[Host]]:
    """`count` hosts with links of these rates, in Mbit/s."""
    with ExitStack() as stack:
        for bridge in (f"{kind}s" for kind in KINDS):
            _ip("link", "add", bridge, "mtu", str(MTU), "type", "bridge")
            stack.callback(_ip, "link", "delete", bridge)
            _ip("link", "set", bridge, "up")
        _ip("address", "add", f"{BUCKET}/24", "dev", "buckets")
        made = []
        for number in range(count):
            keeper = subprocess.Popen(["unshare", "--net", "--uts", "sleep", "infinity"])
            stack.callback(keeper.wait)
            stack.callback(keeper.kill)
            host = Host(number, keeper.pid)
            _await_namespace(host)
            _run(host.command("hostname", host.name))
            _run(host.command("ip", "link", "set", "lo", "up"))
            _join(host, "bucket", f"10.77.0.{10 + number}")
            _join(host, "peer", host.peer_address)
            host.set_rate("bucket", bucket_mbit)
            host.set_rate("peer", peer_mbit)
            made.append(host)
        yield made


def _await_namespace(host: Host) -> None:
    ours, theirs = Path("/proc/self/ns/net").readlink(), Path(f"/proc/{host.pid}/ns/net")
    while theirs.readlink() == ours:
        time.sleep(0.005)


def _join(host: Host, kind: str, address: str) -> None:
    """Lay a cable from the host's interface `kind` to the bridge of that kind; with its end it goes."""
    port, frames = f"{kind}{host.number}", ("mtu", str(MTU))
    _ip("link", "add", port, *frames, "type", "veth", "peer", "name", kind, *frames, "netns", str(host.pid))
    _ip("link", "set", port, "master", f"{kind}s", "up")
    _run(host.command("ip", "address", "add", f"{address}/24", "dev", kind))
    _run(host.command("ip", "link", "set", kind, "up"))


def _ip(*args: str) -> None:
    _run(["ip", *args])


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True)
