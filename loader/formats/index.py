"""An index file (`model.safetensors.index.json`, `pytorch_model.bin.index.json`): which file holds which key."""

from __future__ import annotations

import re

from loader.errors import CatalogError
from loader.formats.strict_json import parse_object, quote

# The most of an index that is worth reading: 90,000 keys take about 10 MB, and a stranger decides the size.
MAX_INDEX = 64 * 1024 * 1024

# What turns a name into something else in some store: path separators, a scheme or drive (":"), globs ("*", "?"),
# a query or fragment ("?", "#": gcsfs reads "#123" as a generation) and escapes ("%2f").
_SPECIAL = re.compile(r"[/\\:*?#%]")


def parse_index(data: bytes, *, file: str) -> dict[str, str]:
    """The index's `weight_map`: from key to the plain name of the file beside the index that holds it.

    `metadata`, with its `total_size`, is not read: the files themselves are asked.

    Raises CatalogError, naming `file` and key, for whatever is not such an index.
    """
    weight_map = parse_object(data, file=file, what="the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CatalogError(
            f"{file}: expected an object `weight_map` from keys to file names, found {quote(weight_map)}. "
            "Export the checkpoint again, or remove the index where one safetensors file holds everything."
        )
    for key, name in weight_map.items():
        if not _is_plain(name):
            raise CatalogError(
                f"{file}: weight_map of key {quote(key)}: expected the plain name of a file beside the index, found "
                f"{quote(name)}. Paths, URLs and the characters / \\ : * ? # % are refused: they could point elsewhere."
            )
    return weight_map


def _is_plain(name: object) -> bool:
    return (
        isinstance(name, str)
        and name not in {"", ".", ".."}
        and name == name.strip()
        and name.isprintable()
        and not _SPECIAL.search(name)
    )
