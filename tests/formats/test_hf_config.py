"""`config.json`: what the loader looks at is of its kind, or the field is told."""

from __future__ import annotations

import json

import pytest

from loader.errors import CatalogError
from loader.formats.hf_config import parse_config, vocab_size


@pytest.mark.parametrize("value", ["x", 3, ["x"], [{}], {"a": 1}, True])
@pytest.mark.parametrize(
    "name", ["architectures", "model_type", "auto_map", "text_config", "quantization_config", "compression_config"]
)
@pytest.mark.parametrize("within", [False, True])
def test_a_field_of_another_kind_is_named(name, value, within):
    right = {"architectures": ["x"], "model_type": "x"}.get(name, {"a": 1})
    fields = {"text_config": {name: value}} if within else {name: value}
    data = json.dumps(fields).encode()
    if value == right:
        assert parse_config(data, file="config.json") == fields
        return
    where = "config.json: text_config" if within else "config.json"
    with pytest.raises(CatalogError, match=f"^{where}: {name} should be .*, found "):
        parse_config(data, file="config.json")


def test_null_is_as_good_as_nothing():
    fields = {"architectures": None, "text_config": None, "quantization_config": None}
    assert parse_config(json.dumps(fields).encode(), file="f") == fields


@pytest.mark.parametrize(
    ("fields", "size"),
    [({"vocab_size": 5}, 5), ({"text_config": {"vocab_size": 7}}, 7), ({"vocab_size": "9"}, None), ({}, None)],
)
def test_the_vocabulary(fields, size):
    assert vocab_size(fields) == size
