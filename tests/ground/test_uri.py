import pytest

from loader.config.model import Source
from loader.errors import ConfigError
from loader.ground.uri import public_uri


@pytest.mark.parametrize(
    ("uri", "revision", "pinned"),
    [
        ("hf://org/name", None, "hf://org/name"),
        ("hf://org/name@v1/sub", None, "hf://org/name@v1/sub"),
        ("hf://org/name", "v1", "hf://org/name@v1"),
        ("hf://org/name/sub/model.safetensors", "refs/pr/3", "hf://org/name@refs%2Fpr%2F3/sub/model.safetensors"),
        ("s3://bucket/name", None, "s3://bucket/name"),
    ],
)
def test_a_revision_stands_behind_the_repository(uri, revision, pinned):
    assert Source(uri=uri, revision=revision).pinned_uri == pinned


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("s3://me:word@bucket/name", "revision: is for hf:// alone, but source.uri is s3://bucket/name"),
        ("hf://org/name@main", "revision: source.uri names a revision already: hf://org/name@main"),
    ],
)
def test_a_revision_that_says_nothing_is_refused(uri, says):
    with pytest.raises(ConfigError, match=f"^{says}$"):
        Source(uri=uri, revision="v1")


def test_a_revision_is_no_secret():
    assert public_uri("hf://org/name@v1") == "hf://org/name@v1"
