"""How planning grows: seconds (wall and CPU) and peak memory per phase, for 90,000 keys and up to 4,096 ranks.

    python tests/benchmarks/plan_scale.py [--ranks 64 512 4096] [--mesh fsdp hsdp-tp] [--layers 61]

The checkpoint is DeepSeek-V3's by shape: 61 layers, 256 experts in 58 of them, fp8 weights with a scale for each block.
Nothing is read and no rank is started: every rank's needs are made from its coordinate, here one after the other, and
packed as they are on their way to the coordinator.
"""

import argparse
import gc
import itertools
import math
import pickle
import re
import sys
import time
import zlib
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from loader.place.boxes import shard_boxes
from loader.plan.catalog import Entry
from loader.plan.extents import Limits, cut_extents
from loader.plan.needs import Classes, NeedGroup, Needs
from loader.plan.plan import Plan
from loader.plan.readers import assign_readers
from loader.plan.rounds import pack_rounds
from loader.plan.schedule import Schedule
from loader.plan.turns import take_turns

MiB = 1024 * 1024
FILE_BYTES = 4300 * MiB
TP = 8
EP = 64
EXPERTS = 256
NODE = 8


def deepseek(layers=61):
    """(name, dtype, shape) of every key, in the order of names."""

    def fp8(name, out, into):
        yield f"{name}.weight", torch.float8_e4m3fn, (out, into)
        yield f"{name}.weight_scale_inv", torch.float32, (math.ceil(out / 128), math.ceil(into / 128))

    def mlp(name, width):
        for part in ("gate_proj", "up_proj"):
            yield from fp8(f"{name}.{part}", width, 7168)
        yield from fp8(f"{name}.down_proj", 7168, width)

    yield "model.embed_tokens.weight", torch.bfloat16, (129280, 7168)
    for layer in range(layers):
        name = f"model.layers.{layer}"
        for norm, width in (
            ("input", 7168),
            ("post_attention", 7168),
            ("self_attn.q_a", 1536),
            ("self_attn.kv_a", 512),
        ):
            yield f"{name}.{norm}_layernorm.weight", torch.bfloat16, (width,)
        for part, out, into in (
            ("q_a_proj", 1536, 7168),
            ("q_b_proj", 24576, 1536),
            ("kv_a_proj_with_mqa", 576, 7168),
            ("kv_b_proj", 32768, 512),
            ("o_proj", 7168, 16384),
        ):
            yield from fp8(f"{name}.self_attn.{part}", out, into)
        if layer < 3:
            yield from mlp(f"{name}.mlp", 18432)
            continue
        yield f"{name}.mlp.gate.weight", torch.bfloat16, (256, 7168)
        yield from mlp(f"{name}.mlp.shared_experts", 2048)
        for expert in range(EXPERTS):
            yield from mlp(f"{name}.mlp.experts.{expert}", 2048)
    yield "model.norm.weight", torch.bfloat16, (7168,)
    yield "lm_head.weight", torch.bfloat16, (129280, 7168)


def catalogue(keys):
    """Names and entries, laid out as safetensors writes them: a file at a time, wide items first, then by name."""
    file_of, size, file = {}, 0, 0
    for name, dtype, shape in keys:
        file_of[name], size = file, size + math.prod(shape) * dtype.itemsize
        file, size = (file + 1, 0) if size > FILE_BYTES else (file, size)
    names, entries, at, last = [], [], 0, -1
    for name, dtype, shape in sorted(keys, key=lambda k: (file_of[k[0]], -k[1].itemsize, k[0])):
        at, last = (at if file_of[name] == last else 100_000), file_of[name]
        stop = at + math.prod(shape) * dtype.itemsize
        names.append(name)
        entries.append(Entry(dtype, shape, last, at, stop))
        at = stop
    return names, entries


# A mesh's sizes; and for a key its placements, with the EP coordinate that has it alone if it is an expert's.


def fsdp(ranks):
    return (ranks,), lambda _: ((Shard(0),), None)


