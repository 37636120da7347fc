"""Methods that no library has, each a few lines of a spec: nothing else is written for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import surgery
from surgery.errors import StateError

untyped = cast(Any, torch)  # for calls whose stubs are not fully typed

GATED = """
method gated(r: int = 4) on matrix {
  train A[r, in]  ~ normal(std = 0.2)
  train B[out, r] = 0
  train d[out] = 0
  train t[out] = 0
  W' = W + tanh(t) * rows(W) + B @ A
  b' = b + d
}
"""
TURNED = """
method turned(left: int = 2) on matrix {
  train u[left * (left - 1) / 2] = 0
  train v[(in / left) * (in / left - 1) / 2] = 0
  W' = W @ kron(cayley(skew(u, left)), cayley(skew(v, in / left)))
}
"""
REFLECTED = """
method reflected(scale: float = 2) on matrix {
  train u[in] ~ normal(std = 1)
  train v[in] ~ normal(std = 1)
  train g[out] = 1
  W' = g * rows(W @ householder(u) @ householder(v))
}
"""
CURVED = """
method curved(r: int = 4) on matrix {
  train D[r, in]  ~ normal(std = 0.2)
  train U[out, r] = 0
  y' = y + gelu(x @ Dᵀ) @ Uᵀ
}
"""
METHODS = {"gated": GATED, "turned": TURNED, "reflected": REFLECTED, "curved": CURVED}
MERGEABLE = ("gated", "turned", "reflected")


class ConvNet(nn.Module):
    """Two convolutions, one of them grouped, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.second = nn.Conv2d(6, 10, (2, 3), groups=2, padding="same", padding_mode="circular")
        self.head = nn.Linear(10, 7, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        """[n, 4, h, w] to [n, 7]."""
        hidden = torch.tanh(self.second(torch.tanh(self.first(image))))
        return self.head(hidden.mean((-1, -2)))


Loss = Callable[[nn.Module], Tensor]


def llama() -> tuple[nn.Module, str, Loss]:
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
    )
    return LlamaForCausalLM(config), "/.*_proj/ in layers[*]", next_token


def gpt2() -> tuple[nn.Module, str, Loss]:
    config = GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=61, n_positions=16)
    return GPT2LMHeadModel(config), "/c_attn|c_proj|c_fc/ in h[*]", next_token


def convnet() -> tuple[nn.Module, str, Loss]:
    return ConvNet(), "*", classes


def next_token(model: nn.Module) -> Tensor:
    tokens = (torch.arange(20) * 7 % 61).view(2, 10)
    logits = cast(Tensor, model(tokens).logits)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def classes(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(6, 4, 7, 9, generator=generator)
    dtype = next(model.parameters()).dtype
    return F.cross_entropy(model(image.to(dtype)), torch.arange(6))


MODELS = {"llama": llama, "gpt2": gpt2, "convnet": convnet}
CURVED_CONVOLUTION = ("curved", "convnet")

every_model = pytest.mark.parametrize("architecture", MODELS)
every_method = pytest.mark.parametrize("name", METHODS)


def built(architecture: str) -> tuple[nn.Module, str, Loss]:
    untyped.manual_seed(5)
    model, selector, loss = MODELS[architecture]()
    return model.eval(), selector, loss


def spec(name: str, selector: str) -> str:
    return f"{METHODS[name]}\nmatch {selector} apply {name}()"


def steps(model: nn.Module, loss: Loss, count: int = 12) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=3e-2)
    losses: list[float] = []
    for _ in range(count):
        optimizer.zero_grad()
        value = loss(model)
        untyped.autograd.backward(value)
        cast(Any, optimizer).step()
        losses.append(float(value.detach()))
    return losses


def test_each_is_at_most_ten_lines() -> None:
    assert all(len(text.strip().splitlines()) <= 10 for text in METHODS.values())


@every_model
@every_method
def test_it_trains_saves_and_attaches(name: str, architecture: str, tmp_path: Path) -> None:
    model, selector, loss = built(architecture)
    base = copy.deepcopy(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    compiled = surgery.compile(spec(name, selector), model)
    losses = steps(model, loss)
    assert losses[-1] < losses[0] - 0.02
    compiled.save(tmp_path / "out")
    surgery.attach(tmp_path / "out", base)
    assert torch.equal(loss(base), loss(model))
    compiled.inverse.unload()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)


