"""Memory for what is on meta: ties and what is real stay, non-persistent buffers get their values or an error."""

import psutil
import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from loader.errors import BuilderError
from loader.place.materialise import assert_materialised, materialise
from loader.place.transformers_builder import build


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("angles", torch.arange(4.0), persistent=False)
        self.weight = nn.Parameter(torch.zeros(2))


class Filled(Rotary):
    def init_buffers(self, device):
        self.angles = torch.arange(4.0, device=device)


class Raising(Rotary):
    def init_buffers(self, device):
        raise KeyError("theirs")


class Forgetful(Rotary):
    def init_buffers(self, device):
        pass


def on_meta(cls):
    with torch.device("meta"):
        return cls()


def test_init_buffers_fills_them():
    model = on_meta(Filled)
    materialise(model, "cpu")
    assert torch.equal(model.angles, torch.arange(4.0))
    assert model.weight.device.type == "cpu"


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Rotary, r"angles\. Give Rotary a method `init_buffers\(device\)`"),
        (Raising, "(?s)Raising.init_buffers.*failed.*KeyError: 'theirs'"),
        (Forgetful, "nothing gave them a value: angles"),
    ],
)
def test_buffers_that_nobody_fills(cls, message):
    with pytest.raises(BuilderError, match=message):
        materialise(on_meta(cls), "cpu")


def test_what_is_real_stays():
    model = nn.ModuleList([Rotary(), on_meta(Filled).requires_grad_(requires_grad=False)])
    model[1].angles = None
    real = model[0].weight
    materialise(model, "cpu")
    assert model[0].weight is real
    assert torch.equal(model[0].angles, torch.arange(4.0))
    assert not model[1].weight.requires_grad


def test_ties_and_identity_are_kept():
    with torch.device("meta"):
        model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)])
    model[1].weight = model[0].weight
    model[1].register_buffer("shared", model[2].running_mean)
    parameter = model[0].weight
    materialise(model, "cpu")
    assert model[1].weight is model[0].weight is parameter
    assert parameter.device.type == "cpu"
    assert model[1].shared is model[2].running_mean


def test_parameters_are_not_touched():
    """256 MiB of parameters: their pages come with the load's own writes, not before."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=512, intermediate_size=512, num_hidden_layers=1,
        num_attention_heads=4, vocab_size=65536,
    )  # fmt: skip
    model = build(config, None, torch.float32)
    before = psutil.Process().memory_info().rss
    materialise(model, "cpu")
    assert psutil.Process().memory_info().rss - before < 32 << 20
    assert sum(parameter.nbytes for parameter in model.parameters()) > 256 << 20


def test_what_is_left_on_meta_is_named():
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.BatchNorm1d(2, affine=False)})
    with pytest.raises(BuilderError, match=r"a\.weight, b\.running_mean"):
        assert_materialised(model)
