"""Merge, unmerge and unload: the adapter into the weights, out of them, and off the model.

A merge evaluates the very equation that the forward runs, in float64, and rounds once. It never
writes into a base tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from torch import Tensor, nn

from surgery import recomputing
from surgery.algebra.expr import MERGED
from surgery.choices import unfollow
from surgery.distributed import refuse_sharded
from surgery.errors import Report, refuse
from surgery.freezing import thaw
from surgery.live import Live, Then, added, single
from surgery.located import parameters_at
from surgery.merge_report import Accepted, MergeReport
from surgery.merged import (
    NOBODY,
    MergedSite,
    Options,
    Undo,
    base_matrix,
    by_arithmetic,
    held,
    install,
    is_edited,
    is_told_otherwise,
    merge_site,
    put_back,
    reported,
    restore,
    with_sums,
    without_base,
)
from surgery.mixture import MixedSite, live_sites, owned_parameters
from surgery.model import storage, ties
from surgery.model.hooked import release
from surgery.model.inventory import Site
from surgery.mount import (
    give_back,
    remove_parameters,
    set_requires_grad,
    unlink_follower,
)
from surgery.partial import LEAVE, can_merge, check_some, goes_in, listed, report_lost
from surgery.plan import PlannedSite
from surgery.precision import Round
from surgery.quantized import Quantized, check, taken
from surgery.state import State, forget_state, require_state
from surgery.switching import chosen, make_live, mount_sites, withdraw_all


@dataclass(frozen=True, slots=True)
class Inverse:
    """The way back from an adapted model."""

    model: nn.Module

    def merge(
        self,
        adapter: str | None = None,
        *,
        undo: Undo = "exact",
        round: Round = "nearest",
        seed: int = 0,
        max_rel_err: float | None = None,
        allow_nonfinite: bool = False,
        quantized: Quantized | None = None,
        partial: bool = False,
    ) -> MergeReport:
        """Put what is live into the weights, so that the base's own forward computes it.

        adapter: one by name, made live first; if others are merged already, it is added to them,
            from the base's own weights.
        undo: `exact` gives every bit of the base back, by corrections of what arithmetic gives
            where that leads back, else by the base's own tensors; `algebraic` keeps at most a
            vector a site, and `unmerge` recomputes W; `none` keeps nothing.
        round: from float64 to the weight's dtype, once: to the `nearest`, or `stochastic` (a law of
            chance whose mean is exact, drawn by `seed`).
        max_rel_err: the largest rounding error of a site, as a share of its largest weight, that is
            accepted. allow_nonfinite: go on where a merged weight is infinite or no number.
        quantized: what becomes of quantised weights: `dequantize`, their layers become plain ones;
            `requantize`, they are quantised again; `separate`, they keep running their adapters.
        partial: let sites that cannot merge go on running; what is put on the others is merged.
        Gives what rounding lost and what is kept, site by site.
        Raises StateError, with nothing changed: E402 if merged already, E403 where an equation has
        no merged weight, or with `partial` E495 where none has one, E404 on meta, E405 where an
        undo cannot be had, E424 and E425 for quantised weights, E428 to E431, E446 within a choice
        of the thread, E461.
        """
        state = require_state(self.model)
        refuse_sharded(self.model, state, "merged")
        _refuse_chosen(state, "merged")
        options = Options(undo, round, seed, taken(self.model, quantized), state.shares, partial)
        accepted = Accepted(max_rel_err, allow_nonfinite)
        if adapter is None:
            _check_merge(state, state.sites, options)
            return self._put_in(state, options, accepted)
        live = single(chosen(state, adapter).name)
        if not state.is_merged:
            return self._instead(state, live, options, accepted)
        if adapter in state.live.adapters:
            refuse("E402", f"`{adapter}` is merged already", hint="unmerge() takes it out again")
        return self._instead(state, added(state.live, live), options, accepted)

    def unmerge(self, adapter: str | None = None) -> None:
        """Take adapters out of the weights again; the forward runs them as before.

        adapter: one of those that are merged, in whatever order they came; the others stay merged,
            and it is no longer live. None for all of them.
        Raises StateError, with the weights as they are: E406 if nothing is merged, or not this
        adapter; E407 if the merge kept nothing, E408 where arithmetic does not lead back; E428 for
        weights that were changed since, E429 where the base does not come out; E432 for an adapter
        on which another was merged; E461 for a sharded model.
        """
        state = require_state(self.model)
        refuse_sharded(self.model, state, "unmerged")
        _refuse_chosen(state, "unmerged")
        _check_unmerge(state)
        if adapter is None or state.live.adapters == (adapter,):
            self._take_out(state)
            return
        _check_out_of(state, adapter)
        rest = state.live.within([name for name in state.live.adapters if name != adapter])
        if not _goes_in(live_sites(rest, state.plans), state.options):  # all of it runs beside
            self._take_out(state)
            make_live(self.model, state, rest)
            return
        self._instead(state, rest, state.options, _ANYTHING)

    def unload(self, *, keep_merge: bool = False, partial: bool = False) -> nn.Module:
        """Take every adapter off the model, from any state; the base is as it was, to the bit.

        keep_merge: leave merged weights merged, for a plain model that computes the adapted one.
        partial: also where some of what is live runs beside the weights, and is lost.
        Raises StateError as `unmerge` does, E409 if `keep_merge` and nothing is merged, E496 where
        something would be lost so, E461 for a sharded model.
        """
        state = require_state(self.model)
        refuse_sharded(self.model, state, "unloaded")
        _refuse_chosen(state, "unloaded")
        if keep_merge and not state.is_merged:
            refuse("E409", "nothing is merged that could be kept", hint="call merge() first")
        if keep_merge and not partial:
            _refuse_loss(state)
        if state.is_merged and not keep_merge:
            self.unmerge()
        if state.switch.frozen:
            thaw(self.model, state)
        withdraw_all(self.model, state)
        for adapter in state.adapters.values():
            for site in adapter.sites:
                remove_site(site)
            remove_parameters(self.model, adapter.name)  # what its sites shared
        give_back(self.model, keep_merge)
        set_requires_grad(self.model, state.flags)
        unfollow(self.model)
        recomputing.unfollow(self.model)
        release(self.model)
        forget_state(self.model)
        return self.model

    # ------------------------------------------------------------------------------- in and out

    def _put_in(self, state: State, options: Options, accepted: Accepted) -> MergeReport:
        # What is made of a bias is made of the trained one, where an adapter has a copy of it.
        every = sorted(state.sites, key=lambda s: not s.site.at.tensor)
        sites = _goes_in(every, options)
        done: dict[str, MergedSite] = {}
        try:
            for site in sites:
                merged = merge_site(site, tensors_at(self.model, state, site), options)
                done[site.path] = _once(merged, done.values())
            report = reported(done.values())
            accepted.check(report, {site.path: site.span for site in sites})
        except BaseException:
            for merged in reversed([*done.values()]):
                self._take_back(state, merged)
            raise
        # Until here the base was kept, to be put back.
        kept = with_sums if options.undo == "exact" else without_base
        done = {path: kept(merged) for path, merged in done.items()}
        state.merged, state.is_merged, state.options = done, True, options
        if any(site.site.tie == "untie" for site in sites):
            state.untied = ties.untie(self.model)
        withdraw_all(self.model, state)
        here = set(map(id, sites))
        rest = [site for site in every if id(site) not in here]
        mount_sites(self.model, state, rest, str(state.live))
        if rest:
            state.switch.prepared[str(state.live)] = state.live
        return report

    def _take_back(self, state: State, merged: MergedSite) -> bool:
        """Give a site its base again; False, with nothing done, where it does not come out."""
        if not merged.packed:
            put_back(merged)
            return True
        kept = held(merged)
        if kept is not None:
            put_back(kept)
            return True
        base = base_matrix(merged, tensors_at(self.model, state, merged.site))
        if base is not None:
            restore(merged, base)
        return base is not None

    def _take_out(self, state: State) -> None:
        """The base's weights are the model's again, and the forward runs what was merged."""
        out = self._by_arithmetic if state.options.undo == "algebraic" else self._by_corrections
        out(state)
        state.merged, state.is_merged = {}, False
        ties.tie_again(state.untied)
        state.untied = ()
        withdraw_all(self.model, state)
        make_live(self.model, state, state.live)

    def _by_corrections(self, state: State) -> None:
        _check_edited(state)
        out: list[MergedSite] = []
        try:
            for merged in reversed([*state.merged.values()]):
                if not self._take_back(state, merged):
                    _refuse_base(merged, tensors_at(self.model, state, merged.site))
                out.append(merged)
        except BaseException:
            for site in (merged.site for merged in reversed(out)):
                # The same bits again, so what was kept of it leads back as before.
                merge_site(site, tensors_at(self.model, state, site), state.options)
            raise

    def _by_arithmetic(self, state: State) -> None:
        solved: list[tuple[PlannedSite, Tensor]] = []
        for merged in state.merged.values():
            inverse = merged.site.form.derived.inverse.weight
            if inverse is None or inverse is MERGED:
                continue
            weight = by_arithmetic(merged, tensors_at(self.model, state, merged.site))
            if weight is None:
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
                install(site, weight)
        except BaseException:
            for merged in reversed(done):
                put_back(merged)
            raise
        for merged in reversed(state.merged.values()):
            put_back(merged)

    def _instead(
        self, state: State, live: Live, options: Options, accepted: Accepted
    ) -> MergeReport:
        """Merge something else than what is merged or live; if that fails, all is as it was."""
        before, was_merged, with_options = state.live, state.is_merged, state.options
        if was_merged:
            self._take_out(state)
        try:
            make_live(self.model, state, live)
            _check_merge(state, state.sites, options)
            return self._put_in(state, options, accepted)
        except BaseException:
            make_live(self.model, state, before)
            if was_merged:
                self._put_in(state, with_options, _ANYTHING)
            raise


_ANYTHING = Accepted(None, True)


def tensors_at(model: nn.Module, state: State, site: PlannedSite) -> Mapping[str, Tensor]:
    """The parameters of a site of what is live, by the names that it has for them."""
    if not isinstance(site, MixedSite):
        return parameters_at(model, state.adapters[site.adapter].plan, site)
    every = {s.adapter: tensors_at(model, state, s) for s in site.sources}
    return {n: every[s.adapter][p.name] for n, s, p in owned_parameters(site)}


def remove_site(site: PlannedSite) -> None:
    """Take an adapter's parameters off a site, and off the layers that share its weight."""
    remove_parameters(site.site.module, site.adapter)
    for follower in site.site.followers:
        unlink_follower(follower, site.holders)


