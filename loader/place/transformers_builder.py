"""The model that a checkpoint's own `config.json` names, on meta, with its own TP and FSDP plans applied to our mesh.

transformers' public way to shard (DistributedConfig) names its mesh dims itself and reads the checkpoint itself; this
goes through the interfaces beneath it, which are private and move: pyproject.toml pins the minor.
"""
# ruff: noqa: SLF001

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.distributed.fsdp import apply_fully_sharded_data_parallelism
from transformers.distributed.tensor_parallel import apply_tensor_parallelism
from transformers.utils import ContextManagers

from loader.convert.named.transformers import model_class
from loader.errors import BuilderError, ConfigError, LoaderError
from loader.place.checkpoint_code import own_classes, refuse_kernels
from loader.place.dtypes import DtypeRule, cast_by_rules
from loader.place.user_code import told

_DP = ("dp_replicate", "dp_shard")
_LAYERS = 1000
"""So many may be built, whatever the checkpoint has: the deepest models have a tenth of them."""
_OWN_BUILDER = 'set model.builder to a "package.module:function" of yours'


def build(
    hf_config: Mapping[str, Any] | PreTrainedConfig,
    mesh: DeviceMesh | None,
    dtype: torch.dtype | None = None,
    dtype_rules: Sequence[DtypeRule] = (),
) -> nn.Module:
    """The model on the meta device: DTensors where `mesh` shards them, plain parameters elsewhere; ties kept.

    `mesh` may have dp_replicate, dp_shard and tp, the first before the second; None is one rank. `dtype` None takes the
    config's, and torch's default where that names none; what the class keeps in float32 stays so, unless a rule says
    otherwise. Raises BuilderError where the architecture is missing, unknown, remote code, or without a TP plan;
    ConfigError for a mesh it cannot use, and for rules that give one FSDP group several dtypes.
    """
    sizes = _sizes(mesh)
    cls = model_class(hf_config)
    try:
        model: nn.Module = _build(cls, hf_config, mesh, sizes, dtype, dtype_rules)
    except LoaderError:
        raise
    except Exception as error:
        raise BuilderError(f"transformers could not build {cls.__name__}\n{told(error)}") from error
    return model


def config_of(fields: Mapping[str, Any], code: Mapping[str, str] | None = None, tensors: int = 0) -> PreTrainedConfig:
    """`config.json` as transformers' config object: of the model type's own class, generic where it knows none.

    Where it does not have the model either, that is taken from the checkpoint's own `code`: sources by module. The
    checkpoint has so many `tensors`. Raises BuilderError for what transformers cannot read, for kernels of a
    repository, and for more layers than these tensors can be of: what is built of them takes memory, on meta too.
    """
    kind = fields.get("model_type")
    known = kind in transformers.CONFIG_MAPPING  # a lazy mapping, whose `get` knows no default
    cls = transformers.CONFIG_MAPPING[kind] if known else PreTrainedConfig
    if code and not hasattr(transformers, next(iter(fields.get("architectures") or []), "")):
        cls = own_classes(fields, code)
    try:
        config: PreTrainedConfig = cls.from_dict(dict(fields))
    except Exception as error:
        reason = error.__cause__ or error  # of its own validation, which says no more than that it failed
        raise BuilderError(f"transformers could not read config.json as a {cls.__name__}: {reason}") from error
    refuse_kernels(config)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        layers = getattr(part, "num_hidden_layers", None)
        if isinstance(layers, int) and layers > max(tensors, _LAYERS):
            raise BuilderError(
                f"config.json says {layers} layers, of a checkpoint of {tensors} tensors: is it its own?"
            )
    return config


def ignorable(model: nn.Module) -> tuple[str, ...]:
    """Regular expressions, for `re.search`, of checkpoint keys that the model's class declares it has no use for."""
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    # As transformers does for every model: once saved per layer, now rebuilt.
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return tuple(sorted(patterns))


