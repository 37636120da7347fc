"""Values row by row: blocks of rows of a matrix [out, in], made of the same rows of the weight.

What is made of the weight is cut as far as to the weight itself; what is made of parameters alone
is cut where it can be, and otherwise made whole once and kept for the blocks that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple, cast

import torch
from torch import Tensor

from surgery.algebra.arranged import (
    BASES,
    Settled,
    arranged,
    by_rows,
    cut_of,
    is_reproducible,
    of_weight,
    read_once,
    settled,
    step,
    whole_bytes,
)
from surgery.algebra.axes import Size, evaluate, size
from surgery.algebra.cost import numbers
from surgery.algebra.cuts import Cut
from surgery.algebra.expr import Expr
from surgery.algebra.interpret import LEAVES, Domain, Evaluator
from surgery.algebra.ops import OPS
from surgery.algebra.products import BITS, Kept, moved
from surgery.algebra.values import Facts

__all__ = ["RowEvaluator", "by_rows", "is_reproducible", "step", "whole_bytes"]


def _scaled_rows(v: Tensor, m: Tensor, out: Tensor) -> Tensor:
    return torch.mul(v.unsqueeze(-1), m, out=out)


_SIGNS = {"add": 1, "sub": -1}
_EITHER = frozenset(("add", "mul"))
_INTO: Mapping[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "scale_rows": _scaled_rows,
    "scale_cols": torch.mul,
}
"""Operators whose value may be put in the place of an argument."""

_NEW = frozenset((*_INTO, "matmul", "tile"))
"""Operators whose value never lies in the memory of something else but what is spare."""

_SEEN = frozenset(("rearrange", "transpose", "stop_gradient"))
"""Operators whose value is its argument, or lies in its memory."""


class _Share(NamedTuple):
    """A share of an argument, in numbers."""

    axis: int
    times: int
    offset: int

    def places(self, first: int, last: int) -> tuple[int, int, int]:
        """The axis, and what is needed of it for some places of the cut."""
        return self.axis, first * self.times + self.offset, last * self.times + self.offset


class _Way(NamedTuple):
    """A cut, in numbers."""

    cut: Cut
    by: int
    shares: tuple[_Share | None, ...]


class RowEvaluator(Evaluator):
    """Dense values in blocks of rows; what has no W in it and cannot be cut is made once."""

    def __init__(self, domain: Domain, reproducible: bool = True, bits: int = BITS) -> None:
        """Evaluate with what a domain offers; it has the sizes of the whole matrix.

        A leaf may come in any floating dtype: it is cut first, and then taken to the anchor's.
        """
        super().__init__(domain, reproducible, bits)
        self._names = settled(domain.names)
        self._whole_values: dict[Expr, Tensor] = {}
        self._leaves: dict[Expr, Tensor] = {}
        self._parts: dict[tuple[Expr, int, int, int], Tensor] = {}
        self._facts: dict[tuple[Expr, int, int], Facts] = {}
        self._own: Mapping[Expr, Tensor] = {}
        self._rows = (0, 0)
        self._once: frozenset[Expr] = frozenset()
        self._spent = False

    def rows(self, root: Expr, start: int, stop: int, own: Mapping[Expr, Tensor]) -> Tensor:
        """Rows start:stop of [out, in], or such entries of [out].

        own: these rows of WEIGHT, MERGED, or both, in float64.
        Raises ValueError where they cannot be made of these rows alone; see `by_rows` and `step`.
        """
        return self.all_rows((root,), start, stop, own)[0]

    def all_rows(
        self,
        roots: Sequence[Expr],
        start: int,
        stop: int,
        own: Mapping[Expr, Tensor],
        *,
        spent: bool = False,
    ) -> list[Tensor]:
        """The same rows of several values, what they have in common being made once.

        spent: whether the rows of WEIGHT and MERGED may be overwritten, with a result or else.
        """
        best = tuple(arranged(root, self.domain.names) for root in roots)
        self._own, self._rows, self._spent = own, (start, stop), spent
        self._once = read_once(best)
        try:
            return [self._part(root, 0, start, stop) for root in best]
        finally:
            self._parts.clear()
            self._values.clear()
            self._own = {}

    def _part(self, expr: Expr, axis: int, start: int, stop: int) -> Tensor:
        if expr in self._once:
            return self._make(expr, axis, start, stop)
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
        product = self._product(expr, axis)
        if product is not None:
            return self._moved(expr, product, (first, last))
        parts = self._arguments(expr, way, (first, last))
        facts = self._cut_facts(expr, axis, way, last - first)
        if way.cut.value is not None:
            made = way.cut.value(facts, first * way.by, *parts)
        else:
            found = self._in_place(expr, axis, facts.shape, parts)
            made = self.rule(expr)(facts, *parts) if found is None else found
        return made.narrow(axis, start - first * way.by, stop - start)

    def _arguments(self, expr: Expr, way: _Way, places: tuple[int, int]) -> list[Tensor]:
        parts = [
            self._whole(a) if s is None else self._part(a, *s.places(*places))
            for s, a in zip(way.shares, expr.args, strict=True)
        ]
        return parts if OPS[expr.op].numbers else [self._filled(p) for p in parts]

    # ------------------------------------------------------------------------------- in place

    def _product(self, expr: Expr, axis: int) -> int | None:
        """The place of a product that is added to or taken from rows of another argument."""
        if expr.op not in _SIGNS or axis != 0 or len(expr.shape) != 2:
            return None
        for place in (1, 0) if expr.op == "add" else (1,):
            made, other = expr.args[place], expr.args[1 - place]
            plain = made.op == "matmul" and all(len(a.shape) == 2 for a in made.args)
            if plain and made in self._once and other.shape:
                return place
        return None

    def _moved(self, expr: Expr, place: int, rows: tuple[int, int]) -> Tensor:
        made, other = expr.args[place], expr.args[1 - place]
        x = self._part(other, 0, *rows)
        x = x if self._is_spare(other, 0) else x.clone()
        way, sign = self._way(made, 0), _SIGNS[expr.op]
        assert way is not None
        left, right = self._arguments(made, way, rows)
        if self.reproducible:
            return moved(x, sign, left, right, self.bits, cast(Kept, self._kept))
        return x.addmm_(left, right, alpha=sign)

    def _in_place(
        self, expr: Expr, axis: int, shape: tuple[int, ...], parts: list[Tensor]
    ) -> Tensor | None:
        """The value in the memory of an argument, if there is one that nothing else reads."""
        function = _INTO.get(expr.op)
        spare = self._spare_arguments(expr, axis) if function else []
        room = next((parts[at] for at in spare if parts[at].shape == shape), None)
        if function is None or room is None or any(_other(p, room) for p in parts):
            return None
        if expr.args[0].op == "number":
            if expr.op not in _EITHER:
                return None
            parts = parts[::-1]
        return function(*parts, out=room)

    def _is_spare(self, expr: Expr, axis: int) -> bool:
        """Whether a part of an expression lies in memory that nothing else reads any more."""
        if expr not in self._once:
            return False
        if expr in self._own:
            return self._spent and expr in BASES
        if self._way(expr, axis) is None:
            return False
        return expr.op in _NEW or (expr.op in _SEEN and bool(self._spare_arguments(expr, axis)))

    def _spare_arguments(self, expr: Expr, axis: int) -> list[int]:
        way = self._way(expr, axis)
        shares = way.shares if way else ()
        found = enumerate(zip(shares, expr.args, strict=False))
        return [at for at, (s, a) in found if s is not None and self._is_spare(a, s.axis)]

    # ------------------------------------------------------------------------------ in numbers

    def _way(self, expr: Expr, axis: int) -> _Way | None:
        """How an expression is cut, which is the same for all blocks."""
        return _counted(expr, axis, self._names)

    def lengths(self, expr: Expr) -> tuple[int, ...]:
        """The shape in elements."""
        return _lengths(expr, self._names)

    def _cut_facts(self, expr: Expr, axis: int, way: _Way, count: int) -> Facts:
        key = (expr, axis, count)
        if key not in self._facts:
            self._facts[key] = _cut(self.facts(expr), axis, way, count)
        return self._facts[key]

    # ----------------------------------------------------------------------------------- whole

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
            return self._own_rows(expr, 0, 0, self.lengths(expr)[0])
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


@lru_cache(maxsize=4096)
def _counted(expr: Expr, axis: int, names: Settled) -> _Way | None:
    cut, sizes = cut_of(expr, axis), dict(names)
    if cut is None:
        return None
    shares = [
        None if s is None else _Share(s.axis, _number(s.times, sizes), _number(s.offset, sizes))
        for s in cut.shares
    ]
    return _Way(cut, _number(cut.by, sizes), tuple(shares))


@lru_cache(maxsize=4096)
def _lengths(expr: Expr, names: Settled) -> tuple[int, ...]:
    return numbers(expr, dict(names))


def _number(value: Size, names: Mapping[str, int | float]) -> int:
    return int(evaluate(value, names))


def _cut(facts: Facts, axis: int, way: _Way, count: int) -> Facts:
    """Of so many places of the cut, not of the whole."""
    arguments, attrs = list(facts.arguments), facts.attrs
    for place, share in enumerate(way.shares):
        if share is not None:
            arguments[place] = _replaced(arguments[place], share.axis, count * share.times)
    if way.cut.named:
        given = dict(cast("tuple[tuple[str, Size], ...]", attrs["axes"]))
        attrs = {**attrs, "axes": tuple({**given, way.cut.named: size(count)}.items())}
    shape = _replaced(facts.shape, axis, count * way.by)
    return replace(facts, shape=shape, arguments=tuple(arguments), attrs=attrs)


def _replaced(shape: tuple[int, ...], axis: int, length: int) -> tuple[int, ...]:
    return (*shape[:axis], length, *shape[axis + 1 :])


def _other(part: object, room: Tensor) -> bool:
    """Whether a value would have another dtype with it."""
    return isinstance(part, Tensor) and part.dtype is not room.dtype
