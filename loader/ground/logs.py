"""What the command says, and how: as text for people, or as a line of JSON for each thing that is said."""

from __future__ import annotations

import json
import logging
import socket
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TextIO

from loader.ground.progress import Show


@dataclass(frozen=True, slots=True)
class Voice:
    """One rank's. `level` is logging's: WARNING says nothing of what goes well, DEBUG every step of every rank."""

    rank: int = 0
    level: int = logging.INFO
    as_json: bool = False
    host: str = field(default_factory=socket.gethostname)

    @property
    def show(self) -> Show | None:
        """How a load's progress is shown."""
        return None if self.level > logging.INFO else "lines" if self.as_json else "bar"

    def start(self) -> None:
        """From now on the loader's log goes to stderr, in this voice."""
        handler = _ToStderr()
        handler.setFormatter(_Lines(self))
        log = logging.getLogger("loader")
        log.handlers, log.propagate = [handler], False
        log.setLevel(self.level)

    def say(self, text: str, **fields: Any) -> None:
        """On stdout: what the command is asked for, unless it is to be quiet. With `fields`, JSON has these, and of
        `text` its first word alone."""
        if self.level <= logging.INFO:
            told = self._line("info", text.partition(" ")[0] if fields else text, fields) if self.as_json else text
            _write(told, sys.stdout)

    def end(self, text: str, **fields: Any) -> None:
        """On stderr: why the load failed."""
        _write(self._line("error", text, fields) if self.as_json else text, sys.stderr)

    def line(self, record: logging.LogRecord) -> str:
        """A log's record. In text, only what is not said to all and sundry tells when and by whom."""
        message, level = record.getMessage(), record.levelname.lower()
        if self.as_json:
            return self._line(level, message, getattr(record, "fields", {}))
        if record.levelno == logging.INFO:
            return message
        said = "" if record.levelno < logging.INFO else f"{level}: "
        return f"{datetime.now().astimezone():%H:%M:%S} rank {self.rank} on {self.host}: {said}{message}"

    def _line(self, level: str, message: str, fields: dict[str, Any]) -> str:
        about = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level}
        return json.dumps({**about, "rank": self.rank, "host": self.host, "message": message, **fields})


PLAIN = Voice()
"""As without any flag."""


class _Lines(logging.Formatter):
    def __init__(self, voice: Voice) -> None:
        super().__init__()
        self._voice = voice

    def format(self, record: logging.LogRecord) -> str:
        return self._voice.line(record)


class _ToStderr(logging.Handler):
    """To the stderr of the moment: it may be put elsewhere later."""

    def emit(self, record: logging.LogRecord) -> None:
        _write(self.format(record), sys.stderr)


def _write(text: str, stream: TextIO | None) -> None:
    """A line, in one write: all ranks of a host write to one pipe, and `print` under `python -u`, as torchrun runs it,
    writes the line's end by itself, after what another rank wrote meanwhile. Like `print`, nothing where the process
    was started without the stream."""
    if stream is not None:
        stream.write(f"{text}\n")
        stream.flush()
