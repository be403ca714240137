"""What no checkpoint has (a new value head, LoRA), given its first value by the model's own code, the same on any mesh.

Each tensor is made whole on the CPU, from a seed that is its FQN's, by its module's own initialisation; then each rank
takes its boxes. So a rank holds one such tensor in full at a time.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from loader.errors import BuilderError
from loader.place.materialise import is_marked, mark_of
from loader.place.targets import Target, clean_fqn
from loader.place.user_code import told
from loader.plan.geometry import Box

Initialise = Callable[[nn.Module], object]
"""Gives the tensors that a module itself owns their first values."""


def initialiser(module: nn.Module, target: Target) -> Callable[[], None]:
    """What fills `target`, a tensor of `module`, when it is called.

    The tensor's owner is initialised by `_init_weights` of the transformers model that it is in, else by its own
    `reset_parameters()`. Raises BuilderError where there is neither, and, when called, where that fails or leaves the
    tensor without values.
    """
    owner, name, run = _owner(module, target.fqn)

    def fill() -> None:
        full = _made(target, owner, name, run)
        with torch.no_grad():
            for box, offsets in target.boxes:
                target.tensor[Box(offsets, box.sizes).slices()].copy_(full[box.slices()])

    return fill


def _owner(module: nn.Module, fqn: str) -> tuple[nn.Module, str, Initialise]:
    """Whose tensor it is, under which name, and what initialises it."""
    models = dict(_transformers_models(module))
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name in (*owner._parameters, *owner._buffers):  # noqa: SLF001
            if clean_fqn(f"{prefix}.{name}" if prefix else name) != fqn:
                continue
            around = [at for at in models if not at or f"{prefix}.".startswith(f"{at}.")]
            if around:
                return owner, name, models[max(around, key=len)]
            if hasattr(owner, "reset_parameters"):
                return owner, name, lambda twin: twin.reset_parameters()
            raise BuilderError(
                f"{fqn} is to be initialised, but {type(owner).__name__}, which owns it, has no `reset_parameters()`: "
                "give it one, which fills its own parameters"
            )
    raise BuilderError(f"{fqn} is to be initialised, and no module of the model has it")


def _transformers_models(module: nn.Module) -> Iterator[tuple[str, Initialise]]:
    from transformers import PreTrainedModel

    for prefix, each in module.named_modules():
        if isinstance(each, PreTrainedModel):
            yield prefix, each._init_weights  # noqa: SLF001


def _made(target: Target, owner: nn.Module, name: str, run: Initialise) -> Tensor:
    """The whole tensor: `run` on a twin of its owner in which it alone has memory."""
    full = torch.empty(target.shape, dtype=target.dtype)
    mark = mark_of(target.dtype)
    if mark is not None:
        full.fill_(mark)
    twin = _twin(owner, {name: full})
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(int.from_bytes(hashlib.sha256(target.fqn.encode()).digest()[:8]) >> 1)
            run(twin)
    except Exception as error:
        raise BuilderError(f"{target.fqn}: initialising {type(owner).__name__} failed\n{told(error)}") from error
    if is_marked(full):
        raise BuilderError(f"{target.fqn}: the initialisation of {type(owner).__name__} gave it no value")
    return full


def _twin(owner: nn.Module, memory: Mapping[str, Tensor]) -> nn.Module:
    """The module with its own tensors whole and on meta, but for those in `memory`. Hooks of FSDP are not called."""
    twin: nn.Module = object.__new__(type(owner))  # FSDP2's classes cannot be copied
    twin.__dict__.update(copy.copy(owner.__dict__))

    def whole(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        made = memory[name] if name in memory else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made

    for kind in ("_parameters", "_buffers"):
        twin.__dict__[kind] = {name: whole(name, tensor) for name, tensor in owner.__dict__[kind].items()}
    return twin
