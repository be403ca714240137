"""The Dockerfile's steps without a Docker engine: each is run as it is written, where the image would run it.

A mount namespace stands for the image's file system: /srv, /home and /etc are directories of the test's own, /usr/local
has the Python that runs the tests (as in the base image), the rest is this machine's. What is not shown is the base.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dockerfile_parse import DockerfileParser

from tests.processes import ROOT

FILE = ROOT / "docker/Dockerfile"
BASE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # the base image's, and Docker's own default
OWN = ("/srv", "/home", "/etc")


class Image:
    """What the Dockerfile makes, in a directory. `config` has what it says of how to start: USER, ENV, ENTRYPOINT, …"""

    def __init__(self, directory: Path) -> None:
        self._root = directory
        self.config: dict[str, Any] = {"ENV": {"PATH": BASE_PATH}, "USER": "0:0", "WORKDIR": "/"}
        for path in OWN:
            (directory / path[1:]).mkdir()
        subprocess.run(["cp", "-a", "/etc/.", directory / "etc"], check=True)
        subprocess.run(self._inside(["ldconfig"]), check=True)  # as the base image does, for its Python's library

    def build(self) -> None:
        """Run each step, those of both stages one after the other."""
        for step in DockerfileParser(fileobj=FILE.open("rb"), env_replace=False).structure:
            getattr(self, f"_{step['instruction'].lower()}")(step["value"])

    def start(self, command: Sequence[str], *, env: Mapping[str, str] = {}, **options: Any) -> subprocess.Popen[str]:
        """Start `command` as `docker run` would: as process 1, with the image's user, environment and directory."""
        uid, gid = self.config["USER"].split(":")
        environ = [f"{name}={value}" for name, value in {**self.config["ENV"], **env}.items()]
        user = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
        inner = [*user, "env", "-i", f"HOME={self.config['WORKDIR']}", *environ, *command]
        return subprocess.Popen(
            self._inside(inner, "--pid", "--fork", "--kill-child", "--mount-proc"), text=True, **options
        )

    def _inside(self, command: Sequence[str], *options: str) -> list[str]:
        mounts = [f"mount --bind {shlex.quote(str(self._root / path[1:]))} {path}" for path in OWN]
        if sys.base_prefix != "/usr":
            mounts.append(f"mount --bind {shlex.quote(sys.base_prefix)} /usr/local")
        last = f"cd {self.config['WORKDIR']} && exec {shlex.join(command)}"
        root = [] if os.geteuid() == 0 else ["--map-root-user"]
        return ["unshare", "--mount", *root, *options, "sh", "-euc", "\n".join([*mounts, last])]

    def _run(self, value: str) -> None:
        """As root, with what this machine needs to reach a package index."""
        given = {n: v for n, v in os.environ.items() if not n.startswith(("PYTHON", "VIRTUAL_ENV"))}
        command = self._inside(["sh", "-c", value])
        subprocess.run(command, check=True, env={**given, **self.config["ENV"], "HOME": "/root"}, timeout=600)

    def _copy(self, value: str) -> None:
        *sources, target = value.split()
        if sources[0].startswith("--from="):
            assert sources[1:] == [target]  # the stages are one file system here
            return
        where = self._root / self.config["WORKDIR"][1:] / target
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, where, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, where)

    def _workdir(self, value: str) -> None:
        self.config["WORKDIR"] = value
        (self._root / value[1:]).mkdir(parents=True, exist_ok=True)

    def _env(self, value: str) -> None:
        name, text = value.split("=", 1)
        self.config["ENV"][name] = text.replace("$PATH", self.config["ENV"]["PATH"])

    def _user(self, value: str) -> None:
        self.config["USER"] = value

    def _entrypoint(self, value: str) -> None:
        self.config["ENTRYPOINT"] = json.loads(value)

    def _cmd(self, value: str) -> None:
        self.config["CMD"] = json.loads(value)

    def _healthcheck(self, value: str) -> None:
        self.config["HEALTHCHECK"] = json.loads(value.split(" CMD ")[1])

    def _label(self, value: str) -> None:
        self.config["LABEL"] = dict(pair.split("=", 1) for pair in shlex.split(value))

    def _from(self, value: str) -> None:
        self.config |= {"ENV": {"PATH": BASE_PATH}, "USER": "0:0", "WORKDIR": "/", "FROM": value}

    def _arg(self, value: str) -> None:
        name, _, default = value.partition("=")
        self.config.setdefault("ARG", {})[name] = default

    def _comment(self, value: str) -> None:
        pass
