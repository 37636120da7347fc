"""Where the parameters of a site lie on a model."""

from __future__ import annotations

from torch import Tensor, nn

from surgery.algebra.equations import Parameter
from surgery.model.holder import SHARED, children_of, holder_of
from surgery.mount import parameter_of
from surgery.plan import Plan, PlannedSite


def parameters_at(model: nn.Module, plan: Plan, site: PlannedSite) -> dict[str, Tensor]:
    """The parameters of a site, shared ones cut to what it uses."""
    own = {
        p.name: parameter_of(site.site.module, site.holders, p.name)
        for p in site.form.parameters
        if not p.shared
    }
    return {**own, **shared_at(model, plan, site)}


def shared_at(model: nn.Module, plan: Plan, site: PlannedSite) -> dict[str, Tensor]:
    """The shared parameters of a site by the names that they have there, cut to what it uses."""
    found: dict[str, Tensor] = {}
    for p in site.form.parameters:
        if not p.shared:
            continue
        value = shared_tensor_of(model, plan, site, p)
        for axis, length in enumerate(site.form.shapes[p.name]):
            if value.shape[axis] != length:
                value = value.narrow(axis, 0, length)
        found[p.name] = value
    return found


def shared_tensor_of(model: nn.Module, plan: Plan, site: PlannedSite, p: Parameter) -> Tensor:
    """A shared parameter of a site, whole."""
    key = site.form.bank(site.adapter, p)
    return shared_parameter(model, site.adapter, plan.groups[key], p.declared_name)


def shared_parameter(model: nn.Module, adapter: str, group: str, name: str) -> Tensor:
    """A parameter that is kept once, on the root."""
    at: nn.Module | None = holder_of(model)
    for part in (adapter, SHARED, group):
        at = None if at is None else children_of(at).get(part)
    assert at is not None
    return vars(at)["_parameters"][name]
