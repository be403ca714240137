"""A bucket of GCS that keeps versions: what was pinned is there until the end, and it alone lands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import loader
from tests.checkpoints import random_checkpoint
from tests.misbehaving import FILE, Fault, Get, changes
from tests.places import misbehaving_place
from tests.proxy import Reply
from tests.ranks import run_ranks
from tests.shards import blank, differences, shard

RANKS = 2
TENSORS = {f"layers.{n}.weight": (torch.bfloat16, (256, 384)) for n in range(3)}  # 9 ranges
READ = {"range_size": "64KiB", "memory_budget": "32MiB", "concurrency": 1, "verify": "checksum"}


def at_the_third(fault: Fault) -> Fault:
    """At one rank's third range, of four or five."""

    def later(get: Get) -> Reply | None:
        return fault(get) if (get.request.rank, get.number) == (1, 2) else None

    return later


def _load(uris: list[str], options: list[dict[str, Any]], before: str, after: str | None, backend: str) -> list[str]:
    """The pins of a load during which the object changes, and of one afterwards."""
    rank, pins = dist.get_rank(), []
    mesh = init_device_mesh("cpu", (RANKS,))
    for there in filter(None, (before, after)):
        expected = {key: shard(tensor, mesh, [Shard(1)]) for key, tensor in load_file(there).items()}
        target = {key: blank(tensor) for key, tensor in expected.items()}
        report = loader.load(target, uris[rank], storage_options=options[rank], backend=backend, **READ)
        assert not differences(target, expected)
        assert report.checksums[FILE].unchecked is None
        pins += report.source.pins.values()
    return pins


@pytest.mark.parametrize("backend", ["direct", "fsspec"])
@pytest.mark.parametrize("how", ["overwrite", "delete"])
def test_a_load_goes_on_with_the_generation_that_was_pinned(gcs, tmp_path: Path, how, backend):
    root, other = tmp_path / "root", tmp_path / "other"
    random_checkpoint(root / "good", TENSORS)
    random_checkpoint(other, TENSORS, seed=2)
    server = gcs.make_bucket(f"versions-{how}-{backend}", versioning={"enabled": True})
    faults = {"good": at_the_third(changes(how))}
    after = str(other / FILE) if how == "overwrite" else None
    with misbehaving_place("gs", server, root, other / FILE, faults, RANKS) as place:
        uris = [f"{uri}/good" for uri in place.uris]
        told = run_ranks(RANKS, _load, uris, place.options, str(root / "good" / FILE), after, backend)
        pinned, *later = told[0]
        assert told == [told[0]] * RANKS
        assert pinned not in later
        ranges = [each for each in place.proxy.select(f"/good/{FILE}") if each.range]
        asked = [each.target.partition("generation=")[2].partition("&")[0] for each in ranges]
    assert asked == sorted(asked, key=[pinned, *later].index)  # of the one, and later of the other
    assert not place.misbehaving.failed
