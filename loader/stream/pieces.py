"""A round's bytes, piece by piece: from an extent into a message, and from either to where they land."""

from __future__ import annotations

from torch import Tensor

from loader.place.landing import Landings
from loader.plan.catalog import Catalog
from loader.plan.schedule import Message, Piece, Receive, Schedule
from loader.stream.buffers import as_tensor, joined, put


class Pieces:
    """What the schedule's messages are made of, of the catalog's keys."""

    def __init__(self, schedule: Schedule, catalog: Catalog, landings: Landings) -> None:
        self._plan = schedule.plan
        self._catalog = catalog
        self._entries = list(catalog.entries.values())
        self._landings = landings

    def straight(self, message: Message, size: int) -> Tensor | None:
        """Where an extent of `size` bytes belongs as it is, all of it: the memory (uint8) of a shard, that may be read
        into; None where there is no such."""
        if (message.begin, message.size) != (0, size):
            return None
        runs: list[Tensor] = []
        for piece in message.pieces:
            run = self._landings.straight(piece.key, piece.box, self._entries[piece.key].dtype)
            if run is None:
                return None
            runs.append(run)
        return joined(runs)

    def arrived(self, message: Message) -> None:
        """The message was read to where it belongs."""
        self._landings.arrived(message.size)

    def pack(self, message: Message, extent: Tensor, packed: Tensor) -> None:
        """Copy the message's pieces, one after another, to `packed`. All memory is contiguous, and uint8."""
        at = 0
        for piece in message.pieces:
            values = self._within(piece, extent)
            size = values.numel() * values.element_size()
            put(values, packed[at : at + size])
            at += size

    def land(self, message: Message, extent: Tensor) -> None:
        """Write the message's pieces from the extent that they are part of."""
        for piece in message.pieces:
            self._landings.land(piece.key, piece.box, self._within(piece, extent))

    def land_packed(self, message: Message, packed: Tensor) -> None:
        """Write the message's pieces, which stand there one after another."""
        at = 0
        for piece in message.pieces:
            dtype = self._entries[piece.key].dtype
            size = piece.box.numel * dtype.itemsize
            self._landings.land(piece.key, piece.box, as_tensor(packed[at : at + size], dtype, piece.box.sizes))
            at += size

    def told(self, receive: Receive) -> str:
        """The message's keys, and the bytes of the file that they are from."""
        plan, names = self._plan, list(self._catalog.entries)
        first, *more = dict.fromkeys(names[piece.key] for piece in receive.message.pieces)
        keys = f"{first} and {len(more)} more keys" if more else first
        file = self._catalog.files[int(plan.file[receive.extent])].name
        return f"{keys}, of bytes {plan.start[receive.extent]}-{plan.stop[receive.extent]} of {file}"

    def _within(self, piece: Piece, extent: Tensor) -> Tensor:
        dtype = self._entries[piece.key].dtype
        size = piece.frame.numel * dtype.itemsize
        frame = as_tensor(extent[piece.at : piece.at + size], dtype, piece.frame.sizes)
        return frame[piece.box.slices(piece.frame.offsets)]
