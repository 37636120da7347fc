"""A Llama whose weights accelerate keeps elsewhere, adapted before and after: nothing differs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery.model.holder import ADAPTERS, under_adapters

accelerate: Any = pytest.importorskip("accelerate")
Offload = Callable[[nn.Module, Path], None]

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
METHODS = ("bone(r=4)", "dora(r=3)", 'ia3(side="in")', "vera(r=5)", "oft(block_size=4)", "bat(r=4)")


def llama() -> nn.Module:
    """A Llama of two layers with sizes that are not all alike."""
    cast(Any, torch).manual_seed(0)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        vocab_size=53,
    )
    return LlamaForCausalLM(config).eval()


def on_cpu(model: nn.Module, folder: Path) -> None:
    """Weights in a dictionary, loaded for each call."""
    del folder
    accelerate.cpu_offload(model, execution_device="cpu")


def dispatched(model: nn.Module, folder: Path) -> None:
    """One layer on disk, one in memory."""
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    where |= {name: "cpu" for name, _ in model.named_children() if name == ADAPTERS}
    where |= {"model.layers.0": "disk", "model.layers.1": "cpu", "lm_head": "disk"}
    accelerate.dispatch_model(
        model, where, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


def adapt(model: nn.Module, method: str) -> surgery.Compiled:
    """An adapter whose parameters have been moved, the same on every copy."""
    compiled = surgery.compile(f"match /.*_proj/ in layers[0:2] apply {method}", model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return compiled


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's trained parameters by name."""
    named = model.named_parameters()
    return {n: p for n, p in named if under_adapters(n) and p.requires_grad}


def outputs_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and the gradient of each trained parameter."""
    logits = model(IDS).logits
    logits.square().sum().backward()
    return logits.detach(), {n: p.grad for n, p in trained(model).items() if p.grad is not None}


def assert_same(left: Any, right: Any) -> None:
    """Equal logits, and equal gradients of the same parameters."""
    torch.testing.assert_close(left[0], right[0], rtol=0, atol=1e-6)
    assert left[1].keys() == right[1].keys()
    assert left[1]
    for name, gradient in left[1].items():
        torch.testing.assert_close(gradient, right[1][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("offload", [on_cpu, dispatched])
@pytest.mark.parametrize("first", ["adapted", "offloaded"])
def test_an_offloaded_model_computes_the_same(
    first: str, offload: Offload, method: str, tmp_path: Path
) -> None:
    plain, moved = llama(), llama()
    base = plain(IDS).logits
    adapt(plain, method)
    expected = outputs_and_gradients(plain)
    assert not torch.allclose(expected[0], base, atol=1e-3)
    if first == "offloaded":
        offload(moved, tmp_path)
        compiled = adapt(moved, method)
    else:
        compiled = adapt(moved, method)
        offload(moved, tmp_path)
    assert_same(outputs_and_gradients(moved), expected)
    compiled.inverse.unload()
    assert torch.equal(moved(IDS).logits, base)


COPIES = "train @norm | embed_tokens save lm_head match q_proj apply lora(r=3)"


@pytest.mark.parametrize("offload", [on_cpu, dispatched])
@pytest.mark.parametrize("first", ["adapted", "offloaded"])
def test_copies_of_parameters_are_beside_what_is_offloaded(
    first: str, offload: Offload, tmp_path: Path
) -> None:
    plain, moved = llama(), llama()
    base = plain(IDS).logits
    _nudged(surgery.compile(COPIES, plain))
    expected = outputs_and_gradients(plain)
    assert len(expected[1]) == 2 * 2 + 1 + 1 + 1 + 2 * 2
    if first == "offloaded":
        offload(moved, tmp_path)
    compiled = _nudged(surgery.compile(COPIES, moved))
    if first == "adapted":
        offload(moved, tmp_path)
    assert_same(outputs_and_gradients(moved), expected)
    compiled.inverse.merge()
    torch.testing.assert_close(moved(IDS).logits, expected[0], rtol=0, atol=1e-6)
    compiled.inverse.unmerge()
    compiled.inverse.unload()
    assert torch.equal(moved(IDS).logits, base)


def _nudged(compiled: surgery.Compiled) -> surgery.Compiled:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, value in sorted(compiled.parameters().items()):
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return compiled


@pytest.mark.parametrize("offload", [on_cpu, dispatched])
def test_merge_and_unmerge_under_hooks(offload: Offload, tmp_path: Path) -> None:
    plain, moved = llama(), llama()
    base = plain(IDS).logits
    adapt(plain, "dora(r=3)").inverse.merge()
    offload(moved, tmp_path)
    compiled = adapt(moved, "dora(r=3)")
    adapted = moved(IDS).logits
    compiled.inverse.merge()
    torch.testing.assert_close(moved(IDS).logits, plain(IDS).logits, rtol=0, atol=1e-6)
    compiled.inverse.unmerge()
    assert torch.equal(moved(IDS).logits, adapted)
    compiled.inverse.merge()
    compiled.inverse.unload()
    assert torch.equal(moved(IDS).logits, base)


def test_hooks_may_go_while_an_adapter_stays(tmp_path: Path) -> None:
    model = llama()
    base = {n: t.clone() for n, t in model.state_dict().items()}
    dispatched(model, tmp_path)
    compiled = adapt(model, "bone(r=4)")
    adapted = model(IDS).logits
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(IDS).logits, adapted)
    compiled.inverse.unload()
    assert all(torch.equal(t, base[n]) for n, t in model.state_dict().items())


def test_a_copy_of_an_offloaded_model_is_adapted_by_itself(tmp_path: Path) -> None:
    model = llama()
    base = model(IDS).logits
    on_cpu(model, tmp_path)
    adapt(model, "ia3()")
    twin = copy.deepcopy(model)
    adapted = model(IDS).logits
    surgery.of(model).inverse.unload()
    assert torch.equal(model(IDS).logits, base)
    assert torch.equal(twin(IDS).logits, adapted)
