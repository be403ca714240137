"""The pickle machine without its deeds: what would be imported is a name, what would be called is written down.

Its steps are those of https://github.com/python/cpython/blob/main/Lib/pickletools.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from torch._utils import IMPORT_MAPPING, NAME_MAPPING
from torch._weights_only_unpickler import _get_allowed_globals

from loader.errors import CatalogError
from loader.formats.strict_json import quote

MAX_STEPS = 5_000_000
"""A tensor takes about 35."""

MAX_EMPTY = 500_000
"""Lists and dicts that are begun, of which a step makes 100 bytes. A tensor begins none, but for Python 2's."""

MAX_DEPTH = 1000
"""Of one in the other. In a state dict it is 5."""


class Global(NamedTuple):
    """What would be imported."""

    name: str


@dataclass(slots=True, eq=False, repr=False)
class Call:
    """What would be called with `args`; what would be built into the result, its `state`, is not kept."""

    name: str
    args: Any


@dataclass(slots=True, eq=False, repr=False)
class Dict:
    """A dict's or OrderedDict's pairs in order, a key as often as it was set."""

    pairs: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(slots=True, eq=False, repr=False)
class Persistent:
    """What is stored outside of the pickle, by its id."""

    id: Any


class Machine:
    """Its `stack` ends with the object alone; `persistent` are all ids that occurred, in order."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.persistent: list[Persistent] = []
        self.steps = 0
        self.begun = 0

    def step(self, name: str, argument: Any) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise ValueError(f"it has more than {MAX_STEPS} steps")
        if name in _NOTHING:
            return
        if name in _VALUES:
            self.stack.append(_VALUES[name]())
            self.begun += name.startswith("EMPTY") and name != "EMPTY_TUPLE"
            if self.begun > MAX_EMPTY:
                raise ValueError(f"it begins more than {MAX_EMPTY} lists and dicts")
        elif name in _ARGUMENTS:
            self.stack.append(argument)
        elif name in _DEEDS:
            _DEEDS[name](self, argument)
        else:
            raise ValueError(f"{name} has no place in a checkpoint")

    def mark(self, _: Any) -> None:
        if len(self.marked) == MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} things are begun in each other")
        self.marked.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def pop(self, _: Any) -> None:
        self.stack.pop()

    def forget(self, _: Any) -> None:
        self.pop_mark()

    def put(self, number: Any) -> None:
        self.memo[len(self.memo) if number is None else number] = self.stack[-1]

    def get(self, number: Any) -> None:
        self.stack.append(self.memo[number])

    def tuple_of(self, size: int) -> None:
        items = [self.stack.pop() for _ in range(size)]
        self.stack.append(tuple(reversed(items)))

    def tuple_marked(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def list_marked(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(items)

    def dict_marked(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(Dict(_pairs(items)))

    def append(self, _: Any) -> None:
        item = self.stack.pop()
        self._list().append(item)

    def extend(self, _: Any) -> None:
        items = self.pop_mark()
        self._list().extend(items)

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._pairs().append((key, value))

    def set_items(self, _: Any) -> None:
        items = self.pop_mark()
        self._pairs().extend(_pairs(items))

    def _list(self) -> list[Any]:
        if type(self.stack[-1]) is not list:
            raise ValueError(f"{type(self.stack[-1]).__name__} is appended to")
        return self.stack[-1]

    def _pairs(self) -> list[tuple[Any, Any]]:
        found = self.stack[-1]
        if type(found) is Call and found.name == "collections.Counter":
            return []
        if type(found) is not Dict:
            raise ValueError(f"items of {type(found).__name__} are set")
        return found.pairs

    def find(self, argument: str) -> None:
        self._import(*argument.split(" ", 1))

    def find_stacked(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("what is to be imported is no text")
        self._import(module, name)

    def _import(self, module: str, name: str) -> None:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if full not in _allowed():
            raise CatalogError(
                f"{self.file}: its pickle wants to import {quote(full)}, which is no part of a state dict. Nothing of "
                "it was imported or run. Save the tensors alone, with torch.save(model.state_dict(), path), or as "
                "safetensors; torch.load with weights_only=False would run it: only if you trust who wrote it."
            )
        self.stack.append(Global(full))

    def call(self, _: Any) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Global or type(args) is not tuple:
            raise ValueError("a call of what is no function")
        self.stack.append(_made(function.name, args))

    def call_named(self, _: Any) -> None:
        kwargs = self.stack.pop()
        if type(kwargs) is not Dict or kwargs.pairs:
            raise ValueError("a call with arguments by name")
        self.call(None)

    def build(self, _: Any) -> None:
        self.stack.pop()
        if type(self.stack[-1]) not in (Call, Dict):
            raise ValueError(f"a state for {type(self.stack[-1]).__name__}")

    def persist(self, argument: Any) -> None:
        found = Persistent(self.stack.pop() if argument is None else argument)
        self.persistent.append(found)
        self.stack.append(found)


def _made(name: str, args: tuple[Any, ...]) -> Call | Dict:
    """An OrderedDict is a dict. Python 2 wrote its items as a list of lists."""
    if name != "collections.OrderedDict":
        return Call(name, args)
    items = args[0] if args else []
    if len(args) > 1 or type(items) is not list or not all(type(i) in (list, tuple) and len(i) == 2 for i in items):
        raise ValueError("an OrderedDict of what are no pairs")
    return Dict([(key, value) for key, value in items])


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    if len(items) % 2:
        raise ValueError("a key without a value")
    return list(zip(items[::2], items[1::2], strict=True))


def _allowed() -> dict[str, Any]:
    return cast("dict[str, Any]", _get_allowed_globals())


_NOTHING = {"PROTO", "FRAME", "STOP"}
_VALUES: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,  # a set's items are not hashed either
    "EMPTY_DICT": Dict,
}
_ARGUMENTS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_DEEDS: dict[str, Callable[[Machine, Any], None]] = {
    "MARK": Machine.mark,
    "POP": Machine.pop,
    "POP_MARK": Machine.forget,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Machine.get),
    "TUPLE": Machine.tuple_marked,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    **dict.fromkeys(("LIST", "FROZENSET"), Machine.list_marked),
    "DICT": Machine.dict_marked,
    "APPEND": Machine.append,
    **dict.fromkeys(("APPENDS", "ADDITEMS"), Machine.extend),
    "SETITEM": Machine.set_item,
    "SETITEMS": Machine.set_items,
    "GLOBAL": Machine.find,
    "STACK_GLOBAL": Machine.find_stacked,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), Machine.call),
    "NEWOBJ_EX": Machine.call_named,
    "BUILD": Machine.build,
    **dict.fromkeys(("PERSID", "BINPERSID"), Machine.persist),
}
