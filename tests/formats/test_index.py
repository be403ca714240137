import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader.errors import CatalogError
from loader.formats.index import parse_index

NAME = "model.safetensors.index.json"


def parse(weight_map, **more):
    return parse_index(json.dumps({**more, "weight_map": weight_map}).encode(), file=NAME)


def test_the_weight_map_is_returned_in_order():
    weight_map = {"b": "model-00002-of-00002.safetensors", "a": "model-00001-of-00002.safetensors"}
    assert list(parse(weight_map, metadata={"total_size": 12}).items()) == list(weight_map.items())


def test_total_size_is_not_trusted():
    assert parse({"a": "f.safetensors"}, metadata={"total_size": "?"}) == {"a": "f.safetensors"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "my model (v2)+é.safetensors", "a..b.safetensors", ".hidden"])
def test_plain_names_are_allowed(name):
    assert parse({"a": name}) == {"a": name}


@pytest.mark.parametrize(
    "name",
    [
        *[
            "",
            ".",
            "..",
            "../f",
            "a/f",
            "/etc/passwd",
            "\\\\host\\f",
            "a\\f",
            "C:f",
            "s3://bucket/f",
            "https:f",
            "f::g",
        ],
        *["f\n", "\x00f", "\x1b[2Jf", " f", "f ", "f\u202eg", "f*", "f?", "f#12", "..%2ff", None, 3, True, ["f"], {}],
    ],
)
def test_what_could_point_elsewhere_is_refused(name):
    with pytest.raises(CatalogError) as error:
        parse({"fine": "f.safetensors", "model.norm": name})
    for part in [NAME, "'model.norm'", repr(name), "plain name"]:
        assert part in error.value.message
    assert error.value.message.isprintable()


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "cannot be read as JSON"),
        (b"\xff", "cannot be read as JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "`weight_map`"),
        (b'{"weight_map": {}}', "`weight_map`"),
        (b'{"weight_map": []}', "`weight_map`"),
        (b'{"weight_map": {"a": "f", "a": "g"}}', "'a' occurs twice"),
        (b'{"weight_map": {"a": "f"}, "weight_map": {"a": "f"}}', "'weight_map' occurs twice"),
        (b'{"weight_map": {"a": "\\ud800"}}', "surrogates"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a Git LFS pointer"),
        (b"<Error><Code>AccessDenied</Code></Error>", "access rights"),
    ],
)
def test_what_is_no_index_is_refused(data, part):
    with pytest.raises(CatalogError) as error:
        parse_index(data, file=NAME)
    assert error.value.message.startswith(f"{NAME}: ")
    assert part in error.value.message


@given(st.binary(max_size=40) | st.text().map(lambda text: json.dumps({"weight_map": {"a": text}}).encode()))
def test_any_bytes_end_in_a_catalog_error_or_in_plain_names(data):
    try:
        names = parse_index(data, file=NAME).values()
    except CatalogError:
        return
    assert all("/" not in name and "\\" not in name and name.isprintable() and name for name in names)
