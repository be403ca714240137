import json
import tracemalloc

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.errors import CatalogError
from loader.formats.safetensors import _DTYPES, HEAD, MAX_HEADER, header_length, parse_header

DTYPES = {name: dtype for name, dtype in _DTYPES.items() if dtype}


def framed(header, data=b"", pad=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text + pad).to_bytes(8, "little") + text + pad + data


def parse(content, *, size=None, file_number=0):
    size = len(content) if size is None else size
    length = header_length(content[:8], "f.safetensors", size)
    return parse_header(content[:length], file="f.safetensors", file_number=file_number, size=size)


def refused_by_the_library(content):
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return True
    return False


@st.composite
def state_dicts(draw):
    keys = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), unique=True, max_size=6))
    shapes = st.lists(st.integers(0, 4), max_size=4)
    result = {}
    for key in keys:
        if key == "__metadata__":
            continue
        name, shape = draw(st.sampled_from(sorted(DTYPES))), draw(shapes)
        if name == "F4":
            shape = [*shape, 2]
        bits = torch.arange(torch.Size(shape).numel() * DTYPES[name].itemsize) % 2
        result[key] = bits.to(torch.uint8).view(DTYPES[name]).reshape(shape)
    return result


@given(state_dicts())
@settings(max_examples=100, deadline=None)
def test_what_the_library_writes_is_read_back(tensors):
    content = safetensors.torch.save(tensors, metadata={"format": "pt"})
    entries = parse(content, file_number=3)
    assert entries.keys() == tensors.keys()
    assert [e.start for e in entries.values()] == sorted(e.start for e in entries.values())
    for key, tensor in tensors.items():
        entry = entries[key]
        assert (entry.dtype, entry.shape, entry.file) == (tensor.dtype, tuple(tensor.shape), 3)
        assert content[entry.start : entry.stop] == bytes(tensor.reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_dtype_and_shape_are_those_that_the_library_loads(name, tmp_path):
    """Shapes from the library's own reader: F4 has two elements a byte, and torch counts the pairs."""
    path = tmp_path / "f.safetensors"
    header = {"k": {"dtype": name, "shape": [3, 16], "data_offsets": [0, 3 * 16 * DTYPES[name].itemsize]}}
    if name == "F4":
        header["k"]["data_offsets"] = [0, 24]
    content = framed(header, bytes(header["k"]["data_offsets"][1]))
    path.write_bytes(content)
    with safetensors.safe_open(path, "pt") as file:
        tensor = file.get_tensor("k")
    entry = parse(content)["k"]
    assert (entry.dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape))
    assert entry.numel * entry.dtype.itemsize == entry.stop - entry.start


def test_every_dtype_of_the_library_is_known():
    """The library's own error lists what it knows: a new one there must be decided on here."""
    with pytest.raises(safetensors.SafetensorError) as error:
        safetensors.deserialize(framed({"k": {"dtype": "?", "shape": [], "data_offsets": [0, 0]}}))
    known = str(error.value).split("one of ", 1)[1].split(" at line")[0]
    assert {name.strip("` ") for name in known.split(",")} <= set(_DTYPES)


def test_order_is_by_offset_and_empty_tensors_stand_anywhere():
    def info(shape, start, stop):
        return {"dtype": "U8", "shape": shape, "data_offsets": [start, stop]}

    header = {"b": info([3], 2, 5), "none": info([0, 7], 2, 2), "scalar": info([], 5, 6), "a": info([2], 0, 2)}
    content = framed({**header, "last": info([0], 6, 6)}, bytes(6), pad=b"   ")
    data = len(content) - 6
    assert not refused_by_the_library(content)
    entries = parse(content)
    assert list(entries) == ["a", "none", "b", "scalar", "last"]
    assert (entries["b"].start, entries["b"].stop) == (data + 2, data + 5)
    assert entries["scalar"].shape == ()


def test_a_file_without_tensors_and_a_null_metadata_are_legal():
    for header in ({}, {"__metadata__": None}, {"__metadata__": {}}):
        assert not refused_by_the_library(framed(header))
        assert parse(framed(header)) == {}


def test_the_speculative_head_may_hold_more_than_the_header():
    content = safetensors.torch.save({"k": torch.arange(9)})
    assert parse_header(content[:HEAD], file="f", file_number=0, size=len(content)) == parse(content)


def one(key="k", **claims):
    return {key: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **claims}}


