"""Merge, unmerge and unload: the adapter into the weights, out of them, and off the model.

A merge evaluates the very equation that the forward runs, in float64, and rounds once. It never
writes into a base tensor: the exact undo gives the same tensors back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from surgery.algebra.derive import Merged
from surgery.algebra.equations import Parameter
from surgery.algebra.expr import WEIGHT, Expr
from surgery.algebra.interpret import Domain, Evaluator
from surgery.algebra.rules import is_zero
from surgery.errors import Report, refuse
from surgery.lower import by_module
from surgery.mixture import MixedSite, owned_parameters
from surgery.model import storage, ties
from surgery.model.holder import SHARED, children_of, holder_of, parameters_of
from surgery.model.hooked import execution_device, release
from surgery.model.inventory import Site
from surgery.mount import (
    dismount,
    dismount_all,
    give_back,
    mount_all,
    parameter_of,
    remove_parameters,
    set_requires_grad,
    unlink_follower,
)
from surgery.nodes import Lowerings
from surgery.plan import Plan, PlannedSite
from surgery.state import MergedSite, State, Undo, forget_state, require_state


@dataclass(frozen=True, slots=True)
class Inverse:
    """The way back from an adapted model."""

    model: nn.Module

    def merge(self, *, undo: Undo = "exact") -> None:
        """Put what is live into the weights, so that the base's own forward computes it.

        undo: `exact` keeps the base's tensors, and `unmerge` gives the same ones back; `algebraic`
            keeps at most a vector a site, and `unmerge` recomputes W; `none` keeps nothing.
        Raises StateError, with nothing changed: E402 if merged already, E403 where an equation has
        no merged weight, E404 on meta, E405 where an undo cannot be had.
        """
        state = require_state(self.model)
        # What is made of a bias is made of the trained one, where an adapter has a copy of it.
        sites = tuple(sorted(state.sites, key=lambda s: not s.site.at.tensor))
        _check_merge(state, sites, undo)
        done: dict[str, MergedSite] = {}
        try:
            for site in sites:
                merged = _merge_site(site, self._tensors(state, site), undo)
                done[site.path] = _once(merged, done.values())
        except BaseException:
            for merged in reversed(done.values()):
                _put_back(merged)
            raise
        if undo != "exact":  # until here the base was kept, for nothing to change if this fails
            done = {path: replace(merged, weight=None) for path, merged in done.items()}
        state.merged, state.is_merged, state.undo = done, True, undo
        if any(site.site.tie == "untie" for site in sites):
            state.untied = ties.untie(self.model)
        dismount_all(self.model, (module for module, _ in _modules(state)))

    def unmerge(self) -> None:
        """Take the adapter out of the weights again; the forward runs it as before.

        Raises StateError: E406 if nothing is merged, E407 if the merge kept nothing, E408 where
        arithmetic does not lead back.
        """
        state = require_state(self.model)
        _check_unmerge(state)
        if state.undo == "algebraic":
            self._undo_by_arithmetic(state)
        for merged in reversed(state.merged.values()):
            _put_back(merged)
        state.merged, state.is_merged = {}, False
        ties.tie_again(state.untied)
        state.untied = ()
        mount_all(self.model, _modules(state))

    def unload(self, *, keep_merge: bool = False) -> nn.Module:
        """Take every adapter off the model, from any state; the base is as it was, to the bit.

        keep_merge: leave merged weights merged, for a plain model that computes the adapted one.
        Raises StateError as `unmerge` does, E409 if `keep_merge` and nothing is merged.
        """
        state = require_state(self.model)
        if keep_merge and not state.is_merged:
            refuse("E409", "nothing is merged that could be kept", hint="call merge() first")
        if state.is_merged and not keep_merge:
            self.unmerge()
        for adapter in state.adapters.values():
            for site in adapter.sites:
                dismount_site(site)
                remove_site(site)
            remove_parameters(self.model, adapter.name)  # what its sites shared
        give_back(self.model, keep_merge)
        set_requires_grad(self.model, state.flags)
        release(self.model)
        forget_state(self.model)
        return self.model

    def _undo_by_arithmetic(self, state: State) -> None:
        solved: list[tuple[PlannedSite, Tensor]] = []
        for merged in state.merged.values():
            inverse = merged.site.form.derived.inverse.weight
            if inverse is None or inverse.op == "merged":
                continue
            tensors = _Tensors(merged.site, self._tensors(state, merged.site), merged.witnesses)
            weight = tensors.evaluate(inverse)
            if not bool(torch.isfinite(weight).all()):
                refuse(
                    "E408",
                    f"`{merged.site.path}`: arithmetic does not lead back from the merged weight",
                    hint="a factor is zero or a matrix singular; merge with undo='exact'",
                )
            solved.append((merged.site, weight))
        done: list[MergedSite] = []
        try:
            for site, weight in solved:
                kept = storage.detach_parameter(site.site.module, site.site.at, "weight")
                done.append(MergedSite(site, weight=kept))
                _write(site, weight)
        except BaseException:
            for merged in reversed(done):
                _put_back(merged)
            raise

    def _tensors(self, state: State, site: PlannedSite) -> Mapping[str, Tensor]:
        if not isinstance(site, MixedSite):
            return parameters_at(self.model, _plan(state, site), site)
        every = {s.adapter: self._tensors(state, s) for s in site.sources}
        return {n: every[s.adapter][p.name] for n, s, p in owned_parameters(site)}


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


def _plan(state: State, site: PlannedSite) -> Plan:
    return state.adapters[site.adapter].plan


def dismount_site(site: PlannedSite) -> None:
    """Let a site, and the layers that share its weight, run their own forward."""
    for module in (site.site.module, *site.site.followers):
        dismount(module)


def remove_site(site: PlannedSite) -> None:
    """Take an adapter's parameters off a site, and off the layers that share its weight."""
    remove_parameters(site.site.module, site.adapter)
    for follower in site.site.followers:
        unlink_follower(follower, site.holders)


