"""What can be known of a spec without a model: names, values, methods, arguments.

`resolve` gives a `Resolved` spec or raises with everything that is wrong with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

from surgery.algebra.axes import symbol
from surgery.algebra.definitions import check_arguments, check_definition
from surgery.algebra.mentions import names as mentioned
from surgery.algebra.names import Names
from surgery.algebra.scalars import Decide, Open, Scalars, did_you_mean, typed
from surgery.algebra.ways import each_way
from surgery.errors import Diagnostic, Report, Span, SurgeryError, refuse
from surgery.language import syntax as ast
from surgery.language.library import Library

__all__ = [
    "DEFAULT_ADAPTER",
    "SITE_NAMES",
    "Arguments",
    "Names",
    "Resolved",
    "Values",
    "arguments",
    "findings",
    "parse_value",
    "resolve",
    "site_dependent",
    "typed",
]

DEFAULT_ADAPTER = "default"
SITE_NAMES = ("layer", "in", "out", "channels")

_MAX_FINDINGS = 100
_MAX_APPLICATIONS = 64

Values = Mapping[str, object]
Arguments = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class Resolved:
    """A spec whose names all mean something.

    adapters: name and statements, in the order of the file; the first is what is live.
    names: the values of `param`s and `let`s.
    """

    spec: ast.Spec
    library: Library
    names: Names
    adapters: tuple[tuple[str, tuple[ast.Match, ...]], ...]
    warnings: tuple[Diagnostic, ...] = ()

    @property
    def values(self) -> Mapping[str, object]:
        """The value of every `param`, as compiled."""
        return self.names.params


def resolve(spec: ast.Spec, library: Library, values: Values | None = None) -> Resolved:
    """Check a spec and give its names their values. Raises DefinitionError with all findings."""
    report = Report()
    resolved = _resolve(spec, library, values or {}, report)
    report.stop()
    return resolved


def findings(spec: ast.Spec, library: Library, values: Values | None = None) -> list[Diagnostic]:
    """Everything that is wrong with a spec, without raising."""
    report = Report()
    _resolve(spec, library, values or {}, report)
    return report.found


def _resolve(spec: ast.Spec, library: Library, values: Values, report: Report) -> Resolved:
    extended = library.extended(spec)
    _check_duplicates(spec, report)
    lets = {s.name: s for s in spec.statements if isinstance(s, ast.Let)}
    names = Names(_params(spec, values, report), lets)
    unsound: set[int] = set()
    for method in _few(_of_type(spec, ast.Method), report):
        problems = check_definition(method)
        report.extend(problems)
        unsound |= {id(method)} if problems else set()
    adapters = _adapters(spec)
    matches = [match for _, some in adapters for match in some]
    _check_names(names, _known_applications(matches, extended, report), unsound, report)
    for expr in (e for match in matches for e in _counts(match)):
        _try(report, lambda expr=expr: Scalars(names)(expr))
    if not matches:
        _no_statement(spec, report)
    return Resolved(spec, extended, names, adapters)


def _check_names(
    names: Names,
    applications: list[tuple[ast.Application, ast.Method]],
    unsound: set[int],
    report: Report,
) -> None:
    """Every let and every argument, with the site open and each condition on it both ways.

    unsound: the methods that are wrong by themselves, by identity; at no arguments are they looked
        at again.
    """
    open_site = {name: symbol(name) for name in SITE_NAMES}
    checked: set[tuple[int, Arguments]] = set()

    def run(decide: Decide) -> None:
        here = replace(names, site=open_site, decide=decide)
        for name in _few(here.lets, report):
            _try(report, lambda name=name: here[name])
        for application, method in _few(applications, report):
            given = _try(report, lambda a=application, m=method: arguments(a, m, here))
            key = (id(method), given or ())
            if given is None or id(method) in unsound or key in checked:
                continue
            if len(checked) < _MAX_APPLICATIONS:
                checked.add(key)
                report.extend(_unfit(application, method, given))

    each_way(run)


def _unfit(
    application: ast.Application, method: ast.Method, given: Arguments
) -> Iterator[Diagnostic]:
    """What is wrong with a method at these arguments, underlined where they are given."""
    keywords = {k.name: k.span for k in application.arguments}
    for found in check_arguments(method, dict(given)):
        said = [] if found.span is None else re.findall(r"\w+", found.span.text)
        places = [keywords[name] for name in dict.fromkeys(said) if name in keywords]
        yield _moved(found, places[0] if len(places) == 1 else application.span)


def _moved(found: Diagnostic, place: Span) -> Diagnostic:
    related = found.related
    if found.span is not None:
        related = (*related, (found.label or "needed here", found.span))
    return replace(found, span=place, label="", related=related)


T = TypeVar("T")


def _few(items: Iterable[T], report: Report) -> Iterator[T]:
    """The items, until there are more findings than anyone reads."""
    for item in items:
        if len(report.found) >= _MAX_FINDINGS:
            return
        yield item


def _counts(match: ast.Match) -> Iterator[ast.Expression]:
    """The expressions of a statement that are evaluated when its sites are selected."""
    if match.expect is not None:
        yield match.expect
    for step in () if match.scope is None else match.scope.steps:
        match step.index:
            case ast.Indices():
                yield from step.index.values
            case ast.Slice():
                parts = (step.index.start, step.index.stop, step.index.step)
                yield from (part for part in parts if part is not None)
            case ast.Every() | None:
                pass


def _no_statement(spec: ast.Spec, report: Report) -> None:
    if any(isinstance(s, ast.Method | ast.Format | ast.Let) for s in spec.statements):
        return  # a file of definitions is complete in itself
    report.error(
        "E116",
        "the spec adapts nothing",
        spec.span,
        hint="add a statement: `match SELECTOR apply METHOD(…)`",
    )


def _adapters(spec: ast.Spec) -> tuple[tuple[str, tuple[ast.Match, ...]], ...]:
    found: dict[str, list[ast.Match]] = {}
    for statement in spec.statements:
        match statement:
            case ast.Match():
                found.setdefault(DEFAULT_ADAPTER, []).append(statement)
            case ast.Adapter():
                found.setdefault(statement.name, []).extend(statement.body)
            case _:
                continue
    return tuple((name, tuple(matches)) for name, matches in found.items())


def _of_type(spec: ast.Spec, cls: type[T]) -> list[T]:
    return [s for s in spec.statements if isinstance(s, cls)]


def _check_duplicates(spec: ast.Spec, report: Report) -> None:
    seen: dict[tuple[str, str], Span] = {}
    for statement in spec.statements:
        match statement:
            case ast.Param() | ast.Let():
                key = ("name", statement.name)
            case ast.Method():
                key = ("method", statement.name)
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


# -------------------------------------------------------------------------------- params


_VALUES = "values are numbers, texts and truths"


def _params(spec: ast.Spec, values: Values, report: Report) -> dict[str, object]:
    declared = {p.name: p for p in _of_type(spec, ast.Param)}
    for name in values.keys() - declared.keys():
        hint = did_you_mean(name, declared) or f"declare it: `param {name}: int = 8`"
        report.error("E117", f"the spec has no param `{name}`", hint=hint)
    params: dict[str, object] = {}
    for name, param in declared.items():
        # A param that failed is open, so that what uses it is not reported as well.
        params[name] = symbol(name) if param.type in ("int", "float") else Open(name)
        _try(
            report,
            lambda name=name, param=param: params.update({name: _param(param, values, params)}),
        )
    return params


def _param(param: ast.Param, values: Values, known: Mapping[str, object]) -> object:
    if param.name in values:
        given = values[param.name]
        if not isinstance(given, str | int | float):
            shown = type(given).__name__
            refuse("E119", f"`{param.name}` is given a {shown}", param.span, hint=_VALUES)
        value = parse_value(given, param) if isinstance(given, str) else given
    elif param.default is None:
        refuse("E118", f"`{param.name}` needs a value", param.span, hint=f"--set {param.name}=…")
    else:
        value = Scalars(known)(param.default)
    return typed(value, param.type, param.name, param.span)


def parse_value(text: str, param: ast.Param) -> object:
    """A value from a command line, read as the param's type. Raises DefinitionError."""
    if param.type == "text":
        return text
    if param.type == "bool" and text in ("true", "false"):
        return text == "true"
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    hint = "write true or false" if param.type == "bool" else "write a number"
    refuse(
        "E119", f"`{text}` is not a value for `{param.name}: {param.type}`", param.span, hint=hint
    )


