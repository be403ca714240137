"""A document beside the load, as the report is one, at a local path or any fsspec URL: whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from loader.errors import ConfigError, SinkError
from loader.ground.uri import public_uri


def write_document(path: str, text: Iterable[str], what: str) -> None:
    """Write the pieces of `text`. Raises SinkError, which calls the document `what`."""
    try:
        fs, inner = url_to_fs(path)
        if isinstance(fs, LocalFileSystem):
            _replace(Path(inner), text)
        else:
            fs.pipe_file(inner, "".join(text).encode())
    except Exception as error:
        raise SinkError(f"{public_uri(path)}: cannot write the {what}: {type(error).__name__}: {error}") from error


def check_place(path: str, what: str) -> None:
    """That a document can be written at a local `path`; of another place only writing shows it. Raises ConfigError."""
    try:
        fs, inner = url_to_fs(path)
        if not isinstance(fs, LocalFileSystem):
            return
        Path(inner).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=Path(inner).parent):
            reason = "it is a directory" if Path(inner).is_dir() else None
    except Exception as error:  # noqa: BLE001 - whatever a client library raises where it is given what it cannot use
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        raise ConfigError(f"{what}: nothing can be written at {public_uri(path)}: {reason}")


def _replace(path: Path, text: Iterable[str]) -> None:
    """Write beside `path`, then rename: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.writelines(text)
        Path(name).chmod(0o644)  # mkstemp's 0o600 would hide it from whoever collects reports
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
