"""What adapters a model has, site by site and as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from surgery.located import parameters_at
from surgery.model.layers import base_class
from surgery.planned import PlannedSite
from surgery.state import State, require_state

Irregular = Literal["irregular"]


@dataclass(frozen=True, slots=True)
class LayerStatus:
    """One site: what is there, what is live, what is merged, and what is trained."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """The same of a model, and how many numbers it has."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]


def layer_status(model: nn.Module) -> list[LayerStatus]:
    """Every site of a model, in module order. Raises StateError (E401)."""
    state = require_state(model)
    sites: dict[str, dict[str, PlannedSite]] = {}
    for adapter in state.adapters.values():
        for site in adapter.sites:
            sites.setdefault(site.path, {})[adapter.name] = site
    return [_at(model, state, path, own) for path, own in sites.items()]


def _at(model: nn.Module, state: State, path: str, own: Mapping[str, PlannedSite]) -> LayerStatus:
    live = [name for name in state.live.adapters if name in own]
    tensors = {n: parameters_at(model, state.adapters[n].plan, s) for n, s in own.items()}
    trained = {
        name: [tensors[name][p.name].requires_grad for p in site.form.parameters if p.trained]
        for name, site in own.items()
    }
    site = next(iter(own.values()))
    return LayerStatus(
        name=path,
        module_type=f"{site.form.named}.{base_class(site.site.module).__name__}",
        enabled=bool(state.live),
        active_adapters=live,
        merged_adapters=live if state.is_merged else [],
        requires_grad={name: _whether(flags) for name, flags in trained.items()},
        available_adapters=sorted(own),
        devices={name: _devices(some.values()) for name, some in tensors.items()},
    )


def _whether(flags: Sequence[bool]) -> bool | Irregular:
    if all(flags):
        return True
    return "irregular" if any(flags) else False


def _devices(tensors: Iterable[Tensor]) -> list[str]:
    return sorted({t.device.type for t in tensors})


def model_status(model: nn.Module) -> ModelStatus:
    """The adapters of a model. Raises StateError (E401)."""
    state, layers = require_state(model), layer_status(model)
    configs = cast("Mapping[str, Any]", vars(model).get("peft_config", {}))
    kinds = {name: str(config.peft_type) for name, config in configs.items()}
    trained, total = counts(model)
    live, names = [*state.live.adapters], sorted(state.adapters)
    flags = {n: [s.requires_grad[n] for s in layers if n in s.requires_grad] for n in names}
    return ModelStatus(
        base_model_type=base_class(model).__name__,
        adapter_model_type="BaseTuner",
        peft_types=kinds,
        trainable_params=trained,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=bool(state.live),
        active_adapters=live,
        merged_adapters=live if state.is_merged else [],
        requires_grad={
            n: "irregular" if "irregular" in some else _whether([f is True for f in some])
            for n, some in flags.items()
        },
        available_adapters=names,
        devices={n: sorted({d for s in layers for d in s.devices.get(n, ())}) for n in names},
    )


def counts(model: nn.Module) -> tuple[int, int]:
    """How many numbers are trained, and how many there are; packed ones count as what they are."""
    trained = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if type(parameter).__name__ == _HALVES:  # two numbers in a byte
            count *= 2 * parameter.element_size()
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total


_HALVES = "Params4bit"
