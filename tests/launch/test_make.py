"""What launch/make.py refuses, and what it makes."""

import dataclasses
import subprocess
import sys
import sysconfig
from pathlib import Path

import jinja2
import pytest

from launch.job import Job, command_words
from launch.make import render
from loader.errors import ConfigError
from tests.processes import ROOT

JOB = Job(
    name="train",
    nodes=2,
    ranks=8,
    gpus=8,
    config="source: {uri: s3://a}\n",
    overrides=[],
    train=["torchrun"],
    in_memory=None,
    pod=None,
)
OVERRIDES = ["source.uri=s3://models/llama", "output.checkpoint=s3://models/llama-dcp"]
ONE = ["--ranks-per-node=1", *OVERRIDES]
POD = [*ONE, "--image=loader", "--memory-gib=64"]


@pytest.mark.parametrize(
    ("form", "arguments", "words"),
    [
        ("slurm", OVERRIDES, "--ranks-per-node"),
        ("slurm", ["--ranks-per-node=0", *OVERRIDES], "should be 1 or more, found 0"),
        ("slurm", [*ONE, "--name=A job"], "should be of a-z, 0-9 and '-', with a letter first, found 'A job'"),
        ("slurm", [*ONE, "mesh.dp_shard=4"], "start 4 ranks, or set mesh.dp_shard=1"),
        ("slurm", [*ONE, "--nodes=3", "mesh={dp_shard: -1, tp: 2}"], "start 2 or 4 ranks, or set mesh.tp=1"),
        ("slurm", [*ONE, "reed.share=node"], "read"),
        ("slurm", ["--ranks-per-node=1", OVERRIDES[0]], "give --train, or set output.entrypoint or output.checkpoint"),
        (
            "slurm",
            ["--ranks-per-node=1", OVERRIDES[0], "--train=torchrun t.py"],
            "set output.local or",
        ),
        (
            "slurm",
            ["--ranks-per-node=1", OVERRIDES[0], "output.local=/dev/shm/init"],
            "nobody would take output.local over: give --train",
        ),
        ("slurm", [*ONE, "--train="], "--train: is empty"),
        ("slurm", [*ONE, "--train=torchrun 'a.py"], "--train: cannot be split into words: no closing quotation"),
        ("slurm", [*ONE, "--train=A=1 torchrun a.py"], 'write "env A=1 torchrun a.py"'),
        ("slurm", [*ONE, "--train=cd x && torchrun a.py"], 'put it into a script and name that, as in "bash train.sh"'),
        ("slurm", [*ONE, "--image=loader"], "--image: is for kubernetes alone, found with slurm: leave it out"),
        ("laptop", [*ONE, "--shm-gib=1"], "--shm-gib: is for kubernetes alone"),
        ("slurm", [*ONE, "--gpus-per-node=-1"], "should be a whole number, found '-1'"),
        ("laptop", [*ONE, "--gpus-per-node=1"], "nobody gives GPUs out on a laptop"),
        ("laptop", [*ONE, "--nodes=2"], "a laptop is one node, found 2"),
        ("kubernetes", ONE, "--image: is missing"),
        ("kubernetes", [*ONE, "--image=loader"], "--memory-gib: is missing"),
        ("kubernetes", [*POD, "--shm-gib=64"], "less than all of it, found 64 of 64 GiB"),
        ("kubernetes", [*POD, f"--name={'a' * 60}"], "12 characters too long"),
        ("kubernetes", [*POD, "output.checkpoint=/data/dcp"], "output.checkpoint: /data/dcp would be in the file"),
        ("kubernetes", [*POD, "output.local=/var/init"], "output.local: /var/init would be in the file"),
        ("kubernetes", [*POD, "source.storage_options={key: me, secret: hush-hush}"], "--secret"),
        ("laptop", [*ONE, "source.uri=https://me:hush-hush@host/model"], "source: holds credentials"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(form, arguments, words, refused):
    said = refused(form, *arguments)
    assert words in said
    assert "hush" not in said


def test_a_file_that_someone_may_have_changed_is_kept(make, refused, tmp_path):
    script, _ = make("slurm", *ONE)
    script.write_text("changed")
    with pytest.raises(AssertionError, match=r"job\.sbatch is there already: remove it, or name another directory"):
        make("slurm", *ONE)
    assert script.read_text() == "changed"


def test_an_out_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be written: Not a directory" in refused("slurm", *ONE, "--out", str(tmp_path / "file/job"))


def test_a_config_goes_along_as_it_is(make, config):
    assert make("laptop", *ONE)[1].read_text() == config.read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--train=torchrun 'a train.py' --steps 10"],
        ["--train=torchrun train.py", "output.local=/dev/shm/it's here"],
        ["output.entrypoint=train:main"],
    ],
)
@pytest.mark.parametrize("form", ["laptop", "slurm"])
def test_shellcheck_has_nothing_to_say(form, arguments, make):
    script, _ = make(form, *ONE, *arguments)
    shellcheck = Path(sysconfig.get_path("scripts"), "shellcheck")
    ended = subprocess.run([shellcheck, "--shell=bash", script], check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize(
    ("directory", "removed"),
    [("/dev/shm/init", True), ("/dev/shm", False), ("/dev/shm/../../data", False), ("/data/init", False)],
)
@pytest.mark.parametrize("form", ["laptop", "slurm"])
def test_shards_in_memory_do_not_outlive_the_job(form, directory, removed, make):
    script, _ = make(form, *ONE, "--train=torchrun train.py", f"output.local={directory}")
    assert (f"python -m loader.leftovers {directory} " in script.read_text()) == removed


def test_words_stay_words():
    text = render("run.sh", dataclasses.replace(JOB, train=command_words("""a "b c" 'd"e' *""")), "/a dir/cfg.yaml")
    assert "\nstep a 'b c' 'd\"e' '*'\n" in text
    assert "--config '/a dir/cfg.yaml'\n" in text


@pytest.mark.parametrize("command", ["a; b", "a | b", "a > b", "a & b", "a `b`", "a $(b)", "a $B", "a\nb '\n'"])
def test_what_only_a_shell_understands_is_refused(command):
    with pytest.raises(ConfigError, match="--train: should be one plain command"):
        command_words(command)


def test_a_template_that_asks_for_what_there_is_not_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="has no attribute 'secret'"):
        render("jobset.yaml", dataclasses.replace(JOB, pod={}), "cfg.yaml")


def test_it_runs_from_the_command_line(config, tmp_path):
    command = [sys.executable, "-m", "launch.make", "slurm", "--config", config, "--out", tmp_path / "job", *ONE]
    ended = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.splitlines() == [f"{tmp_path}/job/job.sbatch", f"{tmp_path}/job/cfg.yaml"], ended.stderr
