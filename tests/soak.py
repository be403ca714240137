"""Loads under random faults, seeded: each ends bit-exact or with one named error on every rank, and leaves nothing.

`python tests/soak.py [--loads 100] [--seed 0]` tells how the loads ended, and fails where one ended otherwise.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import fsspec
import psutil
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from launch.local_s3 import s3_server
from tests import misbehaving
from tests.checkpoints import random_checkpoint
from tests.misbehaving import Fault, Get
from tests.places import misbehaving_place
from tests.proxy import Reply
from tests.ranks import run_ranks
from tests.servers import gcs_server, http_server

RANKS = 4
TENSORS = {f"layers.{n}.weight": (torch.bfloat16, (256, 384)) for n in range(4)}
PASSING = [
    misbehaving.status(503), misbehaving.status(429, Retry_After="1"), misbehaving.status(500), misbehaving.reset,
    misbehaving.reset_within, misbehaving.cut, misbehaving.stall, misbehaving.short_206, misbehaving.long_206,
    misbehaving.other_range, misbehaving.ignored_range, misbehaving.expired,
]  # fmt: skip
NAMED = {"StoreError", "PinError"}
PROOFS = [None, "fingerprint", "checksum"]
SLOWEST = 60.0
"""Seconds that no load may take: its deadline is 15, and ranks end within 10 s; the rest is a busy machine's."""


def faults(rng: random.Random, proof: str | None) -> Fault:
    """Some GETs of some ranks go wrong, each in a way of its own; now and then for good, or the object changes. Where
    checksums would show it, bits flip too."""
    passing = [*PASSING, misbehaving.flipped] if proof == "checksum" else PASSING
    often, lasting = rng.choice([0.0, 0.1, 0.3, 0.6]), rng.choice([None, None, None, rng.choice(passing)])
    rank, change = rng.randrange(RANKS), rng.choice([None, None, None, "overwrite", "delete"])
    turn = rng.randrange(4)
    lock = threading.Lock()

    def fault(get: Get) -> Reply | None:
        with lock:
            wrong, which = rng.random() < often, rng.choice(passing)
        if change and (get.request.rank, get.number) == (rank, turn):
            return misbehaving.changes(change)(get)
        if lasting and get.request.rank == rank and get.number >= turn:
            return lasting(get)
        return which(get) if wrong else None

    return fault


def load_all(
    loads: Sequence[tuple[str, str | None]],
    uris: dict[str, list[str]],
    options: dict[str, list[Any]],
    whole: str,
    seed: int,
) -> Any:
    """Each load's end on this rank: its error, or whether the bits are right; and what was left behind."""
    from safetensors.torch import load_file

    import loader
    from tests.shards import blank, differences, shard

    rank, rng = dist.get_rank(), random.Random(seed)
    mesh = init_device_mesh("cpu", (2, 2))
    full, ends = load_file(whole), []
    dist.all_reduce(torch.ones(1))  # the group's connections are made when they are first needed
    before = opened()
    for number, (kind, proof) in enumerate(loads):
        placements = [rng.choice([Replicate(), Shard(0), Shard(1)]) for _ in range(2)]
        expected = {key: shard(tensor, mesh, placements) for key, tensor in full.items()}
        read = {
            "range_size": rng.choice(["64KiB", "256KiB"]), "memory_budget": "32MiB", "retries": rng.choice([1, 3, 8]),
            "timeout": "1s", "deadline": "15s", "share": rng.choice(["world", "none"]),
            "backend": rng.choice(["direct", "fsspec"]), "verify": proof,
        }  # fmt: skip
        target, begun = {key: blank(tensor) for key, tensor in expected.items()}, time.monotonic()
        try:
            loader.load(target, f"{uris[kind][rank]}/{number}", storage_options=options[kind][rank], **read)
            end = "different bits" if differences(target, expected) else "bit-exact"
        except loader.errors.LoaderError as error:
            end = f"{type(error).__name__}: {error}"
        ends.append((end, time.monotonic() - begun))
        dist.all_reduce(total := torch.ones(1))
        assert total.item() == RANKS
    return ends, left_behind(before)


