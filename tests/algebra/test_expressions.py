"""Laws of random expressions: what rewrites keep, what applying gives, what undoing gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, cast

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from surgery.algebra.applying import Vector
from surgery.algebra.axes import Size, size
from surgery.algebra.cost import apply_cost, cheapest, numbers, value_cost
from surgery.algebra.derive import Derived, derive, invert
from surgery.algebra.equations import Equations
from surgery.algebra.expr import (
    BIAS,
    IN,
    INPUT,
    OUT,
    OUTPUT,
    WEIGHT,
    Attribute,
    Expr,
    Shape,
    depends_on,
    node,
    number,
    parameter,
    render,
    walk,
    zeros,
)
from surgery.algebra.interpret import Domain, Evaluator, Interpreter, Unlowerable
from surgery.algebra.ops import OPS
from surgery.algebra.rules import alternatives, make, substitute

SITE = {"in": 6, "out": 15, "channels": 6}
R = size(7)
VECTORS = (IN, OUT, R)

# ------------------------------------------------------------------------------- expressions


def raw(op: str, *args: Expr, **attrs: Attribute) -> Expr:
    """An expression as it is written: its shape checked, nothing simplified."""
    return node(op, args, OPS[op].shape(args, attrs), tuple(attrs.items()))


def remade(root: Expr) -> Expr:
    """The same, simplified at every step."""
    memo: dict[Expr, Expr] = {}
    for expr in walk(root):
        args = tuple(memo[a] for a in expr.args)
        memo[expr] = make(expr.op, *args, **dict(expr.attrs)) if args else expr
    return memo[root]


def leaf(expr: Expr) -> Tensor:
    shape = numbers(expr, SITE)
    name = expr.text("name") if expr.op in ("parameter", "witness") else expr.op
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 31 * sum(shape))
    return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.25


def domain(leaves: Callable[[Expr], Tensor] = leaf) -> Domain:
    return Domain(SITE, leaves, lambda: torch.zeros((), dtype=torch.float64))


def plain_value(root: Expr) -> Tensor:
    """The value, operator by operator, with no rewriting at all."""
    facts = Evaluator(domain())
    values: dict[Expr, Any] = {}
    for expr in walk(root):
        if expr.op in ("parameter", "weight"):
            values[expr] = leaf(expr)
        elif expr.op == "number":
            constant = cast(Size, expr.attr("value")).number
            assert constant is not None
            values[expr] = torch.tensor(float(constant), dtype=torch.float64)
        else:
            row = OPS[expr.op]
            values[expr] = row.value(facts.facts(expr), *(values[a] for a in expr.args))
    return values[root]


def same(a: Tensor, b: Tensor) -> None:
    scale = max(1.0, float(b.abs().max()) if b.numel() else 1.0)
    torch.testing.assert_close(a / scale, b / scale, rtol=1e-9, atol=1e-9)


class Maker:
    """Random expressions, each operator about as often as any other."""

    def __init__(self, random: Random) -> None:
        self.random = random

    def vector(self, length: Size) -> Expr:
        rows = parameter(self.name(), (length, R))
        own = parameter(self.name(), (length,))
        return self.random.choice([own, own, own, raw("rownorm", rows), zeros((length,))])

    def scalar(self) -> Expr:
        own = parameter(self.name(), (self.random.choice(VECTORS),))
        mean = raw("reduce", own, pattern="n -> ", by="mean", axes=())
        return self.random.choice([mean, mean, *map(number, (-1, 0, 1, 2, size(1) / 3))])

    def name(self) -> str:
        return self.random.choice("ABC")

    def leaf(self, shape: Shape) -> Expr:
        m, n = shape
        found = [parameter(self.name(), shape), parameter(self.name(), shape), zeros(shape)]
        found.append(raw("tile", parameter(self.name(), (m, size(4))), columns=n))
        if m == n:
            found += self.square_leaves(m)
        if shape == WEIGHT.shape:
            pair = parameter("K", (size(3), size(2))), parameter("L", (OUT / 3, IN / 2))
            blocks = parameter("S", (size(3), OUT / 3, IN / 3))
            found += [WEIGHT, WEIGHT, raw("blockdiag", blocks), raw("kron", *pair)]
        return self.random.choice(found)

    def square_leaves(self, n: Size) -> list[Expr]:
        turn = raw("cayley", skew(self.name(), n))
        flip = raw("householder", parameter(self.name(), (n,)))
        scaled = raw("diag", parameter(self.name(), (n,)))
        return [turn, flip, scaled, raw("inverse", scaled), raw("eye", size=n)]

    def matrix(self, shape: Shape, depth: int) -> Expr:
        if depth == 0:
            return self.leaf(shape)
        below = depth - 1
        m, n = shape
        form = self.random.choice(_FORMS)
        match form:
            case "matmul":
                k = self.random.choice(VECTORS)
                return raw(form, self.matrix((m, k), below), self.matrix((k, n), below))
            case "factored":
                return self.factored(shape)
            case "add" | "sub" | "mul":
                return raw(form, self.matrix(shape, below), self.matrix(shape, below))
            case "transpose":
                return raw(form, self.matrix((n, m), below))
            case "div" | "scalar" | "shifted" | "scale_rows" | "scale_cols":
                return self.beside(form, shape, self.matrix(shape, below))
            case _:
                return raw(form, self.matrix(shape, below))

    def beside(self, form: str, shape: Shape, matrix: Expr) -> Expr:
        """A matrix combined with a number or a vector."""
        match form:
            case "shifted":
                pair = [self.scalar(), matrix]
                self.random.shuffle(pair)
                return raw(self.random.choice(["add", "sub"]), *pair)
            case "div":
                return raw(form, matrix, self.nonzero())
            case "scalar":
                return raw("mul", self.scalar(), matrix)
            case _:
                return raw(form, self.vector(shape[form == "scale_cols"]), matrix)

    def factored(self, shape: Shape) -> Expr:
        """Two products that share a factor."""
        m, n = shape
        k = self.random.choice(VECTORS)
        left, right = self.leaf((m, k)), self.leaf((k, n))
        other = raw("matmul", left, self.leaf((k, n)))
        if self.random.random() < 0.5:
            other = raw("matmul", self.leaf((m, k)), right)
        return raw(self.random.choice(["add", "sub"]), raw("matmul", left, right), other)

    def nonzero(self) -> Expr:
        found = self.scalar()
        return number(2) if found is number(0) else found

    def activation(self, last: Size, depth: int) -> Expr:
        """An activation [tokens, last] that is affine in x."""
        if depth == 0:
            own = [INPUT] if last == IN else [OUTPUT] if last == OUT else []
            return self.random.choice([*own, make("matmul", INPUT, self.matrix((IN, last), 1))])
        below = self.activation(last, depth - 1)
        match self.random.choice(["sum", "sum", "scalar", "scale", "neg", "div", "matmul"]):
            case "sum":
                op = self.random.choice(["add", "sub"])
                return make(op, below, self.activation(last, depth - 1))
            case "scalar":
                pair = [below, self.scalar()]
                self.random.shuffle(pair)
                return make(self.random.choice(["add", "sub", "mul"]), *pair)
            case "scale":
                return make("scale", self.vector(last), below)
            case "div":
                return make("div", below, self.nonzero())
            case "matmul":
                k = self.random.choice(VECTORS)
                inner = self.activation(k, depth - 1)
                return make("matmul", inner, remade(self.matrix((k, last), 1)))
            case _:
                return make("neg", below)


_FORMS = (
    *("matmul", "matmul", "factored", "add", "sub", "mul", "scalar", "scalar", "shifted", "div"),
    *("scale_rows", "scale_cols", "transpose", "neg", "tanh", "stop_gradient"),
)


def skew(name: str, n: Size) -> Expr:
    return raw("skew", parameter(name, (n * (n - 1) / 2,)), size=n)


makers = st.integers(0, 2**32).map(lambda seed: Maker(Random(seed)))
any_matrix = makers.map(lambda m: m.matrix((m.random.choice(VECTORS), m.random.choice(VECTORS)), 3))
weights = makers.map(lambda m: m.matrix(WEIGHT.shape, 3))
outputs = makers.map(lambda m: m.activation(OUT, 3))


# --------------------------------------------------------------------------------- rewriting


@given(any_matrix)
def test_simplifying_keeps_value_and_shape_and_is_done_at_once(expr: Expr) -> None:
    simple = remade(expr)
    assert simple.shape == expr.shape
    assert remade(simple) is simple
    same(Evaluator(domain()).value(simple), plain_value(expr))


@given(any_matrix)
def test_shapes_are_those_of_the_values(expr: Expr) -> None:
    for part in walk(expr):
        if part.op != "number":
            assert numbers(part, SITE) == tuple(plain_value(part).shape)


@given(any_matrix)
def test_every_alternative_has_the_same_value(expr: Expr) -> None:
    for part in walk(remade(expr)):
        for other in alternatives(part):
            assert other.shape == part.shape
            same(plain_value(other), plain_value(part))


@given(any_matrix, st.booleans())
def test_the_cheapest_costs_no_more_and_is_the_same(expr: Expr, applied: bool) -> None:
    cost = apply_cost(SITE) if applied else value_cost(SITE)
    simple = remade(expr)
    best = cheapest(simple, cost)
    assert cost(best) <= cost(simple)
    assert best.shape == simple.shape
    same(plain_value(best), plain_value(simple))


def test_a_chain_is_multiplied_in_the_cheaper_order() -> None:
    tall, flat = parameter("A", (OUT, size(2))), parameter("B", (size(2), IN))
    x = parameter("C", (IN, size(1)))
    left = make("matmul", make("matmul", tall, flat), x)
    best = cheapest(left, value_cost(SITE))
    assert best is make("matmul", tall, make("matmul", flat, x))


def test_shared_parts_are_rewritten_once() -> None:
    """Doubled at each level, a hundred levels would be 2**100 steps."""
    square = parameter("A", (R, R))
    for _ in range(100):
        square = make("matmul", square, square)
    assert make("transpose", square).shape == (R, R)
    assert len(render(square)) < 1000
    assert cheapest(square, value_cost(SITE)) is square
    small = substitute(square, {parameter("A", (R, R)): make("diag", zeros((R,)))})
    assert Evaluator(domain()).value(small).shape == (7, 7)
    assert sum(1 for _ in walk(make("inverse", square))) <= 202


def test_equal_expressions_are_the_same_object() -> None:
    assert make("add", WEIGHT, parameter("A", (OUT, IN))) is make(
        "add", WEIGHT, parameter("A", (OUT, IN))
    )
    assert substitute(make("neg", WEIGHT), {WEIGHT: zeros(WEIGHT.shape)}) is zeros(WEIGHT.shape)


# ---------------------------------------------------------------------------------- applying


@dataclass
class Port:
    """A site whose layer is W x + b, read as features, group by group, or as indices."""

    form: Literal["features", "patches", "indices"] = "features"
    groups: int = 1
    bias: bool = False

    def base(self, x: Tensor, changed: bool) -> Tensor:
        y = self.apply(leaf(WEIGHT), x, whole=True)
        return y + leaf(BIAS) if self.bias else y

    def apply(self, matrix: Tensor, x: Tensor, whole: bool) -> Tensor:
        if self.form == "indices":
            return F.embedding(x, matrix.T)
        if self.groups == 1:
            return F.linear(x, matrix)
        if not whole:
            return F.linear(cast(Tensor, x.unflatten(-1, (self.groups, -1))), matrix)
        return grouped(matrix, x, self.groups)

    def features(self, x: Tensor) -> Tensor:
        assert self.form == "features"
        return x

    def widen(self, y: Tensor) -> Tensor:
        return y

    def scale_channels(self, x: Tensor, factors: Tensor) -> Tensor:
        return x * factors.repeat(self.groups)

    def training(self) -> bool:
        return False


def grouped(matrix: Tensor, x: Tensor, groups: int) -> Tensor:
    """Each group's rows of a matrix [out, k] on its own part of x [..., groups * k]."""
    parts = x.chunk(groups, -1)
    rows = matrix.chunk(groups, 0)
    return torch.cat([F.linear(p, m) for p, m in zip(parts, rows, strict=True)], -1)


