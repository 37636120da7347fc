"""What an argument chooses: a function by its name, a number up to a bound."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.errors import SurgeryError

FUNCTIONS = {
    "gelu": F.gelu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
}

CURVED = """
method curved(act: text = "relu", depth: int = 1) on matrix {
  train A[out, in] ~ normal()
  let n = at_most(depth, 3)
  W' = W + n * activation(A, act)
}
"""


def merged(call: str) -> tuple[Tensor, Tensor]:
    """The change of the weight, and A."""
    layer = nn.Linear(5, 3).double()
    before = layer.weight.detach().clone()
    compiled = surgery.compile(f"{CURVED}\nmatch * apply {call}", nn.Sequential(layer))
    (a,) = compiled.parameters().values()
    compiled.inverse.merge()
    return layer.weight.detach() - before, a.detach()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_by_its_name_is_that_function(name: str) -> None:
    change, a = merged(f'curved(act="{name}", depth=3)')
    torch.testing.assert_close(change, 3 * FUNCTIONS[name](a))


WRONG = {
    'curved(act="gelo")': ("E111", "did you mean `gelu`?"),
    "curved(depth=4)": ("E105", "4 is above 3"),
}


@pytest.mark.parametrize("call", WRONG)
def test_what_cannot_be_chosen_is_refused(call: str) -> None:
    code, label = WRONG[call]
    with pytest.raises(SurgeryError) as caught:
        merged(call)
    (found,) = caught.value.diagnostics
    assert found.code == code
    assert label in str(caught.value)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("W' = activation(W)", "E104"),
        ("W' = activation(W, 3)", "E111"),
        ('W\' = activation(W, act = "relu")', "E104"),
        ("W' = at_most(3) * W", "E104"),
        ("W' = at_most(3, 2) * W", "E105"),
    ],
)
def test_how_it_is_called_is_checked_where_it_is_defined(body: str, code: str) -> None:
    text = f"method m() on matrix {{ {body} }}"
    with pytest.raises(SurgeryError) as caught:
        surgery.compile(f"{text}\nmatch * apply m()", nn.Sequential(nn.Linear(5, 3)))
    assert code in {d.code for d in caught.value.diagnostics}


MADE = """
method made(r: int = 2) on matrix {{
  train V[r, in] ~ normal()
  frozen U[out, r] = {beginning}
  frozen S[r] = colnorm(U)
  W' = W + U @ (S * rows(V))
}}
format house made {{
  config kind = "MADE"
  config r = r else 2
  tensor V on linear = "V"
}}
match * apply made()
"""


@pytest.mark.parametrize(
    ("beginning", "told"),
    [("left_singular(W, r)", True), ("W @ transpose(V)", False), ("1", True)],
)
def test_what_is_frozen_and_made_of_the_base_needs_no_place_in_a_format(
    beginning: str, told: bool
) -> None:
    model = nn.Sequential(nn.Linear(5, 3))
    compiled = surgery.compile(MADE.format(beginning=beginning), model)
    rows = {row.name: row for row in compiled.mapping.rows}
    assert {n: row.redrawn for n, row in rows.items()} == {"V": False, "U": told, "S": told}
    assert (rows["V"].key("house") is not None) is told
    if told:
        renamed = compiled.mapping.rename(compiled.parameters(), to="house")
        assert [*renamed] == ["0.V"]
