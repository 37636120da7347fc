"""What can be known of a spec without a model: names, values, methods, arguments.

`resolve` gives a `Resolved` spec or raises with everything that is wrong with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from itertools import product
from typing import TypeVar

from surgery.algebra import scalars
from surgery.algebra.axes import Size, symbol
from surgery.algebra.definitions import check_definition
from surgery.algebra.scalars import Decide, Open, Scalars, undecided
from surgery.errors import Diagnostic, Report, Span, SurgeryError, refuse
from surgery.language import syntax as ast
from surgery.language.library import Library

DEFAULT_ADAPTER = "default"
SITE_NAMES = ("layer", "in", "out", "channels")

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


@dataclass(frozen=True)
class Names(Mapping[str, object]):
    """Params, lets and what the site adds; a let is evaluated when it is asked for."""

    params: Mapping[str, object]
    lets: Mapping[str, ast.Let]
    site: Mapping[str, object] = field(default_factory=dict[str, object])
    pending: tuple[str, ...] = ()
    decide: Decide = undecided

    def __getitem__(self, name: str) -> object:
        if name in self.site:
            return self.site[name]
        if name in self.params:
            return self.params[name]
        let = self.lets[name]
        if name in self.pending:
            circle = " -> ".join([*self.pending[self.pending.index(name) :], name])
            refuse("E115", f"`{name}` is defined by itself: {circle}", let.span)
        below = replace(self, pending=(*self.pending, name))
        return Scalars(below, self.decide)(let.value)

    def __iter__(self) -> Iterator[str]:
        return iter([*self.site, *self.params, *self.lets])

    def __len__(self) -> int:
        return len([*self])

    def at(self, site: Mapping[str, object]) -> Names:
        """The same names at a site, whose own names come first."""
        return replace(self, site=site)


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
    params = _params(spec, values, report)
    lets = {s.name: s for s in spec.statements if isinstance(s, ast.Let)}
    names = Names(params, lets)
    open_site = {name: symbol(name) for name in SITE_NAMES}
    # What depends on the site is open here, so whatever it decides is tried both ways.
    both = [replace(names.at(open_site), decide=decide) for decide in (_always, _never)]
    for let, way in product(lets.values(), both):
        _try(report, lambda let=let, way=way: way[let.name])
    for method in _of_type(spec, ast.Method):
        report.extend(check_definition(method))
    adapters = _adapters(spec)
    for _, matches in adapters:
        for match, way in product(matches, both):
            _check_application(match.application, extended, way, report)
    if not any(matches for _, matches in adapters):
        _no_statement(spec, report)
    return Resolved(spec, extended, names, adapters)


def _always(condition: ast.Expression) -> bool:
    del condition
    return True


def _never(condition: ast.Expression) -> bool:
    del condition
    return False


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


T = TypeVar("T")


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
                related=(("first here", seen[key]),),
            )
        seen[key] = statement.span
        if key[0] == "name" and statement.name in SITE_NAMES:
            report.error("E106", f"`{statement.name}` is the site's own name", statement.span)


# -------------------------------------------------------------------------------- params


def _params(spec: ast.Spec, values: Values, report: Report) -> dict[str, object]:
    declared = {p.name: p for p in _of_type(spec, ast.Param)}
    for name in values.keys() - declared.keys():
        near = get_close_matches(name, declared, 1)
        hint = f"did you mean `{near[0]}`?" if near else "declare it: `param name: int = 8`"
        report.error("E117", f"the spec has no param `{name}`", hint=hint)
    params: dict[str, object] = {}
    for name, param in declared.items():
        # A param that failed is open, so that what uses it is not reported as well.
        params[name] = Open(name)
        _try(
            report,
            lambda name=name, param=param: params.update({name: _param(param, values, params)}),
        )
    return params


def _param(param: ast.Param, values: Values, known: Mapping[str, object]) -> object:
    if param.name in values:
        given = values[param.name]
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
    refuse("E119", f"`{text}` is not a value for `{param.name}: {param.type}`", param.span)


def typed(value: object, wanted: ast.ValueType, name: str, span: Span) -> object:
    """The value, if it is of the type; an int counts as a float. Raises DefinitionError."""
    plain = scalars.plain(value)
    if isinstance(plain, Open | Size):
        return plain
    accepts: Mapping[str, tuple[type, ...]] = {
        "int": (int,),
        "float": (int, float),
        "text": (str,),
        "bool": (bool,),
    }
    boolean = isinstance(plain, bool) and wanted != "bool"
    if isinstance(plain, accepts[wanted]) and not boolean:
        return float(plain) if wanted == "float" and isinstance(plain, int | float) else plain
    refuse(
        "E119",
        f"`{name}` is {_article(wanted)} {wanted}, and {_shown(plain)} is {scalars.kind(plain)}",
        span,
    )


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _shown(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


# -------------------------------------------------------------------------------- arguments


def _check_application(
    application: ast.Application, library: Library, names: Names, report: Report
) -> None:
    method = library.method(application.method)
    if method is None:
        near = get_close_matches(application.method, library.names(), 1)
        report.error(
            "E121",
            f"unknown method `{application.method}`",
            application.span,
            label=f"did you mean `{near[0]}`?" if near else "",
            hint=f"there are: {', '.join(library.names())}",
        )
        return
    problems = list(_signature_problems(application, method))
    report.extend(problems)
    if not problems:
        _try(report, lambda: arguments(application, method, names))


def _signature_problems(application: ast.Application, method: ast.Method) -> Iterable[Diagnostic]:
    known = {a.name: a for a in method.arguments}
    seen: set[str] = set()
    for keyword in application.arguments:
        if keyword.name not in known:
            near = get_close_matches(keyword.name, known, 1)
            yield Diagnostic(
                "E122",
                f"{method.name}() has no argument `{keyword.name}`",
                keyword.span,
                f"did you mean `{near[0]}`?" if near else "",
                f"it has: {', '.join(known) or 'none'}",
            )
        if keyword.name in seen:
            yield Diagnostic("E107", f"`{keyword.name}` is given twice", keyword.span)
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
    return any(_mentions(k.value, watched) for k in application.arguments)


def _mentions(expr: ast.Expression, watched: set[str]) -> bool:
    match expr:
        case ast.Name():
            return expr.id in watched
        case ast.Unary():
            return _mentions(expr.operand, watched)
        case ast.Binary():
            return _mentions(expr.left, watched) or _mentions(expr.right, watched)
        case ast.Conditional():
            return any(_mentions(e, watched) for e in (expr.then, expr.condition, expr.other))
        case ast.Call():
            return any(_mentions(a, watched) for a in expr.arguments)
        case _:
            return False


def _try(report: Report, compute: object) -> None:
    assert callable(compute)
    try:
        compute()
    except SurgeryError as error:
        report.extend(error.diagnostics)
