"""What sites of one ending share: a basis that their weights have in common, and places in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import surgery
from surgery.algebra.bases import basis_of
from surgery.algebra.beginnings import drawn_again
from surgery.model.endings import ending, layer_number

untyped = cast(Any, torch)

METHOD = """
method m(sort: text = "") on matrix {
  sort' = ending()
  shared frozen V[in, in] = common_basis(W, 0.01)
  shared frozen P[2, 4] ~ off_diagonal(size = in)
  frozen C[out, in] = coordinates(W, V)
  train s[4] = 0
  W' = C @ (eye(in) + scatter(s, P, in, in)) @ transpose(V)
}
"""
BOTH = "match /up|down/ apply m()"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.down = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def net(depth: int = 3) -> nn.Sequential:
    untyped.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(depth))).eval()


def moved(compiled: surgery.Compiled) -> None:
    with torch.no_grad():
        for parameter in compiled.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.arange(1, parameter.numel() + 1)


@pytest.mark.parametrize(
    ("path", "said", "number"),
    [
        ("model.layers.3.self_attn.q_proj", "self_attn_q_proj", 3),
        ("encoder.layer.11.attention.output.dense", "attention_output", 11),
        ("encoder.layer.11.output.dense", "output_dense", 11),
        ("h.2.layers.5.fc", "fc", 5),
        ("layers.head", "layers_head", 7),
        ("0", "0", 0),
        ("head", "head", 7),
    ],
)
def test_a_path_has_an_ending_and_a_number(path: str, said: str, number: int) -> None:
    assert (ending(path), layer_number(path, 7)) == (said, number)


def test_sites_of_one_ending_share_and_others_do_not() -> None:
    plan = surgery.plan(METHOD + BOTH, net())
    assert [dict(s.form.arguments)["sort"] for s in plan.sites] == ["up", "down"] * 3
    assert sorted(s.shape for s in plan.shared) == [(2, 4), (2, 4), (5, 5), (7, 7)]


def test_it_begins_as_the_base_and_merges_into_what_it_computes() -> None:
    model, x = net(), torch.randn(11, 5)
    before = cast(Tensor, model(x))
    compiled = surgery.compile(METHOD + BOTH, model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    moved(compiled)
    here = cast(Tensor, model(x))
    assert not torch.allclose(here, before, atol=1e-2)
    compiled.inverse.merge()
    torch.testing.assert_close(model(x), here, rtol=1e-4, atol=1e-5)
    compiled.inverse.unmerge()
    compiled.inverse.unload()
    assert torch.equal(cast(Tensor, model(x)), before)


@given(st.permutations("012"))
@settings(max_examples=5, deadline=None)
def test_the_order_of_statements_is_no_matter(order: list[str]) -> None:
    text = " ".join(f"match /{i}.up/ apply m()" for i in order)
    one, other = net(), net()
    surgery.compile(METHOD + text, one)
    surgery.compile(METHOD + "match up apply m()", other)
    assert torch.equal(*(m.state_dict()["surgery.default.shared.m.V"] for m in (one, other)))


@given(st.integers(1, 4), st.integers(1, 9), st.integers(2, 7), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_every_matrix_is_what_its_coordinates_say(
    count: int, rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    some = [torch.randn(rows, columns, generator=generator) for _ in range(count)]
    v = basis_of(some, 0.01).double()
    assert v.shape == (columns, columns)
    for one in some:
        c = untyped.linalg.lstsq(v, one.double().T).solution
        torch.testing.assert_close((v @ c).T, one.double(), rtol=1e-3, atol=1e-3)


@given(st.integers(2, 9), st.integers(0, 99), st.data())
@settings(max_examples=25, deadline=None)
def test_places_off_the_diagonal_are_different_and_not_on_it(
    size: int, seed: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, size * (size - 1)))
    rows, columns = drawn_again("off_diagonal", {"size": size}, (2, count), seed, "P")
    assert bool((rows != columns).all())
    assert int(rows.max()) < size > int(columns.max())
    assert len({*map(int, rows * size + columns)}) == count


def test_what_is_saved_attaches_without_what_is_made_again(tmp_path: Path) -> None:
    model, x = net(), torch.randn(11, 5)
    compiled = surgery.compile(METHOD + BOTH, model)
    moved(compiled)
    compiled.save(tmp_path)
    again = net()
    surgery.attach(tmp_path, again)
    assert torch.equal(cast(Tensor, again(x)), cast(Tensor, model(x)))


def test_what_waits_on_meta_begins_when_the_weights_are_there() -> None:
    model, ready, x = net().to("meta"), net(), torch.randn(11, 5)
    surgery.compile(METHOD + BOTH, ready)
    compiled = surgery.compile(METHOD + BOTH, model)
    assert all(p.is_meta for p in compiled.parameters().values())
    model.load_state_dict(net().state_dict(), strict=False, assign=True)
    compiled.materialize()
    torch.testing.assert_close(model(x), ready(x))


@pytest.mark.parametrize(
    ("spec", "code", "said"),
    [
        (METHOD + 'match up apply m(sort="a")', "E122", "what the path of a site ends in"),
        (
            METHOD + "match up apply lora(r=2) then m()",
            "E134",
            "the W of all its sites",
        ),
        (METHOD.replace("sort' = ending()", "") + BOTH, "E310", "sites of other sizes than"),
        (METHOD.replace("4]", "25]") + BOTH, "E301", "does not fit"),
    ],
)
def test_what_cannot_be_shared_is_refused(spec: str, code: str, said: str) -> None:
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.plan(spec, net())
    found = caught.value.diagnostics[0]
    assert found.code == code, found
    assert said in found.message
    assert found.hint or found.label
