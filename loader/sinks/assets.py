"""The small files that belong to a checkpoint's tensors: config and tokenizer, copied beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any

from fsspec.core import url_to_fs

from loader.errors import SinkError
from loader.uri import public_uri

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


def copy(source_uri: str, storage_options: Mapping[str, Any], names: Iterable[str], target_url: str) -> list[str]:
    """Copy those of the files `names` in the directory `source_uri` that are assets into the directory `target_url`.

    Returns what was copied. For one rank, after `directory.prepare`. `storage_options` are the source's; the target
    takes its own from the environment. Raises SinkError, naming the file, where one cannot be copied or is above LIMIT.
    """
    copied = sorted(filter(is_asset, names))
    for name in copied:
        try:
            _copy(f"{source_uri.rstrip('/')}/{name}", storage_options, f"{target_url.rstrip('/')}/{name}")
        except Exception as error:
            where = f"{public_uri(source_uri)}: {name} cannot be copied to {public_uri(target_url)}"
            raise SinkError(f"{where}: {type(error).__name__}: {error}") from error
    return copied


def _copy(source: str, storage_options: Mapping[str, Any], target: str) -> None:
    fs, path = url_to_fs(source, **storage_options)
    with fs.open(path, "rb") as file:
        data = file.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise ValueError(f"it has more than {LIMIT} bytes: move it away, or give it another name")
    fs, path = url_to_fs(target)
    fs.pipe_file(path, data)
