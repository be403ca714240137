"""The story: from a config to every rank's own shards, handed over."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from loader import timeline
from loader.account import report_on
from loader.build import build_model, needless_keys, open_job, own_conversion, wishes_of
from loader.config import Config, resolve_mesh
from loader.exchange.control import Control
from loader.ground.logs import PLAIN, Voice
from loader.outputs import prepared
from loader.place.mesh import make_mesh
from loader.place.user_code import resolve
from loader.sinks import entrypoint
from loader.sinks.document import check_place
from loader.store.source import read_whole


def run(config: Config, control: Control, device: torch.device, voice: Voice = PLAIN) -> Callable[[], int]:
    """Build, load, report: every rank of the default process group calls it.

    `voice` is how it speaks. Returns what is left to do, and gives the exit code: the user's program. It may train for
    weeks, so it is to be called when `control` is closed.
    """
    with control.phase("start"):
        convert = own_conversion(config)
        dims = resolve_mesh(config.mesh, control.world_size)
        user_program = resolve(config.output.entrypoint) if config.output.entrypoint else None
        if control.rank == 0 and config.report is not None:  # rank 0 writes it, when all else is done
            check_place(config.report, "report")
    with control.phase("mesh"):  # a collective: no rank may have failed before it
        mesh = make_mesh(dims, device.type)
    with timeline.traced(control, config.trace), prepared(config.output, control, voice) as outputs:
        if outputs.all_there:
            return lambda: 0
        job = open_job(config, convert, control)
        with control.phase("assets"):
            outputs.copy_assets(partial(read_whole, job.store), job.source.names)
        with control.phase("build"):
            model = build_model(config, job, mesh, device)
            needless, wishes = needless_keys(config, job, model), wishes_of(config, job, model)
        outputs.check_room(model)
        filled = job.load(model, needless=needless, wishes=wishes, proof=config, show=voice.show)
        outputs.save(model, job.described(), filled.fingerprint)
        report = report_on(job, filled, dims)
    with control.phase("report"):
        if control.rank == 0:
            voice.say(report.table(), **report.summary())
            if config.report is not None:
                report.write(config.report)
    return partial(entrypoint.call, user_program, model, mesh, report) if user_program else lambda: 0
