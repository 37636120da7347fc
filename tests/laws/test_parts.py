"""Rows of a fused layer are as good a site as a layer: forward, merge, undo, save and attach."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support import bits, moved
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2Model, Phi3Config, Phi3Model

import surgery

untyped = cast(Any, torch)

METHODS = (
    "lora(r=5, alpha=7)",
    "dora(r=5)",
    "bone(r=5)",
    "bat(r=6)",
    "miss(r=5)",
    "ia3()",
    'ia3(side="in")',
    "vera(r=5)",
    "oft(block_size=6)",
)
SHIFT = "method shift() on matrix { train t[out] = 0 b' = b + t }"
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
QUERIES, KEYS, WIDTH = 48, 24, 24

every_method = pytest.mark.parametrize("method", METHODS)


def gpt2() -> nn.Module:
    return GPT2Model(GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=31))


def phi3() -> nn.Module:
    """Queries of 48 rows, keys and values of 24 each, in one matrix without a bias."""
    config = cast(Any, Phi3Config)(
        hidden_size=24,
        intermediate_size=30,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        vocab_size=31,
        pad_token_id=0,
        partial_rotary_factor=1.0,
    )
    return Phi3Model(config)


every_model = pytest.mark.parametrize("make", [gpt2, phi3])


def built(make: Any, dtype: torch.dtype) -> nn.Module:
    untyped.manual_seed(5)
    model = make().eval().to(dtype)
    assert isinstance(model, nn.Module)
    return model


def outputs(model: nn.Module) -> Tensor:
    return model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])).last_hidden_state


@every_model
@every_method
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_the_merged_forward_and_unload_gives_every_bit_back(
    make: Any, method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = built(make, dtype)
    before, at_first = bits(model), outputs(model)
    compiled = surgery.compile(f"match @query | @value in @layers[*] apply {method}", model)
    assert len(compiled.plan.sites) == 4
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]
    assert (outputs(model) - at_first).abs().max() <= near
    moved(compiled)
    adapted = outputs(model)
    assert (adapted - at_first).abs().max() > 5e-3
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model))), adapted)

    report = compiled.save(tmp_path / "out")
    assert "peft" in report.peft
    other = built(make, dtype)
    surgery.attach(tmp_path / "out", other)
    assert torch.equal(outputs(other), adapted)

    compiled.inverse.merge()
    assert (outputs(model) - adapted).abs().max() <= near
    assert torch.equal(outputs(copy.deepcopy(model)), outputs(model))
    compiled.inverse.unmerge()
    assert torch.equal(outputs(model), adapted)
    compiled.inverse.merge()
    compiled.inverse.unload()
    assert bits(model) == before
    assert torch.equal(outputs(model), at_first)


@every_model
@every_method
def test_a_part_is_what_a_layer_of_its_rows_would_be_and_the_other_rows_stay(
    make: Any, method: str
) -> None:
    model = built(make, torch.float64)
    compiled = surgery.compile(f"match @key in @layers[1] apply {method}", model)
    moved(compiled)
    (site,) = compiled.plan.sites
    part = site.site.part
    assert part is not None
    assert part.length == KEYS
    fused = cast(Any, site.site.module)
    stored = fused.weight.detach()
    whole = stored if site.form.kind.name == "linear" else stored.t()
    alone = nn.Linear(WIDTH, KEYS, bias=fused.bias is not None).to(torch.float64)
    with torch.no_grad():
        alone.weight.copy_(part.of(whole, -2))
        if fused.bias is not None:
            alone.bias.copy_(part.of(fused.bias, -1))
    apart = surgery.compile(f"match * apply {method}", nn.Sequential(alone))
    given = apart.parameters()
    for name, value in compiled.parameters().items():
        with torch.no_grad():
            given[name.replace(site.site.owner, "0").replace(".key.", ".")].copy_(value)
    x = torch.randn(7, WIDTH, dtype=torch.float64)
    expected = F.linear(x, whole, fused.bias)
    expected = torch.cat([expected[:, : part.start], alone(x), expected[:, part.stop :]], -1)
    torch.testing.assert_close(fused(x), expected, rtol=1e-12, atol=1e-12)
    compiled.inverse.merge()
    apart.inverse.merge()
    merged = fused.weight.detach()
    merged = merged if site.form.kind.name == "linear" else merged.t()
    torch.testing.assert_close(part.of(merged, -2), alone.weight.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(merged[: part.start], whole[: part.start])
    assert torch.equal(merged[part.stop :], whole[part.stop :])


@every_model
def test_a_bias_that_a_part_adds_is_zero_for_the_rest(make: Any) -> None:
    model = built(make, torch.float64)
    before = bits(model)
    compiled = surgery.compile(f"{SHIFT} match @value in @layers[0] apply shift()", model)
    moved(compiled)
    adapted = outputs(model)
    compiled.inverse.merge()
    torch.testing.assert_close(outputs(model), adapted, rtol=1e-12, atol=1e-12)
    compiled.inverse.unload()
    assert bits(model) == before


@every_model
def test_a_graph_calls_the_layer_once_for_all_its_parts(make: Any) -> None:
    model = built(make, torch.float32)
    compiled = surgery.compile("match @query | @key | @value apply lora(r=3)", model)
    for graph in compiled.graphs.values():
        graph.lint()
        assert sum(node.op == "call_module" for node in graph.nodes) == 1
    run = untyped.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(outputs(cast(nn.Module, run)), outputs(model))


def test_gradients_reach_every_part() -> None:
    model = built(phi3, torch.float32)
    compiled = surgery.compile("match @query | @value | @gate apply lora(r=3)", model)
    moved(compiled)
    cast(Any, outputs(model).square().sum()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 3 * 2
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained)


def test_a_whole_takes_its_parts_in_and_overlaps_are_refused() -> None:
    model = built(gpt2, torch.float32)
    plan = surgery.plan("match @query | c_attn in @layers[0] apply lora()", model)
    assert [site.path for site in plan.sites] == ["h.0.attn.c_attn"]
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.plan("match @query apply lora() match c_attn in h[1:] apply ia3()", model)
    assert [d.code for d in caught.value.diagnostics] == ["E302"]
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.plan("match @attention except @query apply lora()", model)
    (found,) = caught.value.diagnostics
    assert found.code == "E215"
    assert "`@key`, `@value`" in found.hint or "`@query`, `@key`, `@value`" in found.hint


def test_rows_have_their_own_sizes() -> None:
    model = built(phi3, torch.float32)
    plan = surgery.plan("match @query | @value where out == 48 apply lora(r=2)", model)
    assert [s.path for s in plan.sites] == [
        f"layers.{i}.self_attn.qkv_proj.query" for i in range(2)
    ]
    assert [s.form.sizes.fan_out for s in plan.sites] == [QUERIES] * 2
    assert plan.trainable == 2 * 2 * (24 + 48)
    assert surgery.plan("match @key & /qkv_proj/ apply lora()", model).sites[0].path.endswith("key")


def test_a_folder_with_other_rows_is_refused(tmp_path: Path) -> None:
    model = built(gpt2, torch.float32)
    compiled = surgery.compile("match @query apply lora(r=2)", model)
    compiled.save(tmp_path / "out")
    mapping = tmp_path / "out" / "mapping.json"
    text = mapping.read_text()
    for change in (('"stop": 24', '"stop": 25'), ('"whole": 72', '"whole": 73')):
        assert change[0] in text
        mapping.write_text(text.replace(*change))
        with pytest.raises(surgery.SurgeryError):
            surgery.attach(tmp_path / "out", built(gpt2, torch.float32))
