"""The conversions that transformers itself declares for a model: keys renamed, experts stacked, projections fused.

transformers shards each key before it converts, and so loads wrong values where the converted dim is the sharded one
(hrm_text, olmo_hybrid under FSDP). Here its own declared objects are run on the whole, lazy checkpoint: what lands is
what its unsharded `from_pretrained` gives. They are private and move: pyproject.toml pins the minor, and this is the
only file that knows them beside `place.transformers_builder`.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils import ContextManagers

from loader.convert.lazy import Convert, OutputError
from loader.errors import BuilderError, CoverageError

_OWN_BUILDER = 'set model.builder to a "package.module:function" of yours'


def convert(checkpoint: Mapping[str, Tensor], hf_config: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """The state dict of the class that the config names, in the checkpoint's dtypes.

    A base model's prefix is added or taken off where the class wants it so. Keys that the model has no name for are
    left unused, which is an error unless the class, or source.ignore, says otherwise. Raises BuilderError for a config
    that names no class of transformers, ConversionError where a declared operation fails, CoverageError where what it
    makes is not of the model's shape.
    """
    yield from _converted(_on_meta(hf_config), checkpoint)


def conversion_for(model: PreTrainedModel) -> Convert:
    """The same for a model at hand, not yet sharded, of another class than the config's: a BertModel, say."""
    return lambda checkpoint, _: _converted(model, checkpoint)


def declared_ties(hf_config: PreTrainedConfig) -> Mapping[str, str]:
    """What the class that the config names ties if the config says so: lm_head.weight to model.embed_tokens.weight.

    Nothing where transformers does not have the class.
    """
    try:
        model = _on_meta(hf_config)
    except BuilderError:
        return {}
    return dict(model.all_tied_weights_keys)


def _on_meta(hf_config: PreTrainedConfig) -> PreTrainedModel:
    cls = model_class(hf_config)
    with ContextManagers(cls.get_init_context(torch.float32, False, False, None)):
        return cls(copy.deepcopy(hf_config))


def _converted(model: PreTrainedModel, checkpoint: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    known = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    groups: dict[str, dict[str, list[str]]] = {}  # by the first target, each source pattern's keys
    for key in sorted(checkpoint, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known and key in known:  # saved after it was converted
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, known)
        if name in known and pattern is None:
            yield name, checkpoint[key]
        elif name in known:
            groups.setdefault(name, {}).setdefault(pattern, []).append(key)
    for name, sources in groups.items():
        transform = copy.deepcopy(by_pattern[next(iter(sources))])
        for fqn, tensor in _run(transform, name, sources, checkpoint, model):
            if fqn in known and tensor.shape != known[fqn].shape:
                shapes = f"the model's shape is {list(known[fqn].shape)}, the conversion's {list(tensor.shape)}"
                raise CoverageError(f"{fqn}: {shapes} {_told(sources)}: is it the checkpoint of this config?")
            yield fqn, tensor


def _run(
    transform: WeightConverter,
    name: str,
    sources: Mapping[str, Sequence[str]],
    checkpoint: Mapping[str, Tensor],
    model: PreTrainedModel,
) -> Iterator[tuple[str, Tensor]]:
    for pattern, keys in sources.items():
        for key in keys:
            transform.add_tensor(name, key, pattern, checkpoint[key])
    try:
        made = transform.convert(name, model=model, config=model.config)
    except Exception as error:
        names = " and ".join(type(operation).__name__ for operation in transform.operations)
        raise OutputError(f"{name}: transformers' {names} failed {_told(sources)}: {error}") from error
    for fqn, tensor in made.items():
        yield fqn, tensor[0] if isinstance(tensor, list) else tensor


def _told(sources: Mapping[str, Sequence[str]]) -> str:
    """What the keys are, and the experts' numbers that one pattern lacks and another has."""
    numbers = {
        pattern: {int(found[-1]) for key in keys if (found := re.findall(r"\.(\d+)(?=\.)", key))}
        for pattern, keys in sources.items()
    }
    every = range(max((number for found in numbers.values() for number in found), default=-1) + 1)
    told = []
    for pattern, keys in sources.items():
        gaps = sorted({*every} - numbers[pattern]) if "*" in pattern else []
        lacks = f" without number {', '.join(map(str, gaps))}" if gaps else ""
        told.append(f"{len(keys)} keys as {keys[0]}{lacks}")
    return f"from {' and '.join(told)}"


def model_class(hf_config: Mapping[str, Any] | PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that `architectures` names: of transformers, or of the checkpoint's own code where the config has it.

    Raises BuilderError, with the nearest that there are.
    """
    fields = hf_config.to_dict() if isinstance(hf_config, PreTrainedConfig) else hf_config
    names = fields.get("architectures") or []
    if not names:
        raise BuilderError(
            f'config.json names no class under `architectures`: add it (as ["LlamaForCausalLM"]), or {_OWN_BUILDER}'
        )
    cls = getattr(hf_config, "checkpoint_class", None) or getattr(transformers, names[0], None)
    if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
        return cls
    if fields.get("auto_map"):
        raise BuilderError(
            f"config.json names {names[0]}, whose code is in the checkpoint (`auto_map`). It could do what you can, "
            "and is not run unless you say so. Read it, and set model.trust_remote_code: true; or install it as a "
            f"package and {_OWN_BUILDER}"
        )
    close = difflib.get_close_matches(names[0], dir(transformers), n=3)
    hint = f" (it has {', '.join(close)})" if close else ""
    raise BuilderError(
        f"config.json names {names[0]}, which transformers {transformers.__version__} does not have{hint}; "
        f"correct `architectures`, or {_OWN_BUILDER}"
    )
