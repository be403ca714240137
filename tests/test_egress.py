"""Once per byte, counted at the server: which bytes of the bucket leave it, to whom, and what ranks send each other.

What a rank needs is computed here from torch's own sharding of an index tensor; what it read is in the proxy's record;
what it sent is what it gave to `torch.distributed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

import loader
from loader.formats.safetensors import header_length, parse_header
from loader.plan.schedule import Receive
from loader.stream.pipeline import Pipeline
from tests.proxy import CountingProxy
from tests.ranks import run_ranks
from tests.shards import blank, differences, shard, write_file

WORLD = 4
RANGE = 64 * 1024
EARLY = 64 * 1024
R, ROWS, COLUMNS = Replicate(), Shard(0), Shard(1)

LAYOUTS: dict[str, tuple[tuple[int, ...], list[Placement]]] = {
    "fsdp": ((4,), [ROWS]),
    "hsdp": ((2, 2), [R, ROWS]),
    "tp columns": ((4,), [COLUMNS]),
    "tp rows and fsdp": ((2, 2), [_StridedShard(0, split_factor=2), ROWS]),
    "tp columns and fsdp": ((2, 2), [ROWS, COLUMNS]),
    "replicated": ((4,), [R]),
}

SHAPES = {
    "embed": (1024, 256),
    **{
        f"layers.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in {"norm": (256,), "up": (512, 256), "bias": (512,), "down": (256, 512)}.items()
    },
    "norm": (256,),
}
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def _whole() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {key: torch.randn(shape) for key, shape in SHAPES.items()}


def _by_file() -> dict[str, dict[str, torch.Tensor]]:
    tensors = _whole()
    half = len(tensors) // 2
    return dict(zip(FILES, (dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])), strict=True))


@pytest.fixture(scope="module")
def bucket(s3, tmp_path_factory):
    """The checkpoint's URI, a proxy before its server with a listener for each rank, and the ranks' options."""
    directory = tmp_path_factory.mktemp("checkpoint")
    entries = {}
    for number, (name, tensors) in enumerate(_by_file().items()):
        write_file(directory / name, tensors)
        data = (directory / name).read_bytes()
        entries |= parse_header(
            data[: header_length(data, name, len(data))], file=name, file_number=number, size=len(data)
        )
    with CountingProxy(s3.endpoint, listeners=WORLD) as proxy:
        options = [s3.at(proxy.url_for(rank)).storage_options for rank in range(WORLD)]
        yield Bucket(s3.put(directory), proxy, options, entries, [(directory / name).stat().st_size for name in FILES])


class Bucket(NamedTuple):
    uri: str
    proxy: CountingProxy
    options: Sequence[Mapping[str, Any]]
    entries: Mapping[str, Any]
    sizes: Sequence[int]

    def blank(self) -> list[np.ndarray]:
        """How often each byte of each file was met: not yet."""
        return [np.zeros(size, np.uint8) for size in self.sizes]

    def needed(self, keys: Mapping[str, torch.Tensor]) -> list[np.ndarray]:
        """From the flat indices of each key's elements that a rank holds."""
        counts = self.blank()
        for key, indices in keys.items():
            entry = self.entries[key]
            elements = counts[entry.file][entry.start : entry.stop].reshape(-1, entry.dtype.itemsize)
            elements[indices.flatten().numpy()] = 1
        return counts

    def read(self, rank: int) -> list[np.ndarray]:
        """What the proxy sent to `rank` of each file's data, but for what came with a header."""
        counts = self.blank()
        for number, name in enumerate(FILES):
            for request in self.proxy.select(name, rank=rank):
                first, stop = request.span
                if first:
                    counts[number][first:stop] += 1
        return counts


class Count(NamedTuple):
    """What one run came to: arrays over ranks, of byte counts for every byte of all files. `sent` are bytes from a rank
    to another: in messages, and what one of its node took from its memory."""

    needs: np.ndarray
    reads: np.ndarray
    sent: np.ndarray
    report: loader.Report

    @property
    def needed_bytes(self) -> int:
        return int(self.needs.any(axis=0).sum())


def _indices(keys: Sequence[str], mesh: Any, placements: Sequence[Placement]) -> dict[str, torch.Tensor]:
    """The flat indices of the elements that this rank holds of each key."""
    whole = {key: torch.arange(int(np.prod(SHAPES[key])), dtype=torch.int32).view(SHAPES[key]) for key in keys}
    return {key: shard(tensor, mesh, placements).to_local() for key, tensor in whole.items()}


def _load(uri: str, options: Sequence[Mapping], layout: str, keys: Sequence[str], arguments: Mapping) -> tuple:
    sent, taken = [0] * WORLD, [0] * WORLD
    send, take = dist.isend, Pipeline._take

    def counted(tensor: torch.Tensor, *, group_dst: int, **rest: Any) -> Any:
        sent[group_dst] += tensor.nbytes if tensor.dtype is torch.uint8 else 0  # else it is a CRC, or a hello
        return send(tensor, group_dst=group_dst, **rest)

    def counted_too(self: Pipeline, receive: Receive) -> None:
        taken[receive.sender] += receive.message.size
        take(self, receive)

    dist.isend, Pipeline._take = counted, counted_too
    sizes, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", sizes)
    expected = {key: shard(tensor, mesh, placements) for key, tensor in _whole().items() if key in keys}
    state = {key: blank(tensor) for key, tensor in expected.items()}
    report = loader.load(state, uri, storage_options=options[dist.get_rank()], range_size=RANGE, **arguments)
    assert differences(state, expected) == []
    return _indices(keys, mesh, placements), sent, taken, report


