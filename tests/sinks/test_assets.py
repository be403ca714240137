from collections.abc import Callable
from functools import partial
from pathlib import Path

import fsspec
import pytest

from loader.errors import CatalogError, SinkError
from loader.sinks import assets
from loader.store.base import Access
from loader.store.source import read_whole
from loader.store.store import Store

ASSETS = [
    "added_tokens.json", "chat_template.jinja", "config.json", "generation_config.json", "merges.txt",
    "preprocessor_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "vocab.json", "vocab.txt",
]  # fmt: skip
OTHERS = [
    "README.md",
    "model.safetensors",
    "model.safetensors.index.json",
    "modeling.py",
    "pytorch_model.bin",
    "onnx_config.json",
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    for name in ASSETS + OTHERS:
        (directory / name).write_text(f"this is {name}")
    return directory


def reading(directory: Path) -> Callable[[str, int], bytes]:
    return partial(read_whole, Store(Access(str(directory), {}, 1, 5.0), retries=0, deadline=60))


def test_config_and_tokenizer_are_copied_and_nothing_else(source: Path, tmp_path: Path):
    target = tmp_path / "target"
    target.mkdir()
    assert assets.copy(reading(source), ASSETS + OTHERS, str(target)) == ASSETS
    assert {file.name: file.read_text() for file in target.iterdir()} == {name: f"this is {name}" for name in ASSETS}


def test_to_a_bucket(source: Path, s3, monkeypatch):
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    target = s3.prefix()
    assert assets.copy(reading(source), ["config.json"], f"{target}/") == ["config.json"]
    assert fsspec.open(f"{target}/config.json").open().read() == b"this is config.json"


def test_a_file_that_is_missing_or_far_too_large_is_an_error(source: Path, tmp_path: Path):
    with pytest.raises(CatalogError, match=r"no file tokenizer_2\.json; there are .*config\.json"):
        assets.copy(reading(source), ["tokenizer_2.json"], str(tmp_path))
    with (source / "tokenizer.json").open("wb") as file:
        file.truncate(assets.LIMIT + 1)
    with pytest.raises(CatalogError, match=r"tokenizer\.json: 134217729 bytes"):
        assets.copy(reading(source), ["tokenizer.json"], str(tmp_path))


def test_a_target_that_cannot_be_written_is_an_error(source: Path, tmp_path: Path):
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(SinkError, match=r"config\.json cannot be copied to .*/file: NotADirectoryError"):
        assets.copy(reading(source), ["config.json"], str(tmp_path / "file"))