def vocabulary(model: PreTrainedModel) -> set[str]:
    """FQNs with a row for each token: the parameters of the input and of the output embeddings."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    owned = {id(parameter) for end in ends if end is not None for parameter in end.parameters()}
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in owned}


def _sizes(mesh: DeviceMesh | None) -> dict[str, int]:
    given = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)) if mesh is not None else {}
    others = [f"{name}: {size}" for name, size in given.items() if name not in (*_DP, "tp") and size > 1]
    if others:
        raise ConfigError(
            f"mesh: model.builder transformers takes dp_replicate, dp_shard and tp, not {', '.join(others)}; "
            f"{_OWN_BUILDER}"
        )
    if [name for name in given if name in _DP] == ["dp_shard", "dp_replicate"] and given["dp_replicate"] > 1:
        raise ConfigError("mesh: FSDP2 shards within its replicas, so write dp_replicate before dp_shard")
    return {name: given.get(name, 1) for name in (*_DP, "tp")}


def _build(
    cls: type[PreTrainedModel],
    hf_config: Mapping[str, Any] | PreTrainedConfig,
    mesh: DeviceMesh | None,
    sizes: Mapping[str, int],
    dtype: torch.dtype | None,
    dtype_rules: Sequence[DtypeRule],
) -> PreTrainedModel:
    is_config = isinstance(hf_config, PreTrainedConfig)
    config = copy.deepcopy(hf_config) if is_config else cls.config_class.from_dict(dict(hf_config))
    model = _on_meta(cls, config, dtype)
    cast_by_rules(model, dtype_rules)  # before FSDP, which takes what it then finds for the original dtype
    if mesh is not None and max(sizes.values()) > 1:
        _parallelise(model, _with_shard_dim(mesh, sizes), sizes)
    else:
        model.tie_weights(recompute_mapping=False)
    return model


def _on_meta(cls: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    """As `from_pretrained` builds it, in its own contexts: meta, untied (else `lm_head.weight` has no TP plan)."""
    dtype = dtype or config.dtype or torch.get_default_dtype()
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    with ContextManagers(cls.get_init_context(dtype, False, False, None)):
        model = cls(config)
    if plan := model._get_dtype_plan(dtype):
        kept, globs, _ = build_glob_alternation(list(plan))
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if match := kept.search(name):
                tensor.data = tensor.data.to(plan[globs[match.lastgroup]])
    return model


def _with_shard_dim(mesh: DeviceMesh, sizes: Mapping[str, int]) -> DeviceMesh:
    """The mesh itself; with a dp_shard of 1 beside a dp_replicate that stands alone, for FSDP2 replicates only so."""
    names = mesh.mesh_dim_names or ()
    if sizes["dp_replicate"] == 1 or "dp_shard" in names:
        return mesh
    at = names.index("dp_replicate") + 1
    return DeviceMesh(mesh.device_type, mesh.mesh.unsqueeze(at), mesh_dim_names=(*names[:at], "dp_shard", *names[at:]))


def _parallelise(model: PreTrainedModel, mesh: DeviceMesh, sizes: Mapping[str, int]) -> None:
    """TP, then ties, then FSDP: a tie must join what TP has placed, and FSDP must see it to hold both names as one."""
    if sizes["tp"] > 1:
        if not model.tp_plan:
            raise BuilderError(f"{type(model).__name__} has no plan for tensor parallelism: leave tp at 1")
        apply_tensor_parallelism(model, mesh["tp"], model._expand_parallel_plan(dict(model.tp_plan)))
    _check_ties(model)
    model.tie_weights(recompute_mapping=False)
    dp = tuple(name for name in _DP if sizes[name] > 1 or (name == "dp_shard" and sizes["dp_replicate"] > 1))
    if dp:
        apply_fully_sharded_data_parallelism(model, _Mesh(mesh[dp]), _fsdp_plan(model), {})


class _Mesh:
    """All that transformers asks of its own mesh manager here: the mesh for FSDP."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh

    def get_mesh(self, _names: str) -> DeviceMesh:
        return self._mesh


def _check_ties(model: PreTrainedModel) -> None:
    for target, source in model.all_tied_weights_keys.items():
        ours, theirs = (_placements(model.get_parameter_or_buffer(name)) for name in (target, source))
        if ours != theirs:
            raise BuilderError(
                f"{target} is tied to {source}, but the model's TP plan places them differently ({ours} and {theirs}): "
                f"leave tp at 1, or {_OWN_BUILDER}"
            )


def _placements(tensor: torch.Tensor) -> Any:
    return tensor.placements if isinstance(tensor, DTensor) else None


def _fsdp_plan(model: PreTrainedModel) -> dict[str, str]:
    """Which modules are FSDP groups of their own, innermost first; the root takes the rest.

    transformers makes the embedding a group and leaves a head that is tied to it to the root, which unties them. Here
    no group has some of a tied parameter's names without the others: such a parameter goes to the group around.
    """
    others = (name for name, parameter in model.named_parameters() if parameter.dtype != model.config.dtype)
    owners = {name.rpartition(".")[0] for name in others} - {""}
    expanded = model._expand_parallel_plan(dict(model.fsdp_plan))
    expanded |= dict.fromkeys(owners, "free_full_weight")  # one group has one dtype; what is kept full may be one group
    ties = _ties(model.named_parameters(remove_duplicate=False))
    whole = {name: style for name, style in expanded.items() if not any(_cuts(name, tie) for tie in ties)}
    found = dict(sorted(whole.items(), key=lambda item: item[0].count("."), reverse=True))
    _check_dtypes(model, found)
    return found


def _check_dtypes(model: PreTrainedModel, groups: Iterable[str]) -> None:
    """FSDP2 takes one dtype for a group, and says so only in the first forward. `groups` come innermost first."""
    first: dict[str, tuple[str, torch.dtype]] = {}
    for name, parameter in model.named_parameters():
        group = next((each for each in groups if name.startswith(f"{each}.")), "the root")
        other, dtype = first.setdefault(group, (name, parameter.dtype))
        if dtype != parameter.dtype:
            raise ConfigError(
                f"model.dtype_rules: {other} is {dtype} and {name} is {parameter.dtype}, but FSDP shards them together "
                f"({group}): give both one dtype, or {_OWN_BUILDER}"
            )


def _ties(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[list[str]]:
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in parameters:
        names.setdefault(parameter, []).append(name)
    return [tie for tie in names.values() if len(tie) > 1]


def _cuts(module: str, tie: list[str]) -> bool:
    inside = [name.startswith(f"{module}.") for name in tie]
    return any(inside) and not all(inside)
