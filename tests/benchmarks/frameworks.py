"""More contenders: what frameworks do today, as their users call it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, MutableMapping

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from tests.benchmarks import contenders
from tests.benchmarks.contenders import Contender, Job, get, part_of, s3_of


def pretrained(job: Job, state: Mapping[str, DTensor]) -> None:
    """Download; then every rank makes the whole model and distributes it, as OLMo-core's `load_hf_model` does."""
    get(job)
    whole = AutoModelForCausalLM.from_pretrained(job.scratch, dtype=torch.bfloat16).state_dict()
    for key, tensor in state.items():
        placed = distribute_tensor(whole[key], tensor.device_mesh, tensor.placements)
        tensor.to_local().copy_(placed.to_local())


def sharded(job: Job, state: MutableMapping[str, torch.Tensor]) -> None:
    """Download; then every rank makes its shards alone, with transformers' own TP or FSDP.

    TP is as the model's plan has it, so these take the place of `state`.
    """
    get(job)
    mesh = next(each.device_mesh for each in state.values() if isinstance(each, DTensor))
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
    config = DistributedConfig(
        tp_size=sizes.get("tp", 1), fsdp_size=sizes.get("dp_shard", 1), dp_replicate_size=sizes.get("dp_replicate", 1)
    )
    model = AutoModelForCausalLM.from_pretrained(job.scratch, dtype=torch.bfloat16, distributed_config=config)
    found = model.state_dict()
    for key in state:
        state[key] = found[key]


def streamer(job: Job, state: Mapping[str, DTensor]) -> None:
    _stream(job, state, is_distributed=False)


def distributed_streamer(job: Job, state: Mapping[str, DTensor]) -> None:
    _stream(job, state, is_distributed=True)


def _stream(job: Job, state: Mapping[str, DTensor], *, is_distributed: bool) -> None:
    """Run:ai's model streamer brings every rank all tensors; each keeps its part. It must hold the largest."""
    largest = max(tensor.numel() * tensor.element_size() for tensor in state.values())
    os.environ |= {
        "AWS_ENDPOINT_URL": job.storage_options["client_kwargs"]["endpoint_url"],
        "AWS_ACCESS_KEY_ID": job.storage_options["key"],
        "AWS_SECRET_ACCESS_KEY": job.storage_options["secret"],
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        "RUNAI_STREAMER_MEMORY_LIMIT": str(max(job.budget, largest)),
        "RUNAI_STREAMER_DIST": "1",
        "RUNAI_STREAMER_DIST_GLOBAL": "1",  # all ranks share out what is read, not those of each host
        "RUNAI_STREAMER_LOG_LEVEL": "WARNING",
    }
    from runai_model_streamer import SafetensorsStreamer

    paths = [f"s3://{path}" for path in s3_of(job).ls(job.uri, detail=False) if path.endswith(".safetensors")]
    with SafetensorsStreamer() as files:
        files.stream_files(paths, device="cpu", is_distributed=is_distributed)
        for key, whole in files.get_tensors():
            state[key].to_local().copy_(whole[part_of(state[key])])


ALL: dict[str, Contender] = {
    "loader, share=world": contenders.shared,
    "loader, share=node": contenders.by_node,
    "loader, share=none": contenders.alone,
    "s3fs, own slices": contenders.slices,
    "obstore, own slices": contenders.obstore_slices,
    "s3fs get, dcp.load": contenders.download,
    "s3fs get, from_pretrained": pretrained,
    "s3fs get, transformers TP/FSDP": sharded,
    "Run:ai streamer": streamer,
    "Run:ai, distributed": distributed_streamer,
}

_PACKAGES = {
    sharded: ("accelerate",),
    contenders.obstore_slices: ("obstore",),
    streamer: ("runai_model_streamer", "runai_model_streamer_s3"),
    distributed_streamer: ("runai_model_streamer", "runai_model_streamer_s3"),
}


REMEDY = "pip install '.[test,bench]'"
"""All of them; those who run benchmarks have the first, for the S3 server."""


def not_run(name: str) -> str | None:
    """Why this contender cannot be run here, and what helps; None where it can."""
    lacks = next((each for each in _PACKAGES.get(ALL[name], ()) if importlib.util.find_spec(each) is None), None)
    return lacks and f"{name}: not run, for there is no package {lacks}: {REMEDY}"
