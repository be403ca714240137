"""Files of torch.save, catalogued from a few ranges, against what torch.load makes of them."""

from __future__ import annotations

import argparse
import collections
import io
import itertools
import os
import pickle
import struct
import tarfile
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.errors import CatalogError
from loader.formats.torch_file import machine, read_torch_file
from loader.formats.torch_file.pickled import unpickle
from loader.formats.torch_file.storages import DTYPES
from tests.checkpoints import random_tensor, same_bits
from tests.torch_files import Reads, catalogued, records, saved, tensors_of, zipped

LEGACY = {"_use_new_zipfile_serialization": False}


def layouts():
    """Tensors that are not what their storage is."""
    torch.manual_seed(0)
    fused, cube, embed, shifted = torch.randn(50, 6), torch.randn(7, 8, 9), torch.randn(30, 8), torch.randn(505)
    halves = torch.randn(50, 6)
    return {
        "plain": torch.randn(5, 3),
        "transposed": torch.randn(6, 4).t(),
        "square": torch.randn(5, 5).t(),
        "left columns": torch.randn(100, 20)[:, :10],
        "right columns": torch.randn(100, 20)[:, 10:],
        "rows": torch.randn(100, 20)[10:20],
        "shifted": shifted[5:].view(50, 10)[:, 4:],
        "box": cube.permute(2, 0, 1)[1:4, :, 2:5],
        "embed": embed,
        "head": embed,
        "expanded": torch.randn(1, 5, 1).expand(4, 5, 3),
        "steps": torch.randn(40)[::3],
        "windows": torch.arange(10.0).as_strided((4, 3), (2, 1)),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "no columns": torch.zeros(4, 0),
        "fused": fused,
        "fused rows": fused[10:20],
        "fused columns": fused[:, 2:4],
        "fused turned": fused.t(),
        "fused flat": fused.view(-1)[3:50],
        "fused other columns": fused[:, ::2],
        "first": halves[:30],
        "second": halves[20:],
    }


def assert_loads(data, expected):
    made = tensors_of(data, catalogued(data))
    whole = {key: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor) for key, tensor in expected.items()}
    made = {key: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor) for key, tensor in made.items()}
    assert {key: same_bits(tensor, made[key]) for key, tensor in whole.items()} == dict.fromkeys(expected, True)
    assert made.keys() == expected.keys()


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_every_layout(options):
    assert_loads(saved(layouts(), **options), layouts())


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_every_dtype(options):
    generator = torch.Generator().manual_seed(0)
    made = {name: random_tensor(dtype, (3, 5), generator) for name, dtype in DTYPES.items()}
    assert_loads(saved(made, **options), made)


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_every_pickle_protocol(options, protocol):
    """torch.load itself takes 2 alone, but what torch.save was asked to write is there to be loaded."""
    made = {"weight": torch.randn(3), "tied": torch.nn.Parameter(torch.randn(2, 2))}
    assert_loads(saved(made, pickle_protocol=protocol, **options), made)


def test_a_module_with_attributes_and_metadata():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    module[0].weight.shared = "a note"  # torch then pickles it by another function
    state = module.state_dict(keep_vars=True)
    assert state._metadata
    assert_loads(saved(state), dict(state))


def test_bytes_that_are_shared_are_one_entry():
    contents = catalogued(saved(layouts())).contents
    views = contents.views
    assert views["head"].entry == "embed"
    assert {view.entry for key, view in views.items() if key.startswith("fused")} == {"fused"}
    assert "fused" not in views
    assert {views["first"].entry, views["second"].entry} == {"first"}
    assert contents.entries["first"].shape == (50, 6)
    assert contents.entries["transposed"].shape == (6, 4)
    assert contents.entries["right columns"].shape == (100, 20)
    assert contents.entries["rows"].numel == 200  # and not the rest of the storage
    spans = sorted((e.start, e.stop) for e in contents.entries.values() if e.numel)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))
    assert list(contents.entries.values()) == sorted(contents.entries.values(), key=lambda e: (e.start, e.stop))


@pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "model", "module"])
def test_a_state_dict_among_other_things(name):
    state = {"weight": torch.randn(3), "version": 3, "_extra_state": [1, {"a": None}]}
    other = {"epoch": 7, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}, "args": ("a", 0.5, True)}
    data = saved({**other, name: collections.OrderedDict(state), "best": torch.tensor(0.5)})
    assert_loads(data, {"weight": state["weight"]})
    assert catalogued(data).left_out == [
        "'epoch'", "'optimizer'", "'args'", "'best'", "'version' in the state dict", "'_extra_state' in the state dict"
    ]  # fmt: skip


def test_what_is_read_is_little():
    """Directory, pickle and local headers; of the rest no more than 64 KiB, whatever lies between."""
    sizes = [1, 10, 100, 1000, 10_000, 100_000] * 30
    made = {f"layers.{n}.weight": torch.randn(size) for n, size in enumerate(sizes)}
    for options in ({}, LEGACY):
        data = saved(made, **options)
        reads = Reads(data)
        read_torch_file(reads, file="f", file_number=0, size=len(data))
        read = bytearray(len(data))
        for start, stop in reads.spans:
            read[start:stop] = b"\1" * (stop - start)
        weights = sum(sum(read[e.start : e.stop]) for e in catalogued(data).contents.entries.values())
        assert weights <= 64 * 1024
        assert len(reads.spans) < len(sizes) * 0.6
        assert sum(read) - weights < 100_000


# ---------------------------------------------------------------- archives by hand

WEIGHT = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.arange(3)}


def by_hand(changes=None, **options):
    content = {**records(saved(WEIGHT)), **(changes or {})}
    return zipped({name: data for name, data in content.items() if data is not None}, **options)


@pytest.mark.parametrize("zip64", [False, True])
@pytest.mark.parametrize(
    "without", [[], [".format_version", "byteorder", ".storage_alignment", ".data/serialization_id"]]
)
def test_old_and_unaligned_archives(zip64, without):
    assert_loads(by_hand({f"archive/{name}": None for name in without}, zip64=zip64), WEIGHT)


def test_a_directory_in_zip64():
    """As where a file has 4 GiB or more: every size and offset in the extra field, and the larger end records."""
    data = by_hand(zip64=True)
    start = data.index(b"PK\1\2")
    directory, count = b"", 0
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            extra = struct.pack("<HHQQQ", 1, 24, info.file_size, info.file_size, info.header_offset)
            name = info.filename.encode()
            directory += struct.pack(
                "<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 0x21, info.CRC, 2**32 - 1, 2**32 - 1,
                len(name), len(extra), 0, 0, 0, 0, 2**32 - 1,
            )  # fmt: skip
            directory += name + extra
            count += 1
    end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + len(directory), 1)
    last = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
    assert_loads(data[:start] + directory + end + locator + last, WEIGHT)


def test_a_comment_behind_the_directory():
    data = by_hand()
    assert_loads(data[:-2] + struct.pack("<H", 5) + b"hello", WEIGHT)


def moved(header):
    """Record 1 is said to begin at byte `header(data)`."""
    name = b"archive/data/1"
    forged = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 24, 24, len(name), 0) + name + bytes(24)
    wide = {"weight": torch.zeros(50), "bias": torch.arange(3)}
    data = zipped({**records(saved(wide)), "archive/data/0": forged.ljust(200, b"\0")})
    at = data.index(name, data.index(b"PK\1\2")) - 46 + 42
    return data[:at] + struct.pack("<I", header(data)) + data[at + 4 :]


class Hostile:
    """What it imports and would run is named by the error, and does not happen."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def tensor_pickle(*args):
    """A state dict whose one tensor is rebuilt from its storage with these arguments in the place of torch's."""
    stored = object()

    class Rebuilt:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (stored, *args)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", 6) if value is stored else None

    file = io.BytesIO()
    Pickler(file, protocol=2).dump({"weight": Rebuilt()})
    return by_hand({"archive/data.pkl": file.getvalue()})


