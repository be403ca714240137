"""A rank that is lost, or told to end, in the middle of a reply of each back end: the rows of tests/faults.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.checkpoints import random_checkpoint
from tests.faults import ENDINGS, OVER_HTTP
from tests.misbehaving import FILE
from tests.places import Place, misbehaving_place
from tests.ranks import run_ranks
from tests.servers import http_server

RANKS = 2
TENSORS = {f"layers.{n}.weight": (torch.bfloat16, (256, 384)) for n in range(3)}  # 9 ranges
SIGNALS = {"lost": signal.SIGKILL, "terminated": signal.SIGTERM}
pytestmark = pytest.mark.timeout(300)


def _command(directory: str, ports: list[int]) -> None:
    """One rank of the world of one back end, on a host of its own; all worlds are there at once, for each waits."""
    from loader.init_from_hf import main

    world, rank = divmod(int(os.environ["RANK"]), RANKS)
    mine = {"RANK": rank, "WORLD_SIZE": RANKS, "GROUP_RANK": rank, "MASTER_PORT": ports[world]}
    mine |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_WORLD_SIZE": RANKS}
    os.environ.update({name: str(value) for name, value in mine.items()})
    config = Path(directory, OVER_HTTP[world], f"{rank}.json")
    config.with_suffix(".pid").write_text(str(os.getpid()))
    main(["--config", str(config)])


def _write_configs(directory: Path, place: Place, backend: str, name: str) -> None:
    directory.mkdir()
    for rank in range(RANKS):
        config = {
            "source": {"uri": f"{place.uris[rank]}/{name}", "storage_options": place.options[rank]},
            "model": {"builder": None},
            "placements": [{"match": "*", "shard": {"dp_shard": 1}}],
            "read": {"range_size": "64KiB", "memory_budget": "64MiB", "backend": backend, "timeout": "90s"},
            "output": {"checkpoint": str(directory / "out")},
            "report": None,
        }
        (directory / f"{rank}.json").write_text(json.dumps(config))


def _strike(directory: Path, place: Place, name: str, ended: threading.Event) -> None:
    """When a reply to rank 1 has fallen silent, and the output has begun."""
    while not (place.misbehaving.failed[name] and (directory / "out").exists()):
        if ended.wait(0.05):
            return
    os.kill(int((directory / "1.pid").read_text()), SIGNALS[name])


@contextlib.contextmanager
def _places(servers: Mapping[str, Any], root: Path, name: str) -> Iterator[dict[str, Place]]:
    with contextlib.ExitStack() as stack:
        yield {
            backend: stack.enter_context(
                misbehaving_place(kind, servers[kind], root, root / name / FILE, {name: ENDINGS[name].fault}, RANKS)
            )
            for backend in OVER_HTTP
            for kind in [backend.partition(" ")[0]]
        }


@pytest.mark.parametrize("name", ENDINGS)
def test_all_ranks_of_each_back_end_end_with_its_name(s3, gcs, tmp_path, name):
    random_checkpoint(tmp_path / "root" / name, TENSORS)
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in OVER_HTTP]
    ended = threading.Event()
    with contextlib.ExitStack() as stack:
        servers = {"s3": s3, "gs": gcs, "https": stack.enter_context(http_server(tmp_path / "root"))}
        places = stack.enter_context(_places(servers, tmp_path / "root", name))
        for backend, place in places.items():
            _write_configs(tmp_path / backend, place, backend.rpartition(" ")[2], name)
            told = (tmp_path / backend, place, name, ended)
            threading.Thread(target=_strike, args=told, daemon=True).start()
        ports = [store.port for store in stores]
        count = RANKS * len(OVER_HTTP)
        outcomes = run_ranks(count, _command, str(tmp_path), ports, init=False, outcomes=True, patient=False)
        ended.set()
    for number, outcome in enumerate(outcomes):
        world, rank = divmod(number, RANKS)
        row, told = ENDINGS[name], f"{OVER_HTTP[world]}: {outcome}"
        assert not (tmp_path / OVER_HTTP[world] / "out").exists(), told
        if (name, rank) == ("lost", 1):
            assert outcome.report == "died: killed by SIGKILL", told
            continue
        assert outcome.report == "died: exit code 1", told
        last = outcome.output.rstrip().splitlines()[-1]
        assert last.startswith(f"rank {rank}: {row.cell(OVER_HTTP[world])}: "), told
        assert all(words in last for words in row.says), told
    del stores