def _modules(state: State) -> list[tuple[nn.Module, Lowerings]]:
    """The modules that what is live runs at."""
    return by_module(state.sites, state.plans)


# ------------------------------------------------------------------------------------ checks


def _check_merge(state: State, sites: tuple[PlannedSite, ...], undo: Undo) -> None:
    if state.is_merged:
        refuse("E402", f"`{state.live}` is merged already", hint="unmerge() takes it out again")
    if not state.live:
        refuse(
            "E410", "no adapter is live, so there is nothing to merge", hint="activate(NAME) first"
        )
    report = Report()
    for site in sites:
        derived = site.form.derived
        if derived.still is None:
            report.error(
                "E403",
                f"`{site.path}` cannot merge: {derived.reason}",
                site.span,
                hint="keep such an adapter unmerged; it runs as it is",
            )
        elif storage.read(site.site.module, site.form.kind, site.site.at) is None:
            report.error(
                "E404",
                f"the weight of `{site.path}` has no data yet (meta device)",
                hint="load the base's weights first",
            )
        elif undo == "algebraic" and derived.merge_class == "snapshot":
            report.error(
                "E405",
                f"`{site.path}`: no arithmetic leads from W' back to W",
                site.span,
                hint="merge with undo='exact', which keeps the base's tensors",
            )
    report.stop()


def _check_unmerge(state: State) -> None:
    if not state.is_merged:
        refuse("E406", "nothing is merged", hint="merge() comes before unmerge()")
    if state.undo == "none":
        refuse(
            "E407",
            "this merge kept nothing to go back by",
            hint="merge with undo='exact', or unload(keep_merge=True) to stay merged",
        )


# ------------------------------------------------------------------------------------ a site


