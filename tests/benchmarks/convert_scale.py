"""How tracing, the proof and pull-back grow: seconds and peak memory for one rank of 1,024, up to 90,000 keys.

    python tests/benchmarks/convert_scale.py [--ranks 1024] [--layers 8 15 30 61]

The checkpoint is DeepSeek-V3's by shape, fp8 with its scales, and seen dequantised; the conversion stacks the experts
of a layer and transposes them, and every rank has a part of each. Headers are synthesised and nothing is read.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.distributed.tensor import Shard

from loader.convert.conversion import apply, visible_keys
from loader.convert.quantised import dequantise
from loader.place.boxes import shard_boxes, shard_shape
from loader.place.targets import Target
from loader.plan.catalog import Catalog, File
from loader.stream.demand import check_unused, make_demand
from tests.benchmarks.plan_scale import catalogue, deepseek

EXPERTS = 256
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def stack_experts(checkpoint, _):
    """Every other key as it is; a layer's experts as one tensor [experts, in, out]."""
    for name, tensor in checkpoint.items():
        if ".experts." not in name:
            yield name, tensor
        elif ".experts.0." in name:
            parts = [checkpoint[name.replace(".experts.0.", f".experts.{e}.")] for e in range(EXPERTS)]
            yield name.replace(".experts.0.", ".experts."), torch.stack(parts).transpose(1, 2)


def measure(layers, ranks):
    names, entries = catalogue(list(deepseek(layers)))
    catalog = Catalog((File("synthetic", 0, "", 0),), dict(zip(names, entries, strict=True)))
    begun = time.perf_counter()
    visible = dequantise(visible_keys(catalog, (), ""), FP8)
    outputs = apply(stack_experts, visible, None)
    traced = time.perf_counter()
    targets = [target(fqn, node, ranks) for fqn, node in outputs.items()]
    demand, _ = make_demand(targets, outputs, catalog, range(len(entries)), 1 << 20)
    check_unused([demand.unused], catalog.keys)
    return len(names), len(outputs), traced - begun, time.perf_counter() - traced


def target(fqn, node, ranks):
    """What the middle rank holds: on meta, for no memory is needed to know where things go."""
    layout = (ranks,), (ranks // 2,), (Shard(1 if len(node.shape) == 3 else 0),)
    local = torch.empty(shard_shape(node.shape, *layout), dtype=node.dtype, device="meta")
    return Target((fqn,), local, node.shape, tuple(shard_boxes(node.shape, *layout)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 15, 30, 61])
    given = parser.parse_args()
    print(f"{'keys':>7} {'outputs':>8} {'trace s':>8} {'pull-back and proof s':>22} {'peak MiB':>9}")
    for layers in given.layers:
        keys, outputs, trace, pull = measure(layers, given.ranks)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{keys:>7} {outputs:>8} {trace:>8.2f} {pull:>22.2f} {peak:>9.0f}")


if __name__ == "__main__":
    main()
