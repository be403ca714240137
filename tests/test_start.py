"""The start of a load: what every rank needs before its first range is made ready while rank 0 reads the catalog."""

from __future__ import annotations

import time

import pytest
import torch

import loader
from tests.checkpoints import random_checkpoint
from tests.proxy import CountingProxy, Reply
from tests.ranks import run_ranks

SHAPE = (256, 512)


def load(uri, options):
    state = {"weight": torch.zeros(SHAPE)}
    loader.load(state, uri, storage_options=options[torch.distributed.get_rank()], range_size="64KiB", timeout="90s")
    return state["weight"].view(torch.uint8).sum(dtype=torch.int64).item()


@pytest.mark.parametrize("fails", [False, True])
def test_ranks_sign_before_the_catalog_is_there(s3, tmp_path, fails):
    """Rank 0's header is held until rank 1 has asked for the bucket's region, which signing takes; or 60 s. Where that
    fails, the first range asks again."""
    random_checkpoint(tmp_path, {"weight": (torch.float32, SHAPE)})
    asked, held = [], []

    def hold(request, forward):
        if request.rank == 1 and request.method == "HEAD":
            asked.append(request)
            if fails and len(asked) == 1:
                return Reply(503, [("Content-Length", "0")])
        if request.rank == 0 and request.range and not held:
            until = time.monotonic() + 60
            while not asked and time.monotonic() < until:
                time.sleep(0.01)
            held.append(len(asked))
        return forward(request)

    with CountingProxy(s3.endpoint, listeners=2) as proxy:
        proxy.on_request(hold)
        options = [s3.at(proxy.url_for(rank)).storage_options for rank in range(2)]
        found = run_ranks(2, load, s3.put(tmp_path), options)
    assert held == [1]
    assert len(asked) == 1 + fails
    assert found[0] == found[1] > 0
