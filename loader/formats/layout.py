"""Which files make up a checkpoint, and what is in them joined to one catalog."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loader.errors import CatalogError
from loader.formats.strict_json import quote
from loader.plan.catalog import Catalog, Contents, Entry, File, View


@dataclass(frozen=True, slots=True)
class Format:
    """How the files of one format are named: `one` where there is a single file; several have an index, or are
    numbered, as `<stem>-00001-of-00002.<suffix>`. `others` have the suffix and hold no weights."""

    suffix: str
    stem: str
    others: frozenset[str] = frozenset()

    @property
    def one(self) -> str:
        return self.stem + self.suffix

    @property
    def index(self) -> str:
        return self.one + _INDEX

    def holds(self, name: str) -> bool:
        return name.endswith((self.suffix, self.suffix + _INDEX)) and name not in self.others

    def numbered(self, name: str) -> re.Match[str] | None:
        return re.fullmatch(
            rf"(?P<stem>.+)-(?P<number>\d{{1,5}})-of-(?P<total>\d{{1,5}}){re.escape(self.suffix)}", name
        )


_INDEX = ".index.json"
SAFETENSORS = Format(".safetensors", "model")
TORCH = Format(
    ".bin",
    "pytorch_model",
    frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin", "scaler.bin"}),  # of transformers and accelerate
)
FORMATS = (SAFETENSORS, TORCH)
"""What a directory is searched for: the first that is there counts."""

TORCH_SUFFIXES = (".bin", ".pt", ".pth")
"""Files of torch.save. The last two are never searched for: what has them in a directory is anybody's guess."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Either the name of the index, which names the files with weights, or those files' names, sorted.

    `passed_over` are files of weights that were not chosen.
    """

    index: str | None
    files: tuple[str, ...]
    passed_over: tuple[str, ...] = field(default=(), compare=False)


def choose(names: Collection[str], uri: str) -> Layout:
    """Choose the checkpoint's files among the `names` in the directory `uri` (as errors may show it: without secrets).

    The first of these that is there, as transformers chooses: `model.safetensors`, `model.safetensors.index.json`; then
    the only other index (as `diffusion_pytorch_model.safetensors.index.json`), the numbered files
    `model-*-of-*.safetensors`, all safetensors files. Without any of these the same of `.bin`, with `pytorch_model` for
    `model`. Mistral's `consolidated*`, the same weights under other keys, count only where there is nothing else.

    Raises CatalogError where nothing is found, several indexes are, or a file of a numbered set is missing.
    """
    weights = sorted(name for name in names if any(each.holds(name) for each in FORMATS))
    known = [name for name in weights if not name.startswith("consolidated")] or weights
    for each in FORMATS:
        if held := [name for name in known if each.holds(name)]:
            index, files = _choose(each, held, uri)
            named = (_INDEX, each.suffix) if index else _INDEX  # an index names its files itself
            rest = (name for name in weights if not name.endswith(named))
            return Layout(index, files, tuple(name for name in rest if name not in files))
    raise _nothing(names, uri)


def _choose(form: Format, held: Sequence[str], uri: str) -> tuple[str | None, tuple[str, ...]]:
    """The index or the files, among those that are of this format."""
    indexes = [name for name in held if name.endswith(_INDEX)]
    files = tuple(name for name in held if not name.endswith(_INDEX))
    if form.one in files:
        return None, (form.one,)
    if form.index in indexes:
        return form.index, ()
    if len(indexes) == 1:
        return indexes[0], ()
    if indexes:
        raise CatalogError(
            f"{uri}: several indexes and none of them is {form.index}: {_listed(indexes)}. "
            "Keep the one that is meant, or name it so."
        )
    _check_numbered(form, files, uri)
    own = tuple(name for name in files if (match := form.numbered(name)) and match["stem"] == form.stem)
    return None, own or files


def is_torch(name: str) -> bool:
    return name.endswith(TORCH_SUFFIXES)


def weight_files(weight_map: Mapping[str, str], present: Collection[str] | None, *, index: str, uri: str) -> list[str]:
    """The files that an index names, sorted. `present` names what the directory holds, None where a store cannot list.

    Raises CatalogError for files that are not there.
    """
    files = sorted(set(weight_map.values()))
    missing = [] if present is None else sorted(set(files).difference(present))
    if missing:
        key = next(key for key, file in weight_map.items() if file == missing[0])
        raise CatalogError(
            f"{uri}: {index} names {len(files)} files, of which {len(missing)} are not there: {_listed(missing)} "
            f"(of key {quote(key)}, for one). There are: {_listed(present)}. Upload what is missing."
        )
    return files


def assemble(
    files: Sequence[File],
    headers: Sequence[Contents],
    *,
    weight_map: Mapping[str, str] | None = None,
    index: str | None = None,
) -> Catalog:
    """Join what is in the files, `headers[i]` being that of `files[i]` with file number i, in this order to a catalog.

    Raises CatalogError for a key in two files, and where headers and `weight_map` (of the file `index`) differ.
    """
    entries: dict[str, Entry] = {}
    views: dict[str, View] = {}
    held: dict[str, File] = {}
    for file, header in zip(files, headers, strict=True):
        for key in {**header.entries, **header.views}:
            if key in held:
                raise CatalogError(
                    f"key {quote(key)} is in two files, {held[key].name} and {file.name}. "
                    "Keep one checkpoint in a directory: remove the file that does not belong to it."
                )
            held[key] = file
        entries |= header.entries
        views |= header.views
    if weight_map is not None:
        _check_index(held, weight_map, index or "the index")
    return Catalog(tuple(files), entries, views)


def _check_index(held: Mapping[str, File], weight_map: Mapping[str, str], index: str) -> None:
    """Every key exactly where the index says. `held` is each key's file."""
    for key, name in weight_map.items():
        file = held.get(key)
        if file is None or file.name != name:
            found = "no file holds it" if file is None else f"it is in {file.name}"
            raise CatalogError(
                f"{index} says that key {quote(key)} is in {name}, but {found}. "
                "Index and files are not of one export: copy or export them together."
            )
    extra = [key for key in held if key not in weight_map]
    if extra:
        raise CatalogError(
            f"{held[extra[0]].name} holds key {quote(extra[0])}, which {index} does not name "
            f"({len(extra)} such keys). Index and files are not of one export: copy or export them together."
        )


