"""Credentials that rotate while a load runs: the usual chain is asked again, once on each rank."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import loader
from launch.local_s3 import SPARE_KEY, S3Server
from tests.checkpoints import random_checkpoint, same_bits
from tests.misbehaving import Get, expired
from tests.proxy import CountingProxy, Forward, Reply, Request
from tests.ranks import run_ranks

TENSORS = {f"layers.{n}.weight": (torch.bfloat16, (256, 384)) for n in range(3)}  # 9 ranges
RANKS = 2
AFTER = 4
"""GETs of weights, of all ranks together, before the keys change."""


class Keys:
    """A profile whose keys are in `directory`, as a file or from a process that logs which rank asked for them."""

    def __init__(self, directory: Path, how: str, server: S3Server) -> None:
        self.current = directory / "current"
        self.log = directory / "log"
        self.log.touch()
        self.secret = server.secret
        self.environment = {"AWS_PROFILE": "rotating", "AWS_CONFIG_FILE": str(directory / "config")}
        self.environment |= {"AWS_SHARED_CREDENTIALS_FILE": str(self.current if how == "file" else directory / "none")}
        script = directory / "keys.py"
        script.write_text(
            "import os, sys\n"
            f"open({str(self.log)!r}, 'a').write(os.environ['RANK'])\n"
            f"sys.stdout.write(open({str(self.current)!r}).read())\n"
        )
        process = f"credential_process = {sys.executable} {script}\n" if how == "process" else ""
        (directory / "config").write_text(f"[profile rotating]\nregion = us-east-1\n{process}")
        self.how = how
        self.write(server.key)

    def write(self, key: str) -> None:
        """Make `key` the current one, at once."""
        made = {"Version": 1, "AccessKeyId": key, "SecretAccessKey": self.secret}
        text = f"[rotating]\naws_access_key_id = {key}\naws_secret_access_key = {self.secret}\n"
        new = self.current.with_suffix(".new")
        new.write_text(json.dumps(made) if self.how == "process" else text)
        new.replace(self.current)


class Rotating:
    """Changes the keys at a GET of weights, and refuses the old one from then on."""

    def __init__(self, keys: Keys, old: str) -> None:
        self.keys = keys
        self.old = old
        self.gets = 0
        self.refused = 0
        self.lock = threading.Lock()

    def __call__(self, request: Request, forward: Forward) -> Reply:
        with self.lock:
            weights = request.range is not None and not request.range.startswith("bytes=0-")
            self.gets += weights
            if self.gets == AFTER and weights:
                self.keys.write(SPARE_KEY)
            refused = self.gets >= AFTER and self.old in request.target + str(request.headers.get("Authorization"))
            self.refused += refused and weights
        if not refused:
            return forward(request)
        return expired(Get(request, forward, 0, None)) if request.method == "GET" else Reply(400, [])


def _load(uri: str, urls: list[str], whole: str, backend: str) -> loader.Report:
    from safetensors.torch import load_file

    expected = load_file(whole)
    target = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
    options = {"client_kwargs": {"endpoint_url": urls[dist.get_rank()]}}
    read: dict[str, Any] = {"range_size": "64KiB", "memory_budget": "32MiB", "concurrency": 2, "share": "none"}
    report = loader.load(target, uri, storage_options=options, backend=backend, **read)
    assert all(same_bits(target[key], tensor) for key, tensor in expected.items())
    return report


@pytest.mark.parametrize("backend", ["direct", "fsspec"])
@pytest.mark.parametrize("how", ["process", "file"])
def test_a_load_goes_on_with_the_new_keys(s3, tmp_path, backend, how):
    random_checkpoint(tmp_path / "checkpoint", TENSORS)
    keys = Keys(tmp_path, how, s3)
    rotating = Rotating(keys, s3.key)
    uri = s3.put(tmp_path / "checkpoint")
    with CountingProxy(s3.endpoint, listeners=RANKS) as proxy:
        proxy.on_request(rotating)
        urls = [proxy.url_for(rank) for rank in range(RANKS)]
        whole = str(tmp_path / "checkpoint" / "model.safetensors")
        report, _ = run_ranks(RANKS, _load, uri, urls, whole, backend, env=keys.environment)
    assert 1 <= rotating.refused == report.retries <= 9 * RANKS  # no range more than once
    if how == "process":
        asked = keys.log.read_text()
        assert [asked.count(str(rank)) for rank in range(RANKS)] == [2, 2]  # as the load began, and once more
