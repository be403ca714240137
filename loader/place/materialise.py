"""From meta to memory: parameters without a value yet, non-persistent buffers with theirs.

Parameters get memory that nothing has written to, so that the load's own write is the first touch. Non-persistent
buffers (rotary `inv_freq`) are in no checkpoint: whoever made the module must fill them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from loader.errors import BuilderError
from loader.place.targets import clean_fqn
from loader.place.user_code import told


def materialise(
    module: nn.Module,
    device: torch.device | str,
    give: Callable[[torch.Tensor], torch.Tensor | None] = lambda _: None,
) -> None:
    """Give what is on meta memory on `device`; what has memory stays where it is.

    `give` may have something to put in a tensor's place, of the same kind and sizes; where it has None, the memory is
    new and empty.

    Parameters keep their identity, and so their ties and FSDP2's hold on them. Non-persistent buffers that were on meta
    are filled by transformers' own initialisation, or else by the module's `init_buffers(device)`. Raises
    BuilderError, naming the buffers, where nobody fills them.
    """
    wanting = {name for name, buffer in _non_persistent_buffers(module) if buffer.is_meta}
    _allocate(module, torch.device(device), give)
    for name, buffer in _non_persistent_buffers(module):
        if name in wanting and (mark := mark_of(buffer.dtype)) is not None:
            buffer.fill_(mark)
    if wanting:
        _fill_buffers(module, torch.device(device), wanting)
    unfilled = [name for name, buffer in _non_persistent_buffers(module) if name in wanting and is_marked(buffer)]
    if unfilled:
        raise BuilderError(
            f"non-persistent buffers are in no checkpoint, and nothing gave them a value: {', '.join(unfilled)}. "
            "Fill them in the module's `init_buffers(device)`"
        )
    assert_materialised(module)


def assert_materialised(module: nn.Module) -> None:
    """Raise BuilderError, naming them, where parameters or buffers are on meta."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    left = [clean_fqn(name) for name, tensor in tensors if tensor.is_meta]
    if left:
        raise BuilderError(f"still on the meta device, so never given a value: {', '.join(left)}")


def _allocate(module: nn.Module, device: torch.device, give: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the old one is kept so that its id stays its own

    def allocate(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor
        given = give(tensor)
        made = torch.empty_like(tensor, device=device) if given is None else given
        return made if isinstance(tensor, nn.Parameter) else buffers.setdefault(id(tensor), (tensor, made))[1]

    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # else plain parameters are replaced, which unties them
    try:
        module._apply(allocate)  # type: ignore[no-untyped-call]  # noqa: SLF001 - as `to_empty` does, which would take also what has memory already
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _fill_buffers(module: nn.Module, device: torch.device, wanting: set[str]) -> None:
    init_buffers = getattr(module, "init_buffers", None)
    if init_buffers is not None:
        try:
            init_buffers(device)
        except Exception as error:
            raise BuilderError(f"{type(module).__name__}.init_buffers({device}) failed\n{told(error)}") from error
        return
    from transformers import PreTrainedModel

    models = [owner for owner in module.modules() if isinstance(owner, PreTrainedModel)]
    if not models:
        raise BuilderError(
            f"non-persistent buffers on the meta device, which no checkpoint holds: {', '.join(sorted(wanting))}. "
            f"Give {type(module).__name__} a method `init_buffers(device)` that fills them"
        )
    for model in models:
        for tensor in model.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True  # noqa: SLF001 - transformers' own mark: it leaves these alone
        model.initialize_weights()


def _non_persistent_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name in owner._non_persistent_buffers_set:  # noqa: SLF001
            if (buffer := owner._buffers.get(name)) is not None:  # noqa: SLF001
                yield clean_fqn(f"{prefix}.{name}" if prefix else name), buffer


def mark_of(dtype: torch.dtype) -> float | int | None:
    """A value that no buffer holds on purpose, to tell one that nobody filled; None where the dtype has none."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.nan
    return torch.iinfo(dtype).min if dtype.is_signed else None


def is_marked(buffer: torch.Tensor) -> bool:
    mark = mark_of(buffer.dtype)
    if mark is None or buffer.is_meta:
        return False
    return bool((buffer.isnan() if mark != mark else buffer == mark).any())  # noqa: PLR0124 - NaN alone differs from itself