# -------------------------------------------------------------------------------- arguments


def _known_applications(
    matches: Iterable[ast.Match], library: Library, report: Report
) -> list[tuple[ast.Application, ast.Method]]:
    """The applications whose method and argument names are known."""
    found: list[tuple[ast.Application, ast.Method]] = []
    for match in _few(matches, report):
        application = match.application
        method = library.method(application.method)
        if method is None:
            _unknown_method(application, library, report)
            continue
        problems = [*_signature_problems(application, method)]
        report.extend(problems)
        if not problems:
            found.append((application, method))
    return found


def _unknown_method(application: ast.Application, library: Library, report: Report) -> None:
    name = application.method
    report.error(
        "E121",
        f"unknown method `{name}`",
        application.span.within(0, len(name)),
        label=did_you_mean(name, library.names()),
        hint=f"there are: {', '.join(library.names())}",
    )


def _signature_problems(application: ast.Application, method: ast.Method) -> Iterable[Diagnostic]:
    known = {a.name: a for a in method.arguments}
    seen: set[str] = set()
    for keyword in application.arguments:
        if keyword.name not in known:
            yield Diagnostic(
                "E122",
                f"{method.name}() has no argument `{keyword.name}`",
                keyword.span.within(0, len(keyword.name)),
                did_you_mean(keyword.name, known),
                f"it has: {', '.join(known) or 'none'}",
            )
        if keyword.name in seen:
            yield Diagnostic(
                "E107", f"`{keyword.name}` is given twice", keyword.span, hint="leave one out"
            )
        seen.add(keyword.name)
    for name, argument in known.items():
        if argument.default is None and name not in seen:
            yield Diagnostic(
                "E118", f"{method.name}() needs `{name}`", application.span, hint=f"{name} = …"
            )


def arguments(application: ast.Application, method: ast.Method, names: Names) -> Arguments:
    """The value of every argument, defaults included, in the order of the signature.

    Raises DefinitionError.
    """
    given = {k.name: k for k in application.arguments}
    values: dict[str, object] = {}
    for argument in method.arguments:
        keyword = given.get(argument.name)
        if keyword is not None:
            value = Scalars(names, names.decide)(keyword.value)
            values[argument.name] = typed(value, argument.type, argument.name, keyword.span)
        elif argument.default is not None:
            value = Scalars(values, names.decide)(argument.default)
            values[argument.name] = typed(value, argument.type, argument.name, argument.span)
    return tuple(values.items())


@lru_cache(maxsize=512)
def site_dependent(application: ast.Application, lets: tuple[str, ...]) -> bool:
    """Whether an argument may differ from site to site; a let is taken to be able to."""
    watched = {*SITE_NAMES, *lets}
    return any(not watched.isdisjoint(mentioned(k.value)) for k in application.arguments)


def _try(report: Report, compute: Callable[[], T]) -> T | None:
    try:
        return compute()
    except SurgeryError as error:
        report.extend(error.diagnostics)
        return None
