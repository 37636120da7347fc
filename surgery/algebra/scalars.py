"""Evaluating what is not a tensor: numbers, sizes, texts and truths, in specs and in methods."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from heapq import nsmallest
from typing import Any, NoReturn, TypeVar, assert_never, cast

from surgery.algebra.axes import FUNCTIONS, MAX_BITS, Scalar, Size, bounded, function, size
from surgery.errors import Span, refuse
from surgery.language import syntax as ast


@dataclass(frozen=True, slots=True)
class Open:
    """A value that is not known yet, when a definition is checked.

    type: of the value, where that is known.
    """

    name: str
    type: ast.ValueType | None = None


T = TypeVar("T")

Value = int | float | Fraction | str | bool | Size | Open | None

# How a condition that cannot be decided yet is decided: both ways, in turn.
Decide = Callable[[ast.Expression], bool]

CONSTANTS: Mapping[str, Value] = {"pi": 3.141592653589793, "null": None}
SCALAR_FUNCTIONS = frozenset(FUNCTIONS) - {"mod", "pow", "reciprocal"}
_MANY = 1000
_COUNTS: Mapping[str, tuple[int, int]] = {
    "min": (2, _MANY),
    "max": (2, _MANY),
    "divisor": (2, 2),
    "at_most": (2, 2),
}
"""How many arguments a function takes, at least and at most; one, if it is not listed."""

_ARITHMETIC: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": lambda a, b: Fraction(a, b) if isinstance(a, int) and isinstance(b, int) else a / b,
    "//": lambda a, b: function("floor", size(a) / b),
    "%": lambda a, b: function("mod", a, b),
    "**": lambda a, b: size(a) ** b,
}
_ORDER: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_TYPES: Mapping[ast.ValueType, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "text": (str,),
    "bool": (bool,),
}


def undecided(condition: ast.Expression) -> bool:
    """The `Decide` of places where everything is known. Nothing that is written leads here."""
    raise AssertionError(f"{condition.span} is open")


class Scalars:
    """Evaluates expressions over some names; every mistake is a diagnostic with its place.

    Each operand is evaluated once, so that the time is that of reading the expression.
    """

    def __init__(self, names: Mapping[str, object], decide: Decide = undecided) -> None:
        """Evaluate over `names`; conditions that are open are left to `decide`."""
        self.names = names
        self.decide = decide

    def __call__(self, expr: ast.Expression) -> object:
        """The value. Raises DefinitionError (E101 to E109)."""
        match expr:
            case ast.Number() | ast.Text() | ast.Truth():
                return _literal(expr)
            case ast.Name():
                return self.name(expr)
            case ast.Unary():
                return self.unary(expr)
            case ast.Binary():
                return self.binary(expr)
            case ast.Conditional():
                return self(expr.then if self.holds(expr.condition) else expr.other)
            case ast.Call():
                return self.call(expr)
            case ast.Subscript() | ast.Slice() | ast.LiveThen():
                return self._of_others(expr)
            case _:
                assert_never(expr)

    def name(self, expr: ast.Name) -> object:
        """What a name stands for."""
        if expr.id in self.names:
            return self.names[expr.id]
        if expr.id in CONSTANTS:
            return CONSTANTS[expr.id]
        unknown_name(expr.id, expr.span, [*self.names, *CONSTANTS])

    def holds(self, condition: ast.Expression) -> bool:
        """Whether a condition holds; undecided ones are asked for."""
        value = self(condition)
        if isinstance(value, bool):
            return value
        if isinstance(value, Open) and value.type in (None, "bool"):
            return self.decide(condition)
        refuse(
            "E103",
            "a condition must be true or false",
            condition.span,
            label=f"this is {kind(value)}",
        )

    def unary(self, expr: ast.Unary) -> object:
        """`-a` and `not a`."""
        if expr.operator == "not":
            return not self.holds(expr.operand)
        return self.negative(expr, self(expr.operand))

    def negative(self, expr: ast.Unary, value: object) -> object:
        """`-a`, of a value."""
        return -as_number(value, expr.operand)

    def binary(self, expr: ast.Binary) -> object:
        """Arithmetic, comparison and logic."""
        match expr.operator:
            case "and":
                return self.holds(expr.left) and self.holds(expr.right)
            case "or":
                return self.holds(expr.left) or self.holds(expr.right)
            case _:
                return self.operate(expr, self(expr.left), self(expr.right))

    def operate(self, expr: ast.Binary, left: object, right: object) -> object:
        """Arithmetic and comparison, of values."""
        if expr.operator in _ARITHMETIC:
            return arithmetic(expr, as_number(left, expr.left), as_number(right, expr.right))
        if expr.operator == "@":
            refuse("E102", "@ stands only between tensors", expr.span, hint="numbers have `*`")
        return compare(expr, left, right)

    def number(self, expr: ast.Expression) -> Scalar:
        """The value, which must be a number."""
        return as_number(self(expr), expr)

    def _of_others(self, expr: ast.Subscript | ast.Slice | ast.LiveThen) -> object:
        """What there is only between tensors, or between adapters."""
        return self.in_turn(expr) if isinstance(expr, ast.LiveThen) else self.subscript(expr)

    def subscript(self, expr: ast.Subscript | ast.Slice) -> object:
        """`A[:, :in]`, which numbers do not have."""
        refuse("E102", "only a tensor can be sliced", expr.span, hint="slices stand in methods")

    def in_turn(self, expr: ast.LiveThen) -> object:
        """`a then b`, which numbers do not have."""
        refuse("E102", "`then` stands only between adapters", expr.span, hint="numbers have `*`")

    def call(self, expr: ast.Call) -> object:
        """A function of numbers."""
        if expr.function not in SCALAR_FUNCTIONS:
            unknown_name(expr.function, expr.span, SCALAR_FUNCTIONS, noun="function")
        return self.computed(expr, [self(a) for a in expr.arguments])

    def computed(self, expr: ast.Call, values: Sequence[object]) -> object:
        """A function of numbers, of values."""
        name = expr.function
        if expr.keywords:
            refuse(
                "E104",
                f"{name}() takes no named arguments",
                expr.keywords[0].span,
                hint="leave out the name",
            )
        least, most = _COUNTS.get(name, (1, 1))
        if not least <= len(values) <= most:
            wanted = {1: "one argument", 2: "two arguments"}.get(most, "at least two arguments")
            refuse("E104", f"{name}() takes {wanted}", expr.span, label=f"here are {len(values)}")
        numbers = [as_number(v, a) for v, a in zip(values, expr.arguments, strict=True)]
        return guarded(expr.span, lambda: function(name, *numbers))


def _literal(expr: ast.Number | ast.Text | ast.Truth) -> object:
    if isinstance(expr, ast.Number):
        guarded(expr.span, lambda: size(expr.value))
    return expr.value


def as_number(value: object, expr: ast.Expression) -> Scalar:
    """The value of an expression, which must be a number (E103)."""
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction | Size):
        refuse("E103", "a number is needed here", expr.span, label=f"this is {kind(value)}")
    return value


def compare(expr: ast.Binary, left: object, right: object) -> bool | Open:
    """`left operator right`; open while either side has a name in it."""
    if expr.operator not in ("==", "!="):
        _check_ordered(expr.left, left)
        _check_ordered(expr.right, right)
    if any(isinstance(v, Open) or _is_symbolic(v) for v in (left, right)):
        return Open(expr.span.text)
    left, right = _known(left), _known(right)
    if expr.operator in ("==", "!="):
        return (left == right) is (expr.operator == "==")
    return _ORDER[expr.operator](left, right)


def _check_ordered(side: ast.Expression, value: object) -> None:
    ordered = isinstance(value, int | float | Fraction | Size) and not isinstance(value, bool)
    if not ordered and not (isinstance(value, Open) and value.type is None):
        refuse("E103", "only numbers have an order", side.span, label=f"this is {kind(value)}")


def arithmetic(expr: ast.Binary, left: Scalar, right: Scalar) -> Scalar:
    """`left operator right` between numbers; ints stay ints where they can."""
    return guarded(expr.span, lambda: _finite(_ARITHMETIC[expr.operator](left, right)))


def _finite(value: Scalar) -> Scalar:
    """The value. Raises OverflowError if it is larger than any number of a spec may be."""
    if not isinstance(value, Size):
        bounded(Fraction(value))
    return value


def guarded(span: Span, compute: Callable[[], T]) -> T:
    """The result of a computation whose failures are the writer's: E105."""
    try:
        return compute()
    except ZeroDivisionError:
        refuse("E105", "division by zero", span, hint="give the divisor a value other than 0")
    except OverflowError:
        refuse("E105", "this is too large to be computed", span, hint="write a smaller number")
    except (ArithmeticError, ValueError) as error:
        refuse("E105", "this cannot be computed", span, label=str(error))


