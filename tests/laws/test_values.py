"""Layers whose own code reads the weight: an adapter reaches them by the weight that is read."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support import bits, moved
from torch import Tensor, nn

import surgery
from surgery.errors import PlanError

untyped = cast(Any, torch)

METHODS = (
    "lora(r=5, alpha=7)",
    "dora(r=5)",
    "bone(r=5)",
    "bat(r=2)",
    "miss(r=5)",
    "ia3()",
    "vera(r=5)",
    "oft(block_size=6)",
)
SHIFT = "method shift() on matrix { train t[out] = 0.5 b' = b + t }"
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


class Scaled(nn.Embedding):
    """As transformers' scaled word embeddings."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 3.0 * super().forward(*args)


class Positions(nn.Embedding):
    """As learned positions, whose input is no index."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(torch.arange(args[0].shape[1]) + 2)


class Standardised(nn.Conv1d):
    """A convolution that normalises its weight at each call."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        return nn.functional.conv1d(args[0], weight, self.bias, padding=1)


class Net(nn.Module):
    """Layers that no row knows the call of, or that are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = Scaled(30, 12)
        self.positions = Positions(18, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(12, 2, 18, dropout=0.0, batch_first=True)
        self.wave = Standardised(12, 6, 3)
        self.patched = nn.Linear(6, 12)
        plain = self.patched.forward
        vars(self.patched)["forward"] = _Twice(plain)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [n, t] to [n, t, 12]."""
        x = self.tokens(tokens) + self.positions(tokens)
        x = self.layer(x + self.attention(x, x, x, need_weights=False)[0])
        return self.patched(self.wave(x.mT).mT)


class _Twice:
    """What somebody put in the place of a layer's forward."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self.forward = forward

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * self.forward(x)


SPEC = "{tokens,positions,out_proj,linear1,linear2,wave}"


def built(dtype: torch.dtype) -> Net:
    untyped.manual_seed(5)
    return Net().eval().to(dtype)


def outputs(model: nn.Module) -> Tensor:
    return model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_laws_hold_where_the_weight_is_read(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = built(dtype)
    before, at_first = bits(model), outputs(model).detach()
    compiled = surgery.compile(f"match {SPEC} apply {method}", model)
    assert {s.path: s.form.mode for s in compiled.plan.sites} == {
        "tokens": "value",
        "positions": "value",
        "attention.out_proj": "value",
        "layer.self_attn.out_proj": "value",
        "layer.linear1": "value",
        "layer.linear2": "value",
        "wave": "value",
    }
    assert "is built whenever the weight is read" in str(compiled.plan)
    near = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.3}[dtype]
    assert (outputs(model) - at_first).abs().max() <= near
    moved(compiled)
    adapted = outputs(model).detach()
    assert (adapted - at_first).abs().max() > 2e-2
    compiled.save(tmp_path / "out")
    other = built(dtype)
    surgery.attach(tmp_path / "out", other)
    assert torch.equal(outputs(other), adapted)
    compiled.inverse.merge()
    # The very same values, rounded once in a merge and once at each call.
    assert (outputs(model) - adapted).abs().max() <= near
    compiled.inverse.unmerge()
    assert torch.equal(outputs(model), adapted)
    compiled.inverse.unload()
    assert bits(model) == before
    assert torch.equal(outputs(model), at_first)


def test_gradients_arrive_and_no_graph_breaks() -> None:
    model = built(torch.float32)
    compiled = surgery.compile(f"match {SPEC} apply lora(r=3)", model)
    moved(compiled)
    cast(Any, outputs(model).square().sum()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 7 * 2
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained)
    run = untyped.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    torch.testing.assert_close(outputs(cast(nn.Module, run)), outputs(model))


def test_copies_and_pickles_run_by_themselves() -> None:
    model = built(torch.float32)
    compiled = surgery.compile(f"match {SPEC} apply dora(r=3)", model)
    moved(compiled)
    vars(model.patched).pop("forward")
    for other in (copy.deepcopy(model), cast(nn.Module, pickle.loads(pickle.dumps(model)))):
        assert torch.equal(outputs(other), outputs(model))
        surgery.of(other).inverse.unload()
        assert outputs(other).shape == (1, 8, 12)
        assert not torch.equal(outputs(other), outputs(model))


def test_a_forward_on_the_instance_runs_on_the_adapted_weight() -> None:
    model = built(torch.float64)
    compiled = surgery.compile("match patched apply lora(r=2)", model)
    moved(compiled)
    x = torch.randn(3, 6, dtype=torch.float64)
    y = model.patched(x)
    weight = model.patched.weight
    torch.testing.assert_close(y, 2 * nn.functional.linear(x, weight, model.patched.bias))
    compiled.inverse.merge()
    torch.testing.assert_close(model.patched(x), y)
    compiled.inverse.unload()
    assert type(model.patched) is nn.Linear
    assert "forward" in vars(model.patched)


def test_a_bias_is_read_as_well() -> None:
    model = built(torch.float64)
    before = bits(model)
    compiled = surgery.compile(f"{SHIFT} match {{out_proj,linear1}} apply shift()", model)
    adapted = outputs(model)
    compiled.inverse.merge()
    torch.testing.assert_close(outputs(model), adapted, rtol=1e-11, atol=1e-11)
    compiled.inverse.unload()
    assert bits(model) == before


def test_the_state_dict_has_the_base_and_a_base_loads() -> None:
    model, other = built(torch.float32), built(torch.float32)
    names = set(model.state_dict())
    compiled = surgery.compile(f"match {SPEC} apply lora(r=3)", model)
    assert names < set(model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    missing = cast(Any, model).load_state_dict(other.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(".surgery." in key for key in missing.missing_keys)
    assert torch.equal(outputs(model), outputs(other))
    compiled.inverse.unload()


BENT = "method bent() on matrix { train l[out] = 1 y' = tanh(l * y) } match linear1 apply bent()"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [("match linear1 apply lora(dropout=0.1)", "no vector passes"), (BENT, "tanh")],
)
def test_what_is_no_weight_is_refused(spec: str, reason: str) -> None:
    model = built(torch.float32)
    before = bits(model)
    with pytest.raises(PlanError) as caught:
        surgery.compile(spec, model)
    (found,) = caught.value.diagnostics
    assert found.code == "E305"
    assert reason in found.message
    assert bits(model) == before
