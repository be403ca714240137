"""What a plan is said to come to is what its schedules do."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from torch.distributed.tensor import Replicate, Shard

from loader.plan.extents import Limits
from loader.plan.forecast import Links, Times, egress_bytes, exchange, forecast, times
from loader.plan.needs import Classes
from loader.plan.plan import make_plan, plan_with_cuts, sharing_domains
from loader.plan.schedule import Schedule
from tests.plan.test_plan import limits, prove
from tests.plan.worlds import jobs, lay_out, mesh_job


def planned(job, limits):
    return plan_with_cuts(job.entries, job.classes, limits, ())


def rounds_of(plan, entries, rank):
    schedule = Schedule(plan, entries, rank)
    return [schedule.round(number) for number in range(schedule.rounds)]


def buffers(rounds, slots):
    """What `stream.pipeline` takes: a slot for every so many rounds, as large as the largest of them."""
    sizes = [
        sum(read.size + sum(m.size for m, _ in read.sends if m.begin is None) for read in each.reads)
        + sum(receive.message.size for receive in each.receives)
        for each in rounds
    ]
    return sum(max(sizes[slot::slots], default=0) for slot in range(slots))


@prove
@given(jobs(), limits)
def test_every_rank_does_what_is_forecast(job, limits):
    plan, cuts = planned(job, limits)
    found = forecast(plan, cuts, limits)
    for rank in range(len(job.boxes)):
        rounds = rounds_of(plan, job.entries, rank)
        reads = [read for each in rounds for read in each.reads]
        assert found.fetched[rank] == sum(read.size for read in reads)
        assert found.gets[rank] == len(reads)
        assert found.sent[rank] == sum(m.size * len(to) for read in reads for m, to in read.sends)
        assert found.buffers[rank] >= buffers(rounds, limits.rounds_in_flight)


def test_buffers_are_no_more_than_they_take():
    """Rows and columns, with replicas: some is sent as it lies, some is packed."""
    job = mesh_job(lay_out([(64, 32)] * 6), (2, 2, 2), [Replicate(), Shard(0), Shard(1)])
    limits = Limits(600, 3000, 2)
    plan, cuts = planned(job, limits)
    assert plan.rounds > limits.rounds_in_flight
    expected = [buffers(rounds_of(plan, job.entries, rank), limits.rounds_in_flight) for rank in range(8)]
    assert forecast(plan, cuts, limits).buffers.tolist() == expected


@prove
@given(jobs(), limits)
def test_what_groups_exchange_is_what_their_ranks_send_each_other(job, limits):
    plan, cuts = planned(job, limits)
    group = np.arange(len(job.boxes)) // 3
    sent, received = exchange(plan, cuts, group)
    between = np.zeros((group[-1] + 1,) * 2, np.int64)
    for rank in range(len(job.boxes)):
        for read in itertools.chain.from_iterable(each.reads for each in rounds_of(plan, job.entries, rank)):
            for message, consumers in read.sends:
                for consumer in consumers:
                    between[group[rank], group[consumer]] += message.size
    np.fill_diagonal(between, 0)
    assert sent.tolist() == between.sum(axis=1).tolist()
    assert received.tolist() == between.sum(axis=0).tolist()


@prove
@given(jobs(), limits)
def test_egress_is_what_the_plans_read(job, limits):
    needs = job.needs
    nodes = [str(rank // 2) for rank in range(len(needs))]
    ways = {share: sharing_domains(nodes, share) for share in ("world", "node", "none")}
    for way, found in egress_bytes(job.entries, job.classes, ways, limits).items():
        plans = [
            make_plan(
                job.entries,
                Classes.of({r: needs[r].digest for r in domain}, {each.digest: each for each in needs}),
                limits,
            )
            for domain in ways[way]
        ]
        assert found == sum(plan.read_bytes for plan in plans)


@prove
@given(jobs())
def test_the_size_of_needs_is_that_of_the_bytes_needed(job):
    item = np.array([entry.dtype.itemsize for entry in job.entries], np.int64)
    for rank, needs in enumerate(job.needs):
        assert needs.size(item) == sum(int(mask.sum()) for mask in job.needed(rank))


def test_domains():
    nodes = ["a", "b", "a", "b"]
    assert sharing_domains(nodes, "world") == [[0, 1, 2, 3]]
    assert sharing_domains(nodes, "node") == [[0, 2], [1, 3]]
    assert sharing_domains(nodes, "none") == [[0], [1], [2], [3]]


def test_the_longest_of_links_is_the_time():
    """Two hosts of two ranks; 10 B/s to the bucket, 5 B/s between hosts, 4 B/s of connections."""
    between = np.array([30, 5]), np.array([5, 30])
    found = times(np.array([20, 0, 10, 10]), np.array([0, 0, 1, 1]), between, Links(10, 5, 4))
    assert found == [Times(2, 5, 6), Times(2, 0, 6), Times(2, 2.5, 6), Times(2, 2.5, 6)]
    assert max(found[0]) == pytest.approx(6)
