"""Logits as a judge of a conversion: the same tokens through the HF model and through the trainer's, filled by us."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def assert_decide(
    logits: Callable[[Mapping[str, Tensor]], Tensor], state: Mapping[str, Tensor], expected: Tensor, tolerance: float
) -> None:
    """`logits` of `state` are `expected`, and are not with any one tensor of the last layers turned upside down.

    Without the second the first says little: in a small random model a wrong norm may hardly show.
    """
    torch.testing.assert_close(logits(state), expected, rtol=0, atol=tolerance)
    of_each_kind = {re.sub(r"\d+", "", fqn): (fqn, tensor) for fqn, tensor in state.items()}
    for fqn, tensor in of_each_kind.values():
        turned = tensor.flip(0)
        if not torch.equal(turned, tensor):
            wrong = {name: turned if other is tensor else other for name, other in state.items()}  # a tied one too
            assert (logits(wrong) - expected).abs().max() > 10 * tolerance, f"{fqn} does not show in the logits"
