"""`verify: checksum` on real ranks: what the bucket says of a file is held against what all of them read of it."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import loader
from loader.errors import ConfigError, CorruptionError
from loader.ground.crc import Algorithm, crc, written
from tests.checkpoints import random_checkpoint
from tests.processes import python_path
from tests.proxy import CountingProxy, Forward, Reply, Request
from tests.ranks import run_ranks
from tests.shards import blank, differences, shard

R, ROWS, COLUMNS = Replicate(), Shard(0), Shard(1)
LAYOUTS = {1: [((1,), [R])], 2: [((2,), [COLUMNS]), ((2,), [R])], 4: [((4,), [ROWS]), ((2, 2), [R, COLUMNS])]}
TENSORS = {f"layers.{n}.weight": (torch.bfloat16, (96 + n, 384)) for n in range(4)} | {"norm": (torch.float32, (7,))}
READ = {"range_size": "64KiB", "memory_budget": "40MiB", "concurrency": 4}


def _targets(tensors: dict[str, Tensor]) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """For each layout of this world: what is to land, and where."""
    found = []
    for sizes, placements in LAYOUTS[dist.get_world_size()]:
        mesh = init_device_mesh("cpu", sizes)
        expected = {key: shard(tensor, mesh, placements) for key, tensor in tensors.items()}
        found.append((expected, {key: blank(tensor) for key, tensor in expected.items()}))
    return found


def _load(uri: str, options: dict[str, Any], tensors: dict[str, Tensor], **read: Any) -> list[loader.Report]:
    reports = []
    for expected, target in _targets(tensors):
        read = {"verify": "checksum", **READ, **read}
        reports.append(loader.load(target, uri, storage_options=options, **read))
        assert not differences(target, expected)
    return reports


def _load_with(read: dict[str, Any], *args: Any) -> list[loader.Report]:
    return _load(*args, **read)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    directory = tmp_path_factory.mktemp("checkpoint")
    return directory, random_checkpoint(directory, TENSORS, files=2)


@pytest.mark.parametrize(("ranks", "share"), [(1, "world"), (2, "none"), (4, "world"), (4, "node"), (4, "none")])
@pytest.mark.parametrize(("scheme", "algorithm"), [("s3", "CRC32"), ("gcs", "CRC32C")])
def test_every_file_is_checked_whoever_reads_what_of_it(checkpoint, request, scheme, algorithm, ranks, share):
    directory, tensors = checkpoint
    server = request.getfixturevalue(scheme)
    uri = server.put(directory)
    nodes = 2 if share == "node" else 1
    ranks = run_ranks(ranks, _load_with, {"share": share}, uri, server.storage_options, tensors, nodes=nodes)
    for report in [each for reports in ranks for each in reports]:
        assert {name: each.model_dump() for name, each in report.checksums.items()} == {
            path.name: {
                "algorithm": algorithm,
                "value": written(algorithm, crc(algorithm, path.read_bytes())),
                "checked_bytes": path.stat().st_size,
                "unchecked": None,
            }
            for path in directory.glob("*.safetensors")
        }
        assert "of all of 2 of 2 files" in report.table()
        assert json.loads(report.to_json())["checksums"] == {k: v.model_dump() for k, v in report.checksums.items()}


def _load_unevenly(uri: str, options: dict[str, Any], tensors: dict[str, Tensor]) -> loader.Report:
    """Two ranks share each tensor's rows, and the third has all of them."""
    mesh = DeviceMesh("cpu", [0, 1])
    whole = dist.get_rank() == 2
    expected = {key: tensor if whole else shard(tensor, mesh, [ROWS]) for key, tensor in tensors.items()}
    target = {key: torch.zeros_like(tensor) if whole else blank(tensor) for key, tensor in expected.items()}
    report = loader.load(target, uri, storage_options=options, verify="checksum", share="none", **READ)
    assert not differences(target, expected)
    return report


def test_ranges_that_begin_and_end_elsewhere_on_other_ranks_are_cut_alike(checkpoint, gcs):
    directory, tensors = checkpoint
    for report in run_ranks(3, _load_unevenly, gcs.put(directory), gcs.storage_options, tensors):
        assert [each.unchecked for each in report.checksums.values()] == [None, None]
        assert report.egress_ratio > 1.9


# ---------------------------------------------------------------- what S3 may answer


