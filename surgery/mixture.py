"""The sites of what is live: where adapters that are mixed meet, they are one site.

Such a site has a class of its own, whose equations are made of those of the adapters' classes, and
whose parameters are theirs. So it is lowered, merged and inverted as any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, reduce

import torch

from surgery.algebra.compose import Unchained, chained, renamed
from surgery.algebra.derive import derived_at
from surgery.algebra.equations import Equations, Parameter
from surgery.algebra.expr import BIAS, depends_on, number
from surgery.algebra.mixing import Terms, mixed
from surgery.errors import Report
from surgery.live import Live, Then
from surgery.planned import Plan, PlannedSite
from surgery.site_class import SiteClass

Plans = Mapping[str, Plan]
"""By the name of an adapter, the plan that it came from."""

_BETWEEN = "."  # no name of a parameter or of an adapter has one


@dataclass(frozen=True)
class MixedSite(PlannedSite):
    """A site where several adapters are live, or one other than as it is.

    Its `adapter` is the text of what is live there. A parameter's name has the adapter's behind it.

    sources: what each of the adapters has there.
    """

    sources: tuple[PlannedSite, ...] = ()


def owned_parameters(site: PlannedSite) -> Iterator[tuple[str, PlannedSite, Parameter]]:
    """Each parameter of a site: its name there, and the adapter's own site that has it."""
    if not isinstance(site, MixedSite):
        yield from ((p.name, site, p) for p in site.form.parameters)
        return
    for source in site.sources:
        for p in source.form.parameters:
            yield f"{p.name}{_BETWEEN}{source.adapter}", source, p


def sources_of(site: PlannedSite) -> tuple[PlannedSite, ...]:
    """What each adapter has at a site of what is live."""
    return site.sources if isinstance(site, MixedSite) else (site,)


def owner_of(name: str) -> tuple[str, str]:
    """The name that a parameter has in its adapter, and the adapter's own; "" if that is alone."""
    own, _, adapter = name.partition(_BETWEEN)
    return own, adapter


def live_sites(live: Live, plans: Plans) -> tuple[PlannedSite, ...]:
    """The sites of what is live, in the order in which the adapters have them.

    Raises PlanError (E309) with every place where they cannot be live together.
    """
    if live.only is not None:
        return tuple(_sites_of(live.only, plans))
    report = Report()
    mixer = _Mixer(live, report)
    sites = [site for name in live.adapters for site in _sites_of(name, plans)]
    _check_ties(sites, report)
    _check_copies(sites, live, report)
    found = [mixer.site(group) for group in _groups(sites, report)]
    report.stop()
    return tuple(site for site in found if site is not None)


def _sites_of(name: str, plans: Plans) -> Iterator[PlannedSite]:
    return (site for site in plans[name].sites if site.adapter == name)


# ----------------------------------------------------------------------------- which are together


def _groups(sites: list[PlannedSite], report: Report) -> list[list[PlannedSite]]:
    """Those that are the same part of the same parameter; E309 for parts that overlap."""
    modules: dict[int, list[list[PlannedSite]]] = {}
    for site in sites:
        groups = modules.setdefault(id(site.site.module), [])
        same = next((g for g in groups if g[0].site.at == site.site.at), None)
        if same is not None:
            same.append(site)
            continue
        for other in (g[0] for g in groups if g[0].site.at.meets(site.site.at)):
            rows = "have other rows of it, some of which are the same"
            lying = other.site.at.tensor or site.site.at.tensor
            _refuse(report, other, site, "change it as it lies, and as a matrix" if lying else rows)
        groups.append([site])
    return [group for groups in modules.values() for group in groups]


def _check_ties(sites: list[PlannedSite], report: Report) -> None:
    """E309 where one adapter changes a shared weight for all layers, and another for one alone."""
    following: dict[int, list[PlannedSite]] = {}
    for site in sites:
        for module in site.site.followers:
            following.setdefault(id(module), []).append(site)
    for site in sites:
        for other in following.get(id(site.site.module), ()):
            if other.adapter == site.adapter or not other.site.at.meets(site.site.at):
                continue
            _refuse(report, other, site, "reach the weight that it shares by different layers")


def _check_copies(sites: list[PlannedSite], live: Live, report: Report) -> None:
    """E309 where one equation is made of a bias that another statement trains.

    Alone, an adapter's b is its own copy. In a mix each of them sees the base.
    """
    copies = {(id(s.site.module), s.site.at.parameter): s for s in sites if s.site.at.tensor}
    for site in sites:
        copy = copies.get((id(site.site.module), site.site.at.bias))
        if copy is None or not _makes_of_bias(site.form):
            continue
        report.error(
            "E309",
            f"`{live}` cannot be live at `{site.path}`: {site.form.named} makes something of b, "
            "which is trained besides",
            site.span,
            hint="activate one adapter as it is",
            related=(("it is trained here", copy.span),),
        )


