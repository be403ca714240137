"""Checkpoints as torch.save writes them, and the same zip archives put together by hand."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loader.formats.torch_file import TorchFile, read_torch_file
from loader.formats.torch_file.ranges import Span
from loader.plan.catalog import View
from loader.plan.geometry import contiguous_strides

INDEX = "pytorch_model.bin.index.json"
ONE = "pytorch_model.bin"


def saved(value: Any, **options: Any) -> bytes:
    """What torch.save writes; `_use_new_zipfile_serialization=False` for the legacy format."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def save_sharded(directory: Path, tensors: Mapping[str, torch.Tensor], files: int) -> None:
    """As transformers 4 wrote it: keys dealt out in turn, and an index."""
    names = [f"pytorch_model-{n:05}-of-{files:05}.bin" for n in range(1, files + 1)]
    weight_map = {key: names[n % files] for n, key in enumerate(tensors)}
    for name in names:
        torch.save({key: tensors[key] for key, file in weight_map.items() if file == name}, directory / name)
    content = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(content))


class Reads:
    """Serves ranges of `data` and keeps which."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.spans: list[Span] = []

    def __call__(self, spans: Sequence[Span]) -> list[bytes]:
        assert all(0 <= start < stop <= len(self.data) for start, stop in spans)
        self.spans += spans
        return [self.data[start:stop] for start, stop in spans]


def catalogued(data: bytes) -> TorchFile:
    return read_torch_file(Reads(data), file="f.bin", file_number=0, size=len(data))


def tensors_of(data: bytes, found: TorchFile) -> dict[str, torch.Tensor]:
    """Every key as catalogued, from its bytes."""
    made = {}
    for key, what in {**found.contents.entries, **found.contents.views}.items():
        entry = found.contents.entries[what.entry] if isinstance(what, View) else what
        assert 0 <= entry.start <= entry.stop <= len(data)
        flat = torch.frombuffer(bytearray(data[entry.start : entry.stop]) + b"\0", dtype=torch.uint8)[:-1]
        flat = flat.clone().view(entry.dtype)
        strides, offset = (what.strides, what.offset) if isinstance(what, View) else (contiguous_strides(what.shape), 0)
        made[key] = flat.as_strided(what.shape, strides, offset)
    return made


def records(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def zipped(content: Mapping[str, bytes], *, compression: int = zipfile.ZIP_STORED, zip64: bool = False) -> bytes:
    """An archive of these records, as Python's zipfile writes it: not aligned; zip64's extra fields where asked."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in content.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            with archive.open(info, "w", force_zip64=zip64) as record:
                record.write(data)
    return file.getvalue()
