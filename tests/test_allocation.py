"""A budget that shrinks: what is left, in which order, and what is written of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import bits
from torch import nn

import surgery
from surgery.allocation import Allocation, Schedule

untyped = cast(Any, torch)  # for calls whose stubs are not fully typed

X = torch.randn(11, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

# A method of another shape: rows that are kept or not, and no column beside them.
ROWS = """
method kept_rows(n: int = 5) on matrix {
  train V[n, in] ~ normal(std = 0.3)
  train g[n] = 1
  frozen U[out, n] ~ normal(std = 0.3)
  n' = kept(g)
  W' = W + U @ (g * rows(V))
}
"""


def net() -> nn.Sequential:
    untyped.manual_seed(1)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 11)).double()


def trained(spec: str, steps: int, **schedule: Any) -> tuple[surgery.Compiled, Allocation]:
    compiled = surgery.compile(spec, net())
    allocation = surgery.allocate(compiled, total_step=steps, **schedule)
    weights = [p for p in compiled.model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.SGD(weights, 0.05)
    for step in range(steps + 1):
        value = compiled.model(X).square().mean() + allocation.loss()
        value.backward()
        optimizer.step()
        allocation.step(step)
        optimizer.zero_grad()
    return compiled, allocation


SPECS = ("match /0|2/ apply adalora(init_r=4)", f"{ROWS} match /0|2/ apply kept_rows(n=4)")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("target", [1, 3])
def test_what_is_saved_is_what_is_left(spec: str, target: int, tmp_path: Path) -> None:
    compiled, allocation = trained(spec, 9, target_r=target, tinit=1, tfinal=2, deltaT=2)
    left = {path: int(mask.sum()) for path, mask in allocation.masks.items()}
    assert sum(left.values()) == 2 * target
    expected = compiled.model(X)
    allocation.save(tmp_path)
    again = surgery.attach(tmp_path, net())
    torch.testing.assert_close(again.model(X), expected)
    sizes = {s.path: s.form.shapes[s.form.parameters[1].name][0] for s in again.plan.sites}
    assert sizes == {path: count for path, count in left.items() if count}
    again.inverse.merge()
    torch.testing.assert_close(again.model(X), expected)
    again.inverse.unload()
    assert bits(again.model) == bits(net())


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(0, 9), st.integers(0, 9), st.integers(1, 30))
def test_the_budget_falls_from_all_to_the_target(
    between: int, tinit: int, tfinal: int, target: int
) -> None:
    schedule = Schedule(tinit + between + tfinal, tinit=tinit, tfinal=tfinal)
    assert schedule.objection() == ""
    budgets = [schedule.budget(t, 30, target) for t in range(schedule.total_step + 1)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[tinit] == 30
    assert budgets[schedule.last :] == [target] * (tfinal + 1)


def test_a_whole_budget_takes_nothing_away() -> None:
    _, allocation = trained(SPECS[0], 3, target_r=4)
    assert all(mask.all() for mask in allocation.masks.values())


def test_directions_that_are_orthonormal_cost_nothing() -> None:
    compiled = surgery.compile("match /0/ apply adalora(init_r=3)", net())
    allocation = surgery.allocate(compiled, total_step=2, target_r=1, orth_reg_weight=2.0)
    a, b = (compiled.parameters()[f"0.surgery.default.{n}"] for n in "AB")
    made = (m @ m.T - torch.eye(3).double() for m in (a, b.T))
    wanted = 2 * sum((m.square().sum().sqrt() for m in made), torch.zeros(())) / 2
    torch.testing.assert_close(allocation.loss(), wanted)
    with torch.no_grad():
        a.copy_(torch.eye(3, 7))
        b.copy_(torch.eye(5, 3))
    assert float(allocation.loss().detach()) == 0


def refused(spec: str, **given: Any) -> surgery.Diagnostic:
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.allocate(surgery.compile(spec, net()), **given).step(1)
    (found,) = caught.value.diagnostics
    return found


@pytest.mark.parametrize(
    ("spec", "given", "said"),
    [
        ("match /0/ apply lora(r=2)", {"total_step": 5}, "no site with a vector"),
        (SPECS[0], {"total_step": 5, "target_r": 2}, "has no gradient"),
        (SPECS[0], {"total_step": 5, "target_r": 5}, "cannot be followed"),
        (SPECS[0], {"total_step": 5, "tinit": 3, "tfinal": 2}, "cannot be followed"),
        (SPECS[0], {"total_step": 5, "beta1": 1.0}, "cannot be followed"),
        (SPECS[0], {"total_step": 5, "orth_reg_weight": -1}, "cannot be followed"),
        (SPECS[0], {"total_step": 5, "deltaT": 0}, "cannot be followed"),
    ],
)
def test_what_cannot_be_allocated_is_refused(spec: str, given: dict[str, Any], said: str) -> None:
    found = refused(spec, **given)
    assert found.code == "E423"
    assert said in found.message
    assert found.hint
