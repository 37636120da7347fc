"""One class of sites → one `fx.Graph`: the interpreter run over proxies.

The graph has one `base` call, which is the site's own layer, and the adapter's nodes around it. It
is made once for all sites that are alike, and compiled once to straight-line code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import Any, cast

from torch import Tensor, fx, nn

from surgery import values
from surgery.algebra.expr import BIAS, WEIGHT, depends_on
from surgery.algebra.interpret import Unlowerable
from surgery.algebra.rules import is_zero
from surgery.calling import lower_call
from surgery.coding import SiteGraph, code_of
from surgery.errors import Report
from surgery.mixture import MixedSite, Plans, owned_parameters
from surgery.model.parts import ENTRIES
from surgery.model.storage import Which, name_of
from surgery.nodes import GraphPort, Layer, Lowering, Lowerings, at_places, at_site
from surgery.plan import Plan, PlannedSite
from surgery.planned import SharedKey


@lru_cache(maxsize=1024)
def lower(keys: Lowerings) -> SiteGraph:
    """The graph of a class of modules. Raises `Unlowerable` where an equation cannot run there.

    A module with one site that is all of it, or with sites that are rows of it and do not overlap.
    """
    return code_of(_build(keys))


@lru_cache(maxsize=1024)
def lower_values(keys: Lowerings) -> Mapping[str, SiteGraph]:
    """For sites that are reached by their value: the graph of each parameter that changes.

    Raises `Unlowerable` where there is no weight to be computed.
    """
    found: dict[str, SiteGraph] = {}
    groups = [tuple(group) for _, group in groupby(keys, key=_parameter)]
    # A bias that is trained and changed besides is what the change makes of the trained one.
    copies = {_parameter(own[0]): own for own in groups if own[0].form.at.tensor}
    for own in sorted(groups, key=lambda own: not own[0].form.at.tensor):
        for which in _WHICH:
            # What layers share is the weight; a bias is each layer's own.
            followed = which == "bias" and own[0].follows
            if any([_changes(key, which) for key in own]) and not followed:
                name = name_of(own[0].form.at, which)
                found[name] = code_of(values.build(own, which, copies))
    return found


_WHICH: tuple[Which, ...] = ("weight", "bias")


def _parameter(key: Lowering) -> str:
    return key.form.at.parameter


def graphs(keys: Lowerings) -> Mapping[str, SiteGraph]:
    """All graphs of a module: `forward`, and those of its parameters."""
    called, computed = by_mode(keys)
    forward = {"forward": lower(called)} if called else {}
    whole = around(keys)
    found = {**forward, **lower_values(computed)}
    return found if whole is None else {**found, **lower_call(whole)}


def around(keys: Lowerings) -> Lowering | None:
    """The site that is the module's call, whatever that is of; there is one at most."""
    return next((key for key in keys if key.form.mode == "around"), None)


def by_mode(keys: Lowerings) -> tuple[Lowerings, Lowerings]:
    """The sites that are reached by the module's call, and those that are by their value."""
    called = tuple(key for key in keys if key.form.mode == "call")
    return called, tuple(key for key in keys if key.form.mode == "value")


def check(plan: Plan) -> None:
    """Lower every class of sites of a plan. Raises PlanError (E305) with all that cannot run."""
    check_sites(plan.sites, dict.fromkeys(plan.adapters, plan))


def check_sites(sites: Iterable[PlannedSite], plans: Plans) -> None:
    """The same for some sites, whose plans are given by adapter."""
    report = Report()
    banks = _banks(plans)
    seen: set[int] = set()
    for site in sites:
        if id(site.form) in seen:
            continue
        seen.add(id(site.form))
        try:
            key = _key(site, banks)
            graphs((key,))
            if site.site.followers:
                graphs((_following(key),))
        except Unlowerable as obstacle:
            report.error(
                "E305",
                f"{_named(site)} cannot run on `{site.path}` ({site.form.kind.name}): {obstacle}",
                site.span,
                hint=_MIXED if isinstance(site, MixedSite) else "exclude such sites with `except`",
            )
    report.stop()


