"""Activation checkpoints: what a backward pass computes again has live what its forward had.

transformers keeps the function that makes a checkpoint on each module that may be one. Here that
function is wrapped on the modules of one model, and again whenever the model sets it; nothing of
the library is changed.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery import switch
from surgery.calls import positions
from surgery.model.holder import every_module

_CHECKPOINT, _SETS = "_gradient_checkpointing_func", "_set_gradient_checkpointing"

Checkpoint = Callable[..., Any]
"""Calls its first argument with all others, as `torch.utils.checkpoint.checkpoint` does."""


def repeating(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function that whenever it runs, and wherever, has live what is live in this thread now.

    For `torch.utils.checkpoint.checkpoint(surgery.repeating(layer), x)`: what is computed again in
    a backward pass then runs the adapters of its forward, for the tokens of its forward.
    """
    again, call = switch.repeating(run), positions.current()

    def placed(*args: Any, **kwargs: Any) -> Any:
        with positions.repeated(call):
            return again(*args, **kwargs)

    return placed


@dataclass(frozen=True, slots=True)
class Repeated:
    """A checkpoint, in which what is computed again has live what is live at the call."""

    checkpoint: Checkpoint

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the checkpoint gives."""
        if not torch.compiler.is_compiling():  # a compiled backward has what it runs in it
            run = repeating(run)
        return self.checkpoint(run, *args, **kwargs)


class _Setting:
    """The method by which a model gets its checkpoints; each of them is then repeated.

    It is on the instance, and goes by the class, so that copies and pickles have it too. It does
    not keep the model alive: a model's memory is free as soon as the last name of it is gone.
    """

    __slots__ = ("_model",)

    def __init__(self, model: nn.Module) -> None:
        """For one model."""
        self._model = weakref.ref(model)

    def __getstate__(self) -> tuple[nn.Module | None]:
        """The model as it is, so that a copy has the copy."""
        return (self._model(),)

    def __setstate__(self, state: tuple[nn.Module]) -> None:
        """Belong to a copy of the model."""
        self._model = weakref.ref(state[0])

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """The class's own method, after which what it set is wrapped."""
        model = self._model()
        assert model is not None  # whoever calls this has it
        getattr(type(model), _SETS)(model, *args, **kwargs)
        _wrap(model)


def follow(model: nn.Module) -> None:
    """Let all checkpoints of a model's modules repeat what is live, now and once they are set.

    It may be called again, and does nothing for modules that know no checkpoints.
    """
    _wrap(model)
    for module in _setting(model):
        vars(module).setdefault(_SETS, _Setting(module))


def unfollow(model: nn.Module) -> None:
    """Take back what `follow` did."""
    for module in every_module(model):
        own = vars(module)
        if isinstance(own.get(_SETS), _Setting):
            del own[_SETS]
        if isinstance(known := own.get(_CHECKPOINT), Repeated):
            own[_CHECKPOINT] = known.checkpoint


def _wrap(model: nn.Module) -> None:
    for module in every_module(model):
        own = vars(module)
        if _CHECKPOINT in own and not isinstance(own[_CHECKPOINT], Repeated):
            own[_CHECKPOINT] = Repeated(own[_CHECKPOINT])


def _setting(model: nn.Module) -> Iterator[nn.Module]:
    """The modules with such a method, but not those with the older one that sets one module."""
    for module in every_module(model):
        method = getattr(type(module), _SETS, None)
        if method is not None and "value" not in inspect.signature(method).parameters:
            yield module


__all__ = ["Repeated", "follow", "repeating", "unfollow"]
