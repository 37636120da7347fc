"""Whether a method fits a shape of site, and the nearest arguments with which it would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from surgery.algebra.axes import Size, evaluate
from surgery.algebra.elaborate import Equations, instantiate
from surgery.algebra.expr import TOKENS, walk
from surgery.algebra.rules import is_zero
from surgery.errors import Diagnostic, Span, SurgeryError
from surgery.language import syntax as ast
from surgery.model.sites import Site
from surgery.model.storage import takes_bias
from surgery.planned import SiteClass


def asks_sizes(method: ast.Method) -> bool:
    """Whether some branch may depend on the site's sizes."""
    return any(isinstance(item, ast.Branch) for item in method.body)


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
    for length, where in _lengths(equations):
        value = evaluate(length, form.names)
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
    for root in (equations.weight, equations.bias, equations.input, equations.output):
        for expr in () if root is None else walk(root):
            yield from ((length, None) for length in expr.shape if length != TOKENS)


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
    sizes = tuple(form.sizes.names.items()) if asks_sizes(form.method) else ()
    try:
        equations = instantiate(form.method, tuple(given.items()), sizes)
    except SurgeryError:
        return False
    values = (evaluate(s, form.names) for s, _ in _lengths(equations))
    return all(isinstance(v, int) and v > 0 for v in values)
