"""Adapters of a model that go, take another name, or get other weights, while it is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from surgery import mount
from surgery.algebra.scalars import did_you_mean
from surgery.distributed import settle
from surgery.errors import Report, refuse
from surgery.located import shared_parameter
from surgery.model.holder import children_of, holder_of, shared_name
from surgery.model.sharded import fill
from surgery.mounted import runs_of
from surgery.plan import Plan, PlannedSite
from surgery.state import Adapter, State
from surgery.switching import chosen, make_live, withdraw


def delete(model: nn.Module, state: State, name: str) -> None:
    """Take an adapter off a model on which it is not live; see `Compiled.delete`."""
    gone = chosen(state, name)
    _check_merged(state, name)
    if name in state.live.adapters:
        refuse(
            "E442",
            f"`{name}` is live",
            hint="activate(None), or another adapter, before it is deleted",
        )
    forget(model, state, name)
    remove(model, state, gone)


def remove(model: nn.Module, state: State, gone: Adapter) -> None:
    """Take an adapter's parameters off, and it out of all plans."""
    for site in gone.sites:
        for follower in site.site.followers:
            mount.unlink_follower(follower, site.holders)
        mount.remove_parameters(site.site.module, gone.name)
    mount.remove_parameters(model, gone.name)
    del state.adapters[gone.name]
    _replan(state, lambda plan: without(plan, gone.name))


def rename(model: nn.Module, state: State, old: str, new: str) -> None:
    """Let an adapter have another name; see `Compiled.rename`."""
    adapter = chosen(state, old)
    _check_merged(state, old)
    check_name(new)
    if new in state.adapters:
        refuse("E412", f"the model has an adapter `{new}` already", hint="use another name")
    live = state.live.renamed(old, new)
    _withdraw(model, state, old)
    for holder in {id(h): h for h in _holders(model, adapter.sites)}.values():
        children = children_of(holder)
        moved = {new if name == old else name: child for name, child in children.items()}
        children.clear()
        children.update(moved)
    for site in adapter.sites:
        for follower in site.site.followers:
            linked = mount.unlink_follower(follower, site.holders)
            if linked is not None:
                mount.link_follower(follower, (new, *site.site.at.names), linked)
    _replan(state, lambda plan: renamed(plan, old, new))
    state.adapters = {
        new if name == old else name: _called(kept, new) if name == old else kept
        for name, kept in state.adapters.items()
    }
    if state.switch.bank is not None:
        state.switch.bank.rename(old, new)
    make_live(model, state, live)


def _called(adapter: Adapter, name: str) -> Adapter:
    told = adapter.composition
    return replace(adapter, name=name, composition=told and replace(told, name=name))


def check_name(name: str) -> None:
    """Raises StateError (E443) for what cannot be the name of a module, or part of one."""
    if not name.isidentifier():
        hint = "use letters, digits and `_`, and no digit at first"
        refuse("E443", f"`{name}` is no name of an adapter", hint=hint)
    if hasattr(mount.Holder, name):
        hint = f"every module has something of that name; call it `{name}_`"
        refuse("E443", f"`{name}` is no name of an adapter", hint=hint)


def _holders(model: nn.Module, sites: Iterator[PlannedSite]) -> Iterator[nn.Module]:
    for module in (model, *(site.site.module for site in sites)):
        holder = holder_of(module)
        if holder is not None:
            yield holder


def _check_merged(state: State, name: str) -> None:
    if state.is_merged and name in state.live.adapters:
        refuse("E402", f"`{state.live}` is merged", hint="unmerge() first")


def forget(model: nn.Module, state: State, name: str) -> None:
    """Let nothing run an adapter that is about to go, and its place in a bank be free."""
    _withdraw(model, state, name)
    others = (one for other, one in state.adapters.items() if other != name)
    if not any(site.form.places for one in others for site in one.sites):
        mount.unplace(model)
    if state.switch.bank is not None:
        state.switch.bank.forget(name)


def _withdraw(model: nn.Module, state: State, name: str) -> None:
    """Forget all that some adapter is part of."""
    texts = [text for text, live in state.switch.prepared.items() if name in live.adapters]
    withdraw(model, state, texts)


