"""Undoing operators: `op(…, a, …) = target` solved for the argument `a`.

A rule gives None where the argument cannot be told from the target.
"""

from __future__ import annotations

from collections.abc import Callable

from surgery.algebra import shapes
from surgery.algebra.expr import Expr, number

Build = Callable[..., Expr]

_ONE = number(1)


def add(build: Build, expr: Expr, index: int, target: Expr) -> Expr:
    """Solved: a = target - b."""
    return build("sub", target, expr.args[1 - index])


def sub(build: Build, expr: Expr, index: int, target: Expr) -> Expr:
    """Solved: a = target + b, or b = a - target."""
    if index == 0:
        return build("add", target, expr.args[1])
    return build("sub", expr.args[0], target)


def neg(build: Build, expr: Expr, index: int, target: Expr) -> Expr:
    """Solved: a = -target."""
    return build("neg", target)


def mul(build: Build, expr: Expr, index: int, target: Expr) -> Expr:
    """Solved: a = target / b."""
    return build("div", target, expr.args[1 - index])


def div(build: Build, expr: Expr, index: int, target: Expr) -> Expr:
    """Solved: a = target * b, or b = a / target."""
    if index == 0:
        return build("mul", target, expr.args[1])
    return build("div", expr.args[0], target)


def matmul(build: Build, expr: Expr, index: int, target: Expr) -> Expr | None:
    """Solved: a = target @ b⁻¹, or b = a⁻¹ @ target, where the other is square."""
    other = expr.args[1 - index]
    if len(other.shape) < 2 or other.shape[-1] != other.shape[-2]:
        return None
    inverse = build("inverse", other)
    return build("matmul", target, inverse) if index == 0 else build("matmul", inverse, target)


def transpose(build: Build, expr: Expr, index: int, target: Expr) -> Expr:
    """Solved: a = targetᵀ."""
    return build("transpose", target)


def scale(build: Build, expr: Expr, index: int, target: Expr) -> Expr | None:
    """The matrix, by the reciprocal factors; not the factors."""
    if index == 0:
        return None
    reciprocal = build("div", _ONE, expr.args[0])
    return build(expr.op, reciprocal, target)


def rotate_half(build: Build, expr: Expr, index: int, target: Expr) -> Expr:
    """Solved: a = -rotate_half(target), since two quarter turns are a half turn."""
    return build("neg", build("rotate_half", target, size=expr.attr("size")))


def transparent(build: Build, expr: Expr, index: int, target: Expr) -> Expr:
    """The argument has the value of the result."""
    return target


def rearrange(build: Build, expr: Expr, index: int, target: Expr) -> Expr:
    """The pattern, read backwards."""
    before, _, after = expr.text("pattern").partition("->")
    known = tuple(shapes.axis_sizes(expr.args[0].shape, dict(expr.attrs)).items())
    return build("rearrange", target, pattern=f"{after.strip()} -> {before.strip()}", axes=known)
