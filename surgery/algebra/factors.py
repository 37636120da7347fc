"""What an equation adds to W as products of two factors of few columns: its rank, seen in its form.

A matrix is a sum of products L @ R. Every operator that keeps such sums has a rule, which takes the
factors of its arguments to its own; whatever has none is one product with the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import product

from surgery.algebra.axes import evaluate
from surgery.algebra.expr import WEIGHT, Expr
from surgery.algebra.rules import make

Names = Mapping[str, int | float]

Factors = tuple[tuple[Expr, Expr], ...]
"""A matrix [m, n] as the sum of these products of [m, k] and [k, n]."""


def rank_of(factors: Factors, names: Names) -> int:
    """The columns of all left factors together: as many as one product of them all has."""
    return int(sum(evaluate(right.shape[0], names) for _, right in factors))


def change(weight: Expr, names: Names) -> Factors | None:
    """The factors of `weight - W`, or None where its form tells none but a matrix and an identity.

    names: the sizes of the site. Where nothing is added, there are no factors.
    """
    found = _Finder(names).beyond(weight, WEIGHT)
    full = min(evaluate(length, names) for length in WEIGHT.shape)
    if found is None or rank_of(found, names) > full:
        return None
    whole = (e for pair in found for e in pair if e.op == "eye")
    return None if any(evaluate(e.shape[0], names) == full for e in whole) else found


class _Finder:
    """The factors of every part of one equation, each found once."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.known: dict[Expr, Factors] = {}

    def of(self, expr: Expr) -> Factors:
        """The factors of a matrix, by the way that has the fewest columns."""
        if expr not in self.known:
            rule = _RULES.get(expr.op)
            found = None if rule is None else rule(self, expr)
            self.known[expr] = self.least(filter(None, (found, _dense(expr, self.names))))
        return self.known[expr]

    def least(self, found: Iterable[Factors]) -> Factors:
        """Of some ways to say the same, the one with the fewest columns."""
        return min(found, key=lambda factors: rank_of(factors, self.names))

    def beyond(self, expr: Expr, base: Expr) -> Factors | None:
        """The factors of `expr - base`, where base is W or an identity; None if there are none."""
        if expr is base or (base is not WEIGHT and expr.op == "eye"):
            return ()
        rule = _BEYOND.get(expr.op)
        return None if rule is None else rule(self, expr, base)


def _dense(expr: Expr, names: Names) -> Factors:
    rows, columns = (evaluate(length, names) for length in expr.shape)
    if rows <= columns:
        return ((make("eye", size=expr.shape[0]), expr),)
    return ((expr, make("eye", size=expr.shape[1])),)


# --------------------------------------------------------------------------- factors of a matrix


def _add(find: _Finder, e: Expr) -> Factors | None:
    if any(a.is_scalar for a in e.args):
        return None
    left, right = map(find.of, e.args)
    return (*left, *(right if e.op == "add" else _negative(right)))


def _neg(find: _Finder, e: Expr) -> Factors:
    return _negative(find.of(e.args[0]))


def _negative(factors: Factors) -> Factors:
    return tuple((make("neg", left), right) for left, right in factors)


def _mul(find: _Finder, e: Expr) -> Factors:
    a, b = e.args
    if a.is_scalar or b.is_scalar:
        by, matrix = (a, b) if a.is_scalar else (b, a)
        return tuple((make("mul", by, left), right) for left, right in find.of(matrix))
    return tuple(_elementwise(p, q) for p, q in product(find.of(a), find.of(b)))


def _elementwise(p: tuple[Expr, Expr], q: tuple[Expr, Expr]) -> tuple[Expr, Expr]:
    """(A B) * (C D): each column of A by each of C, each row of B by each of D."""
    first, second = p[1].shape[0], q[1].shape[0]
    left = make(
        "mul",
        make("repeat", p[0], pattern="o a -> o (a b)", axes=(("b", second),)),
        make("repeat", q[0], pattern="o b -> o (a b)", axes=(("a", first),)),
    )
    right = make(
        "mul",
        make("repeat", p[1], pattern="a i -> (a b) i", axes=(("b", second),)),
        make("repeat", q[1], pattern="b i -> (a b) i", axes=(("a", first),)),
    )
    return left, right


def _div(find: _Finder, e: Expr) -> Factors | None:
    matrix, by = e.args
    if not by.is_scalar or matrix.is_scalar:
        return None
    return tuple((make("div", left, by), right) for left, right in find.of(matrix))


