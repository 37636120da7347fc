"""Spec × model → `Plan`: what would be done where, and what it would cost. Nothing is touched.

Sites that are alike share one `SiteClass`: the same method with the same arguments on the same
shape. All that is derived, checked and later lowered is done once for a class.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod

import torch
from torch import nn

from surgery.algebra import scalars
from surgery.algebra.derive import derive
from surgery.algebra.elaborate import asks_sizes, instantiate
from surgery.check import Arguments, Names, Resolved, arguments, site_dependent
from surgery.errors import Diagnostic, Report, Span, SurgeryError
from surgery.fit import misfits
from surgery.language import syntax as ast
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
    """One site with its method, as an artifact states it; nothing is left to be selected."""

    path: str
    method: ast.Method
    arguments: Arguments
    span: Span


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
        site = admit(known[one.path], one.span, inventory, report)
        form = None if site is None else planner.assigned(one, site)
        if site is not None and form is not None:
            sites.append(PlannedSite(site, adapter, form, one.span))
    report.stop()
    return _planned(resolved, inventory, tuple(sites), report)


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

    def sites(self) -> Iterator[PlannedSite]:
        for adapter, matches in self.resolved.adapters:
            taken: dict[str, ast.Match] = {}
            for match in matches:
                yield from self._match(adapter, match, taken)

    def _match(
        self, adapter: str, match: ast.Match, taken: dict[str, ast.Match]
    ) -> Iterator[PlannedSite]:
        method = self.resolved.library.method(match.application.method)
        assert method is not None  # resolved
        chosen = select(match, self.inventory, self.report, self._number)
        known = self._fixed_arguments(match.application, method)
        clashes: list[tuple[Site, ast.Match]] = []
        for site in chosen:
            if site.path in taken:
                clashes.append((site, taken[site.path]))
                continue
            taken[site.path] = match
            form = self._class(match.application, method, site, known)
            if form is not None:
                yield PlannedSite(site, adapter, form, match.span)
        self._report_clashes(match, clashes)

    def _report_clashes(self, match: ast.Match, clashes: list[tuple[Site, ast.Match]]) -> None:
        for other in {id(m): m for _, m in clashes}.values():
            paths = [s.path for s, m in clashes if m is other]
            self.report.error(
                "E302",
                f"two statements of one adapter select {len(paths)} site(s): {_some(paths)}",
                match.selector.span,
                hint="leave them out of one statement with `except`",
                related=(("already selected here", other.selector.span),),
            )

    def _number(self, expr: ast.Expression) -> object:
        return scalars.plain(scalars.Scalars(self.resolved.names)(expr))

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
            given = (
                known if known is not None else arguments(application, method, self._names_at(site))
            )
        except SurgeryError as error:
            self.report.extend(_without_layer(error.diagnostics, site))
            return None
        key = (id(method), given, *_shape_of(site))
        if key not in self.classes:
            form = self._derived(application, method, given, site)
            if form is None:
                return None
            self.classes[key] = form
        return self.classes[key]

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
            self.report.extend(_applied(d, application) for d in error.diagnostics)
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
        )
        problems = list(misfits(form, application, site))
        self.report.extend(problems)
        return None if problems else form


def adapter_dtype(base: torch.dtype) -> torch.dtype:
    """float32 on bases of 16 bits or less, else the base's own."""
    return base if base.is_floating_point and base.itemsize >= 4 else torch.float32


def _shape_of(site: Site) -> tuple[object, ...]:
    return (site.kind.name, site.sizes, site.geometry, site.has_bias, site.dtype)


def _applied(diagnostic: Diagnostic, application: ast.Application) -> Diagnostic:
    """A finding inside a method, with the application that led there."""
    related = (*diagnostic.related, ("applied here", application.span))
    return Diagnostic(
        diagnostic.code,
        diagnostic.message,
        diagnostic.span,
        diagnostic.label,
        diagnostic.hint,
        related,
    )


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
