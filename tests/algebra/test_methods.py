"""What is derived from the methods of the library: soundness, merge, and the way back."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
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

# Arguments that fit the site, and how a merge with them can be taken back.
CASES: dict[str, list[tuple[dict[str, object], str]]] = {
    "lora": [
        (
            {
                "r": 5,
                "alpha": 3.0,
                "dropout": p,
                "rslora": p > 0,
                "init_weights": init,
                "bias": p > 0,
            },
            "algebraic",
        )
        for p in (0.0, 0.1)
        for init in ("default", "gaussian", "pissa", "olora")
    ],
    "pvera": [
        ({"r": 5, "projection_prng_key": 0, "dropout": 0.1, "d_initial": 0.1}, "algebraic"),
    ],
    "glora": [
        ({"r": 3, "config_A_B": some, "config_C": other, "config_D_E": other}, "algebraic")
        for some, other in (("lora", "vector"), ("vector", "vector"), ("constant", "vector"))
    ],
    "mica": [({"r": 5, "alpha": 3.0, "dropout": 0.1, "rslora": False}, "algebraic")],
    "dora": [
        ({"r": 5, "alpha": 3.0, "dropout": p, "rslora": p > 0, "init_weights": init}, "witness")
        for p, init in ((0.0, "default"), (0.1, "gaussian"), (0.1, "eva"))
    ],
    "ia3": [({"side": "out"}, "algebraic"), ({"side": "in"}, "algebraic")],
    "vera": [
        ({"r": 7, "projection_prng_key": 0, "dropout": 0.1, "d_initial": 0.1}, "algebraic"),
    ],
    "oft": [
        (
            {
                "block_size": 0 if r else 4,
                "r": r,
                "use_cayley_neumann": terms > 0,
                "num_cayley_neumann_terms": terms,
                "coft": r > 0,
                "eps": 0.5,
                "block_share": share,
            },
            "algebraic",
        )
        for r, terms, share in ((0, 0, False), (3, 0, True), (0, 5, True), (3, 2, False))
    ],
    "bone": [({"r": 5}, "algebraic")],
    "loha": [
        (
            {
                "r": 5,
                "alpha": 3.0,
                "use_effective_conv2d": core,
                "rank_dropout": 0.1,
                "module_dropout": 0.2,
            },
            "algebraic",
        )
        for core in (False, True)
    ],
    "lokr": [
        (
            {
                "r": r,
                "alpha": 3.0,
                "decompose_both": both,
                "decompose_factor": -1,
                "use_effective_conv2d": True,
                "rank_dropout": 0.1,
                "rank_dropout_scale": both,
                "module_dropout": 0.2,
            },
            "algebraic",
        )
        for r, both in ((1, True), (1, False), (3, False))
    ],
    "hra": [({"r": r, "apply_GS": r < 4}, "algebraic") for r in (3, 4)],
    "boft": [
        ({"block_size": 2, "block_num": 0, "n_butterfly_factor": 2}, "algebraic"),
        ({"block_size": 0, "block_num": 4, "n_butterfly_factor": 1}, "algebraic"),
    ],
    "gralora": [
        ({"r": 6, "hybrid_r": rest, "alpha": 3.0, "k": 2, "dropout": 0.1}, "algebraic")
        for rest in (0, 3)
    ],
    "adalora": [({"init_r": 5, "r": 4, "alpha": 3.0, "dropout": 0.1}, "algebraic")],
    "beft": [({}, "exact")],
    "c3a": [({"block_size": 4, "init_weights": "zeros"}, "algebraic")],
    "delora": [({"r": 5, "lambda": 15.0, "module_dropout": 0.1}, "algebraic")],
    "fourierft": [
        (
            {"n_frequency": 9, "scaling": 2.0, "random_loc_seed": 3, "init_weights": False},
            "algebraic",
        )
    ],
    "hira": [({"r": 5, "dropout": 0.1}, "snapshot")],
    "randlora": [({"r": 4, "alpha": 3.0, "projection_prng_key": 0, "dropout": 0.1}, "algebraic")],
    "road": [
        ({"variant": variant, "group_size": 10}, "snapshot")
        for variant in ("road_1", "road_2", "road_4")
    ],
    "shira": [({"r": 2, "random_seed": 3}, "algebraic")],
    "vblora": [
        (
            {
                "r": 2,
                "num_vectors": 6,
                "vector_length": 4,
                "topk": 2,
                "dropout": 0.1,
                "init_vector_bank_bound": 0.02,
                "init_logits_std": 0.1,
            },
            "algebraic",
        )
    ],
    "waveft": [
        (
            {"n_frequency": 9, "scaling": 2.0, "random_loc_seed": 3, "use_idwt": wavelets},
            "algebraic",
        )
        for wavelets in (True, False)
    ],
    "bat": [({"r": 4}, "algebraic")],
    "miss": [
        ({"r": 4, "mini_r": 1, "init_weights": kind, "dropout": 0.0}, "algebraic")
        for kind in ("default", "mini", "bat")
    ],
    "eva": [
        (
            {
                "r": 4,
                "alpha": 3.0,
                "dropout": 0.1,
                "rslora": True,
                "rho": 2.0,
                "whiten": whiten,
                "adjust_scaling_factors": whiten,
            },
            "algebraic",
        )
        for whiten in (True, False)
    ],
    "corda": [
        (
            {"r": 4, "alpha": 3.0, "dropout": 0.1, "rslora": False, "corda_method": kind},
            "algebraic",
        )
        for kind in ("ipm", "kpm")
    ],
    "lora_ga": [
        (
            {
                "r": 4,
                "alpha": 3.0,
                "dropout": 0.1,
                "rslora": False,
                "direction": direction,
                "scale": scale,
                "stable_gamma": 16.0,
            },
            "algebraic",
        )
        for direction, scale in (("ArB2r", "stable"), ("A2rBr", "gd_scale"), ("ArBr", "unit"))
    ],
    "loftq": [
        ({"r": 4, "alpha": 3.0, "dropout": 0.1, "rslora": False, "rounding": b}, "algebraic")
        for b in ("nf4", "int8")
    ],
    "ortholora": [({"r": 4, "alpha": 3.0, "dropout": 0.1, "rslora": False}, "algebraic")],
}
EVERY = [(name, *case) for name, cases in CASES.items() for case in cases]


def method(name: str) -> ast.Method:
    found = LIBRARY.method(name)
    assert found is not None
    return found


def derived(name: str, arguments: dict[str, object], has_bias: bool = True) -> Derived:
    equations = instantiate(method(name), tuple(arguments.items()), tuple(SITE.items()), FACTS)
    return derive(equations, has_bias)


def leaf(expr: Expr) -> Tensor:
    name = expr.text("name") if expr.op == "parameter" else expr.op
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    if name == "entries":  # places in the matrix, each once
        sizes = {"rows": SITE["out"], "columns": SITE["in"]}
        return draw("places", sizes, numbers(expr, SITE), generator)
    return torch.randn(numbers(expr, SITE), generator=generator, dtype=torch.float64)


def values(known: Mapping[str, Tensor] | None = None) -> Evaluator:
    given = known or {}

    def found(expr: Expr) -> Tensor:
        name = expr.text("name") if expr.op == "witness" else expr.op
        return given[name] if name in given else leaf(expr)

    return Evaluator(Domain(SITE, found, lambda: torch.zeros((), dtype=torch.float64)))


def test_every_method_of_the_library_has_its_cases() -> None:
    assert set(LIBRARY.names()) == CASES.keys()


@pytest.mark.parametrize("name", LIBRARY.names())
def test_every_method_of_the_library_is_sound(name: str) -> None:
    assert check_definition(method(name)) == ()


@pytest.mark.parametrize(("name", "arguments", "merge_class"), EVERY)
def test_a_merge_is_taken_back_by_what_it_keeps(
    name: str, arguments: dict[str, object], merge_class: str
) -> None:
    found = derived(name, arguments)
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


@pytest.mark.parametrize(("name", "arguments", "merge_class"), EVERY)
def test_every_parameter_has_a_part_in_the_merge(
    name: str, arguments: dict[str, object], merge_class: str
) -> None:
    del merge_class
    found = derived(name, arguments)
    assert found.merged is not None
    names = parameters_in(found.merged.weight) | parameters_in(found.merged.bias)
    assert names == {p.name for p in found.equations.parameters}


def test_a_norm_of_the_weight_is_the_only_thing_to_keep() -> None:
    arguments: dict[str, object] = {"r": 5, "alpha": 3.0, "dropout": 0.1, "rslora": False}
    found = derived("dora", {**arguments, "init_weights": "default"})
    ((name, witness),) = found.inverse.witnesses
    assert name == "witness0"
    assert numbers(witness, SITE) == (20,)


def test_scaled_outputs_scale_the_bias_and_scaled_inputs_do_not() -> None:
    out = derived("ia3", {"side": "out"}).merged
    into = derived("ia3", {"side": "in"}).merged
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
