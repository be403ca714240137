"""Every layout of a source on every scheme; and that a rank opens no file in which it does not read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import loader
from loader.errors import CatalogError
from tests.checkpoints import random_checkpoint
from tests.hub import hub_server
from tests.proxy import CountingProxy
from tests.ranks import run_ranks
from tests.servers import http_server
from tests.shards import blank, differences, shard

TENSORS = {f"layers.{n}.weight": (torch.bfloat16, (17 + n, 9)) for n in range(6)}
LAYOUTS = {
    "an index": {"files": 3},
    "one file": {"files": 1},
    "files without an index": {"files": 3, "index": False},
}
ONE = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in LAYOUTS}
    for name, directory in made.items():
        random_checkpoint(directory, TENSORS, **LAYOUTS[name])
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, torch.Tensor]:
    return random_checkpoint(tmp_path_factory.mktemp("whole"), TENSORS)


def _load(uris: Sequence[str], options: Mapping[str, Any], whole: Mapping[str, torch.Tensor]) -> list[str]:
    """The URIs from which any shard came out wrong. One that names a file holds every third key."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    wrong = []
    for uri in uris:
        keys = list(whole)[1::3] if uri.endswith(ONE) else list(whole)
        expected = {key: shard(whole[key], mesh, [Shard(0)]) for key in keys}
        state = {key: blank(tensor) for key, tensor in expected.items()}
        report = loader.load(state, uri, storage_options=options)
        if differences(state, expected) or report.source.uri != uri:
            wrong.append(uri)
    return wrong


@pytest.mark.parametrize("scheme", ["s3", "gs", "file"])
def test_every_layout_on_a_scheme_that_lists(request, directories, whole, scheme):
    if scheme == "file":
        uris, options = [f"file://{directory}" for directory in directories.values()], {}
        uris.append(str(directories["one file"]))
    else:
        server = request.getfixturevalue({"s3": "s3", "gs": "gcs"}[scheme])
        uris, options = [server.put(directory) for directory in directories.values()], server.storage_options
    uris.append(f"{uris[0]}/{ONE}")
    assert run_ranks(2, _load, uris, options, whole) == [[], []]


def test_every_layout_on_the_hub(directories, whole, tmp_path):
    with hub_server(tmp_path) as hub:
        hub.token = "hf_that-nobody-may-read"
        uris = [f"hf://org/{n}@{hub.put(directory, f'org/{n}')}" for n, directory in enumerate(directories.values())]
        uris.append(f"{uris[0]}/{ONE}")
        assert run_ranks(2, _load, uris, hub.storage_options, whole) == [[], []]


def test_a_web_server_cannot_list_and_need_not(directories, whole):
    with http_server(directories["an index"].parent) as url:
        uris = [f"{url}/{directories[name].name}" for name in ("an index", "one file")]
        uris.append(f"{uris[0]}/{ONE}")
        assert run_ranks(2, _load, uris, {}, whole) == [[], []]
        state = {key: tensor.clone() for key, tensor in whole.items()}
        with pytest.raises(CatalogError, match="index"):
            loader.load(state, f"{url}/{directories['files without an index'].name}")


def test_any_other_scheme_in_one_process(directories, whole):
    fs = fsspec.filesystem("memory")
    try:
        for name, directory in directories.items():
            uri = f"memory://{directory.name}"
            fs.put(f"{directory}/", f"/{directory.name}/", recursive=True)
            state = {key: torch.zeros_like(tensor) for key, tensor in whole.items()}
            assert loader.load(state, uri).source.files == LAYOUTS[name]["files"]
            assert differences(state, whole) == []
    finally:
        fs.rm("/", recursive=True)


# ---------------------------------------------------------------- who opens what


def _load_own(uri: str, options: Sequence[Mapping[str, Any]], whole: Mapping[str, torch.Tensor]) -> None:
    """Each rank holds two keys, whole, of its own."""
    rank = dist.get_rank()
    expected = dict(list(whole.items())[rank::3])
    state = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
    loader.load(state, uri, storage_options=options[rank])
    assert differences(state, expected) == []


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_rank_asks_only_for_files_in_which_it_reads(request, directories, whole, scheme):
    server = request.getfixturevalue({"s3": "s3", "gs": "gcs"}[scheme])
    uri = server.put(directories["an index"])
    with CountingProxy(server.endpoint, listeners=3) as proxy:
        options = [server.at(proxy.url_for(rank)).storage_options for rank in range(3)]
        run_ranks(3, _load_own, uri, options, whole)
        for rank in (1, 2):
            asked = {(request.method, request.path) for request in proxy.requests if request.rank == rank}
            asked.discard(("HEAD", "/loader"))  # the bucket's region
            assert len(asked) == 1
            ((method, path),) = asked
            assert method == "GET"
            assert path.endswith(f"model-{rank + 1:05}-of-00003.safetensors")
