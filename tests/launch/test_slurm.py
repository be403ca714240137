"""The batch script that launch/make.py writes, under a real Slurm of two nodes."""

import ast
import signal
import sys
import time
from pathlib import Path

import pytest

from launch.make import main
from tests.checkpoints import tiny_llama
from tests.processes import python_path
from tests.slurm import slurm

TRAIN = Path(__file__).with_name("train.py")

CONFIG = """
source: {uri: none}
model: {builder: null, device: cpu}
mesh: {dp_shard: -1}
placements:
  - {match: "*proj.weight", shard: {dp_shard: 0}}
output: {checkpoint: none}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("slurm"), nodes=2) as one:
        yield one


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("checkpoint"), files=1)


@pytest.fixture
def environ(s3):
    scripts = Path(sys.executable).parent  # torchrun's
    path = {"PATH": f"{scripts}:/usr/bin:/bin", "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    return {**s3.environment, **path, "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture
def make(tmp_path, checkpoint):
    def make(uri, *train):
        """The script for two nodes of two ranks, made with the command as people run it."""
        (tmp_path / "cfg.yaml").write_text(CONFIG)
        words = ["torchrun", TRAIN, tmp_path / "dcp", checkpoint, tmp_path, *train]
        made = main(
            ["slurm", "--config", str(tmp_path / "cfg.yaml"), "--nodes=2", "--ranks-per-node=2"]
            + ["--train", " ".join(map(str, words)), "--out", str(tmp_path / "job")]
            + [f"source.uri={uri}", f"output.checkpoint={tmp_path / 'dcp'}", "read.memory_budget=64MiB"]
        )
        assert made == 0
        return tmp_path / "job/job.sbatch"

    return make


def trained(directory):
    return {path.name: path.read_text() for path in directory.glob("trained-*")}


def test_the_init_step_then_training_in_one_allocation(cluster, checkpoint, s3, environ, make, tmp_path):
    job = cluster.submit(make(s3.put(checkpoint)), cwd=tmp_path, env=environ)
    code, log = cluster.code(job), (tmp_path / "job.log").read_text()
    assert code == 0, log
    assert "over dp_shard 4 (4 ranks)" in log
    told = trained(tmp_path)
    assert len(told) == 4, log
    for text in told.values():
        count, wrong, place = text.split(", ", 2)
        assert int(count.split()[0]) > 10
        assert wrong == "wrong: []"
        ranks = {name: int(value) for name, value in ast.literal_eval(place).items()}
        assert ranks["WORLD_SIZE"] == 4
        assert ranks["RANK"] == 2 * ranks["GROUP_RANK"] + ranks["LOCAL_RANK"]


def test_after_an_init_step_that_failed_no_training_starts(cluster, s3, environ, make, tmp_path):
    job = cluster.submit(make(f"{s3.prefix()}/nothing"), cwd=tmp_path, env=environ)
    code, log = cluster.code(job), (tmp_path / "job.log").read_text()
    assert code in {1, 128 + signal.SIGTERM}, log  # torchrun's own, or that of one which Slurm stopped for the first
    assert "CatalogError" in log
    assert trained(tmp_path) == {}


def test_sigterm_reaches_the_ranks_and_ends_the_job_with_their_code(cluster, checkpoint, s3, environ, make, tmp_path):
    """As `--signal` has Slurm send it before the time is up."""
    job = cluster.submit(make(s3.put(checkpoint), "--wait"), cwd=tmp_path, env=environ)
    deadline = time.monotonic() + 100
    while len(list(tmp_path.glob("waiting-*"))) < 4:
        assert time.monotonic() < deadline, (tmp_path / "job.log").read_text()
        time.sleep(0.1)
    cluster.tell("scancel", "--signal=TERM", job)
    code, log = cluster.code(job), (tmp_path / "job.log").read_text()
    print(code, log)
    assert 0
