"""Checking a method before any site is known: every way through its branches."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from surgery.algebra.axes import symbol
from surgery.algebra.compose import MAX_LINKS, Unchained, composed
from surgery.algebra.elaborate import Elaborator
from surgery.algebra.equations import Equations, reserved
from surgery.algebra.expr import Expr, walk
from surgery.algebra.kinds import KINDS, kind_named
from surgery.algebra.mentions import names, nodes
from surgery.algebra.ops import through
from surgery.algebra.rules import make
from surgery.algebra.scalars import Decide, Open, Scalars, did_you_mean, typed
from surgery.algebra.tensors import DROP_HINT
from surgery.algebra.ways import MAX_WAYS, each_way
from surgery.errors import Diagnostic, Report, Span, SurgeryError
from surgery.language import syntax as ast
from surgery.language.library import TRAINED, Library, trained


def check_definition(method: ast.Method) -> tuple[Diagnostic, ...]:
    """Everything that is wrong with a definition: names, types, shapes, branches, dropout."""
    report = Report()
    if method.kind not in KINDS and not (method.name == TRAINED and method == trained()):
        report.error(
            "E112",
            f"`on {method.kind}` is not a kind of site",
            _kind_place(method),
            label=did_you_mean(method.kind, KINDS),
            hint=f"this version has: {', '.join(KINDS)}",
        )
    _check_signature(method, report)
    _check_decisions(method, report)
    # A reserved name was reported, and goes on meaning what it does.
    known = reserved(kind_named(method.kind))
    open_arguments = {a.name: _symbol(a) for a in method.arguments if a.name not in known}
    _check_ways(method, open_arguments, report)
    return tuple(report.found)


def _kind_place(method: ast.Method) -> Span:
    found = re.search(rf"\bon\s+({re.escape(method.kind)})\s*\{{", method.span.text)
    return method.span if found is None else method.span.within(*found.span(1))


def check_arguments(method: ast.Method, arguments: Mapping[str, object]) -> tuple[Diagnostic, ...]:
    """What is wrong with a sound definition at these arguments, some of which may be open."""
    report = Report()
    _check_texts(method, arguments, report)
    _check_ways(method, arguments, report)
    return tuple(report.found)


def _check_texts(method: ast.Method, arguments: Mapping[str, object], report: Report) -> None:
    """E111 for a text that is none of several which the method tells apart."""
    for argument in method.arguments:
        value = arguments.get(argument.name)
        known = sorted({*_texts(method, argument.name), *_default_text(argument)})
        if isinstance(value, str) and len(known) > 1 and value not in known:
            report.error(
                "E111",
                f'`{argument.name}` is "{value}", of which {method.name} knows nothing',
                argument.span,
                label=did_you_mean(value, known),
                hint=f"{_elsewhere(method, argument.name, value)}there are: {', '.join(known)}",
            )


def _default_text(argument: ast.Argument) -> tuple[str, ...]:
    return (argument.default.value,) if isinstance(argument.default, ast.Text) else ()


def _texts(method: ast.Method, name: str) -> Iterator[str]:
    """The texts that an argument is compared with."""
    for node in nodes(method):
        match node:
            case ast.Binary("==" | "!=", ast.Name(id=asked), ast.Text(value=text)) if asked == name:
                yield text
            case _:
                continue


def _elsewhere(method: ast.Method, argument: str, text: str) -> str:
    """That a text is another method, if it is: by its name, or by what a format calls it.

    A format calls one so that has the text where that of `method` has the argument.
    """
    library = Library.standard()
    fields = {
        (fmt.name, field.name)
        for fmt in library.formats(method.name)
        for field in fmt.fields
        if argument in names(field.value)
    }
    so_called = (
        fmt.method
        for fmt in library.all_formats()
        for field in fmt.fields
        if (fmt.name, field.name) in fields and _only_text(field.value) == text
    )
    found = text if library.method(text) is not None else next(so_called, "")
    return f'"{text}" is a method of its own: apply {found}(…); ' if found else ""


def _only_text(value: ast.Expression) -> str | None:
    """The text that a field of a format must have, if it must have one."""
    match value:
        case ast.Text(value=text) | ast.Call("one_of", (ast.Text(value=text),)):
            return text
        case _:
            return None


def check_chain(links: Sequence[tuple[ast.Method, Mapping[str, object]]]) -> Unchained | None:
    """Why sound methods at these arguments, some open, cannot follow each other in any way."""
    refused: list[Unchained] = []
    fits: list[bool] = []
    few = links[: MAX_LINKS + 1]  # one more than may be, which is said where they are composed

    def run(decide: Decide) -> None:
        try:
            composed(tuple([Elaborator(given, decide).run(method) for method, given in few]))
        except Unchained as obstacle:
            refused.append(obstacle)
        except SurgeryError:
            return  # it is said of the method itself
        else:
            fits.append(True)

    each_way(run)
    return refused[0] if refused and not fits else None


def _check_signature(method: ast.Method, report: Report) -> None:
    known: dict[str, object] = {}
    words = reserved(kind_named(method.kind))
    for argument in method.arguments:
        place = argument.span.within(0, len(argument.name))
        if argument.name in words:
            report.error(
                "E106",
                f"`{argument.name}` is reserved in an equation",
                place,
                hint="use another name",
            )
        if argument.name in known:
            report.error(
                "E107",
                f"the argument `{argument.name}` stands twice",
                place,
                hint="use another name",
            )
        if argument.default is not None:
            _check_default(argument, known, report)
        known[argument.name] = _symbol(argument)


def _check_default(argument: ast.Argument, known: Mapping[str, object], report: Report) -> None:
    default = argument.default
    assert default is not None

    def run(decide: Decide) -> None:
        try:
            value = Scalars(known, decide)(default)
            typed(value, argument.type, argument.name, default.span)
        except SurgeryError as error:
            report.extend(error.diagnostics)

    each_way(run)


def _check_decisions(method: ast.Method, report: Report) -> None:
    for node in nodes(method):
        if isinstance(node, ast.Branch | ast.Conditional) and not names(node.condition):
            report.error(
                "E126",
                "this condition is always the same",
                node.condition.span,
                hint="conditions are over arguments and sizes",
            )


def _check_ways(method: ast.Method, arguments: Mapping[str, object], report: Report) -> None:
    """Run the body for every way of deciding what is open."""

    def run(decide: Decide) -> None:
        elaborator = Elaborator(arguments, decide)
        try:
            equations = elaborator.run(method)
        except SurgeryError as error:
            report.extend(error.diagnostics)
            return
        for drop in _stranded(equations):
            report.error(
                "E114",
                "drop(p) stands where it is never applied to a vector",
                elaborator.drops.get(drop, method.span),
                hint=DROP_HINT,
            )

    if not each_way(run):
        report.error(
            "E113",
            f"`{method.name}` has more than {MAX_WAYS} ways through its branches",
            method.span,
            hint="write several methods",
        )


def _symbol(argument: ast.Argument) -> object:
    if argument.type in ("int", "float"):
        return symbol(argument.name)
    return Open(argument.name, argument.type)


# ----------------------------------------------------------------------------------- dropout


def _stranded(equations: Equations) -> Iterator[Expr]:
    """Every dropout that is part of a dense value, in which nothing would be dropped."""
    if equations.weight is not None:
        yield from _in_matrix(equations.weight)
    if equations.bias is not None:
        yield from _drops(equations.bias)
    for root in (equations.input, equations.output):
        for expr in () if root is None else walk(root):
            if expr.is_activation:
                yield from _in_operands(expr)


def _in_operands(expr: Expr) -> Iterator[Expr]:
    """In what an activation is combined with; x @ M applies Mᵀ."""
    for index, operand in enumerate(expr.args):
        if expr.op == "matmul" and index == 1 and len(operand.shape) > 1:
            yield from _in_matrix(make("transpose", operand))
        elif not operand.is_activation:
            yield from _drops(operand)


def _in_matrix(root: Expr) -> Iterator[Expr]:
    """In what a matrix needs as a value, to be applied to a vector."""
    seen: set[Expr] = set()
    stack = [root]
    while stack:
        expr = stack.pop()
        if expr in seen or expr.op == "drop":
            continue
        seen.add(expr)
        applied = through(expr) or ()
        stack.extend(expr.args[i] for i in applied)
        for index, arg in enumerate(expr.args):
            if index not in applied:
                yield from _drops(arg)


def _drops(root: Expr) -> Iterator[Expr]:
    return (e for e in walk(root) if e.op == "drop")
