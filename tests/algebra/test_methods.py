"""What is derived from the methods of the library: soundness, merge, and the way back."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from support import called
from torch import Tensor
from torch.nn import functional as F

from surgery.algebra.beginnings import draw
from surgery.algebra.cost import numbers
from surgery.algebra.definitions import check_definition
from surgery.algebra.derive import Derived, derive, parameters_in
from surgery.algebra.elaborate import asks_sizes, instantiate
from surgery.algebra.expr import BIAS, CHANNELS, OUT, WEIGHT, Expr, depends_on, parameter
from surgery.algebra.interpret import Domain, Evaluator
from surgery.language import syntax as ast
from surgery.language.library import Library
from surgery.language.parse import parse

SITE = {"in": 12, "out": 20, "channels": 12}
FACTS = (("has_bias", True), ("kind", "linear"))
LIBRARY = Library.standard()

# Calls that fit the site, and how a merge with them can be taken back.
CASES = (
    ("lora(r=5, alpha=3)", "algebraic"),
    ('lora(r=5, alpha=3, init_weights="gaussian")', "algebraic"),
    ("pissa(r=5, alpha=3, dropout=0.1)", "algebraic"),
    ("olora(r=5, alpha=3, rslora=true)", "algebraic"),
    ("lora(r=5, alpha=3, dropout=0.1, rslora=true, bias=true)", "algebraic"),
    (
        'lora(r=5, alpha=3, dropout=0.1, init_weights="gaussian", bias=true)',
        "algebraic",
    ),
    ("pvera(r=5, dropout=0.1)", "algebraic"),
    ('glora(r=3, config_C="vector", config_D_E="vector")', "algebraic"),
    ('glora(r=3, config_A_B="vector", config_C="vector", config_D_E="vector")', "algebraic"),
    ('glora(r=3, config_A_B="constant", config_C="vector", config_D_E="vector")', "algebraic"),
    ("mica(r=5, alpha=3, dropout=0.1)", "algebraic"),
    ("dora(r=5, alpha=3)", "witness"),
    ('dora(r=5, alpha=3, dropout=0.1, init_weights="gaussian")', "witness"),
    ('dora(r=5, alpha=3, dropout=0.1, init_weights="eva")', "witness"),
    ("ia3()", "algebraic"),
    ('ia3(side="in")', "algebraic"),
    ("vera(r=7, dropout=0.1)", "algebraic"),
    (
        "oft(block_size=4, use_cayley_neumann=false)",
        "algebraic",
    ),
    (
        "oft(block_size=0, r=3, use_cayley_neumann=false, coft=true, block_share=true)",
        "algebraic",
    ),
    ("oft(block_size=4, block_share=true)", "algebraic"),
    ("oft(block_size=0, r=3, num_cayley_neumann_terms=2, coft=true)", "algebraic"),
    ("bone(r=5)", "algebraic"),
    ("loha(r=5, alpha=3, rank_dropout=0.1, module_dropout=0.2)", "algebraic"),
    (
        "loha(r=5, alpha=3, use_effective_conv2d=true, rank_dropout=0.1)",
        "algebraic",
    ),
    (
        "lokr(r=1, alpha=3, decompose_both=true, module_dropout=0.2)",
        "algebraic",
    ),
    (
        "lokr(r=1, alpha=3, use_effective_conv2d=true, rank_dropout=0.1)",
        "algebraic",
    ),
    ("lokr(r=3, use_effective_conv2d=true, rank_dropout=0.1)", "algebraic"),
    ("hra(r=3, apply_GS=true)", "algebraic"),
    ("hra(r=4)", "algebraic"),
    ("boft(block_size=2, n_butterfly_factor=2)", "algebraic"),
    ("boft(block_size=0, block_num=4)", "algebraic"),
    ("gralora(r=6, alpha=3, dropout=0.1)", "algebraic"),
    ("gralora(r=6, hybrid_r=3, alpha=3, dropout=0.1)", "algebraic"),
    ("adalora(init_r=5, r=4, alpha=3, dropout=0.1)", "algebraic"),
    ("beft()", "exact"),
    ('c3a(block_size=4, init_weights="zeros")', "algebraic"),
    ("delora(r=5, module_dropout=0.1)", "algebraic"),
    ("fourierft(n_frequency=9, scaling=2, random_loc_seed=3)", "algebraic"),
    ("hira(r=5, dropout=0.1)", "snapshot"),
    ("randlora(r=4, alpha=3, dropout=0.1)", "algebraic"),
    ("road(group_size=10)", "snapshot"),
    ('road(variant="road_2", group_size=10)', "snapshot"),
    ('road(variant="road_4", group_size=10)', "snapshot"),
    ("shira(r=2, random_seed=3)", "algebraic"),
    ("vblora(r=2, num_vectors=6, vector_length=4, dropout=0.1)", "algebraic"),
    ("waveft(n_frequency=9, scaling=2, random_loc_seed=3)", "algebraic"),
    ("unilora(theta_d_length=7, dropout=0.1)", "algebraic"),
    ("supertuning(sparsity=0.9)", "algebraic"),
    ("supertuning(sparsity=0.9, r=4, dropout=0.1)", "algebraic"),
    ("waveft(n_frequency=9, scaling=2, random_loc_seed=3, use_idwt=false)", "algebraic"),
    ("bat(r=4)", "algebraic"),
    ("miss(r=4)", "algebraic"),
    ('miss(r=4, init_weights="mini")', "algebraic"),
    ('miss(r=4, init_weights="bat")', "algebraic"),
    ("eva(r=4, alpha=3, dropout=0.1, rslora=true, whiten=true)", "algebraic"),
    ("eva(r=4, alpha=3, dropout=0.1, rslora=true, adjust_scaling_factors=false)", "algebraic"),
    ("corda(r=4, alpha=3, dropout=0.1)", "algebraic"),
    ('corda(r=4, alpha=3, dropout=0.1, corda_method="kpm")', "algebraic"),
    ("lora_ga(r=4, alpha=3, dropout=0.1)", "algebraic"),
    ('lora_ga(r=4, alpha=3, dropout=0.1, direction="A2rBr", scale="gd_scale")', "algebraic"),
    ('lora_ga(r=4, alpha=3, dropout=0.1, direction="ArBr", scale="unit")', "algebraic"),
    ("loftq(r=4, alpha=3, dropout=0.1)", "algebraic"),
    ('loftq(r=4, alpha=3, dropout=0.1, rounding="int8")', "algebraic"),
    ("ortholora(r=4, alpha=3, dropout=0.1)", "algebraic"),
    ("kasa(r=4, alpha=3, dropout=0.1)", "algebraic"),
    ("qalora(r=5, alpha=3, group_size=4, dropout=0.1)", "algebraic"),
    ("tinylora(r=3, u=5, dropout=0.1)", "algebraic"),
    ('bdlora(r=4, nblocks=2, blocks="A", dropout=0.1)', "algebraic"),
    ('bdlora(r=4, nblocks=2, blocks="B", rslora=true)', "algebraic"),
    ("psoft(r=5, dropout=0.1)", "algebraic"),
    ('psoft(r=5, ab_svd_init="pissa_init", use_cayley_neumann=true)', "algebraic"),
    ("deft(r=3, alpha=2, dropout=0.1)", "snapshot"),
    ('deft(r=3, decomposition_method="qr")', "snapshot"),
    ("deft(r=3, para=true)", "snapshot"),
    ("osf()", "algebraic"),
    ("frod(sparse_rate=0.2, dropout=0.1)", "snapshot"),
    ("frod(sparse_rate=0)", "snapshot"),
    ('peanut(r=3, depth=2, act_fn="gelu")', "snapshot"),
    ("peanut(r=3)", "snapshot"),
    ("adamss(r=5, num_subspaces=3, subspace_rank=2)", "algebraic"),
)
every_case = pytest.mark.parametrize(("call", "merge_class"), CASES)


def method(name: str) -> ast.Method:
    found = LIBRARY.method(name)
    assert found is not None
    return found


def derived(call: str, has_bias: bool = True) -> Derived:
    found, arguments = called(call)
    equations = instantiate(found, arguments, tuple(SITE.items()), FACTS)
    return derive(equations, has_bias)


def leaf(expr: Expr) -> Tensor:
    name = expr.text("name") if expr.op == "parameter" else expr.op
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    if name == "entries":  # places in the matrix, each once
        sizes = {"rows": SITE["out"], "columns": SITE["in"]}
        return draw("places", sizes, numbers(expr, SITE), generator)
    if name == "places":  # row by row
        return torch.arange(numbers(expr, SITE)[0])
    if name.startswith("dealt"):  # places in a vector of 7
        deck = {"numbers": 7, "cards": 91, "first": 0}
        return draw("dealt", deck, numbers(expr, SITE), generator)
    return torch.randn(numbers(expr, SITE), generator=generator, dtype=torch.float64)


def values(known: Mapping[str, Tensor] | None = None) -> Evaluator:
    given = known or {}

    def found(expr: Expr) -> Tensor:
        name = expr.text("name") if expr.op == "witness" else expr.op
        return given[name] if name in given else leaf(expr)

    return Evaluator(Domain(SITE, found, lambda: torch.zeros((), dtype=torch.float64)))


def test_every_method_of_the_library_has_its_cases() -> None:
    assert set(LIBRARY.names()) == {called(call)[0].name for call, _ in CASES}


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