_MIXED = "activate one adapter alone, or another mix"


def _named(site: PlannedSite) -> str:
    return f"`{site.adapter}`" if isinstance(site, MixedSite) else site.form.named


def by_module(sites: Iterable[PlannedSite], plans: Plans) -> list[tuple[nn.Module, Lowerings]]:
    """Every module with some sites, in order, and what its graph is looked up by.

    plans: by adapter, those that the sites come from.
    """
    banks = _banks(plans)
    sites = tuple(sites)
    modules = (module for site in sites for module in (site.site.module, *site.site.followers))
    found = {id(module): (module, list[Lowering]()) for module in modules}
    for site in sorted(sites, key=_start):  # those of one parameter together, in order
        key = _key(site, banks)
        found[id(site.site.module)][1].append(key)
        for follower in site.site.followers:
            found[id(follower)][1].append(_following(key))
    return [(module, tuple(keys)) for module, keys in found.values()]


def _following(key: Lowering) -> Lowering:
    """What a layer that shares the weight of a site is lowered by."""
    return replace(key, form=replace(key.form, mode="value"), follows=True)


def _start(site: PlannedSite) -> tuple[str, int, int, int]:
    """Those of one parameter together, whole batches first, then by rows."""
    at, part = site.site.at, site.site.part
    period, start = (0, 0) if part is None else (part.period, part.start)
    return at.parameter, -1 if at.index is None else at.index, period, start


_Banks = Mapping[SharedKey, tuple[str, tuple[int, ...]]]
"""Where each shared parameter is below `SHARED`, and its stored shape."""


def _banks(plans: Plans) -> _Banks:
    return {
        s.key: (f"{plan.groups[s.key]}.{s.parameter.name}", s.shape)
        for plan in {id(plan): plan for plan in plans.values()}.values()
        for s in plan.shared
    }


def _key(site: PlannedSite, banks: _Banks) -> Lowering:
    own = tuple(owned_parameters(site))
    shared = ((n, source.form.bank(source.adapter, p)) for n, source, p in own if p.shared)
    return Lowering(
        site.form,
        "" if isinstance(site, MixedSite) else site.adapter,
        tuple((name, *banks[key]) for name, key in shared),
        narrow=tuple(
            n for n, source, p in own if source.form.dtype != site.form.dtype and not p.whole
        ),
    )


# ------------------------------------------------------------------------------- the graph


def _build(keys: Lowerings) -> fx.Graph:
    graph = fx.Graph()
    kind = keys[0].form.kind
    layer = Layer(graph, kind.argument)
    found = [(key.form.part, _site_nodes(key, layer)) for key in keys]
    y = found[0][1]
    if found[0][0] is not None:
        y = values.assembled(found, lambda: kind.features_last(layer.output), ENTRIES, layer)
    graph.output(cast(Any, kind.features_back(y)).node)
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    graph.lint()
    return graph


def _site_nodes(key: Lowering, layer: Layer) -> Any:
    """The output of one site, features last."""
    interpreter, port = at_site(key, layer)
    y = _finished(interpreter.run(key.form.derived, cast(Tensor, layer.input)), port)
    return at_places(key.form, y, port) if key.form.places else y


def _changes(key: Lowering, which: Which) -> bool:
    """Whether an adapter changes a parameter of a layer. Raises `Unlowerable` if there is no W'."""
    merged = key.form.derived.merged
    if merged is None or key.form.places:
        raise Unlowerable(key.form.derived.reason)
    if key.form.derived.noisy:
        raise Unlowerable("noise is for what passes the layer, and here its weight is computed")
    if key.follows and depends_on(merged.weight, BIAS):
        raise Unlowerable("W' is made of b, which the layers that share the weight do not share")
    if which == "weight":
        return merged.weight is not WEIGHT
    return not (merged.bias.op == "bias" or is_zero(merged.bias))


def _finished(y: Any, port: GraphPort) -> Any:
    """The output in the dtype of the site's own."""
    if port.output is not None:
        return y.to(port.output.dtype)
    return port.like(y) if port.mixed else y
