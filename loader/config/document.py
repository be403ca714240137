"""YAML as plain data, with the line that each value stands on."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from loader.errors import ConfigError

_PLAIN = ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge")
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in _PLAIN}
KEY_TAGS = {"tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"}
LARGEST = 100_000
"""Values, names and mappings of a config: ten times what one with thousands of rules has."""
HARMLESS = re.compile(r"""([^'"]|'\\?.'|'<[a-z ]+>')*""")


@dataclass(frozen=True)
class Document:
    """`data` is None, a scalar, or dicts with string keys and lists of such; `root` are the nodes it was made from."""

    data: Any
    root: Node | None

    def line(self, path: Sequence[str | int]) -> int:
        """Where the value at `path`, or the last of its parents that is there, is written: the first line is 1."""
        node, line = self.root, 1
        for part in path:
            if isinstance(node, MappingNode):
                found = next(((key, value) for key, value in node.value if key.value == part), None)
            elif isinstance(node, SequenceNode) and isinstance(part, int):
                found = (node.value[part], node.value[part])
            else:
                found = None
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        return line


def read_yaml(text: str, place: Callable[[int], str]) -> Document:
    """Read one YAML 1.2 document as data: tags make nothing, keys are strings and stand once.

    `place` gives an error's place from its line. Raises ConfigError, which never quotes `text`: it may hold secrets.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.composer.warn_double_anchors = False  # the warning would quote the text
    try:
        root = yaml.compose(text)
        for node in _walk(root, set()):
            _check(node, yaml, place)
        if root is not None and _written_out(root, {}) > LARGEST:
            raise ConfigError(f"{place(1)}: with its aliases written out this has more than {LARGEST:,} values")
        return Document(yaml.load(text), root)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        here = place(mark.line + 1 if mark else 1)
        problem = ", ".join(_without_text(part) for part in (error.context, error.problem) if part)
        raise ConfigError(f"{here}: this is not YAML: {problem}; quote text with special characters") from None
    except RecursionError:
        raise ConfigError(f"{place(1)}: lists or mappings stand in each other too deeply: this is no config") from None
    except YAMLError:
        raise ConfigError(f"{place(1)}: this is not YAML: it holds a control character") from None


def _without_text(problem: str) -> str:
    """Ruamel's words up to the first name they quote; single characters and <tokens> are YAML's own and stay."""
    return problem if HARMLESS.fullmatch(problem) else re.split("['\"]", problem)[0].rstrip(" ,;:")


def _walk(node: Node | None, seen: set[int]) -> Iterator[Node]:
    """Every node once, though aliases lead to it often or in a circle."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    yield node
    for inner in _within(node):
        yield from _walk(inner, seen)


def _written_out(node: Node, known: dict[int, float]) -> float:
    """How many nodes it is without aliases: without end where one leads to a circle."""
    if id(node) not in known:
        known[id(node)] = math.inf  # whoever comes here again meanwhile is within it
        known[id(node)] = 1 + sum(_written_out(inner, known) for inner in _within(node))
    return known[id(node)]


def _within(node: Node) -> Iterable[Node]:
    if isinstance(node, MappingNode):
        return itertools.chain.from_iterable(node.value)
    return node.value if isinstance(node, SequenceNode) else ()


def _check(node: Node, yaml: YAML, place: Callable[[int], str]) -> None:
    here = place(node.start_mark.line + 1)
    if node.tag not in PLAIN_TAGS:
        raise ConfigError(f"{here}: a YAML tag (a word that begins with '!') is refused: remove it, or quote the text")
    if isinstance(node, MappingNode):
        _check_keys(node, place)
    elif isinstance(node, ScalarNode) and not node.tag.endswith(":merge"):
        try:
            yaml.constructor.construct_object(node)
            node.value.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{here}: a value is no text: half of a surrogate pair stands in it") from None
        except (ValueError, LookupError):
            raise ConfigError(f"{here}: a value is not what it looks like (a date, a number): quote it") from None


def _check_keys(node: MappingNode, place: Callable[[int], str]) -> None:
    first: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, ScalarNode) or key.tag not in KEY_TAGS:
            raise ConfigError(f"{place(line)}: a key should be a string: quote it")
        if key.value in first:
            before = place(first[key.value])
            raise ConfigError(f"{place(line)}: key '{key.value}' is there twice, first at {before}: remove one")
        first[key.value] = line
