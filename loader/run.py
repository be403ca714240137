"""The story: from a config to every rank's own shards, handed over."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from loader.build import build_model, needless_keys, open_job, own_conversion, wishes_of
from loader.config import Config, resolve_mesh
from loader.errors import LoaderError
from loader.exchange.control import Control
from loader.place.mesh import make_mesh
from loader.place.targets import targets_of
from loader.place.user_code import resolve
from loader.sinks import assets, checkpoint, directory, entrypoint
from loader.store.source import read_whole
from loader.uri import public_uri


def run(config: Config, control: Control, device: torch.device) -> Callable[[], int]:
    """Build, load, report: every rank of the default process group calls it.

    Returns what is left to do, and gives the exit code: the user's program. It may train for weeks, so it is to be
    called when `control` is closed.
    """
    with control.phase("start"):
        convert = own_conversion(config)
        dims = resolve_mesh(config.mesh, control.world_size)
        user_program = resolve(config.output.entrypoint) if config.output.entrypoint else None
    with control.phase("mesh"):  # a collective: no rank may have failed before it
        mesh = make_mesh(dims, device.type)
    with _output(config, control) as wanted:
        if not wanted:
            return lambda: 0
        job = open_job(config, convert, control)
        with control.phase("assets"):
            if config.output.checkpoint is not None and control.rank == 0:
                assets.copy(partial(read_whole, job.store), job.source.names, config.output.checkpoint)
        with control.phase("build"):
            model = build_model(config, job, mesh, device)
            needless, wishes = needless_keys(config, job, model), wishes_of(config, job, model)
        report = job.load(model, mesh=dims, needless=needless, wishes=wishes, proof=config)
        if config.output.checkpoint is not None:
            with control.phase("save"):
                checkpoint.save(targets_of(model), config.output.checkpoint)
    with control.phase("report"):
        if control.rank == 0:
            print(report.table(), flush=True)  # noqa: T201 - what the command is asked for
            if config.report is not None:
                report.write(config.report)
    return partial(entrypoint.call, user_program, model, mesh, report) if user_program else lambda: 0


@contextmanager
def _output(config: Config, control: Control) -> Iterator[bool]:
    """The checkpoint's directory, made ready before anything is read, and emptied again if the run fails.

    Yields whether there is anything to do: not where a complete checkpoint is there to be used.
    """
    url = config.output.checkpoint
    if url is None:
        yield True
        return
    with control.phase("output"):
        made = directory.prepare(url, config.output.if_exists) if control.rank == 0 else True
        wanted = control.broadcast("wanted", b"yes" if made else b"no") == b"yes"
    if not wanted and control.rank == 0:
        print(f"{public_uri(url)} holds a complete checkpoint: used as it is", flush=True)  # noqa: T201
    try:
        yield wanted
    except LoaderError:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # each node may have a local directory of its own
            directory.discard(url)
        raise
