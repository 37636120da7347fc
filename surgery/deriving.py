"""One adapter made of several that are on a model, and what a spec says of such.

Adapters are added up by what they do, Σ cᵢ (Wᵢ' - W), and not by their parameters, unless that is
asked for. What is exact says so, and for all else the distance from that sum is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from surgery.adapters import check_name, names_in, renamed
from surgery.artifact import Loaded
from surgery.check import unstated
from surgery.composable import asked_of, check_options, check_places
from surgery.composed import (
    Asked,
    Banks,
    Made,
    Place,
    Source,
    Term,
    as_copy,
    as_parameters,
    as_product,
    base_copy,
    check_banks,
    left_of_base,
    obstacle,
    places,
    ratio,
    wanted,
)
from surgery.composition import ComposedSite, Composition
from surgery.conversion import notes_of
from surgery.derivation import Derivation
from surgery.digests import Digest
from surgery.errors import Diagnostic, Report, SurgeryError, error_of, refuse
from surgery.live import Live
from surgery.model.holder import shared_name
from surgery.plan import Assignment, plan_assignments
from surgery.planned import Plan, PlannedSite
from surgery.putting import put_known
from surgery.recipe import How
from surgery.state import Adapter, require_state, state_of
from surgery.switching import chosen, live_of
from surgery.tensors import tensors_of

# ----------------------------------------------------------------------------- what a spec says


def check(plan: Plan, model: nn.Module) -> None:
    """What can be seen to be wrong with what a plan derives, before anything is put on.

    Raises PlanError or ArtifactError, with the place of each statement. What waits for an adapter
    that is derived itself, or for the base's weights, is not looked at.
    """
    state = state_of(model)
    there = {} if state is None else state.adapters
    known = {name: _without_tensors(plan, name) for name in plan.adapters}
    known |= {name: _without_tensors(one.plan, name) for name, one in there.items()}
    report = Report()
    for one in plan.resolved.derived:
        if one.name in known or not known.keys() >= {*one.live.adapters}:
            continue  # its name is refused where it is put on
        try:
            _check(one, {name: known[name] for name in one.live.adapters})
        except SurgeryError as error:
            found = (d for d in error.diagnostics if d.code != "E584")  # weights may come yet
            report.extend(_placed(d, one) for d in found)
    report.stop()


def _check(one: Derivation, sources: Mapping[str, Source]) -> None:
    if one.live.only is None or one.how.alters:
        every = places(one.live, sources)
        check_places(every, asked_of(one.how, every))


def _without_tensors(plan: Plan, name: str) -> Source:
    return _source(plan, name, 0, {})


def derive(model: nn.Module, derivations: Sequence[Derivation]) -> None:
    """Put on a model what is made of adapters that it has, each beside those before it.

    Raises as `compose_on`, with the place of the statement; those before it stay.
    """
    for one in derivations:
        try:
            _put(model, one.live, one.name, one.how)
        except SurgeryError as error:
            raise error_of([_placed(found, one) for found in error.diagnostics]) from error


def _placed(found: Diagnostic, one: Derivation) -> Diagnostic:
    """A finding at the statement that derives, in the words of the language."""
    hint = _HOW.sub(r"`by \1(…)`", found.hint)
    related = found.related if found.span is None else (("put on here", found.span), *found.related)
    return replace(found, span=one.span, label="", hint=hint, related=related)


_HOW = re.compile(r"how='(\w+)'")


# ---------------------------------------------------------------------------------- on a model


def compose_on(model: nn.Module, expression: str, name: str, how: How) -> Composition:
    """Put the adapter that an expression of those on a model is on it; see `Compiled.compose`."""
    state = require_state(model)
    check_name(name)
    if name in state.adapters:
        refuse("E412", f"the model has an adapter `{name}` already", hint="use another name")
    if state.is_merged:
        refuse("E402", f"`{state.live}` is merged", hint="unmerge() first")
    return _put(model, some(live_of(expression, state), expression), name, how)


def _put(model: nn.Module, live: Live, name: str, how: How) -> Composition:
    made = composed(live, on_model(model, live), model, name, how, True)
    put_known(model, made.plan, made.loaded.seed, made.loaded.tensors)
    require_state(model).adapters[name].composition = made.told
    return made.told


def on_model(model: nn.Module, live: Live) -> dict[str, Source]:
    """The adapters of a mix, which are on the model.

    Raises StateError: E402 while one is merged, E411 for an unknown one; ArtifactError (E584).
    """
    state = require_state(model)
    if state.is_merged:
        refuse("E402", f"`{state.live}` is merged", hint="unmerge() first")
    return {name: _mounted(model, chosen(state, name)) for name in live.adapters}


def some(live: Live, expression: str) -> Live:
    """A mix, of which something must be left (E580)."""
    if not live:
        hint = "name what it is made of: `0.7*a + 0.3*b`"
        refuse("E580", f"nothing is left of `{expression}`", hint=hint)
    return live


def under(name: str, loaded: Loaded, plan: Plan) -> Source:
    """An adapter under another name."""
    own = loaded.adapter
    there = renamed(plan, own, name)
    names = dict(zip(names_in(plan, own), names_in(there, name), strict=True))
    tensors = {names[key]: tensor for key, tensor in loaded.tensors.items()}
    return Source(
        replace(loaded, adapter=name, tensors=tensors, resolved=there.resolved), there, own
    )


def _mounted(model: nn.Module, adapter: Adapter) -> Source:
    """An adapter on a model, as if it came from a folder."""
    tensors = tensors_of(model, adapter)
    waiting = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if waiting is not None:
        hint = "load the base's weights, and materialize() the adapter"
        refuse("E584", f"`{waiting}` waits for the base's weights", hint=hint)
    return _source(adapter.plan, adapter.name, adapter.seed, tensors)


def _source(plan: Plan, name: str, seed: int, tensors: Mapping[str, Tensor]) -> Source:
    """One adapter of a plan by itself."""
    sites = tuple(site for site in plan.sites if site.adapter == name)
    own = tuple((n, some) for n, some in plan.resolved.adapters if n == name)
    resolved = replace(plan.resolved, adapters=own, live=None, derived=())
    shared = tuple(s for s in plan.shared if s.adapter == name)
    plan = replace(plan, resolved=resolved, sites=sites, shared=shared)
    loaded = Loaded(resolved, tuple(map(_stated, sites)), tensors, name, seed)
    return Source(loaded, plan, name)


def _stated(site: PlannedSite) -> Assignment:
    at = site.site
    return Assignment(
        at.owner, site.form.links, site.span, at.at, at.tie, site.rates, site.form.places
    )


# ---------------------------------------------------------------------------------- composing


@dataclass(frozen=True, slots=True)
class Composed:
    """The new adapter, and what is told of it."""

    loaded: Loaded
    plan: Plan
    told: Composition


def composed(
    live: Live,
    sources: Mapping[str, Source],
    model: nn.Module,
    name: str,
    options: How,
    force: bool,
) -> Composed:
    """The adapter that several are together.

    force: whatever bases they were made on. Raises as `composing.compose` does for adapters that
    cannot be composed so.
    """
    only = None if options.alters else live.only
    if only is not None:
        check_options(options)
        source = _copied(under(name, sources[only].loaded, sources[only].plan))
        sites = tuple(ComposedSite(s.path, None, 0.0) for s in source.plan.sites)
        told = Composition(str(live), "as it is", name, sites, exact=True)
        return Composed(source.loaded, source.plan, told)
    base = {} if force else _digests(sources)
    every = places(live, sources)
    asked = asked_of(options, every)
    check_places(every, asked)
    made, banks = _made(every, asked)
    unchanged = tuple(
        place[0].site.path for place, one in zip(every, made, strict=True) if one is None
    )
    done = [(place, one) for place, one in zip(every, made, strict=True) if one is not None]
    if not done:
        refuse("E580", f"`{live}` adds nothing to any weight", hint="train an adapter of it first")
    span = done[0][0][0].site.span
    assignments = tuple(one.assignment for _, one in done)
    plan = plan_assignments(unstated(name, span), model, assignments, name)
    tensors = {
        site.adapted(own): tensor
        for site, (_, one) in zip(plan.sites, done, strict=True)
        for own, tensor in one.tensors.items()
    }
    for shared in plan.shared:
        key = shared_name(name, plan.groups[shared.key], shared.parameter.name)
        tensors[key] = banks[shared.key[1:]].value(asked, *map(str, shared.key[1:]))
    seed = next(iter(sources.values())).loaded.seed
    loaded = Loaded(plan.resolved, assignments, tensors, name, seed, base)
    sites = tuple(_measured(plan, loaded, done))
    notes = tuple(_notes(every, asked))
    exact = asked.way.of == "factors"
    told = Composition(str(live), asked.way.name, name, sites, unchanged, notes, exact)
    return Composed(loaded, plan, told)


def _copied(source: Source) -> Source:
    """The same with tensors of its own."""
    tensors = {name: tensor.clone() for name, tensor in source.loaded.tensors.items()}
    return replace(source, loaded=replace(source.loaded, tensors=tensors))


def _digests(sources: Mapping[str, Source]) -> dict[str, Digest]:
    """What the adapters say of their bases, which must be the same (E581)."""
    found: dict[str, tuple[str, Digest]] = {}
    report = Report()
    for name, source in sources.items():
        others = [
            (path, found[path][0])
            for path, digest in source.loaded.base.items()
            if path in found and found[path][1] != digest
        ]
        if others:
            path, other = others[0]
            message = (
                f"`{name}` and `{other}` were made on different bases: of the weights of both, "
                f"{len(others)} differ, the first at `{path}`"
            )
            report.error("E581", message, hint="force=True composes them all the same")
        found = {**{path: (name, digest) for path, digest in source.loaded.base.items()}, **found}
    report.stop()
    return {path: digest for path, (_, digest) in found.items()}


def _made(every: tuple[Place, ...], asked: Asked) -> tuple[list[Made | None], Banks]:
    report, banks = Report(), Banks()
    made: list[Made | None] = []
    for place in every:
        if place[0].site.site.at.tensor:
            made.append(as_copy(place, base_copy(place) if left_of_base(place) else None))
        elif asked.way.of == "parameters":
            made.append(as_parameters(place, asked, banks, report))
        else:
            made.append(as_product(place, asked))
    check_banks(banks, report)
    report.stop()
    return made, banks


def _measured(
    plan: Plan, loaded: Loaded, done: Iterable[tuple[Place, Made]]
) -> Iterator[ComposedSite]:
    """How far each site is from what the expression says, of the tensors that it has now."""
    for site, (place, made) in zip(plan.sites, done, strict=True):
        new = Term(1.0, site, {site.adapter: Source(loaded, plan, site.adapter)})
        if obstacle(place) or obstacle((new,)):
            yield ComposedSite(site.path, made.rank, None, made.cut)
            continue
        total = wanted(place)
        apart, length = (new.change() + total * -1.0).length(), total.length()
        error = ratio(apart, length) if apart > _rounding(new) else 0.0
        yield ComposedSite(site.path, made.rank, error, made.cut, length)


def _rounding(new: Term) -> float:
    """What the rounding of a copy may make of nothing at all, which is no share of it."""
    if not new.site.site.at.tensor:
        return 0.0
    (copy,) = new.tensors().values()
    return torch.finfo(copy.dtype).eps * float(copy.double().square().sum()) ** 0.5


def _notes(every: tuple[Place, ...], asked: Asked) -> Iterator[str]:
    if asked.way.of == "parameters":
        yield (
            f"{asked.way.name} combines parameters: products of them are mixed, so what is added "
            "to W is not the sum of what the adapters add; how='cat' is"
        )
        return
    yield from notes_of(t.site for place in every for t in place if not t.site.site.at.tensor)
