"""A merge of what can be in weights: the rest of the adapter runs on, and all of it comes back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import TOKENS, gpt2, language_model, logits
from support import bits, moved
from torch import Tensor, nn

import surgery
from surgery.errors import SurgeryError
from surgery.status import status

untyped: Any = torch

WIDE = """
method wide(r: int) on matrix {
  train A[r, in] ~ normal(std = 0.2)
  train B[out, r] = 0
  y' = y + gelu(x @ Aᵀ) @ Bᵀ
}
"""
MERGES = (
    "match q_proj apply lora(r=2)",
    "match q_proj apply dora(r=3)",
    "match o_proj | up_proj apply bone(r=2)",
    "match k_proj apply ia3()",
    "match o_proj apply boft(block_size=4)",
    "match down_proj apply hra(r=2)",
    "match embed_tokens apply lora(r=3)",
    "train @norm",
    "match q_proj[0:12] apply lora(r=2)",
)
STAYS = (
    "match v_proj apply wide(r=3)",
    "match mlp in layers[*] apply bottleneck(r=3)",
    "match layers.* apply steering()",
    "match q_proj in layers[*] apply loreft(r=2)",
    "match gate_proj apply wide(r=2)\n"
    'match self_attn in layers[*] apply bottleneck(r=2, side="in")',
)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}
MIXED = f"{WIDE}{MERGES[0]}\n{STAYS[0]}\n{STAYS[1]}"


def adapted(spec: str, model: nn.Module | None = None) -> surgery.Compiled:
    """A model with an adapter that changes what it gives."""
    compiled = surgery.compile(spec, language_model() if model is None else model)
    for name in compiled.adapters:
        moved(compiled, name)
    return compiled


def refused(code: str, call: Callable[[], object]) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        call()
    assert code in {d.code for d in caught.value.diagnostics}
    return caught.value


def near(one: Tensor, other: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    return torch.allclose(one, other, atol=TOLERANCES[dtype] * float(other.detach().abs().max()))


@given(
    st.sampled_from(sorted(product(range(len(MERGES)), range(len(STAYS))))),
    st.sampled_from([*TOLERANCES]),
    st.sampled_from(["exact", "none"]),
)
@settings(max_examples=10, deadline=None)
def test_what_can_merge_is_in_the_weights_and_the_rest_runs(
    which: tuple[int, int], dtype: torch.dtype, undo: Any
) -> None:
    model = language_model().to(dtype)
    before, plain = bits(model), logits(model)
    compiled = adapted(f"{WIDE}{MERGES[which[0]]}\n{STAYS[which[1]]}", model)
    whole, outputs = bits(model), logits(model)
    merging = {s.path for s in compiled.plan.sites if s.form.derived.still is not None}
    running = {s.path for s in compiled.plan.sites} - merging
    assert not torch.equal(outputs, plain)

    told = refused("E403", compiled.inverse.merge)
    assert bits(model) == whole
    assert all(str(told).count(f"`{path}`") == 1 for path in running)
    assert not any(f"`{path}`" in str(told) for path in merging)

    report = compiled.inverse.merge(partial=True, undo=undo)
    assert {site.path for site in report.sites} == merging
    assert near(logits(model), outputs, dtype)
    found = status(model)
    assert (found.merged, found.beside, found.findings) == (True, len(running), ())
    assert compiled.live == "default"
    if undo == "none":
        refused("E407", compiled.inverse.unmerge)
        compiled.inverse.unload(keep_merge=True, partial=True)
        assert not any("surgery" in name for name in model.state_dict())
        return
    compiled.inverse.unmerge()
    assert bits(model) == whole
    assert torch.equal(logits(model), outputs)
    assert status(model).beside == 0
    compiled.inverse.merge(partial=True)
    compiled.inverse.unload()
    assert bits(model) == before
    assert torch.equal(logits(model), plain)


def test_rows_of_one_weight_part_ways() -> None:
    """Of a fused layer one part is merged, one runs, and so does what is on the layer's call."""
    model = gpt2()
    before = bits(model)
    compiled = adapted(
        f"{WIDE} match @query apply lora(r=2)\nmatch @value apply wide(r=3)\n"
        "match c_attn in h[*] apply enters()\nmethod enters() on call {\n"
        "  train v[hidden] = 0\n  y' = y + v\n}",
        model,
    )
    outputs = cast(Any, model)(TOKENS)[0]
    assert len(compiled.inverse.merge(partial=True).sites) == 2
    assert near(cast(Any, model)(TOKENS)[0], outputs)
    compiled.inverse.unload()
    assert bits(model) == before


