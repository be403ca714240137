"""Run a script that uses torchtitan's own Trainer on a machine without a GPU, and tell which weights it trains from.

    torchrun tests/torchtitan_on_cpu.py configs/train_torchtitan.py …

What torchtitan has for CUDA alone is replaced, and only that: the device, its memory's statistics, the kernel of
attention, the way gradients are summed, and what it imports and this run does not use. The model, its parallelism, the
checkpointer, the optimizer and the loop are torchtitan's.
"""

from __future__ import annotations

import runpy
import sys
import types
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import create_block_mask

import loader
import tests.torchtitan_models  # noqa: F401 - triton's kernels, which are imported and not called

for name in ("datasets", "datasets.distributed", "torch.utils.tensorboard"):  # text from a file, and a dashboard
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__getattr__ = lambda _: None  # type: ignore[method-assign]

from torchtitan.tools import utils  # noqa: E402

utils.device_type, utils.device_module = "cpu", torch.cpu  # which its other modules take from there

from torchtitan import trainer  # noqa: E402
from torchtitan.components import metrics  # noqa: E402
from torchtitan.models.common import attention  # noqa: E402


class NoStatistics:
    device_name = "cpu"

    def get_peak_stats(self) -> metrics.DeviceMemStats:
        return metrics.DeviceMemStats(*[0] * 6)

    def reset_peak_stats(self) -> None:
        pass


def causal(q: Any, k: Any, v: Any, *, scale: Any, enable_gqa: bool, **_: Any) -> tuple[torch.Tensor, None]:
    """What flex attention's mask means where a row is one document; that has no backward on a CPU."""
    made = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa)
    return made, None


def divide_gradients(module: FSDPModule, factor: float) -> None:
    """Gloo has no reduction that multiplies."""
    own_divide(module, factor)
    module.set_force_sum_reduction_for_comms(True)


def load(self: Any, step: int = -1) -> bool:
    loaded = own_load(self, step)
    tell_weights(self.states["model"].model)
    return loaded


def close(self: Any) -> None:
    tell_weights(self.model_parts)
    own_close(self)


def tell_weights(parts: list[torch.nn.Module]) -> None:
    found = loader.fingerprint(parts[0])
    if torch.distributed.get_rank() == 0:
        print(f"weights {found}", flush=True)


metrics.build_device_memory_monitor = NoStatistics
attention.FlexAttention._compiled_flex_attn = causal
attention._compiled_create_block_mask = create_block_mask
trainer.dist_utils.set_pg_timeouts = lambda **_: None  # by a barrier on a device
own_divide, FSDPModule.set_gradient_divide_factor = FSDPModule.set_gradient_divide_factor, divide_gradients
own_load, trainer.CheckpointManager.load = trainer.CheckpointManager.load, load
own_close, trainer.Trainer.close = trainer.Trainer.close, close

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
