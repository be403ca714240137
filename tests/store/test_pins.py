"""One version: what was catalogued is read, or it is told what is there now, wherever ranges are read."""

from __future__ import annotations

import re

import pytest

from loader.errors import PinError
from loader.store.base import Access
from loader.store.store import Store
from tests.misbehaving import FILE, another_version, first, status
from tests.proxy import Reply
from tests.store.buckets import DATA, PATIENCE, SIZE, START, read


def test_an_object_that_changed_is_told_with_both_pins(bucket):
    store = bucket.store()
    before = store.stat(FILE).pin
    bucket.replace(DATA[::-1] + b"more")
    now = bucket.store().stat(FILE).pin
    with pytest.raises(PinError) as raised:
        read(store, before)
    assert f"pinned {before}, found {now}" in str(raised.value)


def test_a_reply_of_another_version_is_told(bucket):
    """Whatever the store makes of a condition in the request: the reply itself says what it is."""
    store = bucket.store()
    pin = store.stat(FILE).pin

    bucket.misbehave(another_version)
    with pytest.raises(PinError, match=f"pinned {re.escape(pin)}, found "):
        read(store, pin)


def test_an_object_that_is_gone_is_told(bucket):
    store = bucket.store()
    pin = store.stat(FILE).pin
    bucket.proxy.on_request(lambda request, forward: Reply(404, [("Content-Length", "0")]))
    with pytest.raises(PinError, match=f"pinned {re.escape(pin)}, found no such object"):
        read(store, pin)
    assert store.stat(FILE) is None


@pytest.fixture(scope="module")
def versioned(s3) -> str:
    """The URI of a bucket that keeps versions."""
    import s3fs

    fs = s3fs.S3FileSystem(**s3.storage_options, skip_instance_cache=True)
    fs.call_s3("create_bucket", Bucket="versioned")
    fs.call_s3("put_bucket_versioning", Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})
    return "s3://versioned"


@pytest.mark.parametrize("backend", ["direct", "fsspec"])
@pytest.mark.parametrize("how", ["not", "again", "overwrite", "delete"])
def test_in_a_bucket_with_versions_an_upload_is_pinned_and_not_only_its_bytes(s3, versioned, tmp_path, backend, how):
    import s3fs

    fs = s3fs.S3FileSystem(**s3.storage_options, skip_instance_cache=True)
    uri = f"{versioned}/{backend}-{how}"
    fs.pipe_file(f"{uri}/{FILE}", DATA)
    store = Store(Access(uri, s3.storage_options, 4, PATIENCE, backend), retries=2, deadline=60)
    stat = store.stat(FILE)
    etag, version = stat.pin.split()
    assert fs.info(f"{uri}/{FILE}", refresh=True)["ETag"] == etag
    assert store.checksum(FILE, stat.pin).algorithm == "CRC32"
    if how == "not":
        assert read(store, stat.pin) == DATA[START : START + SIZE]
        return
    if how == "delete":
        fs.rm_file(f"{uri}/{FILE}")
    else:
        fs.pipe_file(f"{uri}/{FILE}", DATA if how == "again" else DATA[::-1])
    now = "no such object" if how == "delete" else Store(Access(uri, s3.storage_options, 4, 30), retries=0, deadline=9)
    told = re.escape(now if isinstance(now, str) else now.stat(FILE).pin)
    for asked in (lambda: read(store, stat.pin), lambda: store.checksum(FILE, stat.pin)):
        with pytest.raises(PinError, match=f"pinned {re.escape(etag)} {version}, found {told}"):
            asked()


def test_a_file_that_is_said_to_be_gone_and_is_not(reads):
    store = reads.store()
    pin = store.stat(FILE).pin
    reads.misbehave(first(2, status(404)))
    assert read(store, pin) == DATA[START : START + SIZE]
    assert store.tally.retries == 2
