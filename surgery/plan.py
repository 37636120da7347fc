"""Spec × model → `Plan`: what would be done where, and what it would cost. Nothing is touched.

Sites that are alike share one `SiteClass`: the same method with the same arguments on the same
shape. All that is derived, checked and later lowered is done once for a class.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import prod

import torch
from torch import nn

from surgery.algebra import scalars
from surgery.algebra.compose import Unchained, composed
from surgery.algebra.derive import derive, derived_at
from surgery.algebra.equations import Equations
from surgery.algebra.filters import Filter, asks
from surgery.algebra.kinds import beyond
from surgery.algebra.places import Ids, Places, places_of
from surgery.arguments import (
    Arguments,
    Link,
    applied,
    arguments,
    site_dependent,
    unchained,
)
from surgery.check import Names, Resolved
from surgery.errors import Diagnostic, Report, Span, SurgeryError
from surgery.fit import equations_at, misfits
from surgery.language import syntax as ast
from surgery.language.library import TRAINED, trained
from surgery.model.facts import Facts
from surgery.model.nearest import plural
from surgery.model.parts import WHOLE, ParameterSlice
from surgery.model.sites import Inventory, Site, admit, select, survey
from surgery.planned import Plan, PlannedSite, SharedParameter, SiteClass
from surgery.rating import Rates, rates_of
from surgery.sharing import shared_parameters
from surgery.totals import with_totals

__all__ = [
    "Assignment",
    "Plan",
    "PlannedSite",
    "SharedParameter",
    "SiteClass",
    "adapter_dtype",
    "plan",
    "plan_assignments",
]

MAX_BYTES = 2**40
"""No adapter is larger; whatever asks for more is a slip of the pen."""


def plan(
    resolved: Resolved,
    model: nn.Module,
    dtype: torch.dtype | None = None,
    ids: Ids | None = None,
) -> Plan:
    """What the spec does to the model. Pure, and as good on the meta device.

    dtype: of the parameters; None for float32 on bases of 16 bits or less, else the base's own.
    ids: of the tokens of a text that the spec has.
    Raises SelectionError or PlanError with everything that does not fit.
    """
    report = Report()
    inventory = survey(model)
    planner = _Planner(resolved, inventory, dtype, report, ids)
    sites = tuple(planner.sites())
    report.arrange()
    report.stop()
    return _planned(resolved, inventory, planner.told(sites), report)


def _planned(
    resolved: Resolved, inventory: Inventory, sites: tuple[PlannedSite, ...], report: Report
) -> Plan:
    shared = tuple(shared_parameters(sites, report))
    _check_names(sites, report)
    made = Plan(resolved, sites, shared, *inventory.counted(), tuple(report.found))
    _check_budget(made, report)
    report.stop()
    return made


@dataclass(frozen=True, slots=True)
class Assignment:
    """One site with its methods, as an artifact states it; nothing is left to be selected.

    path: of the module. links: what is put on it, in order. at: which of its parameters, and which
    part of it. rates: what all that learns at. places: which tokens it is for, if not all.
    """

    path: str
    links: tuple[Link, ...]
    span: Span
    at: ParameterSlice = WHOLE
    tie: ast.Tie | None = None
    rates: Rates = ()
    places: tuple[Places, ...] = ()


def plan_assignments(
    resolved: Resolved,
    model: nn.Module,
    assignments: Iterable[Assignment],
    adapter: str,
    dtype: torch.dtype | None = None,
) -> Plan:
    """The plan that puts given methods on given sites. Raises PlanError with all misfits.

    E306 for a path that is no site of this model; otherwise as `plan`.
    """
    report = Report()
    inventory = survey(model)
    planner = _Planner(resolved, inventory, dtype, report)
    pool = inventory.by_path
    every = {entry.path: entry.first for entry in inventory.entries}
    sites: list[PlannedSite] = []
    for one in assignments:
        known = every if one.at.tensor or one.at.kind else pool
        if one.path not in known:
            near = get_close_matches(one.path, known, 1)
            hint = f"the nearest is `{near[0]}`" if near else "it was made for another model"
            report.error("E306", f"the model has no site `{one.path}`", hint=hint)
            continue
        site = admit(known[one.path], one.span, inventory, report, one.at, one.tie)
        form = None if site is None else planner.assigned(one, site)
        if site is not None and form is not None:
            sites.append(PlannedSite(site, adapter, form, one.span, one.rates))
    report.stop()
    return _planned(resolved, inventory, planner.told(sites), report)


_Steps = tuple[tuple[ast.Application, ast.Method], ...]
"""What a statement applies: each application with its method, in order."""

_Taken = dict[int, list[tuple[ParameterSlice, ast.Selecting]]]
"""By the identity of a module, which slices of it are sites already, and by which statement."""


def _before(site: Site, taken: _Taken) -> Iterator[ast.Selecting]:
    """The statements that have selected some of what a site is."""
    for module in (site.module, *site.followers):
        for at, match in taken.get(id(module), ()):
            if at.meets(site.at):
                yield match


_EXCEPT = "leave them out of one statement with `except`"
_COMBINED = f"combine them with `then`, or {_EXCEPT}"


class _Planner:
    """The one walk over adapters and statements, with classes and arguments remembered."""

    def __init__(
        self,
        resolved: Resolved,
        inventory: Inventory,
        dtype: torch.dtype | None,
        report: Report,
        ids: Ids | None = None,
    ) -> None:
        self.resolved = resolved
        self.inventory = inventory
        self.dtype = dtype
        self.report = report
        self.ids = ids
        self.classes: dict[tuple[object, ...], SiteClass] = {}
        self.refused: set[tuple[int, tuple[object, ...]]] = set()
        self.given: dict[tuple[object, ...], Arguments] = {}
        self.known_steps: dict[int, _Steps] = {}

    def sites(self) -> Iterator[PlannedSite]:
        for adapter, matches in self.resolved.adapters:
            taken: _Taken = {}
            for match in matches:
                yield from self._match(adapter, match, taken)

    def _match(self, adapter: str, match: ast.Selecting, taken: _Taken) -> Iterator[PlannedSite]:
        steps = self.known_steps[id(match)] = self._steps(match)
        verb = match.verb if isinstance(match, ast.Train) else None
        names = (self._number, self._holds)
        kind = beyond(steps[0][1].kind)
        chosen = select(match.selection, self.inventory, self.report, *names, match.tie, verb, kind)
        known, places = self._fixed_links(steps), self._places(match)
        clashes: list[tuple[Site, ast.Selecting]] = []
        for site in chosen:
            other = next(_before(site, taken), None)
            if other is not None:
                clashes.append((site, other))
                continue
            for module in (site.module, *site.followers):
                taken.setdefault(id(module), []).append((site.at, match))
            form = self._class(steps, site, known, places)
            if form is not None:
                yield PlannedSite(site, adapter, form, match.span, self._rates(steps, site))
        self._report_clashes(match, clashes)

    def _steps(self, match: ast.Selecting) -> _Steps:
        if isinstance(match, ast.Train):
            return ((ast.Application(TRAINED, (), match.rates, span=match.span), trained()),)
        found = [(a, self.resolved.library.method(a.method)) for a in match.applications]
        return tuple((a, method) for a, method in found if method is not None)  # all are resolved

    def _report_clashes(
        self, match: ast.Selecting, clashes: list[tuple[Site, ast.Selecting]]
    ) -> None:
        for other in {id(m): m for _, m in clashes}.values():
            paths = [s.path for s, m in clashes if m is other]
            where = match.selection.selector.span
            if other is match:
                message = f"{_some(paths)} overlaps another that is selected, or shares its weight"
                hint = "select rows once, and of layers that `share` a weight one"
                self.report.error("E302", message, where, hint=hint)
                continue
            self.report.error(
                "E302",
                f"two statements of one adapter select {plural(len(paths), 'site')}: "
                f"{_some(paths)}",
                where,
                hint=_COMBINED if isinstance(match, ast.Match) else _EXCEPT,
                related=(("already selected here", other.selection.selector.span),),
            )

    def _number(self, expr: ast.Expression) -> object:
        return scalars.plain(scalars.Scalars(self.resolved.names)(expr))

    def _holds(self, where: ast.Expression, facts: Facts) -> bool | None:
        """Whether a `where` holds; it does not where it asks about what a site does not have."""
        names = self.resolved.names
        if not asks(where, names) <= facts.keys():
            return False
        try:
            return Filter(names.at(facts)).holds(where)
        except SurgeryError as error:
            self.report.extend(error.diagnostics)
            return None

    def _fixed_links(self, steps: _Steps) -> tuple[Link, ...] | None:
        """The methods with their arguments, where these are the same at every site."""
        lets, names = tuple(self.resolved.names.lets), self.resolved.names
        if any(site_dependent(application, lets) for application, _ in steps):
            return None
        return tuple(Link(method, arguments(a, method, names)) for a, method in steps)

    def assigned(self, one: Assignment, site: Site) -> SiteClass | None:
        """The class of a site whose methods and arguments are given."""
        applied = ((ast.Application(k.method.name, (), span=one.span), k) for k in one.links)
        steps = tuple((a, k.method) for a, k in applied)
        return self._class(steps, site, one.links, one.places)

    def told(self, sites: Sequence[PlannedSite]) -> tuple[PlannedSite, ...]:
        """The sites, with the arguments that the sizes of all of them tell."""
        places = {entry.path: index for index, entry in enumerate(self.inventory.entries)}
        links = with_totals(sites, lambda site: places[site.site.owner])
        return tuple(map(self._with_links, sites, links))

    def _with_links(self, site: PlannedSite, links: tuple[Link, ...]) -> PlannedSite:
        if links == site.form.links:
            return site
        one = Assignment(site.site.owner, links, site.span, places=site.form.places)
        form = self.assigned(one, site.site)
        return site if form is None else replace(site, form=form)  # why not is reported

    def _places(self, match: ast.Selecting) -> tuple[Places, ...]:
        """Which tokens a statement is for; all where what it says is wrong, and reported."""
        calls = match.at if isinstance(match, ast.Match) else ()
        try:
            return places_of(calls, self._number, self.ids)
        except SurgeryError as error:
            self.report.extend(error.diagnostics)
            return ()

    def _class(
        self,
        steps: _Steps,
        site: Site,
        known: tuple[Link, ...] | None,
        places: tuple[Places, ...],
    ) -> SiteClass | None:
        try:
            links = known if known is not None else self._links(steps, site)
        except SurgeryError as error:
            self.report.extend(_without_layer(error.diagnostics, site))
            return None
        key = (*((id(k.method), k.arguments) for k in links), *_shape_of(site), places)
        statement = id(steps[0][0])
        if key not in self.classes and (statement, key) not in self.refused:
            form = self._derived(tuple(a for a, _ in steps), links, site, places)
            if form is None:
                self.refused.add((statement, key))  # said once for all sites that are alike
                return None
            self.classes[key] = form
        return self.classes.get(key)

    def _links(self, steps: _Steps, site: Site) -> tuple[Link, ...]:
        return tuple(Link(method, self._arguments(a, method, site)) for a, method in steps)

    def _arguments(self, application: ast.Application, method: ast.Method, site: Site) -> Arguments:
        """The arguments at a site, evaluated once for all sites that they could ask the same of."""
        key = (id(application), site.layer, site.sizes)
        if key not in self.given:
            self.given[key] = arguments(application, method, self._names_at(site))
        return self.given[key]

    def _names_at(self, site: Site) -> Names:
        layer = {} if site.layer is None else {"layer": site.layer}
        return self.resolved.names.at({**site.sizes.names, **layer})

    def _rates(self, steps: _Steps, site: Site) -> Rates:
        """What a statement's parameters learn at; nothing where that is wrong, and reported."""
        try:
            return rates_of((a for a, _ in steps), lambda: self._names_at(site))
        except SurgeryError as error:
            self.report.extend(_without_layer(error.diagnostics, site))
            return ()

    def _equations(
        self, applications: tuple[ast.Application, ...], links: tuple[Link, ...], site: Site
    ) -> Equations | None:
        """The equations of a chain at a site; None if it has none, which is reported."""
        found: list[Equations] = []
        for application, link in zip(applications, links, strict=True):
            try:
                found.append(equations_at(site, link))
            except SurgeryError as error:
                # The first is enough: what follows in it is mostly wrong for the same reason.
                wrong = applied(error.diagnostics[0], application)
                self.report.extend([replace(wrong, message=f"{wrong.message} at `{site.path}`")])
                return None
        try:
            return composed(tuple(found))
        except Unchained as obstacle:
            self.report.extend([unchained(applications, obstacle, f" at `{site.path}`")])
            return None

    def _derived(
        self,
        applications: tuple[ast.Application, ...],
        links: tuple[Link, ...],
        site: Site,
        places: tuple[Places, ...],
    ) -> SiteClass | None:
        equations = self._equations(applications, links, site)
        if equations is None:
            return None
        form = SiteClass(
            links=links,
            derived=derived_at(derive(equations, site.has_bias), places),
            kind=site.kind,
            sizes=site.sizes,
            geometry=site.geometry,
            has_bias=site.has_bias,
            base_dtype=site.dtype,
            dtype=self.dtype or adapter_dtype(site.dtype),
            at=site.at,
            batch=site.batch,
            shape=site.shape,
            mode=site.mode,
            places=places,
        )
        problems = list(misfits(form, applications, site))
        self.report.extend(problems)
        return None if problems else form


