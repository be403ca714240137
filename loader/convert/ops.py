"""What each aten op means in terms of nodes: the table of what a conversion may use.

A rule takes the call's arguments, lazy tensors as nodes, and the output's shape and dtype as torch finds them on meta,
and says the op in `graph`'s kinds. An op that is not here is an error that names it, never a full tensor in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loader.convert.graph import Cat, Combine, Constant, Expand, Map, Node, Permute, Reshape, Slice, Take

aten = torch.ops.aten
Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}
"""By aten overload. A rule gets `out` (a meta tensor, or a list of them) and then the call's own arguments."""


def rule(*overloads: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(overloads, function))
        return function

    return register


def _like(out: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(out.shape), out.dtype


@rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default)  # noqa: SLF001
@rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default)
def _reshape(out: Tensor, x: Node, *_: Any) -> Node:
    return Reshape(*_like(out), x)


@rule(aten.permute.default)
def _permute(out: Tensor, x: Node, dims: Sequence[int]) -> Node:
    return Permute(*_like(out), x, tuple(d % len(dims) for d in dims))


@rule(aten.transpose.int)
def _transpose(out: Tensor, x: Node, a: int, b: int) -> Node:
    dims = list(range(out.ndim))
    if dims:
        dims[a], dims[b] = dims[b], dims[a]
    return Permute(*_like(out), x, tuple(dims))


@rule(aten.t.default)
def _t(out: Tensor, x: Node) -> Node:
    return Permute(*_like(out), x, tuple(reversed(range(out.ndim))))


@rule(aten.cat.default)
def _cat(out: Tensor, parts: Sequence[Node], dim: int = 0) -> Node:
    whole = [_cast(part, out.dtype) for part in parts if part.shape != (0,)]  # as torch, which lets these pass
    return (
        Cat(*_like(out), tuple(whole), dim % out.ndim)
        if whole
        else Constant(*_like(out), torch.empty_like(out, device="cpu"))
    )


@rule(aten.stack.default)
def _stack(out: Tensor, parts: Sequence[Node], dim: int = 0) -> Node:
    at = dim % out.ndim
    shape = (*out.shape[:at], 1, *out.shape[at + 1 :])
    return Cat(*_like(out), tuple(Reshape(shape, out.dtype, _cast(part, out.dtype)) for part in parts), at)


