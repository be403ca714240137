"""The plan's promises, over random jobs and over the meshes that people use."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from loader.errors import MemoryBudgetError
from loader.plan.catalog import Entry
from loader.plan.extents import GAP_BYTES, Limits
from loader.plan.geometry import Box
from loader.plan.needs import Classes, NeedGroup, Needs
from loader.plan.plan import make_plan
from loader.stream.planning import pack, unpack
from tests.plan.worlds import Job, exchange, jobs, lay_out, mesh_job

KiB, MiB = 1024, 1024 * 1024

prove = settings(derandomize=True, deadline=None, max_examples=150)
# 16 bytes cut everything to pieces, 4 KiB nothing; in a round of 200 bytes not even every such piece fits uncut.
limits = st.builds(
    lambda r, times: Limits(r, max(200, times * r), 2), st.sampled_from([16, 40, 256, 4 * KiB]), st.integers(2, 10)
)


def plan_of(job, limits):
    return make_plan(job.entries, job.classes, limits)


def rows(plan):
    """The plan's extents, whatever the order they were made in."""
    return sorted(zip(*(c.tolist() for c in (plan.file, plan.start, plan.stop, plan.reader, plan.round)), strict=True))


def random_files(job):
    return [np.random.default_rng(0).integers(0, 256, size, np.uint8) for size in job.file_sizes]


@prove
@given(jobs(), limits)
def test_extents_are_disjoint_and_cover_what_is_needed(job, limits):
    plan = plan_of(job, limits)
    needed = [job.needed(rank) for rank in range(len(job.boxes))]
    inside = [np.zeros(size, bool) for size in job.file_sizes]
    for entry in job.entries:
        inside[entry.file][entry.start : entry.stop] = True
    read = [np.zeros(size, np.int64) for size in job.file_sizes]
    for file, start, stop, reader, _ in rows(plan):
        read[file][start:stop] += 1
        assert start < stop
        assert inside[file][start:stop].all()
        assert needed[reader][file][start:stop].any(), "a reader that does not consume"
    anyone = [np.logical_or.reduce(masks) for masks in zip(*needed, strict=True)]
    for times, wanted in zip(read, anyone, strict=True):
        assert times.max(initial=0) <= 1
        assert (times >= wanted).all()
    assert plan.needed_bytes == sum(int(wanted.sum()) for wanted in anyone)


# Rank 1's two columns are one run in rows 1 and 2, and come in the wrong order.
STEPS = Job(
    lay_out([(5, 8)], torch.int64),
    (((0, Box((0, 0), (5, 5))),), ((0, Box((0, 1), (3, 1))), (0, Box((1, 0), (3, 1))))),
)


@prove
@example(STEPS, Limits(40, 200, 2))
@given(jobs(), limits)
def test_every_rank_is_filled_bit_for_bit_within_its_rounds(job, limits):
    plan, files = plan_of(job, limits), random_files(job)
    for number, rank in enumerate(exchange(plan, job.entries, files)):
        assert rank.round_bytes <= limits.round_bytes
        needed = job.needed(number)
        for key, (dtype, shape, file, start, stop) in enumerate(job.entries):
            wanted = needed[file][start:stop].reshape(*shape, dtype.itemsize)
            truth = files[file][start:stop].reshape(wanted.shape)
            assert (rank.landed[key] == wanted.any(axis=-1)).all(), "an element missing, or landed twice"
            assert (rank.values[key] == np.where(wanted, truth, 0)).all()


