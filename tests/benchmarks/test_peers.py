import subprocess
import sys

import pytest

from tests.processes import ROOT

FLOOR = "http.client, reused buffers"


def test_every_contender_lands_every_bit_and_sharing_reads_each_byte_once():
    command = [sys.executable, "tests/benchmarks/peers.py", "--size=8MiB", "--repeats=1", "--ranks=2", "--mesh=hsdp"]
    table = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    told = [line.split() for line in table.splitlines() if line.startswith("hsdp")]
    sent = {" ".join(words[1:-7]): float(words[-7]) for words in told}
    always = ["loader, share=world", "loader, share=none", "s3fs, own slices", "s3fs get, dcp.load", FLOOR]
    assert {name: sent[name] for name in always} == {
        "loader, share=world": pytest.approx(1, abs=0.2),  # 64 KiB of each file are its header, or read early
        "loader, share=none": pytest.approx(2, abs=0.2),
        "s3fs, own slices": pytest.approx(2, abs=0.01),
        "s3fs get, dcp.load": pytest.approx(1, abs=0.01),
        FLOOR: 1,
    }
