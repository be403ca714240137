import subprocess
import sys

from tests.processes import ROOT


def test_each_proof_is_measured_beside_a_load_without_one():
    command = [sys.executable, "tests/benchmarks/proofs.py", "--size=8MiB", "--repeats=1", "--ranks=2"]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()[1:]
    assert [line.split()[0] for line in told] == ["null", "fingerprint", "checksum"]
    assert all(float(line.split()[1]) > 0 for line in told)
