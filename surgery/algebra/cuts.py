"""Cutting: which part of each argument a part of a result is made of, along one axis.

A rule takes an expression and an axis of its shape, and says how the axis is cut; it gives None
where a part of the result needs the arguments whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from surgery.algebra import shapes
from surgery.algebra.axes import Size, size
from surgery.algebra.expr import Expr
from surgery.algebra.reproducible import placed
from surgery.algebra.values import Facts

_ONE = size(1)
_NONE = size(0)


@dataclass(frozen=True, slots=True)
class Share:
    """The part of an argument: for `Cut.by` places of the result, `times` of one of its axes.

    offset: where the first of them is.
    """

    axis: int
    times: Size = _ONE
    offset: Size = _NONE


@dataclass(frozen=True, slots=True)
class Cut:
    """How a result is cut: between any two of `by` places.

    shares: of each argument; None for the whole of it.
    named: the axis of a pattern whose length becomes the number of these places; "" for none.
    value: `value(facts, start, *tensors)`, of the places from `start` on, where the operator's own
        value would need to know where it is; `facts.shape` has the number of places.
    """

    shares: tuple[Share | None, ...]
    by: Size = _ONE
    named: str = ""
    value: Callable[..., Tensor] | None = None


Rule = Callable[[Expr, int], "Cut | None"]


def _same(expr: Expr, axis: int) -> Cut:
    """Elementwise; a number is needed as it is."""
    return Cut(tuple(None if a.is_scalar else Share(axis) for a in expr.args))


def _leading(last: int) -> Rule:
    """The same axis of the argument, where at least so many axes stand behind it."""

    def rule(expr: Expr, axis: int) -> Cut | None:
        return Cut((Share(axis),)) if axis < len(expr.shape) - last else None

    return rule


def _matmul(expr: Expr, axis: int) -> Cut:
    left, right = expr.args
    if len(right.shape) > 1 and axis == len(expr.shape) - 1:
        return Cut((None, Share(axis)))  # columns of the right one
    if axis == len(left.shape) - 2:
        return Cut((Share(axis), None))  # rows of the left one
    return Cut((Share(axis), Share(axis)))


def _transpose(expr: Expr, axis: int) -> Cut:
    last = len(expr.shape) - 1
    return Cut((Share({last: last - 1, last - 1: last}.get(axis, axis)),))


def _scale_rows(expr: Expr, axis: int) -> Cut:
    return Cut((Share(0) if axis == 0 else None, Share(axis)))


def _scale_cols(expr: Expr, axis: int) -> Cut:
    return Cut((Share(0) if axis == 1 else None, Share(axis)))


def _colnorm(expr: Expr, axis: int) -> Cut:
    last = len(expr.shape) - 1
    return Cut((Share(axis + 1 if axis == last else axis),))


def _first(expr: Expr, axis: int) -> Cut | None:
    return Cut((Share(0),)) if axis == 0 else None


def _gather(expr: Expr, axis: int) -> Cut:
    return Cut((None, Share(axis)))


def _zeros(expr: Expr, axis: int) -> Cut:
    return Cut(())


def _rotate_half(expr: Expr, axis: int) -> Cut:
    if axis > 0:
        return Cut((Share(axis),))
    each = cast(Size, expr.attr("size"))
    return Cut((Share(0, each),), each)


def _kron(expr: Expr, axis: int) -> Cut:
    by = expr.args[1].shape[axis]
    return Cut((Share(axis), None), by)


def _circulant(expr: Expr, axis: int) -> Cut:
    return Cut((Share(axis),), expr.args[0].shape[2])


def _concat(expr: Expr, axis: int) -> Cut | None:
    if cast(int, expr.attr("axis")) % len(expr.shape) == axis:
        return None
    return Cut((Share(axis),) * len(expr.args))


def _slice(expr: Expr, axis: int) -> Cut:
    bounds = shapes.slice_bounds(dict(expr.attrs))
    start = bounds[axis][0] if axis < len(bounds) else _NONE

    def value(facts: Facts, _: int, a: Tensor) -> Tensor:
        for other, (begin, _stop) in enumerate(bounds):
            if other != axis:
                a = a.narrow(other, int(facts.number(begin)), facts.shape[other])
        return a

    return Cut((Share(axis, offset=start),), value=value)


def _layout(expr: Expr, axis: int) -> Cut | None:
    """Cut between what the first axis of the pattern counts, if it comes first before, too."""
    pattern = expr.text("pattern")
    before, after = shapes.parsed_pattern(pattern)
    lengths = shapes.axis_sizes(expr.args[0].shape, dict(expr.attrs))
    names = [n for n in after[axis] if lengths[n] != _ONE]
    if not names:
        return None
    first, by = names[0], _product(names[1:], lengths)
    for place, axes in enumerate(before):
        counted = [n for n in axes if lengths[n] != _ONE]
        if counted[:1] == [first]:
            return Cut((Share(place, _product(counted[1:], lengths)),), by, first)
        if first in counted:
            return None
    return Cut((None,), by, first)  # the same again and again


def _product(names: list[str], lengths: Mapping[str, Size]) -> Size:
    total = _ONE
    for name in names:
        total = total * lengths[name]
    return total


# ------------------------------------------------------------- values that know where they are


def _eye(expr: Expr, axis: int) -> Cut:
    def value(facts: Facts, start: int) -> Tensor:
        made = facts.anchor.new_zeros(facts.shape)
        made.diagonal(start if axis == 0 else -start).fill_(1)
        return made

    return Cut((), value=value)


def _diag(expr: Expr, axis: int) -> Cut:
    def value(facts: Facts, start: int, v: Tensor) -> Tensor:
        made = v.new_zeros(facts.shape)
        made.diagonal(start if axis == 0 else -start).copy_(v)
        return made

    return Cut((Share(0),), value=value)


def _blockdiag(expr: Expr, axis: int) -> Cut:
    _, p, q = expr.args[0].shape
    by = q if axis else p

    def value(facts: Facts, start: int, blocks: Tensor) -> Tensor:
        here, height, width = blocks.shape
        first = start // (width if axis else height)
        n = facts.shape[1 - axis] // (height if axis else width)
        places = torch.arange(here, device=blocks.device)
        sizes = (n, height, here, width) if axis else (here, height, n, width)
        spread = blocks.new_zeros(sizes)
        if axis:
            spread[places + first, :, places] = blocks
        else:
            spread[places, :, places + first] = blocks
        return spread.reshape(facts.shape)

    return Cut((Share(0),), by, value=value)


def _scatter(expr: Expr, axis: int) -> Cut | None:
    if axis != 0:
        return None

    def value(facts: Facts, start: int, v: Tensor, places: Tensor) -> Tensor:
        count, columns = facts.shape
        at: Any = places.long()
        flat = at[0] * columns + at[1] if at.ndim > 1 else at
        flat = flat - start * columns
        here = (flat >= 0) & (flat < count * columns)
        return placed(v[here], flat[here], count * columns).view(count, columns)

    return Cut((None, None), value=value)


CUTS: Mapping[str, Rule] = {
    **dict.fromkeys(("add", "sub", "neg", "mul", "div", "power", "stop_gradient"), _same),
    **dict.fromkeys(("exp", "log", "sqrt", "abs", "sin", "cos", "tanh", "sigmoid"), _same),
    **dict.fromkeys(("relu", "gelu", "silu"), _same),
    **dict.fromkeys(("softmax", "topk"), _leading(1)),
    **dict.fromkeys(("cayley", "inverse", "neumann", "skew"), _leading(2)),
    **dict.fromkeys(("rearrange", "repeat", "reduce"), _layout),
    "rownorm": _leading(0),
    "colnorm": _colnorm,
    "matmul": _matmul,
    "transpose": _transpose,
    "scale_rows": _scale_rows,
    "scale_cols": _scale_cols,
    "tile": _first,
    "gather": _gather,
    "zeros": _zeros,
    "rotate_half": _rotate_half,
    "kron": _kron,
    "circulant": _circulant,
    "concat": _concat,
    "slice": _slice,
    "eye": _eye,
    "diag": _diag,
    "blockdiag": _blockdiag,
    "scatter": _scatter,
}
"""The rule of each operator that has one; of the others a part is taken of the whole."""
