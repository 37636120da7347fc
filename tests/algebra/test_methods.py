"""What is derived from the methods of the library: soundness, merge, and the way back."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from library_calls import CASES, SITE, derived, leaf
from support import called
from torch import Tensor
from torch.nn import functional as F

from surgery.algebra.cost import numbers
from surgery.algebra.definitions import check_definition
from surgery.algebra.derive import parameters_in
from surgery.algebra.elaborate import asks_sizes, instantiate
from surgery.algebra.expr import BIAS, CHANNELS, OUT, WEIGHT, Expr, depends_on, parameter
from surgery.algebra.interpret import Domain, Evaluator
from surgery.language import syntax as ast
from surgery.language.library import Library
from surgery.language.parse import parse
from surgery.supported import names_on

LIBRARY = Library.standard()
every_case = pytest.mark.parametrize(("call", "merge_class"), CASES)


def method(name: str) -> ast.Method:
    found = LIBRARY.method(name)
    assert found is not None
    return found


def values(known: Mapping[str, Tensor] | None = None) -> Evaluator:
    given = known or {}

    def found(expr: Expr) -> Tensor:
        name = expr.text("name") if expr.op == "witness" else expr.op
        return given[name] if name in given else leaf(expr)

    return Evaluator(Domain(SITE, found, lambda: torch.zeros((), dtype=torch.float64)))


def test_every_method_of_the_library_has_its_cases() -> None:
    assert set(names_on("matrix")) == {called(call)[0].name for call, _ in CASES}


@pytest.mark.parametrize("name", LIBRARY.names())
def test_every_method_of_the_library_is_sound(name: str) -> None:
    assert check_definition(method(name)) == ()


@every_case
def test_a_merge_is_taken_back_by_what_it_keeps(call: str, merge_class: str) -> None:
    found = derived(call)
    assert found.merge_class == merge_class
    assert found.still is not None
    if merge_class in ("exact", "snapshot"):
        return  # nothing is changed, or only the base itself leads back
    assert found.inverse.weight is not None
    assert not depends_on(found.inverse.weight, WEIGHT)
    merged = values().value(found.still.weight)
    kept = {n: values().value(e) for n, e in found.inverse.witnesses}
    back = values({"merged": merged, **kept}).value(found.inverse.weight)
    torch.testing.assert_close(back, leaf(WEIGHT), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(merged, leaf(WEIGHT))


@every_case
def test_every_parameter_has_a_part_in_the_merge(call: str, merge_class: str) -> None:
    del merge_class
    found = derived(call)
    assert found.merged is not None
    names = parameters_in(found.merged.weight) | parameters_in(found.merged.bias)
    assert names == {p.name for p in found.equations.parameters}


def test_a_norm_of_the_weight_is_the_only_thing_to_keep() -> None:
    found = derived("dora(r=5, alpha=3, dropout=0.1)")
    ((name, witness),) = found.inverse.witnesses
    assert name == "witness0"
    assert numbers(witness, SITE) == (20,)


def test_scaled_outputs_scale_the_bias_and_scaled_inputs_do_not() -> None:
    out = derived('ia3(side="out")').merged
    into = derived('ia3(side="in")').merged
    assert out is not None
    assert into is not None
    x = torch.randn(3, 12, dtype=torch.float64)
    w, b = leaf(WEIGHT), leaf(BIAS)
    factors = {"out": leaf(parameter("l", (OUT,))), "in": leaf(parameter("l", (CHANNELS,)))}
    by_out = F.linear(x, values().value(out.weight), values().value(out.bias))
    by_in = F.linear(x, values().value(into.weight), values().value(into.bias))
    torch.testing.assert_close(by_out, factors["out"] * F.linear(x, w, b))
    torch.testing.assert_close(by_in, F.linear(factors["in"] * x, w, b))


SIZED = """method sized() on matrix {
  train A[2, in] ~ uniform(low = 0 - 1 / in, high = 1 / in)
  train B[out, 2] = 0
  if in % 8 == 0 { W' = W + B @ A } else { W' = W - B @ A }
}
match /q/ apply sized()"""


def test_sizes_decide_conditions_and_draws_at_a_site() -> None:
    (sized, _) = parse(SIZED).statements
    assert isinstance(sized, ast.Method)
    assert asks_sizes(sized)
    assert not asks_sizes(method("lora"))
    sixteen = instantiate(sized, (), (("in", 16), ("out", 5), ("channels", 16)))
    twelve = instantiate(sized, (), (("in", 12), ("out", 5), ("channels", 12)))
    assert sixteen.weight is not None
    assert twelve.weight is not None
    assert (sixteen.weight.op, twelve.weight.op) == ("add", "sub")
    beginning = sixteen.parameters[0].beginning
    assert not isinstance(beginning, Expr)
    assert dict(beginning.arguments) == {"low": -1 / 16, "high": 1 / 16}