def _says(algorithm: Algorithm, values: dict[str, str], kind: str) -> Callable[[Request, Forward], Reply]:
    """S3's own headers, on a real server's replies to whoever asks for checksums."""

    def hook(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        name = request.path.rpartition("/")[2]
        if request.method == "HEAD" and request.headers.get("x-amz-checksum-mode") == "ENABLED" and name in values:
            reply.headers = [h for h in reply.headers if not h[0].lower().startswith("x-amz-checksum")]
            reply.headers += [(f"x-amz-checksum-{algorithm.lower()}", values[name]), ("x-amz-checksum-type", kind)]
        return reply

    return hook


def _values(directory: Path, algorithm: Algorithm, wrong: str = "") -> dict[str, str]:
    size = 8 if algorithm == "CRC64NVME" else 4
    found = {path.name: crc(algorithm, path.read_bytes()) ^ (path.name == wrong) for path in directory.iterdir()}
    return {name: base64.b64encode(value.to_bytes(size)).decode() for name, value in found.items()}


FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


@pytest.mark.parametrize("algorithm", ["CRC64NVME", "CRC32C"])
def test_s3s_other_algorithms(checkpoint, s3, algorithm):
    directory, tensors = checkpoint
    uri = s3.put(directory)
    with CountingProxy(s3.endpoint) as proxy:
        options = s3.at(proxy.url).storage_options
        proxy.on_request(_says(algorithm, _values(directory, algorithm), "FULL_OBJECT"))
        [report] = run_ranks(1, _load, uri, options, tensors)[0]
        assert [each.algorithm for each in report.checksums.values()] == [algorithm] * 2
        assert all(each.unchecked is None for each in report.checksums.values())
        proxy.on_request(_says(algorithm, _values(directory, algorithm, SECOND), "FULL_OBJECT"))
        [outcome] = run_ranks(1, _load, uri, options, tensors, outcomes=True)
    assert isinstance(outcome.error, CorruptionError)
    found = crc(algorithm, (directory / SECOND).read_bytes())
    size = (directory / SECOND).stat().st_size
    told = f"{SECOND}: its bytes 0-{size} have the checksum {algorithm} {written(algorithm, found)}, "
    assert str(outcome.error).startswith(f"{told}expected {written(algorithm, found ^ 1)}. ")


def test_a_composite_checksum_is_none_of_the_whole(checkpoint, s3):
    directory, tensors = checkpoint
    uri = s3.put(directory)
    values = _values(directory, "CRC32")
    with CountingProxy(s3.endpoint) as proxy:
        options = s3.at(proxy.url).storage_options
        proxy.on_request(_says("CRC32", {FIRST: values[FIRST]}, "COMPOSITE"))
        [report] = run_ranks(1, _load, uri, options, tensors)[0]
        assert "one of its parts' checksums does not do" in report.checksums[FIRST].unchecked
        assert (report.checksums[FIRST].algorithm, report.checksums[FIRST].checked_bytes) == (None, 0)
        assert report.checksums[SECOND].unchecked is None
        assert f"of all of 1 of 2 files; not all of {FIRST}: the bucket has no" in report.table()
        proxy.on_request(_says("CRC32", {name: f"{value}-3" for name, value in values.items()}, "FULL_OBJECT"))
        proxy.requests.clear()
        [outcome] = run_ranks(1, _load, uri, options, tensors, outcomes=True)
        assert isinstance(outcome.error, ConfigError)
        assert len({(request.path, request.range) for request in proxy.select(".safetensors")}) == 2  # the headers


def test_without_it_nothing_is_asked_or_made(checkpoint, s3):
    directory, tensors = checkpoint
    uri = s3.put(directory)
    with CountingProxy(s3.endpoint) as proxy:
        options = s3.at(proxy.url).storage_options
        [[report]] = run_ranks(1, _load_with, {"verify": None}, uri, options, tensors)
        assert not any("x-amz-checksum-mode" in request.headers for request in proxy.requests)
    assert report.checksums is None
    assert "checksums" not in json.loads(report.to_json())


# ---------------------------------------------------------------- what is not read, and what is read wrong


def test_a_file_of_which_keys_are_left_out_is_told_not_to_be_checked(checkpoint, gcs):
    directory, tensors = checkpoint
    kept = {key: tensor for key, tensor in tensors.items() if key != "layers.1.weight"}
    ignore = {"ignore": ("layers.1.*",)}
    for [report, *_] in run_ranks(2, _load_with, ignore, gcs.put(directory), gcs.storage_options, kept):
        assert report.checksums[FIRST].unchecked is None
        assert re.fullmatch(
            r"bytes \d+-\d+ are not read, which nobody needs \(key layers.1.weight\)",
            report.checksums[SECOND].unchecked,
        )
    ignore = {"ignore": ("layers.[12].*",)}
    kept.pop("layers.2.weight")
    for each in run_ranks(2, _load_with, ignore, gcs.put(directory), gcs.storage_options, kept, outcomes=True):
        assert isinstance(each.error, ConfigError)
        assert "no file that could be checked" in str(each.error)


def _flips(byte: int, *, rank: int) -> Callable[[Request, Forward], Reply]:
    """Byte `byte` of the first file has another lowest bit in all replies to `rank`."""

    def hook(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if request.method == "GET" and request.path.endswith(FIRST) and request.rank == rank and request.range:
            first, last = map(int, re.findall(r"\d+", request.range))
            if first <= byte <= last:
                body = bytearray(b"".join(map(bytes, reply.chunks)))
                body[byte - first] ^= 1
                reply.chunks = [body]
        return reply

    return hook


def test_a_bit_that_flips_for_one_of_those_who_read_the_same(checkpoint, s3):
    directory, tensors = checkpoint
    uri = s3.put(directory)
    with CountingProxy(s3.endpoint, listeners=2) as proxy:
        proxy.on_request(_flips(5000, rank=1))
        options = {name: value for name, value in s3.storage_options.items() if name != "client_kwargs"}
        outcomes = run_ranks(
            2,
            _load_at,
            [proxy.url_for(rank) for rank in range(2)],
            {"share": "none"},
            uri,
            options,
            tensors,
            outcomes=True,
        )
    for each in outcomes:
        assert isinstance(each.error, CorruptionError), each
        assert re.match(rf"{FIRST}: ranks 0 and 1 read bytes \d+-\d+ otherwise than each other", str(each.error))


def _load_at(urls: list[str], read: dict[str, Any], uri: str, options: dict[str, Any], tensors: Any) -> None:
    client = {"endpoint_url": urls[dist.get_rank()], "region_name": "us-east-1"}
    _load(uri, {**options, "client_kwargs": client}, tensors, **read)


def test_a_bit_that_flips_in_a_header_where_nothing_else_would_see_it(tmp_path, gcs):
    tensors = random_checkpoint(tmp_path, TENSORS, files=2)
    path = tmp_path / FIRST
    save_file(load_file(path), path, {"format": "pt"})
    at = path.read_bytes().index(b'"pt"') + 1
    with CountingProxy(gcs.endpoint) as proxy:
        proxy.on_request(_flips(at, rank=0))
        [outcome] = run_ranks(1, _load, gcs.put(tmp_path), gcs.at(proxy.url).storage_options, tensors, outcomes=True)
    assert isinstance(outcome.error, CorruptionError), outcome


# ---------------------------------------------------------------- .bin


@pytest.fixture
def bin_file(tmp_path) -> tuple[Path, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{n}": torch.randn(64, 50, generator=generator) for n in range(4)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    return tmp_path / "pytorch_model.bin", tensors


@pytest.mark.parametrize("share", ["world", "none"])
def test_the_records_of_a_bin_file_are_checked_wherever_it_is(bin_file, share):
    path, tensors = bin_file
    for [report, *_] in run_ranks(2, _load_with, {"share": share}, str(path.parent), {}, tensors):
        [checked] = report.checksums.values()
        assert (checked.algorithm, checked.value, checked.unchecked) == ("CRC32", None, None)
        assert 0 < checked.checked_bytes - sum(tensor.nbytes for tensor in tensors.values()) < 2000  # the pickle


@pytest.mark.parametrize("where", ["tensor", "pickle"])
def test_a_flipped_bit_in_a_bin_file_is_caught(bin_file, where):
    path, tensors = bin_file
    data = bytearray(path.read_bytes())
    needle = tensors["layers.2"].numpy().tobytes()[:64] if where == "tensor" else b"cpu"
    at = data.index(needle)
    data[at] ^= 4
    path.write_bytes(data)
    for each in run_ranks(2, _load, str(path.parent), {}, tensors, outcomes=True):
        assert isinstance(each.error, CorruptionError), each
        assert str(each.error).startswith("pytorch_model.bin: its bytes ")
        assert ("(key layers.2)" in str(each.error)) == (where == "tensor")


def test_a_bin_file_that_was_saved_without_crcs_or_in_the_older_format(bin_file):
    path, tensors = bin_file
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, path)
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(ConfigError, match=r"pytorch_model.bin: it was saved without CRCs"):
        loader.load(dict(tensors), str(path), verify="checksum")
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ConfigError, match=r"torch's older format has no checksums"):
        loader.load(dict(tensors), str(path), verify="checksum")


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("dry", [False, True])
def test_the_command_refuses_before_a_weight_is_read_what_it_cannot_check(checkpoint, tmp_path, dry):
    config = {
        "source": {"uri": str(checkpoint[0])},
        "model": {"builder": None, "device": "cpu"},
        "verify": "checksum",
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "loader.init_from_hf", "--config", "config.yaml", *["--dry-run"] * dry]
    environ = os.environ | {"PYTHONPATH": python_path()}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environ)
    assert done.returncode == 2, done.stderr
    assert "verify: checksum, but there is no file that could be checked" in done.stderr