# ------------------------------------------------------------------------------------ checks

_PART = "merge(partial=True) merges the other sites, and these go on running"


def _goes_in(sites: Sequence[PlannedSite], options: Options) -> tuple[PlannedSite, ...]:
    return goes_in(sites, options.quantized, options.partial)


def _refuse_loss(state: State) -> None:
    """E496 where a part of what is live is in no weight, so that no weights have all of it."""
    beside = [site.path for site in state.beside]
    if beside:
        refuse(
            "E496",
            f"what runs at {listed(beside)} is not in the weights, and would be lost",
            hint="save the adapter; unload(keep_merge=True, partial=True) keeps what is merged",
        )


def _refuse_chosen(state: State, what: str) -> None:
    """E446 while this thread has something live that the model would no longer know."""
    if state.switch.own is not None:
        refuse(
            "E446",
            f"the model cannot be {what} while this thread has a choice of its own",
            hint="leave the `with` of using() or route() first",
        )


def _check_merge(state: State, sites: tuple[PlannedSite, ...], options: Options) -> None:
    if state.is_merged:
        refuse("E402", f"`{state.live}` is merged already", hint="unmerge() takes it out again")
    if not state.live:
        refuse(
            "E410", "no adapter is live, so there is nothing to merge", hint="activate(NAME) first"
        )
    report, undo = Report(), options.undo
    able = [site for site in sites if can_merge(site) or not options.partial]
    check(able, options.quantized.how, undo, report)
    merged = _goes_in(sites, options)
    report_lost(merged, _PART if any(map(can_merge, merged)) else LEAVE, report)
    for site in filter(can_merge, merged):
        derived = site.form.derived
        if storage.read(site.site.module, site.form.kind, site.site.at) is None:
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
    if options.partial:
        check_some(sites, merged, str(state.live))