def count(
    bucket: Bucket, layout: str, *, keys: Sequence[str] = tuple(SHAPES), nodes: int = 2, **arguments: Any
) -> Count:
    """The ranks of one node share memory, and send those of the other messages."""
    bucket.proxy.reset()
    ranks = run_ranks(WORLD, _load, bucket.uri, bucket.options, layout, keys, arguments, nodes=nodes)
    needs = np.stack([np.concatenate(bucket.needed(indices)) for indices, _, _, _ in ranks])
    reads = np.stack([np.concatenate(bucket.read(rank)) for rank in range(WORLD)])
    messages, taken = (np.array([rank[way] for rank in ranks]) for way in (1, 2))
    near = np.kron(np.eye(nodes, dtype=bool), np.ones((WORLD // nodes,) * 2, bool))
    assert not messages[near].any()
    assert not taken.T[~near].any()
    return Count(needs, reads, messages + taken.T, ranks[0][3])


@pytest.fixture(scope="module", params=LAYOUTS)
def found(request, bucket):
    return count(bucket, request.param)


def test_each_needed_byte_leaves_the_bucket_once(bucket, found):
    assert np.array_equal(found.reads.sum(axis=0), found.needs.any(axis=0))
    served = bucket.proxy.bytes_served(".safetensors")
    assert served <= found.needed_bytes + EARLY * len(FILES)
    assert bucket.proxy.gets(".safetensors") <= 1.25 * found.needed_bytes / RANGE + 2 * len(FILES) + WORLD


def test_every_rank_reads_its_fair_part(found):
    mine = found.reads.sum(axis=1)
    assert all(abs(mine - found.needed_bytes / WORLD) <= RANGE), mine


def test_ranks_send_each_other_what_is_needed_and_no_more(found):
    for reader in range(WORLD):
        for consumer in range(WORLD):
            due = (found.reads[reader] & found.needs[consumer]).sum() if consumer != reader else 0
            assert found.sent[reader][consumer] == due, (reader, consumer)
    assert found.sent.sum() == (found.needs > found.reads).sum()


def test_the_report_says_what_the_server_counted(bucket, found):
    report, proxy = found.report, bucket.proxy
    assert report.needed_bytes == found.needed_bytes
    assert report.fetched_bytes == proxy.bytes_served(".safetensors")
    assert report.gets == proxy.gets(".safetensors")
    assert report.egress_ratio == report.fetched_bytes / found.needed_bytes
    for rank in report.ranks:
        assert rank.fetched_bytes == proxy.bytes_served(".safetensors", rank=rank.rank)
        assert rank.gets == proxy.gets(".safetensors", rank=rank.rank)
        assert rank.exchanged_bytes == found.sent[rank.rank].sum()
    assert report.exchanged_bytes == found.sent.sum()


def test_only_rank_0_looks(bucket, found):
    """No HEAD, listing, config or header by another rank; but each asks for the bucket's region, once a load."""
    others = [request for request in bucket.proxy.requests if request.rank]
    region = [request for request in others if request.method == "HEAD" and request.path.count("/") == 1]
    assert len(region) == len({(request.rank, request.client_port) for request in region})
    rest = [request for request in others if request not in region]
    assert all(request.range and not request.range.startswith("bytes=0-") for request in rest)


def test_who_reads_its_own_rows_exchanges_hardly_anything(bucket):
    """Small tensors alone: what is joined with a neighbour's is sent."""
    found = count(bucket, "fsdp")
    small = sum(t.nbytes for t in _whole().values() if t.nbytes < WORLD * RANGE)
    assert found.sent.sum() <= small < 0.01 * found.needed_bytes


def test_once_a_node(bucket):
    found = count(bucket, "tp columns and fsdp", nodes=2, share="node")
    needs, reads = (counts.reshape(2, 2, -1) for counts in (found.needs, found.reads))
    for node in range(2):
        assert np.array_equal(reads[node].sum(axis=0), needs[node].any(axis=0))
    assert not found.sent[:2, 2:].any()
    assert not found.sent[2:, :2].any()
    assert found.report.needed_bytes == found.needed_bytes


def test_replicas_on_two_nodes_read_each_byte_twice(bucket):
    found = count(bucket, "replicated", nodes=2, share="node")
    assert np.array_equal(found.reads.sum(axis=0), 2 * found.needs[0])
    assert found.sent.sum() == (found.needs > found.reads).sum()


def test_none_shares_nothing(bucket, capsys):
    found = count(bucket, "hsdp", share="none")
    assert np.array_equal(found.reads, found.needs)
    assert not found.sent.any()
    assert found.report.egress_ratio == pytest.approx(2, abs=0.1)
    assert "100%" in capsys.readouterr().out  # of what all ranks read, not of what is needed


def test_what_nobody_needs_is_not_read(bucket):
    wanted = ["embed", "layers.0.norm", "layers.1.down", "norm"]
    found = count(
        bucket, "fsdp", keys=wanted, ignore=["layers.*.bias", "layers.?.up", "layers.0.down", "layers.1.norm"]
    )
    assert np.array_equal(found.reads.sum(axis=0), found.needs.any(axis=0))
    assert found.report.needed_bytes == sum(_whole()[key].nbytes for key in wanted)
