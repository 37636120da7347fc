"""Whether a method fits a shape of site, and the nearest arguments with which it would."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from surgery.algebra.axes import Size, evaluate, names_in, size, symbol
from surgery.algebra.beginnings import OFF_DIAGONAL, PAIRS
from surgery.algebra.elaborate import asks_sizes, instantiate
from surgery.algebra.equations import Equations, Parameter, Random
from surgery.algebra.expr import BIAS, TOKENS, Expr, walk
from surgery.algebra.hidden import hidden_sizes
from surgery.algebra.mentions import decisions, names, nodes
from surgery.algebra.rules import is_zero
from surgery.arguments import Link
from surgery.errors import Diagnostic, Span, SurgeryError
from surgery.language import syntax as ast
from surgery.model.sites import Site
from surgery.model.storage import takes_bias
from surgery.planned import SiteClass


def equations_at(place: Site | SiteClass, link: Link) -> Equations:
    """The equations of one method at a site. Raises DefinitionError."""
    if not asks_sizes(link.method):
        return instantiate(link.method, link.arguments)
    facts = (("has_bias", place.has_bias), ("kind", place.kind.name))
    return instantiate(link.method, link.arguments, tuple(place.sizes.names.items()), facts)


def misfits(
    form: SiteClass, applications: Sequence[ast.Application], site: Site
) -> Iterator[Diagnostic]:
    """The first number that is not what it must be, at this shape of site.

    applications: where each link of the class is applied.
    """
    still = form.derived.still
    if still is not None and not (is_zero(still.bias) or takes_bias(site.module, site.at)):
        yield Diagnostic(
            "E307",
            f"{form.named} gives `{site.path}` a bias, and {form.kind.name} never adds one",
            _whole_of(applications),
            hint="exclude such sites with `except`",
        )
        return
    if form.kind.bare and not site.at.bias and _asks_beyond(form):
        yield Diagnostic(
            "E307",
            f"{form.named} changes what is added to `{site.path}`, and that is not known: "
            "a parameter by itself has no bias",
            _whole_of(applications),
            hint="use a method whose equation is between weights, `W' = …`",
        )
        return
    # What a chain demands is what its links do: each sees a matrix of the same shape.
    for link, application in zip(form.links, applications, strict=True):
        found = next(_unmet(form, link, application, site), None)
        if found is not None:
            yield found
            return


def _asks_beyond(form: SiteClass) -> bool:
    """Whether the equation changes more than what W gives: the output, or the bias."""
    equations = form.derived.equations
    return equations.bias not in (None, BIAS) or equations.output is not None


def _whole_of(applications: Sequence[ast.Application]) -> Span:
    first, last = applications[0].span, applications[-1].span
    return Span(first.source, first.start, last.end)


def _unmet(
    form: SiteClass, link: Link, application: ast.Application, site: Site
) -> Iterator[Diagnostic]:
    """What one method demands of the site and does not find there."""
    for demand in _demands(equations_at(form, link)):
        value = evaluate(demand.value, form.names)
        if demand.met(value):
            continue
        yield Diagnostic(
            "E301",
            f"{application.method} does not fit `{site.path}` "
            f"[out={form.sizes.fan_out}, in={form.sizes.fan_in}]: "
            f"{demand.value} = {value:g} is {demand.otherwise}",
            application.span,
            hint=_nearest_fit(form, link, demand.value),
            related=(("needed here", demand.where),) if demand.where else (),
        )


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
        if isinstance(p.beginning, Random) and p.beginning.distribution in PAIRS:
            yield _whole(_places_left(p, p.beginning), 0, p.span)
        if isinstance(p.beginning, Random) and p.beginning.after is not None:
            yield _passed(p.beginning.after, p.span)
        if isinstance(p.beginning, Expr):
            yield from _within(p.beginning, p.span)
    for root in (equations.weight, equations.bias, equations.input, equations.output):
        if root is not None:
            yield from _within(root, None)


def _places_left(p: Parameter, beginning: Random) -> Size:
    """How many places of a matrix are not drawn, of those that could be."""
    sizes, (rows, columns) = dict(beginning.arguments), PAIRS[beginning.distribution]
    left = size(sizes[rows]) * size(sizes[columns]) - p.shape[-1]
    return left - size(sizes[rows]) if beginning.distribution == OFF_DIAGONAL else left


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


def _passed(value: Size, where: Span | None) -> _Demand:
    least = f"no number of draws from 0 to {_MOST_PASSED}"
    return _Demand(value, lambda v: isinstance(v, int) and 0 <= v <= _MOST_PASSED, least, where)


def _finite(value: Size, where: Span | None) -> _Demand:
    return _Demand(value, math.isfinite, "no number", where)


def _part(value: Size, where: Span | None) -> _Demand:
    return _Demand(value, lambda v: 0 <= v < 1, "no part that can be dropped", where)


def _nearest_fit(form: SiteClass, link: Link, length: Size) -> str:
    """The nearest values of a whole-number argument for which everything is whole."""
    fits: dict[str, list[int]] = {}
    for name, value in link.arguments:
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        found = (c for c in _tried(form, link, name, value) if _fits(form, _with(link, name, c)))
        fits[name] = [*islice(found, 2)]
    wanted = [f"{n}={' or '.join(map(str, sorted(v)))}" for n, v in fits.items() if v]
    return f"the nearest that fit: {', '.join(wanted)}" if wanted else f"make {length} whole"


_MOST_PASSED = 1 << 32  # of a generator, which is a matter of seconds

_FEW, _MANY = 64, 2048
"""How far from a value, and from 1, others are tried: by equations for each, or by one for all."""


def _tried(form: SiteClass, link: Link, name: str, value: int) -> Iterator[int]:
    """Other values of an argument that may fit, the nearest first.

    Where nothing is decided by it, they are told by the equations with the argument open.
    """
    demands: list[_Demand] = []
    far = _FEW
    if name not in _deciding(link.method):
        with suppress(SurgeryError):
            demands = [*_demands(equations_at(form, _with(link, name, symbol(name))))]
            far = _MANY if any(name in names_in(d.value) for d in demands) else 1
    near = {*range(1, far), *range(max(1, value - far + 1), value + far)} - {value}
    for other in sorted(near, key=lambda c: (abs(c - value), c)):
        if all(_met(demands, {**form.names, name: other})):
            yield other


@lru_cache(maxsize=512)
def _deciding(method: ast.Method) -> frozenset[str]:
    """The names that what a method says depends on, be it by way of a `let`."""
    lets = {node.name: names(node.value) for node in nodes(method) if isinstance(node, ast.Let)}
    found = frozenset[str]().union(*map(names, decisions(method)))
    while not (more := found.union(*(lets.get(name, ()) for name in found))) <= found:
        found = more
    return found


def _with(link: Link, name: str, value: object) -> Link:
    """The method with another value of one argument."""
    return Link(link.method, tuple({**dict(link.arguments), name: value}.items()))


def _fits(form: SiteClass, link: Link) -> bool:
    try:
        equations = equations_at(form, link)
    except SurgeryError:
        return False
    return all(_met(_demands(equations), form.names))


def _met(demands: Iterable[_Demand], numbers: Mapping[str, int | float]) -> Iterator[bool]:
    return (demand.met(evaluate(demand.value, numbers)) for demand in demands)