def run(weight: Expr, port: Port, x: Tensor, bias: Expr = BIAS) -> Tensor:
    equations = Equations((), weight=weight, bias=bias)
    return Interpreter(domain(), port, port.bias).run(derive(equations, port.bias), x)


@given(any_matrix)
def test_applying_is_multiplying_by_the_value(expr: Expr) -> None:
    expr = remade(expr)
    x = torch.rand(2, 3, numbers(expr, SITE)[1], dtype=torch.float64)
    go = Interpreter(domain(), Port(), has_bias=False)
    v = Vector(x)
    found = go.apply(expr, v)
    assert found.offset is None
    same(found.tensor, x @ plain_value(expr).T)


@given(weights, st.booleans())
def test_a_site_computes_its_merged_weight(weight: Expr, bias: bool) -> None:
    weight = remade(weight)
    x = torch.rand(2, 3, 6, dtype=torch.float64)
    expected = x @ plain_value(weight).T + (leaf(BIAS) if bias else 0)
    same(run(weight, Port(bias=bias), x), expected)


@given(weights, st.booleans())
def test_so_does_a_site_that_looks_up_rows(weight: Expr, bias: bool) -> None:
    weight = remade(weight)
    x = torch.tensor([[0, 5, 2], [4, 4, 1]])
    expected = plain_value(weight).T[x] + (leaf(BIAS) if bias else 0)
    same(run(weight, Port("indices", bias=bias), x), expected)


