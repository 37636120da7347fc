"""Layers that are not called by who reads their weight: found in the code of what is above them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.model.bypassed import read_by, reads

library = cast(Any, transformers)

READ_IN_TRANSFORMERS = {
    "bamba.BambaMixer": {"conv1d", "norm", "out_proj"},
    "clip.CLIPVisionEmbeddings": {"position_embedding"},
    "falcon_mamba.FalconMambaMixer": {"conv1d", "dt_proj", "out_proj", "x_proj"},
    "jamba.JambaMambaMixer": {"conv1d", "dt_proj"},
    "lfm2.Lfm2ShortConv": {"conv"},
    "mamba.MambaMixer": {"conv1d", "dt_proj", "out_proj", "x_proj"},
    "mamba2.Mamba2Mixer": {"conv1d", "norm", "out_proj"},
    "qwen3_next.Qwen3NextGatedDeltaNet": {"conv1d"},
    "recurrent_gemma.RecurrentGemmaRecurrentBlock": {"conv_1d"},
    "zamba2.Zamba2MambaMixer": {"conv1d", "norm", "out_proj"},
    # only its dtype is asked for
    "t5.T5DenseGatedActDense": set[str](),
    "llama.LlamaAttention": set[str](),
}


@pytest.mark.parametrize("owner", READ_IN_TRANSFORMERS)
def test_owners_in_transformers(owner: str) -> None:
    model, name = owner.split(".")
    cls = getattr(import_module(f"transformers.models.{model}.modeling_{model}"), name)
    found = {".".join(chain) for chain in reads(cls)}
    assert READ_IN_TRANSFORMERS[owner] <= found
    assert READ_IN_TRANSFORMERS[owner] or not found


def test_owners_in_torch() -> None:
    assert reads(nn.MultiheadAttention) == {("out_proj",)}
    layers = {("linear1",), ("linear2",), ("self_attn", "out_proj")}
    assert layers <= reads(nn.TransformerEncoderLayer)
    assert reads(nn.Linear) == reads(nn.Sequential) == frozenset()


def test_a_setting_may_say_that_a_weight_is_not_read() -> None:
    config = library.BloomConfig(hidden_size=24, n_layer=1, n_head=4, vocab_size=31)
    attention = library.BloomModel(config).h[0].self_attention
    assert not read_by(attention, ("dense",))
    attention.pretraining_tp, attention.slow_but_exact = 2, True
    assert read_by(attention, ("dense",))


class Owner(nn.Module):
    """A layer that is called, and read besides, in one way or another."""

    layer: Any
    inner: Any

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.inner = nn.Sequential()
        self.inner.add_module("layer", nn.Linear(6, 6))
        self.layer.weight.data.mul_(0.5)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.layer.weight)

    def fuse_projections(self) -> None:
        self.layer.weight.data.add_(self.inner.layer.weight)


class Functional(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias)


class Tied(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ self.layer.weight.t()


class Deep(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.layer.weight)


class Helper(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x)

    def helper(self, x: Tensor) -> Tensor:
        def inside() -> Tensor:
            return x @ self.layer.weight

        return inside()


class Inherited(Helper):
    pass


class Asking(Owner):
    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer.weight, nn.Parameter) and self.layer.bias is not None:
            x = x.to(self.layer.weight.dtype).view(-1, self.layer.weight.shape[1])
        return self.layer(x)


class Overridden(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    ("cls", "chains"),
    [
        (Functional, {("layer",)}),
        (Tied, {("layer",)}),
        (Deep, {("inner", "layer")}),
        (Helper, {("layer",)}),
        (Inherited, {("layer",)}),
        (Asking, set[tuple[str, ...]]()),
        (Overridden, set[tuple[str, ...]]()),
    ],
)
def test_what_a_forward_reads(cls: type[Owner], chains: set[tuple[str, ...]]) -> None:
    assert reads(cls) == chains


@pytest.mark.parametrize("cls", [Functional, Tied, Deep, Helper, Asking])
def test_an_adapter_reaches_every_use(cls: Callable[[], Owner]) -> None:
    cast(Any, torch).manual_seed(3)
    model = cls().double()
    x = torch.randn(5, 6, dtype=torch.float64)
    compiled = surgery.compile("match layer apply lora(r=2)", model)
    with torch.no_grad():
        for value in compiled.parameters().values():
            value.add_(0.3)
    adapted = model(x)
    modes = {site.path: site.form.mode for site in compiled.plan.sites}
    compiled.inverse.merge()
    assert (model(x) - adapted).abs().max() < 1e-12
    assert ("value" in modes.values()) == (cls is not Asking)
