"""What the sizes of all sites tell: sums over the sites of a method, in the model's order."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import surgery
from surgery.plan import Plan

untyped = cast(Any, torch)

METHOD = """
method m(r: int = 2, first: int = 0, whole: int = 1) on matrix {
  first' = before(r * in + out)
  whole' = total(r * in + out)
  shared train v[5] = 0
  frozen P[in] ~ dealt(numbers = 5, cards = whole, first = first, seed = 3)
  W' = W + gather(v, P) * cols(W)
}
"""
SIDES = (3, 7, 5, 11, 2)


def net() -> nn.Sequential:
    untyped.manual_seed(0)
    return nn.Sequential(*(nn.Linear(i, o) for i, o in pairwise(SIDES)))


def told(plan: Plan) -> dict[str, tuple[object, object]]:
    found = {s.path: dict(s.form.links[-1].arguments) for s in plan.sites}
    return {path: (a["first"], a["whole"]) for path, a in found.items()}


def by_hand(paths: list[str], r: int) -> dict[str, tuple[object, object]]:
    terms = {p: r * SIDES[int(p)] + SIDES[int(p) + 1] for p in paths}
    order = sorted(paths)
    return {p: (sum(terms[q] for q in order if q < p), sum(terms.values())) for p in paths}


@given(st.permutations("0123"), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_sums_are_over_the_sites_in_the_order_of_the_model(
    order: list[str], count: int, r: int
) -> None:
    statements = "\n".join(f"match /{path}/ apply m(r={r})" for path in order[:count])
    assert told(surgery.plan(METHOD + statements, net())) == by_hand(order[:count], r)


def test_each_set_of_arguments_and_each_adapter_is_counted_by_itself() -> None:
    spec = "match /0|2/ apply m() match /1/ apply m(r=3) adapter b { match /1|2/ apply m() }"
    plan = surgery.plan(METHOD + spec, net())
    a = [s for s in plan.sites if s.adapter == "default"]
    found = {(s.adapter, s.path): dict(s.form.arguments) for s in plan.sites}
    assert len(a) == 3
    assert found["default", "2"]["first"] == 2 * 3 + 7
    assert (found["default", "1"]["first"], found["default", "1"]["whole"]) == (0, 3 * 7 + 5)
    assert found["b", "2"]["first"] == 2 * 7 + 5


def test_what_is_shared_is_shared_though_what_is_told_differs() -> None:
    plan = surgery.plan(METHOD + "match * apply m()", net())
    (shared,) = plan.shared
    assert shared.shape == (5,)
    assert plan.trainable == 5


def test_in_a_chain_each_method_counts_its_own_sites() -> None:
    spec = "match /0/ apply lora(r=2) then m() match /1/ apply m()"
    found = told(surgery.plan(METHOD + spec, net()))
    assert found == by_hand(["0", "1"], 2)


def test_it_is_told_anew_where_a_folder_is_attached(tmp_path: Path) -> None:
    model, x = net(), torch.randn(4, 3)
    compiled = surgery.compile(METHOD + "match /3/ apply m() match /0/ apply m()", model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.arange(5)
    expected = cast(Tensor, model(x))
    assert not torch.equal(expected, net()(x))
    compiled.save(tmp_path)
    again = surgery.attach(tmp_path, net())
    assert told(again.plan) == told(compiled.plan)
    assert torch.equal(cast(Tensor, again.model(x)), expected)


def test_places_are_told_on_meta_too() -> None:
    made = surgery.plan(METHOD + "match * apply m()", net().to("meta"))
    assert told(made) == by_hand([*"0123"], 2)


@pytest.mark.parametrize(
    ("body", "call", "code", "said"),
    [
        ("train A[in] = before(in); W' = W * cols(A)", "m()", "E138", "after the sites are"),
        ("r' = total(); W' = W", "m()", "E104", "takes one argument"),
        ("r' = total(W); W' = W", "m()", "E103", "a number is needed"),
        ("r' = total(in); W' = W", "m(r=3)", "E122", "what the sizes of all sites tell"),
        ("train P[in] ~ dealt(numbers=5, cards=r, first=0); W' = W", "m()", "E111", "not trained"),
        ("frozen P[in] ~ dealt(numbers=5); W' = W", "m()", "E104", "needs all its arguments"),
        ("frozen P[in] ~ tally(cards=0, seed=1); W' = W", "m()", "E111", "cannot be drawn"),
    ],
)
def test_what_is_asked_in_another_way_is_refused(
    body: str, call: str, code: str, said: str
) -> None:
    found = surgery.check(f"method m(r: int = 2) on matrix {{ {body} }} match /0/ apply {call}")
    assert [d.code for d in found][:1] == [code]
    assert said in found[0].message
