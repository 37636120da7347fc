"""Putting the adapters of a plan on a model; whatever goes wrong, it is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, fx, nn

from surgery import lower, materialize, mount
from surgery.adapters import check_name, forget
from surgery.distributed import refuse_new
from surgery.errors import Report, refuse
from surgery.inverse import remove_site
from surgery.live import Live, single
from surgery.located import shared_at
from surgery.model.holder import base_parameters
from surgery.model.hooked import adopt, release
from surgery.observation import Seen
from surgery.plan import Plan, PlannedSite
from surgery.recomputing import follow, unfollow
from surgery.reserving import admit_new
from surgery.state import Adapter, State, forget_state, keep_state, state_of
from surgery.switching import make_live
from surgery.tensors import add_banks

_NOTHING_SEEN: Seen = {}


def _nothing() -> None:
    """Nothing more."""


def put_on(
    model: nn.Module,
    made: Plan,
    seed: int,
    given: Mapping[str, Tensor],
    seen: Seen = _NOTHING_SEEN,
    then: Callable[[], None] = _nothing,
) -> None:
    """Make the holders and all tensors, then mount; undo everything if anything fails.

    given: tensors that are known already, by their names in the model. seen: what data shows of
    the sites. then: what is done before the plan's choice is live, such as to put on what is made
    of these adapters; if it fails, the adapters that it put on come off as well.
    """
    state = state_of(model) or State()
    _refuse_known_names(state, made)
    _refuse_places(model, made)
    refuse_merged(state)
    fresh, live, there = state_of(model) is None, state.live, [*state.adapters]
    base = base_parameters(model)
    flags = {name: p.requires_grad for name, p in base.items()}
    try:
        holders = [mount.add_holder(s.site.module, *s.holders) for s in made.sites]
        adopt(model)  # a hook may now tell where the sites run, and so where tensors belong
        banks = add_banks(model, made, seed, given)
        tensors = [
            materialize.site_tensors(
                s,
                seed,
                {**materialize.given_at(s, given), **shared_at(model, made, s)},
                seen.get((s.adapter, s.path), {}),
            )
            for s in made.sites
        ]
        for site, holder, values in zip(made.sites, holders, tensors, strict=True):
            _fill(holder, site, values, banks)
        for parameter in base.values():
            parameter.requires_grad_(False)
        _register(model, state, made, seed, flags if fresh else state.flags)
        then()
        chosen = _chosen(made, there, live)
        if chosen is not None:
            make_live(model, state, chosen)
    except BaseException:
        if state.live != live:
            make_live(model, state, live)
        for plan in _later(state, there, made):
            _take_off(model, plan, state, flags, False)
        _take_off(model, made, state, flags, fresh)
        raise


def _later(state: State, there: Sequence[str], made: Plan) -> list[Plan]:
    """The plans of what came after a plan's own adapters, the last first."""
    new = [one.plan for name, one in state.adapters.items() if name not in there]
    return [plan for plan in reversed(new) if plan is not made]


def put_known(model: nn.Module, made: Plan, seed: int, tensors: Mapping[str, Tensor]) -> None:
    """Put a plan's adapters on a model with tensors that are known already.

    tensors: all that the plan has, by their names in the model. Raises as `attach` does for a plan
    that does not fit this model, which is left as it was.
    """
    refuse_merged(state_of(model))
    lower.check(made)
    refuse_new(model, made)
    put_on(model, made, seed, tensors)


def refuse_merged(state: State | None) -> None:
    """E402 for a model in whose weights what is live is merged."""
    if state is not None and state.is_merged:
        refuse("E402", f"`{state.live}` is merged", hint="unmerge() before adding adapters")


def _refuse_known_names(state: State, made: Plan) -> None:
    report = Report()
    for name in (*made.adapters, *(one.name for one in made.resolved.derived)):
        check_name(name)
        if name in state.adapters:
            report.error(
                "E412",
                f"the model has an adapter `{name}` already",
                hint=f"name the new one: `adapter {name}_2 {{ … }}`, or unload() first",
            )
    report.stop()


def _refuse_places(model: nn.Module, made: Plan) -> None:
    placed = next((site for site in made.sites if site.form.places), None)
    if placed is not None and isinstance(model, fx.GraphModule):
        refuse(
            "E487",
            f"`{placed.path}` is adapted for some tokens alone, and a model that is one graph does "
            "not tell its tokens",
            placed.span,
            hint="leave `at` out, or adapt the module that the graph was made of",
        )


def _fill(
    holder: mount.Holder,
    site: PlannedSite,
    values: Mapping[str, Tensor],
    banks: Mapping[str, mount.Holder],
) -> None:
    trained = frozenset(p.name for p in site.form.parameters if p.trained)
    mount.add_parameters(holder, mount.Tensors(values, trained))
    if site.adapter in banks and any(p.shared for p in site.form.parameters):
        mount.link_shared(holder, banks[site.adapter])
    for follower in site.site.followers:
        mount.link_follower(follower, site.holders, holder)


def _register(
    model: nn.Module, state: State, made: Plan, seed: int, flags: dict[str, bool]
) -> None:
    for name in made.adapters:
        state.adapters[name] = Adapter(name, made, seed)
    state.flags = flags
    keep_state(model, state)
    follow(model)  # what is computed again in a backward pass repeats its choice
    if any(site.form.places for site in made.sites):
        mount.place(model, state.switch)
    admit_new(model, state, made.adapters)


def _chosen(made: Plan, there: Sequence[str], live: Live) -> Live | None:
    """What a plan says is live; where it says nothing, its first adapter on a model without any."""
    if made.resolved.live is not None or there or live or not made.adapters:
        return made.resolved.live
    return single(made.adapters[0])


def _take_off(
    model: nn.Module, made: Plan, state: State, flags: dict[str, bool], fresh: bool
) -> None:
    for name in made.adapters:
        forget(model, state, name)
    for site in made.sites:
        remove_site(site)
    for name in made.adapters:
        mount.remove_parameters(model, name)
        state.adapters.pop(name, None)
    if fresh:
        mount.give_back(model)
    mount.set_requires_grad(model, flags)
    if fresh:
        unfollow(model)
        release(model)
        forget_state(model)
