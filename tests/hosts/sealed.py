"""A command run in network, process and mount namespaces of its own, of which the kernel leaves nothing.

When the first process in them ends, however it ends, the kernel kills the others there, takes their links down and
drops the files that they wrote in memory.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from launch.local_s3 import die_with_parent

MEMORY = "/dev/shm"
"""Where the sealed command's temporary files are."""

CANNOT = 69
"""The exit code where no namespaces can be made: sysexits' EX_UNAVAILABLE."""

_UNSHARE = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_PROBE = f"""set -e
mount -t tmpfs lab {MEMORY}
ip link set lo up
ip link add name probe type bridge
ip link add name probe0 type veth peer name probe1
tc qdisc add dev probe0 root tbf rate 1mbit burst 32kb latency 50ms
unshare --net --uts hostname probe"""


def why_not() -> str | None:
    """The reason, in one line, why a command cannot be sealed here; None where it can."""
    try:
        tried = subprocess.run([*_UNSHARE, "sh", "-c", _PROBE], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"unshare: {error.strerror}"
    said = tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"]
    return said[-1] if tried.returncode else None


def call_sealed(fn: Callable[..., Any], *args: Any) -> Any:
    """What the module-level `fn(*args)` returns, called sealed. They travel by pickle, through a file without a name:
    other files may be elsewhere there."""
    with tempfile.TemporaryFile() as file:
        pickle.dump((fn, args), file)
        file.seek(0)
        code = run_sealed(["-m", __name__, str(file.fileno())], [file.fileno()])
        assert code == 0, f"the sealed call of {fn.__name__} ended with {code}"
        file.seek(0)
        return pickle.load(file)


def _called(file: BinaryIO) -> None:
    fn, args = pickle.load(file)
    value = fn(*args)
    file.seek(0)
    pickle.dump(value, file)


def run_sealed(args: Sequence[str], files: Sequence[int] = ()) -> int:
    """Run `python *args` sealed, as its world's first process, and return its exit code. It has the open `files`.

    It ends with this process, also with one that is killed.
    """
    inner = f'mount -t tmpfs lab {MEMORY} && ip link set lo up && exec "$@"'
    environ = {**os.environ, "TMPDIR": MEMORY}
    command = [*_UNSHARE, "sh", "-c", inner, "sh", sys.executable, *args]
    process = subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        pass_fds=files,
        preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call
    )
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return process.wait()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        process.kill()  # unshare, and for it the kernel kills all that there is inside
        process.wait()
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[1]), "r+b") as handed:
        _called(handed)
