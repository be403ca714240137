"""The batch script that launch/make.py writes, under a real Slurm of two nodes."""

import time

import pytest

from tests.slurm import slurm

pytestmark = pytest.mark.timeout(600)  # the waits in here end sooner, with the job's log
TWO_BY_TWO = ("slurm", "--nodes=2", "--ranks-per-node=2", "--gpus-per-node=0")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("slurm"), nodes=2) as one:
        yield one


def test_init_step_then_training_in_one_allocation(cluster, checkpoint, s3, environ, make, train, trained, tmp_path):
    script, _ = make(*TWO_BY_TWO, *train(s3.put(checkpoint)))
    job = cluster.submit(script, cwd=tmp_path, env=environ)
    code, log = cluster.code(job), (tmp_path / "job.log").read_text()
    assert code == 0, log
    assert "over dp_shard 4 (4 ranks)" in log
    assert trained() == {(0, 0, 0): "[]", (1, 0, 1): "[]", (2, 1, 0): "[]", (3, 1, 1): "[]"}


def test_after_an_init_step_that_failed_no_training_starts(cluster, s3, environ, make, train, tmp_path):
    script, _ = make(*TWO_BY_TWO, *train(f"{s3.prefix()}/nothing"))
    job = cluster.submit(script, cwd=tmp_path, env=environ)
    code, log = cluster.code(job), (tmp_path / "job.log").read_text()
    assert code == 1, log  # torchrun's
    for rank in range(4):  # none was stopped before it told
        assert f"rank {rank}: CatalogError: " in log
    assert not (tmp_path / "started").exists()


def test_shards_that_no_trainer_took_over_do_not_stay_in_memory(
    cluster, checkpoint, s3, environ, make, die, in_memory, tmp_path
):
    script, _ = make("slurm", "--nodes=2", "--ranks-per-node=1", "--gpus-per-node=0", *die(s3.put(checkpoint)))
    code = cluster.code(cluster.submit(script, cwd=tmp_path, env=environ))
    assert code == 7, (tmp_path / "job.log").read_text()
    assert "complete.json" in (tmp_path / "listed").read_text()
    assert not in_memory.exists()


def test_after_sigterm_every_rank_has_time(cluster, checkpoint, s3, environ, make, tmp_path):
    """As `--signal` has Slurm send it before the time is up: to the ranks, of which one node's end first."""
    entrypoint = "output.entrypoint=tests.launch.entrypoints:until_sigterm"
    script, _ = make(*TWO_BY_TWO, f"source.uri={s3.put(checkpoint)}", entrypoint)
    job = cluster.submit(script, cwd=tmp_path, env=environ)
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob("waiting-*"))) < 4:
        assert time.monotonic() < deadline, (tmp_path / "job.log").read_text()
        time.sleep(0.1)
    cluster.tell("scancel", "--signal=TERM", job)
    code, log = cluster.code(job), (tmp_path / "job.log").read_text()
    assert len(list(tmp_path.glob("saved-*"))) == 4, log
    assert code == 1, log  # torchrun's
