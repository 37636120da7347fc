"""Where an equation divides by nothing: equal, dependent and vanishing directions."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import surgery

untyped = cast(Any, torch)


def made(call: str, u: Tensor) -> tuple[surgery.Compiled, Tensor]:
    """A method on a layer from 13 to 7, with such directions; and an input."""
    untyped.manual_seed(2)
    model = nn.Sequential(nn.Linear(13, 7))
    compiled = surgery.compile(f"match * apply {call}", model)
    (mine,) = (p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        mine.copy_(u)
    return compiled, torch.randn(5, 13)


def directions(*vanishing: int) -> Tensor:
    """Five columns of 13: the third is the first, the fourth is of the first two."""
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(13, 5, generator=generator)
    u[:, vanishing] = 0
    u[:, 2], u[:, 3] = u[:, 0], u[:, 0] - 3 * u[:, 1]
    return u


@pytest.mark.parametrize("vanishing", [(), (1,), (0, 4), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("call", ["hra(r=5)", "hra(r=5, apply_GS=true)"])
def test_forward_is_merge_where_directions_are_dependent(
    call: str, vanishing: tuple[int, ...]
) -> None:
    compiled, x = made(call, directions(*vanishing))
    live = cast(Tensor, compiled.model(x))
    assert live.isfinite().all()
    untyped.autograd.backward(live.square().sum())
    assert all(p.grad is None or p.grad.isfinite().all() for p in compiled.model.parameters())
    compiled.inverse.merge()
    torch.testing.assert_close(compiled.model(x), live, atol=2e-6, rtol=1e-5)
    compiled.inverse.unmerge()
    torch.testing.assert_close(compiled.model(x), live, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("vanishing", [(), (1,)])
def test_dependent_columns_do_as_little_as_zeros(vanishing: tuple[int, ...]) -> None:
    u = directions(*vanishing)
    kept = u.clone()
    kept[:, 2:4] = 0
    first, x = made("hra(r=5, apply_GS=true)", u)
    second, _ = made("hra(r=5, apply_GS=true)", kept)
    torch.testing.assert_close(first.model(x), second.model(x), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("call", ["hra(r=5)", "hra(r=5, apply_GS=true)"])
def test_a_direction_that_vanishes_reflects_nothing(call: str) -> None:
    compiled, x = made(call, torch.zeros(13, 5))
    live = cast(Tensor, compiled.model(x))
    torch.testing.assert_close(live, compiled.inverse.unload()(x))
