"""The reference of the config's keys, which README shows."""

import subprocess
import sys

import pytest

from loader.config import Config, Placement, Read, parse
from loader.config.model import DtypeRule, Model, Output, Source, Vocabulary
from loader.config.reference import reference
from loader.config.section import Section
from tests.processes import ROOT

SECTIONS = {
    "source": Source,
    "model": Model,
    "model.dtype_rules[]": DtypeRule,
    "model.vocabulary": Vocabulary,
    "placements[]": Placement,
    "read": Read,
    "output": Output,
}


@pytest.fixture(scope="module")
def rows():
    """Of each key: its type, default and meaning."""
    lines = [line.strip("| ").split(" | ") for line in reference().splitlines()[2:]]
    return {name.strip("`"): rest for name, *rest in lines}


def test_every_key_is_there_once_with_what_it_does(rows):
    inner = {f"{place}.{name}": field for place, section in SECTIONS.items() for name, field in fields(section)}
    keys = {name: field for name, field in {**dict(fields(Config)), **inner}.items() if name not in SECTIONS}
    assert rows.keys() == keys.keys()
    assert len(reference().splitlines()) == 2 + len(rows)
    for name, (_, _, meaning) in rows.items():
        assert meaning == keys[name].description


def fields(section: type[Section]):
    return section.model_fields.items()


def test_types_and_defaults_are_as_one_writes_them(rows):
    told = {name: (kind, default) for name, (kind, default, _) in rows.items()}
    assert told["source.uri"] == ("text", "*needed*")
    assert told["model.builder"] == ("`transformers` or package.module:function or null", "`transformers`")
    assert told["mesh"] == ("mapping", "`{dp_shard: -1}`")
    assert told["source.strip_prefix"] == ("text", '`""`')
    assert told["model.dtype_rules"] == ("list of mappings", "`[]`")
    assert told["model.dtype_rules[].dtype"] == ("dtype", "*needed*")
    assert told["read.share"] == ("`world`, `node`, `none`", "`world`")
    assert told["read.retries"] == ("number", "`8`")
    assert told["read.memory_budget"] == ("size", "`512MiB`")
    assert told["read.deadline"] == ("duration", "`30min`")
    assert told["verify"] == ("`fingerprint`, `checksum` or null", "`null`")


def test_the_defaults_as_they_are_written_are_the_defaults(rows, tmp_path):
    """A config that sets every key to what the reference says it is anyway."""
    defaults = {name: default.strip("`") for name, (_, default, _) in rows.items() if default != "*needed*"}
    path = tmp_path / "cfg.yaml"
    path.write_text("source: {uri: s3://a}\n")
    assert parse(str(path), [f"{name}={default}" for name, default in defaults.items()]) == parse(str(path))


def test_the_readme_has_it():
    command = [sys.executable, "-m", "loader.config"]
    printed = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert f"\n{printed}\n" in (ROOT / "README.md").read_text(), "put what `python -m loader.config` prints there"
