"""The places that a load is written to: made ready before anything is read, and in the end whole or not there."""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from loader.build import Model
from loader.config import Output
from loader.errors import LoaderError, LostRankError
from loader.exchange.control import Control
from loader.exchange.node import node_name
from loader.ground.caller import within
from loader.ground.logs import Voice
from loader.ground.uri import public_uri
from loader.place.layout import layout_of
from loader.place.targets import held_in, targets_of
from loader.report import Source
from loader.sinks import assets, directory, local, manifest
from loader.stream.planning import alike_on_all_ranks, pack, unpack
from loader.stream.save import save

REMOVAL, REMOVAL_AFTER_A_LOSS = 4.0, 1.0
"""Seconds to remove what a run that fails has begun: all ranks are to end within 10, and a lost one was missed for 7.
A bucket that is out of reach would take minutes; what is left there is incomplete, and the next run reclaims it."""


@contextmanager
def prepared(wished: Output, control: Control, voice: Voice) -> Iterator[Outputs]:
    """The outputs of `wished` that are to be written, emptied again if the run fails."""
    outputs = Outputs(wished, control, voice)
    try:
        outputs.prepare()
        yield outputs
    except LoaderError:
        outputs.discard()
        raise


class Outputs:
    """`checkpoint` and `local` as the config has them; None where there is none, or a complete one is to be used."""

    def __init__(self, wished: Output, control: Control, voice: Voice) -> None:
        self._voice = voice
        self._wished = wished
        self._control = control
        self._first_of_node = int(os.environ.get("LOCAL_RANK", "0")) == 0
        self.checkpoint: str | None = None
        self.local: str | None = None

    @property
    def all_there(self) -> bool:
        """Whether there is nothing to do: all that the config names is complete and to be used."""
        named = self._wished.checkpoint or self._wished.local
        return bool(named) and not self.checkpoint and not self.local

    def prepare(self) -> None:
        if self._wished.checkpoint is not None:
            self._prepare_checkpoint(self._wished.checkpoint)
        if self._wished.local is not None:
            self._prepare_local(self._wished.local)

    def _prepare_checkpoint(self, url: str) -> None:
        control = self._control
        with control.phase("output"):
            made = directory.prepare(url, self._wished.if_exists) if control.rank == 0 else True
            wanted = control.broadcast("wanted", b"yes" if made else b"no") == b"yes"
        if wanted:
            self.checkpoint = url
        elif control.rank == 0:
            self._voice.say(f"{public_uri(url)} holds a complete checkpoint: used as it is")

    def _prepare_local(self, path: str) -> None:
        """Complete are shards that one run left on every node; what only some nodes have is reclaimed."""
        control, if_exists = self._control, self._wished.if_exists
        with control.phase("local"):
            found = manifest.read_complete(path) if if_exists != "overwrite" else None
            complete = alike_on_all_ranks(control, "complete", found.run if found else None)
            if complete and not directory.prepare(path, if_exists, directory.SHARDS):
                if control.rank == 0:
                    self._voice.say(f"{path} holds complete shards: used as they are")
                return
        self.local = path
        with control.phase("local directory"):
            if self._first_of_node:
                directory.prepare(path, "overwrite", directory.SHARDS)

    def copy_assets(self, read: Callable[[str, int], bytes], names: Iterable[str]) -> None:
        """The source's config and tokenizer, beside each output. `read` and `names` are as `assets.copy` takes them."""
        if self.checkpoint is not None and self._control.rank == 0:
            assets.copy(read, names, self.checkpoint)
        if self.local is not None and self._first_of_node:
            assets.copy(read, names, self.local)

    def check_room(self, model: Model) -> None:
        """Raise ConfigError where a node has no room for the shards of its ranks, before they are read."""
        if self.local is None:
            return
        control = self._control
        with control.phase("room"):
            control.put("room", pack((node_name(), local.size_of(held_in(model)))))
            told = b""
            if control.rank == 0:
                needed: Counter[str] = Counter()
                for node, size in map(unpack, control.take("room", range(control.world_size))):
                    needed[node] += size
                told = pack(needed)
            local.check_room(self.local, unpack(control.broadcast("rooms", told))[node_name()])

    def save(self, model: Model, source: Source, fingerprint: str | None) -> None:
        """Write `model`, filled, on every rank. Without an entrypoint its memory is given up on the way."""
        if self.checkpoint is not None:
            save(targets_of(model), self.checkpoint, self._control)
        if self.local is not None:
            self._save_local(self.local, model, source, fingerprint)

    def _save_local(self, path: str, model: Model, source: Source, fingerprint: str | None) -> None:
        control = self._control
        with control.phase("save shards"):
            run = control.broadcast("run", uuid.uuid4().hex.encode() if control.rank == 0 else None).decode()
            local.save(
                [(held, layout_of(held)) for held in held_in(model)],
                path,
                rank=control.rank,
                world_size=control.world_size,
                about={"run": run, "uri": source.uri, "pins": source.pins, "fingerprint": fingerprint},
                spend=self._wished.entrypoint is None,
                go_on=control.go_on,
            )
        with control.phase("complete"):
            if self._first_of_node:
                local.finish(path, run, rank=control.rank, world_size=control.world_size)
        with control.phase("finish"):
            if self._first_of_node:
                directory.finish(path, directory.SHARDS)

    def discard(self) -> None:
        """Remove what was begun, as far as that can be done in time."""
        lost = isinstance(self._control.error, LostRankError)
        within(REMOVAL_AFTER_A_LOSS if lost else REMOVAL, self._remove, "loader-discard")

    def _remove(self) -> None:
        """Ranks write their shards by themselves, so each looks when it has stopped."""
        if self.checkpoint is not None and self._first_of_node:  # each node may have a local directory of its own
            directory.discard(self.checkpoint)
        if self.local is not None:
            directory.discard(self.local, directory.SHARDS)
