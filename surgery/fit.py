"""Whether a method fits a shape of site, and the nearest arguments with which it would."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from surgery.algebra.axes import Size, evaluate
from surgery.algebra.elaborate import asks_sizes, instantiate
from surgery.algebra.equations import Equations
from surgery.algebra.expr import TOKENS, Expr, walk
from surgery.algebra.rules import is_zero
from surgery.algebra.shapes import hidden_sizes
from surgery.errors import Diagnostic, Span, SurgeryError
from surgery.language import syntax as ast
from surgery.model.sites import Site
from surgery.model.storage import takes_bias
from surgery.planned import SiteClass


def misfits(form: SiteClass, application: ast.Application, site: Site) -> Iterator[Diagnostic]:
    """The first number that is not what it must be, at this shape of site."""
    equations = form.derived.equations
    still = form.derived.still
    if still is not None and not (is_zero(still.bias) or takes_bias(site.module)):
        yield Diagnostic(
            "E307",
            f"{application.method} gives `{site.path}` a bias, and {form.kind.name} never adds one",
            application.span,
            hint="exclude such sites with `except`",
        )
        return
    for demand in _demands(equations):
        value = evaluate(demand.value, form.names)
        if demand.met(value):
            continue
        yield Diagnostic(
            "E301",
            f"{application.method} does not fit `{site.path}` "
            f"[out={form.sizes.fan_out}, in={form.sizes.fan_in}]: "
            f"{demand.value} = {value:g} is {demand.otherwise}",
            application.span,
            hint=_nearest_fit(form, demand.value),
            related=(("needed here", demand.where),) if demand.where else (),
        )
        return


@dataclass(frozen=True, slots=True)
class _Demand:
    """What a number must be at a site, and what is said if it is `otherwise`."""

    value: Size
    met: Callable[[int | float], bool]
    otherwise: str
    where: Span | None


def _demands(equations: Equations) -> Iterator[_Demand]:
    for p in equations.parameters:
        for length in p.shape:
            yield _whole(length, 1, p.span)
        if isinstance(p.beginning, Expr):
            yield from _within(p.beginning, p.span)
    for root in (equations.weight, equations.bias, equations.input, equations.output):
        if root is not None:
            yield from _within(root, None)


def _within(root: Expr, where: Span | None) -> Iterator[_Demand]:
    for expr in walk(root):
        for length in expr.shape:
            if length != TOKENS:
                yield _whole(length, 1, where)
        for length, least in hidden_sizes(expr):
            yield _whole(length, least, where)
        for name, value in expr.attrs:
            if isinstance(value, Size):
                yield _part(value, where) if name == "p" else _finite(value, where)


def _whole(value: Size, least: int, where: Span | None) -> _Demand:
    return _Demand(value, lambda v: isinstance(v, int) and v >= least, "not a whole size", where)


def _finite(value: Size, where: Span | None) -> _Demand:
    return _Demand(value, math.isfinite, "no number", where)


def _part(value: Size, where: Span | None) -> _Demand:
    return _Demand(value, lambda v: 0 <= v < 1, "no part that can be dropped", where)


def _nearest_fit(form: SiteClass, length: Size) -> str:
    """The nearest values of a whole-number argument for which everything is whole."""
    given = dict(form.arguments)
    fits: dict[str, list[int]] = {}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        near = sorted(range(1, min(2 * value + 8, 512)), key=lambda c, v=value: (abs(c - v), c))
        fits[name] = [*islice((c for c in near if _fits(form, {**given, name: c})), 2)]
    wanted = [f"{n}={' or '.join(map(str, sorted(v)))}" for n, v in fits.items() if v]
    return f"the nearest that fit: {', '.join(wanted)}" if wanted else f"make {length} whole"


def _fits(form: SiteClass, given: Mapping[str, object]) -> bool:
    sizes = tuple(form.sizes.names.items()) if asks_sizes(form.method) else ()
    try:
        equations = instantiate(form.method, tuple(given.items()), sizes)
    except SurgeryError:
        return False
    return all(d.met(evaluate(d.value, form.names)) for d in _demands(equations))
