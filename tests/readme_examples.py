"""README's examples in Python: what is to be around each, and the look at what it did. They run in ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import loader
from tests.checkpoints import same_bits
from tests.documents import Block, blocks
from tests.processes import ROOT

URI = "s3://models/llama-3-8b"
BLOCKS = blocks((ROOT / "README.md").read_text())


def sharded(directory: Path) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def wrong(found: dict[str, Any], directory: Path) -> list[str]:
    """What is not there bit for bit as the checkpoint has it."""
    expected = transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict()
    full = {fqn: each.full_tensor() if isinstance(each, DTensor) else each for fqn, each in found.items()}
    assert full.keys() == expected.keys()
    return [fqn for fqn in full if not same_bits(full[fqn], expected[fqn])]


def library(text: str, directory: Path) -> list[str]:
    model = sharded(directory).to_empty(device="cpu")
    names: dict[str, Any] = {"model": model}
    exec(text, names)
    assert names["report"].egress_ratio > 1
    return wrong(model.state_dict(), directory)


def storage_reader(text: str, directory: Path) -> list[str]:
    state_dict = sharded(directory).to_empty(device="cpu").state_dict()
    exec(text, {"dcp": dcp, "loader": loader, "state_dict": state_dict})
    return wrong(state_dict, directory)


def attach(text: str, directory: Path) -> list[str]:
    model = sharded(directory)
    exec(text, {"loader": loader, "model": model})
    return wrong(model.state_dict(), directory)


def conversion(text: str, directory: Path) -> list[str]:
    """Beside the function on the tensors themselves."""
    names: dict[str, Any] = {}
    exec(text, names)
    expected = converted(names["convert"], directory)
    assert "blocks.0.self_attn.q_proj.weight" in expected
    found = {fqn: torch.empty_like(tensor) for fqn, tensor in expected.items()}
    loader.load(found, URI, convert=names["convert"])
    return [fqn for fqn in found if not same_bits(found[fqn], expected[fqn])]


def converted(convert: Callable[..., Any], directory: Path) -> dict[str, torch.Tensor]:
    tensors = {key: tensor for file in directory.glob("*.safetensors") for key, tensor in load_file(file).items()}
    return dict(convert(tensors, transformers.AutoConfig.from_pretrained(directory)))


def iteration(text: str, directory: Path) -> list[str]:
    """With the conversion above it; its body is what one makes of it."""
    names: dict[str, Any] = {"uri": URI, "loader": loader, "found": {}}
    exec(example("def convert(").text, names)
    exec(text.replace("...", "found[fqn] = tensor"), names)
    expected, found = converted(names["convert"], directory), names["found"]
    return [fqn for fqn in {*expected, *found} if not same_bits(found[fqn], expected[fqn])]


EXAMPLES = {
    "import loader\n\nreport = loader.load(": library,
    "dcp.load(": storage_reader,
    "loader.attach(": attach,
    "def convert(": conversion,
    "for fqn, tensor in loader.iter_convert(": iteration,
}
"""By the words that each begins with: what is to be around it, and the look at what it did."""


def example(begins: str) -> Block:
    (block,) = [block for block in BLOCKS if block.language == "python" and block.text.startswith(begins)]
    return block
