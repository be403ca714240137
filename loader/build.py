"""The model that the config asks for, with memory for this rank's shards and nothing in it yet."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from loader.config import Config
from loader.convert.lazy import Convert
from loader.job import Job, conversion_of
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


def _state_dict(config: Config, job: Job, mesh: DeviceMesh, device: torch.device) -> Model:
    cast = config.model.dtype
    tensors = {
        fqn: (node.shape, cast if cast and node.dtype.is_floating_point else node.dtype)
        for fqn, node in job.outputs.items()
    }
    known = set(mesh.mesh_dim_names or ())
    rules = [
        (rule.match, {dim: at for dim, at in rule.shard.items() if dim in known})  # a dim of size 1 may be left out
        for rule in config.placements
    ]
    return empty_state_dict(tensors, mesh, rules, device)


def _transformers(config: Config, job: Job, mesh: DeviceMesh) -> nn.Module:
    from loader.place.transformers_builder import build  # takes seconds to import, and only this builder needs it

    hf_config = job.hf_config()
    dtype = config.model.dtype
    if dtype is None and not hf_config.dtype:
        floating = (entry.dtype for entry in job.source.catalog.entries.values() if entry.dtype.is_floating_point)
        dtype = next(floating, None)
    return build(hf_config, mesh, dtype)


def _users(builder: str, config: Config, job: Job, mesh: DeviceMesh) -> nn.Module:
    model = call_builder(resolve(builder), job.hf_config(), mesh)
    return model.to(config.model.dtype) if config.model.dtype else model