LIES = [
    # (header, bytes of data, parts of the message)
    (b"{", 0, ["its header cannot be read as JSON"]),
    (b"", 0, ["cannot be read as JSON"]),
    (b'{"a\xff": 1}', 0, ["cannot be read as JSON", "0xff"]),
    (b"\xef\xbb\xbf{}", 0, ["cannot be read as JSON"]),
    (b"[]", 0, ["not a JSON object but []"]),
    (b"null", 0, ["not a JSON object but None"]),
    (b"[" * 100_000, 0, ["cannot be read as JSON", "recursion"]),
    (b'{"k": ' + b"9" * 5000 + b"}", 0, ["cannot be read as JSON", "limit"]),
    (b'{"k": NaN}', 0, ["NaN is not JSON"]),
    (json.dumps(one("\ud800")).encode(), 24, ["surrogates not allowed"]),
    (json.dumps(one())[:-1].encode() + b"," + json.dumps(one())[1:].encode(), 24, ["the name 'k' occurs twice"]),
    (b'{"k": {"dtype": "U8", "dtype": "U8", "shape": [], "data_offsets": [0, 1]}}', 1, ["'dtype' occurs twice"]),
    ({"__metadata__": {"format": 1}}, 0, ["__metadata__", "strings to strings", "{'format': 1}"]),
    ({"__metadata__": "pt"}, 0, ["__metadata__", "'pt'"]),
    ({"k": 7}, 0, ["key 'k'", "expected dtype, shape and data_offsets", "found 7"]),
    ({"k": {"dtype": "F32", "shape": []}}, 0, ["key 'k'", "expected dtype, shape and data_offsets"]),
    (one(strides=[3, 1]), 24, ["nothing else", "strides"]),
    (one(dtype="F33"), 24, ["key 'k'", "unknown dtype 'F33'", "F8_E8M0", "BF16"]),
    (one(dtype=["F32"]), 24, ["unknown dtype ['F32']"]),
    (one(dtype="F6_E2M3", shape=[4], data_offsets=[0, 3]), 3, ["torch", "has no dtype for 'F6_E2M3'"]),
    (one(dtype="F4", shape=[2, 3], data_offsets=[0, 3]), 3, ["F4", "last dim must be even", "[2, 3]"]),
    (one(dtype="F4", shape=[], data_offsets=[0, 0]), 0, ["last dim must be even"]),
    (one(shape=[-2, 3]), 24, ["shape of integers from 0", "[-2, 3]"]),
    (one(shape=[-2, -3]), 24, ["shape of integers from 0"]),
    (one(shape=[2, True]), 24, ["shape of integers from 0", "True"]),
    (one(shape=[2.0, 3]), 24, ["shape of integers from 0"]),
    (one(shape=6), 24, ["shape of integers from 0", "found 6"]),
    (b'{"k": {"dtype": "U8", "shape": [-0], "data_offsets": [0, 0]}}', 0, ["shape of integers from 0"]),
    (one(shape=[2**32, 2**32]), 24, ["overflows", str(2**32)]),
    (one(shape=[2**62, 4, 0], data_offsets=[0, 0]), 0, ["overflows"]),
    (one(shape=[2**61]), 24, ["overflows"]),
    (one(shape=[2**63]), 24, ["shape of integers from 0", "found [9223372036854775808]"]),
    (one(shape=[10**4000] * 200), 24, ["shape of integers from 0"]),
    (one(shape=[2**62] * 9000), 24, ["overflows"]),
    (one(data_offsets=[10**4000, 10**4000 + 24]), 24, ["data_offsets [start, stop]"]),
    (one(data_offsets=[0]), 24, ["data_offsets [start, stop]", "found [0]"]),
    (one(data_offsets=[0, 24, 24]), 24, ["data_offsets [start, stop]"]),
    (one(data_offsets=[24, 0]), 24, ["data_offsets [start, stop]", "found [24, 0]"]),
    (one(data_offsets=[False, 24]), 24, ["data_offsets [start, stop]"]),
    (one(data_offsets=["0", "24"]), 24, ["data_offsets [start, stop]"]),
    (one(data_offsets=[0, 20]), 20, ["F32 of shape [2, 3] takes 24 bytes", "data_offsets [0, 20] hold 20"]),
    (one(data_offsets=[4, 28]), 28, ["key 'k'", "the end of the header", "leaves a hole"]),
    ({**one(), **one("l", data_offsets=[32, 56])}, 56, ["key 'l'", "the end of key 'k'", "leaves a hole"]),
    ({**one(), **one("l", data_offsets=[23, 47])}, 47, ["key 'l'", "the end of key 'k'", "overlaps"]),
    ({**one(), **one("l")}, 24, ["key 'l'", "overlaps"]),
    (one(), 23, ["but the file has", "is cut short"]),
    (one(), 25, ["that no key describes"]),
    ({}, 1, ["that no key describes"]),
]


