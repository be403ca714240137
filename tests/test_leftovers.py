"""What the init step left on a node and no trainer took over. (tests/launch has it at the end of a job.)"""

import subprocess
import sys

import pytest

from loader.leftovers import main
from tests.processes import ROOT

SHARDS = ("rank-0.bin", "rank-0.json", "config.json")


@pytest.mark.parametrize("last", [["complete.json"], [".incomplete"], []], ids=["complete", "begun", "damaged"])
def test_our_files_are_removed_and_others_stay(tmp_path, last):
    for name in [*SHARDS, *last, "theirs.txt"]:
        (tmp_path / name).touch()
    assert main([str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.txt"]


def test_a_directory_of_ours_goes_and_one_of_others_is_left_alone(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for directory in (ours, theirs):
        directory.mkdir()
        (directory / "config.json").touch()
    (ours / "complete.json").touch()
    assert [main([str(path)]) for path in (ours, theirs, tmp_path / "nothing")] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    assert (theirs / "config.json").exists()


def test_what_cannot_be_removed_is_told(tmp_path):
    (tmp_path / "complete.json").touch()
    (tmp_path / ".incomplete").mkdir()  # where a file of ours should be
    command = [sys.executable, "-m", "loader.leftovers", str(tmp_path)]
    ended = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"ConfigError: output.local: {tmp_path} cannot be used: ")