def unknown_name(name: str, span: Span, known: Iterable[str], noun: str = "name") -> NoReturn:
    """Refuse a name that is not known (E101), with the nearest one that is."""
    place = span.within(0, len(name)) if span.text.startswith(name) else span
    near = did_you_mean(name, known)
    refuse("E101", f"unknown {noun} `{name}`", place, label=near, hint="" if near else _list(known))


def _list(names: Iterable[str], most: int = 12) -> str:
    listed = sorted(names)
    shown = ", ".join(listed[:most])
    return f"there are: {shown}, …" if len(listed) > most else f"there are: {shown or 'none'}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest of some names as a question, or ""."""
    likely = nsmallest(_MOST_COMPARED, known, key=lambda other: _distance(name, other))
    near = get_close_matches(name, likely, 3)
    # Letters in another order are the likelier slip among what is as near.
    near.sort(key=lambda other: sorted(other) != sorted(name))
    return f"did you mean `{near[0]}`?" if near else ""


_MOST_COMPARED = 30
"""A file may define thousands of names, and each comparison takes tens of microseconds."""


def _distance(name: str, other: str) -> tuple[bool, int, str]:
    return name[:1] != other[:1], abs(len(name) - len(other)), other


def kind(value: object) -> str:
    """What a value is, as a person says it."""
    match value:
        case bool():
            return "true or false"
        case int() | float() | Fraction() | Size():
            return "a number"
        case str():
            return "a text"
        case Open():
            return _KINDS[value.type]
        case None:
            return "null"
        case _:
            return "a tensor"


