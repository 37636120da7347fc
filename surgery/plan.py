"""Spec × model → `Plan`: what would be done where, and what it would cost. Nothing is touched.

Sites that are alike share one `SiteClass`: the same method with the same arguments on the same
shape. All that is derived, checked and later lowered is done once for a class.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from math import prod
from typing import cast

import torch
from torch import nn

from surgery.algebra import scalars
from surgery.algebra.axes import Size, evaluate
from surgery.algebra.derive import Derived, derive
from surgery.algebra.elaborate import Equations, Parameter, instantiate
from surgery.algebra.expr import Expr, render, walk
from surgery.check import Arguments, Names, Resolved, arguments, site_dependent
from surgery.errors import Diagnostic, Report, Span, SurgeryError
from surgery.language import syntax as ast
from surgery.model.layers import Geometry, LayerKind, Sizes
from surgery.model.sites import Inventory, Site, select, survey
from surgery.report import plan_json, plan_table

MAX_BYTES = 2**40
"""No adapter is larger; whatever asks for more is a slip of the pen."""


@dataclass(frozen=True)
class SiteClass:
    """A method with its arguments at one shape of site.

    shapes: of each parameter, in elements, as this site sees it.
    dtype: of the parameters.
    """

    method: ast.Method
    arguments: Arguments
    derived: Derived
    kind: LayerKind
    sizes: Sizes
    geometry: Geometry | None
    has_bias: bool
    base_dtype: torch.dtype
    dtype: torch.dtype

    @cached_property
    def names(self) -> Mapping[str, int | float]:
        """The sizes by their names in equations."""
        return dict(self.sizes.names)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each parameter in elements."""
        return {p.name: self.numbers(p.shape) for p in self.parameters}

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The declared parameters, in order."""
        return self.derived.equations.parameters

    def numbers(self, shape: tuple[Size, ...]) -> tuple[int, ...]:
        """A symbolic shape in elements."""
        return tuple(int(evaluate(s, self.names)) for s in shape)

    @cached_property
    def equation(self) -> str:
        """The equation as derived: `W' = …`, and `b' = …` where it is not b."""
        return _equation(self.derived)


def _equation(derived: Derived) -> str:
    merged, equations = derived.still, derived.equations
    if merged is None:
        given = (("x'", equations.input), ("y'", equations.output))
        return ", ".join(f"{name} = {render(e)}" for name, e in given if e is not None)
    parts = [] if merged.weight.op == "weight" else [f"W' = {render(merged.weight)}"]
    if merged.bias.op not in ("bias", "zeros"):
        parts.append(f"b' = {render(merged.bias)}")
    return ", ".join(parts) or "W' = W"


@dataclass(frozen=True)
class PlannedSite:
    """One site with what is put on it."""

    site: Site
    adapter: str
    form: SiteClass
    span: Span = field(compare=False, repr=False)

    @property
    def path(self) -> str:
        """The dotted path of the site."""
        return self.site.path


@dataclass(frozen=True)
class SharedParameter:
    """A parameter of all applications of a method with equal arguments in one adapter.

    shape: the largest that any of its sites asks for, in elements.
    """

    adapter: str
    method: str
    arguments: Arguments
    parameter: Parameter
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def key(self) -> tuple[str, str, Arguments, str]:
        """What names it within a plan."""
        return self.adapter, self.method, self.arguments, self.parameter.name


@dataclass(frozen=True)
class Plan:
    """What a spec does to a model. `str` is a table; `as_json` plain data.

    base_count, base_bytes: of the model's own parameters, tied ones counted once.
    """

    resolved: Resolved
    sites: tuple[PlannedSite, ...]
    shared: tuple[SharedParameter, ...]
    base_count: int
    base_bytes: int
    diagnostics: tuple[Diagnostic, ...] = ()

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters by name, in the order of the file; the first is the live one."""
        return tuple(dict.fromkeys(site.adapter for site in self.sites))

    @cached_property
    def trainable(self) -> int:
        """The number of trainable elements, shared ones counted once."""
        return sum(count for count, trained, _ in self._tensors() if trained)

    @cached_property
    def total(self) -> int:
        """The number of elements of all adapters, frozen ones included."""
        return sum(count for count, _, _ in self._tensors())

    @cached_property
    def bytes(self) -> int:
        """The memory of all adapters, in bytes."""
        return sum(count * dtype.itemsize for count, _, dtype in self._tensors())

    def _tensors(self) -> Iterator[tuple[int, bool, torch.dtype]]:
        for site in self.sites:
            for p in site.form.parameters:
                if not p.shared:
                    yield prod(site.form.shapes[p.name]), p.trained, site.form.dtype
        for shared in self.shared:
            yield prod(shared.shape), shared.parameter.trained, shared.dtype

    def __str__(self) -> str:
        return plan_table(self)

    def as_json(self) -> dict[str, object]:
        """The plan as plain data."""
        return plan_json(self)


