"""Evaluating what is not a tensor: numbers, sizes, texts and truths, in specs and in methods."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from typing import TypeVar, assert_never

from surgery.algebra.axes import FUNCTIONS, Scalar, Size, function
from surgery.errors import Span, refuse
from surgery.language import syntax as ast


@dataclass(frozen=True, slots=True)
class Open:
    """A value that is not known yet, when a definition is checked: a text or truth argument."""

    name: str


T = TypeVar("T")

Value = int | float | Fraction | str | bool | Size | Open | None

# How a condition that cannot be decided yet is decided: both ways, in turn.
Decide = Callable[[ast.Expression], bool]

CONSTANTS: Mapping[str, Value] = {"pi": 3.141592653589793, "null": None}
SCALAR_FUNCTIONS = frozenset(FUNCTIONS) - {"mod", "pow", "reciprocal"}

_ARITHMETIC: Mapping[str, Callable[..., Scalar]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_ORDER: Mapping[str, Callable[..., bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def undecided(condition: ast.Expression) -> bool:
    """The `Decide` of places where everything must be known."""
    refuse("E110", "this condition depends on what is not known here", condition.span)


class Scalars:
    """Evaluates expressions over some names; every mistake is a diagnostic with its place."""

    def __init__(self, names: Mapping[str, object], decide: Decide = undecided) -> None:
        self.names = names
        self.decide = decide

    def __call__(self, expr: ast.Expression) -> object:
        """The value. Raises DefinitionError (E101 to E110)."""
        match expr:
            case ast.Number() | ast.Text() | ast.Truth():
                return expr.value
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
            case ast.Subscript():
                return self.subscript(expr)
            case ast.Slice():
                refuse("E102", "a slice stands only behind a tensor", expr.span)
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
        if isinstance(value, Open):
            return self.decide(condition)
        refuse("E103", "a condition must be true or false", condition.span, label=f"{value!s}")

    def unary(self, expr: ast.Unary) -> object:
        """`-a` and `not a`."""
        if expr.operator == "not":
            return not self.holds(expr.operand)
        return -self.number(expr.operand)

    def binary(self, expr: ast.Binary) -> object:
        """Arithmetic, comparison and logic."""
        match expr.operator:
            case "and":
                return self.holds(expr.left) and self.holds(expr.right)
            case "or":
                return self.holds(expr.left) or self.holds(expr.right)
            case "==" | "!=" | "<" | "<=" | ">" | ">=":
                return compare(expr, self(expr.left), self(expr.right))
            case "@":
                refuse("E102", "@ stands only between tensors", expr.span)
            case _:
                return arithmetic(expr, self.number(expr.left), self.number(expr.right))

    def number(self, expr: ast.Expression) -> Scalar:
        """The value, which must be a number."""
        value = self(expr)
        if isinstance(value, bool) or not isinstance(value, int | float | Fraction | Size):
            refuse("E103", "a number is needed here", expr.span, label=f"this is {kind(value)}")
        return value

    def subscript(self, expr: ast.Subscript) -> object:
        """`A[:, :in]`, which numbers do not have."""
        refuse("E102", "only a tensor can be sliced", expr.span)

    def call(self, expr: ast.Call) -> object:
        """A function of numbers."""
        if expr.function not in SCALAR_FUNCTIONS:
            unknown_name(expr.function, expr.span, SCALAR_FUNCTIONS, noun="function")
        if expr.keywords:
            refuse("E104", f"{expr.function}() takes no named arguments", expr.keywords[0].span)
        numbers = [self.number(a) for a in expr.arguments]
        return guarded(expr.span, lambda: function(expr.function, *numbers))


def compare(expr: ast.Binary, left: object, right: object) -> bool | Open:
    """`left operator right`; open while either side has a name in it."""
    if any(isinstance(v, Open) or _is_symbolic(v) for v in (left, right)):
        return Open(expr.span.text)
    left, right = _known(left), _known(right)
    if expr.operator in ("==", "!="):
        return (left == right) is (expr.operator == "==")
    for side, value in ((expr.left, left), (expr.right, right)):
        if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
            refuse("E103", "only numbers have an order", side.span, label=f"this is {kind(value)}")
    return _ORDER[expr.operator](left, right)


def arithmetic(expr: ast.Binary, left: Scalar, right: Scalar) -> Scalar:
    """`left operator right` between numbers; ints stay ints where they can."""
    return guarded(expr.span, lambda: _compute(expr.operator, left, right))


def _compute(name: str, left: Scalar, right: Scalar) -> Scalar:
    match name:
        case "//":
            return function("floor", left / right)
        case "%":
            return function("mod", left, right)
        case "**":
            return _bounded_power(left, right)
        case "/" if isinstance(left, int) and isinstance(right, int):
            return Fraction(left, right)
        case _:
            return _ARITHMETIC[name](left, right)


def _bounded_power(left: Scalar, right: Scalar) -> Scalar:
    """A power, unless its digits alone would fill the memory."""
    if isinstance(left, Size) or isinstance(right, Size):
        return left**right if isinstance(left, Size) else function("pow", left, right)
    if abs(float(right)) > 1024:
        raise OverflowError
    return left**right


def guarded(span: Span, compute: Callable[[], T]) -> T:
    """The result of a computation whose failures are the writer's: E105."""
    try:
        return compute()
    except ZeroDivisionError:
        refuse("E105", "division by zero", span, hint="give the divisor a value other than 0")
    except (ArithmeticError, ValueError, TypeError) as error:
        refuse("E105", f"this cannot be computed: {error}", span)


def unknown_name(name: str, span: Span, known: object, noun: str = "name") -> object:
    """Refuse a name that is not known (E101), with the nearest one that is."""
    candidates = sorted(map(str, known))  # pyright: ignore[reportArgumentType, reportUnknownVariableType, reportUnknownArgumentType]
    near = get_close_matches(name, candidates, 1)
    label = f"did you mean `{near[0]}`?" if near else ""
    refuse("E101", f"unknown {noun} `{name}`", span, label=label)


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
            return "a text or a truth"
        case None:
            return "null"
        case _:
            return "a tensor"


def plain(value: object) -> object:
    """A value without symbols as a Python one: whole numbers are ints."""
    known = _known(value)
    if isinstance(known, Fraction):
        return int(known) if known.denominator == 1 else float(known)
    return known


def _is_symbolic(value: object) -> bool:
    return isinstance(value, Size) and value.number is None


def _known(value: object) -> object:
    if isinstance(value, Size) and value.number is not None:
        return value.number
    return value