@every_model
@pytest.mark.parametrize("name", MERGEABLE)
def test_it_merges(name: str, architecture: str) -> None:
    model, selector, loss = built(architecture)
    compiled = surgery.compile(spec(name, selector), model)
    steps(model, loss, 3)
    with torch.no_grad():
        value = loss(model)
        compiled.inverse.merge()
        assert abs(float(loss(model) - value)) < 1e-5
        compiled.inverse.unmerge()
        assert torch.equal(loss(model), value)


@every_model
def test_what_is_not_affine_is_not_merged_and_says_why(architecture: str) -> None:
    model, selector, _ = built(architecture)
    compiled = surgery.compile(spec("curved", selector), model)
    assert all(s.form.derived.merge_class == "none" for s in compiled.plan.sites)
    assert "gelu" in str(compiled.plan)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match="gelu") as caught:
        compiled.inverse.merge()
    assert {d.code for d in caught.value.diagnostics} == {"E403"}
    assert all(d.span and d.hint for d in caught.value.diagnostics)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@every_model
@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_runs_on_16_bits(name: str, architecture: str, dtype: torch.dtype) -> None:
    model, selector, loss = built(architecture)
    model.to(dtype)
    before = loss(model)
    surgery.compile(spec(name, selector), model)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    value = loss(model)
    untyped.autograd.backward(value)
    assert value.dtype == dtype
    assert name == "reflected" or torch.allclose(value, before, atol=0.05)


BLENDED = """
method blended() on matrix {{
  train P[out, out] = 0.1 * eye(out)
  train s[1] = 1
  {equation}
}}
match * apply blended()
"""
EQUATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "W' = P @ W + W": lambda y, p, b: (y - b) @ p.t() + y,
    "W' = P @ W + P @ P @ W": lambda y, p, b: (y - b) @ (p + p @ p).t() + b,
    "y' = y + tanh(y @ Pᵀ)": lambda y, p, b: y + torch.tanh(y @ p.t()),
    "y' = tanh(y) @ Pᵀ + exp(y)": lambda y, p, b: torch.tanh(y) @ p.t() + torch.exp(y),
    "W' = P @ W\n b' = P @ b": lambda y, p, b: y @ p.t(),
    "W' = 3 * W + W": lambda y, p, b: 4 * (y - b) + b,
}


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_reads_the_output_of_the_layer(equation: str, dtype: torch.dtype) -> None:
    untyped.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 7)).to(dtype)
    x = torch.randn(3, 5).to(dtype)
    y, bias = model(x).double(), cast(Any, model[0]).bias.double()
    compiled = surgery.compile(BLENDED.format(equation=equation), model)
    matrix = compiled.parameters()["0.surgery.default.P"].double()
    wanted = EQUATIONS[equation](y, matrix, bias)
    room = 4 * torch.finfo(dtype).eps * (1 + float(wanted.detach().abs().max()))
    assert (model(x).double() - wanted).abs().max() < room


@pytest.mark.parametrize("groups", [1, 2])
def test_an_activation_of_patches_is_what_unfold_says(groups: int) -> None:
    untyped.manual_seed(4)
    layer = nn.Conv2d(6, 10, (2, 3), stride=(1, 2), padding=1, dilation=(2, 1), groups=groups)
    model, image = nn.Sequential(layer).double(), torch.randn(3, 6, 7, 9).double()
    before = model(image)
    compiled = surgery.compile(f"{CURVED}\nmatch * apply curved()", model)
    with torch.no_grad():
        compiled.parameters()["0.surgery.default.U"].normal_()
    down, up = compiled.parameters().values()
    patches: Tensor = (
        cast(Any, F).unfold(image, (2, 3), (2, 1), 1, (1, 2)).unflatten(1, (groups, -1))
    )
    hidden = F.gelu(torch.einsum("ngil,ri->ngrl", patches, down))
    change = torch.einsum("ngrl,gor->ngol", hidden, up.unflatten(0, (groups, -1)))
    wanted = before + change.flatten(1, 2).reshape(before.shape)
    assert torch.allclose(model(image), wanted)
