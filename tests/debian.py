"""Programs of Debian's that tests start."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

_LOCK = Path(tempfile.gettempdir(), "loader-tests-apt.lock")


def install(programs: Sequence[str], packages: Sequence[str]) -> None:
    """Install `packages` unless `programs` are all there. Where that cannot be done, the error says what to do by hand.

    apt-get bears no other beside itself, and tests run in several processes: one does it, the others wait.
    """
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [program for program in programs if shutil.which(program) is None]
        if not missing:
            return
        by_hand = f"apt-get install {' '.join(packages)}"
        if shutil.which("apt-get") is None or os.geteuid() != 0:
            raise RuntimeError(f"{missing[0]} is not here, and to install it takes root and apt-get: {by_hand}")
        environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        options = ["-q", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=120"]
        for command in (["apt-get", "-q", "update"], ["apt-get", "install", *options, *packages]):
            ended = subprocess.run(command, check=False, env=environ, capture_output=True, text=True, timeout=600)
        if ended.returncode:  # the second one's: packages may be there whose lists could not be renewed
            raise RuntimeError(f"{by_hand} failed:\n{ended.stdout[-1000:]}{ended.stderr[-3000:]}")
