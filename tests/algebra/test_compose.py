"""Equations one after the other: the names of parameters, and laws that need no model."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import called
from torch import Tensor

from surgery.algebra.axes import evaluate
from surgery.algebra.compose import Unchained, chained, composed, renamed
from surgery.algebra.derive import derive, parameters_in
from surgery.algebra.elaborate import instantiate
from surgery.algebra.equations import Equations
from surgery.algebra.expr import Expr, walk
from surgery.algebra.interpret import Domain, Evaluator
from surgery.language import syntax as ast
from surgery.language.parse import parse

CALLS = {
    "lora": "lora(r=2, alpha=3, dropout=0.5)",
    "dora": "dora(r=2)",
    "bone": "bone(r=5)",
    "ia3": "ia3()",
    "oft": "oft(block_size=7, use_cayley_neumann=false)",
    "vera": "vera(r=3)",
}
FACTS = (("has_bias", True), ("kind", "linear"))
SIZES = {"in": 14, "out": 11, "channels": 14}

calls = st.sampled_from(sorted(CALLS))


@cache
def of(name: str) -> Equations:
    method, arguments = called(CALLS[name])
    return instantiate(method, arguments, facts=FACTS)


def own(body: str) -> Equations:
    (method,) = parse(f"method own() on matrix {{ {body} }}").statements
    assert isinstance(method, ast.Method)
    return instantiate(method, ())


def value(expr: Expr) -> Tensor:
    """The value of an expression, every leaf of which is drawn by its name."""

    def leaf(e: Expr) -> Tensor:
        name = e.text("name") if e.op == "parameter" else e.op
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        shape = tuple(int(evaluate(s, SIZES)) for s in e.shape)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    anchor = torch.zeros((), dtype=torch.float64)
    return Evaluator(Domain(SIZES, leaf, lambda: anchor)).value(expr)


def merged(equations: Equations) -> tuple[Tensor, Tensor]:
    still = derive(equations, True).still
    assert still is not None
    return value(still.weight), value(still.bias)


@given(st.lists(calls, min_size=1, max_size=4))
def test_names_are_distinct_and_numbered(names: list[str]) -> None:
    links = tuple(map(of, names))
    whole = composed(links)
    expected = [
        (p.name if i == 0 else f"{p.name}_{i + 1}", p.name, i)
        for i, link in enumerate(links)
        for p in link.parameters
    ]
    assert [(p.name, p.declared_name, p.link) for p in whole.parameters] == expected
    assert len({name for name, *_ in expected}) == len(expected)
    targets = (whole.weight, whole.bias, whole.input, whole.output)
    read = {name for e in targets if e is not None for name in parameters_in(e)}
    assert read == {name for name, *_ in expected}
    assert [p.trained for p in whole.parameters] == [p.trained for e in links for p in e.parameters]


@given(calls, calls, calls)
def test_how_a_chain_is_bracketed_makes_no_difference(one: str, two: str, three: str) -> None:
    a, b, c = of(one), renamed(of(two), "_b"), renamed(of(three), "_c")
    left, right = chained(chained(a, b), c), chained(a, chained(b, c))
    for here, there in zip(merged(left), merged(right), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9)


def test_one_method_is_a_chain() -> None:
    for name in CALLS:
        assert composed((of(name),)) == of(name)


@pytest.mark.parametrize(("first", "second"), [*product(CALLS, CALLS)])
def test_a_beginning_reads_only_what_began_before_it(first: str, second: str) -> None:
    began: set[str] = set()
    for p in composed((of(first), of(second))).parameters:
        if isinstance(p.beginning, Expr):
            assert parameters_in(p.beginning) <= began
            assert not any(e.op == "drop" for e in walk(p.beginning))
        began.add(p.name)


def test_renaming_keeps_everything_else() -> None:
    equations = of("dora")
    again = renamed(equations, "_x")
    assert [p.name for p in again.parameters] == ["A_x", "B_x", "m_x"]
    assert [p.shape for p in again.parameters] == [p.shape for p in equations.parameters]
    assert [p.begins for p in again.parameters] == [p.begins for p in equations.parameters]
    assert [p.declared for p in renamed(again, "_y").parameters] == ["A", "B", "m"]


BENT = own("y' = tanh(y)")


@pytest.mark.parametrize("name", sorted({*CALLS} - {"ia3"}))
def test_what_is_not_affine_has_no_weight_to_read(name: str) -> None:
    with pytest.raises(Unchained, match="not linear in x") as caught:
        composed((of("ia3"), BENT, of(name)))
    assert caught.value.link == 2
    assert composed((BENT, of("ia3"))).output is not None


def test_numbers_made_of_the_weight_see_no_dropout_and_its_matrix_does() -> None:
    drops = own("train D[out, in] = 0  W' = W + D @ drop(0.5)")
    length = own("train m[out] = 1  W' = (m / rownorm(W)) * rows(W)")
    weight = composed((drops, length)).weight
    assert weight is not None
    assert weight.op == "scale_rows"
    assert not any(e.op == "drop" for e in walk(weight.args[0]))
    assert any(e.op == "drop" for e in walk(weight.args[1]))
    with pytest.raises(Unchained, match=r"drop\(p\)"):
        composed((drops, own("W' = W + tanh(W)")))
    with pytest.raises(Unchained, match="something of b"):
        composed((own("y' = y @ drop(0.5)"), of("lora")))


def test_a_chain_has_not_more_links_than_can_be_composed_soon() -> None:
    with pytest.raises(Unchained, match="at most 16 methods"):
        composed((of("dora"),) * 17)
