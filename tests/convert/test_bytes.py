"""What a conversion reads, counted at the server: the elements that a rank's shards are made of, and no others.

Every element of the checkpoint is a number of its own, so what has landed says which bytes it took. A key's rows are
so long that a part of one leaves out more than GAP_BYTES: reading rows, let alone keys, would be seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

import loader
from loader.formats.safetensors import header_length
from loader.place.mesh import make_mesh
from loader.plan.extents import GAP_BYTES
from tests.proxy import CountingProxy
from tests.ranks import run_ranks
from tests.shards import blank, differences, shard, write_file

WORLD = 4
FILE = "model.safetensors"
EARLY = 64 * 1024
COLUMNS = 2 * GAP_BYTES // 4  # of int32; the three quarters that one rank of four leaves out are 1.5 gaps
ROWS = {"permuted": 16, "transposed": 16, "split": 16, "split columns": 16, "fused": 8, "experts.0": 8, "experts.1": 8}


def whole() -> dict[str, Tensor]:
    keys, first = {}, 0
    for key, rows in ROWS.items():
        keys[key] = torch.arange(first, first + rows * COLUMNS, dtype=torch.int32).view(rows, COLUMNS)
        first += rows * COLUMNS
    return keys


def convert(keys: Mapping[str, Tensor], _: Any) -> Iterator[tuple[str, Tensor]]:
    """Two heads of 8 rotary rows, so that a rank of four has half a head: rows 0, 4, 1, 5 of the key."""
    yield "permuted", keys["permuted"].view(2, 2, 4, COLUMNS).transpose(1, 2).reshape(16, COLUMNS)
    yield "transposed", keys["transposed"].t()
    yield from zip(("gate", "up"), keys["split"].chunk(2), strict=True)
    yield from zip(("left", "right"), (half.t() for half in keys["split columns"].chunk(2, dim=1)), strict=True)
    yield "fused", torch.cat([keys["fused"], keys["fused"].flip(0)])[4:12]
    yield "stacked", torch.stack([keys["experts.0"], keys["experts.1"]]).transpose(1, 2)


LAYOUTS: dict[str, tuple[dict[str, int], list[Placement]]] = {
    "FSDP": ({"dp_shard": 4}, [Shard(0)]),
    "HSDP": ({"dp_replicate": 2, "dp_shard": 2}, [Replicate(), Shard(0)]),
    "TP, dim 1": ({"tp": 4}, [Shard(1)]),
    "FSDP x TP, dims 0 and 1": ({"dp_shard": 2, "tp": 2}, [Shard(0), Shard(1)]),
    "FSDP x TP, dims 1 and 2": ({"dp_shard": 2, "tp": 2}, [Shard(1), Shard(2)]),
}


@pytest.fixture(scope="module")
def bucket(s3, tmp_path_factory):
    """The checkpoint's URI, a proxy with a listener for each rank, their options, and where the file's data begins."""
    directory = tmp_path_factory.mktemp("checkpoint")
    write_file(directory / FILE, whole())
    (directory / "config.json").write_text('{"model_type": "llama"}')
    data = (directory / FILE).read_bytes()
    with CountingProxy(s3.endpoint, listeners=WORLD) as proxy:
        options = [s3.at(proxy.url_for(rank)).storage_options for rank in range(WORLD)]
        yield s3.put(directory), proxy, options, header_length(data, FILE, len(data))


def load(uri: str, options: Sequence[Mapping[str, Any]], layout: str, share: str) -> tuple[list[str], Tensor]:
    """What differs from torch's shards, and the elements of the checkpoint that this rank's shards are made of."""
    dims, placements = LAYOUTS[layout]
    mesh = make_mesh(dims, "cpu")
    expected = {fqn: shard(tensor, mesh, placements) for fqn, tensor in convert(whole(), None)}
    state = {fqn: blank(tensor) for fqn, tensor in expected.items()}
    loader.load(state, uri, convert=convert, storage_options=options[torch.distributed.get_rank()], share=share)
    taken = torch.cat([tensor.to_local().flatten() for tensor in expected.values()])
    return differences(state, expected), taken.unique()


@pytest.mark.parametrize("share", ["none", "world"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_byte_is_read_that_no_shard_is_made_of(bucket, layout, share) -> None:
    uri, proxy, options, begin = bucket
    proxy.reset()
    ranks = run_ranks(WORLD, load, uri, options, layout, share)
    needs, reads = (np.zeros((WORLD, sum(ROWS.values()) * COLUMNS), np.int8) for _ in "ab")
    for rank, (wrong, taken) in enumerate(ranks):
        assert wrong == []
        needs[rank, taken.numpy()] = 1
        for request in proxy.select(FILE, rank=rank):
            first, stop = request.span
            if first:  # else a header
                reads[rank, (first - begin) // 4 : (stop - begin) // 4] += 1
    if share == "none":
        assert np.array_equal(reads, needs)
        assert (needs.mean(axis=1) < 0.6).all(), "a rank that needs all of a key proves nothing"
    else:
        assert np.array_equal(reads.sum(axis=0), needs.any(axis=0))
    assert proxy.bytes_served(FILE) <= 4 * int(reads.sum(dtype=np.int64)) + EARLY
