"""What the command leaves in files of its nodes: all of it, or nothing, and what another run may do with it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from loader.ground.memory import anonymous_bytes
from loader.init_from_hf import main
from loader.sinks import local
from tests.ranks import Outcome, run_ranks

RANKS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("source")
    save_file({"weight": torch.rand(512, 512)}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")
    return str(directory)


@pytest.fixture
def arguments(tmp_path, source) -> list[str]:
    sections = {
        "source": {"uri": source}, "model": {"builder": "tests.local_models:wide"}, "report": None,
        "output": {"local": str(tmp_path / "init")},
    }  # fmt: skip
    (tmp_path / "cfg.yaml").write_text(json.dumps(sections))
    return ["--config", str(tmp_path / "cfg.yaml")]


def run(
    arguments: list[str], *overrides: str, env: dict[str, str] | None = None, patient: bool = True
) -> list[Outcome]:
    return run_ranks(RANKS, main, [*arguments, *overrides], init=False, env=env, outcomes=True, patient=patient)


def errors(outcomes: list[Outcome]) -> list[str]:
    """The error that each rank tells, which has ended with one."""
    assert all(outcome.value is None for outcome in outcomes), outcomes
    return [outcome.output.strip().splitlines()[-1] for outcome in outcomes]


class Found(NamedTuple):
    run: str
    names: list[str]


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def found_in(directory: Path) -> Found:
    return Found(json.loads((directory / "complete.json").read_text())["run"], names_in(directory))


COMPLETE = sorted(
    [f"rank-{rank:05}.{kind}" for rank in range(RANKS) for kind in ("bin", "json")]
    + ["complete.json", "config.json", "tokenizer.json"]
)


# ---------------------------------------------------------------- what is there before


def test_complete_shards_are_refused_used_or_replaced(tmp_path, arguments):
    directory = tmp_path / "init"
    assert [outcome.value for outcome in run(arguments)] == [0] * RANKS
    first = found_in(directory)
    assert first.names == COMPLETE
    for message in errors(run(arguments)):
        assert "ConfigError" in message
        assert f"output.local: {directory} holds a complete set of shards: set output.if_exists to use" in message
    used = run(arguments, "output.if_exists=use")
    assert [outcome.value for outcome in used] == [0] * RANKS
    assert "holds complete shards: used as they are" in used[0].output
    assert found_in(directory) == first
    again = run(arguments, "output.if_exists=overwrite", "output.entrypoint=tests.local_models:there")
    assert [outcome.value for outcome in again] == [0] * RANKS, "an entrypoint gets the model as well"
    second = found_in(directory)
    assert second.run != first.run
    (directory / "complete.json").unlink()
    assert [outcome.value for outcome in run(arguments, "output.if_exists=use")] == [0] * RANKS
    assert found_in(directory).run != second.run, "what is not complete is not used"


def test_other_files_are_refused_and_stay(tmp_path, arguments):
    (tmp_path / "init").mkdir()
    (tmp_path / "init" / "notes.txt").write_text("mine")
    for message in errors(run(arguments, "output.if_exists=overwrite")):
        assert "holds other files (notes.txt) and no set of shards" in message
    assert names_in(tmp_path / "init") == ["notes.txt"]


def test_a_bucket_is_refused(arguments):
    for message in errors(run(arguments, "output.local=s3://bucket/init")):
        assert (
            "output.local: should be a directory of the node, such as /dev/shm/init, found s3://bucket/init" in message
        )


def _main_on_its_node(arguments: list[str], root: str) -> int:
    return main([*arguments, f"output.local={root}/node-{os.environ['GROUP_RANK']}", "output.if_exists=use"])


def test_shards_that_not_every_node_has_are_made_again(tmp_path, arguments):
    """Each node has a directory of its own; then one of them is replaced."""
    first, second = tmp_path / "node-0", tmp_path / "node-1"
    assert run_ranks(RANKS, _main_on_its_node, arguments, str(tmp_path), nodes=2, init=False) == [0] * RANKS
    before = found_in(first)
    assert before.run == found_in(second).run
    assert [name for name in before.names if name.endswith(".bin")] == ["rank-00000.bin", "rank-00001.bin"]
    assert [path.name for path in sorted(second.glob("*.bin"))] == ["rank-00002.bin", "rank-00003.bin"]
    assert (second / "tokenizer.json").exists()
    for path in second.iterdir():
        path.unlink()
    assert run_ranks(RANKS, _main_on_its_node, arguments, str(tmp_path), nodes=2, init=False) == [0] * RANKS
    assert found_in(first).run == found_in(second).run != before.run


def test_two_nodes_may_share_a_directory(tmp_path, arguments):
    assert run_ranks(RANKS, main, arguments, nodes=2, init=False) == [0] * RANKS
    assert found_in(tmp_path / "init").names == COMPLETE
    outcomes = run_ranks(RANKS, main, [*arguments, "model.builder=tests.local_models:full_disk",
        "output.if_exists=overwrite"], nodes=2, init=False, outcomes=True)  # fmt: skip
    assert "SinkError" in errors(outcomes)[0]
    assert names_in(tmp_path) == ["cfg.yaml"]


def test_of_two_outputs_only_what_is_missing_is_written(tmp_path, arguments):
    both = (f"output.checkpoint={tmp_path}/dcp", "output.if_exists=use")
    assert [outcome.value for outcome in run(arguments, *both)] == [0] * RANKS
    before = (tmp_path / "dcp" / ".metadata").stat().st_mtime_ns, found_in(tmp_path / "init").run
    (tmp_path / "init" / "complete.json").unlink()
    assert [outcome.value for outcome in run(arguments, *both)] == [0] * RANKS
    after = (tmp_path / "dcp" / ".metadata").stat().st_mtime_ns, found_in(tmp_path / "init").run
    assert (before[0] == after[0], before[1] == after[1]) == (True, False)


# ---------------------------------------------------------------- failures


def test_a_disk_that_is_full_in_the_middle_is_told_alike_and_leaves_nothing(tmp_path, arguments):
    outcomes = run(arguments, "model.builder=tests.local_models:full_disk")
    for message in errors(outcomes):
        assert "SinkError" in message
        assert "rank-00002.bin cannot be written: OSError: [Errno 27] File too large" in message
    assert names_in(tmp_path) == ["cfg.yaml"]
    assert [outcome.value for outcome in run(arguments)] == [0] * RANKS


def test_a_rank_that_is_killed_as_it_writes_ends_the_others_and_leaves_nothing(tmp_path, arguments):
    outcomes = run(
        arguments, "model.builder=tests.local_models:killed", env={"LOCAL": str(tmp_path / "init")}, patient=False
    )
    assert "SIGKILL" in outcomes.pop(2).report
    for message in errors(outcomes):
        assert "LostRankError: rank 2" in message or "(first on rank" in message
    assert names_in(tmp_path) == ["cfg.yaml"]


def _main_with_little_room(arguments: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
        return main(arguments)


def test_too_little_room_is_told_before_anything_is_read(tmp_path, arguments):
    outcomes = run_ranks(RANKS, _main_with_little_room, arguments, init=False, outcomes=True)
    for message in errors(outcomes):
        assert "ConfigError" in message
        assert f"{tmp_path}/init has 0.001 GB free, and the shards of this node's ranks take 0.001 GB" in message
    assert "loading" not in outcomes[0].output
    assert names_in(tmp_path) == ["cfg.yaml"]


# ---------------------------------------------------------------- memory


class _Kept(NamedTuple):
    names: tuple[str, ...]
    local: torch.Tensor


def _peak(directory: str, spend: bool) -> tuple[int, int]:
    """The most that tensors and their file took together while they were written, and what was left of the tensors."""
    Path(directory).mkdir()
    before = anonymous_bytes()
    big = torch.ones(6 << 20)
    shards: list[tuple[Any, dict[str, Any]]] = [
        (_Kept((str(n),), torch.full((6 << 20,), float(n))), LAYOUT) for n in range(8)
    ]
    shards += [
        (_Kept(("rows",), big.view(1024, -1)[:512]), LAYOUT),
        (_Kept(("columns",), big.view(1024, -1)[512:].t()), LAYOUT),
    ]
    peak = 0

    def look() -> None:
        nonlocal peak
        peak = max(peak, anonymous_bytes() - before + Path(directory, "rank-00000.bin").stat().st_size)

    about = {"run": "1", "uri": "", "pins": {}, "fingerprint": None}
    local.save(shards, directory, rank=0, world_size=1, about=about, spend=spend, go_on=look)
    return peak, anonymous_bytes() - before


LAYOUT: dict[str, Any] = {
    "shape": [], "dtype": "float32", "mesh": {}, "coordinate": [], "placements": [], "local_shape": [],
}  # fmt: skip


def test_shards_are_not_held_twice_while_they_are_written(tmp_path):
    """Of 10 tensors of 24 MiB, the last two halves of one."""
    shards = 9 * (24 << 20)
    ((peak, left),) = run_ranks(1, _peak, str(tmp_path / "spent"), True, init=False)
    assert peak < shards + (48 << 20)
    assert left < 24 << 20
    ((_, kept),) = run_ranks(1, _peak, str(tmp_path / "kept"), False, init=False)
    assert kept > shards - (24 << 20), "an entrypoint is still to get them"
