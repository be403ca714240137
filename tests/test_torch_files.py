"""`.bin` checkpoints end to end, from a real bucket: bit for bit, each byte once, and told apart from safetensors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import loader
from loader.errors import CatalogError, CoverageError
from tests.checkpoints import minilm_dir, random_checkpoint, same_bits, tiny_llama
from tests.proxy import CountingProxy
from tests.ranks import run_ranks
from tests.shards import blank, differences, shard
from tests.torch_files import INDEX, ONE, catalogued, save_sharded, saved

WORLD = 4
EARLY = 64 * 1024
RANGE = 64 * 1024
PLACEMENTS = {
    "fsdp": ((4,), [Shard(0)]),
    "tp columns": ((4,), [Shard(1)]),
    "fsdp, tp columns": ((2, 2), [Shard(0), Shard(1)]),
    "replicated": ((4,), [Replicate()]),
}


def _whole() -> dict[str, torch.Tensor]:
    """Contiguous, transposed, sliced, tied, overlapping and expanded tensors, some of several ranges."""
    torch.manual_seed(0)
    fused, embed = torch.randn(300, 257), torch.randn(500, 64)
    return {
        "embed": embed,
        "layer.up": torch.randn(512, 129),
        "layer.down": torch.randn(129, 512).t(),
        "layer.square": torch.randn(70, 70).t(),
        "layer.columns": torch.randn(401, 90)[:, 30:71],
        "layer.rows": torch.randn(900, 33)[100:333],
        "layer.turned": torch.randn(7, 40, 50).permute(2, 0, 1)[3:, :, 5:],
        "layer.first": fused[:200],
        "layer.second": fused[90:],
        "layer.bias": torch.randn(1, 77).expand(5, 77),
        "layer.norm": torch.nn.Parameter(torch.randn(64, dtype=torch.bfloat16)),
        "head": embed,
    }


def _stored() -> dict[str, torch.Tensor]:
    """As `_whole`, but for storages that no one needs the rest of."""
    return {key: tensor for key, tensor in _whole().items() if key not in {"layer.columns", "layer.turned"}}


def _load(uri: str, options: Sequence[Mapping[str, Any]], names: Sequence[str], whole: Any, read: Mapping) -> list:
    """What came out wrong, under every placement, and what is reported."""
    wrong, reports = [], []
    for name in names:
        sizes, placements = PLACEMENTS[name]
        mesh = init_device_mesh("cpu", sizes)
        expected = {key: shard(tensor.detach().contiguous(), mesh, placements) for key, tensor in whole().items()}
        state = {key: blank(tensor) for key, tensor in expected.items()}
        reports.append(loader.load(state, uri, storage_options=options[dist.get_rank()], **read))
        wrong += [(name, key) for key in differences(state, expected)]
    return [wrong, reports]


@pytest.mark.parametrize("kind", ["one file", "sharded", "legacy"])
def test_every_layout_under_every_placement(s3, tmp_path, kind):
    if kind == "sharded":
        save_sharded(tmp_path, _whole(), 3)
    else:
        (tmp_path / ONE).write_bytes(saved(_whole(), _use_new_zipfile_serialization=kind != "legacy"))
    options = [s3.storage_options] * WORLD
    reads = [{"range_size": "64KiB", "memory_budget": "32MiB"}, *([{}] if kind == "one file" else [])]
    for read in reads:
        found = run_ranks(WORLD, _load, s3.put(tmp_path), options, list(PLACEMENTS), _whole, read)
        assert [wrong for wrong, _ in found] == [[]] * WORLD


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_each_byte_leaves_the_bucket_once(s3, tmp_path, legacy):
    """On top of the directory, the pickle and the local headers; tied and overlapping tensors are read once."""
    data = saved(_stored(), _use_new_zipfile_serialization=not legacy)
    (tmp_path / ONE).write_bytes(data)
    uri = s3.put(tmp_path)
    entries = catalogued(data).contents.entries.values()
    needed = np.zeros(len(data), bool)
    for entry in entries:
        needed[entry.start : entry.stop] = True
    with CountingProxy(s3.endpoint, listeners=WORLD) as proxy:
        options = [s3.at(proxy.url_for(rank)).storage_options for rank in range(WORLD)]
        (wrong, (report,)), *_ = run_ranks(WORLD, _load, uri, options, ["fsdp"], _stored, {"range_size": "64KiB"})
        assert wrong == []
        read = np.zeros(len(data), int)
        for request in proxy.select(ONE):
            first, last = map(int, request.range.removeprefix("bytes=").split("-"))
            assert request.body_bytes == last + 1 - first
            read[first : last + 1] += 1
        assert read[needed].min() == 1
        assert read[needed].sum() <= needed.sum() + EARLY
        assert read[~needed].sum() < 24 * 1024  # and the rest of a storage that has it not read at all
        others = [request for request in proxy.requests if request.rank and request.range is None]
        assert {request.method for request in others} <= {"HEAD"}  # of the bucket, for its region
        assert not any(request.path.endswith(ONE) for request in others)
        shares = [proxy.bytes_served(ONE, rank=rank) for rank in range(WORLD)]
        assert max(shares[1:]) - min(shares[1:]) <= 2 * RANGE
        assert report.needed_bytes == needed.sum()
        assert report.fetched_bytes == proxy.bytes_served(ONE)
        assert report.gets == proxy.gets(ONE)
        assert report.tensors == len(_stored())


# ---------------------------------------------------------------- what is found, and what is said


def _from(directory: Any, **arguments: Any) -> dict[str, torch.Tensor]:
    return dict(loader.iter_convert(str(directory), **arguments))


def test_where_both_formats_are_safetensors_wins_and_a_line_says_so(tmp_path, caplog):
    made = random_checkpoint(tmp_path, {"a": (torch.float32, (3, 4))})
    torch.save({"a": torch.zeros(3, 4)}, tmp_path / ONE)
    assert same_bits(_from(tmp_path)["a"], made["a"])
    assert "model.safetensors is loaded, and not pytorch_model.bin" in caplog.text
    caplog.clear()
    (tmp_path / ONE).unlink()
    _from(tmp_path)
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.bin", "model.pt", "last.pth"])
def test_one_file_named_by_the_uri(s3, tmp_path, caplog, name):
    state = {"a.weight": torch.randn(3, 4).t()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / name)
    for uri, options in ((tmp_path, {}), (s3.put(tmp_path), s3.storage_options)):
        found = _from(f"{uri}/{name}", storage_options=options)
        assert same_bits(found["a.weight"], state["a.weight"])
        assert f"{name}: left out, for it is no tensor: 'epoch'" in caplog.text


def test_odd_layouts(tmp_path, caplog):
    """An index without sizes; files without an index; and what else lies about."""
    tensors = {f"layers.{n}.weight": torch.randn(4, n + 1) for n in range(5)}
    save_sharded(tmp_path, tensors, 2)
    (tmp_path / INDEX).write_text((tmp_path / INDEX).read_text().replace('"metadata"', '"other"'))
    assert _from(tmp_path).keys() == tensors.keys()
    (tmp_path / INDEX).unlink()
    for name in ("training_args.bin", "optimizer.bin", "rng_state.pth"):
        (tmp_path / name).write_bytes(b"no checkpoint")
    assert _from(tmp_path).keys() == tensors.keys()
    assert caplog.text == ""
    torch.save({"lora": torch.ones(1)}, tmp_path / "adapter_model.bin")
    assert _from(tmp_path).keys() == tensors.keys()
    assert "and not adapter_model.bin" in caplog.text
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CatalogError, match=r"missing are pytorch_model-00002-of-00002.bin"):
        _from(tmp_path)


def test_errors_name_the_keys_that_the_user_knows(tmp_path):
    fused = torch.randn(6, 4)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    torch.save({"m.q": fused[:4], "m.k": fused[2:], "m.tied": fused[:4], "m.whole": torch.ones(2)}, tmp_path / ONE)
    uri = str(tmp_path)
    state = {"q": torch.zeros(4, 4), "whole": torch.zeros(2)}
    with pytest.raises(CoverageError, match=r"^1 checkpoint keys have no target: m.k \[4, 4\]\. "):
        loader.load(state, uri, strip_prefix="m.")
    with pytest.raises(CoverageError, match=r"1 checkpoint keys have no target: m.k \[4, 4\]\. "):
        _from(uri, convert=lambda keys, _: {"q": keys["m.q"], "whole": keys["m.whole"]})
    with pytest.raises(CoverageError, match=r"k: .* is \[5, 4\], the checkpoint's \[4, 4\], of m.k \[4, 4\]\. "):
        loader.load({**state, "k": torch.zeros(5, 4)}, uri, strip_prefix="m.")
    del state["q"]
    report = loader.load({**state, "tied": torch.zeros(4, 4)}, uri, strip_prefix="m.", ignore=["m.q", "m.k"])
    assert report.needed_bytes == 4 * 4 * 4 + 2 * 4  # of the ignored tensor's own rows nothing


def _refuse(uri: str, options: Mapping[str, Any]) -> tuple[str, str]:
    try:
        loader.load({"w": torch.zeros(2)}, uri, storage_options=options)
    except CatalogError as error:
        return type(error).__name__, error.message
    return "", ""


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch run-by-the-pickle",)


def test_a_hostile_pickle_is_refused_alike_on_every_rank_and_does_not_run(s3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.zeros(2), "x": Hostile()}, tmp_path / ONE)
    told = run_ranks(2, _refuse, s3.put(tmp_path), s3.storage_options)
    assert told[0] == told[1]
    assert told[0][0] == "CatalogError"
    assert "pytorch_model.bin: its pickle wants to import 'posix.system'" in told[0][1]
    assert not (tmp_path / "run-by-the-pickle").exists()


# ---------------------------------------------------------------- real models


@pytest.fixture(scope="module")
def minilm_bin(tmp_path_factory):
    """The real MiniLM with its weights as transformers 4 saved them: `.bin`."""
    directory = tmp_path_factory.mktemp("minilm")
    shutil.copy(minilm_dir() / "config.json", directory)
    model = transformers.AutoModel.from_pretrained(minilm_dir())
    torch.save(model.state_dict(), directory / ONE)
    return directory


def _command(arguments: Sequence[str]) -> int:
    from loader.init_from_hf import main

    return main(arguments)


def test_the_real_minilm_gives_the_same_embedding(s3, tmp_path, minilm_bin):
    (tmp_path / "cfg.yaml").write_text(
        f"source: {{uri: '{s3.put(minilm_bin)}'}}\nmesh: {{dp_shard: 2}}\nreport: null\n"
        "output: {entrypoint: 'tests.programs:embed'}\n"
    )
    assert run_ranks(2, _command, ["--config", str(tmp_path / "cfg.yaml")], init=False, env=s3.environment) == [0, 0]


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_that_was_saved_sharded(s3, tmp_path, tied):
    """With tensors that are tied in the model and saved under both names."""
    directory = tiny_llama(tmp_path / "llama", tied=tied, dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    save_sharded(directory, model.state_dict(), 3)
    (tmp_path / "cfg.yaml").write_text(
        f"source: {{uri: '{s3.put(directory)}'}}\nmesh: {{dp_shard: 2, tp: 2}}\nreport: null\n"
        "output: {entrypoint: 'tests.programs:logits'}\n"
    )
    model.save_pretrained(tmp_path / "expected")
    env = {**s3.environment, "LLAMA": str(tmp_path / "expected")}
    assert run_ranks(4, _command, ["--config", str(tmp_path / "cfg.yaml")], init=False, env=env) == [0] * 4
