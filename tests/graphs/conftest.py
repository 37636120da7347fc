"""A network with functional uses of its own parameters, as modules, as a trace and as a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

untyped = cast(Any, torch)  # for calls whose stubs are not fully typed

Make = Callable[[], Any]


class Net(nn.Module):
    """Convolutions, linear layers and bare parameters; several are used by functions, or twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.kernel = nn.Parameter(0.1 * torch.randn(12, 4, 3, 5))
        self.layers = nn.Sequential(
            nn.Conv2d(12, 20, 3, padding="same", padding_mode="circular"),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(20, 8, (1, 3), groups=2, dilation=2, bias=False),
            nn.Identity(),
        )
        self.head = nn.Linear(8, 12)
        self.square = nn.Parameter(0.3 * torch.randn(12, 12))
        self.tall = nn.Parameter(0.3 * torch.randn(20, 12))
        self.offset = nn.Parameter(torch.randn(20))
        self.blocks = nn.ModuleList([nn.Linear(20, 20), nn.Linear(20, 20)])

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, 3, h, w] to [n, 20]."""
        x = F.relu(self.first(x))
        x = F.conv2d(x, self.kernel, None, stride=(2, 1), padding=(1, 2), groups=2)
        x = self.head(self.layers(x).mean((-1, -2)))
        x = F.linear(torch.tanh(F.linear(x, self.square)), self.square)
        x = F.linear(x, self.tall, self.offset)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def new_net() -> nn.Module:
    untyped.manual_seed(3)
    return Net().double().eval()


@pytest.fixture
def make_net() -> Make:
    """A new network in float64, always with the same weights."""

    return new_net


@pytest.fixture(scope="session")
def image() -> Tensor:
    """A batch for the network."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 3, 17, 19, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="session")
def program(image: Tensor) -> torch.export.ExportedProgram:
    """The network as a program, which no test changes but for the flags of its parameters."""
    return torch.export.export(new_net(), (image,))


@pytest.fixture
def as_graph(program: torch.export.ExportedProgram) -> Callable[[str], Any]:
    """The network as a trace, as a program, or as the graph that a program is."""

    def make(form: str) -> Any:
        if form == "traced":
            return torch.fx.symbolic_trace(new_net())
        for parameter in program.parameters():
            parameter.requires_grad_(True)
        return program if form == "program" else program.module()

    return make


@pytest.fixture
def train() -> Callable[[nn.Module], None]:
    """Move every parameter that is trained, the same in whatever form the model is."""

    def move(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.2 * noise.to(parameter.dtype))

    return move
