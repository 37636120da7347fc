"""What can be known of a spec without a model: names, values, methods, arguments.

`resolve` gives a `Resolved` spec or raises with everything that is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from surgery.algebra.axes import symbol
from surgery.algebra.definitions import check_definition
from surgery.algebra.filters import FACTS, Filter
from surgery.algebra.mentions import nodes
from surgery.algebra.names import Names
from surgery.algebra.places import places_of
from surgery.algebra.scalars import Decide, Scalars, did_you_mean, plain, typed
from surgery.algebra.ways import each_way
from surgery.arguments import (
    SITE_NAMES,
    Arguments,
    Link,
    applied,
    arguments,
    open_value,
    signature_problems,
    site_dependent,
    unfit,
    unfit_chain,
    unknown_method,
    wrong_kind,
)
from surgery.errors import Diagnostic, Report, Span, SurgeryError, refuse
from surgery.language import syntax as ast
from surgery.language.library import Library
from surgery.language.patterns import compile_selector
from surgery.live import Live, read_live
from surgery.naming import check_adapter_names, check_duplicates, check_uses
from surgery.rating import rate_findings

if TYPE_CHECKING:
    from surgery.derivation import Derivation

__all__ = [
    "DEFAULT_ADAPTER",
    "SITE_NAMES",
    "Arguments",
    "Names",
    "Resolved",
    "Values",
    "adapts_nothing",
    "applied",
    "arguments",
    "findings",
    "parse_value",
    "resolve",
    "site_dependent",
    "typed",
]

DEFAULT_ADAPTER = "default"

_MAX_FINDINGS = 100
_MAX_APPLICATIONS = 64

Values = Mapping[str, object]
Adapters = tuple[tuple[str, tuple[ast.Selecting, ...]], ...]
"""The adapters by name, each with its statements, in the order of the file."""


@dataclass(frozen=True)
class Resolved:
    """A spec whose names all mean something.

    adapters: name and statements, in the order of the file.
    names: the values of `param`s and `let`s.
    live: what `activate` says; None where nothing says it, and the first adapter is live.
    derived: what is made of these adapters, or of the model's, each behind what it is made of.
    """

    spec: ast.Spec
    library: Library
    names: Names
    adapters: Adapters
    warnings: tuple[Diagnostic, ...] = ()
    live: Live | None = None
    derived: tuple[Derivation, ...] = ()

    @property
    def values(self) -> Mapping[str, object]:
        """The value of every `param`, as compiled."""
        return self.names.params


def unstated(adapter: str, span: Span) -> Resolved:
    """A spec without statements, for an adapter whose sites are given one by one."""
    return Resolved(ast.Spec((), span=span), Library.standard(), Names({}, {}), ((adapter, ()),))


def resolve(
    spec: ast.Spec,
    library: Library,
    values: Values | None = None,
    present: Collection[str] | None = None,
) -> Resolved:
    """Check a spec and give its names their values. Raises DefinitionError with all findings.

    present: the adapters of the model, of which others may be made; None where there is no model.
    """
    report = Report()
    resolved = _resolve(spec, library, values or {}, report, present)
    report.arrange()
    report.stop()
    return resolved


def findings(spec: ast.Spec, library: Library, values: Values | None = None) -> list[Diagnostic]:
    """Everything that is wrong with a spec, without raising."""
    report = Report()
    _resolve(spec, library, values or {}, report)
    report.arrange()
    return report.found


def _resolve(
    spec: ast.Spec,
    library: Library,
    values: Values,
    report: Report,
    present: Collection[str] | None = None,
) -> Resolved:
    extended = library.extended(spec)
    check_uses(spec, report)
    if report.failed:  # no name is known to mean nothing before the files are read
        return Resolved(spec, extended, Names({}, {}), ())
    check_adapter_names(spec, report)
    check_duplicates(spec, report)
    lets: dict[str, ast.Let] = {}
    for let in _of_type(spec, ast.Let):
        lets.setdefault(let.name, let)  # a second of its name is an error of its own
    names = Names(_params(spec, values, report), lets)
    unsound: set[int] = set()
    for method in _few(_of_type(spec, ast.Method), report):
        problems = check_definition(method)
        report.extend(problems)
        unsound |= {id(method)} if problems else set()
    adapters = _adapters(spec)
    matches = [match for _, some in adapters for match in some]
    wheres = [m.selection.where for m in matches if m.selection.where is not None]
    for pattern in _few(_patterns(spec), report):
        compile_selector(pattern, report)
    _check_wheres(wheres, names, report)
    report.extend(rate_findings(matches, extended, names))
    _check_names(names, _chains(matches, extended, unsound, report), unsound, report)
    here = replace(names, decide=_either)
    for expr in (e for match in matches for e in _counts(match.selection)):
        _try(report, lambda expr=expr: Scalars(here, _either)(expr))
    for places in (match.at for match in matches if isinstance(match, ast.Match)):
        _try(
            report,
            lambda at=places: places_of(at, lambda e: plain(Scalars(here, _either)(e)), _known),
        )
    made = _of_type(spec, ast.Derived)
    if not matches and not made:
        _no_statement(spec, report)
    known = dict.fromkeys([*(name for name, _ in adapters), *(one.name for one in made)])
    live = _live(spec, tuple(known), here, report)
    derived = _derived(spec, adapters, here, present, report)
    return Resolved(spec, extended, names, adapters, live=live, derived=derived)


def _patterns(spec: ast.Spec) -> Iterator[ast.Regex | ast.Glob]:
    return (n for n in nodes(spec) if isinstance(n, ast.Regex | ast.Glob))


def _check_wheres(wheres: list[ast.Expression], names: Names, report: Report) -> None:
    """Every `where`, with what it asks about open."""

    def run(decide: Decide) -> None:
        here = replace(names, site=FACTS, decide=decide)
        for where in _few(wheres, report):
            _try(report, lambda where=where: Filter(here, decide).holds(where))

    each_way(run)


_Chain = list[tuple[ast.Application, "ast.Method | None"]]
"""What a statement applies, in order; None for a method that there is not."""


def _check_names(names: Names, chains: list[_Chain], unsound: set[int], report: Report) -> None:
    """Every let and every argument, with the site open and each condition on it both ways.

    unsound: the methods and applications that are wrong by themselves, by identity; at no arguments
        are they looked at again.
    """
    open_site = {name: symbol(name) for name in SITE_NAMES}
    checked: dict[tuple[int, Arguments], bool] = {}
    followed: set[tuple[tuple[int, Arguments], ...]] = set()

    def run(decide: Decide) -> None:
        here = replace(names, site=open_site, decide=decide)
        for name in _few(here.lets, report):
            _try(report, lambda name=name: here[name])
        for chain in _few(chains, report):
            found = [_checked(a, m, here, unsound, checked, report) for a, m in chain]
            links = tuple(link for link in found if link is not None)
            key = tuple((id(link.method), link.arguments) for link in links)
            if len(chain) == len(links) > 1 and key not in followed:
                followed.add(key)
                report.extend(unfit_chain([a for a, _ in chain], links))

    each_way(run)


def _checked(
    application: ast.Application,
    method: ast.Method | None,
    names: Names,
    unsound: set[int],
    checked: dict[tuple[int, Arguments], bool],
    report: Report,
) -> Link | None:
    """An application with its arguments, if all is well with it; what is not is reported.

    checked: what was looked at before, and whether all was well with it.
    """
    if method is None:
        for keyword in application.arguments:
            _try(report, lambda k=keyword: Scalars(names, names.decide)(k.value))
        return None
    given = _try(report, lambda: arguments(application, method, names))
    if given is None or {id(method), id(application)} & unsound:
        return None
    key = (id(method), given)
    if key not in checked and len(checked) < _MAX_APPLICATIONS:
        problems = [*unfit(application, method, given)]
        report.extend(problems)
        checked[key] = not problems
    return Link(method, given) if checked.get(key) else None


T = TypeVar("T")


def _few(items: Iterable[T], report: Report) -> Iterator[T]:
    """The items, until there are more findings than anyone reads."""
    for item in items:
        if len(report.found) >= _MAX_FINDINGS:
            return
        yield item


def _counts(selection: ast.Selection) -> Iterator[ast.Expression]:
    """The expressions of a statement that are evaluated when its sites are selected."""
    if selection.expect is not None:
        yield selection.expect
    for step in (step for scope in selection.scopes for step in scope.steps):
        yield from _bounds(step.index)
    for node in (n for s in (selection.selector, selection.exclude) if s for n in nodes(s)):
        if isinstance(node, ast.Rows):
            yield from _bounds(node.rows)


def _bounds(index: ast.Index | None) -> Iterator[ast.Expression]:
    match index:
        case ast.Indices(values):
            yield from values
        case ast.Slice():
            yield from (p for p in (index.start, index.stop, index.step) if p is not None)
        case ast.Every() | None:
            pass


def _no_statement(spec: ast.Spec, report: Report) -> None:
    if any(isinstance(s, ast.Method | ast.Format | ast.Let) for s in spec.statements):
        return  # a file of definitions is complete in itself
    report.extend([adapts_nothing(spec)])


def adapts_nothing(spec: ast.Spec) -> Diagnostic:
    """E116, for a spec without a statement that selects something."""
    hint = "add a statement: `match SELECTOR apply METHOD(…)`"
    return Diagnostic("E116", "the spec adapts nothing", spec.span, hint=hint)


def _adapters(spec: ast.Spec) -> Adapters:
    found: dict[str, list[ast.Selecting]] = {}
    for statement in spec.statements:
        match statement:
            case ast.Match() | ast.Train():
                found.setdefault(DEFAULT_ADAPTER, []).append(statement)
            case ast.Adapter():
                found.setdefault(statement.name, []).extend(statement.body)
            case _:
                continue
    return tuple((name, tuple(matches)) for name, matches in found.items())


def _live(
    spec: ast.Spec,
    known: tuple[str, ...],
    names: Names,
    report: Report,
) -> Live | None:
    """What the one `activate` of a file says."""
    statements = _of_type(spec, ast.Activate)
    if not statements:
        return None
    first, *more = statements
    for other in more:
        report.error(
            "E133",
            "a file says once what is live",
            other.span,
            hint="write one sum of adapters, such as `activate 0.7*a + 0.3*b`",
            related=(("it is said here already", first.span),),
        )
    return _try(report, lambda: read_live(first.expression, known, names))


def _of_type(spec: ast.Spec, cls: type[T]) -> list[T]:
    return [s for s in spec.statements if isinstance(s, cls)]


def _derived(
    spec: ast.Spec,
    adapters: Adapters,
    names: Names,
    present: Collection[str] | None,
    report: Report,
) -> tuple[Derivation, ...]:
    """What is made of other adapters."""
    statements = _of_type(spec, ast.Derived)
    if not statements:
        return ()
    from surgery.derivation import Known, derivations  # few specs have any

    defined = {name: some[0].span for name, some in adapters if some}
    defined |= {one.name: one.span for one in reversed(_of_type(spec, ast.Adapter))}
    return derivations(statements, Known(defined, names, present), report)


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
        params[name] = open_value(param)
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
        value = Scalars(known, _either)(param.default)
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


def _chains(
    matches: Iterable[ast.Selecting], library: Library, unsound: set[int], report: Report
) -> list[_Chain]:
    """The applications with their methods; `unsound` gets those with arguments of wrong names."""
    found: list[_Chain] = []
    for match in _few(matches, report):
        if isinstance(match, ast.Train):
            continue  # it applies the library's own
        found.append([(a, library.method(a.method)) for a in match.applications])
        for application, method in found[-1]:
            if method is None:
                report.extend([unknown_method(application, library)])
                continue
            problems = [*wrong_kind(application, method), *signature_problems(application, method)]
            report.extend(problems)
            unsound |= {id(application)} if problems else set()
    return found


def _known(text: str) -> tuple[int, ...]:
    """Which ids a text has is known with the model."""
    del text
    return (0,)


def _either(condition: ast.Expression) -> bool:
    """Open is only what depends on a param that failed, and what it would be is never used."""
    del condition
    return True


def _try(report: Report, compute: Callable[[], T]) -> T | None:
    try:
        return compute()
    except SurgeryError as error:
        report.extend(error.diagnostics)
        return None
