"""What S3's answers mean, and what its client raises without one, in the words of `loader.store.base`."""

from __future__ import annotations

import re

from botocore.exceptions import (
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from loader.store.base import Transient, asked_wait, refusal, told

# Answers whose status says less than their code.
THROTTLED = {"SlowDown", "RequestLimitExceeded", "Throttling", "ThrottlingException"}
TRANSIENT = {"InternalError", "RequestTimeout", "RequestTimeTooSkewed", "IncompleteBody"}
FORBIDDEN = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
_SAID = re.compile("<(Code|Message)>([^<]*)</")
_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)


def of_body(status: int, reason: str, body: bytes) -> Exception | None:
    """What a reply means whose body, where there is any, says more than its status line."""
    said = dict(_SAID.findall(body.decode(errors="replace")))
    return _of_code(status, said.get("Code", ""), said.get("Message", reason))


def translated(error: BaseException) -> Exception:
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
    status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    what = str(answer.get("Message", ""))
    error = _of_code(status, str(answer.get("Code")), what) or Transient(f"status {status}: {what}".rstrip(":. "))
    if isinstance(error, Transient):
        headers = cause.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        error.retry_after = asked_wait(headers.get("retry-after"))
    return error


def _of_code(status: int, code: str, message: str) -> Exception | None:
    named = "" if code in ("", str(status)) else f", {code}"
    what = f"status {status}{named}: {message}".rstrip(":. ")
    if code in FORBIDDEN:
        return PermissionError(what)
    if code in THROTTLED or code in TRANSIENT:
        return Transient(what, throttled=code in THROTTLED)
    return refusal(status, what)
