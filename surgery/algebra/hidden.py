"""Sizes that no shape shows, and that like those of shapes must be whole at every site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import cast

from surgery.algebra.axes import Size
from surgery.algebra.expr import Attribute, Expr
from surgery.algebra.shapes import axis_sizes, slice_bounds

MOST_TERMS = 100

Hidden = Iterator[tuple[Size, int]]
"""Sizes, and the least that each may be."""


def hidden_sizes(expr: Expr) -> Hidden:
    """The sizes that an operator asks for beside those of shapes, and the least of each."""
    attrs = dict(expr.attrs)
    for name in attrs.keys() & _OF_ATTRIBUTES.keys():
        yield from _OF_ATTRIBUTES[name](expr, attrs[name])
    if expr.op in _OF_OPERATORS:
        yield from _OF_OPERATORS[expr.op](expr)


def _axes(expr: Expr, pattern: Attribute) -> Hidden:
    """Each axis of a pattern."""
    del pattern
    for length in axis_sizes(expr.args[0].shape, dict(expr.attrs)).values():
        yield length, 1


def _rests(expr: Expr, bounds: Attribute) -> Hidden:
    """What a slice leaves on either side."""
    del bounds
    attrs = dict(expr.attrs)
    for axis, (start, stop) in zip(expr.args[0].shape, slice_bounds(attrs), strict=False):
        yield start, 0
        yield axis - stop, 0


def _beyond(expr: Expr, rank: Attribute) -> Hidden:
    """Directions beyond those asked for."""
    return ((length - cast(Size, rank), 0) for length in expr.args[0].shape)


def _chosen(expr: Expr, k: Attribute) -> Hidden:
    """How many are chosen of the last axis, and how many are not."""
    yield cast(Size, k), 1
    yield expr.shape[-1] - cast(Size, k), 0


def _placed(expr: Expr, count: Attribute) -> Hidden:
    """How many places of a matrix there are beside those asked for."""
    rows, columns = expr.args[0].shape
    yield rows * columns - cast(Size, count), 0


def _counted(expr: Expr, terms: Attribute) -> Hidden:
    """How many powers are added; each is a product."""
    yield cast(Size, terms), 0
    yield MOST_TERMS - cast(Size, terms), 0


def _halves(expr: Expr) -> Hidden:
    """The halves of what is turned, and their number."""
    group = cast(Size, expr.attr("size"))
    yield group / 2, 1
    yield expr.shape[0] / group, 1


def _rows_left(expr: Expr) -> Hidden:
    """There are no more orthogonal columns than rows."""
    yield expr.shape[0] - expr.shape[1], 0


def _clustered(expr: Expr) -> Hidden:
    """There are no more clusters than rows, and no more steps than powers."""
    yield expr.shape[0] - expr.shape[1], 0
    yield from _counted(expr, expr.attr("steps"))


def _flown(expr: Expr) -> Hidden:
    """A butterfly of more than one factor halves its blocks and, again and again, their number."""
    levels, count, length, _ = expr.args[0].shape
    if levels.number is not None and levels.number > 1:
        yield length / 2, 1
        yield count / 2 ** (levels.number - 1), 1


_OF_ATTRIBUTES: Mapping[str, Callable[[Expr, Attribute], Hidden]] = {
    "pattern": _axes,
    "bounds": _rests,
    "rank": _beyond,
    "k": _chosen,
    "count": _placed,
    "terms": _counted,
}
_OF_OPERATORS: Mapping[str, Callable[[Expr], Hidden]] = {
    "rotate_half": _halves,
    "orthonormal": _rows_left,
    "qr": _rows_left,
    "butterfly": _flown,
    "clusters": _clustered,
}
