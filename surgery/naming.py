"""What is wrong with the statements of a spec by their names alone."""

from __future__ import annotations

from keyword import iskeyword

from surgery.arguments import SITE_NAMES
from surgery.errors import Report, Span
from surgery.language import syntax as ast
from surgery.language.library import TRAINED, trained
from surgery.live import NONE


def check_uses(spec: ast.Spec, report: Report) -> None:
    """E130 for each `use` that is left: a spec that was loaded from a file has none."""
    for use in (s for s in spec.statements if isinstance(s, ast.Use)):
        report.error(
            "E130",
            f'`use "{use.path}"` stands in a text, and there is no file beside a text',
            use.span,
            hint="write the spec to a file, and give its path",
        )


def check_adapter_names(spec: ast.Spec, report: Report) -> None:
    """E106 for an adapter that cannot be called so."""
    named = (s for s in spec.statements if isinstance(s, ast.Adapter | ast.Derived))
    for adapter in named:
        if adapter.name == NONE:
            message = f"`{NONE}` means that no adapter is live"
        elif iskeyword(adapter.name):
            message = f"`{adapter.name}` is a word of Python, which a site's code is"
        else:
            continue
        report.error("E106", message, adapter.span, hint="use another name")


def check_duplicates(spec: ast.Spec, report: Report) -> None:
    """E107 for a value or a method that is defined twice, E106 for one that cannot be."""
    seen: dict[tuple[str, str], Span] = {}
    for statement in spec.statements:
        match statement:
            case ast.Param() | ast.Let():
                key = ("name", statement.name)
            case ast.Method():
                key = ("method", statement.name)
                _check_own_name(statement, report)
            case _:
                continue
        if key in seen:
            report.error(
                "E107",
                f"{key[0]} `{statement.name}` is defined twice",
                statement.span,
                hint="use another name",
                related=(("first here", seen[key]),),
            )
        seen[key] = statement.span
        if key[0] == "name" and statement.name in SITE_NAMES:
            report.error(
                "E106",
                f"`{statement.name}` is the site's own name",
                statement.span,
                hint="use another name",
            )


def _check_own_name(method: ast.Method, report: Report) -> None:
    """E106 for a method with the name of what `train` and `save` mean, unless it is that."""
    if method.name == TRAINED and method != trained():
        message = f"`{method.name}` is what `train` and `save` put on a parameter"
        place = method.span.within(0, len("method"))
        report.error("E106", message, place, hint="use another name")