@rule(aten.slice.Tensor)
def _slice(out: Tensor, x: Node, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Node:
    at = dim % len(x.shape)
    first, stop, _ = slice(start, end).indices(x.shape[at])
    if step != 1:
        return Take(*_like(out), x, at, tuple(range(first, stop, step)))
    return Slice(*_like(out), x, at, first)


@rule(aten.narrow.default)
def _narrow(out: Tensor, x: Node, dim: int, start: int, _: int) -> Node:
    at = dim % len(x.shape)
    return Slice(*_like(out), x, at, start % max(1, x.shape[at]) if start < 0 else start)


@rule(aten.select.int)
def _select(out: Tensor, x: Node, dim: int, index: int) -> Node:
    at = dim % len(x.shape)
    row = (*x.shape[:at], 1, *x.shape[at + 1 :])
    return Reshape(*_like(out), Slice(row, out.dtype, x, at, index % x.shape[at]))


@rule(aten.split.Tensor, aten.split_with_sizes.default)
def _split(out: Sequence[Tensor], x: Node, _: Any, dim: int = 0) -> list[Node]:
    at, begin, parts = dim % len(x.shape), 0, []
    for part in out:
        parts.append(Slice(*_like(part), x, at, begin))
        begin += part.shape[at]
    return list(parts)


@rule(aten.unbind.int)
def _unbind(out: Sequence[Tensor], x: Node, dim: int = 0) -> list[Node]:
    return [_select(part, x, dim, i) for i, part in enumerate(out)]


@rule(aten.index_select.default)
def _index_select(out: Tensor, x: Node, dim: int, index: Node) -> Node:
    return Take(*_like(out), x, dim % len(x.shape), tuple(_known(index, "index_select's index").tolist()))


@rule(aten.index.Tensor)
def _index(out: Tensor, x: Node, indices: Sequence[Node | None]) -> Node:
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(given) != 1 or len(given[0][1].shape) != 1 or given[0][1].dtype == torch.bool:
        raise NotImplementedError("an index of one dim by one list of numbers is what can be followed")
    return Take(*_like(out), x, given[0][0], tuple(_known(given[0][1], "the index").tolist()))


@rule(aten.flip.default)
def _flip(out: Tensor, x: Node, dims: Sequence[int]) -> Node:
    for d in dims:
        x = Take(*_like(out), x, d % out.ndim, tuple(reversed(range(out.shape[d]))))
    return x


@rule(aten.expand.default)
def _expand(out: Tensor, x: Node, *_: Any, **__: Any) -> Node:
    whole = (1,) * (out.ndim - len(x.shape)) + x.shape
    return Expand(*_like(out), Reshape(whole, x.dtype, x) if whole != x.shape else x)


@rule(aten.repeat.default)
def _repeat(out: Tensor, x: Node, repeats: Sequence[int]) -> Node:
    """Each dim once more in front, repeated, then merged: [a, b] x (2, 3) -> [2, a, 3, b] -> [2a, 3b]."""
    whole = (1,) * (out.ndim - len(x.shape)) + x.shape
    spread = tuple(size for pair in zip(repeats, whole, strict=True) for size in pair)
    single = tuple(size for one in whole for size in (1, one))
    return Reshape(*_like(out), Expand(spread, x.dtype, Reshape(single, x.dtype, x)))


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(out: Tensor, x: Node, repeats: int, dim: int | None = None, **_: Any) -> Node:
    shape, at = ((out.numel() // repeats,), 0) if dim is None else (x.shape, dim % len(x.shape))
    single = (*shape[: at + 1], 1, *shape[at + 1 :])
    spread = (*shape[: at + 1], repeats, *shape[at + 1 :])
    return Reshape(*_like(out), Expand(spread, x.dtype, Reshape(single, x.dtype, x)))


@rule(aten.constant_pad_nd.default)
def _pad(out: Tensor, x: Node, pad: Sequence[int], value: float = 0) -> Node:
    for number, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        dim = out.ndim - 1 - number
        if before < 0 or after < 0:
            first, stop = max(0, -before), x.shape[dim] - max(0, -after)
            x = Slice((*x.shape[:dim], stop - first, *x.shape[dim + 1 :]), x.dtype, x, dim, first)
        parts = [_full(x, dim, max(0, before), value), x, _full(x, dim, max(0, after), value)]
        size = sum(part.shape[dim] for part in parts)
        x = Cat((*x.shape[:dim], size, *x.shape[dim + 1 :]), x.dtype, tuple(parts), dim)
    return x


def _full(x: Node, dim: int, size: int, value: float) -> Node:
    shape = (*x.shape[:dim], size, *x.shape[dim + 1 :])
    return Constant(shape, x.dtype, torch.full((), value, dtype=x.dtype).expand(shape))


@rule(aten.new_zeros.default, aten.zeros_like.default)
def _zeros(out: Tensor, *_: Any, **__: Any) -> Node:
    return Constant(*_like(out), torch.zeros((), dtype=out.dtype).expand(out.shape))


@rule(aten.new_ones.default, aten.ones_like.default)
def _ones(out: Tensor, *_: Any, **__: Any) -> Node:
    return Constant(*_like(out), torch.ones((), dtype=out.dtype).expand(out.shape))


@rule(aten.new_full.default)
def _new_full(out: Tensor, _: Node, __: Any, value: float, **___: Any) -> Node:
    return Constant(*_like(out), torch.full((), value, dtype=out.dtype).expand(out.shape))


@rule(aten.full_like.default)
def _full_like(out: Tensor, _: Node, value: float, **__: Any) -> Node:
    return Constant(*_like(out), torch.full((), value, dtype=out.dtype).expand(out.shape))


@rule(aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _same(_: Tensor, x: Node, **__: Any) -> Node:
    return x


@rule(aten._to_copy.default)  # noqa: SLF001
def _to_copy(out: Tensor, x: Node, **_: Any) -> Node:
    return _cast(x, out.dtype)


def _cast(x: Node, dtype: torch.dtype) -> Node:
    return x if x.dtype == dtype else Map(x.shape, dtype, x, partial(torch.Tensor.to, dtype=dtype))


def _elementwise(overload: Any) -> Rule:
    """Numbers make it a map; tensors beside each other are combined, broadcast to one shape."""

    def apply(out: Tensor, *args: Any, **kwargs: Any) -> Node:
        nodes = [arg for arg in args if isinstance(arg, Node)]

        def run(*tensors: Tensor) -> Tensor:
            given = iter(tensors)
            result: Tensor = overload(*(next(given) if isinstance(arg, Node) else arg for arg in args), **kwargs)
            return result

        if len(nodes) == 1:
            return Map(*_like(out), nodes[0], run)
        return Combine(*_like(out), tuple(_broadcast(node, tuple(out.shape)) for node in nodes), run)

    return apply


def _broadcast(x: Node, shape: tuple[int, ...]) -> Node:
    whole = (1,) * (len(shape) - len(x.shape)) + x.shape
    x = x if whole == x.shape else Reshape(whole, x.dtype, x)
    return x if whole == shape else Expand(shape, x.dtype, x)


for _overload in (
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor,
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.pow.Tensor_Scalar, aten.pow.Scalar,
    aten.neg.default, aten.exp.default, aten.log.default, aten.sqrt.default, aten.rsqrt.default,
    aten.reciprocal.default, aten.abs.default, aten.sigmoid.default, aten.maximum.default, aten.minimum.default,
    aten.where.self,
):  # fmt: skip
    RULES[_overload] = _elementwise(_overload)


def _known(x: Node, what: str) -> Tensor:
    if not isinstance(x, Constant):
        raise NotImplementedError(f"{what} must be known without reading the checkpoint")
    return x.value
