"""What `--dry-run` takes for a world of thousands of ranks: seconds and peak memory of the whole command.

    python tests/benchmarks/dry_run_scale.py [--ranks 64 512 4096] [--mesh fsdp hsdp-tp] [--layers 61]

The checkpoint is DeepSeek-V3's by shape, about 90,000 keys: real files with real headers, and holes for the weights.
`hsdp-tp` is TP 8 within FSDP over 32, replicated; `stacked` is FSDP of a conversion that stacks the experts of a layer.
"""

import argparse
import itertools
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from tests.benchmarks.plan_scale import catalogue, deepseek

ROOT = Path(__file__).parents[2]
DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
COLUMNS = ["*down_proj*", "*o_proj*"]
ROWS = ["*gate_proj*", "*up_proj*", "*_b_proj*", "lm_head*", "*embed_tokens*"]


def write(directory, layers):
    """Files that are all header: the weights are holes."""
    names, entries = catalogue(list(deepseek(layers)))
    for number, group in itertools.groupby(zip(names, entries, strict=True), key=lambda pair: pair[1].file):
        pairs = list(group)
        begin = pairs[0][1].start
        header = {
            name: {
                "dtype": DTYPES[entry.dtype],
                "shape": entry.shape,
                "data_offsets": [entry.start - begin, entry.stop - begin],
            }
            for name, entry in pairs
        }
        text = json.dumps(header).encode()
        with (directory / f"model-{number:05}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + pairs[-1][1].stop - begin)
    (directory / "config.json").write_text("{}")
    return len(names)


def config(directory, mesh, ranks):
    """A state dict by rules: what a builder of the user's would do besides is its own."""
    fsdp = {"match": "*", "shard": {"dp_shard": 0}}
    model = {"builder": None, "dequantize": False}
    settings = {"source": {"uri": str(directory)}, "model": model, "report": str(directory / "report.json")}
    if mesh == "hsdp-tp":
        shards = min(32, ranks // 16)
        settings["mesh"] = {"dp_replicate": ranks // 8 // shards, "dp_shard": shards, "tp": 8}
        settings["placements"] = [
            *({"match": glob, "shard": {"dp_shard": 0, "tp": 1}} for glob in COLUMNS),
            *({"match": glob, "shard": {"dp_shard": 0, "tp": 0}} for glob in ROWS),
            fsdp,
        ]
    else:
        settings |= {"mesh": {"dp_shard": -1}, "placements": [fsdp]}
    if mesh == "stacked":
        settings["convert"] = "tests.benchmarks.convert_scale:stack_experts"
    path = directory / "config.yaml"
    path.write_text(json.dumps(settings))
    return path


def run(path, ranks):
    command = [sys.executable, "-m", "loader.init_from_hf", "--config", path, "--dry-run", "--world-size", str(ranks)]
    begun = time.perf_counter()
    child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    _, status, used = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begun
    assert status == 0, status
    print(
        f"{ranks} ranks: {seconds:.1f} s, {used.ru_utime:.1f} CPU s, peak {used.ru_maxrss / 1024:.0f} MiB\n", flush=True
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--mesh", choices=["fsdp", "hsdp-tp", "stacked"], nargs="+", default=["fsdp", "hsdp-tp"])
    parser.add_argument("--layers", type=int, default=61)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{write(Path(scratch), given.layers)} keys")
        for ranks, mesh in itertools.product(given.ranks, given.mesh):
            print(mesh, flush=True)
            run(config(Path(scratch), mesh, ranks), ranks)


if __name__ == "__main__":
    main()
