"""What the command says, as who started it sees it: on a terminal, in a job's log, and as JSON lines."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import random_checkpoint
from tests.misbehaving import Misbehaving, first, from_then_on, status
from tests.processes import ROOT, python_path
from tests.proxy import CountingProxy
from tests.torchrun import Finished, torchrun

TENSORS = {f"layers.{number}.weight": (torch.bfloat16, (256, 256)) for number in range(2)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    random_checkpoint(directory, TENSORS)
    (directory / "pytorch_model.bin").write_bytes(b"passed over, with a warning")
    return directory


def _arguments(directory: Path, uri: str, *more: str) -> list[str]:
    config = directory / "config.yaml"
    sections = {"source": {"uri": uri}, "model": {"builder": None}, "read": {"range_size": "64KiB", "retries": 1}}
    config.write_text(json.dumps({**sections, "report": str(directory / "report.json")}))
    return ["-m", "loader.init_from_hf", "--config", str(config), *more]


def _said(directory: Path, uri: str, *more: str, env: dict[str, str] | None = None) -> Finished:
    return torchrun(2, _arguments(directory, uri, *more), env=env)


def _json(done: Finished) -> list[dict[str, Any]]:
    """Every line of the ranks: all that torchrun itself does not say."""
    return [json.loads(line) for line in (done.stdout + done.stderr).splitlines() if line.startswith("{")]


def test_in_a_jobs_log(checkpoint, tmp_path):
    done = _said(tmp_path, str(checkpoint))
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()][:5] == [
        "loaded",
        "bucket",
        "memory",
        "seconds",
        "bound",
    ]
    progress = [line for line in done.stderr.splitlines() if line.startswith("loading")]  # also before, in a slow load
    assert [line.startswith("loading 262.1 kB of 262.1 kB  100%") for line in progress].count(True) == 1
    (warning,) = [line for line in done.stderr.splitlines() if "pytorch_model.bin" in line]
    assert " rank 0 on " in warning
    assert ": warning: " in warning


def test_quiet_says_what_is_wrong_and_nothing_else(checkpoint, tmp_path):
    done = _said(tmp_path, str(checkpoint), "--quiet")
    assert done.returncode == 0
    assert done.stdout == ""
    assert "loading" not in done.stderr
    assert "pytorch_model.bin" in done.stderr
    assert (tmp_path / "report.json").exists()
    failed = _said(tmp_path, str(tmp_path / "nowhere"), "--quiet")
    assert "rank 1: CatalogError: " in failed.stderr


def test_verbose_tells_every_step_and_retry_of_every_rank(s3, checkpoint, tmp_path):
    uri = s3.put(checkpoint)
    with CountingProxy(s3.endpoint) as proxy:
        proxy.on_request(Misbehaving({uri.rsplit("/", 1)[1]: first(1, status(503))}))
        done = _said(tmp_path, uri, "--verbose", env=s3.at(proxy.url).environment)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        mine = [line.partition(": ")[2] for line in done.stderr.splitlines() if f" rank {rank} on " in line]
        assert {"catalog", "plan", "rounds", "report"} <= {line.partition(":")[0] for line in mine}
    assert any("503" in line and "again in" in line for line in done.stderr.splitlines())
    assert s3.storage_options["secret"] not in done.stderr


def test_json_lines(checkpoint, tmp_path):
    done = _said(tmp_path, str(checkpoint), "--log-format", "json", "--verbose")
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("{") for line in done.stdout.splitlines())
    said = _json(done)
    assert all(each.keys() >= {"time", "level", "rank", "host", "message"} for each in said)
    assert {each["rank"] for each in said} == {0, 1}
    assert {each["level"] for each in said} == {"debug", "info", "warning"}
    progress = [(each["done_bytes"], each["total_bytes"]) for each in said if "done_bytes" in each]
    assert progress.count((262144, 262144)) == 1  # also before, in a slow load
    (loaded,) = [each for each in said if each["message"] == "loaded"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert {name: loaded[name] for name in ("needed_bytes", "gets", "bound_by", "memory", "seconds")} == {
        name: report[name] for name in ("needed_bytes", "gets", "bound_by", "memory", "seconds")
    }
    assert "ranks" not in loaded


def test_an_error_is_a_json_line_of_each_rank(s3, checkpoint, tmp_path):
    uri = s3.put(checkpoint)
    with CountingProxy(s3.endpoint) as proxy:
        proxy.on_request(Misbehaving({uri.rsplit("/", 1)[1]: from_then_on(0, 0, status(500))}))
        done = _said(tmp_path, uri, "--log-format=json", env=s3.at(proxy.url).environment)
    errors = [each for each in _json(done) if each["level"] == "error"]
    assert sorted(each["rank"] for each in errors) == [0, 1]
    assert all((each["error"], each["exit_code"]) == ("StoreError", 1) for each in errors)
    assert len({each["first_rank"] for each in errors}) == 1


SPEAKS = """
import logging
from loader.ground.logs import Voice
voice = Voice(as_json={as_json})
voice.start()
logging.getLogger("loader").warning("first")
voice.say("second")
voice.end("third")
"""


@pytest.mark.parametrize("as_json", [False, True])
def test_a_line_is_one_write_so_that_no_other_rank_writes_into_it(as_json):
    """Under `python -u`, as torchrun runs ranks. A datagram is what one write is."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    environ = os.environ | {"PYTHONPATH": python_path()}
    command = [sys.executable, "-u", "-c", SPEAKS.format(as_json=as_json)]
    with ours, theirs:
        subprocess.run(command, stdout=theirs, stderr=theirs, env=environ, check=True)
        for said in ("first", "second", "third"):
            line = ours.recv(4096, socket.MSG_DONTWAIT).decode()
            assert said in line
            assert line.index("\n") == len(line) - 1


def test_nothing_is_said_where_the_streams_were_closed():
    command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-c", SPEAKS.format(as_json=False)]
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": python_path()}, check=False).returncode == 0


def test_on_a_terminal_there_is_a_bar(checkpoint, tmp_path):
    ours, theirs = pty.openpty()
    environ = {name: each for name, each in os.environ.items() if name not in {"RANK", "WORLD_SIZE"}}
    environ |= {"PYTHONPATH": python_path(), "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, *_arguments(tmp_path, str(checkpoint))], stdout=theirs, stderr=theirs, env=environ, cwd=ROOT
    )
    os.close(theirs)
    shown = b""
    while chunk := _read(ours):
        shown += chunk
    assert process.wait(60) == 0
    text = shown.decode()
    assert "loading: 100%|" in text
    assert "262k/262k" in text
    assert "\r\nloaded    2 tensors" in text  # the bar is done, and the table begins on a line of its own


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux says so where the other end is closed
        return b""
