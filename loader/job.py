"""One load: what is at the source, how it is read, and what came of it."""

from __future__ import annotations

import difflib
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from loader import report as reports
from loader.config import Proof, Read
from loader.convert.conversion import apply, needless_keys, visible_keys
from loader.convert.fit import Fitted, Wishes, fit
from loader.convert.graph import Node, seen_in
from loader.convert.lazy import Convert
from loader.convert.named import NAMED, named
from loader.convert.quantised import (
    dequantise,
    dtype_of,
    is_packed,
    quantisation,
    quantised_keys,
    undeclared,
    unquantised,
)
from loader.convert.vocabulary import Vocabulary
from loader.errors import CatalogError, ConfigError, ConversionError
from loader.exchange.control import Control
from loader.exchange.node import node_name
from loader.formats.hf_config import vocab_size
from loader.ground.memory import PeakMemory, anonymous_bytes
from loader.ground.progress import Show
from loader.place.initialise import initialiser
from loader.place.targets import Target, targets_of
from loader.place.user_code import resolve
from loader.store.base import Access
from loader.store.flow import PLACE_BYTES, most_places
from loader.store.schemes import client_bytes, import_scheme
from loader.store.source import Source, read_source
from loader.store.store import Store
from loader.stream.load import Loaded, Manner, fill
from loader.stream.planning import on_any_rank, pack, unpack
from loader.stream.verify import agree_on_fingerprint, check_fingerprint

KEY_BYTES = 1600
"""What a key takes in the catalog: 7.6 MiB for 5,000 of a Llama's, with what parsing them leaves behind."""


class Filled(NamedTuple):
    """What came of a load on this rank: see `Loaded`; how many keys had to be used; the fingerprint, if asked for."""

    loaded: Loaded
    tensors: int
    fingerprint: str | None


