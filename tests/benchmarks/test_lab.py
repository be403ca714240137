import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.hosts.sealed import CANNOT, why_not
from tests.processes import ROOT

COMMAND = [sys.executable, "tests/benchmarks/lab.py", "--scenario=hsdp2", "--size=8MiB", "--repeats=1", "--contenders"]
REASON = why_not()


def leftovers():
    """The machine's links, named namespaces, and the temporary files of a lab and its server."""
    links = set(psutil.net_if_addrs())
    named = set(Path("/run/netns").glob("*"))
    return links, named, {path for where in ("/tmp", "/dev/shm") for path in Path(where).glob("lab-*")}


def run(*contenders, path=os.environ["PATH"]):
    environ = {**os.environ, "PATH": path}
    return subprocess.run([*COMMAND, *contenders], check=False, cwd=ROOT, capture_output=True, text=True, env=environ)


def has_torchrun(processes):
    with contextlib.suppress(psutil.Error):
        return any("torch.distributed.run" in each.cmdline() for each in processes)
    return False


def said_why_not(output, returncode):
    """Where no namespaces can be made, that is what the lab says, in one line."""
    assert output == f"the lab cannot make its hosts here: {REASON}\n"
    assert "\n" not in REASON
    assert returncode == CANNOT


def test_two_hosts_share_what_they_read_over_their_own_links_and_nothing_is_left():
    before = leftovers()
    ended = run("loader, share=world", "loader, share=none")
    assert leftovers() == before
    if REASON:
        said_why_not(ended.stdout, ended.returncode)
        return
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = {line[:32].strip(): line[32:].split() for line in ended.stdout.splitlines() if line.startswith("loader")}
    served, between = ({name: float(row[column]) for name, row in rows.items()} for column in (0, -1))
    near = functools.partial(pytest.approx, abs=0.2)  # 64 KiB of each of 5 files are its header, or read early
    assert served == {"loader, share=world": near(1), "loader, share=none": near(2)}
    assert between == {"loader, share=world": near(1), "loader, share=none": near(0)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_lab_that_is_ended(number):
    before = leftovers()
    command = [*COMMAND, "loader, share=world"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as lab:
        inside = []
        while lab.poll() is None and not has_torchrun(inside):
            time.sleep(0.02)
            inside = psutil.Process(lab.pid).children(recursive=True)
        lab.send_signal(number)
        output = lab.communicate(timeout=20)[0].decode()
    if REASON:
        said_why_not(output, lab.returncode)
        return
    assert inside
    assert psutil.wait_procs(inside, timeout=10)[1] == []
    assert leftovers() == before


def test_where_no_namespaces_can_be_made_it_says_so_in_a_line(tmp_path):
    unshare = tmp_path / "unshare"
    unshare.write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n")
    unshare.chmod(0o755)
    ended = run("loader, share=world", path=f"{tmp_path}:{os.environ['PATH']}")
    assert ended.stdout == "the lab cannot make its hosts here: unshare: unshare failed: Operation not permitted\n"
    assert ended.returncode == CANNOT