def _makes_of_bias(form: SiteClass) -> bool:
    """Whether an equation reads b, or gives another b'."""
    merged = form.derived.merged
    return merged is None or depends_on(merged.weight, BIAS) or merged.bias is not BIAS


def _refuse(report: Report, one: PlannedSite, other: PlannedSite, reason: str) -> None:
    report.error(
        "E309",
        f"`{one.adapter}` and `{other.adapter}` cannot be live together: at `{other.path}` "
        f"they {reason}",
        other.span,
        label=f"this is `{other.adapter}`",
        hint="activate one of them, or let both select the same there",
        related=((f"this is `{one.adapter}`", one.span),),
    )


# -------------------------------------------------------------------------------------- one site


class _Mixer:
    """Sites of what is live, with their classes remembered."""

    def __init__(self, live: Live, report: Report) -> None:
        self.live = live
        self.report = report
        self.classes: dict[tuple[object, ...], SiteClass | None] = {}

    def site(self, group: list[PlannedSite]) -> PlannedSite | None:
        """What several adapters are at one place; None where nothing is left, or E309 is told."""
        first, *others = group
        live = self.live.within({site.adapter for site in group})
        if live.only is not None:
            return next(site for site in group if site.adapter == live.only)
        if not live or not all([self._fits(first, other) for other in others]):
            return None
        sources = tuple(site for site in group if site.adapter in live.adapters)
        key = (live, *((site.adapter, site.form) for site in sources))
        if key not in self.classes:
            self.classes[key] = self._class(live, sources)
        form = self.classes[key]
        return (
            None
            if form is None
            else MixedSite(first.site, str(live), form, first.span, sources=sources)
        )

    def _fits(self, one: PlannedSite, other: PlannedSite) -> bool:
        ways = [(s.site.tie, {*map(id, s.site.followers)}) for s in (one, other)]
        if ways[0] != ways[1]:
            _refuse(self.report, one, other, "do not say the same of the weight that it shares")
        if one.form.places != other.form.places:
            _refuse(self.report, one, other, "are for different tokens")
        shapes = [(s.form.kind, s.form.sizes, s.form.has_bias, s.form.batch) for s in (one, other)]
        if shapes[0] != shapes[1]:
            _refuse(self.report, one, other, "were made for layers that differ")
        same = one.form.places == other.form.places
        return same and ways[0] == ways[1] and shapes[0] == shapes[1]

    def _class(self, live: Live, sources: tuple[PlannedSite, ...]) -> SiteClass | None:
        forms = [site.form for site in sources]
        dtype = reduce(torch.promote_types, (form.dtype for form in forms))
        known = {site.adapter: _own(site.form.derived.equations, site.adapter) for site in sources}
        reason = "" if dtype in {form.dtype for form in forms} else "they have no dtype in common"
        try:
            terms = _terms(live, known)
        except Unchained as obstacle:
            reason, terms = str(obstacle), ()
        if reason:
            where = sources[0]
            message = f"`{live}` cannot be live at `{where.path}`: {reason}"
            self.report.error("E309", message, where.span, hint="activate one adapter alone")
            return None
        return replace(
            forms[0],
            links=(),
            derived=derived_at(mixed(terms, forms[0].has_bias), forms[0].places),
            dtype=dtype,
            mode="value" if any(form.mode == "value" for form in forms) else forms[0].mode,
        )


def _terms(live: Live, known: Mapping[str, Equations]) -> Terms:
    return tuple((factor, _equations(what, known)) for factor, what in live.terms)


def _equations(what: str | Then, known: Mapping[str, Equations]) -> Equations:
    if isinstance(what, str):
        return known[what]
    return reduce(chained, (_link(link, known) for link in what.links))


def _link(link: Live, known: Mapping[str, Equations]) -> Equations:
    """What stands before or behind a `then`. Raises Unchained for a mix that has no W'."""
    match _terms(link, known):
        case ((1, alone),):
            return alone
        case terms:
            found = mixed(terms, has_bias=True)
    if found.beside:
        reason = found.reason or "what it draws at random is no part of one"
        raise Unchained(f"`{link}` is mixed as it runs, and `then` needs its W': {reason}")
    return found.equations


@lru_cache(maxsize=512)
def _own(equations: Equations, adapter: str) -> Equations:
    """The equations with the adapter's name behind that of each parameter, which has begun."""
    named = renamed(equations, f"{_BETWEEN}{adapter}")
    return replace(named, parameters=tuple(_begun(named.parameters)))


def _begun(parameters: Iterable[Parameter]) -> Iterator[Parameter]:
    return (replace(p, beginning=number(0)) for p in parameters)


__all__ = ["MixedSite", "Plans", "live_sites", "owned_parameters", "owner_of", "sources_of"]
