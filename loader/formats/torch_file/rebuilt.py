"""What a tensor is, from how its pickle would rebuild it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from loader.errors import CatalogError
from loader.formats.strict_json import quote
from loader.formats.torch_file.machine import Call, Dict, Global, Persistent
from loader.formats.torch_file.storages import DTYPES, MAX, RESAVE, kind_of, naturals, storage_of

MAX_DIMS = 64

_UNSUPPORTED = {
    "_rebuild_qtensor": ("quantized", "save tensor.dequantize() in its place"),
    "_rebuild_sparse_tensor": ("sparse", "save tensor.to_dense() in its place"),
    "_rebuild_nested_tensor": ("nested", "save tensor.to_padded_tensor(...) in its place"),
    "_rebuild_meta_tensor_no_storage": ("meta", "it has no data: give the model memory and weights before saving"),
}


class Strided(NamedTuple):
    """A tensor of a state dict: element (i, j, ...) is element `offset + i * strides[0] + j * strides[1] + ...` of its
    storage, counted in the tensor's dtype."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + 1


def strided(key: str, call: Call, file: str) -> Strided:
    """What a tensor is, from how it would be rebuilt: the signatures are those of torch/_utils.py."""
    call = _unwrapped(call)
    name, args = call.name.rpartition(".")[2], call.args
    if name in _UNSUPPORTED:
        kind, remedy = _UNSUPPORTED[name]
        raise _refused(file, key, f"a {kind} tensor cannot be loaded by ranges: {remedy}")
    if name == "_rebuild_tensor" and len(args) == 4:
        return _located(key, args[:4], None, file)
    if name == "_rebuild_tensor_v2" and len(args) in (6, 7):
        return _located(key, args[:4], None, file, *args[6:])
    if name == "_rebuild_tensor_v3" and len(args) in (7, 8) and isinstance(args[6], Global):
        return _located(key, args[:4], args[6], file, *args[7:])
    raise _refused(file, key, f"{quote(call.name)} makes a kind of tensor that cannot be loaded by ranges. {RESAVE}")


def _unwrapped(call: Call) -> Call:
    """The tensor that a parameter, or a tensor with attributes, is made of: at most one in the other, by torch."""
    for _ in range(3):
        name, args = call.name.rpartition(".")[2], call.args
        if name in ("_rebuild_parameter", "_rebuild_parameter_with_state", "Parameter") and args:
            inner = args[0]
        elif name == "_rebuild_from_type_v2" and len(args) == 4 and args[1] in _PLAIN and isinstance(args[0], Global):
            inner = Call(args[0].name, args[2])
        else:
            break
        if not isinstance(inner, Call) or not isinstance(inner.args, tuple):
            break
        call = inner
    return call


_PLAIN = (Global("torch.Tensor"), Global("torch.nn.parameter.Parameter"))


def is_tensor(value: Any) -> bool:
    if not isinstance(value, Call):
        return False
    module, _, name = value.name.rpartition(".")
    return name.startswith("_rebuild") or name in ("Parameter", "Buffer") or (module + name).endswith("Tensor")


def _located(key: str, args: Sequence[Any], named: Global | None, file: str, metadata: Any = None) -> Strided:
    stored, offset, shape, strides = args
    if not isinstance(stored, Persistent):
        raise _refused(file, key, f"expected a storage, found {kind_of(stored)}. {RESAVE}")
    if isinstance(metadata, Dict) and any(value is not False for _, value in metadata.pairs):
        raise _refused(file, key, "it is conjugated or negated lazily: save tensor.resolve_conj().resolve_neg()")
    storage, dtype, base = storage_of(stored, file)
    dtype = _dtype(named.name, file, key) if named else dtype
    if dtype is None:
        raise _refused(file, key, f"its dtype cannot be loaded by ranges: save it in one of {', '.join(DTYPES)}")
    shape, strides = _size(shape), _size(strides)
    if not naturals(shape) or not naturals(strides) or len(shape) != len(strides) or not naturals((offset,)):
        told = f"shape {quote(shape)}, strides {quote(strides)} and offset {quote(offset)}"
        raise _refused(file, key, f"{told} are no such. {RESAVE}")
    if len(shape) > MAX_DIMS:
        raise _refused(file, key, f"it has {len(shape)} dims. {RESAVE}")
    tensor = Strided(key, dtype, shape, strides, offset, storage.key)
    if base % dtype.itemsize or math.prod(max(n, 1) for n in shape) > MAX:
        raise _refused(file, key, f"shape {quote(shape)} overflows, or its storage is cut between elements. {RESAVE}")
    tensor = tensor._replace(
        offset=offset + base // dtype.itemsize if tensor.numel else 0
    )  # torch takes any offset then
    if tensor.numel and tensor.stop * dtype.itemsize > storage.nbytes:
        raise _refused(
            file,
            key,
            f"shape {quote(shape)} with strides {quote(strides)} from element {tensor.offset} on ends at byte "
            f"{tensor.stop * dtype.itemsize}, but its storage has {storage.nbytes} bytes. {RESAVE}",
        )
    return tensor


def _dtype(name: str, file: str, key: str) -> torch.dtype:
    if name not in DTYPES:
        raise _refused(
            file, key, f"dtype {quote(name)} cannot be loaded by ranges: save it in one of {', '.join(DTYPES)}"
        )
    return DTYPES[name]


def _size(value: Any) -> Any:
    """torch.Size, which some versions wrote as a call."""
    called = isinstance(value, Call) and value.name == "torch.Size" and len(value.args) == 1
    return value.args[0] if called else value


def _refused(file: str, key: str, what: str) -> CatalogError:
    return CatalogError(f"{file}: key {quote(key)}: {what}.")
