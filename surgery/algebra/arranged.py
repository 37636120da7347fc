"""How an expression is evaluated in rows: what is cut where its rows are, and in which order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from math import lcm, prod
from typing import NamedTuple, cast

from surgery.algebra.axes import Size, evaluate, size
from surgery.algebra.blockwise import blockwise
from surgery.algebra.cost import cheapest, numbers, value_cost
from surgery.algebra.cuts import Cut
from surgery.algebra.expr import MERGED, WEIGHT, Expr, depends_on, walk
from surgery.algebra.ops import OPS
from surgery.algebra.products import BITS, kept_bytes
from surgery.algebra.reproducible import is_settled

BASES = (WEIGHT, MERGED)
_ONE, _NONE = size(1), size(0)

Names = Mapping[str, int | float]
Settled = tuple[tuple[str, int | float], ...]


class _Place(NamedTuple):
    """A cut expression: of the root's place p the place `ratio * p + offset` of an axis."""

    expr: Expr
    axis: int
    ratio: Size
    offset: Size


def by_rows(root: Expr) -> bool:
    """Whether rows of a matrix [out, in], or entries of a vector [out], are made block by block.

    They are if each is made of the same rows of the weight, and of parameters.
    """
    return _cuts(blockwise(root)) is not None


def step(root: Expr, names: Names | None = None) -> int:
    """How many rows a block begins and ends at multiples of; 1 where rows stand alone.

    The last block ends where the matrix does. names: sizes of the site, where the root has them in
    its structure. Raises ValueError where it is not made by rows at all.
    """
    found = _cuts(blockwise(root))
    if found is None:
        raise ValueError("it is not made by rows")
    steps = [_number(by / ratio, names or {}).numerator for by, ratio in found]
    return lcm(*steps)


def is_reproducible(root: Expr) -> bool:
    """Whether `Evaluator(…, reproducible=True)` gives the same bits of the same leaves anywhere."""
    operators = (e for e in walk(blockwise(root)) if e.op in OPS)
    return all(OPS[e.op].exact is not None and is_settled(e) for e in operators)


def whole_bytes(root: Expr, names: Names, bits: int = BITS) -> int:
    """The bytes in float64 of what is kept whole for all blocks: parts made of parameters alone.

    With what products that are reproducible keep of them, with so many bits. Parameters of which
    rows are cut are not in it: `Domain.leaf` may give them as they are stored.
    """
    best = arranged(root, names)
    kept = set(_wholes(best))
    rights = {e.args[1] for e in walk(best) if e.op == "matmul" and e.args[1] in kept}
    split = sum(kept_bytes(numbers(e, names), bits) for e in rights if len(e.shape) > 1)
    return split + sum(8 * prod(numbers(expr, names)) for expr in kept)


def arranged(root: Expr, names: Names) -> Expr:
    """The expression to evaluate: products of blocks block by block, and the cheapest order."""
    return _arranged(root, settled(names))


def settled(names: Names) -> Settled:
    """Sizes as a key."""
    return tuple(sorted(names.items()))


@lru_cache(maxsize=256)
def _arranged(root: Expr, names: Settled) -> Expr:
    plain = blockwise(root)
    best = cheapest(plain, value_cost(dict(names)))
    return plain if _cuts(plain) is not None and _cuts(best) is None else best


# ------------------------------------------------------------------------------------ structure


@lru_cache(maxsize=512)
def _cuts(root: Expr) -> tuple[tuple[Size, Size], ...] | None:
    """By how many places, at which ratio to the root's, W is cut on the way; None if it is not."""
    found: set[tuple[Size, Size]] = set()
    for place in _places(root):
        expr, axis, ratio, offset = place
        if not of_weight(expr):
            continue
        if expr in BASES:
            if axis != 0 or ratio != _ONE or offset != _NONE:
                return None
            continue
        cut = cut_of(expr, axis)
        if cut is None or any(
            share is None and of_weight(a) for share, a in zip(cut.shares, expr.args, strict=True)
        ):
            return None
        found.add((cut.by, ratio))
    return tuple(found)


def _places(root: Expr) -> Iterator[_Place]:
    """All that is cut where the rows of the root are, the root first."""
    stack, seen = [_Place(root, 0, _ONE, _NONE)], set[_Place]()
    while stack:
        place = stack.pop()
        if place in seen:
            continue
        seen.add(place)
        yield place
        expr, axis, ratio, offset = place
        cut = cut_of(expr, axis)
        for share, argument in zip(cut.shares if cut else (), expr.args, strict=False):
            if share is not None:
                times = share.times / cast(Cut, cut).by
                moved = offset * times + share.offset
                stack.append(_Place(argument, share.axis, ratio * times, moved))


@lru_cache(maxsize=512)
def read_once(roots: tuple[Expr, ...]) -> frozenset[Expr]:
    """What is cut in one way alone and read in one place: what reads it may use its memory.

    roots: which are made of the same rows, and after another.
    """
    below = {expr for root in roots for expr in walk(root)}
    readers = Counter((*roots, *(argument for expr in below for argument in expr.args)))
    ways = Counter(place.expr for place in {p for root in roots for p in _places(root)})
    return frozenset(expr for expr in below if readers[expr] == 1 == ways[expr])


def _wholes(root: Expr) -> Iterator[Expr]:
    """What is needed whole, without what is made for that alone."""
    for expr, axis, _, _ in _places(root):
        cut = cut_of(expr, axis)
        if cut is None:
            if expr.op in OPS:
                yield expr
            continue
        shared = zip(cut.shares, expr.args, strict=True)
        yield from (a for share, a in shared if share is None and a.shape)


@lru_cache(maxsize=4096)
def cut_of(expr: Expr, axis: int) -> Cut | None:
    """How an expression is cut along an axis; None where it is made whole."""
    op = OPS.get(expr.op)
    return None if op is None or op.cut is None else op.cut(expr, axis)


@lru_cache(maxsize=4096)
def of_weight(expr: Expr) -> bool:
    """Whether W or W' is needed for it."""
    return any(depends_on(expr, base) for base in BASES)


def _number(value: Size, names: Names) -> Fraction:
    return Fraction(evaluate(value, names))
