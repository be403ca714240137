"""The model that the config asks for, with memory for this rank's shards and nothing in it yet."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from loader.config import Config
from loader.convert.fit import Wishes
from loader.convert.graph import Node, keys_of
from loader.convert.lazy import Convert
from loader.convert.vocabulary import Vocabulary
from loader.errors import ConfigError
from loader.exchange.control import Control
from loader.job import Job, conversion_of
from loader.place.dtypes import DtypeRule, cast_by_rules, dtype_by_rule
from loader.place.materialise import materialise
from loader.place.state_dict import empty_state_dict
from loader.place.targets import clean_fqn
from loader.place.user_code import call_builder, resolve

Model = nn.Module | Mapping[str, Tensor]


def own_conversion(config: Config) -> Convert | None:
    """The conversion that the config asks for. Raises ConfigError.

    A model of transformers is loaded as transformers declares; its dense ones mostly have nothing to convert.
    """
    return conversion_of(config.convert or ("transformers" if config.model.builder == "transformers" else None))


def open_job(config: Config, convert: Convert | None, control: Control) -> Job:
    """What the config asks to load, with its conversion traced. Collective."""
    source = config.source
    job = Job(
        source.pinned_uri,
        source.storage_options,
        config.read,
        control,
        checksums=config.verify == "checksum",
        code=config.model.trust_remote_code,
    )
    job.trace(convert, source.ignore, source.strip_prefix, dequantize=config.model.dequantize)
    return job


def build_model(config: Config, job: Job, mesh: DeviceMesh, device: torch.device) -> Model:
    """Build on meta, start measuring memory, materialise. Raises BuilderError, ConfigError, CatalogError."""
    if config.model.builder is None:
        job.watch_memory()
        return _state_dict(config, job, mesh, device)
    model = _module(config.model.builder, config, job, mesh)
    job.watch_memory()
    materialise(model, device)
    return model


def build_on_meta(config: Config, job: Job, mesh: DeviceMesh) -> Model:
    """As `build_model`, without memory: what a user's builder does not build on meta is where it puts it."""
    if config.model.builder is None:
        return _state_dict(config, job, mesh, torch.device("meta"))
    return _module(config.model.builder, config, job, mesh)


def _module(builder: str, config: Config, job: Job, mesh: DeviceMesh) -> nn.Module:
    return _transformers(config, job, mesh) if builder == "transformers" else _users(builder, config, job, mesh)


def needless_keys(config: Config, job: Job, model: Model) -> list[str]:
    """Keys that the model's own class declares it has no use for: as transformers leaves them out, so do we."""
    if config.model.builder != "transformers":
        return []
    from loader.place.transformers_builder import ignorable

    assert isinstance(model, nn.Module)
    own = {clean_fqn(name) for name in model.state_dict()}
    patterns = [re.compile(pattern) for pattern in ignorable(model)]
    return [name for name in job.keys if name not in own and any(each.search(name) for each in patterns)]


def wishes_of(config: Config, job: Job, model: Model) -> Wishes:
    """In what the model may differ from the checkpoint, and which tensors are its vocabulary's, if it knows."""
    allowed = config.model.vocabulary
    fqns = None
    if config.model.builder == "transformers":
        from loader.place.transformers_builder import vocabulary

        assert isinstance(model, nn.Module)
        fqns = vocabulary(model)
    return Wishes(Vocabulary(allowed.pad, allowed.cut, fqns, job.vocab_size()), config.model.initialise)


def _state_dict(config: Config, job: Job, mesh: DeviceMesh, device: torch.device) -> Model:
    tensors = {fqn: (node.shape, _dtype_of(fqn, node, config, job)) for fqn, node in job.outputs.items()}
    known = set(mesh.mesh_dim_names or ())
    rules = [
        (rule.match, {dim: at for dim, at in rule.shard.items() if dim in known})  # a dim of size 1 may be left out
        for rule in config.placements
    ]
    return empty_state_dict(tensors, mesh, rules, device)


def _dtype_of(fqn: str, node: Node, config: Config, job: Job) -> torch.dtype:
    cast = dtype_by_rule(fqn, _rules(config)) or config.model.dtype
    stays = not node.dtype.is_floating_point or not job.kept_quantised.isdisjoint(keys_of(node))
    return job.dtype_of(node) if cast is None or stays else cast


def _transformers(config: Config, job: Job, mesh: DeviceMesh) -> nn.Module:
    from loader.place.transformers_builder import build  # takes seconds to import, and only this builder needs it

    if job.kept_quantised:
        raise ConfigError(
            "model.dequantize: false keeps the checkpoint's quantised weights, and the transformers builder makes the "
            'model without quantisation: set model.builder to null or to a "package.module:function" of yours'
        )
    hf_config = job.hf_config()
    dtype = config.model.dtype
    if dtype is None and not hf_config.dtype:
        dtype = next((job.dtype_of(node) for node in job.keys.values() if node.dtype.is_floating_point), None)
    return build(hf_config, mesh, dtype, _rules(config))


def _users(builder: str, config: Config, job: Job, mesh: DeviceMesh) -> nn.Module:
    model = call_builder(resolve(builder), job.hf_config(), mesh)
    model = model.to(config.model.dtype) if config.model.dtype else model
    cast_by_rules(model, _rules(config))
    return model


def _rules(config: Config) -> list[DtypeRule]:
    return [(rule.match, rule.dtype) for rule in config.model.dtype_rules]
