"""Rounds through read, exchange and write, side by side.

Reader threads fill buffers ahead; one thread (this module's `run`) owns the transport: it opens rounds in order, as
soon as there is room, uploads what was read to where the shards are, and sends it, whichever came first. The writer
thread waits for what the others send, and writes it: so what was read is not held back until another rank has sent what
it is late with. Neighbours, with whom memory is shared, are sent nothing: they are told where it stands, and write it
from there. What belongs in a shard as it is, and nowhere else, is read into the shard. All else of a round has its
memory in one slot, used again only when everything in it was sent, taken and written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue

from torch import Tensor

from loader.exchange.control import Control
from loader.exchange.neighbours import Neighbours
from loader.exchange.transport import Batch, Sent, Transport, Work
from loader.ground.caller import LOOK, Caller
from loader.place.landing import Landings
from loader.plan.catalog import Catalog
from loader.plan.schedule import Message, Read, Receive, Round, Schedule
from loader.store.tally import Asked
from loader.stream.buffers import Buffer, Slot
from loader.stream.pieces import Pieces
from loader.stream.stage import Stage


@dataclass(slots=True)
class _Open:
    """A round in flight. `reads` are those that have not been sent, by extent; `straight` are extents that are read
    into a shard; each of `arrivals`, until the writer has it, waits for what another rank sends, and writes it."""

    round: Round
    batch: Batch | None
    slot: Slot
    reads: dict[int, tuple[Read, Buffer]] = field(default_factory=dict)
    straight: set[int] = field(default_factory=set)
    arrivals: list[Callable[[], None]] = field(default_factory=list)
    sends: list[Sent] = field(default_factory=list)
    offers: list[Sent] = field(default_factory=list)
    done: Future[None] = field(default_factory=Future)  # nothing uses its memory any more


class Pipeline:
    """One rank's rounds.

    `read_range(file, start, memory)` fills a uint8 tensor with a file's bytes from `start` on, and tells what that
    took. `transport` may be None where nothing is sent to ranks that are no `neighbours`; these share host memory, and
    are None on a device. `stage` is where the shards are. `concurrency` ranges are read at once. With `straight`, some
    are read into shards: after an error, too, until the store is closed.

    The control's recorder gets a span GET for each range; read, while ranges are waited for; exchange,
    while a message is packed and sent, or waited for; write, while a shard is written, and convert within it; upload,
    while copies to the device are waited for; slot, while all rounds in flight are.
    """

    def __init__(
        self,
        schedule: Schedule,
        catalog: Catalog,
        read_range: Callable[[int, int, Tensor], Asked],
        landings: Landings,
        control: Control,
        transport: Transport | None,
        neighbours: Neighbours | None,
        stage: Stage,
        *,
        slots: int,
        concurrency: int,
        straight: bool,
    ) -> None:
        self.exchanged_bytes = 0
        self._recorder = control.recorder
        self._schedule = schedule
        self._rounds = schedule.rounds
        self._catalog = catalog
        self._pieces = Pieces(schedule, catalog, landings)
        self._read_range = read_range
        self._control = control
        self._transport = transport
        self._neighbours = neighbours
        self._near = neighbours.ranks if neighbours is not None else frozenset()
        self._stage = stage
        self._reads_straight = straight and stage.on_host
        self._on_device = transport is not None and transport.on_device
        self._slots = [Slot(neighbours.allocate if neighbours is not None else stage.allocate) for _ in range(slots)]
        self._flights: list[_Open] = []  # of each slot the last round, which may be done
        self._opened = 0
        self._news: SimpleQueue[tuple[_Open, int] | None] = SimpleQueue()  # what was read, or None
        self._readers = ThreadPoolExecutor(concurrency, thread_name_prefix="loader-read")
        self._writer = Caller("loader-write")  # which may wait for a lost rank for ever

    def run(self) -> None:
        """Run every round. After an error anywhere, end with the round that all peers end with, and return."""
        try:
            for number in range(self._rounds):
                while self._opened <= number and self._control.may_start(self._opened):
                    self._wait_for(self._in_the_way())
                    self._open_next()
                if number == self._opened:
                    break
                self._finish_sending(self._flights[number % len(self._slots)])
            self._wait_for(self._flights)
            for slot in self._slots:
                slot.close()
        finally:
            self._readers.shutdown(wait=False, cancel_futures=True)
            self._writer.close()

    def _open_ahead(self) -> None:
        """Open rounds while there are slots that nothing uses any more."""
        while self._opened < self._rounds and all(flight.done.done() for flight in self._in_the_way()):
            if not self._control.may_start(self._opened):
                return
            self._open_next()

    def _in_the_way(self) -> list[_Open]:
        """The round that has the slot of the next to be opened, if there are both."""
        place = self._opened % len(self._slots)
        return self._flights[place : place + 1] if self._opened < self._rounds else []

    def _wait_for(self, flights: Sequence[_Open]) -> None:
        with self._recorder.span("slot"):
            wait([flight.done for flight in flights])

    def _open_next(self) -> None:
        place = self._opened % len(self._slots)
        self._flights[place : place + 1] = [self._open(self._opened)]
        self._opened += 1

    def _open(self, number: int) -> _Open:
        """Lay out the round's memory, queue its reads, and post all its receives."""
        slot = self._slots[number % len(self._slots)]
        flight = _Open(self._schedule.round(number), self._transport.batch() if self._transport else None, slot)
        todo = flight.round
        far = [receive for receive in todo.receives if receive.sender not in self._near]
        packed = [message.size for read in todo.reads for message, ranks in read.sends if self._packs(message, ranks)]
        shards = dict(self._straight(todo.reads))
        flight.straight.update(shards)
        held = [read.size for read in todo.reads if read.extent not in flight.straight]
        sizes = [*packed, *held, *(receive.message.size for receive in far)]
        slot.prepare(sum(sizes), len(sizes))
        for read in todo.reads:
            shard = shards.get(read.extent)
            buffer = slot.take(read.size, read.start) if shard is None else Buffer(shard, shard)
            flight.reads[read.extent] = (read, buffer)
            self._readers.submit(self._read, flight, read, buffer.host)
        near = [receive for receive in todo.receives if receive.sender in self._near]
        flight.arrivals += [partial(self._take, receive) for receive in near]  # first: it is held there until then
        for receive in far:
            assert flight.batch is not None, "a rank alone exchanges nothing"
            buffer = slot.take(receive.message.size)
            work = flight.batch.receive(receive.extent, self._exchanged(buffer), receive.sender)
            flight.arrivals.append(partial(self._receive, receive, buffer, work))
        return flight

    def _straight(self, reads: Iterable[Read]) -> Iterator[tuple[int, Tensor]]:
        for read in reads if self._reads_straight else ():
            if not read.sends and (shard := self._pieces.straight(read.own, read.size)) is not None:
                yield read.extent, shard

    def _far(self, ranks: Iterable[int]) -> list[int]:
        return [rank for rank in ranks if rank not in self._near]

    def _packs(self, message: Message, ranks: Iterable[int]) -> bool:
        """Whether its pieces, which do not stand together, are to be sent."""
        return message.begin is None and bool(self._far(ranks))

    def _read(self, flight: _Open, read: Read, memory: Tensor) -> None:
        news = None
        try:
            with self._failing():
                if self._control.error is None:
                    self._read_and_tell(read, memory)
                    news = (flight, read.extent)
        finally:
            self._news.put(news)

    def _read_and_tell(self, read: Read, memory: Tensor) -> None:
        name = self._catalog.files[read.file].name
        with self._recorder.span("GET", file=name, start=read.start, bytes=read.size) as span:
            asked = self._read_range(read.file, read.start, memory)
            span.begin_later(asked.waited)
            span.facts |= {"gets": asked.gets, "retries": asked.retries}
        self._control.has_read(read.size)

    def _finish_sending(self, flight: _Open) -> None:
        """Send what this rank reads of the round, and leave it to the writer to take what the others send.

        Meanwhile further rounds are opened, and what comes of them is sent as well. Once the job has failed, what has
        not come is sent as it is: the others may be waiting for it.
        """
        while flight.reads and self._control.error is None:
            self._open_ahead()
            if (came := self._await_news()) is not None and self._control.error is None:
                self._send(*came, arrived=True)
        for extent in list(flight.reads):
            self._send(flight, extent, arrived=False)
        if flight.batch is not None:
            with self._stage.uploading():
                flight.batch.start()
        while flight.arrivals:  # what the flight kept would keep this object, and all rounds' memory, until it is found
            self._writer.submit(flight.arrivals.pop(0))
        self._writer.submit(partial(self._end, flight))  # the last of the round's, which are done in turn

    def _await_news(self) -> tuple[_Open, int] | None:
        """A range that has been read; None where a slot has become free, a read has failed, or after a while."""
        with self._recorder.span("read"):
            try:
                return self._news.get(timeout=LOOK)
            except Empty:
                return None

    def _send(self, flight: _Open, extent: int, *, arrived: bool) -> None:
        read, buffer = flight.reads.pop(extent)
        if arrived:
            self._offer(flight, read, buffer)
        with self._stage.uploading():
            self._stage.upload(buffer)
            for message, ranks in read.sends:
                with self._recorder.span("exchange", bytes=message.size, to=len(ranks)):
                    if far := self._far(ranks):
                        assert flight.batch is not None, "a rank alone exchanges nothing"
                        payload = self._payload(message, self._exchanged(buffer), flight.slot, arrived=arrived)
                        flight.sends += flight.batch.send(extent, payload, far)
                self.exchanged_bytes += message.size * len(ranks)
        if arrived and read.own.pieces:
            memory = None if extent in flight.straight else buffer.there
            self._writer.submit(partial(self._write_own, read.own, memory))

    def _offer(self, flight: _Open, read: Read, buffer: Buffer) -> None:
        near = {rank for _, ranks in read.sends for rank in ranks if rank in self._near}
        if self._neighbours is not None and near:
            flight.offers.append(self._neighbours.offer(read.extent, buffer.host, near))

    def _end(self, flight: _Open) -> None:
        """Wait for what is sent and for what a device has been given to do, and give the round's memory free."""
        try:
            with (
                self._failing(),
                self._recorder.span("exchange", sent_round=flight.round.number),
                self._stage.writing(),
            ):
                for work in (*flight.sends, *flight.offers):  # after an error only messages come to their end
                    work.wait()
        finally:
            self._settle(flight)  # also after an error: a device may be at work on the memory

    def _settle(self, flight: _Open) -> None:
        try:
            with self._failing():
                with self._recorder.span("upload", round=flight.round.number):
                    self._stage.arrive()
                with self._recorder.span("exchange" if self._on_device else "write", bytes=0):
                    self._stage.settle()
        finally:
            flight.done.set_result(None)
            self._news.put(None)

    def _payload(self, message: Message, memory: Tensor, slot: Slot, *, arrived: bool) -> Tensor:
        """The message's bytes: a view of the extent where they are one run of it, else packed."""
        if message.begin is not None:
            return memory[message.begin : message.begin + message.size]
        packed = self._exchanged(slot.take(message.size))
        if arrived:
            self._pieces.pack(message, memory, packed)
        return packed

    def _write_own(self, message: Message, memory: Tensor | None) -> None:
        """With no memory, it was read to where it belongs."""
        if self._control.error is None:
            with self._failing(), self._stage.writing(), self._recorder.span("write", bytes=message.size):
                if memory is None:
                    self._pieces.arrived(message)
                else:
                    self._pieces.land(message, memory)

    def _receive(self, receive: Receive, buffer: Buffer, work: Work) -> None:
        with self._failing(), self._stage.writing():
            with self._recorder.span("exchange", bytes=receive.message.size, sender=receive.sender):
                work.wait()
                if self._control.error is not None:
                    return
                work.check(self._exchanged(buffer), lambda: self._pieces.told(receive))
            with self._recorder.span("write", bytes=receive.message.size):
                if not self._on_device:
                    self._stage.upload(buffer)
                self._pieces.land_packed(receive.message, buffer.there)

    def _take(self, receive: Receive) -> None:
        assert self._neighbours is not None
        with self._failing():
            with self._recorder.span("exchange", bytes=receive.message.size, sender=receive.sender):
                extent = self._neighbours.look(receive.extent, receive.sender)
            with self._recorder.span("write", bytes=receive.message.size):
                self._pieces.land(receive.message, extent)
            self._neighbours.took(receive.extent, receive.sender)

    def _exchanged(self, buffer: Buffer) -> Tensor:
        """Those of its bytes that are sent or received."""
        return buffer.there if self._on_device else buffer.host

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Make what is raised the job's error."""
        try:
            yield
        except BaseException as error:
            self._control.fail(error)
            raise
