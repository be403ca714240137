"""Random and regular jobs for the planner: catalogs, what each rank needs, and a whole exchange without a network."""

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

from loader.place.boxes import shard_boxes
from loader.plan.catalog import Entry
from loader.plan.geometry import Box
from loader.plan.needs import Classes, collect_needs
from loader.plan.schedule import Schedule

DTYPES = [torch.bfloat16, torch.bool, torch.float8_e4m3fn, torch.float32, torch.int64, torch.complex64]


@dataclass(frozen=True)
class Job:
    """`boxes[rank]` are the (key, box) pairs that a rank asks for: they may overlap, repeat and be empty."""

    entries: tuple[Entry, ...]
    boxes: tuple[tuple[tuple[int, Box], ...], ...]

    @property
    def needs(self):
        shapes = [entry.shape for entry in self.entries]
        return [collect_needs(boxes, shapes) for boxes in self.boxes]

    @property
    def classes(self):
        needs = self.needs
        return Classes.of({rank: each.digest for rank, each in enumerate(needs)}, {each.digest: each for each in needs})

    def needed(self, rank):
        """Every byte of every file: whether `rank` needs it. One boolean array a file."""
        masks = [np.zeros(size, bool) for size in self.file_sizes]
        for key, box in self.boxes[rank]:
            entry = self.entries[key]
            elements = masks[entry.file][entry.start : entry.stop].reshape(*entry.shape, entry.dtype.itemsize)
            elements[box.slices()] = True
        return masks

    @property
    def file_sizes(self):
        sizes = [0] * (1 + max((entry.file for entry in self.entries), default=-1))
        for entry in self.entries:
            sizes[entry.file] = max(sizes[entry.file], entry.stop)
        return sizes

    def shuffled(self, random):
        """The same job with keys in another order."""
        order = list(range(len(self.entries)))
        random.shuffle(order)
        at = {old: new for new, old in enumerate(order)}
        boxes = tuple(tuple((at[key], box) for key, box in each) for each in self.boxes)
        return Job(tuple(self.entries[old] for old in order), boxes)


def lay_out(shapes, dtype=torch.bfloat16, *, header=100):
    """Entries of one file, one after another."""
    stops = list(itertools.accumulate((math.prod(s) * dtype.itemsize for s in shapes), initial=header))
    return tuple(Entry(dtype, tuple(s), 0, a, b) for s, (a, b) in zip(shapes, itertools.pairwise(stops), strict=True))


def mesh_job(entries, mesh_shape, placements):
    """Every key under `placements` (one list for all keys, or a function of the key), over a mesh of `mesh_shape`."""
    of = placements if callable(placements) else lambda _: placements
    coordinates = itertools.product(*map(range, mesh_shape))
    return Job(
        tuple(entries),
        tuple(
            tuple(
                (key, box)
                for key, entry in enumerate(entries)
                for box, _ in shard_boxes(entry.shape, mesh_shape, coordinate, of(key))
            )
            for coordinate in coordinates
        ),
    )


@st.composite
def layouts(draw, shape, world):
    """One key's boxes for each rank: a mesh's, or what no mesh would make."""
    kind = draw(st.sampled_from(["mesh", "mesh", "own", "any", "nobody"]))
    if kind == "nobody":
        return [[] for _ in range(world)]
    if kind == "own":
        owner = draw(st.integers(0, world - 1))
        return [[Box((0,) * len(shape), shape)] if rank == owner else [] for rank in range(world)]
    if kind == "mesh":
        outer = draw(st.sampled_from([n for n in range(1, world + 1) if world % n == 0]))
        mesh = (outer, world // outer)
        dims = st.integers(0, len(shape) - 1).map(Shard)
        placements = [draw(st.one_of(st.just(Replicate()), dims) if shape else st.just(Replicate())) for _ in mesh]
        return [
            [box for box, _ in shard_boxes(shape, mesh, divmod(rank, mesh[1]), placements)] for rank in range(world)
        ]
    ends = st.tuples(*(st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted) for n in shape))
    box = ends.map(lambda e: Box(tuple(a for a, _ in e), tuple(b - a for a, b in e)))
    return [draw(st.lists(box, max_size=3)) for _ in range(world)]


