import contextlib
import time

import psutil
import pytest

from tests.processes import seconds_to_end
from tests.torchrun import TWO_HOSTS, torchrun

SCRIPT = """
import os, sys
import torch.distributed as dist
dist.init_process_group("gloo")
seen = [None] * dist.get_world_size()
dist.all_gather_object(seen, os.environ["GROUP_RANK"])
if dist.get_rank() == 0:
    print("groups", "".join(sorted(seen)), *sys.argv[1:])
dist.destroy_process_group()
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_torchrun_over_two_agents(script):
    finished = torchrun(1, [script, "argument"], hosts=TWO_HOSTS)
    assert finished.returncode == 0, finished.stderr
    assert "groups 01 argument" in finished.stdout


def test_torchrun_tells_the_exit_codes_of_ranks(script):
    finished = torchrun(2, [script], env={"CODE": "2"})
    assert finished.returncode == 1
    assert set(finished.exit_codes) <= {0, 1}
    assert 2 in finished.exit_codes.values()


def test_torchrun_that_hangs_is_killed_with_its_workers(tmp_path):
    hang = tmp_path / "hang.py"
    there = tmp_path / "there"
    hang.write_text(
        f"import os, threading\nprint('pid', os.getpid(), flush=True)\nopen({str(there)!r}, 'w')\n"
        "threading.Event().wait()\n"
    )

    def until_it_hangs(_: object) -> None:
        while not there.exists():
            time.sleep(0.05)

    with pytest.raises(TimeoutError, match=r"(?s)pid \d+.*hang.py") as raised:
        torchrun(1, [hang], timeout=1, meanwhile=until_it_hangs)
    pid = int(str(raised.value).split("pid ")[1].split()[0])
    with contextlib.suppress(psutil.NoSuchProcess):  # else it ends, or has ended, and nobody has looked yet
        seconds_to_end([psutil.Process(pid)], time.monotonic())
