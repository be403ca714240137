"""What quickstart.sh needs beside the loader: a bucket with two checkpoints in it, and a look at the report."""

# ruff: noqa: INP001, T201 - launch is a folder of commands, not a package of the library, and commands print
from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

from transformers.utils import logging

from launch.local_checkpoints import minilm_dir, tiny_llama
from launch.local_s3 import s3_server


def serve(scratch: Path) -> None:
    """Serve a bucket with both checkpoints until SIGTERM or the parent's end; `scratch`/env tells how to reach it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    parent = os.getppid()
    logging.disable_progress_bar()
    with s3_server() as server:
        llama = tiny_llama(scratch / "llama", vocab_size=32000, hidden_size=512, intermediate_size=1536)
        server.put(minilm_dir(), "s3://loader/minilm")
        server.put(llama, "s3://loader/llama")
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in server.environment.items()]
        unfinished = scratch / "env.unfinished"
        unfinished.write_text("".join(lines))
        unfinished.rename(scratch / "env")
        while os.getppid() == parent:
            time.sleep(0.5)


def show(path: Path) -> None:
    """Print what a report says of the once-per-byte promise, and what each rank read."""
    report = json.loads(path.read_text())
    for name in ("mesh", "needed_bytes", "fetched_bytes", "egress_ratio", "gets", "memory", "seconds"):
        print(f"  {name}: {json.dumps(report[name])}")
    for rank in report["ranks"]:
        print(f"  rank {rank['rank']}: {rank['fetched_bytes']:,} bytes read, {rank['shard_bytes']:,} bytes of shards")


if __name__ == "__main__":
    {"serve": serve, "show": show}[sys.argv[1]](Path(sys.argv[2]))
