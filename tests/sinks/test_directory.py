import uuid
from pathlib import Path

import pytest
import s3fs
from fsspec.core import url_to_fs

from loader.errors import ConfigError, SinkError
from loader.sinks import directory

COMPLETE = [".metadata", "__0_0_0.distcp", "__1_0_0.distcp", "config.json"]


@pytest.fixture(autouse=True)
def _no_remembered_client():
    """fsspec keeps a client for each set of options, and the environment is none of them."""
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["local", "s3", "gcs", "memory"])
def url(request, tmp_path: Path, monkeypatch) -> str:
    """A directory that does not exist yet."""
    if request.param == "local":
        return str(tmp_path / "out" / "checkpoint")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    server = request.getfixturevalue(request.param)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server.prefix()


def put(url: str, *names: str) -> None:
    fs, root = url_to_fs(url)
    directory.make(fs, root)
    for name in names:
        fs.pipe_file(f"{root}/{name}", b"old")


def names(url: str) -> list[str]:
    return directory._names(*url_to_fs(url))


def test_a_directory_is_absent_then_partial_then_complete_then_absent(url: str):
    assert directory.exists(url) == "absent"
    assert directory.prepare(url, "error")
    assert directory.exists(url) == "partial"
    put(url, *COMPLETE)
    directory.finish(url)
    assert directory.exists(url) == "complete"
    assert names(url) == COMPLETE
    directory.discard(url)
    assert directory.exists(url) == "absent"


def test_a_complete_checkpoint_is_refused_used_or_replaced(url: str):
    put(url, *COMPLETE)
    with pytest.raises(ConfigError, match=r"output.if_exists to use .* or overwrite"):
        directory.prepare(url, "error")
    assert not directory.prepare(url, "use")
    assert names(url) == COMPLETE
    assert directory.prepare(url, "overwrite")
    assert names(url) == [".incomplete", "config.json"]


@pytest.mark.parametrize("if_exists", ["error", "use", "overwrite"])
@pytest.mark.parametrize(
    "left", [["__0_0_0.distcp"], [".incomplete", "config.json", "tokenizer.json"], ["__3_12_0.distcp", ".metadata.tmp"]]
)
def test_a_partial_checkpoint_is_reclaimed(url: str, if_exists: str, left: list[str]):
    put(url, *left)
    assert directory.prepare(url, if_exists)
    assert names(url) == [".incomplete"]


@pytest.mark.parametrize("if_exists", ["error", "use", "overwrite"])
def test_other_files_are_refused_and_never_removed(url: str, if_exists: str):
    others = ["config.json", "notes.txt"]
    put(url, *others)
    with pytest.raises(ConfigError, match=r"other files \(config.json, notes.txt\) and no checkpoint"):
        directory.prepare(url, if_exists)
    directory.discard(url)
    assert names(url) == others
    put(url, ".metadata", "__0_0_0.distcp")
    assert directory.prepare(url, "overwrite")
    assert names(url) == [".incomplete", *others]


def test_nothing_is_left_of_a_failed_run(url: str):
    directory.prepare(url, "error")
    put(url, "config.json", "__0_0_0.distcp", ".metadata.tmp")
    directory.discard(url)
    directory.discard(url)
    assert names(url) == []
    assert "://" in url or not Path(url).exists()


def test_a_bucket_that_is_not_there_is_told_and_not_made(gcs, monkeypatch):
    for name, value in gcs.environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="gs://no-such-bucket/a cannot be used: FileNotFoundError"):
        directory.prepare("gs://no-such-bucket/a", "error")
    fs, _ = url_to_fs("gs://loader")
    assert not fs.exists("no-such-bucket")


def test_wrong_credentials_are_told_without_them(s3, monkeypatch):
    for name, value in (s3.environment | {"AWS_SECRET_ACCESS_KEY": "WRONG-SECRET"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="PermissionError") as caught:
        directory.prepare(s3.prefix(), "error")
    assert "WRONG" not in str(caught.value)


@pytest.mark.parametrize("url", ["{file}/checkpoint", "nosuch://me:SECRET@host/a"])
def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path: Path, url: str):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output.checkpoint: .* cannot be used") as caught:
        directory.prepare(url.format(file=tmp_path / "file"), "error")
    assert "SECRET" not in str(caught.value)


def test_a_store_that_does_not_answer_is_no_user_error(s3, monkeypatch):
    for name, value in (s3.environment | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SinkError, match="cannot be used"):
        directory.exists("s3://loader/a")


def test_what_is_of_another_kind_is_neither_taken_nor_removed(url: str):
    put(url, *COMPLETE)
    assert directory.exists(url, directory.SHARDS) == "absent"
    with pytest.raises(ConfigError, match=r"output.local: .* holds other files .* and no set of shards"):
        directory.prepare(url, "overwrite", directory.SHARDS)
    directory.discard(url, directory.SHARDS)
    assert names(url) == COMPLETE


def test_of_shards_nothing_is_left_but_what_is_not_ours(url: str):
    put(url, "complete.json", "complete.json.4.tmp", "rank-00000.bin", "rank-00000.json", "config.json", "notes.txt")
    assert directory.exists(url, directory.SHARDS) == "complete"
    put(url, directory.MARKER)  # as `directory.remove` does
    directory.discard(url, directory.SHARDS)
    assert names(url) == ["notes.txt"]