@pytest.mark.parametrize(("header", "nbytes", "parts"), LIES)
def test_a_header_that_lies_is_refused_by_name(header, nbytes, parts):
    with pytest.raises(CatalogError) as error:
        parse(framed(header, bytes(nbytes)))
    for part in ["f.safetensors: ", *parts]:
        assert part in error.value.message
    assert len(error.value.message) < 2000


@pytest.mark.parametrize(
    ("content", "size", "parts"),
    [
        (b"", 0, ["it has 0 bytes"]),
        (b"1234567", 7, ["it has 7 bytes"]),
        ((MAX_HEADER + 1).to_bytes(8, "little"), 10**12, ["100000001 bytes", "allows 100000000"]),
        (b"\xff" * 8, 10**12, ["allows 100000000"]),
        (b"version https://git-lfs.github.com/spec/v1\n", 130, ["a Git LFS pointer", "git lfs pull"]),
        (b"PK\x03\x04\x00\x00\x08\x08", 10**6, ["zip archive", "`.bin`"]),
        (b"<!DOCTYPE html>", 10**6, ["a web page"]),
        ((93).to_bytes(8, "little"), 100, ["should end at byte 101", "has 100 bytes"]),
    ],
)
def test_what_is_no_safetensors_file_is_told_from_its_first_bytes(content, size, parts):
    with pytest.raises(CatalogError) as error:
        header_length(content, "f.safetensors", size)
    for part in ["f.safetensors: ", *parts]:
        assert part in error.value.message


def test_the_largest_header_that_the_library_allows_is_allowed():
    assert header_length(MAX_HEADER.to_bytes(8, "little"), "f", 10**12) == MAX_HEADER + 8


def test_claimed_sizes_allocate_nothing():
    header = one(shape=[2**60], data_offsets=[0, 2**62])
    tracemalloc.start()
    try:
        entry = parse(framed(header), size=len(framed(header)) + 2**62)["k"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert entry.stop - entry.start == 2**62
    assert peak < 100_000


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 40)
    | st.sampled_from([2**31, 2**63, 2**64 - 1, 2**64, 1.0, 1e308, float("inf"), -0.0])
    | st.sampled_from([*_DTYPES, "", "\ud800", "é"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def mutated(draw):
    """A file that the library wrote, with a few claims of its header changed."""
    content = safetensors.torch.save(draw(state_dicts()), metadata=draw(st.sampled_from([None, {"format": "pt"}])))
    length = int.from_bytes(content[:8], "little") + 8
    header, data = json.loads(content[8:length]), content[length:]
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from([*header, "new", "__metadata__"]))
        info = header.setdefault(key, {})
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more", None]))
        if field is None or not isinstance(info, dict):
            header[key] = draw(JSON)
        elif isinstance(info.get(field), list) and info[field] and draw(st.booleans()):
            info[field][draw(st.integers(0, len(info[field]) - 1))] = draw(JSON)
        else:
            info[field] = draw(JSON)
    data += b"x" * draw(st.sampled_from([0, 0, 0, 1, 8]))
    return framed(header, data[: len(data) - draw(st.sampled_from([0, 0, 0, 1]))])


@given(mutated())
@settings(max_examples=300, deadline=None)
def test_what_is_accepted_the_library_accepts_too(content):
    try:
        parse(content)
    except CatalogError:
        return
    assert not refused_by_the_library(content)


@given(state_dicts(), st.data())
@settings(max_examples=300, deadline=None)
def test_corrupt_bytes_end_in_a_catalog_error_or_in_what_the_library_accepts(tensors, data):
    content = bytearray(safetensors.torch.save(tensors))
    interesting = st.integers(0, 255) | st.sampled_from(b'{}[]":,0123456789-\\ue.')
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(interesting)
    content = bytes(content[: data.draw(st.sampled_from([None, None, len(content) // 2]))])
    try:
        parse(content)
    except CatalogError:
        return
    assert not refused_by_the_library(content)


@given(st.binary(max_size=64))
@settings(max_examples=200, deadline=None)
def test_any_bytes_end_in_a_catalog_error_or_in_what_the_library_accepts(header):
    content = framed(header)
    try:
        parse(content)
    except CatalogError:
        return
    assert not refused_by_the_library(content)
