"""The soak's short form."""

from __future__ import annotations

import pytest

from tests.soak import soak


@pytest.mark.timeout(300)
def test_a_few_loads_under_random_faults(tmp_path):
    assert soak(6, 1, tmp_path).total() == 6
