"""The buckets that stores are tried on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.store.buckets import BACKENDS, Bucket, open_bucket


@pytest.fixture(params=BACKENDS)
def bucket(request, tmp_path) -> Iterator[Bucket]:
    """What is behind a name can change there."""
    yield from open_bucket(request, tmp_path)


@pytest.fixture(params=[*BACKENDS, "hf direct"])
def reads(request, tmp_path) -> Iterator[Bucket]:
    """Wherever ranges are read."""
    yield from open_bucket(request, tmp_path)