def hsdp_tp(ranks):
    """TP 8 innermost, sharded over at most 64 of those, and that replicated."""
    shards = min(64, ranks // TP // 2)

    def placed(name):
        if any(part in name for part in ("down_proj", "o_proj")):
            return (Replicate(), Shard(0), Shard(1)), None
        if any(part in name for part in ("gate_proj", "up_proj", "_b_proj", "lm_head", "embed_tokens")):
            return (Replicate(), _StridedShard(0, split_factor=TP), Shard(0)), None
        return (Replicate(), Shard(0), Replicate()), None

    return (ranks // TP // shards, shards, TP), placed


def hsdp_ep(ranks):
    """EP 64 innermost; an expert's owners shard it over the middle dim, all else is over both; the outer replicates."""
    owners = max(1, min(8, ranks // EP // 2))

    def placed(name):
        if found := re.search(r"\.experts\.(\d+)\.", name):
            return (Replicate(), Shard(0), Replicate()), int(found[1]) * EP // EXPERTS
        return (Replicate(), Shard(0), Shard(0)), None

    return (ranks // EP // owners, owners, EP), placed


MESHES = {"fsdp": fsdp, "hsdp-tp": hsdp_tp, "hsdp-ep": hsdp_ep}


def needs_of(entries, mesh, placed, names):
    """Every rank's digest, and of the distinct needs what their ranks send to the coordinator."""
    alike = defaultdict(list)
    for key, (name, entry) in enumerate(zip(names, entries, strict=True)):
        alike[entry.shape, *placed(name)].append(key)
    digests, sent = {}, {}
    for rank, coordinate in enumerate(itertools.product(*map(range, mesh))):
        groups = []
        for (shape, placements, owner), keys in alike.items():
            if owner not in {None, coordinate[-1]}:
                continue
            boxes = tuple(box for box, _ in shard_boxes(shape, mesh, coordinate, placements))
            if boxes:
                groups.append(NeedGroup(np.array(keys, np.int64), boxes))
        own = Needs(tuple(groups))
        digests[rank] = own.digest
        if own.digest not in sent:
            sent[own.digest] = zlib.compress(pickle.dumps(own), level=1)
    return digests, sent


@contextmanager
def phase(name, spent):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    begun, busy = time.perf_counter(), time.process_time()
    yield
    seconds, cpu = time.perf_counter() - begun, time.process_time() - busy
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    spent[name] = cpu, int(peak.split()[1]) / 1024
    print(f"  {name:<10} {seconds:8.2f} s  {cpu:8.2f} CPU s   peak {spent[name][1]:6.0f} MiB", flush=True)


def simulate(names, entries, mesh, placed):
    """A row of the growth table. The needs are all ranks' work, what follows is rank 0's, the schedule each rank's."""
    limits = Limits.within(512 * MiB, 8 * MiB, 0)
    spent = {}
    with phase("needs", spent):
        digests, sent = needs_of(entries, mesh, placed, names)
    with phase("receive", spent):
        needs = {digest: pickle.loads(zlib.decompress(data)) for digest, data in sent.items()}
        classes = Classes.of(digests, needs, [rank // NODE for rank in digests])
    print(f"  {len(needs)} distinct needs, of which a rank sends {max(map(len, sent.values())) / 1024:.0f} KiB at most")
    with phase("cut", spent):
        cuts = cut_extents(entries, classes, limits.range_bytes, limits.round_bytes)
    with phase("readers", spent):
        readers = assign_readers(cuts, classes)
    with phase("rounds", spent):
        rounds = pack_rounds(cuts, readers, take_turns(entries, cuts, ()), classes, limits.round_bytes)
    plan = Plan(classes, cuts.file, cuts.start, cuts.stop, readers, rounds, cuts.needed_bytes)
    with phase("pickle", spent):
        sent = len(zlib.compress(pickle.dumps(plan), level=1))
    with phase("schedule", spent):
        schedule = Schedule(plan, entries, 1)
        read = sent_to = received = 0
        for number in range(schedule.rounds):
            todo = schedule.round(number)
            read += len(todo.reads)
            sent_to += sum(len(ranks) for each in todo.reads for _, ranks in each.sends)
            received += len(todo.receives)
    load = np.bincount(readers, cuts.size, minlength=math.prod(mesh))
    nodes = load.reshape(-1, NODE).sum(1)
    print(
        f"  {len(cuts.start)} extents of {len(cuts.kinds)} kinds in {plan.rounds} rounds, sent in {sent / MiB:.2f} MiB"
    )
    print(f"  every rank reads {load.min() / MiB:.0f} to {load.max() / MiB:.0f} MiB, ", end="")
    print(f"every node of {NODE} {nodes.min() / MiB:.0f} to {nodes.max() / MiB:.0f}")
    print(f"  rank 1 reads {read} extents, sends {sent_to} messages and receives {received}", flush=True)
    planning = [spent[each] for each in ("receive", "cut", "readers", "rounds", "pickle")]
    seconds, peak = sum(cpu for cpu, _ in planning), max(mib for _, mib in planning)
    return f"{len(classes.needs):10} {len(cuts.start):10} {seconds:12.1f} {spent['schedule'][0]:12.1f} {peak:10.0f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--mesh", choices=MESHES, nargs="+", default=list(MESHES))
    parser.add_argument("--layers", type=int, default=61)
    chosen = parser.parse_args()
    names, entries = catalogue(list(deepseek(chosen.layers)))
    print(f"{len(entries)} keys, {sum(e.stop - e.start for e in entries) / 1e9:.0f} GB in {entries[-1].file + 1} files")
    table = [f"{'mesh':<20} {'distinct':>10} {'extents':>10} {'rank 0, s':>12} {'others, s':>12} {'peak, MiB':>10}"]
    for mesh, ranks in itertools.product(chosen.mesh, chosen.ranks):
        shape, placed = MESHES[mesh](ranks)
        name = f"{mesh} {'x'.join(map(str, shape))}"
        print(name)
        table.append(f"{name:<20} {simulate(names, entries, shape, placed)}")
    print("\n".join(["", *table]))