def _check_unmerge(state: State) -> None:
    if not state.is_merged:
        refuse("E406", "nothing is merged", hint="merge() comes before unmerge()")
    if state.options.undo == "none":
        refuse(
            "E407",
            "this merge kept nothing to go back by",
            hint="merge with undo='exact', or unload(keep_merge=True) to stay merged",
        )


# ---------------------------------------------------------------------------------- the way back


def _check_edited(state: State) -> None:
    report = Report()
    for merged in state.merged.values():
        if is_edited(merged):
            report.error(
                "E428",
                f"the weight of `{merged.site.path}` was changed since it was merged",
                merged.site.span,
                hint="put the merged weight back, or unload(keep_merge=True) to stay merged",
            )
    report.stop()


def _refuse_base(merged: MergedSite, parameters: Mapping[str, Tensor]) -> NoReturn:
    if is_told_otherwise(merged, parameters):
        refuse(
            "E429",
            f"the adapter's parameters at `{merged.site.path}` were changed since the merge",
            hint="they lead back to the base; put them back, or unload(keep_merge=True)",
        )
    made = ", ".join(merged.machine.values())
    refuse(
        "E429",
        f"`{merged.site.path}`: what comes out is not the base, to the bit",
        hint=f"it was merged on {made}; unmerge it there, or load the base again",
    )


def _check_out_of(state: State, adapter: str) -> None:
    if adapter not in state.live.adapters:
        refuse("E406", f"`{adapter}` is not merged", hint=f"`{state.live}` is")
    for _, what in state.live.terms:
        links = what.links[:-1] if isinstance(what, Then) else ()
        if any(adapter in link.adapters for link in links):
            refuse(
                "E432",
                f"`{adapter}` cannot be taken out of `{what}` alone: others were made on it",
                hint="unmerge() takes all of them out",
            )


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
        released=NOBODY if known else merged.released,
    )


def _same_parameter(one: Site, other: Site) -> bool:
    return one.module is other.module and one.at.parameter == other.at.parameter
