"""Values row by row: blocks of rows of a matrix [out, in], made of the same rows of the weight.

What is made of the weight is cut as far as to the weight itself; what is made of parameters alone
is cut where it can be, and otherwise made whole once and kept for the blocks that follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, cast

from torch import Tensor

from surgery.algebra.arranged import (
    BASES,
    arranged,
    by_rows,
    cut_of,
    is_reproducible,
    of_weight,
    step,
    whole_bytes,
)
from surgery.algebra.axes import Size, evaluate, size
from surgery.algebra.cuts import Cut
from surgery.algebra.expr import Expr
from surgery.algebra.interpret import LEAVES, Domain, Evaluator
from surgery.algebra.ops import OPS
from surgery.algebra.reproducible import BITS
from surgery.algebra.values import Facts

__all__ = ["RowEvaluator", "by_rows", "is_reproducible", "step", "whole_bytes"]


class _Share(NamedTuple):
    """A share of an argument, in numbers."""

    axis: int
    times: int
    offset: int

    def places(self, first: int, last: int) -> tuple[int, int, int]:
        """The axis, and what is needed of it for some places of the cut."""
        return self.axis, first * self.times + self.offset, last * self.times + self.offset


class _Way(NamedTuple):
    """A cut, in numbers, and the facts of the whole."""

    cut: Cut
    by: int
    shares: tuple[_Share | None, ...]
    facts: Facts


class RowEvaluator(Evaluator):
    """Dense values in blocks of rows; what has no W in it and cannot be cut is made once."""

    def __init__(self, domain: Domain, reproducible: bool = True, bits: int = BITS) -> None:
        """Evaluate with what a domain offers; it has the sizes of the whole matrix.

        A leaf may come in any floating dtype: it is cut first, and then taken to the anchor's.
        """
        super().__init__(domain, reproducible, bits)
        self._whole_values: dict[Expr, Tensor] = {}
        self._leaves: dict[Expr, Tensor] = {}
        self._parts: dict[tuple[Expr, int, int, int], Tensor] = {}
        self._ways: dict[tuple[Expr, int], _Way | None] = {}
        self._own: Mapping[Expr, Tensor] = {}
        self._rows = (0, 0)

    def rows(self, root: Expr, start: int, stop: int, own: Mapping[Expr, Tensor]) -> Tensor:
        """Rows start:stop of [out, in], or such entries of [out].

        own: these rows of WEIGHT, MERGED, or both, in float64.
        Raises ValueError where they cannot be made of these rows alone; see `by_rows` and `step`.
        """
        self._own, self._rows = own, (start, stop)
        try:
            return self._part(arranged(root, self.domain.names), 0, start, stop)
        finally:
            self._parts.clear()
            self._values.clear()
            self._own = {}

    def _part(self, expr: Expr, axis: int, start: int, stop: int) -> Tensor:
        key = (expr, axis, start, stop)
        if key not in self._parts:
            self._parts[key] = self._make(*key)
        return self._parts[key]

    def _make(self, expr: Expr, axis: int, start: int, stop: int) -> Tensor:
        if expr in self._own:
            return self._own_rows(expr, axis, start, stop)
        way = self._way(expr, axis)
        if way is not None:
            return self._cut_part(expr, axis, way, (start, stop))
        if expr.op in LEAVES:
            return self._widened(self._leaf(expr).narrow(axis, start, stop - start))
        return self._whole(expr).narrow(axis, start, stop - start)

    def _own_rows(self, expr: Expr, axis: int, start: int, stop: int) -> Tensor:
        if axis != 0 or (start, stop) != self._rows:
            raise ValueError(f"rows {start}:{stop} of W are needed, and only {self._rows} are here")
        return self._own[expr]

    def _cut_part(self, expr: Expr, axis: int, way: _Way, places: tuple[int, int]) -> Tensor:
        start, stop = places
        first, last = start // way.by, -(-stop // way.by)
        parts = [
            self._whole(a) if s is None else self._part(a, *s.places(first, last))
            for s, a in zip(way.shares, expr.args, strict=True)
        ]
        if not OPS[expr.op].numbers:
            parts = [self._filled(p) for p in parts]
        facts = _cut_facts(way, axis, last - first)
        if way.cut.value is not None:
            made = way.cut.value(facts, first * way.by, *parts)
        else:
            made = self.rule(expr)(facts, *parts)
        return made.narrow(axis, start - first * way.by, stop - start)

    def _way(self, expr: Expr, axis: int) -> _Way | None:
        """How an expression is cut, in numbers, which are the same for all blocks."""
        if (expr, axis) not in self._ways:
            self._ways[expr, axis] = self._counted(expr, cut_of(expr, axis))
        return self._ways[expr, axis]

    def _counted(self, expr: Expr, cut: Cut | None) -> _Way | None:
        if cut is None:
            return None
        shares = [
            None if s is None else _Share(s.axis, self._size(s.times), self._size(s.offset))
            for s in cut.shares
        ]
        return _Way(cut, self._size(cut.by), tuple(shares), self.facts(expr))

    def _whole(self, expr: Expr) -> Tensor:
        """The whole value; of W only where the block is all of it."""
        if of_weight(expr):
            return self._value(expr)
        if expr not in self._whole_values:
            self._whole_values[expr] = self._value(expr)
            self._values.clear()  # what was made on the way
        return self._whole_values[expr]

    def _compute(self, expr: Expr) -> Tensor:
        if expr in self._own:
            return self._own_rows(expr, 0, 0, self._size(expr.shape[0]))
        if expr.op in LEAVES:
            return self._widened(self._leaf(expr))
        return super()._compute(expr)

    def _leaf(self, expr: Expr) -> Tensor:
        if expr in BASES:
            raise ValueError("rows of W are needed that are not here")
        if expr not in self._leaves:
            self._leaves[expr] = self.domain.leaf(expr)
        return self._leaves[expr]

    def _widened(self, value: Tensor) -> Tensor:
        return value.to(self.domain.anchor().dtype) if value.is_floating_point() else value

    def _size(self, value: Size) -> int:
        return int(evaluate(value, self.domain.names))


def _cut_facts(way: _Way, axis: int, count: int) -> Facts:
    facts, arguments = way.facts, list(way.facts.arguments)
    for place, share in enumerate(way.shares):
        if share is not None:
            arguments[place] = _replaced(arguments[place], share.axis, count * share.times)
    attrs = facts.attrs
    if way.cut.named:
        given = dict(cast("tuple[tuple[str, Size], ...]", attrs["axes"]))
        attrs = {**attrs, "axes": tuple({**given, way.cut.named: size(count)}.items())}
    shape = _replaced(facts.shape, axis, count * way.by)
    return replace(facts, shape=shape, arguments=tuple(arguments), attrs=attrs)


def _replaced(shape: tuple[int, ...], axis: int, length: int) -> tuple[int, ...]:
    return (*shape[:axis], length, *shape[axis + 1 :])
