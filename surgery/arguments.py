"""A method's arguments: their names, their values, and what is wrong with the method at them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from surgery.algebra.axes import symbol
from surgery.algebra.compose import Unchained
from surgery.algebra.definitions import check_arguments, check_chain
from surgery.algebra.equations import COUNTS, ENDING
from surgery.algebra.kinds import KINDS, SIZES
from surgery.algebra.mentions import names as mentioned
from surgery.algebra.mentions import nodes
from surgery.algebra.names import Names
from surgery.algebra.scalars import Open, Scalars, did_you_mean, typed
from surgery.errors import Diagnostic, Report, Span, SurgeryError
from surgery.language import syntax as ast
from surgery.language.library import Library

SITE_NAMES = ("layer", *sorted(SIZES))
"""The names that a site gives its arguments."""

Arguments = tuple[tuple[str, object], ...]


@dataclass(frozen=True, slots=True)
class Link:
    """A method with its arguments: all that is put on a site, or one of several in a chain."""

    method: ast.Method
    arguments: Arguments


@lru_cache(maxsize=512)
def counted(method: ast.Method) -> frozenset[str]:
    """The arguments that are what the sizes of all sites tell, whatever is given for them."""
    return _become(method, COUNTS)


@lru_cache(maxsize=512)
def told(method: ast.Method) -> frozenset[str]:
    """The arguments that are not given: what the sizes of all sites tell, or the site's path."""
    return counted(method) | _become(method, (ENDING,))


def _become(method: ast.Method, functions: tuple[str, ...]) -> frozenset[str]:
    given = {a.name for a in method.arguments}
    found = (n for n in nodes(method) if isinstance(n, ast.Equation) and n.target in given)
    return frozenset(
        e.target
        for e in found
        if any(isinstance(n, ast.Call) and n.function in functions for n in nodes(e.value))
    )


def without_counted(link: Link) -> Arguments:
    """A method's arguments but for those that the sizes of all sites tell."""
    return _without(link, counted(link.method))


def without_told(link: Link) -> Arguments:
    """A method's arguments as they were given, or could have been."""
    return _without(link, told(link.method))


def _without(link: Link, names: frozenset[str]) -> Arguments:
    return tuple(a for a in link.arguments if a[0] not in names) if names else link.arguments


def unknown_method(application: ast.Application, library: Library) -> Diagnostic:
    """What is said of an application whose method there is not (E121)."""
    name = application.method
    return Diagnostic(
        "E121",
        f"unknown method `{name}`",
        application.span.within(0, len(name)),
        did_you_mean(name, library.names()),
        f"there are: {', '.join(library.names())}",
    )


def wrong_kind(application: ast.Application, method: ast.Method) -> Iterator[Diagnostic]:
    """E135 for a method that is on no matrix, which is what `match` selects."""
    if method.kind not in KINDS:
        yield Diagnostic(
            "E135",
            f"`{method.name}` is on a {method.kind}, and `match` selects matrices",
            application.span.within(0, len(method.name)),
            hint="write `train S` for parameters as they lie, `save S` for modules",
        )


def signature_problems(application: ast.Application, method: ast.Method) -> Iterator[Diagnostic]:
    """What is wrong with the names of arguments: E107, E118, E122."""
    known = {a.name: a for a in method.arguments}
    hidden = told(method)
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
        if keyword.name in hidden:
            by_sizes = keyword.name in counted(method)
            what = "the sizes of all sites tell" if by_sizes else "the path of a site ends in"
            message = f"`{keyword.name}` of {method.name}() is what {what}"
            place = keyword.span.within(0, len(keyword.name))
            yield Diagnostic("E122", message, place, hint="leave it out")
        if keyword.name in seen:
            yield Diagnostic(
                "E107", f"`{keyword.name}` is given twice", keyword.span, hint="leave one out"
            )
        seen.add(keyword.name)
    for name, argument in known.items():
        if argument.default is None and name not in seen:
            message = f"{method.name}() needs `{name}`"
            yield Diagnostic("E118", message, application.span, hint=f"write `{name} = …`")


def arguments(application: ast.Application, method: ast.Method, names: Names) -> Arguments:
    """The value of every argument, defaults included, in the order of the signature.

    Raises DefinitionError.
    """
    given = {k.name: k for k in application.arguments}
    values: dict[str, object] = {}
    report = Report()
    for argument in method.arguments:
        keyword = given.get(argument.name)
        item, scope = (argument, values) if keyword is None else (keyword, names)
        expr = argument.default if keyword is None else keyword.value
        if expr is None:
            continue
        # One that failed is open, so that the defaults made of it are not reported as well.
        values[argument.name] = open_value(argument)
        try:
            value = Scalars(scope, names.decide)(expr)
            values[argument.name] = typed(value, argument.type, argument.name, item.span)
        except SurgeryError as error:
            report.extend(error.diagnostics)
    report.stop()
    return tuple(values.items())


def open_value(declared: ast.Argument | ast.Param) -> object:
    """What stands for a value that is not known: it passes for any of the declared type."""
    return symbol(declared.name) if declared.type in ("int", "float") else Open(declared.name)


@lru_cache(maxsize=512)
def site_dependent(application: ast.Application, lets: tuple[str, ...]) -> bool:
    """Whether an argument may differ from site to site; a let is taken to be able to."""
    watched = {*SITE_NAMES, *lets}
    return any(not watched.isdisjoint(mentioned(k.value)) for k in application.arguments)


def unfit(
    application: ast.Application, method: ast.Method, given: Arguments
) -> Iterator[Diagnostic]:
    """What is wrong with a method at these arguments, underlined where they are given.

    What is wrong for one reason in several items of the method is said once.
    """
    seen: set[tuple[str, str, Span | None]] = set()
    for inside in check_arguments(method, dict(given)):
        found = applied(inside, application)
        if (found.code, found.message, found.span) not in seen:
            seen.add((found.code, found.message, found.span))
            yield found


def unfit_chain(
    applications: Sequence[ast.Application], links: Sequence[Link]
) -> Iterator[Diagnostic]:
    """E134 for methods, each sound by itself, of which one can never follow those before it."""
    obstacle = check_chain([(link.method, dict(link.arguments)) for link in links])
    if obstacle is not None:
        yield unchained(applications, obstacle)


def unchained(
    applications: Sequence[ast.Application], obstacle: Unchained, place: str = ""
) -> Diagnostic:
    """What is said of an application that cannot follow the one before it (E134)."""
    before, found = applications[obstacle.link - 1], applications[obstacle.link]
    turned = f"apply {found.method} before {before.method}, or "
    return Diagnostic(
        "E134",
        f"{found.method} cannot follow {before.method}{place}: {obstacle}",
        found.span,
        hint=f"{turned if found.method != before.method else ''}leave one of them out",
        related=(("applied before it", before.span),),
    )


def applied(found: Diagnostic, application: ast.Application) -> Diagnostic:
    """A finding inside a method, underlined where an argument is given or the method applied."""
    keywords = {k.name: k.span for k in application.arguments}
    said = [] if found.span is None else re.findall(r"\w+", found.span.text)
    places = [keywords[name] for name in dict.fromkeys(said) if name in keywords]
    place = places[0] if len(places) == 1 else application.span
    related = found.related
    if found.span is not None:
        related = (*related, (found.label or "needed here", found.span))
    return replace(found, span=place, label="", related=related)