# ----------------------------------------------------------------------------------- its plan


def _replan(state: State, change: Callable[[Plan], Plan]) -> None:
    """Change the plan of every adapter; those that came together share theirs."""
    before = {id(adapter.plan): adapter.plan for adapter in state.adapters.values()}
    now = {key: change(plan) for key, plan in before.items()}
    for name, adapter in state.adapters.items():
        state.adapters[name] = replace(adapter, plan=now[id(adapter.plan)])


def without(plan: Plan, name: str) -> Plan:
    """A plan without one of its adapters."""
    if name not in plan.adapters:
        return plan
    rest = tuple((own, some) for own, some in plan.resolved.adapters if own != name)
    return replace(
        plan,
        resolved=replace(plan.resolved, adapters=rest, live=None, derived=()),
        sites=tuple(site for site in plan.sites if site.adapter != name),
        shared=tuple(shared for shared in plan.shared if shared.adapter != name),
    )


def renamed(plan: Plan, old: str, new: str) -> Plan:
    """A plan in which an adapter has another name."""
    if old not in plan.adapters or old == new:
        return plan
    adapters = tuple((new if own == old else own, some) for own, some in plan.resolved.adapters)
    return replace(
        plan,
        resolved=replace(plan.resolved, adapters=adapters, live=None, derived=()),
        sites=tuple(replace(s, adapter=new) if s.adapter == old else s for s in plan.sites),
        shared=tuple(replace(s, adapter=new) if s.adapter == old else s for s in plan.shared),
    )


def names_in(plan: Plan, adapter: str) -> Iterator[str]:
    """The names in the model of all tensors of an adapter, in an order that no name changes."""
    for site in plan.sites:
        if site.adapter == adapter:
            yield from (site.adapted(p.name) for p in site.form.parameters if not p.shared)
    for shared in plan.shared:
        if shared.adapter == adapter:
            yield shared_name(adapter, plan.groups[shared.key], shared.parameter.name)


# ---------------------------------------------------------------------------------- hotswap


def put_in(model: nn.Module, state: State, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Let the parameters of an adapter have other values, in place.

    tensors: by their names in the model, each in any floating dtype. Raises StateError (E438), with
    nothing changed, for what is missing, too many, or of another shape.
    """
    settle(model, chosen(state, name))
    now = _parameters(model, state, name)
    report = Report()
    for key in sorted(now.keys() - tensors.keys()):
        report.error("E438", f"`{key}` is not given", hint="give every tensor of the adapter")
    for key in sorted(tensors.keys() - now.keys()):
        near = did_you_mean(key, tuple(now)) or f"it has {len(now)} others"
        report.error("E438", f"`{name}` has no tensor `{key}`", hint=near)
    for key in sorted(now.keys() & tensors.keys()):
        given, wanted = list(tensors[key].shape), list(now[key].shape)
        if given != wanted:
            hint = "hotswap adapters of one spec, or delete this one and attach the other"
            report.error("E438", f"`{key}` has shape {given}, not {wanted}", hint=hint)
    report.stop()
    for key, parameter in now.items():
        fill(parameter, tensors[key])
    state.adapters[name].composition = None  # of what it was
    _freeze_again(state, name)


def _parameters(model: nn.Module, state: State, name: str) -> dict[str, Tensor]:
    adapter = chosen(state, name)
    found: dict[str, Tensor] = {}
    for site in adapter.sites:
        for p in (p for p in site.form.parameters if not p.shared):
            own = mount.parameter_of(site.site.module, site.holders, p.name)
            found[site.adapted(p.name)] = own
    for shared in (s for s in adapter.plan.shared if s.adapter == name):
        group = adapter.plan.groups[shared.key]
        key = shared_name(name, group, shared.parameter.name)
        found[key] = shared_parameter(model, name, group, shared.parameter.name)
    return found


def _freeze_again(state: State, name: str) -> None:
    if not state.switch.frozen:
        return
    for site in state.adapters[name].sites:
        for module in (site.site.module, *site.site.followers):
            runs = runs_of(module)
            if runs is not None:
                runs.freeze(module)