@given(weights, st.booleans())
def test_so_does_a_site_that_reads_group_by_group(weight: Expr, bias: bool) -> None:
    weight = remade(weight)
    x = torch.rand(2, 5, 3 * 6, dtype=torch.float64)
    expected = grouped(plain_value(weight), x, 3) + (leaf(BIAS) if bias else 0)
    same(run(weight, Port("patches", groups=3, bias=bias), x), expected)


def test_no_matrix_mixes_outputs_that_are_made_group_by_group() -> None:
    derived = derive(
        Equations((), output=make("matmul", OUTPUT, parameter("A", (OUT, OUT)))), False
    )
    x = torch.rand(2, 5, 18, dtype=torch.float64)
    with pytest.raises(Unlowerable, match="group by group"):
        Interpreter(domain(), Port("patches", groups=3), has_bias=False).run(derived, x)


def test_a_deep_equation_runs_far_down_the_stack() -> None:
    weight, other = WEIGHT, parameter("A", WEIGHT.shape)
    for _ in range(24):
        weight = make("tanh", make("add", make("mul", number(2), weight), other))
        weight = make("scale_rows", parameter("V", (OUT,)), weight)
    assert weight.depth == 96
    x = torch.rand(2, 6, dtype=torch.float64)

    def down(levels: int) -> Tensor:
        return down(levels - 1) if levels else run(weight, Port(bias=True), x)

    same(down(200), F.linear(x, plain_value(weight), leaf(BIAS)))


