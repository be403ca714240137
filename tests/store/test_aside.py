"""Calls that hang in the kernel: who asked goes on, and the thread that hangs holds nobody up."""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from loader.errors import StoreError
from loader.store.aside import Aside
from loader.store.base import Access, Hung, Transient
from loader.store.store import Store

NAME = "model.safetensors"


class Hanging(LocalFileSystem):
    """Whose reads wait for ever for somebody to open the other end."""

    protocol = "hanging"

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: object) -> bytes:
        return Path(path).with_name("fifo").read_bytes()


@pytest.fixture
def directory(tmp_path) -> Path:
    (tmp_path / NAME).write_bytes(bytes(1000))
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


def _release(directory: Path) -> None:
    """Let the thread that hangs go: its end must not harm either."""
    with (directory / "fifo").open("wb"):
        pass


def test_the_deadline_ends_a_read_of_a_client_that_hangs(directory):
    fsspec.register_implementation("hanging", Hanging, clobber=True)
    store = Store(Access(f"hanging://{directory}", {}, 1, 0.1), retries=3, deadline=1)
    pin = store.stat(NAME).pin
    begun = time.monotonic()
    with pytest.raises(StoreError, match=rf"{NAME} bytes 0-9: .*read.deadline has passed, and cannot be interrupted"):
        store.read(NAME, pin, 0, memoryview(bytearray(10)))
    store.close()
    assert time.monotonic() - begun < 30
    _release(directory)


def test_who_hung_once_may_ask_again_and_a_sign_of_life_counts(directory):
    aside = Aside(2.0, math.inf)
    with pytest.raises(Hung, match=r"nothing came for 2 s \(read.timeout\)"):
        aside.call(lambda _: (directory / "fifo").read_bytes())
    _release(directory)
    lives = threading.Event()

    def slowly(alive) -> str:
        for _ in range(30):
            lives.wait(0.1)
            alive()
        return "done"

    assert aside.call(slowly) == "done"
    with pytest.raises(FileNotFoundError):
        aside.call(lambda _: (directory / "nothing").stat())
    aside.close()


def test_closing_ends_the_threads(directory):
    before = set(threading.enumerate())  # those of other tests may hang still
    aside = Aside(5, math.inf)
    threads = [threading.Thread(target=aside.call, args=(lambda _: time.sleep(0),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    aside.close()
    for each in set(threading.enumerate()) - before:
        if each.name == "loader-file":
            each.join(30)  # it may not have had its turn yet
            assert not each.is_alive()


def test_closing_waits_for_none_that_hangs_and_who_waits_is_let_go(directory):
    """One after another these would be waited for 12 s."""
    aside, ends = Aside(300, math.inf), []
    begun = threading.Semaphore(0)

    def hang(_) -> None:
        begun.release()
        (directory / "fifo").read_bytes()

    def ask() -> None:
        try:
            aside.call(hang)
        except (Hung, Transient) as error:
            ends.append(type(error))

    asking = [threading.Thread(target=ask) for _ in range(60)]
    for thread in asking:
        thread.start()
    for _ in asking:
        begun.acquire()
    since = time.monotonic()
    aside.close()
    assert time.monotonic() - since < 6
    for thread in asking:
        thread.join()
    ask()
    assert ends == [Hung] * 60 + [Transient]
    _release(directory)
