"""The arithmetic an expression takes at a site, and the cheapest way to write it.

Costs are multiplications, for a nominal number of tokens; they order alternatives and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import cast

from surgery.algebra.axes import Scalar, evaluate
from surgery.algebra.expr import TOKENS as ACTIVATION
from surgery.algebra.expr import Expr
from surgery.algebra.ops import OPS, through
from surgery.algebra.rules import alternatives, rebuild

TOKENS = 256  # between one step of a decoder and a training batch

Cost = Callable[[Expr], int]


def cheapest(root: Expr, cost: Cost) -> Expr:
    """`root` rewritten, bottom up, as long as an alternative costs strictly less."""
    memo: dict[Expr, Expr] = {}

    def visit(expr: Expr) -> Expr:
        if expr not in memo:
            within = rebuild(expr, tuple(map(visit, expr.args)))
            # An argument that is cheaper to apply may be dearer as the value that is needed here.
            memo[expr] = _descend(within if cost(within) <= cost(expr) else expr, cost, visit)
        return memo[expr]

    return visit(root)


def _descend(expr: Expr, cost: Cost, visit: Callable[[Expr], Expr]) -> Expr:
    best = min((expr, *alternatives(expr)), key=cost)  # min keeps the first of equals
    while cost(best) < cost(expr):
        within = rebuild(best, tuple(map(visit, best.args)))
        expr = min((best, within), key=cost)
        best = min((expr, *alternatives(expr)), key=cost)
    return expr


def value_cost(names: Mapping[str, int | float]) -> Cost:
    """The cost of building the dense value, at a site of these sizes."""
    memo: dict[Expr, int] = {}

    def cost(expr: Expr) -> int:
        if not expr.args:
            return 0
        if expr not in memo:
            memo[expr] = own_work(expr, names) + sum(map(cost, expr.args))
        return memo[expr]

    return cost


def own_work(expr: Expr, names: Mapping[str, int | float]) -> int:
    """The cost of an operator alone, whose arguments are there."""
    op = OPS[expr.op]
    work = op.work(*_sizes(expr, names))
    return work * int(evaluate(cast(Scalar, expr.attr(op.times)), names)) if op.times else work


def apply_cost(names: Mapping[str, int | float], tokens: int = TOKENS) -> Cost:
    """The cost of applying a matrix to `tokens` vectors, at a site of these sizes."""
    dense = value_cost(names)
    memo: dict[Expr, int] = {}

    def applied(expr: Expr) -> int:
        shape, arguments = _sizes(expr, names)
        applied_too = through(expr)
        if applied_too is None:
            return tokens * prod(shape) + dense(expr)
        below = (cost(a) if i in applied_too else dense(a) for i, a in enumerate(expr.args))
        return tokens * OPS[expr.op].apply_work(shape, arguments) + sum(below)

    def cost(expr: Expr) -> int:
        if len(expr.shape) != 2 or expr.is_activation:
            return dense(expr)
        if expr not in memo:
            memo[expr] = applied(expr)
        return memo[expr]

    return cost


def _sizes(
    expr: Expr, names: Mapping[str, int | float]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    return numbers(expr, names), tuple(numbers(a, names) for a in expr.args)


def numbers(expr: Expr, names: Mapping[str, int | float]) -> tuple[int, ...]:
    """The shape in elements; however many tokens there are count as one."""
    return tuple(1 if s == ACTIVATION else int(evaluate(s, names)) for s in expr.shape)
