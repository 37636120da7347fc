"""Noise: what is random about an activation in training, and nothing elsewhere."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.overrides import handle_torch_function, has_torch_function

from surgery.algebra.equations import Equations
from surgery.algebra.expr import walk
from surgery.algebra.values import Facts


def noise(facts: Facts, deviation: Tensor) -> Tensor:
    """The mean of what is drawn, which is 0; of the shape of the deviations."""
    return torch.zeros_like(deviation)


def drawn(deviation: Tensor, training: Any) -> Tensor:
    """Normal numbers of these deviations, of the device's own generator; zeros but in training."""
    if isinstance(deviation, fx.Proxy):  # one node, since what it does is told by the mode
        arguments = (deviation, training)
        return cast(Tensor, deviation.tracer.create_proxy("call_function", drawn, arguments, {}))
    if has_torch_function((deviation,)):
        return handle_torch_function(drawn, (deviation,), deviation, training)
    return deviation * torch.randn_like(deviation) if training else torch.zeros_like(deviation)


TOGETHER = ("tokens", "rows", "scaled rows", "whole")
"""What `drop(p, together)` drops at once: elements of each token; the same of all tokens of a call,
what is left as it is or divided by the part that is left; or all or nothing of a call."""


def dropped(x: Tensor, probability: float, together: str, training: Any) -> Tensor:
    """Some of the last axis of x [..., n] dropped, which of them is drawn once for all tokens."""
    if isinstance(x, fx.Proxy):
        arguments = (x, probability, together, training)
        return cast(Tensor, x.tracer.create_proxy("call_function", dropped, arguments, {}))
    if not training:
        return x
    count = 1 if together == "whole" else x.shape[-1]
    kept = (torch.rand(count, device=x.device) > probability).float()
    if together == "scaled rows":
        kept = kept / kept.mean().clamp(min=1 / count)  # where nothing is left, nothing is divided
    return x * kept.to(x.dtype)


def noisy(equations: Equations) -> bool:
    """Whether what a forward gives in training has noise in it."""
    roots = (equations.input, equations.output)
    return any(e.op == "noise" for root in roots if root is not None for e in walk(root))
