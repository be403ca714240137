"""Tracing: a conversion is run once on lazy tensors, which have a shape and a dtype and record what is done to them."""

from __future__ import annotations

import difflib
import functools
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from loader.convert.graph import Constant, Node
from loader.convert.ops import RULES
from loader.errors import ConversionError, LoaderError
from loader.plan.geometry import contiguous_strides


class LazyTensor(torch.Tensor):
    """A tensor without data. `node` says what it is made of; `origin` names a key that it comes from, for errors."""

    node: Node
    origin: str

    def __new__(cls, node: Node, origin: str, like: Tensor) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=torch.device("cpu")
        )
        made.node, made.origin = node, origin
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyTensor({self.origin!r}, shape={list(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _record(func, args, kwargs or {})

    def tolist(self) -> Any:
        raise _looks_at_values("tolist", self.origin)

    def numpy(self, **_: Any) -> Any:
        raise _looks_at_values("numpy", self.origin)


def lazy_key(name: str, node: Node) -> LazyTensor:
    return LazyTensor(node, name, _meta(node.shape, contiguous_strides(node.shape), node.dtype))


def _record(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    origin = next(_lazies((args, kwargs))).origin
    if func in (
        torch.ops.aten._local_scalar_dense.default,  # noqa: SLF001
        torch.ops.aten.equal.default,
        torch.ops.aten.is_nonzero.default,
    ):
        raise _looks_at_values(str(func), origin)
    rule = RULES.get(func)
    if rule is None:
        raise _no_rule(func, origin)
    out = _on_meta(func, args, kwargs)
    try:
        made = rule(out, *tree_map(_to_node, args), **tree_map(_to_node, kwargs))
    except NotImplementedError as error:
        raise ConversionError(f"{func} on {origin!r}: {error}") from error
    if isinstance(made, list):
        return [LazyTensor(node, origin, like) for node, like in zip(made, out, strict=True)]
    return LazyTensor(made, origin, out)


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


def _looks_at_values(what: str, origin: str) -> ConversionError:
    return ConversionError(
        f"{what} on {origin!r}: a conversion may not look at values: it runs once, before anything is read. "
        "Decide by names, shapes and the config instead"
    )


def _no_rule(func: Any, origin: str) -> ConversionError:
    name = str(func)
    base = name.split(".")[1] if "." in name else name
    if base.endswith("_") and not base.startswith("_"):
        return ConversionError(f"{name} on {origin!r}: an in-place op: write `x = x.{base[:-1]}(...)` instead")
    known = sorted({str(op).split(".")[1] for op in RULES})
    near = difflib.get_close_matches(base, known, n=3)
    hint = f"; near it there are {', '.join(near)}" if near else ""
    return ConversionError(
        f"{name} on {origin!r}: no rule pulls it back to the checkpoint{hint}. Write it with these: {', '.join(known)}"
    )


Convert = Callable[[Mapping[str, Tensor], Any], Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]]


def trace(convert: Convert, keys: Mapping[str, Tensor], hf_config: Any) -> dict[str, Node]:
    """Run `convert` on lazy `keys` and return each output's node, by FQN.

    Raises ConversionError for an op without a rule, code that looks at values, an output that is no tensor or comes
    twice, and for what the conversion itself raises.
    """
    outputs: dict[str, Node] = {}
    try:
        made = convert(keys, hf_config)
        for fqn, tensor in made.items() if isinstance(made, Mapping) else made:
            _add(outputs, fqn, tensor)
    except LoaderError as error:
        after = f" (after it made {next(reversed(outputs))})" if outputs else ""
        raise ConversionError(f"{error.message}{after}") from error
    except Exception as error:
        text = "".join(traceback.format_exception(error)).rstrip()
        raise ConversionError(f"the conversion failed: {type(error).__name__}: {error}\n{text}") from error
    return outputs


def _add(outputs: dict[str, Node], fqn: str, tensor: object) -> None:
    if fqn in outputs:
        raise ConversionError(f"the conversion makes {fqn} twice")
    if not isinstance(tensor, Tensor):
        raise ConversionError(f"the conversion makes {fqn} a {type(tensor).__name__}; it must be a tensor")
    outputs[fqn] = _to_node(tensor)