def test_a_matrix_that_is_squared_too_often_is_refused_and_not_run() -> None:
    square = parameter("A", (OUT, OUT))
    for _ in range(60):
        square = make("matmul", square, square)
    x = torch.rand(2, 6, dtype=torch.float64)
    with pytest.raises(Unlowerable, match="steps"):
        run(make("matmul", square, WEIGHT), Port(), x)


# --------------------------------------------------------------------- equations of activations


@given(outputs, st.booleans())
def test_an_affine_activation_is_a_merged_weight_and_bias(output: Expr, bias: bool) -> None:
    derived = derive(Equations((), output=output), bias)
    assume(output is not OUTPUT)
    assert derived.merged is not None, derived.reason
    x = torch.rand(2, 3, 6, dtype=torch.float64)
    values = Evaluator(domain())
    merged = F.linear(x, dense(values, derived.merged.weight), dense(values, derived.merged.bias))
    same(by_hand(output, x, bias), merged)
    same(Interpreter(domain(), Port(bias=bias), bias).run(derived, x), merged)
    same(activation_path(derived, x, bias), merged)


def dense(values: Evaluator, expr: Expr) -> Tensor:
    return values.value(expr).expand(numbers(expr, SITE))


def activation_path(derived: Derived, x: Tensor, bias: bool) -> Tensor:
    """The output as it is computed where the equation is not affine."""
    unmerged = Derived(derived.equations, None, None, derived.inverse)
    return Interpreter(domain(), Port(bias=bias), bias).run(unmerged, x)


