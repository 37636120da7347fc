"""`adapter c = 0.7*a + 0.3*b by svd(rank = 8)`: what a spec says is made of other adapters.

What is made is made on a model. Here is what can be known before: names, circles, ways.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from surgery.algebra.mentions import nodes
from surgery.algebra.names import Names
from surgery.algebra.scalars import CONSTANTS, Scalars, did_you_mean, typed
from surgery.errors import Diagnostic, Report, Span, SurgeryError, refuse
from surgery.language import syntax as ast
from surgery.language.library import Library
from surgery.live import NONE, Live, read_live, unknown_adapter
from surgery.recipe import OPTIONS, WAYS, How, Way, takers, unfit, unknown_way


@dataclass(frozen=True, slots=True)
class Derivation:
    """An adapter that is made of others: what they are, and how they become one."""

    name: str
    live: Live
    how: How
    span: Span = field(compare=False, repr=False)

    def __str__(self) -> str:
        """As a statement has it."""
        return f"{self.name} = {self.live} by {self.how}"

    def as_json(self) -> dict[str, object]:
        """As plain data."""
        return {"adapter": self.name, "expression": str(self.live), "how": str(self.how)}


@dataclass(frozen=True, slots=True)
class Known:
    """What the names of a spec mean.

    defined: the adapters that have statements of their own, and where they are first named.
    present: those that the model has; None where there is no model, which may have any.
    """

    defined: Mapping[str, Span]
    names: Names
    present: Collection[str] | None


def derivations(
    statements: Sequence[ast.Derived], known: Known, report: Report
) -> tuple[Derivation, ...]:
    """What the statements say, each behind those that it is made of; what is wrong is reported.

    E131 for an unknown adapter, which without a model is a warning, E132 for what is no mix of
    adapters, E140 for what is made of itself, E141 for a name that is given twice, E142 for a way.
    """
    _check_twice(statements, known, report)
    names = {**known.defined, **{one.name: one.span for one in statements}}
    found: dict[str, Derivation] = {}
    for one in statements:
        live = _tried(report, lambda one=one: _read(one, names, known, report))
        how = _how(one, known, report)
        if live is not None and one.name not in known.defined:
            found.setdefault(one.name, Derivation(one.name, live, how, one.span))
    return tuple(_in_order(found, {one.name: one for one in statements}, report))


def _check_twice(statements: Sequence[ast.Derived], known: Known, report: Report) -> None:
    seen = dict(known.defined)
    for one in statements:
        if one.name in seen:
            report.error(
                "E141",
                f"there is another adapter `{one.name}` in this file",
                one.span,
                hint="use another name",
                related=(("it is here", seen[one.name]),),
            )
        seen.setdefault(one.name, one.span)


# --------------------------------------------------------------------------------- expressions


def _read(one: ast.Derived, names: Collection[str], known: Known, report: Report) -> Live:
    """What an adapter is made of. Raises as `read_live`, and E132 where nothing is left."""
    present = known.present
    if present is None:
        unknown = [*_unknown(one.expression, names, known.names)]
        if known.defined:
            report.extend(_elsewhere(name, names) for name in unknown)
        present = [name.id for name in unknown]
    others = [name for name in present if name not in names and name not in known.names]
    live = read_live(one.expression, (*names, *others), known.names)
    if not live:
        hint = "name what it is made of: `0.7*a + 0.3*b`"
        refuse("E132", "nothing is left of this", one.expression.span, hint=hint)
    return live


def _unknown(
    expression: ast.Expression, names: Collection[str], values: Names
) -> Iterator[ast.Name]:
    """The names that a file gives no meaning."""
    meant = (names, values, CONSTANTS, (NONE,))
    for node in nodes(expression):
        if isinstance(node, ast.Name) and not any(node.id in some for some in meant):
            yield node


def _elsewhere(name: ast.Name, names: Collection[str]) -> Diagnostic:
    """A warning of an adapter that a file with adapters of its own does not have."""
    found = unknown_adapter(name.id, tuple(names), (), name.span)
    message = f"`{name.id}` is no adapter of this file, so the model must have it"
    return replace(found, message=message, severity="warning")


# ----------------------------------------------------------------------------------------- ways


def _how(one: ast.Derived, known: Known, report: Report) -> How:
    """How the adapters become one; what is wrong with it is reported, underlined."""
    call = one.way
    if call is None:
        return How()
    name, place = call.function, call.span.within(0, len(call.function))
    way = WAYS.get(name)
    if way is None:
        _, message, _ = unknown_way(name)
        near = did_you_mean(name, WAYS)
        report.error("E142", message, place, label=near, hint=f"there are: {', '.join(WAYS)}")
        return How()
    before = len(report.found)
    given = dict(_given(call, way, known, report))
    asked = How(name, **given)
    if len(report.found) == before:
        values = {keyword.name: keyword.value.span for keyword in call.keywords}
        for option, message, hint in unfit(asked):
            report.error("E142", message, values.get(option, call.span), hint=hint)
        library = Library.standard()
        if asked.to is not None and library.method(asked.to) is None:
            methods = library.names()
            report.error(
                "E142",
                f"there is no method `{asked.to}`",
                values["to"],
                label=did_you_mean(asked.to, methods),
                hint=f"there are: {', '.join(methods)}",
            )
    return asked


def _given(call: ast.Call, way: Way, known: Known, report: Report) -> Iterator[tuple[str, Any]]:
    """The arguments of a way that it takes and that have a value of their type."""
    seen: set[str] = set()
    for keyword in call.keywords:
        option = keyword.name
        if option in seen:
            report.error("E107", f"`{option}` is given twice", keyword.span, hint="leave one out")
        elif option not in way.options:
            place = keyword.span.within(0, len(option))
            goes = f"`{option}` goes with {takers(option)}" if option in OPTIONS else ""
            report.error(
                "E142",
                f"{way.name}() has no argument `{option}`",
                place,
                label=did_you_mean(option, way.options),
                hint=goes or f"it has: {', '.join(way.options)}",
            )
        else:
            value = _tried(report, lambda k=keyword: _value(k, known.names))
            if isinstance(value, int | float | str):  # not of what is wrong by itself
                yield option, value
        seen.add(option)


def _value(keyword: ast.Keyword, names: Names) -> object:
    value = Scalars(names, names.decide)(keyword.value)
    return typed(value, OPTIONS[keyword.name][0], keyword.name, keyword.value.span)


# ---------------------------------------------------------------------------------------- order


def _in_order(
    found: Mapping[str, Derivation], statements: Mapping[str, ast.Derived], report: Report
) -> Iterator[Derivation]:
    """Each behind those that it is made of, else as in the file; circles are reported."""
    needs = {
        name: dict.fromkeys(other for other in one.live.adapters if other in found)
        for name, one in found.items()
    }
    users: dict[str, list[str]] = {name: [] for name in found}
    for name, some in needs.items():
        for other in some:
            users[other].append(name)
    ready = deque(name for name, some in needs.items() if not some)
    while needs:
        if not ready:  # the first of a circle is taken to be there, to find what else is wrong
            circle = _circle(needs)
            _report_circle([found[name] for name in circle], statements[circle[0]], report)
            ready.append(circle[0])
        name = ready.popleft()
        del needs[name]
        yield found[name]
        for user in users[name]:
            if user in needs:
                del needs[user][name]
                ready.extend([user] * (not needs[user]))


def _circle(needs: Mapping[str, Mapping[str, None]]) -> list[str]:
    """Adapters that are made of each other, where each needs one that is not there."""
    name = next(iter(needs))
    chain: dict[str, None] = {}
    while name not in chain:
        chain[name] = None
        name = next(iter(needs[name]))
    names = [*chain]
    return names[names.index(name) :]


def _report_circle(circle: Sequence[Derivation], statement: ast.Derived, report: Report) -> None:
    first, after = circle[0], circle[1 % len(circle)].name
    places = (n.span for n in nodes(statement.expression) if isinstance(n, ast.Name))
    place = next((p for p in places if p.text == after), statement.span)
    through = " -> ".join([*(one.name for one in circle), first.name])
    report.error(
        "E140",
        f"`{first.name}` is made of itself: {through}",
        place,
        hint="make it of adapters that are there without it",
        related=tuple(("made of the next here", one.span) for one in circle[1:]),
    )


T = TypeVar("T")


def _tried(report: Report, compute: Callable[[], T]) -> T | None:
    try:
        return compute()
    except SurgeryError as error:
        report.extend(error.diagnostics)
        return None
