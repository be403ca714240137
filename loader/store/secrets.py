"""What no error and no log may tell: the source's storage_options, and the queries of signed URLs."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

_SHOWN = frozenset({"endpoint_url", "endpoint", "region_name", "region", "project", "profile"})
"""Options that say where, not who."""

_USERINFO = re.compile(r"://[^/?#\s]*@")
_QUERY = re.compile(r"(://[^\s?'\"<>]*)\?[^\s'\"<>]*")
_SHORT = 4
"""A value with fewer characters than this keeps no secret, and would be found in any text."""


_CLIENTS = dict.fromkeys(
    ("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "s3fs", "urllib3"), logging.INFO
)
_CLIENTS |= dict.fromkeys(("httpcore", "httpcore2", "httpx", "httpx2"), logging.WARNING)  # INFO has every URL


def hush_clients() -> None:
    """Keep from the log what client libraries tell there: signed URLs, and headers with tokens. For whom the root
    logger is at DEBUG or INFO for another reason; a library's own logger, once it has a level, is left as it is."""
    for name, level in _CLIENTS.items():
        log = logging.getLogger(name)
        if log.level == logging.NOTSET:
            log.setLevel(level)


class Secrets:
    """The secrets of one source."""

    def __init__(self, storage_options: Mapping[str, Any]) -> None:
        found = {value for value in _leaves(storage_options) if len(value) >= _SHORT}
        self._values = sorted(found, key=len, reverse=True)  # one may be part of another

    def hide(self, text: str) -> str:
        """`text` without what an error may not tell."""
        for value in self._values:
            text = text.replace(value, "***")
        return _QUERY.sub(r"\1?***", _USERINFO.sub("://", text))

    def cause(self, error: BaseException) -> BaseException | None:
        """`error` to be told as the cause of another: None where it, or a cause of it, tells a secret."""
        seen: list[BaseException] = []
        one: BaseException | None = error
        while one is not None and one not in seen:
            if self.hide(str(one)) != str(one):
                return None
            seen.append(one)
            one = one.__cause__ or one.__context__
        return error


def _leaves(options: Any) -> Iterator[str]:
    if isinstance(options, Mapping):
        for name, value in options.items():
            if name not in _SHOWN:
                yield from _leaves(value)
    elif isinstance(options, list | tuple):
        for value in options:
            yield from _leaves(value)
    elif isinstance(options, str):
        yield options
