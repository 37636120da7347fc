"""What holds of every method on a layer whose weight lies in few bits, beside a plain one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from library_calls import CASES, derived
from support import moved
from torch import Tensor, nn

import surgery
from surgery.merging import changes
from surgery.model import storage
from surgery.model.holder import under_adapters
from surgery.model.layers import kind_of
from surgery.model.storage import inner_tensors

untyped: Any = torch

FAN_IN, FAN_OUT = 96, 160
SPEC = "match layer apply {}"
X = torch.randn((2, 5, FAN_IN), generator=torch.Generator().manual_seed(3))


def _without_chance(call: str) -> str:
    return re.sub(r",? *\w*dropout=[\d.]+", "", call).replace("(, ", "(")


def _first_of_each() -> dict[str, str]:
    calls: dict[str, str] = {}
    for call, _ in CASES:
        calls.setdefault(call.partition("(")[0], _without_chance(call))
    return {name: call for name, call in calls.items() if changes(derived(call))[0]}


METHODS = _first_of_each()
"""A call of each method that changes the weight, by its name; none drops anything by chance."""

DRAWN = ("pvera",)
"""Those that draw what they are while they are trained."""

UNSEEN = ("lora_ga",)
"""Those that begin at a gradient of the weight, which few bits have none of."""


class Alone(nn.Module):
    """One layer, [..., FAN_IN] to [..., FAN_OUT]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


Make = Callable[[], Alone]
"""A model whose layer is quantised, in training mode; equal at each call."""


def weight(module: nn.Module) -> Tensor:
    """What a layer's weight stands for [out, in]."""
    kind = kind_of(module)
    assert kind is not None
    found = storage.read(module, kind)
    assert found is not None
    return found


def dense(model: Alone) -> Alone:
    """The plain model with the very weight that the quantised one stands for."""
    made = nn.Linear(FAN_IN, FAN_OUT)
    with torch.no_grad():
        made.weight.copy_(weight(model.layer))
        made.bias.copy_(cast(Tensor, model.layer.bias))
    return Alone(made)


def bits(model: nn.Module) -> dict[str, tuple[bytes, ...]]:
    """The bytes of all parameters of a model, and of what those of other classes are made of."""
    return {n: tuple(map(_bytes, inner_tensors(p) or (p,))) for n, p in model.named_parameters()}


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def close(found: Tensor, expected: Tensor, most: float = 1e-5) -> None:
    """To a part of the largest."""
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= most * max(expected.abs().max(), 1e-6)


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def pair(make: Make, method: str, folder: Path) -> tuple[surgery.Compiled, surgery.Compiled]:
    """The same adapter on a quantised model and on the plain one beside it."""
    model = make()
    plain, spec = dense(model), SPEC.format(METHODS[method])
    beside = surgery.compile(spec, plain, seed=1, data=[X], loss=_loss)
    moved(beside)
    if method in UNSEEN:
        beside.save(folder)
        return surgery.attach(folder, model), beside
    compiled = surgery.compile(spec, model, seed=1, data=[X])
    moved(compiled)
    return compiled, beside


def _step(compiled: surgery.Compiled) -> dict[str, Tensor]:
    """One step of descent; the gradients that it took."""
    trained = _trained(compiled.model)
    optimiser: Any = torch.optim.SGD([*trained.values()], lr=1e-3)
    untyped.manual_seed(7)
    (compiled.model(X) - 1).square().mean().backward()
    assert trained
    assert [n for n, p in trained.items() if p.grad is None] == []
    gradients = {n: cast(Tensor, p.grad).clone() for n, p in trained.items()}
    optimiser.step()
    optimiser.zero_grad()
    return gradients


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    named = model.named_parameters()
    return {n: p for n, p in named if under_adapters(n) and p.requires_grad}


def _output(compiled: surgery.Compiled) -> Tensor:
    untyped.manual_seed(7)
    return compiled.model(X).detach()


def trains_like_the_plain_one(compiled: surgery.Compiled, beside: surgery.Compiled) -> None:
    """The forward, the gradients and a step; what is in few bits stays as it was."""
    layer = cast(Alone, compiled.model).layer
    held, before = layer.weight, weight(layer).clone()
    start = _output(compiled)
    close(start, _output(beside))
    mine, its = _step(compiled), _step(beside)
    assert mine.keys() == its.keys()
    assert any(bool(gradient.any()) for gradient in mine.values())
    for name, gradient in mine.items():
        close(gradient, its[name], 1e-4)
    close(_output(compiled), _output(beside))
    assert not torch.equal(_output(compiled), start)
    assert layer.weight is held
    assert torch.equal(weight(layer), before)


def merges_and_says_what_is_lost(
    compiled: surgery.Compiled, beside: surgery.Compiled, rounds: float = 1e-5
) -> None:
    """Dequantised to rounding, quantised again within the error that the report has.

    rounds: what a quantised layer rounds in its inputs, as a part of the largest output.
    """
    model = cast(Alone, compiled.model)
    held, live, before = model.layer.weight, _output(compiled), bits(model)
    compiled.inverse.merge(quantized="dequantize")
    assert type(model.layer) is nn.Linear
    close(_output(compiled), live, rounds)
    compiled.inverse.unmerge()
    assert torch.equal(_output(compiled), live)

    report = compiled.inverse.merge(quantized="requantize")
    beside.inverse.merge()
    lost = (weight(model.layer) - weight(cast(Alone, beside.model).layer)).abs().max()
    (site,) = report.sites
    assert abs(float(lost) - site.rounding.error) <= 1e-4 * float(lost) + 1e-5
    most = site.rounding.error * X.abs().sum(-1, keepdim=True)
    assert ((_output(compiled) - live).abs() <= most + (rounds + 1e-4) * live.abs().max()).all()
    compiled.inverse.unmerge()
    assert model.layer.weight is held
    assert bits(model) == before
    assert torch.equal(_output(compiled), live)
