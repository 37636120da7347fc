"""`W := W - D`: a method that changes the base at its start, which stays as it is."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import bits, moved
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.errors import SurgeryError

untyped = cast(Any, torch)  # for calls whose stubs are not fully typed

IN, OUT = 11, 7
X = torch.randn(5, IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

PRINCIPAL = """
method principal(r: int = 3) on matrix {
  frozen U[out, r] = left_singular(W, r)
  train  V[r, in] = singular_values(W, r) * rows(right_singular(W, r))
  W := W - U @ V
  W' = W + U @ V
}
"""
# W is read before a change, between two, and after both; what is drawn is kept as it was drawn.
TWICE = """
method twice(r: int = 2) on matrix {
  train A[r, in] ~ normal()
  train B[out, r] ~ normal()
  W := W - B @ A
  train m[out] = rownorm(W)
  train C[r, in] = right_singular(W, r)
  train D[out, r] = left_singular(W, r)
  W' = W + B @ A + D @ C
  W := W - D @ C
  b' = b + m - stop_gradient(m)
}
"""
MADE = """
method made(r: int = 2) on matrix {
  train A[r, in] ~ normal()
  train B[out, r] = W @ transpose(A)
  W := W - B @ A
  y' = y + x @ transpose(B @ A)
}
"""
DEFINED = {"principal": PRINCIPAL, "twice": TWICE, "made": MADE}
CALLS = (
    "pissa(r=3, alpha=5)",
    "olora(r=2, alpha=3, dropout=0.2)",
    "principal()",
    "twice()",
    "made()",
)


def spec(call: str, where: str = "site") -> str:
    return f"{DEFINED.get(call.partition('(')[0], '')}\nmatch {where} apply {call}"


def net(seed: int = 3, dtype: torch.dtype = torch.float64) -> nn.Module:
    untyped.manual_seed(seed)
    return nn.ModuleDict({"site": nn.Linear(IN, OUT)}).to(dtype)


def run(model: nn.Module, x: Tensor = X) -> Tensor:
    return cast(Tensor, cast(nn.ModuleDict, model)["site"](x))


def close(left: Tensor, right: Tensor) -> bool:
    return bool((left - right).abs().max() < 1e-11)


every_call = pytest.mark.parametrize("call", CALLS)


@every_call
@settings(max_examples=5)
@given(seed=st.integers(0, 100))
def test_it_begins_as_the_base_and_comes_off_to_the_bit(call: str, seed: int) -> None:
    model = net(seed).eval()
    before, y = bits(model), run(model)
    compiled = surgery.compile(spec(call), model, seed=seed)
    assert close(run(model), y)
    assert {k: v for k, v in bits(model).items() if ".surgery." not in k} == before
    moved(compiled)
    model.eval()
    adapted = run(model)
    assert not close(adapted, y)
    compiled.inverse.merge()
    assert close(run(model), adapted)
    compiled.inverse.unmerge()
    assert close(run(model), adapted)
    compiled.inverse.unload()
    assert bits(model) == before


@every_call
def test_what_is_kept_is_what_the_trained_began_as(call: str) -> None:
    compiled = surgery.compile(spec(call), net())
    values = {n.rpartition(".")[2]: t for n, t in compiled.parameters().items()}
    kept = {n for n in values if n.endswith("_0")}
    assert kept
    for name in kept:
        assert torch.equal(values[name], values[name.removesuffix("_0")])
        assert values[name].data_ptr() != values[name.removesuffix("_0")].data_ptr()
    form = compiled.plan.sites[0].form
    assert compiled.plan.trainable == sum(
        values[p.name].numel() for p in form.parameters if p.trained
    )
    assert not any(p.trained for p in form.parameters if p.name in kept)
    said = re.search(r"kept as (.+);", str(compiled.plan))
    assert said is not None
    assert kept <= {*said[1].split(", ")}


def test_each_beginning_sees_w_as_it_then_is() -> None:
    model = net()
    w = cast(Tensor, cast(nn.ModuleDict, model)["site"].weight).detach().clone()
    values = {
        n.rpartition(".")[2]: t
        for n, t in surgery.compile(spec("twice()"), model).parameters().items()
    }
    rest = w - values["B"] @ values["A"]
    torch.testing.assert_close(values["m"], rest.square().sum(1).sqrt())
    u, _, v = untyped.linalg.svd(rest, full_matrices=False)
    torch.testing.assert_close(values["D"] @ values["C"], u[:, :2] @ v[:2])


def test_the_equation_by_hand() -> None:
    model = net()
    linear = cast(nn.Linear, cast(nn.ModuleDict, model)["site"])
    w, b = linear.weight.detach().clone(), linear.bias.detach().clone()
    compiled = surgery.compile(spec("made()"), model)
    moved(compiled)
    p = {n.rpartition(".")[2]: t for n, t in compiled.parameters().items()}
    new = w - p["B_0"] @ p["A_0"] + p["B"] @ p["A"]
    assert close(run(model), F.linear(X, new, b))


@every_call
def test_a_folder_of_our_own_attaches(call: str, tmp_path: Path) -> None:
    compiled = surgery.compile(spec(call), net(), seed=5)
    moved(compiled)
    compiled.model.eval()
    for name, value in surgery.compile(spec(call), net(), seed=5).parameters().items():
        if name.endswith("_0"):  # is not trained, so it has not moved
            compiled.parameters()[name].copy_(value)
    compiled.save(tmp_path)
    again = surgery.attach(tmp_path, net())
    again.model.eval()
    assert torch.equal(run(again.model), run(compiled.model))


@every_call
def test_a_model_on_meta_begins_as_a_real_one(call: str) -> None:
    wanted = surgery.compile(spec(call), net()).parameters()
    model = net().to("meta")
    compiled = surgery.compile(spec(call), model)
    model.load_state_dict(net().state_dict(), strict=False, assign=True)
    compiled.materialize()
    found = compiled.parameters()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_a_trained_adapter_that_waits_on_meta_keeps_what_it_began_as(tmp_path: Path) -> None:
    compiled = surgery.compile(spec(CALLS[0]), net(dtype=torch.float32))
    with torch.no_grad():
        for value in compiled.parameters().values():
            value.add_(0.1)
    kept = {n: t.clone() for n, t in compiled.parameters().items()}
    model = net(dtype=torch.float32).to("meta")
    compiled.save(tmp_path)
    again = surgery.attach(tmp_path, model)
    model.load_state_dict(net(dtype=torch.float32).state_dict(), strict=False, assign=True)
    again.materialize()
    began = surgery.compile(spec(CALLS[0]), net(dtype=torch.float32)).parameters()
    for name, value in again.parameters().items():
        # What is kept is in no folder of peft's form, and is made again of the base.
        assert torch.equal(value, (began if name.endswith("_0") else kept)[name])


@pytest.mark.parametrize("calls", [(CALLS[0], "ia3()"), ("ia3()", CALLS[0]), (CALLS[1], CALLS[0])])
def test_in_a_chain(calls: Sequence[str]) -> None:
    model = net()
    y = run(model)
    compiled = surgery.compile(f"match site apply {' then '.join(calls)}", model)
    model.eval()
    assert close(run(model), y)
    moved(compiled)
    adapted = run(model)
    compiled.inverse.merge()
    assert close(run(model), adapted)


def test_in_a_mix_each_sees_the_base() -> None:
    def outputs(*calls: str, live: str) -> Tensor:
        model = net()
        named = enumerate(calls)
        text = "\n".join(f"adapter a{i} {{ match site apply {call} }}" for i, call in named)
        compiled = surgery.compile(text, model)
        for adapter in compiled.adapters:
            moved(compiled, adapter)
        model.eval()
        compiled.activate(live)
        return run(model)

    y = run(net())
    one, other = (outputs(CALLS[0], "bone(r=3)", live=live) for live in ("a0", "a1"))
    both = outputs(CALLS[0], "bone(r=3)", live="0.5*a0 - 2*a1")
    assert close(both, y + 0.5 * (one - y) - 2 * (other - y))


def test_a_batch_of_matrices_begins_matrix_by_matrix() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(1)
            shape = (3, OUT, IN)
            self.mixer = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("eoi,ni->neo", self.mixer, x)

    model = Owner()
    y, weights = model(X), model.mixer.detach().clone()
    compiled = surgery.compile("match mixer apply pissa(r=2, alpha=3)", model)
    assert close(model(X), y)
    alone = nn.ModuleDict({"site": nn.Linear(IN, OUT, bias=False)}).double()
    with torch.no_grad():
        cast(Tensor, alone["site"].weight).copy_(weights[1])
    single = surgery.compile(spec("pissa(r=2, alpha=3)"), alone).parameters()
    whole = {n.rpartition(".")[2]: t for n, t in compiled.parameters().items()}
    for name, value in single.items():
        assert torch.equal(whole[name.rpartition(".")[2]][1], value)


def test_copies_and_two_programs_begin_alike() -> None:
    model = net()
    compiled = surgery.compile(spec(CALLS[0]), model)
    moved(compiled)
    assert torch.equal(run(copy.deepcopy(model)), run(model))


REFUSED = {
    "b := b": "E101",
    "W := A": "E108",
    "W := 2 * W": "E137",
    "W := W - W @ transpose(A) @ A": "E137",
    "W := W - left_singular(W, r) @ A": "E136",
    "W := W - B @ A @ drop(0.1)": "E114",
    "W := W - B @ S": "E123",
    "W := C": "E101",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_w_cannot_begin_as_is_refused(line: str) -> None:
    text = f"""method m(r: int = 2) on matrix {{
      train A[r, in] = 0
      train B[out, r] = 0
      shared train S[r, in] = 0
      {line}
      W' = W + B @ A + B @ S
    }}
    match site apply m()"""
    found = surgery.check(text)
    assert [d.code for d in found] == [REFUSED[line]]
    assert all(d.hint or d.label for d in found)


def test_a_beginning_that_is_not_known_is_refused() -> None:
    (found,) = surgery.check('match site apply lora(init_weights="gausian")')
    assert found.code == "E111"
    assert found.hint == "there are: default, gaussian"


@pytest.mark.parametrize("text", ["pissa", "eva", "lora_ga", "orthogonal"])
def test_a_beginning_that_is_a_method_of_its_own_is_named_so(text: str) -> None:
    (found,) = surgery.check(f'match site apply lora(init_weights="{text}")')
    assert found.code == "E111"
    name = "ortholora" if text == "orthogonal" else text  # which formats alone call it
    assert found.hint.startswith(f'"{text}" is a method of its own: apply {name}(…); there are: ')


def test_more_directions_than_there_are_is_refused_with_the_ranks_that_fit() -> None:
    with pytest.raises(SurgeryError) as caught:
        surgery.plan("match site apply pissa(r=8)", net())
    (found,) = caught.value.diagnostics
    assert found.code == "E301"
    assert "r=6 or 7" in found.hint
