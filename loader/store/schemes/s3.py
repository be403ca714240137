"""`s3://` through s3fs: its credentials, sessions and connection pool; single GETs under If-Match."""

from __future__ import annotations

import threading
from base64 import b64decode
from collections.abc import Mapping
from typing import Any

from aiobotocore.httpsession import AIOHTTPSession
from aiohttp import ClientError as HttpError
from botocore.exceptions import BotoCoreError, ClientError
from fsspec.core import url_to_fs

from loader.ground.crc import ALGORITHMS
from loader.store.base import (
    Access,
    Address,
    Checksum,
    Filler,
    IsLate,
    Scheme,
    Stat,
    Transient,
    changed,
    check_reply,
    run_on_loop,
)
from loader.store.s3_errors import of_body, translated
from loader.store.schemes.web import without_retries

CHUNK = 256 * 1024
CLIENT_BYTES = 24 << 20
"""Measured: 16 MiB as soon as it is open (botocore's models of the service), 3 to 6 with 16 connections at work."""

SIGNED_FOR = 3600
"""Seconds that a URL is good for, unless its credentials expire before."""

_OF_REQUESTS = {"requester_pays", "s3_additional_kwargs", "version_aware", "session"}
"""Options of s3fs that change what a request is."""


class _Session(AIOHTTPSession):  # type: ignore[misc]  # it has no types
    """One that does not ask again by itself where a kept connection was reset."""

    async def _get_session(self, proxy_url: str | None) -> Any:
        return without_retries(await super()._get_session(proxy_url))


class S3Scheme:
    """A prefix of a bucket."""

    def __init__(self, access: Access) -> None:
        self.fs = _open_fs(access)
        self.path = self.fs._strip_protocol(access.uri).rstrip("/")  # noqa: SLF001
        self.direct = not _OF_REQUESTS & access.storage_options.keys()
        self._access = access
        self._signer: Any = None
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        found = self._call(lambda: self.fs._ls(self.path, detail=True, refresh=True))  # noqa: SLF001
        return [item["name"].rsplit("/", 1)[-1] for item in found if item["type"] == "file"]

    def stat(self, name: str) -> Stat:
        bucket, key, _ = self.fs.split_path(f"{self.path}/{name}")
        found = self._call(lambda: self.fs._call_s3("head_object", Bucket=bucket, Key=key))  # noqa: SLF001
        return Stat(found["ContentLength"], _pin(found["ETag"], found.get("VersionId")))

    def checksum(self, name: str, pin: str) -> Checksum | str:
        bucket, key, _ = self.fs.split_path(f"{self.path}/{name}")
        found = self._call(
            lambda: self.fs._call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED")  # noqa: SLF001
        )
        if (now := _pin(found["ETag"], found.get("VersionId"))) != pin:
            raise changed(name, pin, now)
        for algorithm in ALGORITHMS:
            value = found.get(f"Checksum{algorithm}", "")
            whole = found.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT" and "-" not in value  # "…-7": of 7 parts'
            if value and whole:
                return Checksum(algorithm, int.from_bytes(b64decode(value)))
        return f"the bucket has no {', '.join(ALGORITHMS)} of the whole object; one of its parts' checksums does not do"

    def read(self, name: str, pin: str, start: int, buffer: memoryview, _: IsLate) -> None:
        bucket, key, _ = self.fs.split_path(f"{self.path}/{name}")
        wanted = f"bytes={start}-{start + len(buffer) - 1}"
        filler = Filler(buffer)

        async def fill() -> None:
            reply = await self.fs._call_s3(  # noqa: SLF001
                "get_object", Bucket=bucket, Key=key, Range=wanted, IfMatch=_etag(pin)
            )
            async with reply["Body"] as body:
                check_reply(
                    status=reply["ResponseMetadata"]["HTTPStatusCode"],
                    content_range=reply.get("ContentRange"),
                    start=start,
                    size=len(buffer),
                )
                if (now := _pin(reply["ETag"], reply.get("VersionId"))) != pin:
                    raise changed(name, pin, now)
                async for chunk in body.iter_chunks(CHUNK):
                    filler.add(chunk)
            filler.finish()

        try:
            self._call(fill)
        except Transient as error:
            error.filled = filler.filled
            raise

    def address(self, name: str, pin: str) -> Address:
        bucket, key, _ = self.fs.split_path(f"{self.path}/{name}")
        with self._lock:
            if self._signer is None:
                self._signer = self._find_signer(bucket)
        client = self._signer.s3

        async def sign() -> str:
            params = {"Bucket": bucket, "Key": key}
            url: str = await client.generate_presigned_url("get_object", Params=params, ExpiresIn=SIGNED_FOR)
            return url

        agent = client.meta.config.user_agent_extra
        return Address(self._call(sign), {"If-Match": _etag(pin), **({"User-Agent": agent} if agent else {})})

    def any_address(self) -> Address:
        return self.address("any", "")

    def _find_signer(self, bucket: str) -> Any:
        """A file system that signs for the bucket's own region: botocore follows the bucket there only with requests
        that it sends itself."""

        async def ask() -> str | None:
            try:
                reply = await self.fs.s3.head_bucket(Bucket=bucket)
            except ClientError as error:
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
                if isinstance(translated(error), Transient) and status != 501:  # a server that has no such request
                    raise
                reply = error.response  # a refusal tells the region too
            region: str | None = reply["ResponseMetadata"].get("HTTPHeaders", {}).get("x-amz-bucket-region")
            return region

        region = self._call(ask)
        return self.fs if region in (None, self.fs.s3.meta.region_name) else _open_fs(self._access, region)

    def pin_of(self, headers: Mapping[str, str], pin: str) -> str:
        return _pin(headers.get("ETag", _etag(pin)), headers.get("x-amz-version-id"))

    def refusal(self, status: int, reason: str, body: bytes) -> Exception | None:
        return of_body(status, reason, body)

    def _call(self, call: Any) -> Any:
        """Run on the event loop; say in our words what went wrong."""
        try:
            return run_on_loop(self.fs.loop, call, self._access.until)
        except Transient:
            raise
        except (ClientError, BotoCoreError, HttpError, OSError) as error:
            meant = translated(error)
            if meant is error:
                raise
            raise meant from error


