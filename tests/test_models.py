"""Adapted language models behave as models do: generation, files, compilation, copies, hooks."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery.model.holder import modules_of

untyped = cast(Any, torch)  # for calls whose stubs are not fully typed

CARD = "match /q_proj|v_proj/ in layers[0:12] apply bone(r=8)"
ROOT = Path(__file__).parents[1]
TOKENS = (torch.arange(14) * 5 % 97).view(2, 7)

# One spec for each method; every one adapts two sites a layer.
EVERY = {
    "lora": "lora(r=3, alpha=7, dropout=0.1)",
    "dora": "dora(r=3)",
    "bone": "bone(r=8)",
    "bat": "bat(r=4)",
    "miss": "miss(r=5)",
    "mini": 'miss(r=4, mini_r=2, init_weights="mini")',
    "ia3 out": "ia3()",
    "ia3 in": 'ia3(side="in")',
    "vera": "vera(r=5)",
    "oft": "oft(block_size=4)",
    "loha": "loha(r=3)",
    "lokr": "lokr(r=2)",
    "hra": "hra(r=4)",
    "boft": "boft(block_size=6, n_butterfly_factor=2)",
    "gralora": "gralora(r=4)",
}
every_method = pytest.mark.parametrize("method", EVERY)


def llama(layers: int = 2) -> nn.Module:
    untyped.manual_seed(6)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        pad_token_id=0,
    )
    return cast(nn.Module, LlamaForCausalLM(config)).eval()


def adapted(method: str, model: nn.Module, scope: str = "layers[*]") -> surgery.Compiled:
    return surgery.compile(f"match /q_proj|v_proj/ in {scope} apply {EVERY[method]}", model)


def nudge(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = 0.2 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(step.to(parameter.device, parameter.dtype))


def logits(model: nn.Module) -> Tensor:
    return cast(Tensor, model(TOKENS).logits)


def generated(model: nn.Module) -> Tensor:
    return cast(Any, model).generate(TOKENS, max_new_tokens=9, do_sample=False, use_cache=True)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """Recompilation limits count over a process."""
    yield
    torch.compiler.reset()


# ---------------------------------------------------------------------------- the line on the card


def test_the_first_line() -> None:
    model = llama(13)
    keys, tokens = list(model.state_dict()), generated(model)
    base = {n: t.clone() for n, t in model.state_dict().items()}
    compiled = surgery.compile(CARD, model)
    assert len(compiled.plan.sites) == 24
    assert all(s.path.split(".")[-1] in ("q_proj", "v_proj") for s in compiled.plan.sites)
    assert torch.equal(generated(model), tokens)
    assert [n for n in model.state_dict() if ".surgery." not in n] == keys
    nudge(model)
    assert not torch.equal(generated(model), tokens)
    mine = generated(model)
    compiled.inverse.merge()
    assert torch.equal(generated(model), mine)
    compiled.inverse.unload()
    assert torch.equal(generated(model), tokens)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(t, base[n]) for n, t in model.state_dict().items())


@every_method
def test_generation_is_the_same_at_first_and_after_unload(method: str) -> None:
    model = llama()
    tokens = generated(model)
    compiled = adapted(method, model)
    assert torch.equal(generated(model), tokens)
    nudge(model)
    generated(model)
    compiled.inverse.unload()
    assert torch.equal(generated(model), tokens)


@every_method
def test_base_checkpoints_load_into_an_adapted_model_and_back(method: str) -> None:
    model, other = llama(), llama()
    nudge(other)
    adapted(method, model)
    missing: Any = model.load_state_dict(other.state_dict(), strict=False)
    assert missing.unexpected_keys == []
    assert set(missing.missing_keys) == {n for n in model.state_dict() if "surgery." in n}
    # DoRA began with the norms of the weights that are no longer there.
    assert torch.allclose(logits(model), logits(other), atol=1e-5) or method == "dora"
    back = llama()
    extra: Any = back.load_state_dict(model.state_dict(), strict=False)
    assert extra.missing_keys == []
    assert set(extra.unexpected_keys) == set(missing.missing_keys)


# ------------------------------------------------------------------------------------- compilation


def test_no_graph_breaks() -> None:
    model = llama(len(EVERY))  # one compilation, with a method in each layer
    lines = (
        f"match /q_proj|v_proj/ in layers[{i}] apply {m}" for i, m in enumerate(EVERY.values())
    )
    surgery.compile("\n".join(lines), model)
    nudge(model)
    compiled = untyped.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(logits(cast(nn.Module, compiled)), logits(model))


def test_no_graph_breaks_while_training() -> None:
    model = llama(1).train()
    adapted("lora", model)
    nudge(model)
    compiled = untyped.compile(model, fullgraph=True, backend="aot_eager")
    untyped.autograd.backward(logits(cast(nn.Module, compiled)).sum())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_sites_that_are_alike_are_compiled_once() -> None:
    frames: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        frames.append(len(inputs))
        return graph.forward

    model = llama(3)
    adapted("bone", model)
    sites = [m for n, m in modules_of(model) if n.endswith("q_proj")]
    assert len({id(type(m)) for m in sites}) == 1

    def through(site: nn.Module, x: Tensor) -> Tensor:
        return site(x)

    run = untyped.compile(through, backend=backend, fullgraph=True)
    for site in sites:
        run(site, torch.randn(2, 48))
    assert len(frames) == 1


# ------------------------------------------------------------------------------------------ copies


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return cast(nn.Module, torch.load(file, weights_only=False))


@every_method
@pytest.mark.parametrize("carry", [copied, pickled, saved])
@pytest.mark.parametrize("merge", [False, True])
def test_copies_compute_the_same(method: str, carry: Any, merge: bool) -> None:
    model = llama(1)
    before = logits(model)
    compiled = adapted(method, model)
    nudge(model)
    if merge:
        compiled.inverse.merge()
    output = logits(model)
    twin = carry(model)
    assert torch.equal(logits(twin), output)
    assert surgery.of(twin).merged == merge
    surgery.of(twin).inverse.unload()
    assert torch.equal(logits(twin), before)
    assert torch.equal(logits(model), output)


def test_a_pickle_is_read_by_another_process(tmp_path: Path) -> None:
    model = llama(1)
    adapted("dora", model)
    nudge(model)
    torch.save(model, tmp_path / "model.pt")
    torch.save(logits(model), tmp_path / "logits.pt")
    code = f"""