@prove
@given(jobs(), limits, st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_of_keys_and_ranks(job, limits, random):
    classes = job.classes
    ranks = list(range(len(job.boxes)))
    random.shuffle(ranks)
    shuffled = job.shuffled(random)
    needs = shuffled.needs
    others = Classes.of({rank: needs[rank].digest for rank in ranks}, {each.digest: each for each in needs})
    assert rows(make_plan(job.entries, classes, limits)) == rows(make_plan(shuffled.entries, others, limits))


FSDP = ((8,), [Shard(0)])
HSDP = ((2, 4), [Replicate(), Shard(0)])
COLUMNS = ((8,), [Shard(1)])
TP_FSDP = ((4, 2), [Shard(0), Shard(1)])
REPLICATED = ((8,), [Replicate()])
MESHES = {"fsdp": FSDP, "hsdp": HSDP, "columns": COLUMNS, "tp x fsdp": TP_FSDP, "replicated": REPLICATED}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("shape", [(1024, 512), (64, 64), (1000, 300), (16, 40, 200)], ids=str)
def test_every_rank_reads_its_fair_part(mesh, shape):
    job = mesh_job(lay_out([shape] * 16), *mesh)
    plan = plan_of(job, Limits(64 * KiB, MiB, 4))
    size = plan.stop - plan.start
    read = np.bincount(plan.reader, size, minlength=8)
    assert read.sum() == plan.needed_bytes == sum(e.stop - e.start for e in job.entries)
    assert abs(read - read.mean()).max() <= size.max()


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("keys", [1, 2, 3, 7, 40])
@pytest.mark.parametrize(
    "nodes", [["a", "a", "b", "b", "c", "c", "d", "d"], list("aaaabbbb"), list("abababab")], ids="".join
)
def test_every_node_reads_its_fair_part(mesh, keys, nodes):
    """Extents of different sizes, fewer than ranks or many: no node's link is to have more than one over its part."""
    job = mesh_job(lay_out([(8 * (key + 1), 512) for key in range(keys)]), *mesh)
    classes = Classes.of(dict(enumerate(n.digest for n in job.needs)), {n.digest: n for n in job.needs}, nodes)
    plan = make_plan(job.entries, classes, Limits(64 * KiB, MiB, 4))
    size = plan.stop - plan.start
    node = np.unique(nodes, return_inverse=True)[1]
    read = np.bincount(node[plan.reader], size, minlength=len(set(nodes)))
    assert abs(read - read.mean()).max() <= max(size.max(), 0.05 * read.mean())


def test_readers_are_level_where_rows_and_columns_cross():
    """FSDP 32 x TP 4 as FSDP2 has it: half of the TP ranks hold the first half of an up projection's rows, half of the
    FSDP ranks that of a down projection's. One pass leaves a rank 5 extents from the mean."""
    up, down = [_StridedShard(0, split_factor=4), Shard(0)], [Shard(0), Shard(1)]
    job = mesh_job(lay_out([(512, 512)] * 1024), (32, 4), lambda key: up if key % 3 else down)
    plan = plan_of(job, Limits(300 * KiB, 100 * MiB, 4))
    size = plan.stop - plan.start
    read = np.bincount(plan.reader, size, minlength=128)
    assert abs(read - read.mean()).max() <= size.max()


def test_ranks_that_need_the_same_of_an_extent_are_sent_one_payload():
    """Columns over TP 4, and a vector of each rank's own: 8 distinct needs, of which 2 each have the same columns."""
    entries = lay_out([(64, 512)] * 12 + [(8, 4)])
    tp = mesh_job(entries[:12], (2, 4), [Replicate(), Shard(1)])
    job = Job(entries, tuple((*boxes, (12, Box((rank, 0), (1, 4)))) for rank, boxes in enumerate(tp.boxes)))
    limits = Limits(64 * KiB, 145 * KiB, 4)
    plan = plan_of(job, limits)
    assert (plan.stop - plan.start).max() == 64 * KiB, "reads of the full size: the payloads of 4, not 8, fit beside it"
    for rank in exchange(plan, job.entries, random_files(job)):
        assert 2 * 64 * KiB <= rank.round_bytes <= limits.round_bytes


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("budget", [64, 512])
@pytest.mark.parametrize(
    "shape",
    [(8192, 4096), (8000, 4321), (32, 4096, 1024), (24, 1000, 5000), (16, 40960, 128), (4 * MiB, 10), (10, 9 * MiB)],
    ids=str,
)
def test_large_parts_are_read_in_ranges_of_the_given_size(mesh, budget, shape):
    job = mesh_job(lay_out([shape, (7, 9), shape]), *mesh)
    plan = plan_of(job, Limits.within(budget * MiB, 8 * MiB, 24 * MiB))
    assert len(plan.start) <= 1.25 * plan.needed_bytes / (8 * MiB) + 2 + 8


def test_small_tensors_are_read_together():
    job = mesh_job(lay_out([(2048,)] * 200), *REPLICATED)
    plan = plan_of(job, Limits(100 * KiB, MiB, 4))
    assert len(plan.start) == math.ceil(200 / 25)
    assert np.bincount(plan.reader).tolist() == [1] * 8


def test_a_wide_stretch_that_nobody_needs_is_not_read():
    entry = Entry(torch.uint8, (10, 4 * GAP_BYTES), 0, 0, 40 * GAP_BYTES)
    ends = [(0, 100), (100 + GAP_BYTES - 1, 1000), (3 * GAP_BYTES, GAP_BYTES)]
    job = Job((entry,), tuple(((0, Box((0, at), (10, n))),) for at, n in ends))
    plan = plan_of(job, Limits(8 * MiB, 100 * MiB, 4))
    assert plan.needed_bytes == 10 * (1100 + GAP_BYTES)
    assert plan.read_bytes < plan.needed_bytes + 10 * GAP_BYTES


def test_a_plan_that_cannot_fit_tells_what_would():
    job = mesh_job(lay_out([(4, 4)], torch.int64), *COLUMNS)
    with pytest.raises(MemoryBudgetError, match=r"raise read\.memory_budget"):
        plan_of(job, Limits(16, 7, 2))


@prove
@given(jobs(), limits)
def test_a_plan_arrives_as_it_was_made(job, limits):
    plan = plan_of(job, limits)
    arrived = pickle.loads(pickle.dumps(plan))
    for column in ("file", "start", "stop", "reader", "round"):
        assert getattr(arrived, column).tolist() == getattr(plan, column).tolist()
        assert getattr(arrived, column).dtype == np.int64
    assert arrived.needed_bytes == plan.needed_bytes
    assert [each.digest for each in arrived.classes.needs] == [each.digest for each in plan.classes.needs]


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_ranks_are_told_an_extent_in_half_a_byte(mesh):
    job = mesh_job(lay_out([(512, 512)] * 1024), *mesh)
    plan = plan_of(job, Limits(32 * KiB, 100 * MiB, 4))
    assert len(plan.start) > 10_000
    assert len(pack(plan)) - len(pack(plan.classes)) < len(plan.start) / 2


@pytest.mark.parametrize("keys", [[0], [7], [0, 1, 300], [5, 70_000, 70_001], range(3, 90_000, 2)], ids=str)
def test_needs_arrive_as_they_were_told_and_share_their_keys(keys):
    """One rank's keys of thousands are what others need too, in other boxes."""
    told = [Needs((NeedGroup(np.array(keys, np.int64), (Box((rank,), (1,)),)),)) for rank in range(8)]
    arrived = [unpack(pack(each)) for each in told]
    assert [each.groups[0].keys.tolist() for each in arrived] == [list(keys)] * 8
    assert [each.groups[0].boxes for each in arrived] == [each.groups[0].boxes for each in told]
    assert [each.digest for each in arrived] == [each.digest for each in told]
    assert len({id(each.groups[0].keys) for each in arrived}) == 1
    assert len(pack(told[0])) < 500
    assert len(pack(arrived)) < 700


def test_nothing_needed_is_an_empty_plan():
    plan = plan_of(Job(lay_out([(4,), (0, 3)]), ((), ((1, Box((0, 0), (0, 3))),))), Limits(16, 200, 2))
    assert len(pickle.loads(pickle.dumps(plan)).start) == 0
    assert (plan.rounds, plan.read_bytes, plan.needed_bytes) == (0, 0, 0)
