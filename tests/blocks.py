"""A model of linear layers alone, whose sizes are distinct primes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

IN, MIDDLE, OUT = 7, 11, 5


class Block(nn.Module):
    """Two linear layers; `bias`: of the second."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(IN, MIDDLE)
        self.down = nn.Linear(MIDDLE, IN, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., IN] to the same."""
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """Two blocks and a head."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(bias), Block(bias)])
        self.head = nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        """[..., IN] to [..., OUT]."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
