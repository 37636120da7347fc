"""Parameter groups for an optimizer: what is trained, by its learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import isfinite
from typing import Any, Protocol

from torch import nn

from surgery.distributed import unwrapped
from surgery.errors import Report, refuse
from surgery.live import unknown_adapter
from surgery.rating import lr_of
from surgery.state import Adapter, State, require_state
from surgery.trainable import Owned, trained

Decay = float | Callable[[str, nn.Parameter], float]
"""A weight decay for all, or one for a parameter by its name in the model."""


class Handle(Protocol):
    """What has an adapted model."""

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        ...


def groups(
    model: nn.Module | Handle,
    lr: float,
    adapter: str | Iterable[str] | None = None,
    *,
    weight_decay: Decay | None = None,
) -> list[dict[str, Any]]:
    """The parameter groups of an adapted model, one a learning rate and weight decay.

    lr: the learning rate, of which `lr = 16x` in a method or a statement is a multiple. adapter:
        one or some by name; by default all of which something requires gradients. weight_decay: a
        number, or what gives one for a parameter and its name; without it the optimizer's own.
    Gives dictionaries with `name`, `params`, `lr` and, if it is asked for, `weight_decay`, as
    `torch.optim` takes them: every parameter that is trained is in one of them, none of the base.
    Raises StateError: E401 for a model without adapters, E411 for an unknown adapter, E450 where
    nothing requires gradients, E452 for a learning rate or decay that is none.
    """
    target = unwrapped(model if isinstance(model, nn.Module) else model.model)
    state = require_state(target)
    _check_lr(lr)
    asked = _asked(state, adapter)
    found: dict[tuple[float, float | None], list[nn.Parameter]] = {}
    for one in _learning(target, asked):
        decay = _decay(one, weight_decay)
        found.setdefault((_rate(one, lr), decay), []).append(one.value)
    if not found:
        _refuse_frozen(asked)
    return [_group(rate, decay, values) for (rate, decay), values in found.items()]


def _group(lr: float, decay: float | None, params: list[nn.Parameter]) -> dict[str, Any]:
    said = {"lr": lr} if decay is None else {"lr": lr, "weight_decay": decay}
    return {"name": ", ".join(f"{n}={v!r}" for n, v in said.items()), "params": params, **said}


def _learning(model: nn.Module, adapters: Iterable[Adapter]) -> Iterator[Owned]:
    for adapter in adapters:
        yield from (one for one in trained(model, adapter) if one.value.requires_grad)


def _asked(state: State, adapter: str | Iterable[str] | None) -> list[Adapter]:
    if adapter is None:
        return [*state.adapters.values()]
    names = (adapter,) if isinstance(adapter, str) else tuple(dict.fromkeys(adapter))
    report = Report()
    report.extend(
        unknown_adapter(n, state.adapters, code="E411") for n in names if n not in state.adapters
    )
    report.stop()
    return [state.adapters[name] for name in names]


def _rate(one: Owned, lr: float) -> float:
    return float(lr_of(one.parameter, one.site.rates, lr))


def _check_lr(lr: object) -> None:
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not (isfinite(lr) and lr > 0):
        refuse("E452", f"{lr!r} is no learning rate", hint="give a number above 0, such as 1e-4")


def _decay(one: Owned, decay: Decay | None) -> float | None:
    value = decay(one.name, one.value) if callable(decay) else decay
    return None if value is None else _checked_decay(value, one.name)


def _checked_decay(value: object, name: str) -> float:
    if not (isinstance(value, int | float) and 0 <= value < float("inf")):
        message = f"{value!r} is no weight decay, here of `{name}`"
        refuse("E452", message, hint="give a number from 0 on, such as 0.01")
    return float(value)


def _refuse_frozen(asked: Iterable[Adapter]) -> None:
    """E450, for adapters that are all frozen, or whose methods train nothing."""
    adapters = [*asked]
    able = [one.name for one in adapters if _trains(one)]
    shown = " and ".join(f"`{one.name}`" for one in adapters)
    thawed = f"compiled.train_only({', '.join(map(repr, able))}) lets them be trained"
    none = "their methods train nothing; declare parameters with `train`"
    message = f"nothing of {shown or 'no adapter'} requires gradients: nothing would be trained"
    refuse("E450", message, hint=thawed if able else none)


def _trains(adapter: Adapter) -> bool:
    return any(p.trained for site in adapter.sites for p in site.form.parameters)
