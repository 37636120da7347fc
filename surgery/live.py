"""What is live: adapters, mixed and one on the other, as `activate` says it.

The expression of a spec or of a caller is read into one normal form, which is what a model keeps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from surgery.algebra.scalars import CONSTANTS, Scalars, as_number, did_you_mean, kind, plain
from surgery.errors import Diagnostic, Span, error_of, refuse
from surgery.language import syntax as ast

NONE = "none"
"""What is live where no adapter is."""


@dataclass(frozen=True, slots=True)
class Then:
    """Mixes one after the other, two or more: each on the model that has those before it."""

    links: tuple[Live, ...]

    def __str__(self) -> str:
        """As `activate` reads it."""
        texts = ((str(link), len(link.terms) > 1) for link in self.links)
        return " then ".join(f"({text})" if several else text for text, several in texts)


Term = tuple[float, str | Then]
"""A number, and the adapter or the chain that it is of."""


@dataclass(frozen=True, slots=True)
class Live:
    """A sum of adapters and chains, each times a number that is not 0; of none for the base alone.

    No two terms are of the same adapter or chain. Its text reads back as the same.
    """

    terms: tuple[Term, ...] = ()

    def __bool__(self) -> bool:
        """Whether any adapter is live."""
        return bool(self.terms)

    @property
    def only(self) -> str | None:
        """The adapter's name, where one is live as it is."""
        alone = self.alone
        return alone if isinstance(alone, str) else None

    @property
    def alone(self) -> str | Then | None:
        """The adapter or the chain, where one is live as it is."""
        return self.terms[0][1] if len(self.terms) == 1 and self.terms[0][0] == 1 else None

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters in it, each once, in order."""
        return tuple(dict.fromkeys(self._names()))

    def within(self, names: Collection[str]) -> Live:
        """What is left of it where only some adapters are."""
        total = Live()
        for factor, what in self.terms:
            if isinstance(what, Then):
                left = in_turn(link.within(names) for link in what.links)
            else:
                left = single(what) if what in names else Live()
            total = added(total, scaled(factor, left))
        return total

    def renamed(self, old: str, new: str) -> Live:
        """The same where an adapter has another name."""

        def named(what: str | Then) -> str | Then:
            if isinstance(what, Then):
                return Then(tuple(link.renamed(old, new) for link in what.links))
            return new if what == old else what

        return Live(tuple((factor, named(what)) for factor, what in self.terms))

    def _names(self) -> Iterator[str]:
        for _, what in self.terms:
            if isinstance(what, str):
                yield what
            else:
                yield from (name for link in what.links for name in link.adapters)

    def __str__(self) -> str:
        """As `activate` reads it: `0.7*a - b`, `a then b`, `none`."""
        if not self.terms:
            return NONE
        if isinstance(self.alone, Then):
            return str(self.alone)
        (factor, what), *rest = self.terms
        more = (f" {'-' if c < 0 else '+'} {_text(c, w)}" for c, w in rest)
        return "".join(["-" if factor < 0 else "", _text(factor, what), *more])


def _text(coefficient: float, what: str | Then) -> str:
    """A term without its sign."""
    number = abs(coefficient)
    name = what if isinstance(what, str) else f"({what})"
    if number == 1:
        return name
    whole = number.is_integer() and number < 2**53
    return f"{int(number) if whole else number!r}*{name}"


def single(name: str) -> Live:
    """One adapter as it is."""
    return Live(((1.0, name),))


def added(left: Live, right: Live) -> Live:
    """The sum; terms of the same adapter or chain become one."""
    total: dict[str | Then, float] = {}
    for coefficient, what in (*left.terms, *right.terms):
        total[what] = total.get(what, 0.0) + coefficient
    return Live(tuple((c, what) for what, c in total.items() if c))


def scaled(factor: float, live: Live) -> Live:
    """Each term times a number."""
    return Live(tuple((c * factor, what) for c, what in live.terms if c * factor))


def in_turn(links: Iterable[Live]) -> Live:
    """Mixes one after the other; what has none of its own is passed over."""
    found: list[Live] = []
    for link in links:
        if link:
            found += link.alone.links if isinstance(link.alone, Then) else [link]
    if len(found) < 2:
        return found[0] if found else Live()
    return Live(((1.0, Then(tuple(found))),))


# ------------------------------------------------------------------------------------ reading


def read_live(
    expression: ast.Expression,
    adapters: Collection[str],
    names: Mapping[str, object],
    unknown: str = "E131",
) -> Live:
    """What an expression says is live.

    adapters: the names that are adapters; any other is a number, by `names`. unknown: the code
    for a name that is neither. Raises E132 for what is no mix of adapters, E101 to E105 for a
    number that cannot be computed.
    """
    reader = _Reader(adapters, names, unknown)
    value = reader(expression)
    if not isinstance(value, Live):
        _refuse_mix("an adapter is needed here", expression.span, value)
    if not all(abs(c) < _LARGEST for c in _coefficients(value)):
        refuse("E105", "an adapter is multiplied by too much", expression.span, hint=_SMALLER)
    return value


_LARGEST = 2.0**64
_SMALLER = "write a smaller number before it"


def _coefficients(live: Live) -> Iterator[float]:
    for coefficient, what in live.terms:
        yield coefficient
        if isinstance(what, Then):
            yield from (c for link in what.links for c in _coefficients(link))


class _Reader(Scalars):
    """Numbers as everywhere, and adapters beside them."""

    def __init__(
        self, adapters: Collection[str], names: Mapping[str, object], unknown: str
    ) -> None:
        super().__init__(names, _either)
        self.adapters = adapters
        self.unknown = unknown

    def name(self, expr: ast.Name) -> object:
        if expr.id in self.adapters:
            self._refuse_both(expr)
            return single(expr.id)
        if expr.id in self.names or expr.id in CONSTANTS:
            return super().name(expr)
        if expr.id == NONE:
            return Live()
        found = unknown_adapter(expr.id, self.adapters, self.names, expr.span, self.unknown)
        raise error_of([found])

    def _refuse_both(self, expr: ast.Name) -> None:
        if expr.id in self.names:
            message = f"`{expr.id}` is an adapter and a number"
            refuse("E132", message, expr.span, hint="give one of the two another name")

    def operate(self, expr: ast.Binary, left: object, right: object) -> object:
        match expr.operator, left, right:
            case "+", Live(), Live():
                return added(left, right)
            case "-", Live(), Live():
                return added(left, scaled(-1.0, right))
            case "*", _, Live() if not isinstance(left, Live):
                return scaled(self._number(left, expr.left), right)
            case "*", Live(), _ if not isinstance(right, Live):
                return scaled(self._number(right, expr.right), left)
            case "/", Live(), _ if not isinstance(right, Live):
                over = ast.Binary("/", ast.Number(1, span=expr.span), expr.right, span=expr.span)
                return scaled(self._number(super().operate(over, 1, right), expr), left)
            case _:
                pass
        for value, other, side in ((left, right, expr.right), (right, left, expr.left)):
            if isinstance(value, Live):
                _refuse_mix(f"`{expr.operator}` does not join these", side.span, other)
        return super().operate(expr, left, right)

    def negative(self, expr: ast.Unary, value: object) -> object:
        return scaled(-1.0, value) if isinstance(value, Live) else super().negative(expr, value)

    def computed(self, expr: ast.Call, values: Sequence[object]) -> object:
        for value, argument in zip(values, expr.arguments, strict=True):
            if isinstance(value, Live):
                _refuse_mix("a number is needed here", argument.span, value)
        return super().computed(expr, values)

    def in_turn(self, expr: ast.LiveThen) -> object:
        links = [(self(side), side) for side in (expr.left, expr.right)]
        for value, side in links:
            if not isinstance(value, Live):
                _refuse_mix("`then` joins adapters", side.span, value)
        return in_turn(value for value, _ in links if isinstance(value, Live))

    def _number(self, value: object, expr: ast.Expression) -> float:
        found = plain(as_number(value, expr))
        return float(found) if isinstance(found, int | float) else 1.0  # a param that is wrong


def _either(condition: ast.Expression) -> bool:
    """Open is only what depends on a param that is wrong by itself."""
    del condition
    return True


_EXAMPLES = "write a sum such as `0.7*a + 0.3*b`, or `a then b`"


def _refuse_mix(message: str, span: Span, value: object) -> NoReturn:
    what = "an adapter" if isinstance(value, Live) else kind(value)
    refuse("E132", message, span, label=f"this is {what}", hint=_EXAMPLES)


def unknown_adapter(
    name: str,
    adapters: Collection[str],
    others: Iterable[str] = (),
    span: Span | None = None,
    code: str = "E131",
) -> Diagnostic:
    """For a name that no adapter has, with the nearest of those that mean something."""
    there = f"there are: {', '.join(adapters)}" if adapters else "name one: `adapter NAME { … }`"
    near = did_you_mean(name, (*adapters, *others))
    hint = there if span is not None or not near else f"{near} {there}"
    return Diagnostic(code, f"there is no adapter `{name}`", span, near, hint)