@st.composite
def jobs(draw):
    """Keys of a few shapes, each with a layout or two: so that keys share patterns, in this dtype and that."""
    world = draw(st.integers(1, 8))
    shapes = draw(
        st.lists(st.lists(st.sampled_from([1, 2, 3, 5, 8, 13, 0]), max_size=4).map(_small), min_size=1, max_size=4)
    )
    patterns = [(shape, draw(layouts(shape, world))) for shape in shapes]
    entries, boxes = [], [[] for _ in range(world)]
    for file in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, 40))
        for shape, layout in draw(st.lists(st.sampled_from(patterns), max_size=4)):
            dtype = draw(st.sampled_from(DTYPES))
            at += draw(st.sampled_from([0, 0, 0, 3]))
            stop = at + math.prod(shape) * dtype.itemsize
            for own, held in zip(boxes, layout, strict=True):
                own += [(len(entries), box) for box in held]
            entries.append(Entry(dtype, shape, file, at, stop))
            at = stop
    return Job(tuple(entries), tuple(map(tuple, boxes)))


def _small(shape):
    while math.prod(shape) > 120:
        shape = shape[:-1]
    return tuple(shape)


@dataclass
class Rank:
    """What the exchange left in one rank: each key's bytes as they landed, how often, and what a round cost at most."""

    values: dict[int, np.ndarray]
    landed: dict[int, np.ndarray]
    round_bytes: int = 0


def exchange(plan, entries, files):
    """Run every round of every rank as `stream.pipeline` does. `files` are arrays of bytes."""
    schedules = [Schedule(plan, entries, rank) for rank in sorted(plan.classes.ranks.tolist())]
    partners = {(schedule.rank, other) for schedule in schedules for other in schedule.partners()}
    assert partners == {(other, rank) for rank, other in partners}, "of two ranks one waits for the other's hello"
    ranks = [
        Rank(
            {key: np.zeros((*e.shape, e.dtype.itemsize), np.uint8) for key, e in enumerate(entries)},
            {key: np.zeros(e.shape, np.int64) for key, e in enumerate(entries)},
        )
        for _ in schedules
    ]
    for number in range(plan.rounds):
        rounds = [schedule.round(number) for schedule in schedules]
        sent = defaultdict(list)
        for me, (todo, rank) in enumerate(zip(rounds, ranks, strict=True)):
            cost = sum(read.size for read in todo.reads) + sum(receive.message.size for receive in todo.receives)
            for read in todo.reads:
                extent = files[read.file][read.start : read.stop]
                _land(rank, entries, read.own, _packed(read.own, extent, entries))
                for message, consumers in read.sends:
                    payload = _packed(message, extent, entries)
                    if message.begin is None:
                        cost += message.size
                    else:
                        assert payload == extent[message.begin : message.begin + message.size].tobytes()
                    for consumer in consumers:
                        sent[me, consumer].append((message, payload))
            rank.round_bytes = max(rank.round_bytes, cost)
        for me, (todo, rank) in enumerate(zip(rounds, ranks, strict=True)):
            for receive in todo.receives:
                assert (receive.sender, me) in partners
                message, payload = sent[receive.sender, me].pop(0)
                assert message == receive.message
                _land(rank, entries, message, payload)
        assert not any(sent.values()), "a message that nobody received"
    return ranks


def _packed(message, extent, entries):
    parts = []
    for piece in message.pieces:
        item = entries[piece.key].dtype.itemsize
        frame = extent[piece.at : piece.at + piece.frame.numel * item].reshape(*piece.frame.sizes, item)
        parts.append(frame[piece.box.slices(piece.frame.offsets)].tobytes())
    payload = b"".join(parts)
    assert len(payload) == message.size
    return payload


def _land(rank, entries, message, payload):
    at = 0
    for key, box, _, _ in message.pieces:
        size = box.numel * entries[key].dtype.itemsize
        piece = np.frombuffer(payload[at : at + size], np.uint8)
        rank.values[key][box.slices()] = piece.reshape(*box.sizes, entries[key].dtype.itemsize)
        rank.landed[key][box.slices()] += 1
        at += size
