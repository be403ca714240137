"""What a store tells: nothing of its options, of a signed URL, of a password in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from loader.errors import CatalogError, LoaderError
from loader.store.base import Access
from loader.store.secrets import Secrets
from loader.store.store import Store
from tests.misbehaving import FILE
from tests.proxy import CountingProxy, Forward, Reply, Request
from tests.servers import http_server
from tests.store.buckets import DATA, PATIENCE

SECRET = "word-that-nobody-may-read"


def test_a_signed_urls_query_and_password_are_never_told(tmp_path):
    (tmp_path / FILE).write_bytes(DATA)
    with http_server(tmp_path) as url, CountingProxy(url) as proxy:
        signed = f"{proxy.url.replace('://', f'://me:{SECRET}@')}/?X-Amz-Signature={SECRET}"
        access = Access(signed, {}, 1, PATIENCE)
        hooks: list[Callable[[Request, Forward], Reply]] = [
            lambda request, forward: Reply(403, [("Content-Length", "0")]),
            lambda request, forward: Reply(500, [("Content-Length", "0")]),
            lambda request, forward: Reply(302, [("Content-Length", "0"), ("Location", request.target)]),
        ]
        for hook in hooks:
            proxy.on_request(hook)
            store = Store(access, retries=0, deadline=60)
            assert SECRET not in repr(access)[: repr(access).index("uri=")]
            with pytest.raises(LoaderError) as raised:
                store.stat(FILE)
            assert not any(SECRET in text for text in _chain(raised.value))
        assert any(SECRET in request.target for request in proxy.requests)


def _chain(error: BaseException | None) -> Iterator[str]:
    """What a traceback would show."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_options_are_never_told():
    secrets = Secrets({"key": "AKIAXYZ", "nested": {"token": [SECRET]}, "endpoint_url": "http://minio:9000", "n": 3})
    told = secrets.hide(f"AKIAXYZ at http://me:pw@minio:9000/b?sig=1&x={SECRET} {SECRET}")
    assert told == "*** at http://minio:9000/b?*** ***"
    inner = ValueError(f"token {SECRET}")
    outer = OSError("no")
    outer.__cause__ = inner
    assert secrets.cause(outer) is None
    inner.args = ("token",)
    assert secrets.cause(outer) is outer
    inner.__cause__ = inner  # as s3fs's may be
    assert secrets.cause(outer) is outer


@pytest.mark.parametrize(
    "options", [{"key": SECRET}, {"secrett": SECRET}, {"key": SECRET, "secret": SECRET}], ids=["half", "typo", "wrong"]
)
def test_credentials_that_do_not_fit_are_told_without_them(s3, monkeypatch, options):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with pytest.raises(CatalogError) as raised:
        Store(Access("s3://loader/x", options, 1, PATIENCE), retries=0, deadline=60).names()
    assert not any(SECRET in text for text in _chain(raised.value))
