"""docker/Dockerfile, without a Docker engine: read, and its steps run (tests/docker/image.py says how)."""

import re
import subprocess
import time

import psutil
import pytest
from dockerfile_parse import DockerfileParser

from tests.checkpoints import tiny_llama
from tests.docker.image import FILE, Image
from tests.processes import ROOT, kill_tree

CONFIG = """
source: {uri: none}
model: {builder: transformers, device: cpu}
mesh: {dp_shard: -1}
read: {memory_budget: 64MiB}
output: {entrypoint: "program:main"}
"""

PROGRAM = """
import os, signal, threading
from pathlib import Path

def main(model, mesh, report):
    Path(f"user-{os.getuid()}").touch()
    if "WAIT" not in os.environ:
        return 0
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    Path("waiting").touch()
    ended.wait(240)
    Path("saved").touch()
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("image")


@pytest.fixture(scope="module")
def image(directory):
    image = Image(directory)
    image.build()
    home = directory / "home/loader"
    (home / "cfg.yaml").write_text(CONFIG)
    (home / "program.py").write_text(PROGRAM)
    return image


@pytest.fixture(scope="module")
def uri(s3, tmp_path_factory):
    return s3.put(tiny_llama(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture
def start(image, s3):
    """Start the image with arguments of one's own, as `docker run loader …` does."""
    started = []

    def start(*arguments, **env):
        env = {**s3.environment, "GLOO_SOCKET_IFNAME": "lo", "PET_NPROC_PER_NODE": "2", **env}
        process = image.start(
            [*image.config["ENTRYPOINT"], *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        started.append(process)
        return process

    yield start
    for process in started:
        kill_tree(process.pid)
        process.communicate()


@pytest.mark.timeout(600)  # the first one builds
def test_the_health_check_passes_as_another_user_than_root(image):
    assert not image.config["USER"].startswith("0")
    health = image.start(image.config["HEALTHCHECK"], stdout=subprocess.PIPE)
    told, _ = health.communicate(timeout=240)
    assert health.returncode == 0
    assert "usage: python -m loader.init_from_hf" in told


def test_it_loads_and_ends_with_the_programs_code(start, directory, uri):
    process = start("--config", "cfg.yaml", f"source.uri={uri}")
    told, _ = process.communicate(timeout=240)
    assert process.returncode == 0, told
    assert "over dp_shard 2 (2 ranks)" in told
    assert {path.name for path in (directory / "home/loader").glob("user-*")} == {"user-10001"}
    assert (directory / "home/loader/report.json").exists()


def test_a_load_that_fails_is_told_by_the_exit_code(start, uri):
    process = start("--config", "cfg.yaml", f"source.uri={uri}/nothing")
    told, _ = process.communicate(timeout=240)
    assert process.returncode == 1, told
    assert "CatalogError" in told


def test_process_1_hands_sigterm_on(start, directory, uri):
    process = start("--config", "cfg.yaml", f"source.uri={uri}", WAIT="1", PET_NPROC_PER_NODE="1")
    home = directory / "home/loader"
    while not (home / "waiting").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    (first,) = psutil.Process(process.pid).children()  # process 1 of the namespace; its parent stands for the engine
    first.terminate()
    process.wait(240)
    assert (home / "saved").exists()


def test_the_base_is_pinned_and_the_labels_are_there(image):
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", image.config["ARG"]["BASE"])
    assert image.config["FROM"] == "${BASE}"
    names = ("title", "description", "version", "revision")
    assert {name.rpartition(".")[2] for name in image.config["LABEL"]} == set(names)
    assert image.config["CMD"] == ["--help"]


def test_nothing_goes_along_but_what_is_copied():
    steps = DockerfileParser(fileobj=FILE.open("rb"), env_replace=False).structure
    copies = [step["value"].split() for step in steps if step["instruction"] == "COPY"]
    copied = {source for *sources, _ in copies for source in sources if not sources[0].startswith("--from=")}
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    assert {line[1:] for line in lines if line.startswith("!")} == copied
