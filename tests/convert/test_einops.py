"""einops, as conversions use it, on lazy tensors."""

import einops
import pytest
import torch

from loader.convert.lazy import trace
from loader.plan.geometry import Box
from tests.checkpoints import same_bits
from tests.convert.test_pull import checkpoint, fill

PROGRAMS = {
    "rotary": lambda x: einops.rearrange(x, "(h two d) m -> (h d two) m", h=3, two=2),
    "heads first": lambda x: einops.rearrange(x, "(h d) m -> m h d", h=4),
    "repeat": lambda x: einops.repeat(x, "a b -> (r a) b", r=2),
    "stack": lambda x: einops.rearrange([x, x + 1], "e a b -> (e b) a"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_box_of_what_it_makes(name):
    x = torch.arange(24.0 * 6).reshape(24, 6)
    node = trace(lambda keys, _: {"out": PROGRAMS[name](keys["x"])}, checkpoint({"x": x}), None)["out"]
    whole = PROGRAMS[name](x)
    box = Box(tuple(1 for _ in whole.shape), tuple(size - 1 for size in whole.shape))
    found = torch.empty(box.sizes)
    fill(node, box, found, [x])
    assert same_bits(found, whole[box.slices()])
