"""The training command of the tests: reads the checkpoint that the init step left, with torch's own `dcp.load` alone."""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

checkpoint, source, out = map(Path, sys.argv[1:4])
dist.init_process_group("gloo")
place = {name: os.environ[name] for name in ("RANK", "GROUP_RANK", "LOCAL_RANK", "WORLD_SIZE")}

expected = load_file(source / "model.safetensors")
found = {fqn: torch.zeros_like(tensor) for fqn, tensor in expected.items()}
dcp.load(found, storage_reader=dcp.FileSystemReader(checkpoint))
wrong = [fqn for fqn, tensor in expected.items() if not torch.equal(found[fqn], tensor)]
(out / f"trained-{dist.get_rank()}").write_text(f"{len(expected)} tensors, wrong: {wrong}, {place}")
dist.barrier()
if "--wait" in sys.argv:
    (out / f"waiting-{dist.get_rank()}").touch()
    time.sleep(600)
dist.destroy_process_group()
sys.exit(int(os.environ.get("CODE", "0")) if place["RANK"] == "3" else 0)
