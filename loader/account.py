"""The job's report, of what every rank did."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping

import torch

from loader import report as reports
from loader.job import Filled, Job
from loader.stream.load import Loaded
from loader.stream.planning import pack, unpack


def report_on(job: Job, filled: Filled, mesh: Mapping[str, int]) -> reports.Report:
    """On every rank, and of all that was done until now. Collective."""
    control = job.control
    with control.phase("report"):
        control.put("report", pack(_of_this_rank(job, filled.loaded)))
        merged = b""
        if control.rank == 0:
            merged = pack(
                reports.merge(
                    [unpack(data) for data in control.take("report", range(control.world_size))],
                    source=job.described(),
                    mesh=mesh,
                    tensors=filled.tensors,
                    needed_bytes=filled.loaded.needed_bytes,
                    budget_bytes=job.read.memory_budget,
                    fingerprint=filled.fingerprint,
                    checksums=_checksums(filled.loaded),
                    reading=(job.read.share, job.read.concurrency),
                )
            )
        report: reports.Report = unpack(control.broadcast("merged", merged))
    return report


def _of_this_rank(job: Job, loaded: Loaded) -> reports.RankReport:
    tally, seconds = job.store.tally, job.control.recorder.seconds
    sink = sum(seconds[name] for name in ("save plan", "save", "save shards", "complete", "finish"))
    return reports.RankReport(
        rank=job.control.rank,
        host=socket.gethostname(),
        fetched_bytes=tally.fetched_bytes,
        gets=tally.gets,
        retries=tally.retries,
        hedged_bytes=tally.hedged_bytes,
        throttled=tally.throttled,
        get_seconds=seconds["GET"],
        loop_seconds=loaded.loop_seconds,
        upload_seconds=seconds["upload"],
        threads=torch.get_num_threads(),
        exchanged_bytes=loaded.exchanged_bytes,
        shard_bytes=loaded.shard_bytes,
        peak_over_shards_bytes=loaded.peak_over_shards_bytes,
        seconds=reports.Seconds(
            total=time.monotonic() - job.begun,
            catalog=seconds["open"] + seconds["catalog"],
            plan=sum(seconds[name] for name in ("budget", "targets", "demand", "plan", "claims")),
            read=seconds["read"],
            exchange=seconds["exchange"],
            convert=seconds["convert"],
            write=seconds["write"] + seconds["upload"] + sink,
            sink=sink,
        ),
    )


def _checksums(loaded: Loaded) -> dict[str, reports.Checksum] | None:
    if loaded.checksums is None:
        return None
    return {name: reports.Checksum(**checked._asdict()) for name, checked in loaded.checksums.items()}
