"""Tracing: a conversion is run once on lazy tensors, which have a shape and a dtype and record what is done to them."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from loader.convert.graph import Constant, Node
from loader.convert.ops import RULES
from loader.convert.refusals import LOOKS, in_place, is_in_place, looks_at_values, no_rule
from loader.errors import ConversionError, LoaderError
from loader.plan.geometry import contiguous_strides


class OutputError(ConversionError):
    """A ConversionError whose message names the output."""


class LazyTensor(torch.Tensor):
    """A tensor without data. `node` says what it is made of; `origin` names a key that it comes from, for errors.

    `error` is what was wrong with an op on the way: it is raised once an FQN is made of it, so that it names both.
    """

    node: Node
    origin: str
    error: ConversionError | None

    def __new__(cls, node: Node, origin: str, like: Tensor, error: ConversionError | None = None) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=torch.device("cpu")
        )
        made.node, made.origin, made.error = node, origin, error
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyTensor({self.origin!r}, shape={list(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _record(func, args, kwargs or {})

    def tolist(self) -> Any:
        raise looks_at_values("tolist", self.origin)

    def numpy(self, **_: Any) -> Any:
        raise looks_at_values("numpy", self.origin)


def lazy_key(name: str, node: Node) -> LazyTensor:
    return LazyTensor(node, name, _meta(node.shape, contiguous_strides(node.shape), node.dtype))


def _record(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    inputs = list(_lazies((args, kwargs)))
    origin = inputs[0].origin
    if func in LOOKS:
        raise looks_at_values(str(func), origin)
    if is_in_place(func):
        return _spoil(args[0], in_place(func, origin))
    try:
        out = _on_meta(func, args, kwargs)
    except (RuntimeError, IndexError) as error:
        raise ConversionError(f"{func} on {_told(inputs)}: {error}") from error
    wrong = next((each.error for each in inputs if each.error is not None), None)
    rule = RULES.get(func)
    if rule is None:
        wrong = wrong or no_rule(func, origin)
    elif wrong is None:
        try:
            made = rule(out, *tree_map(_to_node, args), **tree_map(_to_node, kwargs))
        except NotImplementedError as error:
            wrong = ConversionError(f"{func} on {_told(inputs)}: {error}")
    if wrong is not None:
        return tree_map(lambda like: LazyTensor(Node(tuple(like.shape), like.dtype), origin, like, wrong), out)
    if isinstance(made, list):
        return [LazyTensor(node, origin, like) for node, like in zip(made, out, strict=True)]
    return LazyTensor(made, origin, out)


def _told(inputs: Iterable[LazyTensor]) -> str:
    """A key for each shape among the inputs: of 64 experts and an odd one, the first and the odd one."""
    of_shape: dict[tuple[int, ...], str] = {}
    for each in inputs:
        of_shape.setdefault(tuple(each.shape), f"{each.origin!r} {list(each.shape)}")
    return " and ".join(of_shape.values())


def _on_meta(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What torch says the result's shape, dtype and strides are."""
    if func is torch.ops.aten.stack.default and len({_spec(part) for part in args[0]}) == 1:
        one = func(
            [_to_meta(args[0][0])], *args[1:], **kwargs
        )  # on meta torch takes 40 us for each of 256 equal experts
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % one.ndim
        return one.new_empty((*one.shape[:dim], len(args[0]), *one.shape[dim + 1 :]))
    device = {"device": "meta"} if "device" in kwargs else {}
    return func(*tree_map(_to_meta, args), **{**tree_map(_to_meta, kwargs), **device})


def _to_meta(value: Any) -> Any:
    if isinstance(value, LazyTensor):
        return _meta(*_spec(value))
    return value.to("meta") if isinstance(value, Tensor) and value.ndim else value


def _spec(value: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    return tuple(value.shape), value.stride(), value.dtype


@functools.lru_cache(maxsize=4096)
def _meta(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _to_node(value: Any) -> Any:
    if isinstance(value, LazyTensor):
        return value.node
    return Constant(tuple(value.shape), value.dtype, value) if isinstance(value, Tensor) else value


def _lazies(value: Any) -> Iterator[LazyTensor]:
    found: list[LazyTensor] = []
    tree_map(lambda leaf: found.append(leaf) if isinstance(leaf, LazyTensor) else None, value)
    return iter(found)


_spoilt: ContextVar[list[ConversionError]] = ContextVar("spoilt")
"""The in-place ops of the conversion that is being traced: what else has the same memory is spoilt too."""


def _spoil(target: Any, error: ConversionError) -> LazyTensor:
    if not isinstance(target, LazyTensor):
        raise error
    target.error = target.error or error
    _spoilt.get().append(error)
    return target


Convert = Callable[[Mapping[str, Tensor], Any], Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]]

Declare = Callable[[Iterable[str], Any], Mapping[str, str]]
"""From the names of all keys and the config: those that a model may have no use for, each with the reason."""


C = TypeVar("C", bound=Convert)


def needless(declare: Declare) -> Callable[[C], C]:
    """Let a conversion declare keys that need no target: that none is filled from them is then no error."""

    def mark(convert: C) -> C:
        convert.needless = declare  # type: ignore[attr-defined]
        return convert

    return mark


def trace(convert: Convert, keys: Mapping[str, Tensor], hf_config: Any) -> dict[str, Node]:
    """Run `convert` on lazy `keys` and return each output's node, by FQN.

    Raises ConversionError for an op without a rule, code that looks at values, an output that is no tensor or comes
    twice, and for what the conversion itself raises; its own BuilderError and CoverageError stay what they are.
    """
    outputs: dict[str, Node] = {}
    _spoilt.set([])
    try:
        made = convert(keys, hf_config)
        for fqn, tensor in made.items() if isinstance(made, Mapping) else made:
            _add(outputs, fqn, tensor)
    except OutputError as error:
        raise ConversionError(error.message) from error
    except ConversionError as error:
        raise ConversionError(f"{error.message}{_after(outputs)}") from error
    except LoaderError:
        raise
    except Exception as error:
        text = "".join(traceback.format_exception(error)).rstrip()
        what = f"the conversion failed{_after(outputs)}: {type(error).__name__}: {error}"
        raise ConversionError(f"{what}\n{text}") from error
    if _spoilt.get():
        raise _spoilt.get()[0]
    return outputs


def _after(outputs: dict[str, Node]) -> str:
    """Where it was: an error that comes before its output has a name can be told no better."""
    return f" (after it made {next(reversed(outputs))})" if outputs else ""


def _add(outputs: dict[str, Node], fqn: str, tensor: object) -> None:
    if fqn in outputs:
        raise OutputError(f"the conversion makes {fqn} twice")
    if not isinstance(tensor, Tensor):
        raise OutputError(f"the conversion makes {fqn} a {type(tensor).__name__}; it must be a tensor")
    if isinstance(tensor, LazyTensor) and tensor.error is not None:
        raise OutputError(f"{fqn}: {tensor.error.message}") from tensor.error
    outputs[fqn] = _to_node(tensor)
