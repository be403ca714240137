import subprocess
import sys

import pytest

from tests.processes import ROOT


@pytest.mark.parametrize("where", ["--mesh=fsdp", "--mesh=tp --nodes=2"])
def test_the_peak_above_the_shards_stays_within_each_budget(where):
    command = [sys.executable, "tests/benchmarks/budgets.py", "--budget", "48MiB", "96MiB", "--times=2", *where.split()]
    table = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    shares = {int(words[0]): float(words[4]) for words in map(str.split, table.splitlines()[1:])}
    assert shares.keys() == {48, 96}
    assert min(shares.values()) > 0.1  # of ranges that were under way
    assert max(shares.values()) <= 1
