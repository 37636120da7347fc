"""Spec × model → `Plan`: what would be done where, and what it would cost. Nothing is touched.

Sites that are alike share one `SiteClass`: the same method with the same arguments on the same
shape. All that is derived, checked and later lowered is done once for a class.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import prod

import torch
from torch import nn

from surgery.algebra import scalars
from surgery.algebra.derive import derive
from surgery.algebra.elaborate import asks_sizes, instantiate
from surgery.algebra.filters import Filter, asks
from surgery.check import Arguments, Names, Resolved, applied, arguments, site_dependent
from surgery.errors import Diagnostic, Report, Span, SurgeryError
from surgery.fit import misfits
from surgery.language import syntax as ast
from surgery.model.facts import Facts
from surgery.model.nearest import plural
from surgery.model.parts import Part, overlap
from surgery.model.sites import Inventory, Site, admit, select, survey
from surgery.planned import Plan, PlannedSite, SharedParameter, SiteClass

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


def plan(resolved: Resolved, model: nn.Module, dtype: torch.dtype | None = None) -> Plan:
    """What the spec does to the model. Pure, and as good on the meta device.

    dtype: of the parameters; None for float32 on bases of 16 bits or less, else the base's own.
    Raises SelectionError or PlanError with everything that does not fit.
    """
    report = Report()
    inventory = survey(model)
    planner = _Planner(resolved, inventory, dtype, report)
    sites = tuple(planner.sites())
    report.arrange()
    report.stop()
    return _planned(resolved, inventory, sites, report)


def _planned(
    resolved: Resolved, inventory: Inventory, sites: tuple[PlannedSite, ...], report: Report
) -> Plan:
    shared = tuple(_shared(sites))
    base = {id(p): p for p in inventory.parameters()}
    made = Plan(
        resolved,
        sites,
        shared,
        sum(p.numel() for p in base.values()),
        sum(p.numel() * p.element_size() for p in base.values()),
        tuple(report.found),
    )
    _check_budget(made, report)
    report.stop()
    return made


@dataclass(frozen=True, slots=True)
class Assignment:
    """One site with its method, as an artifact states it; nothing is left to be selected.

    path: of the module.
    """

    path: str
    method: ast.Method
    arguments: Arguments
    span: Span
    part: Part | None = None
    tie: ast.Tie | None = None


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
    known = inventory.by_path
    sites: list[PlannedSite] = []
    for one in assignments:
        if one.path not in known:
            near = get_close_matches(one.path, known, 1)
            hint = f"the nearest is `{near[0]}`" if near else "it was made for another model"
            report.error("E306", f"the model has no site `{one.path}`", hint=hint)
            continue
        site = admit(known[one.path], one.span, inventory, report, one.part, one.tie)
        form = None if site is None else planner.assigned(one, site)
        if site is not None and form is not None:
            sites.append(PlannedSite(site, adapter, form, one.span))
    report.stop()
    return _planned(resolved, inventory, tuple(sites), report)


_Taken = dict[int, list[tuple[Part | None, ast.Match]]]
"""By the identity of a module, which parts of it are sites already, and by which statement."""


def _before(site: Site, taken: _Taken) -> Iterator[ast.Match]:
    """The statements that have selected some of what a site is."""
    for module in (site.module, *site.followers):
        for part, match in taken.get(id(module), ()):
            if overlap(part, site.part):
                yield match


class _Planner:
    """The one walk over adapters and statements, with classes and arguments remembered."""

    def __init__(
        self, resolved: Resolved, inventory: Inventory, dtype: torch.dtype | None, report: Report
    ) -> None:
        self.resolved = resolved
        self.inventory = inventory
        self.dtype = dtype
        self.report = report
        self.classes: dict[tuple[object, ...], SiteClass] = {}
        self.refused: set[tuple[int, tuple[object, ...]]] = set()
        self.given: dict[tuple[object, ...], Arguments] = {}

    def sites(self) -> Iterator[PlannedSite]:
        for adapter, matches in self.resolved.adapters:
            taken: _Taken = {}
            for match in matches:
                yield from self._match(adapter, match, taken)

    def _match(self, adapter: str, match: ast.Match, taken: _Taken) -> Iterator[PlannedSite]:
        method = self.resolved.library.method(match.application.method)
        assert method is not None  # resolved
        number, holds = self._number, self._holds
        chosen = select(match.selection, self.inventory, self.report, number, holds, match.tie)
        known = self._fixed_arguments(match.application, method)
        clashes: list[tuple[Site, ast.Match]] = []
        for site in chosen:
            other = next(_before(site, taken), None)
            if other is not None:
                clashes.append((site, other))
                continue
            for module in (site.module, *site.followers):
                taken.setdefault(id(module), []).append((site.part, match))
            form = self._class(match.application, method, site, known)
            if form is not None:
                yield PlannedSite(site, adapter, form, match.span)
        self._report_clashes(match, clashes)

    def _report_clashes(self, match: ast.Match, clashes: list[tuple[Site, ast.Match]]) -> None:
        for other in {id(m): m for _, m in clashes}.values():
            paths = [s.path for s, m in clashes if m is other]
            where = match.selection.selector.span
            if other is match:
                message = f"{_some(paths)} shares its weight with another that is selected"
                hint = "with `share` they are one site: select one of them"
                self.report.error("E302", message, where, hint=hint)
                continue
            self.report.error(
                "E302",
                f"two statements of one adapter select {plural(len(paths), 'site')}: "
                f"{_some(paths)}",
                where,
                hint="leave them out of one statement with `except`",
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

    def _fixed_arguments(
        self, application: ast.Application, method: ast.Method
    ) -> Arguments | None:
        """The arguments, where they are the same at every site."""
        if site_dependent(application, tuple(self.resolved.names.lets)):
            return None
        return arguments(application, method, self.resolved.names)

    def assigned(self, one: Assignment, site: Site) -> SiteClass | None:
        """The class of a site whose method and arguments are given."""
        application = ast.Application(one.method.name, (), span=one.span)
        return self._class(application, one.method, site, one.arguments)

    def _class(
        self,
        application: ast.Application,
        method: ast.Method,
        site: Site,
        known: Arguments | None,
    ) -> SiteClass | None:
        try:
            given = known if known is not None else self._arguments(application, method, site)
        except SurgeryError as error:
            self.report.extend(_without_layer(error.diagnostics, site))
            return None
        key = (id(method), given, *_shape_of(site))
        if key not in self.classes and (id(application), key) not in self.refused:
            form = self._derived(application, method, given, site)
            if form is None:
                self.refused.add((id(application), key))  # said once for all sites that are alike
                return None
            self.classes[key] = form
        return self.classes.get(key)

    def _arguments(self, application: ast.Application, method: ast.Method, site: Site) -> Arguments:
        """The arguments at a site, evaluated once for all sites that they could ask the same of."""
        key = (id(application), site.layer, site.sizes)
        if key not in self.given:
            self.given[key] = arguments(application, method, self._names_at(site))
        return self.given[key]

    def _names_at(self, site: Site) -> Names:
        layer = {} if site.layer is None else {"layer": site.layer}
        return self.resolved.names.at({**site.sizes.names, **layer})

    def _derived(
        self, application: ast.Application, method: ast.Method, given: Arguments, site: Site
    ) -> SiteClass | None:
        sizes = tuple(site.sizes.names.items()) if asks_sizes(method) else ()
        try:
            equations = instantiate(method, given, sizes)
        except SurgeryError as error:
            # The first is enough: what follows in the method is mostly wrong for the same reason.
            found = applied(error.diagnostics[0], application)
            self.report.extend([replace(found, message=f"{found.message} at `{site.path}`")])
            return None
        form = SiteClass(
            method=method,
            arguments=given,
            derived=derive(equations, site.has_bias),
            kind=site.kind,
            sizes=site.sizes,
            geometry=site.geometry,
            has_bias=site.has_bias,
            base_dtype=site.dtype,
            dtype=self.dtype or adapter_dtype(site.dtype),
            part=site.part,
            mode=site.mode,
        )
        problems = list(misfits(form, application, site))
        self.report.extend(problems)
        return None if problems else form


def adapter_dtype(base: torch.dtype) -> torch.dtype:
    """float32 on bases of 16 bits or less, else the base's own."""
    return base if base.is_floating_point and base.itemsize >= 4 else torch.float32


