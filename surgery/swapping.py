"""Saved adapters on a model: the plan of one that comes, and other weights for one on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from surgery import mount
from surgery.adapters import check_name, names_in, put_in, remove, renamed
from surgery.artifact import Loaded, check_tensors, load_artifact
from surgery.bank import Bank
from surgery.digests import check_base
from surgery.distributed import refuse_new
from surgery.errors import Report, refuse
from surgery.located import shared_at
from surgery.materialize import given_at, site_tensors
from surgery.plan import Plan, PlannedSite, plan_assignments
from surgery.reserving import admit_again, strangers
from surgery.state import Adapter, State
from surgery.switching import chosen, prepare, withdraw


def loaded_plan(
    folder: Path, model: nn.Module, dtype: torch.dtype | None, name: str | None
) -> tuple[Plan, Loaded]:
    """What a folder puts on a model, under a name of its own or of the caller's.

    Raises ArtifactError for a folder that is not whole, PlanError where it does not fit the model,
    StateError (E443) for what is no name.
    """
    loaded = load_artifact(folder, model)
    own = loaded.adapter
    made = plan_assignments(loaded.resolved, model, loaded.assignments, own, dtype)
    check_tensors(made, loaded)
    if name is None or name == own:
        return made, loaded
    check_name(name)
    plan = renamed(made, own, name)
    names = dict(zip(names_in(made, own), names_in(plan, name), strict=True))
    tensors = {names[key]: tensor for key, tensor in loaded.tensors.items()}
    return plan, replace(loaded, adapter=name, tensors=tensors)


def hotswap(
    model: nn.Module,
    state: State,
    name: str,
    source: str | Path | Mapping[str, Tensor],
    force: bool = False,
) -> None:
    """Give an adapter other weights; see `Compiled.hotswap`."""
    adapter = chosen(state, name)
    if state.is_merged and name in state.live.adapters:
        refuse("E402", f"`{state.live}` is merged", hint="unmerge() first")
    if isinstance(source, Mapping):
        put_in(model, state, name, source)
        return
    dtype = next((site.form.dtype for site in adapter.sites), None)
    plan, loaded = loaded_plan(Path(source), model, dtype, name)
    found = differences({site.path: site for site in adapter.sites}, plan, str(source))
    bank = state.switch.bank
    banked = bank if isinstance(bank, Bank) and name in bank.numbers and found.failed else None
    (found if banked is None else _strange(banked, plan, str(source))).stop()
    if not (force or state.is_merged):  # what is merged is not the base's
        check_base(plan.sites, loaded.base, str(source))
    tensors = {**_redrawn(model, plan, loaded), **loaded.tensors}
    if banked is not None:
        _replace(model, state, banked, Adapter(name, plan, loaded.seed), tensors)
        return
    put_in(model, state, name, tensors)
    state.adapters[name] = replace(adapter, seed=loaded.seed)


def _strange(bank: Bank, plan: Plan, folder: str) -> Report:
    """E439 for every site at which a bank has nothing that could be filled up with it."""
    report = Report()
    for site in strangers(bank, plan):
        message = f"the bank has no place for {site.form.call} of {folder} at `{site.path}`"
        hint = f"it has ranks up to {bank.rank}, at sites and of methods that were there before"
        report.error("E439", message, site.span, hint=hint)
    return report


def _replace(
    model: nn.Module, state: State, bank: Bank, adapter: Adapter, tensors: Mapping[str, Tensor]
) -> None:
    """Let an adapter of another rank, or at other sites, have the place of one of its name."""
    refuse_new(model, adapter.plan)
    before = state.adapters[adapter.name]
    lives = [x for x in state.switch.prepared.values() if adapter.name in x.adapters]
    withdraw(model, state, [str(live) for live in lives])
    remove(model, state, before)
    for site in adapter.sites:
        holder = mount.add_holder(site.site.module, *site.holders)
        trained = frozenset(p.name for p in site.form.parameters if p.trained)
        values = site_tensors(site, adapter.seed, given_at(site, tensors))
        mount.add_parameters(holder, mount.Tensors(values, trained))
    state.adapters[adapter.name] = adapter
    admit_again(model, bank, adapter, before)
    for live in lives:
        prepare(model, state, live)


def _redrawn(model: nn.Module, plan: Plan, loaded: Loaded) -> dict[str, Tensor]:
    """What sites draw again, since the folder leaves it out."""
    made: dict[str, Tensor] = {}
    for site in plan.sites:
        given = given_at(site, loaded.tensors)
        if len(given) < sum(not p.shared for p in site.form.parameters):
            known = {**given, **shared_at(model, plan, site)}
            values = site_tensors(site, loaded.seed, known)
            made |= {site.adapted(name): value for name, value in values.items()}
    return made


def differences(now: Mapping[str, PlannedSite], other: Plan, folder: str) -> Report:
    """E439 for every site at which a plan puts something else. now: what there is, by path."""
    report = Report()
    new = {site.path: site for site in other.sites}
    for path in sorted(now.keys() ^ new.keys()):
        where = "only the adapter on the model" if path in now else f"only {folder}"
        report.error("E439", f"{where} adapts `{path}`", hint=_REPLACE)
    for path in sorted(now.keys() & new.keys()):
        one, two = now[path], new[path]
        if _computes(one) != _computes(two):
            message = f"`{path}` has {one.form.call} on the model, and {two.form.call} in {folder}"
            report.error("E439", message, one.span, hint=_REPLACE)
    return report


_REPLACE = (
    "hotswap takes other weights of one spec, and with a bank other ranks: reserve(max_rank); "
    "else delete the adapter and attach the other"
)


def _computes(site: PlannedSite) -> object:
    """What a site runs, whatever its parameters began as."""
    own = site.form.derived.equations
    changed = (own.weight, own.bias, own.input, own.output)
    return changed, dict(site.form.stored), site.site.at, site.form.mode