def _matmul(find: _Finder, e: Expr) -> Factors | None:
    a, b = e.args
    if len(a.shape) != 2 or len(b.shape) != 2:
        return None
    through_a = tuple((left, make("matmul", right, b)) for left, right in find.of(a))
    through_b = tuple((make("matmul", a, left), right) for left, right in find.of(b))
    return find.least((((a, b),), through_a, through_b))


def _transpose(find: _Finder, e: Expr) -> Factors:
    return tuple((make("transpose", r), make("transpose", a)) for a, r in find.of(e.args[0]))


def _scale_rows(find: _Finder, e: Expr) -> Factors:
    v, matrix = e.args
    return tuple((make("scale_rows", v, left), right) for left, right in find.of(matrix))


def _scale_cols(find: _Finder, e: Expr) -> Factors:
    v, matrix = e.args
    return tuple((left, make("scale_cols", v, right)) for left, right in find.of(matrix))


def _tile(find: _Finder, e: Expr) -> Factors:
    attrs = dict(e.attrs)
    return tuple((left, make("tile", right, **attrs)) for left, right in find.of(e.args[0]))


def _kron(find: _Finder, e: Expr) -> Factors:
    pairs = product(*map(find.of, e.args))
    return tuple((make("kron", p[0], q[0]), make("kron", p[1], q[1])) for p, q in pairs)


def _same(find: _Finder, e: Expr) -> Factors:
    return find.of(e.args[0])


def _nothing(find: _Finder, e: Expr) -> Factors:
    return ()


Rule = Callable[[_Finder, Expr], "Factors | None"]

_RULES: Mapping[str, Rule] = {
    "add": _add,  # A B + C D, side by side
    "sub": _add,
    "neg": _neg,  # (-A) B
    "mul": _mul,  # c (A B) = (c A) B, and element by element
    "div": _div,
    "matmul": _matmul,  # through the narrowest place
    "transpose": _transpose,  # (A B)ᵀ = Bᵀ Aᵀ
    "scale_rows": _scale_rows,
    "scale_cols": _scale_cols,
    "tile": _tile,  # tile(A B) = A tile(B)
    "kron": _kron,  # (A B) ⊗ (C D) = (A ⊗ C) (B ⊗ D)
    "stop_gradient": _same,
    "zeros": _nothing,
}


# ------------------------------------------------------------------------------ beyond W or one


def _beyond_sum(find: _Finder, e: Expr, base: Expr) -> Factors | None:
    """(base + D) + E, from whichever side has the base in it."""
    a, b = e.args
    if a.is_scalar or b.is_scalar:
        return None
    ways: list[Factors] = []
    inner = find.beyond(a, base)
    if inner is not None:
        rest = find.of(b)
        ways.append((*inner, *(rest if e.op == "add" else _negative(rest))))
    other = find.beyond(b, base) if e.op == "add" else None
    if other is not None:
        ways.append((*find.of(a), *other))
    return find.least(ways) if ways else None


def _beyond_product(find: _Finder, e: Expr, base: Expr) -> Factors | None:
    """A B - W = (A - W) B + W (B - 1) = (A - 1) B + (B - W); and with 1 for W."""
    a, b = e.args
    if len(a.shape) != 2 or len(b.shape) != 2:
        return None
    ways: list[Factors] = []
    for bases in ((base, _one(b)), (_one(a), base)):
        first, second = find.beyond(a, bases[0]), find.beyond(b, bases[1])
        if first is None or second is None:
            continue
        by = tuple((left, make("matmul", right, b)) for left, right in first)
        ways.append((*by, *((make("matmul", bases[0], left), right) for left, right in second)))
    return find.least(ways) if ways else None


def _one(matrix: Expr) -> Expr:
    return make("eye", size=matrix.shape[0])


def _beyond_transpose(find: _Finder, e: Expr, base: Expr) -> Factors | None:
    inner = None if base is WEIGHT else find.beyond(e.args[0], base)
    if inner is None:
        return None
    return tuple((make("transpose", right), make("transpose", left)) for left, right in inner)


def _beyond_reflections(find: _Finder, e: Expr, base: Expr) -> Factors | None:
    """A product of reflections is 1 - U R, in as many columns as it has reflections."""
    columns = e.args[0]
    if base is WEIGHT or len(columns.shape) != 2:
        return None
    return ((make("neg", columns), make("reflectors", columns)),)


Beyond = Callable[[_Finder, Expr, Expr], "Factors | None"]

_BEYOND: Mapping[str, Beyond] = {
    "add": _beyond_sum,
    "sub": _beyond_sum,
    "matmul": _beyond_product,
    "transpose": _beyond_transpose,
    "householder": _beyond_reflections,
}
