"""A model with one layer of every kind, for the laws that do not turn on shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from surgery import merged

untyped = cast(Any, torch)  # for calls whose stubs are not fully typed


class Net(nn.Module):
    """Every kind of layer; sizes are multiples of six, so that every method fits."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 18)
        self.first = nn.Linear(18, 42)
        self.middle = Conv1D(66, 42)
        self.last = nn.Linear(66, 12, bias=False)
        self.image = nn.Conv2d(6, 12, (3, 2), stride=(1, 2), padding=1, dilation=(1, 2))
        self.grouped = nn.Conv2d(12, 12, 3, groups=2, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(12)
        self.wave = nn.Conv1d(
            12, 6, 3, stride=2, padding=4, dilation=2, groups=2, padding_mode="circular"
        )
        self.volume = nn.Conv3d(
            6, 12, (2, 3, 1), stride=(1, 2, 1), padding=(0, 2, 1), dilation=(1, 2, 1), groups=2
        )
        self.register_buffer("grid", torch.arange(6.0))
        self.first.weight.requires_grad_(False)
        self.norm.eval()

    def forward(self, tokens: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [n, t] to [n, 6, t'], and an image [n, 6, h, w] to [n, 12, 1, h', w']."""
        hidden = torch.tanh(self.first(self.table(tokens)))
        hidden = torch.tanh(self.middle(hidden))
        image = self.norm(self.grouped(self.image(image)))
        return self.wave(self.last(hidden).mT), self.volume(image.unflatten(1, (6, 2)))


MakeNet = Callable[[torch.dtype], nn.Module]
Run = Callable[[nn.Module], tuple[Tensor, Tensor]]


@pytest.fixture
def make_net() -> MakeNet:
    """A new model of a dtype, always with the same weights."""

    def make(dtype: torch.dtype) -> nn.Module:
        untyped.manual_seed(3)
        return Net().to(dtype)

    return make


@pytest.fixture
def run() -> Run:
    """The two outputs of a model on a fixed input of its own dtype."""

    def outputs(model: nn.Module) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(2)
        dtype = next(p.dtype for p in model.parameters())
        tokens = torch.randint(0, 30, (2, 5), generator=generator)
        return model(tokens, torch.randn(2, 6, 7, 9, generator=generator).to(dtype))

    return outputs


@pytest.fixture
def train() -> Callable[[nn.Module], None]:
    """Move every parameter that is trained, away from where it began."""

    def move(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))

    return move


@pytest.fixture(scope="module")
def corrected() -> Iterator[None]:
    """A merge keeps corrections of small weights too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merged, "LEAST", 0)
        yield
