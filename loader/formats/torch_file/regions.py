"""Tensors in storages to catalog entries: bytes that several tensors share are one entry, of which they are views.

What no tensor of the state dict uses is in no entry, or in one of which it is not needed: it is not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from loader.formats.torch_file.rebuilt import Strided
from loader.formats.torch_file.storages import Storage
from loader.plan.catalog import Contents, Entry, View
from loader.plan.geometry import is_row_major, steps, strided_box


def lay_out(
    tensors: Iterable[Strided], starts: Mapping[str, int], storages: Mapping[str, Storage], file_number: int
) -> Contents:
    """Entries, in the order of their bytes, and views. `starts` are the bytes of the file where the storages begin."""
    together: dict[tuple[str, object], list[Strided]] = {}
    for tensor in tensors:
        together.setdefault((tensor.storage, tensor.dtype), []).append(tensor)
    entries: dict[str, Entry] = {}
    views: dict[str, View] = {}
    for group in together.values():
        first = group[0]
        count = storages[first.storage].nbytes // first.dtype.itemsize
        for cluster in _overlapping(group):
            name, shape, base, seen = _region(cluster, count)
            start = starts[first.storage] + base * first.dtype.itemsize
            entry = Entry(first.dtype, shape, file_number, start, start)
            entries[name] = entry._replace(stop=start + entry.numel * first.dtype.itemsize)
            views |= seen
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop))
    return Contents(dict(ordered), views)


def _overlapping(tensors: Sequence[Strided]) -> list[list[Strided]]:
    """Tensors between whose first and last elements another's lie, together."""
    clusters: list[list[Strided]] = [[tensor] for tensor in tensors if not tensor.numel]
    end = -1
    for tensor in sorted((t for t in tensors if t.numel), key=lambda t: t.offset):
        if tensor.offset < end:
            clusters[-1].append(tensor)
        else:
            clusters.append([tensor])
        end = max(end, tensor.stop)
    return clusters


def _region(cluster: Sequence[Strided], count: int) -> tuple[str, tuple[int, ...], int, dict[str, View]]:
    """The entry's key, shape and first element in the storage, which has `count` of them; and the views of it."""
    low, stop = min(tensor.offset for tensor in cluster), max(tensor.stop for tensor in cluster)
    whole = next(
        (
            t
            for t in cluster
            if t.offset == low and (t.stop == stop or not t.numel) and is_row_major(t.shape, t.strides)
        ),
        None,
    )
    if whole is not None:
        name, shape, base = whole.key, whole.shape, low
    else:
        name = cluster[0].key
        base, shape = _frame(max(cluster, key=lambda tensor: tensor.numel), low, stop, count)
    views = {t.key: View(name, t.shape, t.offset - base, t.strides) for t in cluster if t is not whole}
    return name, shape, base, views


def _frame(lead: Strided, low: int, stop: int, count: int) -> tuple[int, tuple[int, ...]]:
    """A row-major tensor in which `lead` is a box, over elements [low, stop) at least: its first element and shape.

    x[:, 10:] of [100, 20] is the columns from 10 on of a tensor [100, 20] that begins 10 elements before it. Where
    there is no such tensor in the storage, all is one row.
    """
    dims = steps(lead.shape, lead.strides)
    strides = [stride for _, stride in dims]
    if dims and all(a % b == 0 for a, b in zip(strides, [*strides[1:], 1], strict=True)):
        row = strides[0]
        inner = tuple(a // b for a, b in zip(strides, [*strides[1:], 1], strict=True))
        inner = inner if inner[-1] > 1 else inner[:-1]
        for base in (low, low - low % row, count - -(-(stop - low) // row) * row):
            rows = -(-(stop - base) // row)
            fits = 0 <= base <= low and base + rows * row <= count
            if fits and strided_box((rows, *inner), lead.offset - base, dims) is not None:
                return base, (rows, *inner)
    return low, (stop - low,)
