"""A pickle as data: what it would import is a name, what it would call is written down. Nothing of it runs.

torch's own weights-only unpickler decides which names may occur, and would read the same pickles; but it calls what it
finds. `bytearray(1 << 40)` is on its list, a tensor may be made on the CPU, and a tuple of tuples of tuples as a dict's
key is hashed for years. Here a dict is a list of pairs, and a call is a record.
"""

from __future__ import annotations

import io
import pickletools
from typing import IO, Any, NamedTuple

from loader.errors import CatalogError
from loader.formats.strict_json import advice, quote
from loader.formats.torch_file.machine import Machine, Persistent

MAX_PICKLE = 32 << 20
"""Bytes. A tensor takes 100 to 300: 90,000 keys fit."""

AHEAD = 32 * 1024
"""Bytes read at once of pickles whose lengths are not known."""

MAX_LINE = 64 * 1024
"""Bytes of a name, or of a number in text."""


class Unpickled(NamedTuple):
    """The object; and every persistent id that occurred, in order."""

    value: Any
    persistent: list[Persistent]


class PickleStream(io.BufferedReader):
    """Pickles at the beginning of a file, whose lengths are not known. Reads AHEAD of them, and never much at once."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw, AHEAD)

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_PICKLE or self.tell() + size > MAX_PICKLE:
            raise ValueError(f"it has more than {MAX_PICKLE} bytes")
        return super().read(size)

    def readline(self, size: int | None = -1) -> bytes:
        return super().readline(MAX_LINE if size is None or size < 0 else size)


def unpickle(stream: IO[bytes], *, file: str) -> Unpickled:
    """Read one pickle of `stream` (of the checkpoint's `file`), up to its end.

    Raises CatalogError for a name that torch's weights-only unpickler would not import, and for what is no pickle.
    """
    machine = Machine(file)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.step(opcode.name, argument)
        return Unpickled(machine.stack.pop(), machine.persistent)
    except CatalogError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CatalogError(f"{file}: its pickle cannot be read: {quote(str(error))}. {advice()}.") from error