def _pin(etag: str, version: str | None) -> str:
    """The ETag, which is of the bytes; and in a bucket with versioning the version id, which is of this upload.

    It is compared, and not asked for: to read a version by its id takes a permission more than to read the object.
    """
    return etag if version in {None, "null"} else f"{etag} {version}"


def _etag(pin: str) -> str:
    return pin.partition(" ")[0]


def open_scheme(access: Access) -> Scheme:
    return S3Scheme(access)


def _open_fs(access: Access, region: str | None = None) -> Any:
    """s3fs's file system, with its session; for `region` where one is given, else the environment's."""
    options = dict(access.storage_options)
    if region is not None:
        options["client_kwargs"] = {**options.get("client_kwargs", {}), "region_name": region}
    signature = {} if options.get("anon") else {"signature_version": "s3v4"}  # else URLs may be signed as of old
    config = {
        **signature,
        "max_pool_connections": access.concurrency,  # s3fs pools 10 by default and caps a load silently
        "connect_timeout": access.timeout,
        "read_timeout": access.timeout,
        "retries": {"total_max_attempts": 1},  # the one retry layer is ours
        "http_session_cls": _Session,
        "response_checksum_validation": "when_required",  # S3 sends none for a range; asking costs a pass over the data
        **options.pop("config_kwargs", {}),
    }
    fs, _ = url_to_fs(
        access.uri,
        **options,
        config_kwargs=config,
        default_cache_type="none",
        skip_instance_cache=True,
    )
    fs.retries = 1
    run_on_loop(fs.loop, fs.set_session)
    return fs
