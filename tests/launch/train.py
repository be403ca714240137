"""A training command: reads what the init step left, with torch's own `dcp.load`, and tells what is wrong with it."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

checkpoint, source, out = map(Path, sys.argv[1:])
(out / "started").touch()
dist.init_process_group("gloo")
expected = load_file(source / "model.safetensors")
found = {fqn: torch.zeros_like(tensor) for fqn, tensor in expected.items()}
dcp.load(found, storage_reader=dcp.FileSystemReader(checkpoint))
wrong = [fqn for fqn, tensor in expected.items() if not torch.equal(found[fqn], tensor)]
place = " ".join(os.environ[name] for name in ("RANK", "GROUP_RANK", "LOCAL_RANK"))
(out / f"trained-{dist.get_rank()}").write_text(f"{place} {wrong}")
dist.destroy_process_group()
