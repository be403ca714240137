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

from tests.benchmarks.frameworks import ALL, REMEDY, not_run
from tests.benchmarks.hosts.bench import FILES
from tests.hosts.sealed import CANNOT, why_not
from tests.processes import ROOT

COMMAND = [sys.executable, "tests/benchmarks/lab.py", "--scenario=hsdp2", "--size=8MiB", "--repeats=1", "--contenders"]
REASON = why_not()


def leftovers():
    """The machine's links, named namespaces, and the temporary files of a lab and its server."""
    links = set(psutil.net_if_addrs())
    named = set(Path("/run/netns").glob("*"))
    return links, named, {path for where in ("/tmp", "/dev/shm") for path in Path(where).glob("lab-*")}


def run(*args, **environ):
    environ = {**os.environ, **environ}
    return subprocess.run([*COMMAND, *args], check=False, cwd=ROOT, capture_output=True, text=True, env=environ)


def rows(ended):
    """The table: contenders' names, and what stands beside them."""
    assert ended.returncode == 0, ended.stdout + ended.stderr
    _, _, table = ended.stdout.partition("\ncontender ")
    named = [(line[:32].strip(), line[32:].split()) for line in table.splitlines()[1:]]
    return {name: [float(word) for word in words] for name, words in named if name in ALL}


def has_torchrun(processes):
    with contextlib.suppress(psutil.Error):
        return any("torch.distributed.run" in each.cmdline() for each in processes)
    return False


def said_why_not(output, returncode):
    """Where no namespaces can be made, that is what the lab says, in one line."""
    assert output == f"the lab cannot make its hosts here: {REASON}\n"
    assert "\n" not in REASON
    assert returncode == CANNOT


def test_two_hosts_share_what_they_read_over_their_own_links_and_nothing_is_left(tmp_path):
    # Whatever is installed, one contender lacks its package here.
    (tmp_path / "sitecustomize.py").write_text("import sys\n\nsys.modules['obstore'] = None\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    before = leftovers()
    ended = run("obstore, own slices", "loader, share=world", "loader, share=none", PYTHONPATH=path)
    assert leftovers() == before
    if REASON:
        said_why_not(ended.stdout, ended.returncode)
        return
    served, between = ({name: row[column] for name, row in rows(ended).items()} for column in (0, -1))
    near = functools.partial(pytest.approx, abs=0.2)  # 64 KiB of each of 5 files are its header, or read early
    assert served == {"loader, share=world": near(1), "loader, share=none": near(2)}
    assert between == {"loader, share=world": near(1), "loader, share=none": near(0)}
    told = f"obstore, own slices: not run, for there is no package obstore: {REMEDY}"
    assert told in ended.stdout.splitlines()


@pytest.mark.timeout(600)  # torchrun and ten loads, one after the other: a minute of two cores
def test_every_contender_lands_every_bit_or_is_told_to_lack_its_package():
    before = leftovers()
    ended = run(*ALL, "--bucket=2000", "--peers=2000")
    assert leftovers() == before
    if REASON:
        said_why_not(ended.stdout, ended.returncode)
        return
    found, lacking = rows(ended), {name: not_run(name) for name in ALL if not_run(name)}
    assert found.keys() == ALL.keys() - lacking.keys(), ended.stdout + ended.stderr
    assert {*lacking.values()} <= {*ended.stdout.splitlines()}
    for name, (served, gets, *_, compared, _) in found.items():
        copies = 1 if name in {"loader, share=world", "Run:ai, distributed"} else 2
        assert copies <= served < copies + 0.5, name  # headers, and what a slow machine has asked for twice
        assert gets >= FILES, name
        assert compared == 2, name  # each host's copy


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
    ended = run("loader, share=world", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert ended.stdout == "the lab cannot make its hosts here: unshare: unshare failed: Operation not permitted\n"
    assert ended.returncode == CANNOT
