"""`s3://` through s3fs: its credentials, sessions and connection pool; single GETs under If-Match."""

from __future__ import annotations

from typing import Any

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from fsspec.core import url_to_fs

from loader.store.base import Access, Filler, Scheme, Stat, Transient, changed, check_reply, run_on_loop

SCHEMES = ("s3", "s3a")

THROTTLED = {"SlowDown", "RequestLimitExceeded", "Throttling", "ThrottlingException", "503", "429"}
FORBIDDEN = {
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "403",
    "401",
}
MISSING = {"NoSuchKey", "NoSuchBucket", "404"}
CHUNK = 256 * 1024


class S3Scheme:
    """A prefix of a bucket."""

    def __init__(self, fs: Any, path: str) -> None:
        self.fs = fs
        self.path = path

    def names(self) -> list[str]:
        found = self._call(lambda: self.fs._ls(self.path, detail=True, refresh=True))  # noqa: SLF001
        return [item["name"].rsplit("/", 1)[-1] for item in found if item["type"] == "file"]

    def stat(self, name: str) -> Stat:
        bucket, key, _ = self.fs.split_path(f"{self.path}/{name}")
        found = self._call(lambda: self.fs._call_s3("head_object", Bucket=bucket, Key=key))  # noqa: SLF001
        return Stat(found["ContentLength"], found["ETag"])

    def read(self, name: str, pin: str, start: int, buffer: memoryview) -> None:
        bucket, key, _ = self.fs.split_path(f"{self.path}/{name}")
        wanted = f"bytes={start}-{start + len(buffer) - 1}"
        filler = Filler(buffer)

        async def fill() -> None:
            reply = await self.fs._call_s3("get_object", Bucket=bucket, Key=key, Range=wanted, IfMatch=pin)  # noqa: SLF001
            async with reply["Body"] as body:
                check_reply(
                    status=reply["ResponseMetadata"]["HTTPStatusCode"],
                    content_range=reply.get("ContentRange"),
                    start=start,
                    size=len(buffer),
                )
                if reply["ETag"] != pin:
                    raise changed(name, pin, reply["ETag"])
                async for chunk in body.iter_chunks(CHUNK):
                    filler.add(chunk)
            filler.finish()

        try:
            self._call(fill)
        except FileNotFoundError as error:
            raise changed(name, pin, "no such object") from error
        except Transient as error:
            error.filled = filler.filled
            raise

    def _call(self, call: Any) -> Any:
        """Run on the event loop; say in our words what went wrong."""
        try:
            return run_on_loop(self.fs.loop, call)
        except Transient:
            raise
        except (ClientError, BotoCoreError, OSError, TimeoutError) as error:
            raise _translated(error) from error


def _translated(error: BaseException) -> Exception:
    """s3fs wraps the store's answer in an OSError of its own choice: the answer itself decides."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ClientError):
        cause = cause.__cause__
    return _of_client(error) if cause is None else _of_answer(cause)


def _of_client(error: BaseException) -> Exception:
    """Without an answer: the client has no credentials, or the network failed it."""
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return PermissionError(f"no usable credentials: {error}")
    if isinstance(error, FileNotFoundError | PermissionError):
        return error
    return Transient(f"{type(error).__name__}: {error}")


def _of_answer(cause: ClientError) -> Exception:
    code = str(cause.response.get("Error", {}).get("Code"))
    status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in MISSING or status == 404:
        return FileNotFoundError(code)
    if code in FORBIDDEN or status in (401, 403):
        return PermissionError(f"{code}: {cause.response.get('Error', {}).get('Message', '')}")
    if code in {"PreconditionFailed", "412"}:
        return FileNotFoundError("another object (If-Match failed)")
    return Transient(f"{code} (status {status})", throttled=code in THROTTLED or status in (429, 503))


def open_scheme(access: Access) -> Scheme:
    options = dict(access.storage_options)
    config = {
        "max_pool_connections": access.concurrency,  # s3fs pools 10 by default and caps a load silently
        "connect_timeout": access.timeout,
        "read_timeout": access.timeout,
        "retries": {"total_max_attempts": 1},  # the one retry layer is ours
        "response_checksum_validation": "when_required",  # S3 sends none for a range; asking costs a pass over the data
        **options.pop("config_kwargs", {}),
    }
    fs, path = url_to_fs(
        access.uri,
        **options,
        config_kwargs=config,
        default_cache_type="none",
        skip_instance_cache=True,
    )
    fs.retries = 1
    run_on_loop(fs.loop, fs.set_session)
    return S3Scheme(fs, path.rstrip("/"))
