"""The tensors of an adapter on a model: what sites share, what waits for its base, all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery import materialize, mount
from surgery.algebra.expr import Expr
from surgery.algebra.observed import seen
from surgery.distributed import refuse_sharded
from surgery.errors import refuse
from surgery.located import parameters_at, shared_parameter
from surgery.model.holder import SHARED, holder_of, shared_name
from surgery.model.hooked import execution_device
from surgery.plan import Plan, PlannedSite, SharedParameter
from surgery.state import Adapter, require_state


def tensors_of(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """All tensors of an adapter by their names in the model, shared ones once and whole."""
    found: dict[str, Tensor] = {}
    for site in adapter.sites:
        for p in site.form.parameters:
            if not p.shared:
                value = mount.parameter_of(site.site.module, site.holders, p.name)
                found[site.adapted(p.name)] = value.detach()
    for shared in adapter.plan.shared:
        if shared.adapter == adapter.name:
            group = adapter.plan.groups[shared.key]
            value = shared_parameter(model, adapter.name, group, shared.parameter.name)
            found[shared_name(adapter.name, group, shared.parameter.name)] = value.detach()
    return found


def begin_pending(model: nn.Module, adapter: Adapter) -> None:
    """Begin what waited on meta, where the base's weights have arrived; E461 if it is sharded."""
    if any(tensor.is_meta for tensor in tensors_of(model, adapter).values()):
        refuse_sharded(model, require_state(model), "materialized")
    for shared in adapter.plan.shared:  # before the sites, whose own may be made of them
        if shared.adapter == adapter.name:
            _begin_shared(model, adapter, shared)
    for site in adapter.sites:
        device = execution_device(site.site.module)
        if device.type == "meta":
            continue
        known = parameters_at(model, adapter.plan, site)
        ready = {n: t.detach() for n, t in known.items() if not t.is_meta}
        _refuse_unseen(site, ready)
        values = materialize.site_tensors(site, adapter.seed, ready)
        trained = frozenset(p.name for p in site.form.parameters if p.trained)
        waiting = {n: v for n, v in values.items() if known[n].device != v.device}
        mount.add_parameters(
            mount.add_holder(site.site.module, *site.holders), mount.Tensors(waiting, trained)
        )


def _refuse_unseen(site: PlannedSite, ready: Mapping[str, Tensor]) -> None:
    """E421 where what is to begin reads data, which is not passed any more."""
    for p in site.form.parameters:
        if p.name not in ready and isinstance(p.beginning, Expr) and seen([p.beginning]):
            refuse(
                "E421",
                f"`{site.adapted(p.name)}` begins with {p.begins}, which only data shows",
                hint="compile the adapter with data where the base has its weights",
            )


def _begin_shared(model: nn.Module, adapter: Adapter, shared: SharedParameter) -> None:
    device = _shared_device(adapter.plan, shared)
    group = adapter.plan.groups[shared.key]
    now = shared_parameter(model, adapter.name, group, shared.parameter.name)
    if device.type == "meta" or now.device == device:
        return
    root = holder_of(model)
    assert root is not None
    holder = mount.holder_at(root, adapter.name, SHARED, group)
    sites = _in_order(model, adapter.plan) if now.is_meta else ()
    _keep_shared(holder, shared, device, adapter.seed, None if now.is_meta else now.detach(), sites)


def add_banks(
    model: nn.Module, made: Plan, seed: int, given: Mapping[str, Tensor]
) -> dict[str, mount.Holder]:
    """The parameters that sites share, on the root; gives the holder of each adapter's.

    given: values to use instead of the beginnings, by their names in the model.
    """
    banks: dict[str, mount.Holder] = {}
    for shared in made.shared:
        group = made.groups[shared.key]
        child = mount.add_holder(model, shared.adapter)
        bank = mount.holder_at(child, SHARED)
        banks[shared.adapter] = bank
        value = given.get(shared_name(shared.adapter, group, shared.parameter.name))
        holder, device = mount.holder_at(bank, group), _shared_device(made, shared)
        sites = _in_order(model, made) if value is None else ()
        _keep_shared(holder, shared, device, seed, value, sites)
    return banks


def _in_order(model: nn.Module, made: Plan) -> Sequence[PlannedSite]:
    """The sites as the model has them, where what is shared begins with the W of all."""
    begun = (s.parameter.beginning for s in made.shared)
    if not any(isinstance(b, Expr) and b.args for b in begun):
        return made.sites
    untyped: Any = model  # whose types are not complete
    places = {name: i for i, (name, _) in enumerate(untyped.named_modules())}
    return sorted(made.sites, key=lambda site: places.get(site.site.owner, len(places)))


def _shared_device(made: Plan, shared: SharedParameter) -> torch.device:
    module = next(s.site.module for s in made.sites if s.adapter == shared.adapter)
    return execution_device(module)


def _keep_shared(
    holder: mount.Holder,
    shared: SharedParameter,
    device: torch.device,
    seed: int,
    value: Tensor | None,
    sites: Sequence[PlannedSite],
) -> None:
    """Let a holder have a shared parameter: a given value, or its beginning."""
    if value is None:
        value = materialize.shared_tensor(shared, seed, device, sites)
    value = materialize.placed(value, device, shared.dtype)
    parameter = nn.Parameter(value, requires_grad=shared.parameter.trained)
    holder.register_parameter(shared.parameter.name, parameter)