import torch
model = torch.load(r"{tmp_path / "model.pt"}", weights_only=False)
tokens = (torch.arange(14) * 5 % 97).view(2, 7)
assert torch.equal(model(tokens).logits, torch.load(r"{tmp_path / "logits.pt"}"))
import surgery
surgery.of(model).inverse.merge()
surgery.of(model).inverse.unload()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------ dtypes


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(method: str, dtype: torch.dtype) -> None:
    model = llama(1).to(dtype)
    adapted(method, model)
    nudge(model)
    plain = logits(model).float()
    with torch.autocast("cpu", torch.bfloat16):
        value = logits(model)
        untyped.autograd.backward(value.float().sum())
    assert (value.float() - plain).abs().max() < 0.05 * plain.abs().max()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == parameter.dtype == torch.float32


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    model = llama(1)
    wide = copy.deepcopy(model).double()
    model.to(dtype)
    adapted(method, model)
    nudge(model)
    adapted(method, wide)
    nudge(wide)
    assert logits(model).dtype == dtype
    wanted = logits(wide)
    room = 20 * torch.finfo(dtype).eps * wanted.abs().max()
    assert (logits(model).double() - wanted).abs().max() < room
    surgery.of(model).inverse.merge()
    assert (logits(model).double() - wanted).abs().max() < room


@every_method
@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("after", [torch.float64, torch.float32, torch.float16])
def test_an_adapted_model_may_be_cast(method: str, before: torch.dtype, after: torch.dtype) -> None:
    model = llama(1).to(before)
    compiled = adapted(method, model)
    nudge(model)
    output = logits(model).double()
    model.to(after)
    room = 20 * max(torch.finfo(before).eps, torch.finfo(after).eps) * output.abs().max()
    assert logits(model).dtype == after
    assert (logits(model).double() - output).abs().max() < room
    compiled.inverse.merge()
    assert (logits(model).double() - output).abs().max() < room
    compiled.inverse.unmerge()
    compiled.inverse.merge(undo="algebraic")
    compiled.inverse.unload()
    assert {p.dtype for p in model.parameters()} == {after}


def test_a_cast_while_merged_reaches_what_is_kept() -> None:
    model = llama(1)
    base = {n: t.double() for n, t in model.state_dict().items()}
    compiled = adapted("lora", model)
    nudge(model)
    compiled.inverse.merge()
    model.double()
    compiled.inverse.unload()
    assert all(torch.equal(t, base[n]) for n, t in model.state_dict().items())


# ------------------------------------------------------------------------------------------- hooks


@every_method
def test_gradient_checkpointing(method: str) -> None:
    gradients: list[dict[str, Tensor]] = []
    for checkpointed in (False, True):
        model = llama().train()
        adapted(method, model)
        nudge(model)
        cast(Any, model).enable_input_require_grads()
        if checkpointed:
            cast(Any, model).activation_checkpointing_enable({"use_reentrant": False})
        untyped.manual_seed(8)
        untyped.autograd.backward(logits(model).square().sum())
        named = model.named_parameters()
        gradients.append({n: cast(Tensor, p.grad) for n, p in named if p.requires_grad})
    plain, checkpoints = gradients
    assert plain.keys() == checkpoints.keys()
    assert all(torch.equal(plain[n], checkpoints[n]) for n in plain)


def test_forward_hooks_stay() -> None:
    model = llama(1)
    seen: list[tuple[int, ...]] = []
    site = model.get_submodule("model.layers.0.self_attn.q_proj")

    def note(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        del module, given
        seen.append(tuple(output.shape))

    handle = site.register_forward_hook(note)
    compiled = adapted("lora", model)
    logits(model)
    compiled.inverse.unload()
    logits(model)
    handle.remove()
    logits(model)
    assert seen == [(2, 7, 48)] * 2
