"""Whether a method fits a shape of site, and the nearest arguments with which it would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """Sizes that are not whole, at this shape of site."""
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
    for length, least, where in _lengths(equations):
        value = evaluate(length, form.names)
        if isinstance(value, int) and value >= least:
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


def _lengths(equations: Equations) -> Iterator[tuple[Size, int, Span | None]]:
    """Every size that must be whole, the least it may be, and where it is asked for."""
    for p in equations.parameters:
        for length in p.shape:
            yield length, 1, p.span
        if isinstance(p.beginning, Expr):
            yield from ((length, least, p.span) for length, least in _sizes(p.beginning))
    for root in (equations.weight, equations.bias, equations.input, equations.output):
        if root is not None:
            yield from ((length, least, None) for length, least in _sizes(root))


def _sizes(root: Expr) -> Iterator[tuple[Size, int]]:
    for expr in walk(root):
        yield from ((length, 1) for length in expr.shape if length != TOKENS)
        yield from hidden_sizes(expr)


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
    values = ((evaluate(s, form.names), least) for s, least, _ in _lengths(equations))
    return all(isinstance(v, int) and v >= least for v, least in values)
