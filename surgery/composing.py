"""One adapter made of several: of those on a model, or of saved ones, as an expression says it.

Adapters are added up by what they do, Σ cᵢ (Wᵢ' - W), and not by their parameters, unless that is
asked for. What is exact says so, and for all else the distance from that sum is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from surgery.adapters import check_name, names_in, renamed
from surgery.artifact import Loaded, save_adapter
from surgery.check import DEFAULT_ADAPTER, unstated
from surgery.combining import Sign
from surgery.compiling import put_on
from surgery.composable import How, asked_of, check_places
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
from surgery.conversion import (
    check_output,
    notes_of,
    open_adapter,
)
from surgery.digests import Digest, base_digests, check_base
from surgery.errors import Report, SurgeryError, refuse
from surgery.folder_shapes import bare_model
from surgery.language.parse import parse_live
from surgery.live import Live, read_live, single
from surgery.model.holder import shared_name
from surgery.plan import Assignment, plan_assignments
from surgery.planned import Plan, PlannedSite
from surgery.runtime import Compiled
from surgery.state import Adapter, require_state
from surgery.switching import live_of
from surgery.tensors import tensors_of

Folders = Mapping[str, str | Path]
"""Saved adapters by the names that they have in the expression."""


def compose(
    expression: str,
    adapters: Folders | Compiled,
    output: str | Path,
    *,
    how: str = "cat",
    rank: int | None = None,
    to: str | None = None,
    density: float | None = None,
    sign: Sign = "total",
    seed: int = 0,
    base: nn.Module | None = None,
    name: str | None = None,
    force: bool = False,
) -> Composition:
    """Write the adapter that an expression such as `0.7*a + 0.3*b` is, to a new folder.

    adapters: folders, ours or peft's, by their names in the expression; or an adapted model. how,
    rank, to, density, sign, seed: see `composable.How`. base: the model that folders are for;
    without one, or with one on meta, those that read no weight can be composed. name: of the new
    adapter. force: compose what was made on other bases, or on another than `base`.
    An adapter that is meant as it is (`1.0*a`) is written as it is, whatever its method.
    Raises ArtifactError, with nothing written: E520 if the folder has files already, E522 for
    another base, E580 where it cannot be composed so, E581 for adapters of different bases, E582
    for an option, E583 for parameters that do not fit together, E584 where the base is needed, and
    as `attach` does for a folder; DefinitionError for the expression; PlanError (E309).
    """
    check_output(Path(output))
    there = isinstance(adapters, Compiled)
    live, sources, model = (
        _on_model(adapters.model, expression)
        if isinstance(adapters, Compiled)
        else _in_folders(adapters, expression, base, force)
    )
    only = live.only
    called = name or (DEFAULT_ADAPTER if only is None else sources[only].own)
    check_name(called)
    options = How(how, rank, to, density, sign, seed)
    made = _composed(live, sources, model, called, options, force or there)
    loaded = made.loaded
    digests = base_digests(model, made.plan.sites) if there else loaded.base
    saved = save_adapter(
        Path(output), made.plan, called, loaded.tensors, loaded.seed, digests, model=model
    )
    return replace(made.told, saved=saved)


def compose_on(
    compiled: Compiled | nn.Module,
    expression: str,
    name: str,
    *,
    how: str = "cat",
    rank: int | None = None,
    to: str | None = None,
    density: float | None = None,
    sign: Sign = "total",
    seed: int = 0,
) -> Composition:
    """Put the adapter that an expression of those on a model is on it, beside them.

    It is not live until it is activated. Arguments as for `compose`. Raises, with the model as it
    was, as `compose` does for what cannot be composed; StateError: E402 while one is merged, E411
    for an unknown adapter, E412 and E443 for a name.
    """
    model = compiled if isinstance(compiled, nn.Module) else compiled.model
    check_name(name)
    if name in require_state(model).adapters:
        refuse("E412", f"the model has an adapter `{name}` already", hint="use another name")
    live, sources, _ = _on_model(model, expression)
    options = How(how, rank, to, density, sign, seed)
    made = _composed(live, sources, model, name, options, True)
    put_on(model, made.plan, made.loaded.seed, made.loaded.tensors)
    return made.told


# ------------------------------------------------------------------------------ what there is


_Found = tuple[Live, Mapping[str, Source], nn.Module]
"""What an expression says, the adapters that it names, and what they are on."""


def _in_folders(adapters: Folders, expression: str, base: nn.Module | None, force: bool) -> _Found:
    names, bare = tuple(adapters), base is None
    said = single(expression) if expression in names else None
    live = _some(said or read_live(parse_live(expression), names, {}), expression)
    folders = {one: Path(adapters[one]) for one in live.adapters}
    model = bare_model(tuple(folders.values())) if base is None else base
    sources = {one: _opened(at, one, model, force, bare) for one, at in folders.items()}
    return live, sources, model


def _on_model(model: nn.Module, expression: str) -> _Found:
    state = require_state(model)
    if state.is_merged:
        refuse("E402", f"`{state.live}` is merged", hint="unmerge() first")
    live = _some(live_of(expression, state), expression)
    return live, {one: _mounted(model, state.adapters[one]) for one in live.adapters}, model


def _some(live: Live, expression: str) -> Live:
    if not live:
        hint = "name what it is made of: `0.7*a + 0.3*b`"
        refuse("E580", f"nothing is left of `{expression}`", hint=hint)
    return live


def _opened(folder: Path, name: str, model: nn.Module, force: bool, bare: bool) -> Source:
    """An adapter of a folder. bare: whether the model is made of what the folders say."""
    try:
        opened = open_adapter(folder, model)
    except SurgeryError as error:
        if not bare or any(one.code not in _UNKNOWN for one in error.diagnostics):
            raise
        first, *others = error.diagnostics
        more = f" (and {len(others)} more)" if others else ""
        message = f"{folder} cannot be read without its model: {first.message}{more}"
        refuse("E584", message, first.span, hint="give the model: base=MODEL, or --base")
    if not force:
        check_base(opened.plan.sites, opened.loaded.base, str(folder))
    return _under(name, opened.loaded, opened.plan)


_UNKNOWN = frozenset({"E306", "E516", "E518", "E523"})
"""What is said of a folder whose layers are not all known."""


def _under(name: str, loaded: Loaded, plan: Plan) -> Source:
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
    sites = tuple(adapter.sites)
    resolved = adapter.plan.resolved
    own = tuple((n, some) for n, some in resolved.adapters if n == adapter.name)
    resolved = replace(resolved, adapters=own, live=None)
    tensors = tensors_of(model, adapter)
    waiting = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if waiting is not None:
        hint = "load the base's weights, and materialize() the adapter"
        refuse("E584", f"`{waiting}` waits for the base's weights", hint=hint)
    shared = tuple(s for s in adapter.plan.shared if s.adapter == adapter.name)
    plan = replace(adapter.plan, resolved=resolved, sites=sites, shared=shared)
    loaded = Loaded(resolved, tuple(map(_stated, sites)), tensors, adapter.name, adapter.seed)
    return Source(loaded, plan, adapter.name)


def _stated(site: PlannedSite) -> Assignment:
    at = site.site
    return Assignment(at.owner, site.form.links, site.span, at.at, at.tie, site.rates)


# ---------------------------------------------------------------------------------- composing


@dataclass(frozen=True, slots=True)
class _Composed:
    """The new adapter, and what is told of it."""

    loaded: Loaded
    plan: Plan
    told: Composition


def _composed(
    live: Live,
    sources: Mapping[str, Source],
    model: nn.Module,
    name: str,
    options: How,
    force: bool,
) -> _Composed:
    only = live.only
    if only is not None:
        source = _copied(_under(name, sources[only].loaded, sources[only].plan))
        sites = tuple(ComposedSite(s.path, None, 0.0) for s in source.plan.sites)
        told = Composition(str(live), "as it is", name, sites, exact=True)
        return _Composed(source.loaded, source.plan, told)
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
    return _Composed(loaded, plan, told)


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
        yield ComposedSite(site.path, made.rank, ratio(apart, length), made.cut, length)


def _notes(every: tuple[Place, ...], asked: Asked) -> Iterator[str]:
    if asked.way.of == "parameters":
        yield (
            f"{asked.way.name} combines parameters: products of them are mixed, so what is added "
            "to W is not the sum of what the adapters add; how='cat' is"
        )
        return
    yield from notes_of(t.site for place in every for t in place if not t.site.site.at.tensor)


__all__ = ["Composition", "Folders", "How", "compose", "compose_on"]
