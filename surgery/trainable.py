"""What of a model is trained: which adapters' parameters require gradients, whatever is live."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple, cast

from torch import nn

from surgery.algebra.equations import Parameter
from surgery.errors import Report
from surgery.live import unknown_adapter
from surgery.located import shared_tensor_of
from surgery.model.holder import shared_name
from surgery.model.sharded import put_apart
from surgery.mount import parameter_of
from surgery.planned import PlannedSite
from surgery.state import Adapter, require_state


class Owned(NamedTuple):
    """A parameter of an adapter: its name in the model, and one of the sites that have it."""

    name: str
    value: nn.Parameter
    parameter: Parameter
    site: PlannedSite


def owned(model: nn.Module, adapter: Adapter) -> Iterator[Owned]:
    """Every parameter of an adapter, those that sites share once and whole."""
    seen: set[str] = set()
    for site in adapter.sites:
        for p in site.form.parameters:
            if not p.shared:
                value = parameter_of(site.site.module, site.holders, p.name)
                yield Owned(site.adapted(p.name), value, p, site)
                continue
            group = adapter.plan.groups[site.form.bank(site.adapter, p)]
            name = shared_name(adapter.name, group, p.declared_name)
            if name not in seen:
                seen.add(name)
                shared = shared_tensor_of(model, adapter.plan, site, p)
                yield Owned(name, cast(nn.Parameter, shared), p, site)


def trained(model: nn.Module, adapter: Adapter) -> list[Owned]:
    """The parameters of an adapter that its methods train, whether they are frozen now or not."""
    return [one for one in owned(model, adapter) if one.parameter.trained]


def trainable(model: nn.Module) -> tuple[str, ...]:
    """The adapters of which a parameter requires gradients, in the order in which they came.

    Raises StateError (E401) for a model without adapters.
    """
    adapters = require_state(model).adapters.values()
    return tuple(
        one.name for one in adapters if any(o.value.requires_grad for o in trained(model, one))
    )


def set_trainable(model: nn.Module, names: Iterable[str]) -> None:
    """Let the parameters that some adapters train require gradients, and those of no other.

    names: of adapters, live or not; none of them to train nothing. What is live does not change,
    nor do the base's parameters. Raises StateError: E401 for a model without adapters, E411 with
    every name that is none of an adapter, and nothing changed.
    """
    state, wanted = require_state(model), tuple(names)
    report = Report()
    report.extend(
        unknown_adapter(name, state.adapters, code="E411")
        for name in wanted
        if name not in state.adapters
    )
    report.stop()
    require_gradients(model, state.adapters.values(), wanted)


def require_gradients(
    model: nn.Module, adapters: Iterable[Adapter], names: Collection[str]
) -> None:
    """Let what some adapters train require gradients where their names are given, else none."""
    put_apart(model)  # a flag of a parameter that is whole for a while is lost
    for adapter in adapters:
        for one in trained(model, adapter):
            one.value.requires_grad_(adapter.name in names)