def opened() -> set[str]:
    """This process's connections and files, the loader's threads, and its children."""
    process = psutil.Process()
    found = {thread.name for thread in threading.enumerate() if thread.name.startswith("loader-")}
    found |= {each.path for each in process.open_files()} | {str(each) for each in process.children(recursive=True)}
    return found | {f"{each.laddr} to {each.raddr}" for each in process.net_connections() if each.raddr}


def left_behind(before: set[str]) -> set[str]:
    """What is open that was not before, once what still ends has ended."""
    until = time.monotonic() + 10
    while True:
        gc.collect()  # client libraries close what nobody refers to, and gcsfs without waking the loop that is to do it
        fsspec.asyn.get_loop().call_soon_threadsafe(lambda: None)
        if not (left := opened() - before) or time.monotonic() > until:
            return left
        time.sleep(0.2)


def soak(loads: int, seed: int, scratch: Path) -> collections.Counter[str]:
    """How `loads` loads ended. Raises AssertionError where one did not end well."""
    rng = random.Random(seed)
    served, other = scratch / "served", scratch / "other"
    temporary = scratch / "temporary"
    temporary.mkdir()
    random_checkpoint(other, TENSORS, seed=2)
    random_checkpoint(scratch / "good", TENSORS)
    for number in range(loads):
        random_checkpoint(served / str(number), TENSORS)
    chosen = [(rng.choice(["s3", "gs", "https"]), rng.choice(PROOFS)) for _ in range(loads)]
    troubles = {str(number): faults(random.Random(rng.random()), proof) for number, (_, proof) in enumerate(chosen)}
    with s3_server() as s3, gcs_server() as gcs, http_server(served) as url, contextlib.ExitStack() as stack:
        places = {
            kind: stack.enter_context(
                misbehaving_place(kind, server, served, other / misbehaving.FILE, troubles, RANKS)
            )
            for kind, server in {"s3": s3, "gs": gcs, "https": url}.items()
        }
        whole = str(scratch / "good" / misbehaving.FILE)
        uris = {kind: place.uris for kind, place in places.items()}
        options = {kind: place.options for kind, place in places.items()}
        told = run_ranks(
            RANKS,
            load_all,
            chosen,
            uris,
            options,
            whole,
            seed,
            nodes=2,
            timeout=60 + SLOWEST * loads,
            env={"TMPDIR": str(temporary)},
        )
    assert not list(temporary.iterdir()), "files are left behind"
    return _judge(told, chosen)


def _judge(told: Sequence[Any], chosen: Sequence[tuple[str, str | None]]) -> collections.Counter[str]:
    ended: collections.Counter[str] = collections.Counter()
    ended_on = zip(*(ends for ends, _ in told), strict=True)
    for number, (ranks, (kind, proof)) in enumerate(zip(ended_on, chosen, strict=True)):
        load, words = f"load {number} ({kind}, verify: {proof})", {end for end, _ in ranks}
        assert len(words) == 1, f"{load} ended otherwise on other ranks: {words}"
        word = words.pop().partition(":")[0]
        assert word in _may_end(kind, proof), f"{load}: {ranks[0]}"
        assert max(seconds for _, seconds in ranks) < SLOWEST, f"{load}: {ranks}"
        ended[word] += 1
    for rank, (_, left) in enumerate(told):
        assert not left, f"rank {rank} left {left}"
    return ended


def _may_end(kind: str, proof: str | None) -> set[str]:
    if proof != "checksum":
        return NAMED | {"bit-exact"}
    return {"ConfigError"} if kind == "https" else NAMED | {"bit-exact", "CorruptionError"}  # a web server has none


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--loads", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    given = parser.parse_args()
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # else gcsfs asks the emulator over gRPC
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        ended = soak(given.loads, given.seed, Path(scratch))
    told = ", ".join(f"{count} {how}" for how, count in ended.most_common())
    print(f"{given.loads} loads of seed {given.seed} on {RANKS} ranks in {time.monotonic() - begun:.0f} s: {told}")


if __name__ == "__main__":
    main()
