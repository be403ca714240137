"""The load finds by itself how many ranges to read at once, as the server sees it."""

from __future__ import annotations

import threading
import time

import torch

import loader
from tests.checkpoints import random_checkpoint
from tests.proxy import CountingProxy

ROWS, COLUMNS = 4096, 1024
"""Of bfloat16, 8 MiB: 128 ranges of 64 KiB."""

DELAY = 0.3
"""Seconds: far above what a range costs on a busy machine, or more at once would bring nothing."""


class Waiting:
    """A hook: the bucket takes DELAY until a range's first byte. `most` waited at once; `answered` were, in the end."""

    def __init__(self) -> None:
        self.now = self.most = self.answered = 0
        self.lock = threading.Lock()

    def __call__(self, request, forward):
        if request.method != "GET" or not request.range:
            return forward(request)
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(DELAY)
        with self.lock:
            self.now -= 1
            self.answered += 1
        return forward(request)


def test_more_at_once_where_the_bucket_is_slow_to_answer(s3, tmp_path):
    random_checkpoint(tmp_path, {"weight": (torch.bfloat16, (ROWS, COLUMNS))})
    waiting = Waiting()
    with CountingProxy(s3.endpoint) as proxy:
        proxy.on_request(waiting)
        loader.load(
            {"weight": torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16)},
            s3.put(tmp_path),
            storage_options=s3.at(proxy.url).storage_options,
            concurrency=2,
            range_size="64KiB",
            memory_budget="64MiB",
        )
    assert waiting.answered >= 128
    assert waiting.most >= 8
