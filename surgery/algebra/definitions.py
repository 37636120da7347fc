"""Checking a method's definition: every way through its branches, before any site is known."""

from __future__ import annotations

from collections.abc import Iterator

from surgery.algebra.axes import symbol
from surgery.algebra.derive import derive
from surgery.algebra.elaborate import KINDS, RESERVED, Elaborator, Equations
from surgery.algebra.expr import Expr, walk
from surgery.algebra.ops import OPS
from surgery.algebra.scalars import Open
from surgery.errors import Diagnostic, Report, SurgeryError
from surgery.language import syntax as ast

_MAX_WAYS = 64


def check_definition(method: ast.Method) -> tuple[Diagnostic, ...]:
    """Everything that is wrong with a definition: names, shapes, branches, dropout."""
    report = Report()
    _check_signature(method, report)
    if method.kind not in KINDS:
        report.error(
            "E112",
            f"`on {method.kind}` is not a kind of site",
            method.span,
            hint=f"this version has: {', '.join(KINDS)}",
        )
    for equations in _ways(method, report):
        if _stranded_drop(equations):
            report.error(
                "E114",
                "drop(p) stands where it is never applied to a vector",
                method.span,
                hint="write it beside @, in a product that is applied: `B @ A @ drop(p)`",
            )
    return tuple(report.found)


def _check_signature(method: ast.Method, report: Report) -> None:
    seen: set[str] = set()
    for argument in method.arguments:
        if argument.name in RESERVED:
            report.error("E106", f"`{argument.name}` is reserved in an equation", argument.span)
        if argument.name in seen:
            report.error("E107", f"the argument `{argument.name}` stands twice", argument.span)
        seen.add(argument.name)


def _ways(method: ast.Method, report: Report) -> Iterator[Equations]:
    """The equations by symbols, every open condition decided both ways."""
    symbols = {a.name: _open(a) for a in method.arguments}
    pending: list[dict[ast.Expression, bool]] = [{}]
    for _ in range(_MAX_WAYS):
        if not pending:
            return
        taken = pending.pop()

        def decide(condition: ast.Expression, taken: dict[ast.Expression, bool] = taken) -> bool:
            if condition not in taken:
                pending.append({**taken, condition: False})
                taken[condition] = True
            return taken[condition]

        try:
            yield Elaborator(symbols, decide).run(method.body)
        except SurgeryError as error:
            report.extend(_placed(d, method) for d in error.diagnostics)
    if pending:
        report.error(
            "E113",
            f"`{method.name}` has more than {_MAX_WAYS} ways through its branches",
            method.span,
        )


def _placed(diagnostic: Diagnostic, method: ast.Method) -> Diagnostic:
    if diagnostic.span is not None:
        return diagnostic
    return Diagnostic(diagnostic.code, diagnostic.message, method.span, hint=diagnostic.hint)


def _open(argument: ast.Argument) -> object:
    if argument.type in ("int", "float"):
        return symbol(argument.name)
    return Open(argument.name)


def _stranded_drop(equations: Equations) -> bool:
    """Whether some dropout is only ever part of a dense value."""
    merged = derive(equations, has_bias=True).merged
    if merged is None:
        return False  # activation equations are checked where they are lowered
    drops = {e for e in (*walk(merged.weight), *walk(merged.bias)) if e.op == "drop"}
    return not drops <= _applied(merged.weight)


def _applied(expr: Expr) -> set[Expr]:
    """What is reached by applying `expr` to a vector, through structure alone."""
    op = OPS.get(expr.op)
    if op is None or op.apply is None:
        return set()
    return {expr}.union(*(_applied(expr.args[i]) for i in op.through))
