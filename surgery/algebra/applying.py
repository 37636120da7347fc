"""Applying operators to vectors, without building the matrix.

A rule gives None where there is no structure to use, here or at this kind of site; then the matrix
is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.algebra.axes import Scalar
from surgery.algebra.expr import IN, OUT, Expr, node, number
from surgery.algebra.values import Facts, correlate, turned, unit

_ONE = number(1)
_MINUS_ONE = number(-1)


@dataclass(frozen=True, eq=False, slots=True)
class Vector:
    """One vector a token, on the way through an equation.

    tensor: [..., n], or [..., groups, n] while `grouped`; if `raw`, the site's own input in
        whatever form its kind takes, with `factor` [..., 1] to multiply what is read from it;
        `changed` if it is no longer just as it came.
    narrow: whether it may be in the dtype of the site's output, and not of the parameters.
    offset: a constant vector [n] still to be added; None for none.
    """

    tensor: Tensor
    raw: bool = False
    grouped: bool = False
    changed: bool = False
    narrow: bool = False
    factor: Tensor | None = None
    offset: Expr | None = None


class Applier(Protocol):
    """What an apply rule may ask of the interpreter."""

    def value(self, expr: Expr) -> Tensor:
        """The dense value."""
        ...

    def apply(self, expr: Expr, v: Vector) -> Vector:
        """The matrix `expr` [m, n] by v."""
        ...

    def features(self, v: Vector) -> Vector | None:
        """The vector with its features on the last axis; None where the input has no such form."""
        ...

    def scale(self, factors: Expr, v: Vector) -> Vector | None:
        """Each element of v by a factor [n]; None where the input cannot be scaled."""
        ...

    def base(self, v: Vector) -> Vector | None:
        """W by v; None where v is not in a form the site takes."""
        ...

    def drop(self, probability: float, together: str, v: Vector) -> Vector:
        """Dropout, active in training; `together` is one of `chance.TOGETHER`."""
        ...

    def multiply(self, factor: Expr, v: Vector) -> Vector:
        """The vector by a number."""
        ...

    def add(self, left: Vector, right: Vector, alpha: int) -> Vector:
        """The sum, left + alpha * right."""
        ...

    def mapped(self, expr: Expr, v: Vector, function: Callable[[Tensor], Tensor]) -> Vector | None:
        """A function that is `expr` on features; None where v has none or its rows are grouped."""
        ...

    def facts(self, expr: Expr) -> Facts:
        """The sizes of an expression."""
        ...

    def split(self, v: Vector) -> bool:
        """Whether each group of output rows sees a part of v alone."""
        ...


def add(go: Applier, expr: Expr, v: Vector) -> Vector:
    """(a + b) x = a x + b x."""
    left, right = expr.args
    return go.add(go.apply(left, v), go.apply(right, v), 1)


def sub(go: Applier, expr: Expr, v: Vector) -> Vector:
    """(a - b) x = a x - b x."""
    left, right = expr.args
    return go.add(go.apply(left, v), go.apply(right, v), -1)


def neg(go: Applier, expr: Expr, v: Vector) -> Vector:
    """(-a) x = -(a x)."""
    applied = go.apply(expr.args[0], v)
    return go.multiply(_MINUS_ONE, applied)


def mul(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    """(s a) x = s (a x), for a number s."""
    left, right = expr.args
    if left.is_scalar:
        return go.multiply(left, go.apply(right, v))
    if right.is_scalar:
        return go.multiply(right, go.apply(left, v))
    return None


def div(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    """(a / s) x = 1/s (a x), for a number s."""
    left, right = expr.args
    if not right.is_scalar:
        return None
    return go.multiply(node("div", (_ONE, right), ()), go.apply(left, v))


def matmul(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    """(a @ b) x = a (b x)."""
    left, right = expr.args
    if right.shape[0] == IN and go.features(v) is None and not _any_input(right):
        return None  # patches and indices can be read by a matrix once, and not be mixed before
    if right.shape[0] == OUT and go.split(v) and not _diagonal(left):
        return None  # b x has joined the groups, and a would mix them
    return go.apply(left, go.apply(right, v))


def _any_input(expr: Expr) -> bool:
    """Whether a map of the input space into itself takes input of every form."""
    match expr.op:
        case "drop" | "eye":
            return True
        case "diag":
            return expr.args[0].op == "channelwise"
        case "matmul":
            return all(map(_any_input, expr.args))
        case _:
            return False


def _diagonal(expr: Expr) -> bool:
    return expr.op in ("drop", "eye", "diag") or (
        expr.op == "matmul" and all(map(_diagonal, expr.args))
    )


def scale_rows(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    """(v * rows(a)) x = v * (a x)."""
    return go.scale(expr.args[0], go.apply(expr.args[1], v))


def scale_cols(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    """Columns are scaled by scaling x: a (v * x)."""
    scaled = go.scale(expr.args[0], v)
    return None if scaled is None else go.apply(expr.args[1], scaled)


def diag(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    """Each element by its own: v * x."""
    return go.scale(expr.args[0], v)


def blockdiag(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    """Each block by its part of x."""
    blocks = expr.args[0]
    n, _, q = go.facts(expr).arguments[0]

    def blockwise(x: Tensor) -> Tensor:
        parts = cast(Tensor, x.unflatten(-1, (n, q))).unsqueeze(-2)  # [..., n, 1, q]
        return torch.matmul(parts, go.value(blocks).transpose(-1, -2)).flatten(-3)

    return go.mapped(expr, v, blockwise)


def kron(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    """(a ⊗ b) x = a X bᵀ, where X [q, t] is x by rows."""
    a, b = expr.args
    (_, q), (_, t) = go.facts(expr).arguments

    def two_products(x: Tensor) -> Tensor:
        inner = F.linear(cast(Tensor, x.unflatten(-1, (q, t))), go.value(b))  # [..., q, s]
        return torch.matmul(go.value(a), inner).flatten(-2)  # [..., p, s]

    return go.mapped(expr, v, two_products)


def circulant(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    """Each block by its part of x, as a product of their transforms."""
    blocks = expr.args[0]
    return go.mapped(expr, v, lambda x: correlate(x, go.value(blocks)))


def tile(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    """The sum of the parts of x, and then a."""
    if expr.shape[1] == IN and v.grouped:
        return None
    features = go.features(v)
    if features is None:
        return None
    facts = go.facts(expr)
    columns, width = facts.shape[1], facts.arguments[0][1]
    copies = -(-columns // width)
    x = features.tensor
    if copies * width > columns:
        x = F.pad(x, (0, copies * width - columns))
    summed = cast(Tensor, x.unflatten(-1, (copies, width))).sum(-2)  # [..., width]
    offset = None if v.offset is None else _summed(expr, v.offset)
    return go.apply(expr.args[0], replace(features, tensor=summed, offset=offset))


def _summed(expr: Expr, offset: Expr) -> Expr:
    """The sum of the parts of an offset: tile(a) c = a (tile(I) c)."""
    width, columns = expr.args[0].shape[1], expr.shape[1]
    one = node("eye", (), (width, width), (("size", width),))
    parts = node("tile", (one,), (width, columns), expr.attrs)
    return node("matmul", (parts, offset), (width,))


def rotate_half(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    """The rows are turned by turning a x."""
    a = expr.args[0]
    if a.shape[0] == OUT and go.split(v):
        return None  # a x has joined the groups, and turning would mix them
    features = go.features(go.apply(a, v))
    if features is None:
        return None
    facts = go.facts(expr)
    tensor = turned(features.tensor, -1, facts.shape[0], facts.integer("size"))
    offset = None if features.offset is None else _turned(expr, features.offset)
    return replace(features, tensor=tensor, offset=offset)


def _turned(expr: Expr, offset: Expr) -> Expr:
    """An offset, turned; its sign stays outside, where a bias that is taken off is seen to be."""
    if offset.op == "neg":
        return node("neg", (_turned(expr, offset.args[0]),), offset.shape)
    return node("rotate_half", (offset,), offset.shape, expr.attrs)


def eye(go: Applier, expr: Expr, v: Vector) -> Vector:
    """I x = x."""
    return v


def drop(go: Applier, expr: Expr, v: Vector) -> Vector:
    """Dropout of x."""
    probability = float(go.facts(expr).number(cast(Scalar, expr.attr("p"))))
    return go.drop(probability, str(dict(expr.attrs).get("together", "tokens")), v)


def householder(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    """The reflection x - 2 (x · u) u, for u of length 1."""

    def reflect(x: Tensor) -> Tensor:
        u = unit(go.value(expr.args[0]))
        return x - 2 * torch.matmul(x, u).unsqueeze(-1) * u

    return go.mapped(expr, v, reflect)
