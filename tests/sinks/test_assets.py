from pathlib import Path

import pytest

from loader.errors import SinkError
from loader.sinks import assets

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


def test_config_and_tokenizer_are_copied_and_nothing_else(source: Path, tmp_path: Path):
    target = tmp_path / "target"
    target.mkdir()
    assert assets.copy(str(source), {}, ASSETS + OTHERS, str(target)) == ASSETS
    assert {file.name: file.read_text() for file in target.iterdir()} == {name: f"this is {name}" for name in ASSETS}


def test_from_a_bucket_with_options_to_a_bucket_without(source: Path, s3, monkeypatch):
    uri = s3.put(source)
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    target = s3.prefix()
    assert assets.copy(f"{uri}/", s3.storage_options, ["config.json"], f"{target}/") == ["config.json"]
    assert assets.copy(target, {}, ["config.json"], str(source)) == ["config.json"]
    assert (source / "config.json").read_text() == "this is config.json"


def test_a_file_that_is_missing_or_far_too_large_is_an_error(source: Path, tmp_path: Path):
    with pytest.raises(SinkError, match=r"tokenizer_2.json cannot be copied .*FileNotFoundError"):
        assets.copy(str(source), {}, ["tokenizer_2.json"], str(tmp_path))
    with (source / "tokenizer.json").open("wb") as file:
        file.truncate(assets.LIMIT + 1)
    with pytest.raises(SinkError, match=r"tokenizer.json cannot be copied .*more than \d+ bytes"):
        assets.copy(str(source), {}, ["tokenizer.json"], str(tmp_path))