class Job:
    """The steps that the command and the library share. Every rank takes them together."""

    def __init__(
        self,
        uri: str,
        storage_options: Mapping[str, Any],
        read: Read,
        control: Control,
        *,
        checksums: bool = False,
        code: bool = False,
    ) -> None:
        """With `checksums`, what is loaded is held against those that the source has; with `code`, its own runs."""
        self.begun = time.monotonic()
        self.read = read
        self.control = control
        self.memory = PeakMemory()
        with control.phase("open"):
            access = Access(uri, dict(storage_options), read.concurrency, read.timeout, read.backend)
            import_scheme(access)  # imports are no cost of a load; what is taken from here on is
            before = anonymous_bytes()
            self.store = Store(
                access,
                retries=read.retries,
                deadline=read.deadline,
                pause=control.pause,
                most_at_once=most_places(read.concurrency, read.memory_budget),
            )
        with control.phase("catalog"):
            found = b""
            if control.rank == 0:
                found = pack(read_source(self.store, read.concurrency, checksums=checksums, code=code))
            else:
                self.store.prepare()
            self.source: Source = unpack(control.broadcast("source", found))
        self._held_bytes = max(0, anonymous_bytes() - before)

    def trace(
        self,
        convert: Convert | None,
        ignore: Sequence[str],
        strip_prefix: str,
        *,
        dequantize: bool = True,
        held: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        """Decide which keys count, under which names and as what, and trace the conversion: `keys`, `outputs`,
        and `needless`, which it declares to be.

        Nothing is dequantised where some rank's target, of dtypes `held` by FQN, holds a packed key as it is stored.
        """
        with self.control.phase("trace"):
            self.keys = visible_keys(self.source.catalog, ignore, strip_prefix)
            self._see_quantised(dequantize, held or {})
            hf_config = self.hf_config() if convert else None
            self.outputs = apply(convert, self.keys, hf_config)
            self.needless = needless_keys(convert, self.keys, hf_config)

    def _see_quantised(self, dequantize: bool, held: Mapping[str, torch.dtype]) -> None:
        self.kept_quantised: set[int] = set()
        self._dequantizes = False
        quantised = quantisation(self.source.hf_config)
        unclear = None if quantised else undeclared(self.keys)
        if quantised or unclear:
            packed = {name: node.dtype for name, node in self.keys.items() if is_packed(node.dtype)}
            keeps = not packed.items().isdisjoint(held.items())
            self._dequantizes = dequantize and not on_any_rank(self.control, "keeps quantised", keeps)
            if not self._dequantizes:
                self.kept_quantised = quantised_keys(self.keys)
            elif unclear:
                raise ConversionError(unclear)
            elif quantised:
                self.keys = dequantise(self.keys, quantised)

    def wanted(self, needless: Collection[str]) -> list[Node]:
        """The visible keys that must be used: all but `needless`, and what the conversion itself declares to be so."""
        return [node for name, node in self.keys.items() if name not in needless and name not in self.needless]

    @property
    def reserved_bytes(self) -> int:
        """What of the memory budget the storage client, its further places, the catalog and a timeline take."""
        places = PLACE_BYTES * (self.store.most_at_once - self.read.concurrency)
        kept = self.control.recorder.kept_bytes
        return client_bytes(self.store.uri) + places + KEY_BYTES * len(self.source.catalog.keys) + kept

    def watch_memory(self) -> None:
        """Measure from now on, with what the client and the catalog hold. Before memory is given to the model."""
        self.memory.start(self._held_bytes)

    def load(
        self,
        target: nn.Module | Mapping[str, Tensor],
        *,
        needless: Collection[str] = (),
        wishes: Wishes | None = None,
        proof: Proof | None = None,
        show: Show | None = "bar",
    ) -> Filled:
        """Fill `target`, on every rank; see `loader.account`. `needless` are visible keys that need no target; `wishes`
        say in what a target, which is a module, may differ from the checkpoint; `proof` what is to be proved of it;
        `show` how the progress is shown."""
        try:
            return self._load(target, needless, wishes, proof or Proof(), show)
        finally:
            self.memory.stop()
            self.store.close()

    def _load(
        self,
        target: nn.Module | Mapping[str, Tensor],
        needless: Collection[str],
        wishes: Wishes | None,
        proof: Proof,
        show: Show | None,
    ) -> Filled:
        with self.control.phase("place"):
            targets = targets_of(target)
            self.watch_memory()
            fitted = self.fit({each.names: each.shape for each in targets}, wishes)
            self.outputs = fitted.outputs
            new = [each for each in targets if each.fqn in fitted.new]
            first_values = [initialiser(target, each) for each in new] if isinstance(target, nn.Module) else []
            sourced = [each for each in targets if each.fqn not in fitted.new]
        wanted = self.wanted(needless)
        loaded = self.fill(sourced, seen_in(*wanted), self.control, show=show)
        with self.control.phase("initialise"):
            for initialise_one in first_values:
                initialise_one()
        fingerprint = None
        if proof.verify == "fingerprint":
            fingerprint = agree_on_fingerprint(self.control, targets)
            check_fingerprint(fingerprint, proof.expect)
        return Filled(loaded, len(wanted), fingerprint)

    def fit(self, tensors: Mapping[tuple[str, ...], tuple[int, ...]], wishes: Wishes | None) -> Fitted:
        """The outputs, fitted to a model's tensors: by all the FQNs of each its shape."""
        return fit(self.outputs, tensors, wishes or Wishes(Vocabulary(size=self.vocab_size())), self.declared_ties)

    def fill(
        self, targets: Sequence[Target], wanted: Collection[int], control: Control, *, show: Show | None
    ) -> Loaded:
        """Fill `targets` alone, for the ranks of `control`; the keys of these numbers must be used."""
        manner = Manner(
            share=self.read.share,
            node=node_name(),
            memory_budget=self.read.memory_budget,
            reserved=self.reserved_bytes,
            range_size=self.read.range_size,
            deadline=self.read.deadline,
        )
        catalog = self.source.catalog
        return fill(
            targets,
            self.outputs,
            catalog,
            wanted,
            self.store,
            control,
            manner,
            self.memory,
            claims=self.source.claims,
            show=show,
        )

    def hf_config(self) -> PreTrainedConfig:
        """The checkpoint's config, as transformers reads it; without its quantisation, where that is undone.

        Raises CatalogError where there is none.
        """
        from loader.place.transformers_builder import config_of  # takes seconds to import

        if self.source.hf_config is None:
            raise CatalogError(
                f"{self.store.uri}: no config.json, which a model and a conversion need: upload it beside the files, "
                "or set model.builder and convert to null"
            )
        fields = self.source.hf_config
        fields = unquantised(fields) if self._dequantizes else fields
        return config_of(fields, self.source.code, len(self.source.catalog.keys))

    def declared_ties(self) -> Mapping[str, str]:
        """What the checkpoint's class and config tie: FQN to FQN."""
        from loader.convert.named.transformers import declared_ties  # takes seconds to import

        return {} if self.source.hf_config is None else declared_ties(self.hf_config())

    def vocab_size(self) -> int | None:
        """The checkpoint's, as its config says."""
        return vocab_size(self.source.hf_config or {})

    def dtype_of(self, node: Node) -> torch.dtype:
        """An output's own dtype; of what was dequantised the config's."""
        return dtype_of(node, self.source.hf_config)

    def described(self) -> reports.Source:
        """The source, for the report."""
        catalog = self.source.catalog
        return reports.Source(
            uri=self.store.uri,
            files=len(catalog.files),
            checkpoint_bytes=catalog.checkpoint_bytes,
            pins={file.name: file.pin for file in catalog.files},
        )


def conversion_of(convert: str | Convert | None) -> Convert | None:
    """A conversion by name, by "package.module:function", or as it is. Raises ConfigError."""
    if not isinstance(convert, str):
        return convert
    if ":" in convert:
        return resolve(convert)
    if convert in NAMED:
        return named(convert)
    near = difflib.get_close_matches(convert, NAMED, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f'convert: {convert!r} should be one of {", ".join(NAMED)}, "package.module:function" or null{hint}'
    )
