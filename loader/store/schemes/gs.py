"""`gs://` through gcsfs: its credentials and session; single GETs of one generation."""

from __future__ import annotations

import os
from base64 import b64decode
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from fsspec.core import url_to_fs
from google.auth.exceptions import GoogleAuthError, TransportError

from loader.store.base import (
    Access,
    Address,
    Checksum,
    Filler,
    IsLate,
    Scheme,
    Stat,
    Transient,
    by_status,
    changed,
    run_on_loop,
    told,
)
from loader.store.schemes.web import call, check_status, fill, socket_timeout, without_retries

CLIENT_BYTES = 8 << 20  # measured: as for HTTP


class GsScheme:
    """A prefix of a bucket."""

    direct = True

    def __init__(self, fs: Any, path: str, access: Access) -> None:
        self.fs = fs
        self.path = path
        self.timeout = socket_timeout(access.timeout)
        self.until = access.until

    def names(self) -> list[str]:
        bucket, prefix, _ = self.fs.split_path(self.path)
        listing: dict[str, str] = {"delimiter": "/", "prefix": f"{prefix}/" if prefix else ""}
        names: list[str] = []
        while True:
            page = self._json(self._url(bucket), listing)
            names += [item["name"].rsplit("/", 1)[-1] for item in page.get("items", ())]
            if not page.get("nextPageToken"):
                return [name for name in names if name]
            listing["pageToken"] = page["nextPageToken"]

    def stat(self, name: str) -> Stat:
        bucket, key, _ = self.fs.split_path(f"{self.path}/{name}")
        found = self._json(self._url(bucket, key), {})
        return Stat(int(found["size"]), str(found["generation"]))

    def checksum(self, name: str, pin: str) -> Checksum | str:
        bucket, key, _ = self.fs.split_path(f"{self.path}/{name}")
        found = self._json(self._url(bucket, key), {"generation": pin})
        if "crc32c" not in found:
            return "the bucket tells no crc32c of it"
        return Checksum("CRC32C", int.from_bytes(b64decode(found["crc32c"])))

    def read(self, name: str, pin: str, start: int, buffer: memoryview, _: IsLate) -> None:
        bucket, key, _ = self.fs.split_path(f"{self.path}/{name}")
        filler = Filler(buffer)
        wanted = {"Range": f"bytes={start}-{start + len(buffer) - 1}"}

        async def get() -> None:
            async with await self._request(
                self._url(bucket, key), {"alt": "media", "generation": pin}, wanted
            ) as reply:
                check_status(reply)
                if (found := reply.headers.get("x-goog-generation", pin)) != pin:
                    raise changed(name, pin, found)
                await fill(reply, start, filler)

        call(self.fs.loop, get, self.until, filler)

    def _json(self, url: str, params: dict[str, str]) -> dict[str, Any]:
        async def get() -> dict[str, Any]:
            async with await self._request(url, params, {}) as reply:
                check_status(reply)
                found: dict[str, Any] = await reply.json(content_type=None)
                return found

        return call(self.fs.loop, get, self.until)  # type: ignore[no-any-return]

    def address(self, name: str, pin: str) -> Address:
        bucket, key, _ = self.fs.split_path(f"{self.path}/{name}")
        query = urlencode(self.fs._get_params({"alt": "media", "generation": pin}))  # noqa: SLF001
        return Address(f"{self._url(bucket, key)}?{query}", self._allowed({}))

    def any_address(self) -> Address:
        return self.address("any", "0")

    def pin_of(self, headers: Mapping[str, str], pin: str) -> str:
        return headers.get("x-goog-generation", pin)

    refusal = staticmethod(by_status)

    def _allowed(self, headers: Mapping[str, str]) -> dict[str, str]:
        """`headers`, with gcsfs's credentials."""
        try:
            return self.fs._get_headers(dict(headers))  # type: ignore[no-any-return]  # noqa: SLF001
        except TransportError as error:
            raise Transient(told(error)) from error
        except GoogleAuthError as error:
            raise PermissionError(f"no usable credentials: {told(error)}") from error

    async def _request(self, url: str, params: dict[str, str], headers: dict[str, str]) -> Any:
        """A request with gcsfs's own session, credentials and project; gcsfs's `cat_file` checks no reply."""
        await self.fs._set_session()  # noqa: SLF001
        allowed = self._allowed({**headers, "Accept-Encoding": "identity"})
        session = without_retries(self.fs.session)
        return session.get(url, params=self.fs._get_params(params), headers=allowed, timeout=self.timeout)  # noqa: SLF001

    def _url(self, bucket: str, key: str | None = None) -> str:
        """Of an object, or of the bucket's listing."""
        objects = f"{self.fs.base.rstrip('/')}/b/{bucket}/o"
        return objects if key is None else f"{objects}/{quote(key, safe='')}"


def before_import(access: Access) -> None:
    """Keep gcsfs from asking for the bucket's type over gRPC, which an emulator never answers: it decides at import."""
    if "STORAGE_EMULATOR_HOST" in os.environ or "endpoint_url" in access.storage_options:
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def open_scheme(access: Access) -> Scheme:
    before_import(access)
    fs, path = url_to_fs(access.uri, **access.storage_options, skip_instance_cache=True)
    run_on_loop(fs.loop, fs._set_session)  # noqa: SLF001
    return GsScheme(fs, path.rstrip("/"), access)
