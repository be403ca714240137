"""The store: ranges of pinned files, read with one retry layer, and counted."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from loader.errors import CatalogError, LoaderError, PinError, StoreError
from loader.ground.pause import Pause
from loader.ground.uri import public_uri, split_uri
from loader.store.base import (
    PIECE,
    Access,
    Checksum,
    Hung,
    Late,
    Scheme,
    Stat,
    Transient,
    Unusable,
    changed,
    checksum_of,
    told,
)
from loader.store.flow import Flow
from loader.store.patience import Patience
from loader.store.retry import Retry
from loader.store.schemes import open_scheme
from loader.store.secrets import Secrets, hush_clients
from loader.store.tally import Asked, Tally

T = TypeVar("T")

_log = logging.getLogger(__name__)

REFUSED = (
    ". Check the credentials (the usual chain: environment, profile, instance role; or source.storage_options), that "
    "they may list and read this prefix, the region and the endpoint"
)
UNREACHED = "Check the endpoint and the network, or raise read.retries or read.deadline"

AGAIN = 3
"""How often a range that is late is asked for again before it is waited for: of one in 50 connections that stall, one
in 125,000 times not often enough."""

HANGS = "See to the mount or the client, and start again"


@dataclass(slots=True)
class _Reading:
    """A range on its way into `buffer`: `filled` bytes are there, after so many `tries` and `gets`. It was first asked
    for after it had `waited` so many seconds. `renewed`: with credentials that were made anew."""

    name: str
    pin: str
    start: int
    buffer: memoryview
    counted: bool
    filled: int = 0
    tries: int = 0
    gets: int = 0
    renewed: bool = False
    since: float = field(default_factory=time.monotonic)
    waited: float | None = None

    @property
    def rest(self) -> memoryview:
        return self.buffer[self.filled :]


class Store:
    """A directory of checkpoint files, or one file.

    `retries` is how often one range is tried again; `deadline` (seconds) bounds all work on the store together. In a
    `pause`, which is made longer when the store asks for fewer requests, none is made. Methods block and may be called
    from many threads; `close` ends them. `access.concurrency` ranges are read at once, then as many as pay, up to
    `most_at_once`.
    """

    def __init__(
        self,
        access: Access,
        *,
        retries: int,
        deadline: float,
        pause: Pause | None = None,
        most_at_once: int | None = None,
    ) -> None:
        hush_clients()
        directory, self.only = split_uri(access.uri)
        self.uri = public_uri(access.uri)
        self.tally = Tally()
        self._secrets = Secrets(access.storage_options)
        self._directory = public_uri(directory)
        self._retries = retries
        self._until = time.monotonic() + deadline
        self._closed = threading.Event()
        self._retry = Retry(retries, self._until, self._closed, pause or Pause(), self._count_retry)
        self._lock = threading.Lock()
        self._patience = Patience()
        self.most_at_once = most_at_once or access.concurrency
        self._flow = Flow(access.concurrency, self.most_at_once)
        self._access = replace(access, uri=directory, until=self._until, concurrency=self.most_at_once)
        self._scheme = self._open()
        self._opened = [self._scheme]

    @property
    def ends_when_closed(self) -> bool:
        """Whether nothing is written to any buffer after `close`: a client library may be late with what it had."""
        return getattr(self._scheme, "ends_when_closed", False)

    def _open(self) -> Scheme:
        try:
            return open_scheme(self._access)
        except Exception as error:  # noqa: BLE001 - whatever a client library raises where it is given what it cannot use
            raise CatalogError(
                f"{self.uri}: cannot be opened: {self._secrets.hide(told(error))}. "
                "Check the URI, source.storage_options and the credentials"
            ) from self._secrets.cause(error)

    def names(self) -> list[str] | None:
        """Names of the files in the directory, sorted; None where the scheme cannot list. Raises CatalogError."""
        if self.only is not None:
            return [self.only]
        return self.beside()

    def beside(self) -> list[str] | None:
        """As `names`, also where the URI names one file."""
        try:
            found = self._try(self._scheme.names, "the listing")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._told(CatalogError, "no such directory, bucket or prefix: ", error) from None
        except (PermissionError, Unusable) as error:
            raise self._told(CatalogError, "", error, REFUSED) from self._secrets.cause(error)
        return None if found is None else sorted(found)

    def stat(self, name: str) -> Stat | None:
        """Size and pin of a file, None where there is none. Raises CatalogError without permission, StoreError."""
        try:
            return self._try(lambda: self._scheme.stat(name), name)
        except FileNotFoundError:
            return None
        except (PermissionError, Unusable) as error:
            raise self._told(CatalogError, "", error, REFUSED) from self._secrets.cause(error)

    def checksum(self, name: str, pin: str) -> Checksum | str:
        """What the store says of all bytes of the version `pin`, or why nothing. Raises as `stat`, and PinError."""

        def ask() -> Checksum | str:
            scheme = self._scheme
            try:
                return checksum_of(scheme, name, pin)
            except FileNotFoundError as error:
                raise _gone(scheme, name, pin, error) from error

        try:
            return self._try(ask, name)
        except (PermissionError, Unusable) as error:
            raise self._told(CatalogError, "", error, REFUSED) from self._secrets.cause(error)

    def read_small(self, name: str, stat: Stat) -> bytes:
        """A whole small object (config, index): not counted as a GET of a checkpoint file."""
        buffer = bytearray(stat.size)
        if buffer:
            self._fill(name, stat.pin, 0, memoryview(buffer), counted=False)
        return bytes(buffer)

    def prepare(self) -> None:
        """Begin, beside whatever else is done, with what the first range would wait for: credentials, a signature."""

        def prepare() -> None:
            with suppress(Exception):  # the first range meets it again, and has retries and words for it
                getattr(self._scheme, "prepare", lambda: None)()

        threading.Thread(target=prepare, name="loader-prepare", daemon=True).start()

    def begin(self, size: int) -> None:
        """From here on it is the checkpoint's ranges that are read, of `size` bytes together: how many at once pay, and
        how long they take, is found anew."""
        self._patience = Patience()
        self.expect(size)
        self._flow.begin()

    def expect(self, size: int) -> None:
        """So many bytes are to be read, of which a share may be asked for twice."""
        self._patience.expect(size)

    def read(self, name: str, pin: str, start: int, buffer: memoryview) -> Asked:
        """Fill `buffer` with the bytes from `start` on, of the version `pin`. Raises StoreError, PinError."""
        return self._fill(name, pin, start, buffer, counted=True) if len(buffer) else Asked(0, 0, 0.0)

    def close(self) -> None:
        """End waiting between tries: what is still being read fails."""
        self._closed.set()
        for scheme in self._opened:
            _close(scheme)

    def _renew(self, refused: Scheme) -> None:
        """Open the scheme again, credentials and all, through the usual chain: those that it had may have expired."""
        with self._lock:
            if self._scheme is refused:  # else another thread has
                try:
                    opened = self._open()
                except CatalogError as error:
                    raise StoreError(error.message) from error.__cause__
                self._opened.append(opened)  # with the other ones some are reading still
                if self._closed.is_set():  # meanwhile
                    _close(opened)
                self._scheme = opened

    def _fill(self, name: str, pin: str, start: int, buffer: memoryview, *, counted: bool) -> Asked:
        reading = _Reading(name, pin, start, buffer, counted)
        where = f"{name} bytes {start}-{start + len(buffer) - 1}"
        try:
            self._try(lambda: self._read_rest(reading), where)
        except (PermissionError, Unusable) as error:
            raise self._told(
                StoreError, f"{where}: ", error, ": the store answered before, and refuses now"
            ) from self._secrets.cause(error)
        assert reading.waited is not None, "it has been asked for"
        return Asked(reading.gets, reading.tries - 1, reading.waited)

    def _read_rest(self, reading: _Reading) -> None:
        """Ask for what is not there yet; where that is late, for what is still not there: the next may stall too."""
        reading.tries += 1
        again = AGAIN
        while not self._ask_for_rest(reading, hedged=again > 0):
            again -= 1

    def _ask_for_rest(self, reading: _Reading, *, hedged: bool) -> bool:
        """Whether it came; if `hedged`, it may also have been late."""
        got, scheme, again = 0, self._scheme, min(PIECE, len(reading.rest))
        try:
            with self._flow.place():
                self._retry.wait_out_the_pause()  # it may have been asked for since this range began to wait
                begun = time.monotonic()
                if reading.waited is None:
                    reading.waited = begun - reading.since
                late = partial(self._patience.late, again=again) if hedged else _never
                scheme.read(reading.name, reading.pin, reading.start + reading.filled, reading.rest, late)
            got = len(reading.rest)
            self._patience.took(time.monotonic() - begun, got)
            self._flow.arrived(got)
        except Transient as error:
            got = error.filled
            if error.throttled:
                self._flow.throttled()
            if got == len(reading.rest):  # it all came before: there is no rest to ask for
                return True
            if not isinstance(error, Late):
                raise
            self.tally.add(hedged_bytes=again)
            return False
        except FileNotFoundError as error:
            raise _gone(scheme, reading.name, reading.pin, error) from error
        except PermissionError as error:
            if reading.renewed or not self._retries:
                raise
            reading.renewed = True
            self._renew(scheme)
            raise Transient(f"refused, and asked again with credentials made anew: {error}") from error
        finally:
            reading.filled += got
            reading.gets += 1
            if reading.counted:
                self.tally.add(gets=1, fetched_bytes=got)
        return True

    def _try(self, call: Callable[[], T], what: str) -> T:
        try:
            return self._retry(call, what)
        except Transient as error:
            how = f"{error.tries} tries; read.retries is {self._retries}"
            how += "; read.deadline has passed" if time.monotonic() >= self._until else ""
            raise self._told(StoreError, f"{what}: ", error, f" ({how}). {UNREACHED}") from self._secrets.cause(error)
        except Hung as error:
            raise self._told(StoreError, f"{what}: ", error, f", and cannot be interrupted. {HANGS}") from None
        except (LoaderError, OSError, Unusable):
            raise
        except Exception as error:  # noqa: BLE001 - a client library's, in a case that its scheme does not know
            raise self._told(StoreError, f"{what}: ", told(error)) from self._secrets.cause(error)

    def _count_retry(self, what: str, error: Transient, seconds: float) -> None:
        self.tally.add(retries=1, throttled=error.throttled)
        _log.debug("%s: %s; again in %.1f s", what, self._secrets.hide(str(error)), seconds)

    def _told(self, kind: type[LoaderError], before: str, error: object, after: str = "") -> LoaderError:
        """The error of our own that tells another, without its secrets."""
        return kind(f"{self._directory}: {before}{self._secrets.hide(str(error))}{after}")


def _never(_: float) -> bool:
    return False


def _close(scheme: Scheme) -> None:
    getattr(scheme, "close", lambda: None)()  # a scheme need not have any


def _gone(scheme: Scheme, name: str, pin: str, error: FileNotFoundError) -> PinError | Transient:
    """What it means that the store has no such range any more: another object is there now, as far as it tells."""
    try:
        found = scheme.stat(name).pin
    except (OSError, Transient, Unusable):
        found = "no such object"
    return changed(name, pin, found) if found != pin else Transient(f"{error}, of a file that has not changed")