def _shape_of(site: Site) -> tuple[object, ...]:
    site_form = (site.kind.name, site.sizes, site.geometry, site.has_bias, site.dtype)
    return (*site_form, site.part, site.mode)


def _without_layer(diagnostics: Iterable[Diagnostic], site: Site) -> Iterator[Diagnostic]:
    for d in diagnostics:
        if d.code == "E101" and site.layer is None and "`layer`" in d.message:
            hint = "restrict the statement with `in`, so that every site is in a list"
            yield Diagnostic("E303", f"`{site.path}` is in no layer", d.span, hint=hint)
        else:
            yield d


def _shared(sites: Iterable[PlannedSite]) -> Iterator[SharedParameter]:
    found: dict[tuple[str, str, Arguments, str], SharedParameter] = {}
    for site in sites:
        form = site.form
        for p in form.parameters:
            if not p.shared:
                continue
            shape, device = form.shapes[p.name], site.site.device
            one = SharedParameter(
                site.adapter, form.method.name, form.arguments, p, shape, form.dtype, device
            )
            before = found.get(one.key)
            found[one.key] = one if before is None else _larger(before, shape)
    yield from found.values()


def _larger(shared: SharedParameter, shape: tuple[int, ...]) -> SharedParameter:
    both = tuple(map(max, shared.shape, shape))
    return SharedParameter(
        shared.adapter,
        shared.method,
        shared.arguments,
        shared.parameter,
        both,
        shared.dtype,
        shared.device,
    )


def _check_budget(made: Plan, report: Report) -> None:
    if made.bytes <= MAX_BYTES:
        return
    worst = max(made.sites, key=lambda s: sum(map(prod, s.form.shapes.values())))
    shapes = ", ".join(f"{n}{list(s)}" for n, s in worst.form.shapes.items())
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