@pytest.mark.parametrize("undo", ["exact", "algebraic"])
def test_a_mix_of_which_one_has_calls(undo: Any) -> None:
    """Where two meet they are one site, which merges if all of it does."""
    compiled = adapted(
        f"{WIDE} adapter a {{ match q_proj | v_proj apply lora(r=2) }}\n"
        "adapter b { match q_proj apply lora(r=3)\nmatch v_proj apply wide(r=2)\n"
        "match mlp in layers[*] apply bottleneck(r=3) }\n"
        "adapter c { match layers.* apply steering() }"
    )
    model = compiled.model
    compiled.activate("0.7*a + 0.3*b")
    whole, outputs = bits(model), logits(model)
    report = compiled.inverse.merge(partial=True, undo=undo)
    assert {site.path.rpartition(".")[2] for site in report.sites} == {"q_proj"}
    assert near(logits(model), outputs)
    rows = {one.name: (one.merged, one.beside) for one in status(model).adapters}
    assert rows == {"a": (True, 2), "b": (True, 4), "c": (False, 0)}
    compiled.inverse.unmerge()
    assert undo != "exact" or bits(model) == whole
    assert near(logits(model), outputs)
    if undo != "exact":
        return
    compiled.activate("a")
    compiled.inverse.merge()
    compiled.inverse.merge("c", partial=True)
    assert (compiled.live, status(model).beside) == ("a + c", 2)
    compiled.inverse.unmerge("a")  # of the rest, nothing is in weights
    assert (compiled.live, compiled.merged) == ("c", False)
    assert bits(model) == whole
    with compiled.using("c"):
        pass
    refused("E495", lambda: compiled.inverse.merge(partial=True))
    assert (compiled.merged, bits(model)) == (False, whole)


def test_while_it_is_merged_in_part_nothing_else_is_chosen() -> None:
    compiled = adapted(f"{MIXED}\nadapter other {{ match k_proj apply lora(r=2) }}")
    compiled.inverse.merge(partial=True)
    outputs = logits(compiled.model)
    for call in (
        lambda: compiled.activate("other"),
        lambda: compiled.using(None).__enter__(),
        lambda: compiled.route(["other", None]).__enter__(),
        lambda: compiled.delete("default"),
        lambda: compiled.rename("default", "d"),
        lambda: compiled.inverse.merge(partial=True),
        lambda: surgery.compile("adapter z { match k_proj apply lora(r=2) }", compiled.model),
    ):
        refused("E402", call)
    told = refused("E496", lambda: compiled.inverse.unload(keep_merge=True))
    assert "mlp.call" in str(told)
    assert torch.equal(logits(compiled.model), outputs)
    assert "merged into the weights, but for what runs at 4 sites" in str(compiled)
    assert "live merged 2/6" in str(compiled)
    compiled.delete("other")
    compiled.inverse.unmerge()


def test_copies_and_pickles_and_frozen_models_stand_as_it_does() -> None:
    compiled = adapted(MIXED)
    before = logits(compiled.model)
    compiled.inverse.merge(partial=True)
    outputs = logits(compiled.model)
    for twin in (copy.deepcopy(compiled.model), pickle.loads(pickle.dumps(compiled.model))):
        assert torch.equal(logits(twin), outputs)
        surgery.of(twin).inverse.unmerge()
        assert torch.equal(logits(twin), before)
    with compiled.frozen():
        assert near(logits(compiled.model), outputs)
        compiled.inverse.unmerge()
        compiled.inverse.merge(partial=True)
        assert near(logits(compiled.model), outputs)
    assert torch.equal(logits(compiled.model), outputs)
    made = untyped.compile(compiled.model, backend="eager", fullgraph=True)
    assert near(logits(made), outputs)


def test_saved_it_is_the_whole_adapter(tmp_path: Path) -> None:
    compiled = adapted(MIXED)
    outputs = logits(compiled.model)
    compiled.save(tmp_path / "whole")
    compiled.inverse.merge(partial=True)
    compiled.save(tmp_path / "parted")
    read = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("whole", "parted")
    ]
    assert read[0] == read[1]
    fresh = language_model()
    surgery.attach(tmp_path / "parted", fresh)
    assert torch.equal(logits(fresh), outputs)


def test_gradients_of_the_rest_are_those_of_the_whole() -> None:
    compiled = adapted(MIXED)
    model = compiled.model

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        cast(Any, model)(TOKENS).logits.square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    whole = gradients()
    compiled.inverse.merge(partial=True)
    found = gradients()
    assert found.keys() == {name for name in whole if "q_proj" not in name}
    assert all(near(value, whole[name]) for name, value in found.items())
    model.train()
    (told,) = status(model).findings
    assert told.code == "E459"
    assert "q_proj` and 1 more" in told.message
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name in found:
                value -= 0.1 * found[name]
    model.eval()
    outputs = logits(model)
    compiled.inverse.unmerge()
    assert near(logits(model), outputs)


def test_a_model_that_is_one_graph() -> None:
    net = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 5))
    x = torch.randn(3, 7)
    graph = untyped.fx.symbolic_trace(net)
    compiled = adapted(f"{WIDE} match 0 apply lora(r=2)\nmatch 2 apply wide(r=3)", graph)
    whole, outputs = bits(graph), graph(x)
    assert len(compiled.inverse.merge(partial=True).sites) == 1
    assert near(graph(x), outputs)
    compiled.inverse.unmerge()
    assert bits(graph) == whole
    assert torch.equal(graph(x), outputs)


def test_a_plan_says_what_merges_of_each_method() -> None:
    plan = surgery.plan(MIXED, language_model())
    assert [(m.method, m.on, m.sites, m.merge, bool(m.reason)) for m in plan.methods] == [
        ("lora", "matrix", 2, "algebraic", False),
        ("wide", "matrix", 2, "none", True),
        ("bottleneck", "call", 2, "none", True),
    ]
    assert "merges at 2 of 6 sites" in str(plan)
    data = cast(Any, plan.as_json())["methods"]
    assert data[1]["reason"] == "gelu(x @ transpose(A)) is not linear in x"
    alone = surgery.plan("match q_proj apply lora(r=2)", language_model())
    assert "partial" not in str(alone)