_KINDS: Mapping[ast.ValueType | None, str] = {
    "int": "a number",
    "float": "a number",
    "text": "a text",
    "bool": "true or false",
    None: "a text or a truth",
}


def plain(value: object) -> object:
    """A value without symbols as a Python one: whole numbers are ints."""
    known = _known(value)
    if isinstance(known, Fraction):
        return int(known) if known.denominator == 1 else float(known)
    return known


def typed(value: object, wanted: ast.ValueType, name: str, span: Span) -> object:
    """The value, if it is of the type; an int counts as a float, and no number is infinite.

    What is not known yet passes. Raises DefinitionError (E119).
    """
    found = plain(value)
    if isinstance(found, Size) and wanted in ("int", "float"):
        return found
    if isinstance(found, Open) and found.type in (None, wanted):
        return found
    if isinstance(found, int | float) and not abs(found) < 2**MAX_BITS:
        refuse("E119", f"`{name}` is {shown(found)}", span, label="a finite number is needed")
    if isinstance(found, _TYPES[wanted]) and isinstance(found, bool) is (wanted == "bool"):
        return float(cast(float, found)) if wanted == "float" else found
    article = "an" if wanted == "int" else "a"
    refuse(
        "E119",
        f"`{name}` is {article} {wanted}, and {shown(found)} is {kind(found)}",
        span,
        hint=_EXAMPLES[wanted],
    )


_EXAMPLES: Mapping[ast.ValueType, str] = {
    "int": "write a whole number, such as 8",
    "float": "write a number, such as 0.5",
    "text": 'write a text in double quotes, such as "out"',
    "bool": "write true or false",
}


def literal(value: object) -> str:
    """A value as a spec writes it, and as it is read again."""
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case str():
            return f'"{value}"'
        case _:
            return repr(value)


def shown(value: object) -> str:
    """A value as a message has it."""
    match value:
        case int() if abs(value) > 10**18:
            return "a number of more than 18 digits"
        case Open():
            return f"`{value.name}`"
        case None | bool() | str():
            return literal(value)
        case _:
            return str(value)


def _is_symbolic(value: object) -> bool:
    return isinstance(value, Size) and value.number is None


def _known(value: object) -> object:
    if isinstance(value, Size) and value.number is not None:
        return value.number
    return value
