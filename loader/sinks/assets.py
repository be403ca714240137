"""The small files that belong to a checkpoint's tensors: config and tokenizer, copied beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatch

from fsspec.core import url_to_fs

from loader.errors import SinkError
from loader.ground.uri import public_uri

PATTERNS = (
    "config.json",
    "generation_config.json",
    "*processor_config.json",  # preprocessor, processor, video_preprocessor
    "tokenizer*.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
)
LIMIT = 128 << 20
"""Bytes of one file, which is held in memory: the largest tokenizer.json known is 34 MB."""


def is_asset(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in PATTERNS)


def copy(read: Callable[[str, int], bytes], names: Iterable[str], target_url: str) -> list[str]:
    """Copy those of the source's files `names` that are assets into the directory `target_url`.

    Returns what was copied. For one rank, after `directory.prepare`. `read(name, limit)` gives a whole file of at most
    `limit` bytes. Raises SinkError, naming the file, where one cannot be written, and what `read` raises.
    """
    copied = sorted(filter(is_asset, names))
    for name in copied:
        data = read(name, LIMIT)
        try:
            fs, path = url_to_fs(f"{target_url.rstrip('/')}/{name}")
            fs.pipe_file(path, data)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise SinkError(f"{name} cannot be copied to {public_uri(target_url)}: {reason}") from error
    return copied
