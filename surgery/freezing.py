"""Frozen for inference: what depends on parameters alone is computed once, until it is thawed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from surgery.distributed import refuse_sharded
from surgery.errors import refuse
from surgery.model.holder import every_module
from surgery.mounted import Runs, runs_of
from surgery.state import State, state_of


def freeze(model: nn.Module, state: State) -> None:
    """Compute it, of all that the model can run now and will; see `Compiled.freeze`."""
    if any(module.training for module, _ in _mounted(model)):
        refuse("E441", "the model is in training mode", hint="eval() it before it is frozen")
    refuse_sharded(model, state, "frozen")
    with state.switch.changing:  # what another thread prepares meanwhile is frozen as it comes
        try:
            for module, runs in _mounted(model):
                runs.freeze(module)
        except BaseException:
            thaw(model, state)
            raise
        state.switch.frozen = True
    vars(model)["train"] = _Train(model)


def thaw(model: nn.Module, state: State) -> None:
    """Undo `freeze`."""
    with state.switch.changing:
        state.switch.frozen = False
        for _, runs in _mounted(model):
            runs.thaw()
    vars(model).pop("train", None)


@contextmanager
def frozen(model: nn.Module, state: State) -> Generator[None]:
    """Frozen within a `with`; where it was frozen before, it stays so."""
    was = state.switch.frozen
    freeze(model, state)
    try:
        yield
    finally:
        if not was:
            thaw(model, state)


def _mounted(model: nn.Module) -> list[tuple[nn.Module, Runs]]:
    found = ((module, runs_of(module)) for module in every_module(model))
    return [(module, runs) for module, runs in found if runs is not None]


@dataclass(frozen=True, slots=True)
class _Train:
    """The method of that name of a model, on the instance, while it is frozen."""

    model: nn.Module

    def __call__(self, mode: bool = True) -> nn.Module:
        """As the class's own. Raises StateError (E441) for training."""
        state = state_of(self.model)
        if mode and state is not None and state.switch.frozen:
            refuse("E441", "the model is frozen for inference", hint="thaw() it before training")
        return type(self.model).train(self.model, mode)
