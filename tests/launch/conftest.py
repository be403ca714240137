"""A checkpoint, a config, and the files that are made of it with the command as people run it."""

import os
import shutil
import sys
import uuid
from pathlib import Path

import pytest

from launch.make import main
from tests.checkpoints import tiny_llama
from tests.processes import python_path

CONFIG = """\
# Without a model: a state dict, some of it sharded, some replicated.
source: {uri: none}
model: {builder: null, device: cpu}
mesh: {dp_shard: -1}
placements:
  - {match: "*proj.weight", shard: {dp_shard: 0}}
read: {memory_budget: 64MiB}
report: null
"""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("checkpoint"), files=1)


@pytest.fixture
def environ(s3):
    """The environment of someone who is to start what was made: torchrun on the PATH, access to the bucket."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    of_torch = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return {**os.environ, **s3.environment, **of_torch, "PATH": path, "PYTHONPATH": python_path()}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "given.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def make(config, tmp_path, capsys):
    """`make(form, *arguments)`: the paths that the command made."""

    def make(form, *arguments):
        code = main([form, "--config", str(config), "--out", str(tmp_path / "job"), *arguments])
        told = capsys.readouterr()
        assert code == 0, told.err
        return [Path(line) for line in told.out.splitlines()]

    return make


@pytest.fixture
def refused(config, tmp_path, capsys):
    """`refused(form, *arguments)`: what the command says to what it refuses."""

    def refused(form, *arguments):
        try:
            code = main([form, "--config", str(config), "--out", str(tmp_path / "job"), *arguments])
        except SystemExit as ended:  # argparse's
            code = ended.code
        assert code == 2
        assert not (tmp_path / "job").exists()
        return capsys.readouterr().err

    return refused


@pytest.fixture
def train(tmp_path, checkpoint):
    """`train(uri)`: arguments for a load from `uri`, and a command after it that reads what the load left."""
    script, dcp = Path(__file__).with_name("train.py"), tmp_path / "dcp"
    command = " ".join(map(str, ["torchrun", script, dcp, checkpoint, tmp_path]))
    return lambda uri: ["--train", command, f"source.uri={uri}", f"output.checkpoint={dcp}"]


@pytest.fixture
def in_memory():
    """A directory in memory that is not there, nor afterwards."""
    directory = Path("/dev/shm", f"launch-{uuid.uuid4().hex}")
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def die(tmp_path, in_memory):
    """`die(uri)`: arguments for a load into memory, and a command after it that lists it and ends with 7."""
    script = tmp_path / "die.sh"
    script.write_text(f"ls {in_memory} > {tmp_path}/listed\nexit 7\n")
    return lambda uri: ["--train", f"bash {script}", f"source.uri={uri}", f"output.local={in_memory}"]


@pytest.fixture
def trained(tmp_path):
    """`trained()`: what each rank of that command found wrong, by the rank, and its node and its rank there."""

    def trained():
        told = [path.read_text().split(" ", 3) for path in sorted(tmp_path.glob("trained-*"))]
        return {tuple(map(int, place)): wrong for *place, wrong in told}

    return trained
