"""Replies that never end: no load waits for them, and what is asked for twice stays within its share."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import loader
from loader.store import patience
from tests.checkpoints import random_checkpoint
from tests.misbehaving import FILE, at, stall, unanswered
from tests.places import misbehaving_place
from tests.ranks import run_ranks
from tests.shards import blank, differences, shard

RANKS = 2
pytestmark = pytest.mark.timeout(300)
ROWS, COLUMNS = 8192, 1536
"""Of bfloat16, 24 MiB: 192 ranges for each rank."""

TURNS = 2, 150
"""The GETs that stall: one of the first, when nothing is known yet of how long they take, and one of many."""

READ = {"range_size": "64KiB", "memory_budget": "32MiB", "concurrency": 4}
FAULTS = {"within the body": stall, "before the reply": unanswered}


def load(uris: list[str], options: list[dict[str, Any]], whole: str) -> Any:
    patience.LEAST = 5.0  # on a busy machine more than one read takes longer, and they would use up the share
    rank = torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", (RANKS,))
    expected = {key: shard(tensor, mesh, [Shard(0)]) for key, tensor in load_file(whole).items()}
    target = {key: blank(tensor) for key, tensor in expected.items()}
    report = loader.load(target, uris[rank], storage_options=options[rank], **READ)
    return report, differences(target, expected)


@pytest.mark.parametrize("how", FAULTS)
def test_who_says_nothing_is_not_waited_for(s3, tmp_path, how):
    """GETs of each rank stall until all is over. Without a hedge each is a retry, after the time-out of 30 s."""
    name = "stalls"
    whole = tmp_path / "root" / name / FILE
    random_checkpoint(whole.parent, {"weight": (torch.bfloat16, (ROWS, COLUMNS))})
    with misbehaving_place("s3", s3, tmp_path / "root", whole, {name: at(TURNS, FAULTS[how])}, RANKS) as place:
        uris = [f"{uri}/{name}" for uri in place.uris]
        found = run_ranks(RANKS, load, uris, place.options, str(whole))
    report = found[0][0]
    assert not any(differing for _, differing in found)
    while place.misbehaving.failed[name] < len(TURNS) * RANKS:
        time.sleep(0.01)  # what was held back before its reply counts when it is let go
    assert place.misbehaving.failed[name] == len(TURNS) * RANKS
    assert report.retries == 0
    assert 0 < report.hedged_bytes <= patience.SHARE * report.fetched_bytes
    assert report.gets == len([each for each in place.proxy.select(FILE) if each.range])
    assert f'"hedged_bytes": {report.hedged_bytes}' in report.to_json()
