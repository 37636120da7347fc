"""The learning rates that statements say: `lr = 2x` of all that they train, `lr B = 16x` of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from surgery.algebra.axes import symbol
from surgery.algebra.equations import Parameter
from surgery.algebra.mentions import nodes
from surgery.algebra.names import Names
from surgery.algebra.rates import Rate, rate
from surgery.algebra.scalars import Decide, Scalars, did_you_mean
from surgery.algebra.ways import each_way
from surgery.arguments import SITE_NAMES
from surgery.errors import Diagnostic, Report, Span, SurgeryError
from surgery.language import syntax as ast
from surgery.language.library import Library

_MOST = 100  # findings


class Rated(NamedTuple):
    """What a statement says of one of the methods at a site, from 0 on; "" for all it trains."""

    link: int
    name: str
    rate: Rate


Rates = tuple[Rated, ...]


def lr_of(p: Parameter, rates: Rates, lr: float) -> float:
    """The learning rate of a parameter at a site, where another is given.

    What the statement says of all replaces that one; what it says of the parameter, or else the
    method, is then a multiple of it.
    """
    of_link = [one for one in rates if one.link == p.link]
    for one in of_link:
        lr = lr if one.name else one.rate.of(lr)
    own = next((one.rate for one in of_link if one.name == p.declared_name), p.rate)
    return lr if own is None else own.of(lr)


def written(rates: Rates, link: int) -> str:
    """What a statement says of one of its methods, behind that: ` lr = 2x, B = 16x`, or ""."""
    each = [f"{n} = {r}" if n else f"= {r}" for at, n, r in rates if at == link]
    return f" lr {', '.join(each)}" if each else ""


def data_of(rates: Rates) -> dict[str, object]:
    """The rates as plain data; nothing where there are none."""
    each = [{"link": r.link, "parameter": r.name, **r.rate._asdict()} for r in rates]
    return {"lr": each} if each else {}


# ------------------------------------------------------------------------------------ checking


def rates_of(applications: Iterable[ast.Application], names: Callable[[], Names]) -> Rates:
    """The rates that applications have at a site, of which few have any. Raises DefinitionError."""
    every = [(link, one) for link, a in enumerate(applications) for one in a.rates]
    if not every:
        return ()
    here = names()
    rated = ((link, said.name, _rate(said, here)) for link, said in every)
    return tuple(Rated(link, name, found) for link, name, found in rated if found is not None)


def _rate(said: ast.Rate, names: Names) -> Rate | None:
    value = Scalars(names, names.decide)(said.value)
    return rate(value, said.times, said.value.span)


def rate_findings(
    statements: Iterable[ast.Selecting], library: Library, names: Names
) -> tuple[Diagnostic, ...]:
    """Everything that is wrong with the rates of statements, before any site is known."""
    report = Report()
    every = [a for s in statements for a in _applications(s) if a.rates]
    for application in every:
        method = library.method(application.method)
        report.extend(() if method is None else _misnamed(application, method))
    open_site = {name: symbol(name) for name in SITE_NAMES}

    def run(decide: Decide) -> None:
        here = replace(names, site=open_site, decide=decide)
        for said in (one for application in every for one in application.rates):
            if len(report.found) >= _MOST:
                return
            try:
                _rate(said, here)
            except SurgeryError as error:
                report.extend(error.diagnostics)

    if every:
        each_way(run)
    return tuple(report.found)


def _applications(statement: ast.Selecting) -> tuple[ast.Application, ...]:
    if isinstance(statement, ast.Match):
        return statement.applications
    return (ast.Application("", (), statement.rates, span=statement.span),)


def _misnamed(application: ast.Application, method: ast.Method) -> Iterator[Diagnostic]:
    """E139 for rates of what a method does not train, or that are given twice."""
    declared = {n.name: n.trained for n in nodes(method) if isinstance(n, ast.Declaration)}
    trained = [name for name, is_trained in declared.items() if is_trained]
    seen: set[str] = set()
    for said in application.rates:
        place = said.span.within(0, len(said.name) or len(said.span.text))
        if said.name in seen:
            message = f"the learning rate of `{said.name}` is given twice"
            yield Diagnostic("E139", message, place, hint="leave one out")
        elif said.name and said.name not in trained:
            what = "does not train" if said.name in declared else "has no parameter"
            yield Diagnostic(
                "E139",
                f"{method.name}() {what} `{said.name}`",
                place,
                did_you_mean(said.name, trained),
                f"it trains: {', '.join(trained) or 'nothing'}",
            )
        seen.add(said.name)


def at_odds(
    p: Parameter, before: tuple[Rates, Span], now: tuple[Rates, Span]
) -> Iterator[Diagnostic]:
    """E139 where two sites that share a parameter say that it learns at different rates."""
    if any(lr_of(p, before[0], lr) != lr_of(p, now[0], lr) for lr in (1.0, 2.0)):
        yield Diagnostic(
            "E139",
            f"`{p.declared_name}` is one for all its sites, and learns at two rates",
            now[1],
            hint="write one rate, or put the method on them in two adapters",
            related=(("it has another rate here", before[1]),),
        )


def stated(data: Mapping[str, object]) -> Rated | None:
    """A rate as `data_of` has it; None for what is none."""
    link, name = data.get("link"), data.get("parameter")
    value, times = data.get("value"), data.get("times")
    if not (type(link) is int and isinstance(name, str) and isinstance(times, bool)):
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 2.0**64:
        return None
    return Rated(link, name, Rate(float(value), times))
