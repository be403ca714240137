"""A job as the command line and the config ask for it, checked here: it costs a second, and no hour in a queue."""

# ruff: noqa: INP001 - launch is a folder of commands, not a package of the library
from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from loader.config import Config, parse, resolve_mesh
from loader.errors import ConfigError
from loader.store.secrets import Secrets

POD_NAME = 63
"""Characters that a pod's name may have, for it is a host name too, a label of RFC 1035: JobSet refuses more."""

SHARED = "/dev/shm"  # noqa: S108 - a pod's own
"""Where a pod's containers see each other's files."""

CPUS_PER_RANK = 4
"""Cores that a pod asks for where nothing is said: a rank's own, and some for its reading and its trainer's data."""

_SHELL = re.compile(r"[;&|<>()$`\n]")


@dataclasses.dataclass(frozen=True)
class Pod:
    """What is asked of Kubernetes alone. `memory` and `shm`, which is part of it, are GiB."""

    image: str
    train_image: str
    memory: int
    shm: int
    cpus: int
    service_account: str | None
    secret: str | None


@dataclasses.dataclass(frozen=True)
class Job:
    """`ranks` and `gpus` are those of one node; `overrides` and `train` are words; `config` is the YAML's text;
    `in_memory` is the directory in the nodes' memory that `train` takes its shards from, if it is one."""

    name: str
    nodes: int
    ranks: int
    gpus: int
    config: str
    overrides: Sequence[str]
    train: Sequence[str]
    in_memory: str | None
    pod: Pod | None


def job_of(given: argparse.Namespace) -> Job:
    """The job that the arguments and their config ask for. Raises ConfigError, which tells what to do."""
    _check_form(given)
    config = parse(given.config, given.overrides)
    resolve_mesh(config.mesh, given.nodes * given.ranks_per_node)
    train = command_words(given.train) if given.train is not None else []
    _check_hand_over(config, train)
    if given.form == "kubernetes":
        _check_seen_by_pods(config)
    text = Path(given.config).read_text(encoding="utf-8-sig")
    _check_no_secret(config, [text, *given.overrides])
    return Job(
        name=given.name,
        nodes=given.nodes,
        ranks=given.ranks_per_node,
        gpus=given.ranks_per_node if given.gpus_per_node is None else given.gpus_per_node,
        config=text.rstrip() + "\n",
        overrides=given.overrides,
        train=train,
        in_memory=config.output.local if train and _in_memory(config.output.local) else None,
        pod=_pod_of(given) if given.form == "kubernetes" else None,
    )


def _check_form(given: argparse.Namespace) -> None:
    """That nothing is given which the form would not use, and nothing left out that it needs."""
    if given.form == "laptop" and given.nodes > 1:
        raise ConfigError(f"--nodes: a laptop is one node, found {given.nodes}: make slurm or kubernetes of it")
    if given.form == "laptop" and given.gpus_per_node is not None:
        raise ConfigError("--gpus-per-node: nobody gives GPUs out on a laptop: leave it out")
    if given.form == "kubernetes":
        missing = [name for name in ("image", "memory_gib") if getattr(given, name) is None]
        if missing:
            raise ConfigError(f"{_option(missing[0])}: is missing, and kubernetes needs it")
        return
    names = {field.name for field in dataclasses.fields(Pod)} - {"memory", "shm"} | {"memory_gib", "shm_gib"}
    unused = sorted(name for name in names if getattr(given, name) is not None)
    if unused:
        raise ConfigError(f"{_option(unused[0])}: is for kubernetes alone, found with {given.form}: leave it out")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _pod_of(given: argparse.Namespace) -> Pod:
    longest = f"{given.name}-node-0-{given.nodes - 1}-xxxxx"
    if len(longest) > POD_NAME:
        raise ConfigError(f"--name: a pod would be {longest}, which is {len(longest) - POD_NAME} characters too long")
    shm = given.memory_gib // 2 if given.shm_gib is None else given.shm_gib
    if not 0 < shm < given.memory_gib:
        raise ConfigError(
            f"--shm-gib: /dev/shm is part of the pod's memory, and should be at least 1 and less than all of it, "
            f"found {shm} of {given.memory_gib} GiB"
        )
    return Pod(
        image=given.image,
        train_image=given.train_image or given.image,
        memory=given.memory_gib,
        shm=shm,
        cpus=given.cpus or CPUS_PER_RANK * given.ranks_per_node,
        service_account=given.service_account,
        secret=given.secret,
    )


def command_words(command: str) -> list[str]:
    """The words of one plain command. Raises ConfigError where it is more: on Kubernetes no shell reads it."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"--train: cannot be split into words: {str(error).lower()}") from None
    if not words:
        raise ConfigError('--train: is empty: name a command, such as "torchrun train.py", or leave it out')
    if "=" in words[0]:
        raise ConfigError(f'--train: begins with a variable: write "env {command}"')
    special = next(filter(None, map(_SHELL.search, words)), None)
    if special:
        raise ConfigError(
            f"--train: should be one plain command, for no shell reads it, found {special[0]!r}: "
            'put it into a script and name that, as in "bash train.sh"'
        )
    return words


def _check_hand_over(config: Config, train: Sequence[str]) -> None:
    output = config.output
    if train and output.checkpoint is None and output.local is None:
        raise ConfigError(
            "--train: the init step would leave nothing for the command: set output.local or output.checkpoint; "
            "or leave --train out and set output.entrypoint, which trains in the init step's own processes"
        )
    if not train and output.checkpoint is None and output.entrypoint is None:
        left = "nobody would take output.local over" if output.local else "nothing would be left of the load"
        raise ConfigError(f"output: {left}: give --train, or set output.entrypoint or output.checkpoint")


def _check_seen_by_pods(config: Config) -> None:
    """That the training container sees what the init container left: they share memory, and no disk."""
    checkpoint, local = config.output.checkpoint, config.output.local
    if checkpoint is not None and "://" not in checkpoint:
        raise ConfigError(
            f"output.checkpoint: {checkpoint} would be in the file system of one container, and no other sees that: "
            "name a bucket"
        )
    if local is not None and not _in_memory(local):
        raise ConfigError(
            f"output.local: {local} would be in the file system of one container, and no other sees that: "
            f"name a directory in {SHARED}, which they share"
        )


def _in_memory(directory: str | None) -> bool:
    return directory is not None and Path(SHARED) in Path(os.path.normpath(directory)).parents


def _check_no_secret(config: Config, texts: Sequence[str]) -> None:
    secrets = Secrets(config.source.storage_options)
    if any(secrets.hide(text) != text for text in texts):
        raise ConfigError(
            "source: holds credentials, which would lie open in the files made here: take them out of storage_options "
            "and uri, and give them by the role of the machine or the service account, by the storage client's "
            "environment variables, or on Kubernetes with --secret"
        )