def _check_numbered(form: Format, files: Iterable[str], uri: str) -> None:
    """Without an index nothing else would tell that `model-00002-of-00003.safetensors` is missing."""
    there: dict[tuple[str, str], set[int]] = {}
    for match in filter(None, map(form.numbered, files)):
        there.setdefault((match["stem"], match["total"]), set()).add(int(match["number"]))
    for (stem, total), numbers in there.items():
        if len(numbers) < int(total):
            first = min(1, *numbers)  # some exporters count from 0
            missing = sorted(set(range(first, first + int(total))) - numbers)
            names = [f"{stem}-{number:0{len(total)}}-of-{total}{form.suffix}" for number in missing]
            raise CatalogError(
                f"{uri}: {len(numbers)} of {int(total)} files {stem}-*-of-{total}{form.suffix} are there; "
                f"missing are {_listed(names)}. Upload what is missing."
            )


def _nothing(names: Collection[str], uri: str) -> CatalogError:
    there = f"There are: {_listed(names)}" if names else "There is nothing"
    hint = "Check the URI"
    if any(is_torch(name) for name in names):
        hint = (
            "A single file of torch.save can be named itself, as in source.uri: s3://bucket/llama/consolidated.00.pth"
        )
    expected = ", ".join(f"{form.index}, {form.one}" for form in FORMATS)
    return CatalogError(
        f"{uri}: no checkpoint here: expected {expected} or other *{SAFETENSORS.suffix} or *{TORCH.suffix} files. "
        f"{there}. {hint}."
    )


def _listed(names: Collection[str] | None, most: int = 20) -> str:
    some = [name if name.isprintable() else quote(name) for name in sorted(names or ())]
    rest = f" and {len(some) - most} more" if len(some) > most else ""
    return (", ".join(some[:most]) or "none") + rest
