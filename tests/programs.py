"""What a user brings to the command: entrypoints and builders, as `tests.programs:function`.

An entrypoint that finds something wrong raises, and so ends its rank with 1.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.checkpoints import minilm_dir, same_bits

SENTENCE = "Every byte leaves the bucket once."
TOKENS = torch.arange(24).view(2, 12) * 13 % 320


def embed(model: nn.Module, mesh: Any, report: Any) -> None:
    """The real MiniLM: its weights, and its embedding of a sentence, are those of `from_pretrained`."""
    expected = transformers.AutoModel.from_pretrained(minilm_dir())
    _same_weights(model, expected)
    tokens = transformers.AutoTokenizer.from_pretrained(minilm_dir())(SENTENCE, return_tensors="pt")
    with torch.no_grad():
        ours, theirs = (each.eval()(**tokens).last_hidden_state.mean(dim=1) for each in (model, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert report.world_size == mesh.size()


def logits(model: nn.Module, mesh: Any, report: Any) -> None:
    """The Llama in the directory LLAMA: its weights bit for bit, its logits as TP's other order of adding allows."""
    expected = transformers.AutoModelForCausalLM.from_pretrained(os.environ["LLAMA"])
    _same_weights(model, expected)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(TOKENS).logits, expected.eval()(TOKENS).logits, rtol=0, atol=1e-5)


def _same_weights(model: nn.Module, expected: nn.Module) -> None:
    theirs = expected.state_dict()
    ours = {
        fqn: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for fqn, tensor in model.state_dict().items()
    }
    assert ours.keys() == theirs.keys()
    assert [fqn for fqn in ours if not same_bits(ours[fqn], theirs[fqn])] == []


class Own(nn.Module):
    """A module of the user's, with a buffer that no checkpoint holds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 7)
        self.register_buffer("frequencies", torch.empty(3), persistent=False)

    def init_buffers(self, device: torch.device) -> None:
        self.frequencies = torch.arange(3.0, device=device)


def own(hf_config: Any, mesh: Any) -> nn.Module:
    """On meta, sharded over the dim that the config names."""
    with torch.device("meta"):
        model = Own(hf_config.width)
    return fully_shard(model, mesh=mesh["dp_shard"])


def leave_with_the_rank(model: nn.Module, mesh: Any, report: Any) -> int:
    """40 + rank, once the weights in the directory OWN were found again, and nothing of the load was."""
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("loader-")]
    assert left == [], left
    expected = torch.load(Path(os.environ["OWN"], "expected.pt"))
    weight = model.layer.weight.full_tensor()
    assert same_bits(weight, expected["layer.weight"])
    assert torch.equal(model.frequencies, torch.arange(3.0))
    assert json.loads(report.to_json())["mesh"] == {"dp_shard": 2}
    mesh.get_group().barrier().wait()  # torchrun ends the others when the first rank ends
    return 40 + mesh.get_rank()
