"""What follows from a method's equations: the merged weight and bias, and the way back.

Equations between activations that are affine in x become a merged weight and bias; W' is solved for
W by undoing one operator after another, and what is in the way and small becomes a witness.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from surgery.algebra.chance import noisy
from surgery.algebra.equations import Equations
from surgery.algebra.expr import (
    BIAS,
    IN,
    INPUT,
    MERGED,
    ORIGIN,
    OUTPUT,
    WEIGHT,
    Expr,
    depends_on,
    node,
    render,
    walk,
    zeros,
)
from surgery.algebra.ops import OPS
from surgery.algebra.places import UNMERGED, Places
from surgery.algebra.rules import make, substitute

MergeClass = Literal["exact", "algebraic", "witness", "snapshot", "none"]


@dataclass(frozen=True, slots=True)
class Merged:
    """The merged weight [out, in] and bias [out] as expressions over W, b and the parameters."""

    weight: Expr
    bias: Expr


@dataclass(frozen=True, slots=True)
class Inverse:
    """W as an expression over W' (`merged`), the parameters and the witnesses.

    weight: None where there is no way back but the base itself.
    witnesses: name and expression of what a merge must keep, each at most a vector.
    """

    weight: Expr | None
    witnesses: tuple[tuple[str, Expr], ...] = ()


@dataclass(frozen=True, slots=True)
class Derived:
    """All that is derived from one method at one shape of site.

    merged: None where the equation is not affine in x; `reason` says why.
    still: the same with all randomness at its expectation; what a merge evaluates.
    beside: of a mix, the equations that run between activations, each with its number; what runs
        as W' and b' is in `equations`.
    """

    equations: Equations
    merged: Merged | None
    still: Merged | None
    inverse: Inverse
    reason: str = ""
    beside: tuple[tuple[float, Equations], ...] = ()

    @property
    def noisy(self) -> bool:
        """Whether a forward in training has noise in it, of which the merged weight has none."""
        return any(map(noisy, (self.equations, *(equations for _, equations in self.beside))))

    @property
    def merge_class(self) -> MergeClass:
        """How a merge can be taken back without the base: `none` if there is no merge."""
        if self.still is None:
            return "none"
        if self.still.weight is WEIGHT:
            return "exact"
        if self.inverse.weight is None:
            return "snapshot"
        return "witness" if self.inverse.witnesses else "algebraic"


@lru_cache(maxsize=512)
def derive(
    equations: Equations, has_bias: bool, beside: tuple[tuple[float, Equations], ...] = ()
) -> Derived:
    """Everything that follows from the equations at a site with or without a bias.

    beside: of a mix at a site that is in no weight, those that are mixed.
    """
    if equations.kind.unmerged:
        return Derived(equations, None, None, Inverse(None), equations.kind.unmerged, beside)
    try:
        merged = _merged(equations)
    except _NotAffine as obstacle:
        return Derived(equations, None, None, Inverse(None), str(obstacle))
    return completed(equations, merged, has_bias)


def derived_at(derived: Derived, places: tuple[Places, ...]) -> Derived:
    """The same for some tokens alone: it runs as it did, and is in no weight."""
    if not places:
        return derived
    return replace(derived, still=None, inverse=Inverse(None), reason=derived.reason or UNMERGED)


def completed(
    equations: Equations,
    merged: Merged,
    has_bias: bool,
    beside: tuple[tuple[float, Equations], ...] = (),
) -> Derived:
    """What follows from a merged weight and bias over W and b."""
    absent: Mapping[Expr, Expr] = {} if has_bias else {BIAS: zeros(BIAS.shape)}
    merged = _replaced(merged, absent)
    still = _replaced(merged, {d: make("eye", size=d.shape[0]) for d in _drops(merged)})
    return Derived(equations, merged, still, invert(still.weight), beside=beside)


def _replaced(merged: Merged, replacements: Mapping[Expr, Expr]) -> Merged:
    return Merged(
        substitute(merged.weight, dict(replacements)), substitute(merged.bias, dict(replacements))
    )


def _drops(merged: Merged) -> set[Expr]:
    return {e for e in (*walk(merged.weight), *walk(merged.bias)) if e.op == "drop"}


# --------------------------------------------------------------------------- affine activations


class _NotAffine(Exception):
    """The output is not affine in x; the message is the reason."""


@dataclass(frozen=True, slots=True)
class _Affine:
    """x ↦ matrix @ x + constant."""

    matrix: Expr
    constant: Expr


def _merged(equations: Equations) -> Merged:
    weight = equations.weight or WEIGHT
    bias = equations.bias or BIAS
    inner = origin = _Affine(make("eye", size=IN), zeros((IN,)))
    if equations.input is not None:
        inner = _Composer({INPUT: origin}).of(equations.input)
    site = _through(weight, bias, inner)
    if equations.output is not None:
        known = {ORIGIN: origin, INPUT: inner, OUTPUT: site}
        site = _Composer(known).of(equations.output)
    return Merged(site.matrix, site.constant)


def _through(weight: Expr, bias: Expr, inner: _Affine) -> _Affine:
    matrix = _times(weight, inner.matrix)
    return _Affine(matrix, make("add", make("matmul", weight, inner.constant), bias))


def _times(weight: Expr, matrix: Expr) -> Expr:
    if matrix.op == "diag":  # a @ diag(v) = a scaled by columns
        return make("scale_cols", matrix.args[0], weight)
    return make("matmul", weight, matrix)


class _Composer:
    """Activations as affine maps of x; row vectors in, row vectors out."""

    def __init__(self, known: dict[Expr, _Affine]) -> None:
        self.known = known

    def of(self, expr: Expr) -> _Affine:
        """The map that an activation [tokens, n] is. Raises _NotAffine."""
        if expr not in self.known:
            self.known[expr] = self._made(expr)
        return self.known[expr]

    def _made(self, expr: Expr) -> _Affine:
        match expr.op:
            case "add" | "sub":
                return self._sum(expr)
            case "neg":
                return _each("neg", self.of(expr.args[0]))
            case "scale":
                return _scaled(expr.args[0], self.of(expr.args[1]))
            case "shift":
                moved = self.of(expr.args[1])
                return _Affine(moved.matrix, make("add", moved.constant, expr.args[0]))
            case "noise":  # its mean
                return _Affine(zeros((expr.shape[-1], IN)), zeros((expr.shape[-1],)))
            case "mul" | "div":
                return self._multiple(expr)
            case "matmul" if len(expr.args[1].shape) > 1:
                a, m = self.of(expr.args[0]), make("transpose", expr.args[1])
                return _Affine(_times(m, a.matrix), make("matmul", m, a.constant))
            case _:
                raise _NotAffine(f"{render(expr)} is not linear in x")

    def _sum(self, expr: Expr) -> _Affine:
        """The sum of two, where a number is the same for every feature."""
        a, b = (None if e.is_scalar else self.of(e) for e in expr.args)
        matrices = [e if m is None else m.matrix for e, m in zip(expr.args, (a, b), strict=True)]
        constants = [e if m is None else m.constant for e, m in zip(expr.args, (a, b), strict=True)]
        matrix = matrices[0] if b is None else matrices[1]
        if a is not None and b is not None:
            matrix = make(expr.op, *matrices)
        elif a is None and expr.op == "sub":
            matrix = make("neg", matrix)
        return _Affine(matrix, make(expr.op, *constants))

    def _multiple(self, expr: Expr) -> _Affine:
        left, right = expr.args
        if right.is_scalar:
            return _each(expr.op, self.of(left), right)
        if left.is_scalar and expr.op == "mul":
            return _each(expr.op, self.of(right), left)
        raise _NotAffine(f"{render(expr)} is not linear in x")


def _each(op: str, a: _Affine, *operands: Expr) -> _Affine:
    return _Affine(make(op, a.matrix, *operands), make(op, a.constant, *operands))


def _scaled(factors: Expr, a: _Affine) -> _Affine:
    constant = make("mul", factors, a.constant)
    if a.matrix.op == "eye":
        return _Affine(make("diag", factors), constant)
    return _Affine(make("scale_rows", factors, a.matrix), constant)


# --------------------------------------------------------------------------------- the way back


def invert(weight: Expr) -> Inverse:
    """W from W' = `weight`: operators undone one by one, from the outside in."""
    if weight is WEIGHT:
        return Inverse(MERGED)
    witnesses: dict[Expr, Expr] = {}
    target: Expr | None = MERGED
    expr = weight
    while expr is not WEIGHT:
        step = _step(expr)
        if step is None:
            return Inverse(None)
        index, beside = step
        undo = OPS[expr.op].undo
        assert undo is not None
        for part in beside:
            witnesses[part] = witness_leaf(f"witness{len(witnesses)}", part)
        target = undo(make, substitute(expr, _only_beside(expr, index, witnesses)), index, target)
        if target is None:
            return Inverse(None)
        expr = expr.args[index]
    return Inverse(target, tuple((w.text("name"), part) for part, w in witnesses.items()))


def _step(expr: Expr) -> tuple[int, tuple[Expr, ...]] | None:
    """Which argument leads to W, and what beside it depends on W and must be kept."""
    op = OPS.get(expr.op)
    if op is None or op.undo is None:
        return None
    through = [i for i, a in enumerate(expr.args) if depends_on(a, WEIGHT)]
    # The way is the argument that is a matrix; whatever else depends on W must be small.
    ways = [i for i in through if len(expr.args[i].shape) > 1]
    if len(ways) != 1:
        return None
    beside = tuple(expr.args[i] for i in through if i != ways[0])
    return ways[0], beside


def _only_beside(expr: Expr, index: int, witnesses: Mapping[Expr, Expr]) -> dict[Expr, Expr]:
    others = {a for i, a in enumerate(expr.args) if i != index}
    return {part: witness for part, witness in witnesses.items() if part in others}


def witness_leaf(name: str, part: Expr) -> Expr:
    """What stands in an inverse for a part that a merge keeps."""
    return node("witness", (), part.shape, (("name", name),))


def parameters_in(expr: Expr) -> frozenset[str]:
    """The names of the parameters that an expression reads."""
    return frozenset(e.text("name") for e in walk(expr) if e.op == "parameter")