_BY_HAND: dict[str, Callable[..., Tensor]] = {
    "scale": torch.mul,
    "mul": torch.mul,
    "matmul": torch.matmul,
    "add": torch.add,
    "sub": torch.sub,
    "div": torch.div,
    "neg": torch.neg,
}


def by_hand(expr: Expr, x: Tensor, bias: bool) -> Tensor:
    if expr is INPUT:
        return x
    if expr is OUTPUT:
        return Port(bias=bias).base(x, changed=False)
    if not expr.is_activation:
        return plain_value(expr)
    return _BY_HAND[expr.op](*(by_hand(e, x, bias) for e in expr.args))


def test_what_is_not_affine_has_no_merge_and_a_reason() -> None:
    gate = make("sigmoid", make("matmul", INPUT, parameter("A", (IN, OUT))))
    derived = derive(Equations((), output=make("mul", OUTPUT, gate)), has_bias=True)
    assert derived.merged is None
    assert derived.merge_class == "none"
    assert "not linear in x" in derived.reason


# ----------------------------------------------------------------------------------- inverses


@dataclass(frozen=True)
class Step:
    """One invertible operator around W."""

    name: str
    wrap: Callable[[Expr], Expr]


def _normed(w: Expr) -> Expr:
    return make("scale_rows", make("div", parameter("N", (OUT,)), make("rownorm", w)), w)


STEPS = (
    Step("add", lambda w: make("add", w, parameter("A", w.shape))),
    Step("from", lambda w: make("sub", parameter("B", w.shape), w)),
    Step("neg", lambda w: make("neg", w)),
    Step("times", lambda w: make("mul", parameter("C", w.shape), w)),
    Step("scalar", lambda w: make("mul", number(3), w)),
    Step("divided", lambda w: make("div", w, parameter("C", w.shape))),
    Step("rows", lambda w: make("scale_rows", parameter("V", (OUT,)), w)),
    Step("columns", lambda w: make("scale_cols", parameter("U", (IN,)), w)),
    Step("turned", lambda w: make("matmul", w, make("cayley", skew("Q", IN)))),
    Step("reflected", lambda w: make("matmul", make("householder", parameter("V", (OUT,))), w)),
    Step("normed", _normed),
    Step(
        "blocks",
        lambda w: make(
            "rearrange",
            make(
                "matmul",
                make("rearrange", w, pattern="(n a) c -> a (n c)", axes=(("n", size(5)),)),
                make("householder", parameter("H", (size(5) * IN,))),
            ),
            pattern="a (n c) -> (n a) c",
            axes=(("n", size(5)),),
        ),
    ),
)


@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=4))
def test_the_inverse_of_an_equation_gives_the_weight_back(steps: list[Step]) -> None:
    weight = WEIGHT
    for step in steps:
        weight = step.wrap(weight)
    found = invert(weight)
    assert found.weight is not None
    assert not depends_on(found.weight, WEIGHT)
    assert all(len(kept.shape) == 1 for _, kept in found.witnesses)
    kept = {name: Evaluator(domain()).value(expr) for name, expr in found.witnesses}
    merged = Evaluator(domain()).value(weight)

    def known(expr: Expr) -> Tensor:
        if expr.op == "merged":
            return merged
        return kept[expr.text("name")] if expr.op == "witness" else leaf(expr)

    same(Evaluator(domain(known)).value(found.weight), leaf(WEIGHT))


@pytest.mark.parametrize(
    "weight",
    [
        parameter("A", WEIGHT.shape),
        make("tanh", WEIGHT),
        make("add", WEIGHT, make("mul", parameter("A", WEIGHT.shape), WEIGHT)),
        make(
            "matmul",
            make("add", make("eye", size=OUT), parameter("A", (OUT, OUT))),
            zeros((OUT, IN)),
        ),
    ],
)
def test_where_there_is_no_way_back_there_is_none(weight: Expr) -> None:
    assert invert(weight).weight is None