REFUSED = {
    "deflated": (by_hand(compression=zipfile.ZIP_DEFLATED), ["data.pkl", "is compressed", "torch.save"]),
    "missing storage": (by_hand({"archive/data/1": None}), ["storage '1'", "no record 'archive/data/1'"]),
    "long storage": (by_hand({"archive/data/1": bytes(32)}), ["'archive/data/1' has 32 bytes", "says 24"]),
    "short storage": (by_hand({"archive/data/1": bytes(8)}), ["'archive/data/1' has 8 bytes", "says 24"]),
    "big endian": (by_hand({"archive/byteorder": b"big"}), ["byte order is b'big'"]),
    "no pickle": (by_hand({"archive/data.pkl": None}), ["no record 'archive/data.pkl'"]),
    "TorchScript": (by_hand({"archive/constants.pkl": b""}), ["TorchScript", "torch.jit.load"]),
    "overlap": (moved(lambda data: data.index(b"archive/data/1") - 30), ["'archive/data/0' overlaps 'archive/data/1'"]),
    "another record": (
        moved(lambda data: data.index(b"archive/data/0") - 30),
        ["the local header at byte", "another name than 'archive/data/1'"],
    ),
    "cut": (saved(WEIGHT)[:-100], ["its directory cannot be read"]),
    "empty": (b"", ["not a file of torch.save"]),
    "safetensors": (struct.pack("<Q", 2) + b"{}", ["not a file of torch.save"]),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\n", ["Git LFS pointer"]),
    "hostile": (saved({"w": torch.ones(2), "x": Hostile(os.system, "false")}), ["posix.system", "Nothing of it was"]),
    "hostile legacy": (saved({"x": Hostile(os.system, "false")}, **LEGACY), ["posix.system"]),
    "eval": (saved({"x": Hostile(eval, "1/0")}), ["builtins.eval"]),
    "hostile, protocol 4": (saved({"x": Hostile(os.system, "false")}, pickle_protocol=4), ["posix.system"]),
    "own class": (saved({"args": argparse.Namespace(a=1), "state_dict": WEIGHT}), ["argparse.Namespace"]),
    "whole module": (saved(torch.nn.Linear(2, 2)), ["torch.nn.modules.linear.Linear", "state_dict()"]),
    "no dict": (saved([torch.ones(2)]), ["expected a state dict, found a list"]),
    "no tensors": (saved({"a": 1, "b": {"w": torch.ones(2)}}), ["no tensors", "'b' (a Dict of tensors)"]),
    "number as key": (saved({3: torch.ones(2)}), ["should be text, found 3"]),
    "sparse": (saved({"k": torch.eye(3).to_sparse()}), ["key 'k'", "sparse", "to_dense"]),
    "quantized": (
        saved({"k": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)}),
        ["key 'k'", "quantized", "dequantize"],
    ),
    "nested tensor": (saved({"k": torch.nested.nested_tensor([torch.ones(2)])}), ["key 'k'", "nested"]),
    "meta": (saved({"k": torch.empty(3, device="meta")}), ["key 'k'", "meta"]),
    "conjugated": (saved({"k": torch.randn(3, dtype=torch.complex64).conj()}), ["key 'k'", "resolve_conj"]),
    "complex128": (saved({"k": torch.ones(3, dtype=torch.complex128)}), ["key 'k'", "dtype", "torch.float32"]),
    "beyond the storage": (tensor_pickle(0, (4, 3), (3, 1), False, {}), ["'weight'", "ends at byte 48"]),
    "beyond by strides": (tensor_pickle(0, (2, 3), (9, 1), False, {}), ["'weight'", "has 24 bytes"]),
    "negative stride": (tensor_pickle(3, (2, 3), (-3, 1), False, {}), ["'weight'", "(-3, 1)"]),
    "no numbers": (tensor_pickle(0, (2, "3"), (3, 1), False, {}), ["'weight'", "'3'"]),
    "overflow": (tensor_pickle(0, (2**62, 2**62), (0, 0), False, {}), ["'weight'", "overflows"]),
    "many dims": (tensor_pickle(0, (1,) * 65, (1,) * 65, False, {}), ["'weight'", "65 dims"]),
    "big endian legacy": (
        saved(WEIGHT, **LEGACY).replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
        ["not said to be little-endian"],
    ),
    "cut legacy": (saved(WEIGHT, **LEGACY)[:-1], ["its storages end at byte"]),
    "miscounted legacy": (
        saved({"w": torch.ones(3)}, **LEGACY)[:-20] + struct.pack("<Q", 4) + bytes(12),
        ["has 4 items of 4 bytes", "says 12 bytes"],
    ),
    "another pickle": (pickle.dumps(WEIGHT.keys().__len__(), protocol=2), ["not of torch.save"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_why(name):
    data, parts = REFUSED[name]
    with pytest.raises(CatalogError) as error:
        catalogued(data)
    for part in ["f.bin", *parts]:
        assert part in error.value.message
    assert error.value.message.isprintable()


def test_a_tar_archive_is_refused_with_how_to_save_it_again():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(CatalogError, match=r"tar archive.*torch.load.*save"):
        catalogued(file.getvalue())


# What torch's own unpickler would do: allocate, and hash for ever.
BOMBS = {
    "bytearray": pickle.PROTO + b"\2cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x10\x85R.",
    "tensor": pickle.PROTO + b"\2ctorch\nFloatTensor\n\x8a\x06\0\0\0\0\0\x10\x85R.",
    "nested key": pickle.PROTO + b"\2})" + b"\x85" * 200_000 + b"K\1s.",
    "memo": pickle.PROTO + b"\2}r\xff\xff\xff\xff.",
    "long string": pickle.PROTO + b"\2X\xff\xff\xff\xff.",
    "protocol 4 bytes": pickle.PROTO + b"\4\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "protocol 5 bytearray": pickle.PROTO + b"\5\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "doubling": pickle.PROTO + b"\2})q\0" + b"h\0h\0\x86q\0" * 100 + b"K\1s.",
    "parameters": pickle.PROTO
    + b"\2}X\1\0\0\0a"
    + b"ctorch._utils\n_rebuild_parameter\n" * 2000
    + b")\x85R" * 2000
    + b"s.",
}


def test_a_pickle_of_endless_steps_is_refused(monkeypatch):
    monkeypatch.setattr(machine, "MAX_STEPS", 1000)
    assert_loads(by_hand(), WEIGHT)
    with pytest.raises(CatalogError, match="more than 1000 steps"):
        catalogued(by_hand({"archive/data.pkl": pickle.PROTO + b"\2" + b"N0" * 500 + b"}."}))


@pytest.mark.parametrize("name", BOMBS)
def test_what_a_pickle_would_do_does_not_happen(name):
    data = by_hand({"archive/data.pkl": BOMBS[name]})
    try:
        assert catalogued(data).contents.entries == {}
    except CatalogError as error:
        assert error.message.isprintable()  # noqa: PT017 - either is right


@st.composite
def seen(draw):
    """A storage, and some views of it as torch makes them."""
    storage = torch.arange(draw(st.integers(1, 60)), dtype=torch.int16)
    views = {}
    for n in range(draw(st.integers(1, 4))):
        shape, strides, room = [], [], len(storage)
        for _ in range(draw(st.integers(0, 3))):
            size = draw(st.integers(1, 5))
            stride = draw(st.integers(0, max(0, (room - 1) // max(1, size - 1))))
            room -= (size - 1) * stride
            shape.append(size)
            strides.append(stride)
        views[f"view {n}"] = storage.as_strided(shape, strides, draw(st.integers(0, room - 1)))
    return views


@given(seen())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_views_at_random(views):
    assert_loads(saved(views), views)


@pytest.mark.parametrize(
    ("step", "told"), [(b"}", "lists and dicts"), (b"]", "lists and dicts"), (b"(", "in each other")]
)
def test_memory_that_a_pickle_takes_is_bounded(monkeypatch, step, told):
    """Each byte of these would take 60 to 120."""
    monkeypatch.setattr(machine, "MAX_EMPTY", 10_000)
    with pytest.raises(CatalogError, match=told):
        unpickle(io.BytesIO(pickle.PROTO + b"\2" + step * 20_000 + b"."), file="f")