class _Tensors:
    """The leaves of a site's equation as float64 tensors.

    index: which matrix, where the site is a batch of them.
    """

    def __init__(
        self,
        site: PlannedSite,
        parameters: Mapping[str, Tensor],
        witnesses: Mapping[str, Tensor] | None = None,
        index: int | None = None,
    ) -> None:
        self.site = site
        self.parameters = parameters
        self.witnesses = witnesses or {}
        self.index = index
        self.shared = {p.name for p in site.form.parameters if p.shared}

    def evaluate(self, expr: Expr) -> Tensor:
        """The value of an expression, in float64 and without gradients; a batch of them stacked."""
        batch = self.site.site.batch
        if batch is not None and self.index is None:
            each = (self._of(index).evaluate(expr) for index in range(batch))
            return torch.stack([*each])
        with torch.no_grad():
            domain = Domain(self.site.form.names, self._leaf, self._anchor)
            return Evaluator(domain).value(expr)

    def _of(self, index: int) -> _Tensors:
        return _Tensors(self.site, self.parameters, self.witnesses, index)

    def _anchor(self) -> Tensor:
        device = execution_device(self.site.site.module)
        return torch.zeros((), dtype=torch.float64, device=device)

    def _leaf(self, expr: Expr) -> Tensor:
        module, form, site = self.site.site.module, self.site.form, self.site.site
        shared = False
        match expr.op:
            case "parameter":
                name = expr.text("name")
                value, shared = self.parameters[name].detach(), name in self.shared
                value = form.matrix(name, value)
            case "witness":
                value = self.witnesses[expr.text("name")]
            case "weight" | "merged":
                value = storage.read(module, form.kind, site.at)
            case _:
                value = storage.read_bias(module, site.at)
        assert value is not None  # checked before anything was changed
        if self.index is not None and not shared:
            value = value[self.index]
        return value.to(self._anchor().device, torch.float64)


def _merge_site(site: PlannedSite, parameters: Mapping[str, Tensor], undo: Undo) -> MergedSite:
    merged = site.form.derived.still
    assert merged is not None
    tensors = _Tensors(site, parameters)
    kept = MergedSite(site, witnesses=_witnesses(site, tensors) if undo == "algebraic" else {})
    weight, bias = _values(merged, tensors)
    module, at = site.site.module, site.site.at
    if bias is not None:
        kept = replace(kept, bias=storage.detach_parameter(module, at, "bias"))
    if weight is not None:
        kept = replace(kept, weight=storage.detach_parameter(module, at, "weight"))
    try:
        if weight is not None:
            _write(site, weight)
        if bias is not None:
            storage.write_bias(module, site.form.kind, at, bias.to(_dtype(site)))
    except BaseException:
        _put_back(kept)
        raise
    return kept


def _once(merged: MergedSite, before: Iterable[MergedSite]) -> MergedSite:
    """Without what a site before, which is part of the same parameter, keeps already."""
    site = merged.site.site
    if site.at.whole:
        return merged
    known = [m for m in before if _same_parameter(m.site.site, site)]
    return replace(
        merged,
        weight=None if any(m.weight is not None for m in known) else merged.weight,
        bias=None if any(m.bias is not None for m in known) else merged.bias,
    )


def _same_parameter(one: Site, other: Site) -> bool:
    return one.module is other.module and one.at.parameter == other.at.parameter


def _write(site: PlannedSite, weight: Tensor) -> None:
    """The site's weight becomes another, and the rest of its parameter stays."""
    storage.write(site.site.module, site.form.kind, site.site.at, weight.to(_dtype(site)))
    _follow(site)


def _follow(site: PlannedSite) -> None:
    """Let the layers that share a site's weight share what it is now."""
    name = site.site.at.parameter
    for follower in site.site.followers:
        parameters_of(follower)[name] = parameters_of(site.site.module)[name]


def _dtype(site: PlannedSite) -> torch.dtype:
    """Of the base as it is now: the model may have been cast since it was adapted."""
    weight = parameters_of(site.site.module)[site.site.at.parameter]
    assert weight is not None
    return weight.dtype


def _values(merged: Merged, tensors: _Tensors) -> tuple[Tensor | None, Tensor | None]:
    """The merged weight and bias in float64; None for what the adapter leaves as it is."""
    weight = None if merged.weight is WEIGHT else tensors.evaluate(merged.weight)
    untouched = merged.bias.op == "bias" or is_zero(merged.bias)
    return weight, None if untouched else tensors.evaluate(merged.bias)


def _witnesses(site: PlannedSite, tensors: _Tensors) -> dict[str, Tensor]:
    return {n: tensors.evaluate(e) for n, e in site.form.derived.inverse.witnesses}


def _put_back(merged: MergedSite) -> None:
    module, at = merged.site.site.module, merged.site.site.at
    if merged.weight is not None:
        storage.put_back(module, at, "weight", merged.weight)
        _follow(merged.site)
    if merged.bias is not None:
        storage.put_back(module, at, "bias", merged.bias)
