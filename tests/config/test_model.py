"""The sections built from keywords, as `loader.load(..., **read)` does."""

import json

import pytest
from pydantic import BaseModel, ValidationError

from loader.config import Config, Model, Output, Read, Source
from loader.errors import ConfigError


def test_read_takes_the_values_of_the_yaml_as_keywords():
    read = Read(memory_budget="64MiB", timeout="3s", share="node")
    assert (read.memory_budget, read.timeout, read.share) == (64 * 2**20, 3.0, "node")
    assert (read.range_size, read.deadline, read.concurrency, read.retries, read.backend) == (
        2**23,
        1800.0,
        16,
        8,
        "auto",
    )


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"memory_bugdet": 1}, "memory_bugdet: unknown key; did you mean 'memory_budget'?"),
        ({"share": "all"}, "share: should be 'world', 'node' or 'none', found \"all\""),
        ({"retries": "8"}, 'retries: should be a whole number, found "8"'),
        ({"concurrency": 0}, "concurrency: should be greater than or equal to 1, found 0"),
        ({"memory_budget": "1MiB"}, "memory_budget: should be at least 8MiB, found 1048576 bytes"),
        ({"range_size": 1}, "range_size: should be at least 64KiB, found 1 bytes"),
    ],
)
def test_a_bad_keyword_is_a_config_error_that_names_it(keywords, message):
    with pytest.raises(ConfigError) as caught:
        Read(**keywords)
    assert caught.value.message == message


def test_sections_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Read().share = "node"


def test_an_error_of_a_section_inside_another_keeps_its_path():
    with pytest.raises(ConfigError) as caught:
        Config(source={"uri": "x"}, read={"share": "all"})
    assert caught.value.message.startswith("read.share: ")


def test_repr_and_dump_hold_no_storage_options():
    config = Config(source=Source(uri="s3://b/m", storage_options={"secret": "hunter2"}))
    assert config.source.storage_options == {"secret": "hunter2"}
    for text in (repr(config), str(config), repr(config.source), repr(config.model_dump())):
        assert "hunter2" not in text


def test_every_key_describes_itself_in_the_schema():
    schema = json.loads(json.dumps(Config.model_json_schema()))
    sections = [schema, *schema["$defs"].values()]
    assert {section["title"] for section in sections} >= {"Config", "Source", "Model", "Read", "Output", "Placement"}
    for section in sections:
        assert all(key["description"] for key in section["properties"].values())
        assert section["additionalProperties"] is False


def test_the_sections_are_those_of_the_contract():
    def keys(section: type[BaseModel]) -> list[str]:
        return list(section.model_fields)

    proof = ["verify", "expect"]  # the library's too, so they come first
    assert keys(Config) == [
        *proof,
        "source",
        "model",
        "mesh",
        "placements",
        "convert",
        "read",
        "output",
        "report",
        "trace",
    ]
    assert keys(Source) == ["uri", "storage_options", "ignore", "strip_prefix", "revision"]
    model = ["builder", "dtype", "dtype_rules", "device", "vocabulary", "initialise", "dequantize"]
    assert keys(Model) == [*model, "trust_remote_code"]
    assert keys(Output) == ["entrypoint", "checkpoint", "local", "if_exists"]
