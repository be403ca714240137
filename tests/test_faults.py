"""Every fault through every back end, on two ranks: mended and counted, or the same error on both, and soon."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import loader
from loader.errors import LoaderError
from loader.exchange import watch
from loader.store.schemes.local import LocalScheme
from loader.store.schemes.other import OtherScheme
from tests.checkpoints import random_checkpoint
from tests.endings import SOON, Giving, took
from tests.faults import BACKENDS, CORRUPT, FILES, MENDED, PIN, REFUSED, REST, ROWS, STORE, UNSEEN, table
from tests.misbehaving import FILE
from tests.places import change_file, misbehaving_place
from tests.processes import ROOT
from tests.proxy import Request
from tests.ranks import run_ranks
from tests.servers import http_server
from tests.shards import blank, differences, shard

RANKS = 2
pytestmark = pytest.mark.timeout(300)  # the first cell of a back end waits for all of them
TENSORS = {f"layers.{n}.weight": (torch.bfloat16, (256, 384)) for n in range(3)}  # 9 ranges
READ = {"range_size": "64KiB", "memory_budget": "32MiB", "concurrency": 4, "timeout": "30s"}
CELLS = [(backend, name) for backend in BACKENDS for name, row in ROWS.items() if row.cell(backend)]
HOW = {"overwritten": "overwrite", "deleted": "delete", "uploaded-again": "again", "hangs": "hang"}
UNREAD = 16 << 20
"""Bytes that a socket may take of a body that nobody reads, with room to spare."""


class Elsewhere(LocalFileSystem):
    """A scheme that has no module of its own: files by fsspec's generic interface."""

    protocol = "elsewhere"

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        found = super().info(path, **kwargs)
        return found | {"ETag": f"{Path(path).stat().st_mtime_ns}-{found['ino']}"}


def _suffer(backend: str, uris: list[str], options: list[dict[str, Any]], whole: str, other: str) -> dict[str, Any]:
    """Each load's error on this rank, or its report; after each, the group must work as before."""
    from safetensors.torch import load_file

    watch.BEAT = 0.05  # there are many cells
    fsspec.register_implementation("elsewhere", Elsewhere)
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (RANKS,))
    expected = {key: shard(tensor, mesh, [Shard(1)]) for key, tensor in load_file(whole).items()}
    told: dict[str, Any] = {}
    for name, row in ROWS.items():
        if row.cell(backend) is None:
            continue
        target = {key: blank(tensor) for key, tensor in expected.items()}
        read = {**READ, "backend": backend.rsplit(maxsplit=1)[-1] if backend not in FILES else "auto", **row.read}
        with pytest.MonkeyPatch.context() as patch:
            if backend in FILES and rank == 0:
                _change_at_the_third_read(patch, Path(uris[0].partition("://")[2], name, FILE), name, other)
            giving = Giving(patch)
            try:
                report = loader.load(target, f"{uris[rank]}/{name}", storage_options=options[rank], **read)
                told[name] = report, differences(target, expected)
            except LoaderError as error:
                told[name] = (type(error).__name__, str(error), error.rank, giving.end())
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == RANKS
    return told


def _change_at_the_third_read(patch: pytest.MonkeyPatch, path: Path, name: str, other: str) -> None:
    """No server stands between: this rank changes the file itself."""
    calls = itertools.count()
    for kind in (LocalScheme, OtherScheme):

        def read(self: Any, *args: Any, original: Callable[..., None] = kind.read) -> None:
            if next(calls) == 2:
                change_file(path, HOW[name], Path(other))
            original(self, *args)

        patch.setattr(kind, "read", read)


@pytest.fixture(scope="module")
def worlds() -> dict[str, Any]:
    return {}


@pytest.fixture
def suffered(worlds, request, tmp_path_factory):
    """What both ranks told of every load of a back end, its misbehaving server and that one's requests."""

    def of(backend: str) -> Any:
        if backend not in worlds:
            worlds[backend] = _run(backend, tmp_path_factory.mktemp("faults"), request)
        return worlds[backend]

    return of


