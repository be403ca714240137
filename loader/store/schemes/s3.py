"""`s3://` through s3fs: its credentials, sessions and connection pool; single GETs under If-Match."""

from __future__ import annotations

from typing import Any

from aiohttp import ClientError as HttpError
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)
from fsspec.core import url_to_fs

from loader.store.base import (
    Access,
    Filler,
    Scheme,
    Stat,
    Transient,
    changed,
    check_reply,
    pin_now,
    refusal,
    run_on_loop,
    told,
)

SCHEMES = ("s3", "s3a")

# Answers whose status says less than their code.
THROTTLED = {"SlowDown", "RequestLimitExceeded", "Throttling", "ThrottlingException"}
TRANSIENT = {"InternalError", "RequestTimeout", "RequestTimeTooSkewed", "IncompleteBody"}
FORBIDDEN = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
CHUNK = 256 * 1024
CLIENT_BYTES = 24 << 20
"""Measured: 16 MiB as soon as it is open (botocore's models of the service), 3 to 6 with 16 connections at work."""

_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)


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
            raise changed(name, pin, pin_now(self, name)) from error
        except Transient as error:
            error.filled = filler.filled
            raise

    def _call(self, call: Any) -> Any:
        """Run on the event loop; say in our words what went wrong."""
        try:
            return run_on_loop(self.fs.loop, call)
        except Transient:
            raise
        except (ClientError, BotoCoreError, HttpError, OSError) as error:
            translated = _translated(error)
            if translated is error:
                raise
            raise translated from error


def _translated(error: BaseException) -> Exception:
    """s3fs wraps the store's answer in an OSError of its own choice: the answer itself decides."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ClientError):
        cause = cause.__cause__
    return _of_client(error) if cause is None else _of_answer(cause)


def _of_client(error: BaseException) -> Exception:
    """Without an answer: the client has no credentials, or the network failed it."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return error
    if isinstance(error, _CREDENTIALS):
        return PermissionError(f"no usable credentials: {error}")
    if isinstance(error, ParamValidationError):  # a bucket's name that cannot be one
        return FileNotFoundError(" ".join(str(error).split()))
    return Transient(told(error))


def _of_answer(cause: ClientError) -> Exception:
    answer = cause.response.get("Error", {})
    code = str(answer.get("Code"))
    status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    named = "" if code == str(status) else f", {code}"
    what = f"status {status}{named}: {answer.get('Message', '')}".rstrip(":. ")
    if code in FORBIDDEN:
        return PermissionError(what)
    if code in THROTTLED or code in TRANSIENT:
        return Transient(what, throttled=code in THROTTLED)
    return refusal(status, what) or Transient(what)


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
