"""Which files make up a checkpoint, and their headers joined to one catalog."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from loader.errors import CatalogError
from loader.formats.strict_json import quote
from loader.plan.catalog import Catalog, Entry, File

_WEIGHTS = ".safetensors"
_INDEX = ".safetensors.index.json"
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,5})-of-(?P<total>\d{1,5})\.safetensors")


@dataclass(frozen=True, slots=True)
class Layout:
    """Either the name of the index, which names the files with weights, or those files' names, sorted."""

    index: str | None
    files: tuple[str, ...]


def choose(names: Collection[str], uri: str) -> Layout:
    """Choose the checkpoint's files among the `names` in the directory `uri` (as errors may show it: without secrets).

    The first of these that is there: `model.safetensors.index.json`, `model.safetensors`, the only other index (as
    `diffusion_pytorch_model.safetensors.index.json`), all safetensors files. Mistral's `consolidated*`, the same
    weights under other keys, count only where there is nothing else.

    Raises CatalogError where nothing is found, several indexes are, or a file of a numbered set is missing.
    """
    known = sorted(name for name in names if name.endswith((_WEIGHTS, _INDEX)))
    known = [name for name in known if not name.startswith("consolidated")] or known
    indexes = [name for name in known if name.endswith(_INDEX)]
    files = tuple(name for name in known if name.endswith(_WEIGHTS))
    if "model" + _INDEX in indexes:
        return Layout("model" + _INDEX, ())
    if "model" + _WEIGHTS in files:
        return Layout(None, ("model" + _WEIGHTS,))
    if len(indexes) == 1:
        return Layout(indexes[0], ())
    if indexes:
        raise CatalogError(
            f"{uri}: several indexes and none of them is model{_INDEX}: {_listed(indexes)}. "
            "Keep the one that is meant, or name it so."
        )
    if not files:
        raise _nothing(names, uri)
    _check_numbered(files, uri)
    return Layout(None, files)


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
    headers: Sequence[Mapping[str, Entry]],
    *,
    weight_map: Mapping[str, str] | None = None,
    index: str | None = None,
) -> Catalog:
    """Join the files' headers, `headers[i]` being that of `files[i]` with file number i, in this order to a catalog.

    Raises CatalogError for a key in two files, and where headers and `weight_map` (of the file `index`) differ.
    """
    entries: dict[str, Entry] = {}
    for file, header in zip(files, headers, strict=True):
        for key, entry in header.items():
            if key in entries:
                raise CatalogError(
                    f"key {quote(key)} is in two files, {files[entries[key].file].name} and {file.name}. "
                    "Keep one checkpoint in a directory: remove the file that does not belong to it."
                )
            entries[key] = entry
    if weight_map is not None:
        _check_index(files, entries, weight_map, index or "the index")
    return Catalog(tuple(files), entries)


def _check_index(
    files: Sequence[File], entries: Mapping[str, Entry], weight_map: Mapping[str, str], index: str
) -> None:
    """Every key exactly where the index says."""
    for key, name in weight_map.items():
        entry = entries.get(key)
        if entry is None or files[entry.file].name != name:
            found = "no file holds it" if entry is None else f"it is in {files[entry.file].name}"
            raise CatalogError(
                f"{index} says that key {quote(key)} is in {name}, but {found}. "
                "Index and files are not of one export: copy or export them together."
            )
    extra = [key for key in entries if key not in weight_map]
    if extra:
        raise CatalogError(
            f"{files[entries[extra[0]].file].name} holds key {quote(extra[0])}, which {index} does not name "
            f"({len(extra)} such keys). Index and files are not of one export: copy or export them together."
        )


def _check_numbered(files: Iterable[str], uri: str) -> None:
    """Without an index nothing else would tell that `model-00002-of-00003.safetensors` is missing."""
    there: dict[tuple[str, str], set[int]] = {}
    for match in filter(None, map(_NUMBERED.fullmatch, files)):
        there.setdefault((match["stem"], match["total"]), set()).add(int(match["number"]))
    for (stem, total), numbers in there.items():
        if len(numbers) < int(total):
            first = min(1, *numbers)  # some exporters count from 0
            missing = sorted(set(range(first, first + int(total))) - numbers)
            names = [f"{stem}-{number:0{len(total)}}-of-{total}{_WEIGHTS}" for number in missing]
            raise CatalogError(
                f"{uri}: {len(numbers)} of {int(total)} files {stem}-*-of-{total}{_WEIGHTS} are there; "
                f"missing are {_listed(names)}. Upload what is missing."
            )


def _nothing(names: Collection[str], uri: str) -> CatalogError:
    there = f"There are: {_listed(names)}" if names else "There is nothing"
    hint = "Check the URI"
    if any(name.endswith(".bin") for name in names):
        hint = "`.bin` files are not supported yet: convert them with `model.save_pretrained(…)`"
    return CatalogError(
        f"{uri}: no checkpoint here: expected model{_INDEX}, model{_WEIGHTS} or other *{_WEIGHTS} files. "
        f"{there}. {hint}."
    )


def _listed(names: Collection[str] | None, most: int = 20) -> str:
    some = [name if name.isprintable() else quote(name) for name in sorted(names or ())]
    rest = f" and {len(some) - most} more" if len(some) > most else ""
    return (", ".join(some[:most]) or "none") + rest
