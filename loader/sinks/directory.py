"""The directory that an output goes to, local or a bucket's prefix: complete, partial or absent.

Complete means that the file is there which its kind writes last. Until then MARKER stands there: writing it proves
before the load that the place can be written to, and tells the next run that what lies there is ours to remove. The
URL's options come from the environment.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from loader.errors import ConfigError, SinkError
from loader.ground.uri import public_uri
from loader.sinks.assets import is_asset

MARKER = ".incomplete"


class Kind(NamedTuple):
    """What such a directory holds: its key in the config, its name, the file that comes last, the other files."""

    key: str
    name: str
    last: str
    data: re.Pattern[str]


CHECKPOINT = Kind("output.checkpoint", "checkpoint", ".metadata", re.compile(r"__\d+(_\d+)+\.distcp|\.metadata\.tmp"))
SHARDS = Kind(
    "output.local", "set of shards", "complete.json", re.compile(r"rank-\d+\.(bin|json)|complete\.json\.\d+\.tmp")
)

_BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "hf"})
_FINAL = (FileNotFoundError, PermissionError, NotADirectoryError, ValueError, ImportError)


def exists(url: str, kind: Kind = CHECKPOINT) -> Literal["complete", "partial", "absent"]:
    """What of its kind is in the directory `url`. Other files count as nothing. Raises ConfigError or SinkError."""
    with _told(url, kind):
        return _state(_names(*url_to_fs(url)), kind)


def prepare(url: str, if_exists: Literal["error", "use", "overwrite"], kind: Kind = CHECKPOINT) -> bool:
    """Make the directory `url` ready to be written, before anything is read: for one rank. False: use what is there.

    A partial output is reclaimed; a complete one is, as `if_exists` says, an error, used, or removed now (if the
    load then fails, it is gone). Files that are not ours are never removed, and where there is nothing of ours they
    are an error. Raises ConfigError for that, and where the place does not exist or may not be written; else SinkError.
    """
    with _told(url, kind):
        fs, root = url_to_fs(url)
        names = _names(fs, root)
        state = _state(names, kind)
        if state == "complete" and if_exists == "error":
            raise ConfigError(
                f"{kind.key}: {public_uri(url)} holds a complete {kind.name}: set output.if_exists to use "
                "(take it as it is) or overwrite (replace it), or write elsewhere"
            )
        if state == "complete" and if_exists == "use":
            return False
        if state == "absent" and names:
            raise ConfigError(
                f"{kind.key}: {public_uri(url)} holds other files ({', '.join(names[:3])}) and no {kind.name}: "
                "give a directory that is new, empty, or holds one"
            )
        _remove(fs, root, names, kind)
        make(fs, root)
        fs.pipe_file(f"{root}/{MARKER}", b"")
        return True


def finish(url: str, kind: Kind = CHECKPOINT) -> None:
    """Take MARKER away, for one rank, once what comes last is there. Raises SinkError."""
    with _told(url, kind), suppress(FileNotFoundError):
        fs, root = url_to_fs(url)
        fs.rm_file(f"{root}/{MARKER}")


def discard(url: str, kind: Kind = CHECKPOINT) -> None:
    """Remove what a failed run left: our files, and a local directory that is then empty.

    Where each node has its own directory, one rank of each calls it; several may. All ranks must have stopped writing.
    Raises SinkError.
    """
    with _told(url, kind):
        fs, root = url_to_fs(url)
        _remove(fs, root, _names(fs, root), kind)
        if isinstance(fs, LocalFileSystem):
            with suppress(FileNotFoundError):
                if not fs.ls(root):
                    fs.rmdir(root)


def remove(directory: str, agree: Callable[[], None] = lambda: None) -> None:
    """Remove the shards of the local `directory` with what belongs to them. Where several ranks call it, `agree` waits
    for all of them. Others' files stay. Raises SinkError.
    """
    try:
        Path(directory, MARKER).touch()  # so that what is left, should this fail, is known for ours
    except OSError as error:
        raise SinkError(f"{directory} cannot be removed: {type(error).__name__}: {error}") from error
    agree()
    discard(directory, SHARDS)


def make(fs: Any, root: str) -> None:
    """Make the directory `root`, but not in a bucket: there fsspec's `makedirs` makes a bucket of a misspelt name."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if not protocols & _BUCKETS:
        fs.makedirs(root, exist_ok=True)


def _names(fs: Any, root: str) -> list[str]:
    """The names in the directory now: what fsspec remembers may be another run's."""
    fs.invalidate_cache()
    try:
        paths = fs.ls(root, detail=False)
    except FileNotFoundError:
        return []
    paths = [path.rstrip("/") for path in paths]
    return sorted(path.rpartition("/")[2] for path in paths if path != root)  # a bucket may list the prefix itself


def _state(names: list[str], kind: Kind) -> Literal["complete", "partial", "absent"]:
    if kind.last in names:
        return "complete"
    return "partial" if MARKER in names or any(map(kind.data.fullmatch, names)) else "absent"


def _remove(fs: Any, root: str, names: list[str], kind: Kind) -> None:
    """Remove our files among `names`: the last one first and MARKER last, so that what is left meanwhile is partial."""
    marked = MARKER in names
    ours = [name for name in names if kind.data.fullmatch(name) or (marked and is_asset(name))]
    for group in ([kind.last], ours, [MARKER]):
        found = [f"{root}/{name}" for name in group if name in names]
        if found:
            with suppress(FileNotFoundError):  # another rank of this node removes them too, in the same order
                fs.rm(found)


@contextmanager
def _told(url: str, kind: Kind) -> Iterator[None]:
    """Foreign exceptions as ours: what a restart cannot mend is ConfigError."""
    try:
        yield
    except (ConfigError, SinkError):
        raise
    except Exception as error:
        final = isinstance(error, _FINAL) or type(error).__name__ == "NoCredentialsError"
        reason = f"{type(error).__name__}: {error}".replace(url, public_uri(url))
        cls = ConfigError if final else SinkError
        raise cls(f"{kind.key}: {public_uri(url)} cannot be used: {reason}") from error
