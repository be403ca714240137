"""The parts that every scheme has in common."""

from __future__ import annotations

import pytest

from loader.ground.uri import split_uri
from loader.store.base import Filler, Transient, Unusable, check_reply, refusal
from tests.misbehaving import FILE


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("s3://b/llama/model.safetensors", ("s3://b/llama", FILE)),
        ("s3://b/llama/", ("s3://b/llama", None)),
        ("https://h/llama/model.safetensors?sig=a/b", ("https://h/llama?sig=a/b", FILE)),
        ("/data/what?.safetensors", ("/data", "what?.safetensors")),
        (FILE, (".", FILE)),
        ("/", ("/", None)),
    ],
)
def test_a_uri_names_a_directory_or_a_file(uri, parts):
    assert split_uri(uri) == parts


def test_a_reply_is_the_range_or_nothing():
    check_reply(status=206, content_range="bytes 5-9/100", start=5, size=5)
    for status, told in [(200, None), (204, None), (206, None), (206, "bytes 5-8/100"), (206, "bytes 4-8/100")]:
        with pytest.raises(Transient):
            check_reply(status=status, content_range=told, start=5, size=5)
    filler = Filler(memoryview(bytearray(4)))
    filler.add(b"ab")
    with pytest.raises(Transient, match="ended 2 bytes early") as raised:
        filler.finish()
    assert raised.value.filled == 2
    with pytest.raises(Transient, match="longer than the 4 bytes"):
        filler.add(b"cde")
    assert filler.filled == 0


def test_a_status_means_one_thing_for_all_schemes():
    assert refusal(200, "") is refusal(206, "") is None
    assert {type(refusal(status, "")) for status in (404, 410, 412, 416)} == {FileNotFoundError}
    assert {type(refusal(status, "")) for status in (401, 403)} == {PermissionError}
    assert {type(refusal(status, "")) for status in (408, 429, 500, 502, 503, 504)} == {Transient}
    assert {type(refusal(status, "")) for status in (301, 400, 405)} == {Unusable}