def plan(
    resolved: Resolved, model: nn.Module, dtype: torch.dtype | None = None
) -> Plan:
    """What the spec does to the model. Pure, and as good on the meta device.

    dtype: of the parameters; None for float32 on bases of 16 bits or less, else the base's own.
    Raises SelectionError or PlanError with everything that does not fit.
    """
    report = Report()
    inventory = survey(model)
    planner = _Planner(resolved, inventory, dtype, report)
    sites = tuple(planner.sites())
    report.stop()
    return _planned(resolved, model, sites, report)


def _planned(
    resolved: Resolved, model: nn.Module, sites: tuple[PlannedSite, ...], report: Report
) -> Plan:
    shared = tuple(_shared(sites))
    base = {id(p): p for n, p in model.named_parameters() if ".surgery." not in f".{n}"}
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
    known = {site.path: site for site in inventory.sites}
    sites: list[PlannedSite] = []
    for one in assignments:
        if one.path not in known:
            near = get_close_matches(one.path, known, 1)
            hint = f"the nearest is `{near[0]}`" if near else "it was made for another model"
            report.error("E306", f"the model has no site `{one.path}`", hint=hint)
            continue
        form = planner.assigned(one, known[one.path])
        if form is not None:
            sites.append(PlannedSite(known[one.path], adapter, form, one.span))
    report.stop()
    return _planned(resolved, model, tuple(sites), report)


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
            given = known if known is not None else arguments(application, method, self._names_at(site))
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
        sizes = tuple(site.sizes.names.items()) if _asks_sizes(method) else ()
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
        problems = list(_misfits(form, application, site))
        self.report.extend(problems)
        return None if problems else form


def adapter_dtype(base: torch.dtype) -> torch.dtype:
    """float32 on bases of 16 bits or less, else the base's own."""
    return base if base.is_floating_point and base.itemsize >= 4 else torch.float32


def _shape_of(site: Site) -> tuple[object, ...]:
    return (site.kind.name, site.sizes, site.geometry, site.has_bias, site.dtype)


def _asks_sizes(method: ast.Method) -> bool:
    """Whether some branch may depend on the site's sizes."""
    return any(isinstance(item, ast.Branch) for item in method.body)


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


# ------------------------------------------------------------------------------ what fits


def _misfits(
    form: SiteClass, application: ast.Application, site: Site
) -> Iterator[Diagnostic]:
    """Sizes that are not whole, at this shape of site."""
    equations = form.derived.equations
    for length, where in _lengths(equations):
        value = evaluate(length, {"tokens": 1, **form.names})
        if isinstance(value, int) and value > 0:
            continue
        yield Diagnostic(
            "E301",
            f"{application.method} does not fit `{site.path}` "
            f"[out={form.sizes.fan_out}, in={form.sizes.fan_in}]: "
            f"{length} = {value:g} is not a whole size",
            application.span,
            hint=_nearest_fit(form, length),
            related=(("needed here", where),) if where else (),
        )
        return


def _lengths(equations: Equations) -> Iterator[tuple[Size, Span | None]]:
    for p in equations.parameters:
        for length in p.shape:
            yield length, p.span
    roots = [equations.weight, equations.bias, equations.input, equations.output]
    for root in cast(list[Expr], [r for r in roots if r is not None]):
        for expr in walk(root):
            yield from ((length, None) for length in expr.shape)


def _nearest_fit(form: SiteClass, length: Size) -> str:
    """The nearest values of a whole-number argument for which everything is whole."""
    given = dict(form.arguments)
    fits: dict[str, list[int]] = {}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        near = sorted(range(1, min(2 * value + 8, 512)), key=lambda c, v=value: (abs(c - v), c))
        fits[name] = [c for c in near if _fits(form, {**given, name: c})][:2]
    wanted = [f"{n}={' or '.join(map(str, sorted(v)))}" for n, v in fits.items() if v]
    return f"the nearest that fit: {', '.join(wanted)}" if wanted else f"make {length} whole"


def _fits(form: SiteClass, given: Mapping[str, object]) -> bool:
    sizes = tuple(form.sizes.names.items()) if _asks_sizes(form.method) else ()
    try:
        equations = instantiate(form.method, tuple(given.items()), sizes)
    except SurgeryError:
        return False
    values = (evaluate(s, {"tokens": 1, **form.names}) for s, _ in _lengths(equations))
    return all(isinstance(v, int) and v > 0 for v in values)


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
