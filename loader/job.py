"""One load: what is at the source, how it is read, and what came of it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loader import report as reports
from loader.config import Read
from loader.convert.conversion import KeepNames, visible_keys
from loader.exchange.control import Control
from loader.memory import PeakMemory
from loader.place.targets import targets_of
from loader.store.base import Access
from loader.store.source import Source, read_source
from loader.store.store import Store
from loader.stream.load import Loaded, fill
from loader.stream.planning import pack, unpack


class Job:
    """The steps that the command and the library share. Every rank takes them together."""

    def __init__(self, uri: str, storage_options: Mapping[str, Any], read: Read, control: Control) -> None:
        self.begun = time.monotonic()
        self.read = read
        self.control = control
        self.memory = PeakMemory()
        with control.phase("open"):
            access = Access(uri, dict(storage_options), read.concurrency, read.timeout)
            self.store = Store(access, retries=read.retries, deadline=read.deadline)
        with control.phase("catalog"):
            found = pack(read_source(self.store, read.concurrency)) if control.rank == 0 else b""
            self.source: Source = unpack(control.broadcast("source", found))
        self.catalog_seconds = time.monotonic() - self.begun

    def load(
        self,
        target: nn.Module | Mapping[str, Tensor],
        *,
        ignore: Sequence[str],
        strip_prefix: str,
        mesh: Mapping[str, int],
    ) -> reports.Report:
        """Fill `target`, and report on it, on every rank."""
        try:
            return self._load(target, ignore, strip_prefix, mesh)
        finally:
            self.memory.stop()
            self.store.close()

    def _load(
        self,
        target: nn.Module | Mapping[str, Tensor],
        ignore: Sequence[str],
        strip_prefix: str,
        mesh: Mapping[str, int],
    ) -> reports.Report:
        with self.control.phase("place"):
            names = visible_keys(self.source.catalog, ignore, strip_prefix)
            targets = targets_of(target)
            self.memory.start()
        loaded = fill(
            targets,
            KeepNames(self.source.catalog, names),
            self.source.catalog,
            names.values(),
            self.store,
            self.control,
            share=self.read.share,
            node=node_name(),
            memory_budget=self.read.memory_budget,
            range_size=self.read.range_size,
            concurrency=self.read.concurrency,
            deadline=self.read.deadline,
            memory=self.memory,
            show=True,
        )
        return self._report(loaded, mesh, len(names))

    def _report(self, loaded: Loaded, mesh: Mapping[str, int], tensors: int) -> reports.Report:
        control, catalog, tally = self.control, self.source.catalog, self.store.tally
        mine = reports.RankReport(
            rank=control.rank,
            host=socket.gethostname(),
            fetched_bytes=tally.fetched_bytes,
            gets=tally.gets,
            retries=tally.retries,
            exchanged_bytes=loaded.exchanged_bytes,
            shard_bytes=loaded.shard_bytes,
            peak_over_shards_bytes=loaded.peak_over_shards_bytes,
            seconds=reports.Seconds(
                total=time.monotonic() - self.begun,
                catalog=self.catalog_seconds,
                plan=loaded.plan_seconds,
                read=loaded.seconds.read,
                exchange=loaded.seconds.exchange,
                convert=loaded.seconds.convert,
                write=loaded.seconds.write,
            ),
        )
        with control.phase("report"):
            control.put("report", pack(mine))
            merged = b""
            if control.rank == 0:
                ranks = [unpack(data) for data in control.take("report", range(control.world_size))]
                source = reports.Source(
                    uri=self.store.uri,
                    files=len(catalog.files),
                    checkpoint_bytes=catalog.checkpoint_bytes,
                    pins={file.name: file.pin for file in catalog.files},
                )
                merged = pack(
                    reports.merge(
                        ranks,
                        source=source,
                        mesh=mesh,
                        tensors=tensors,
                        needed_bytes=loaded.needed_bytes,
                        budget_bytes=self.read.memory_budget,
                    )
                )
            report: reports.Report = unpack(control.broadcast("merged", merged))
        return report


def node_name() -> str:
    """What ranks of one node have in common: torchrun's node, else the host name and the network namespace."""
    group = os.environ.get("GROUP_RANK")
    return f"node {group}" if group is not None else f"{socket.gethostname()} {_network()}"


def _network() -> str:
    try:
        return str(Path("/proc/self/ns/net").readlink())
    except OSError:
        return ""
