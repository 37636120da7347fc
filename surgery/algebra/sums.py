"""Sums: what is left of one without a summand, and whether it comes to nothing."""

from __future__ import annotations

from surgery.algebra.axes import Size, size
from surgery.algebra.expr import Expr
from surgery.algebra.rules import constant, is_zero, make


def difference(changed: Expr, base: Expr) -> Expr | None:
    """`changed - base`, by leaving the base out where it is a summand; None for no difference.

    Of activations it may be a vector, which is the same for each token.
    """
    if changed is base or (is_zero(base) and is_zero(changed)):
        return None
    if is_zero(base):
        return changed
    if not _has_summand(changed, base):
        return make("sub", changed, base)  # a - b
    left, right = changed.args
    if changed.op == "shift":
        rest = difference(right, base)
        # (y + v) - y = v, for each token
        return left if rest is None else make("shift", left, rest)
    if changed.op == "add" and not _has_summand(left, base):
        left, right = right, left
    rest = difference(left, base)
    if rest is not None:
        return make(changed.op, rest, right)  # (a + c) - b = (a - b) + c
    return right if changed.op == "add" else make("neg", right)  # (b - c) - b = -c


def vanishes(root: Expr) -> bool:
    """Whether a sum is zero once equal summands are taken together."""
    total: dict[Expr, Size] = {}
    stack = [(root, size(1))]
    while stack:
        expr, factor = stack.pop()
        match expr.op, expr.args:
            case "add", (left, right):
                stack += [(left, factor), (right, factor)]
            case "sub", (left, right):
                stack += [(left, factor), (right, -factor)]
            case "neg", (inner,):
                stack.append((inner, -factor))
            case "mul", (by, inner) if by.op == "number" and constant(by).number is not None:
                stack.append((inner, factor * constant(by)))
            case _ if not is_zero(expr):
                total[expr] = total.get(expr, size(0)) + factor
            case _:
                continue
    return not any(factor.terms for factor in total.values())


def _has_summand(expr: Expr, base: Expr) -> bool:
    """Whether an expression is a sum of the base and something of its shape."""
    if expr is base:
        return True
    if expr.op == "shift":
        return _has_summand(expr.args[1], base)
    if expr.op not in ("add", "sub") or any(a.shape != expr.shape for a in expr.args):
        return False
    sides = expr.args if expr.op == "add" else expr.args[:1]
    return any(_has_summand(side, base) for side in sides)
