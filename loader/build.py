"""The model that the config asks for, with memory for this rank's shards and nothing in it yet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from loader.config import Config
from loader.convert.conversion import visible_keys
from loader.errors import CatalogError
from loader.job import Job
from loader.place.materialise import materialise
from loader.place.state_dict import empty_state_dict
from loader.place.targets import clean_fqn
from loader.place.user_code import call_builder, resolve

Model = nn.Module | Mapping[str, Tensor]


def build_model(config: Config, job: Job, mesh: DeviceMesh, device: torch.device) -> Model:
    """Build on meta, start measuring memory, materialise. Raises BuilderError, ConfigError, CatalogError."""
    builder = config.model.builder
    if builder is None:
        return _state_dict(config, job, mesh, device)
    model = _transformers(config, job, mesh) if builder == "transformers" else _users(builder, config, job, mesh)
    job.memory.start()
    materialise(model, device)
    return model


def ignorable_keys(config: Config, job: Job, model: Model) -> list[str]:
    """Keys that the model's own class declares it has no use for: as transformers leaves them out, so do we."""
    if config.model.builder != "transformers":
        return []
    from loader.place.transformers_builder import ignorable

    assert isinstance(model, nn.Module)
    own = {clean_fqn(name) for name in model.state_dict()}
    patterns = [re.compile(pattern) for pattern in ignorable(model)]
    prefix = config.source.strip_prefix
    return [
        glob_of(key)
        for key in job.source.catalog.entries
        if key.removeprefix(prefix) not in own and any(p.search(key.removeprefix(prefix)) for p in patterns)
    ]


def glob_of(key: str) -> str:
    """The glob that matches `key` alone."""
    return re.sub(r"([*?[])", r"[\\1]", key)


def _state_dict(config: Config, job: Job, mesh: DeviceMesh, device: torch.device) -> Model:
    names = visible_keys(job.source.catalog, config.source.ignore, config.source.strip_prefix)
    entries = list(job.source.catalog.entries.values())
    cast = config.model.dtype
    tensors = {
        fqn: (entries[key].shape, cast if cast and entries[key].dtype.is_floating_point else entries[key].dtype)
        for fqn, key in names.items()
    }
    known = set(mesh.mesh_dim_names or ())
    rules = [
        (rule.match, {dim: at for dim, at in rule.shard.items() if dim in known})  # a dim of size 1 may be left out
        for rule in config.placements
    ]
    job.memory.start()
    return empty_state_dict(tensors, mesh, rules, device)


def _transformers(config: Config, job: Job, mesh: DeviceMesh) -> nn.Module:
    from loader.place.transformers_builder import build  # takes seconds to import, and only this builder needs it

    hf_config = _hf_config(config, job)
    dtype = config.model.dtype
    if dtype is None and not (hf_config.get("dtype") or hf_config.get("torch_dtype")):
        floating = (entry.dtype for entry in job.source.catalog.entries.values() if entry.dtype.is_floating_point)
        dtype = next(floating, None)
    return build(hf_config, mesh, dtype)


def _users(builder: str, config: Config, job: Job, mesh: DeviceMesh) -> nn.Module:
    from loader.place.transformers_builder import config_of

    model = call_builder(resolve(builder), config_of(_hf_config(config, job)), mesh)
    return model.to(config.model.dtype) if config.model.dtype else model


def _hf_config(config: Config, job: Job) -> dict[str, Any]:
    found = job.source.hf_config
    if found is None:
        raise CatalogError(
            f"{job.store.uri}: no config.json, which model.builder {config.model.builder} needs: upload it beside the "
            "files, or set model.builder to null for a state dict without a model"
        )
    return found
