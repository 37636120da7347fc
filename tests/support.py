"""What many tests do: read a call, move an adapter from where it began, look at every bit."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import surgery
from surgery.algebra.names import Names
from surgery.arguments import Arguments, arguments
from surgery.language import syntax as ast
from surgery.language.library import Library
from surgery.language.parse import parse


def called(call: str) -> tuple[ast.Method, Arguments]:
    """The method of the library that a call names, and the value of each of its arguments."""
    (match,) = parse(f"match x apply {call}").statements
    assert isinstance(match, ast.Match)
    application = match.application
    assert isinstance(application, ast.Application)
    method = Library.standard().method(application.method)
    assert method is not None
    return method, arguments(application, method, Names({}, {}))


@contextmanager
def soon(seconds: float = 20) -> Generator[None]:
    """Processor time, with room for a busy machine: what grows too fast takes minutes."""
    begun = time.process_time()
    yield
    assert time.process_time() - begun < seconds


def moved(compiled: surgery.Compiled, adapter: str | None = None) -> None:
    """Move each parameter of an adapter, by the same amounts at each call."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, value in sorted(compiled.parameters(adapter).items()):
            if not value.is_floating_point():
                continue  # places, which are where they are
            value.add_(0.2 * torch.randn(value.shape, generator=generator, dtype=torch.float64))


class Held:
    """A tensor that somebody holds: equal to the very same one, as `is`."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and other.tensor is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


def bits(model: nn.Module) -> dict[str, bytes]:
    """The bytes of all that a model saves, by its names."""
    named = model.state_dict().items()
    return {n: t.contiguous().flatten().view(torch.uint8).numpy().tobytes() for n, t in named}