def adapter_dtype(base: torch.dtype) -> torch.dtype:
    """float32 on bases of 16 bits or less, else the base's own."""
    return base if base.is_floating_point and base.itemsize >= 4 else torch.float32


def _shape_of(site: Site) -> tuple[object, ...]:
    kind = (site.kind.name, site.kind.packed)
    site_form = (*kind, site.sizes, site.geometry, site.has_bias, site.dtype)
    return (*site_form, site.at, site.batch, site.shape, site.mode)


def _without_layer(diagnostics: Iterable[Diagnostic], site: Site) -> Iterator[Diagnostic]:
    for d in diagnostics:
        if d.code == "E101" and site.layer is None and "`layer`" in d.message:
            hint = "restrict the statement with `in`, so that every site is in a list"
            yield Diagnostic("E303", f"`{site.path}` is in no layer", d.span, hint=hint)
        else:
            yield d


def _check_names(sites: Iterable[PlannedSite], report: Report) -> None:
    """E320 where a method's parameter has the name under which a slice of the module is kept."""
    sites = tuple(sites)
    inner = {(id(s.site.module), s.adapter, *s.site.at.names[:1]) for s in sites if s.site.at.names}
    for site in sites if inner else ():
        names = [] if site.site.at.names else [p.name for p in site.form.parameters]
        for name in names:
            if (id(site.site.module), site.adapter, name) in inner:
                message = f"two tensors of `{site.path}` would be kept as `{name}`"
                hint = "give the parameter another name in its method"
                report.error("E320", message, site.span, hint=hint)


def _check_budget(made: Plan, report: Report) -> None:
    if made.bytes <= MAX_BYTES:
        return
    worst = max(made.sites, key=lambda s: sum(map(prod, s.form.stored.values())))
    shapes = ", ".join(f"{n}{list(s)}" for n, s in worst.form.stored.items())
    report.error(
        "E304",
        f"the adapters would take {made.bytes / 2**40:.1f} TiB",
        worst.span,
        label=f"{worst.path} alone has {shapes}",
        hint="make the arguments smaller",
    )


def _some(paths: list[str], most: int = 3) -> str:
    shown = ", ".join(f"`{p}`" for p in paths[:most])
    return shown if len(paths) <= most else f"{shown} and {len(paths) - most} more"