def _run(backend: str, scratch: Path, request: pytest.FixtureRequest) -> Any:
    root = scratch / "root"
    whole, other = scratch / "good" / FILE, scratch / "other" / FILE
    random_checkpoint(whole.parent, TENSORS)
    random_checkpoint(other.parent, TENSORS, seed=2)
    for name, row in ROWS.items():
        if row.cell(backend):
            shutil.copytree(whole.parent, root / name)
    if backend in FILES:
        scheme = "file" if backend == "file" else "elsewhere"
        told = run_ranks(RANKS, _suffer, backend, [f"{scheme}://{root}"] * RANKS, [{}] * RANKS, str(whole), str(other))
        return told, None, []
    scheme = backend.partition(" ")[0]
    with contextlib.ExitStack() as stack:
        server: Any
        if scheme == "https":
            server = stack.enter_context(http_server(root))
        else:
            server = request.getfixturevalue({"s3": "s3", "gs": "gcs"}[scheme])
        faults = {name: row.fault for name, row in ROWS.items()}
        place = stack.enter_context(misbehaving_place(scheme, server, root, other, faults, RANKS))
        told = run_ranks(RANKS, _suffer, backend, place.uris, place.options, str(whole), str(other))
        return told, place.misbehaving, list(place.proxy.requests)


@pytest.mark.parametrize(("backend", "name"), CELLS)
def test_each_cell_of_the_table(suffered, backend, name):
    ranks, misbehaving, requests = suffered(backend)
    row, told = ROWS[name], [rank[name] for rank in ranks]
    cell = row.cell(backend)
    if cell in {STORE, PIN, CORRUPT, REFUSED}:
        kind, message, _, _ = told[0]
        assert [each[:3] for each in told] == [told[0][:3]] * RANKS
        assert kind == cell
        assert re.search(rf"{FILE}( bytes \d+-\d+)?: ", message), message
        assert all(words in message for words in row.says), message
        assert took(ending for *_, ending in told) < SOON
        return
    report = told[0][0]
    assert isinstance(report, loader.Report), told
    assert all(each[0] == report for each in told)
    differing = [fqn for _, differences in told for fqn in differences]
    assert bool(differing) == (name == "flipped")
    assert report.retries == (0 if cell == UNSEEN else misbehaving.failed[name])
    assert (misbehaving.failed[name] > 0) == (name != "uploaded-again")
    served = _gets(requests, name)
    assert len(served) == report.gets
    if cell == REST:
        assert sum(each.body_bytes for each in served) == report.fetched_bytes


def _gets(requests: list[Request], name: str) -> list[Request]:
    return [each for each in requests if each.method == "GET" and each.path.endswith(f"/{name}/{FILE}") and each.range]


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend not in FILES])
class TestAtTheServer:
    def test_no_client_tries_by_itself(self, suffered, backend):
        """Where the load tries twice, the server is asked twice: no back end has a retry layer of its own."""
        _, misbehaving, _ = suffered(backend)
        for name in ("always-500", "always-reset"):
            tries = [len(times) for (load, rank, _), times in misbehaving.asked.items() if (load, rank) == (name, 1)]
            assert max(tries) == 2

    def test_retry_after_is_waited_for(self, suffered, backend):
        _, misbehaving, _ = suffered(backend)
        again = [times for (load, *_), times in misbehaving.asked.items() if load == "retry-after" and len(times) > 1]
        assert len(again) == RANKS
        for before, after in again:
            assert after - before >= 1

    def test_an_object_instead_of_a_range_is_not_read(self, suffered, backend):
        *_, requests = suffered(backend)
        whole = [each for each in _gets(requests, "always-ignored") if each.status == 200]
        assert len(whole) >= 2
        assert max(each.body_bytes for each in whole) < UNREAD


def test_the_readmes_table_is_this_one():
    assert f"\n{table()}\n" in (ROOT / "README.md").read_text()


def test_there_are_enough_cells():
    assert len(CELLS) > 100
    assert {cell for backend, name in CELLS for cell in [ROWS[name].cell(backend)]} == {
        MENDED,
        REST,
        UNSEEN,
        STORE,
        PIN,
        CORRUPT,
        REFUSED,
    }
