"""Factors: their product is the matrix they are of, in no more columns than its form asks for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from surgery.algebra.axes import evaluate, size
from surgery.algebra.expr import IN, OUT, WEIGHT, Expr, parameter
from surgery.algebra.factors import change, rank_of
from surgery.algebra.interpret import Domain, Evaluator
from surgery.algebra.rules import make

NAMES = {"in": 42, "out": 30, "channels": 42}

A, B = parameter("A", (size(3), IN)), parameter("B", (OUT, size(3)))
C, D = parameter("C", (size(2), IN)), parameter("D", (OUT, size(2)))
AT, BT = make("transpose", A), make("transpose", B)
K = parameter("K", (size(5), size(7)))  # of rank 5 at most
P, Q = parameter("P", (OUT / 5, size(2))), parameter("Q", (size(2), IN / 7))
E, F = parameter("E", (size(3), size(1))), parameter("F", (size(1), IN))
V, N, U = parameter("V", (OUT,)), parameter("N", (IN,)), parameter("U", (IN, size(4)))
X = parameter("X", (OUT, IN))
S = parameter("S", ())


def product(left: Expr = B, right: Expr = A) -> Expr:
    return make("matmul", left, right)


TURN = make("sub", make("eye", size=OUT), product(D, make("transpose", D)))


def added(change: Expr) -> Expr:
    return make("add", WEIGHT, change)


KNOWN: dict[str, tuple[Expr, int]] = {
    "product": (added(product()), 3),
    "sum": (added(make("add", product(), product(D, C))), 5),
    "difference": (make("sub", added(product()), product(D, C)), 5),
    "negative": (make("sub", WEIGHT, product()), 3),
    "the other side": (make("add", product(), WEIGHT), 3),
    "number": (added(make("mul", S, product())), 3),
    "quotient": (added(make("div", product(), S)), 3),
    "elementwise": (added(make("mul", product(), product(D, C))), 6),
    "rows": (added(make("scale_rows", V, product())), 3),
    "columns": (added(make("scale_cols", N, product())), 3),
    "tile": (added(make("tile", B, columns=IN)), 3),
    "transposed": (
        added(make("transpose", product(make("transpose", A), make("transpose", B)))),
        3,
    ),
    "kron": (added(make("kron", product(P, Q), K)), 10),
    "reflections": (product(WEIGHT, make("householder", U)), 4),
    "reflected product": (product(added(product()), make("householder", U)), 7),
    "both sides": (product(product(TURN, WEIGHT), make("householder", U)), 6),
    "nothing": (WEIGHT, 0),
    "constant": (added(make("stop_gradient", product())), 3),
}

UNKNOWN: dict[str, Expr] = {
    "gain": make("scale_rows", V, WEIGHT),
    "any matrix": added(X),
    "of the weight": added(make("mul", WEIGHT, product())),
    "a number everywhere": make("add", WEIGHT, S),
    "another matrix": product(),
}


def evaluator() -> Evaluator:
    generator = torch.Generator().manual_seed(0)
    values: dict[Expr, Tensor] = {}

    def leaf(expr: Expr) -> Tensor:
        if expr not in values:
            shape = [int(evaluate(n, NAMES)) for n in expr.shape]
            values[expr] = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values[expr]

    return Evaluator(Domain(NAMES, leaf, lambda: torch.zeros((), dtype=torch.float64)))


@pytest.mark.parametrize("name", KNOWN)
def test_factors_multiply_to_the_change(name: str) -> None:
    weight, rank = KNOWN[name]
    found = change(weight, NAMES)
    assert found is not None
    assert rank_of(found, NAMES) == rank
    values = evaluator()
    total = torch.zeros(30, 42, dtype=torch.float64)
    for left, right in found:
        total = total + values.value(left) @ values.value(right)
    wanted = values.value(weight) - values.value(WEIGHT)
    assert torch.allclose(total, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_has_no_narrow_place_has_no_factors(name: str) -> None:
    assert change(UNKNOWN[name], NAMES) is None


def test_a_product_through_the_narrowest_place_is_chosen() -> None:
    found = change(added(product(B, product(E, F))), NAMES)
    assert found is not None
    assert rank_of(found, NAMES) == 1
