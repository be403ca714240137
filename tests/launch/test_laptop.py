"""The script that launch/make.py writes for one machine, run as it is."""

import subprocess
import time

import pytest

from tests.processes import kill_tree


@pytest.fixture
def start(environ, tmp_path):
    """Start a script in `tmp_path`; what it prints goes to the file `log` there."""
    with (tmp_path / "log").open("w") as log:
        started = []

        def start(script):
            process = subprocess.Popen([script], cwd=tmp_path, env=environ, stdout=log, stderr=log)
            started.append(process)
            return process

        yield start
        for process in started:
            kill_tree(process.pid)
            process.wait()


def test_the_init_step_then_training(start, checkpoint, s3, make, train, trained, tmp_path):
    script, _ = make("laptop", "--ranks-per-node=2", *train(s3.put(checkpoint)))
    assert start(script).wait(240) == 0, (tmp_path / "log").read_text()
    assert trained() == {(0, 0, 0): "[]", (1, 0, 1): "[]"}


def test_after_an_init_step_that_failed_no_training_starts(start, s3, make, train, tmp_path):
    script, _ = make("laptop", "--ranks-per-node=1", *train(f"{s3.prefix()}/nothing"))
    assert start(script).wait(240) == 1
    assert "CatalogError" in (tmp_path / "log").read_text()
    assert not (tmp_path / "started").exists()


def test_shards_that_no_trainer_took_over_do_not_stay_in_memory(start, checkpoint, s3, make, die, in_memory, tmp_path):
    script, _ = make("laptop", "--ranks-per-node=1", *die(s3.put(checkpoint)))
    assert start(script).wait(240) == 7, (tmp_path / "log").read_text()
    assert "complete.json" in (tmp_path / "listed").read_text()
    assert not in_memory.exists()


def test_sigterm_is_passed_on_and_the_end_waited_for(start, checkpoint, s3, make, tmp_path):
    entrypoint = "output.entrypoint=tests.launch.entrypoints:until_sigterm"
    script, _ = make("laptop", "--ranks-per-node=2", f"source.uri={s3.put(checkpoint)}", entrypoint)
    process = start(script)
    while len(list(tmp_path.glob("waiting-*"))) < 2:
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.1)
    process.terminate()
    assert process.wait(240) == 1, (tmp_path / "log").read_text()  # torchrun's
    assert len(list(tmp_path.glob("saved-*"))) == 2
