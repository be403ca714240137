"""Whatever a load comes to, on whichever back end: nothing that it tells, writes or sends holds a secret."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import loader
from loader.errors import LoaderError
from loader.exchange.watch import Watch
from loader.init_from_hf import main
from tests.checkpoints import random_checkpoint
from tests.hub import hub_server
from tests.misbehaving import Misbehaving, expired, from_then_on, reset, status
from tests.proxy import CountingProxy
from tests.ranks import run_ranks
from tests.servers import http_server

RANKS = 2
SECRET = "word-that-nobody-may-read"
TENSORS = {"weight": (torch.bfloat16, (256, 384))}
FAULTS = {
    "good": lambda _: None,
    "fails": from_then_on(0, 0, status(500)),
    "resets": from_then_on(0, 0, reset),
    "refused": from_then_on(0, 0, expired),
}
LOADS = [*FAULTS, "nowhere"]


class Recorder:
    """A store of torch.distributed's, and what is set there."""

    def __init__(self, store: Any, sent: list[str]) -> None:
        self._store = store
        self._sent = sent

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)

        def call(*args: Any) -> Any:
            self._sent += [each.decode(errors="replace") if isinstance(each, bytes) else str(each) for each in args]
            return found(*args)

        return call


def _load_all(uris: dict[str, str], options: dict[str, Any], backend: str) -> dict[str, tuple[str, str]]:
    """For each load how it ended, and all that it told and sent here."""
    logging.basicConfig(level=logging.DEBUG)  # of a trainer that looks for something else
    sent: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        made = Watch.__init__

        def recorded(self: Watch, store: Any, rank: int, world_size: int) -> None:
            made(self, store, rank, world_size)
            self._store, self._own_store = Recorder(self._store, sent), Recorder(self._own_store, sent)

        patch.setattr(Watch, "__init__", recorded)
        ends = {}
        for name, uri in uris.items():
            if options.get("token") == "of google":
                from google.oauth2.credentials import Credentials

                options = {**options, "token": Credentials(SECRET)}
            target = {key: torch.zeros(shape, dtype=dtype) for key, (dtype, shape) in TENSORS.items()}
            sent.clear()
            try:
                report = loader.load(
                    target, uri, storage_options=options, range_size="64KiB", retries=1, backend=backend
                )
                end, told = "loaded", f"{report.table()}{report.to_json()}{report}"
            except LoaderError as error:
                end, told = type(error).__name__, "".join(traceback.format_exception(error))
            assert sent
            ends[name] = (end, "\n".join([told, *sent]))
        dist.barrier()
    return ends


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the loads are, with what secrets they are read, and what says that they came to the server."""

    uris: dict[str, str]
    options: dict[str, Any]
    secrets: list[str]
    env: dict[str, str] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize("backend", ["auto", "fsspec"])
@pytest.mark.parametrize("scheme", ["s3", "gs", "https"])
def test_no_secret_is_told_written_or_sent(request, tmp_path, scheme, backend):
    for name in FAULTS:
        random_checkpoint(tmp_path / name, TENSORS)
    if scheme == "https":
        with http_server(tmp_path) as url:
            headers = {"headers": {"Authorization": f"Bearer {SECRET}"}}
            signed = f"X-Amz-Signature={SECRET}"
            _judge(url, lambda at: Place({name: f"{at}/{name}?{signed}" for name in LOADS}, headers, [SECRET]), backend)
        return
    server = request.getfixturevalue({"s3": "s3", "gs": "gcs"}[scheme])
    uri = server.put(tmp_path)
    uris = {name: f"{uri}/{name}" for name in LOADS}

    def place(at: str) -> Place:
        if scheme == "gs":
            return Place(uris, {"endpoint_url": at, "token": "of google"}, [SECRET])
        return Place(uris, {}, [server.secret, "X-Amz-Signature="], server.at(at).environment)

    _judge(server.endpoint, place, backend)


@pytest.mark.parametrize("backend", ["direct", "fsspec"])
def test_nor_the_hubs(tmp_path, backend):
    random_checkpoint(tmp_path / "served", TENSORS)
    with hub_server(tmp_path) as hub:
        for name in FAULTS:
            hub.put(tmp_path / "served", f"org/{name}")
        hub.token = f"hf_{SECRET}"
        uris = {name: f"hf://org/{name}" for name in LOADS}
        _judge(hub.endpoint, lambda at: Place(uris, hub.at(at).storage_options, [SECRET, "Signature="]), backend)


def _command(config: str, name: str, error_file: str) -> None:
    os.environ["TORCHELASTIC_ERROR_FILE"] = error_file
    overrides = [f"report={name}.json", f"trace={name}-trace.json", f"output.checkpoint={name}-out"]
    main(["--config", config, "--verbose", *overrides])


@pytest.mark.parametrize("name", ["good", "fails"])
def test_nor_by_the_command_at_its_most_verbose_nor_in_what_it_leaves(tmp_path, monkeypatch, name):
    """A signed URL with a password in it, and a token among the options."""
    random_checkpoint(tmp_path / "served" / name, TENSORS)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    with http_server(tmp_path / "served") as url, CountingProxy(url, listeners=1) as proxy:
        proxy.on_request(Misbehaving(FAULTS))
        options = {"headers": {"X-Token": f"option-{SECRET}"}}
        uri = f"{proxy.url.replace('://', f'://me:{SECRET}@')}/{name}?signature={SECRET}"
        read = {"retries": 1, "range_size": "64KiB", "memory_budget": "32MiB"}
        config = {"source": {"uri": uri, "storage_options": options}, "model": {"builder": None}, "read": read}
        (tmp_path / "cfg.yaml").write_text(json.dumps(config))
        arguments = (str(tmp_path / "cfg.yaml"), name, str(work / "error.json"))
        [outcome] = run_ranks(1, _command, *arguments, init=False, outcomes=True)
        asked = "\n".join(f"{each.target} {each.headers}" for each in proxy.requests)
    assert f"signature={SECRET}" in asked
    assert f"option-{SECRET}" in asked
    left = {path.name: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    if name == "good":
        assert {"good.json", "good-trace.json", ".metadata"} <= left.keys(), outcome
    else:
        assert "exit code 1" in outcome.report
        assert {"fails-trace.json", "error.json"} <= left.keys()
    assert "open: " in outcome.output, "it is verbose"
    for found, data in {**left, "the output": outcome.output.encode()}.items():
        assert SECRET.encode() not in data, found


def _judge(target: str, place: Callable[[str], Place], backend: str) -> None:
    with CountingProxy(target, listeners=RANKS) as proxy:
        proxy.on_request(Misbehaving(FAULTS))
        found = place(proxy.url)
        outcomes = run_ranks(RANKS, _load_all, found.uris, found.options, backend, env=found.env, outcomes=True)
        asked = "\n".join(f"{each.target} {each.headers}" for each in proxy.requests)
    assert SECRET in asked or "Signature=" in asked, "the secrets were used"
    for outcome in outcomes:
        assert outcome.report == "", outcome.report + outcome.output
        ends = {name: end for name, (end, _) in outcome.value.items()}
        assert ends["good"] == "loaded", outcome.value["good"][1]
        assert ends["nowhere"] == "CatalogError"
        if "hf" not in found.uris["good"][:2]:  # the hub's files have other paths
            assert {ends["fails"], ends["resets"], ends["refused"]} == {"StoreError"}
        for secret in found.secrets:
            assert secret not in outcome.output
            for name, (_, said) in outcome.value.items():
                assert secret not in said, f"{name}: {said[max(0, said.index(secret) - 300) :][:600]}"
