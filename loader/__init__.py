"""From a Hugging Face checkpoint in a bucket to every rank's own shards.

loader.load(model, "s3://models/llama-3-8b")     fill a model inside an existing process group
loader.attach(model, "/dev/shm/init")            take over what the init step left on this node (output.local)
dcp.load(…, storage_reader=loader.StorageReader("s3://…"))      where torch.distributed.checkpoint reads already
loader.fingerprint(model)                        what is in it, in 18 hex digits, the same for every mesh
torchrun -m loader.init_from_hf --config …       the same as the init step of a job
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loader import errors
    from loader.handover import attach
    from loader.library import fingerprint, iter_convert, load
    from loader.report import Report
    from loader.storage_reader import StorageReader

__all__ = ["Report", "StorageReader", "attach", "errors", "fingerprint", "iter_convert", "load"]

_HOMES = {
    "attach": "loader.handover",
    "load": "loader.library",
    "fingerprint": "loader.library",
    "iter_convert": "loader.library",
    "Report": "loader.report",
    "StorageReader": "loader.storage_reader",
}


def __getattr__(name: str) -> Any:
    """Import on first use: whoever wants one room need not wait for all."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "errors":
        return importlib.import_module("loader.errors")
    raise AttributeError(f"module 'loader' has no attribute {name!r}")
