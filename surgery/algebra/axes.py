"""Symbolic sizes: exact sums of products of names, to check shapes before there are any.

`out / r`, `r * (r - 1) / 2` and `2 * in` are compared by their normal form. What has none (a root,
a ceiling) is an atom of its own, equal to itself alone. Numbers and expressions that are larger
than any size could be are refused with `OverflowError`, so that arithmetic always ends soon.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

MAX_BITS = 1000
"""No number is longer: what is larger in magnitude than 2**1000 is no float either."""

_LARGEST = Fraction(2**MAX_BITS)
_MAX_WEIGHT = 256
_MAX_EXPONENT = 16


@dataclass(frozen=True, slots=True)
class Atom:
    """A name (`function` empty), or a function of sizes that does not simplify."""

    name: str
    function: str = ""
    arguments: tuple[Size, ...] = ()

    def __str__(self) -> str:
        """As it is written in a method."""
        if not self.function:
            return self.name
        return f"{self.function}({', '.join(map(str, self.arguments))})"


Monomial = tuple[tuple[Atom, int], ...]


@dataclass(frozen=True, slots=True)
class Size:
    """A Laurent polynomial over atoms with rational coefficients, in normal form.

    `+ - * /` and whole powers are exact; division by anything but one term makes an atom.
    """

    terms: tuple[tuple[Monomial, Fraction], ...]

    @property
    def number(self) -> Fraction | None:
        """Its value if it has no names in it, else None."""
        if not self.terms:
            return Fraction(0)
        if len(self.terms) == 1 and not self.terms[0][0]:
            return self.terms[0][1]
        return None

    def __add__(self, other: Scalar) -> Size:
        """The sum."""
        return _collect([*self.terms, *size(other).terms])

    def __radd__(self, other: Scalar) -> Size:
        """The sum."""
        return size(other) + self

    def __neg__(self) -> Size:
        """The negative."""
        return Size(tuple((m, -c) for m, c in self.terms))

    def __sub__(self, other: Scalar) -> Size:
        """The difference."""
        return self + -size(other)

    def __rsub__(self, other: Scalar) -> Size:
        """The difference."""
        return size(other) - self

    def __mul__(self, other: Scalar) -> Size:
        """The product."""
        right = size(other).terms
        if len(self.terms) * len(right) > _MAX_WEIGHT:
            raise OverflowError("the product has too many terms")
        return _collect([(_product(m, n), c * d) for m, c in self.terms for n, d in right])

    def __rmul__(self, other: Scalar) -> Size:
        """The product."""
        return size(other) * self

    def __truediv__(self, other: Scalar) -> Size:
        """The quotient. Raises ZeroDivisionError."""
        return self * _reciprocal(size(other))

    def __rtruediv__(self, other: Scalar) -> Size:
        """The quotient. Raises ZeroDivisionError."""
        return size(other) / self

    def __pow__(self, exponent: Scalar) -> Size:
        """A power; exact for small whole exponents."""
        whole = size(exponent).number
        if whole is None or whole.denominator != 1 or abs(whole) > _MAX_EXPONENT:
            return function("pow", self, exponent)
        result = size(1)
        for _ in range(abs(int(whole))):
            result = result * self
        return result if whole >= 0 else 1 / result

    def __str__(self) -> str:
        """As it is written in a method."""
        if not self.terms:
            return "0"
        text = " + ".join(_term(m, c) for m, c in self.terms)
        return text.replace("+ -", "- ")


Scalar = int | float | Fraction | Size


def size(value: Scalar) -> Size:
    """A number as a size; a size as it is. Raises OverflowError or ValueError if not finite."""
    if isinstance(value, Size):
        return value
    return _collect([((), Fraction(value))])


def symbol(name: str) -> Size:
    """The size that is a name."""
    return Size(((((Atom(name), 1),), Fraction(1)),))


def function(name: str, *arguments: Scalar) -> Size:
    """A named function of sizes; evaluated at once where all of them are numbers.

    Raises ArithmeticError, ValueError or TypeError where it has no value there.
    """
    sizes = tuple(size(a) for a in arguments)
    numbers = [s.number for s in sizes]
    known = [n for n in numbers if n is not None]
    if len(known) == len(sizes):
        return size(FUNCTIONS[name](*known))
    return _collect([(((Atom("", name, sizes), 1),), Fraction(1))])


def evaluate(value: Scalar, names: Mapping[str, int | float]) -> int | float:
    """The number a size stands for; an int where it is whole, nan where there is none.

    There is none for the root of a negative number, a division by zero, or what is larger than
    any number of a spec may be. Raises KeyError for a free name.
    """
    if not isinstance(value, Size):
        return _plain(value)
    try:
        return _plain(_total(value, names))
    except (ArithmeticError, ValueError):
        return math.nan


def _total(value: Size, names: Mapping[str, int | float]) -> Fraction:
    total = Fraction(0)
    for monomial, coefficient in value.terms:
        term = coefficient
        for atom, exponent in monomial:
            term *= bounded_power(Fraction(_atom_value(atom, names)), exponent)
        total += bounded(term)
    return bounded(total)


def names_in(value: Size) -> frozenset[str]:
    """The names a size depends on."""
    atoms = [atom for monomial, _ in value.terms for atom, _ in monomial]
    inside = (names_in(size) for atom in atoms for size in atom.arguments)
    return frozenset(a.name for a in atoms if not a.function).union(*inside)


def bounded(value: Fraction) -> Fraction:
    """The value, rounded if it has very many digits. Raises OverflowError if it is very large."""
    if abs(value) > _LARGEST:
        raise OverflowError("the number is too large")
    return value if value.denominator.bit_length() <= MAX_BITS else Fraction(float(value))


def bounded_power(base: Fraction, exponent: int) -> Fraction:
    """A whole power. Raises OverflowError before it is computed, if it would be too large."""
    digits = max(base.numerator.bit_length(), base.denominator.bit_length()) - 1
    if digits * abs(exponent) > 16 * MAX_BITS:
        raise OverflowError("the number is too large")
    return bounded(base**exponent)


def _power(base: Fraction, exponent: Fraction) -> float | Fraction:
    if exponent.denominator == 1:
        return bounded_power(base, int(exponent))
    if base < 0:
        raise ValueError("a root of a negative number")
    return float(base) ** float(exponent)


def _inverted(value: Fraction) -> Fraction:
    return 1 / value


_MOST_DIVIDED = 2**32


def at_most(n: float | Fraction, most: float | Fraction) -> float | Fraction:
    """The number itself. Raises ValueError if it is above the other."""
    if n > most:
        raise ValueError(f"{n} is above {most}")
    return n


def divisor(n: float | Fraction, most: float | Fraction) -> int:
    """A divisor of n: `most` if it is one, else the largest up to `most` and the root of n.

    With `most` = -1 the root alone bounds it. Raises ValueError for what is not whole, and
    OverflowError for what is too large to be divided soon.
    """
    if n != int(n) or most != int(most) or n < 1:
        raise ValueError("only whole numbers have divisors")
    if n > _MOST_DIVIDED:
        raise OverflowError("the number is too large")
    whole, bound = int(n), int(n if most == -1 else most)
    if most > 0 and whole % bound == 0:
        return bound
    tried = range(min(bound, math.isqrt(whole)), 1, -1)
    return next((d for d in tried if whole % d == 0), 1)


Function = Callable[..., "int | float | Fraction"]

FUNCTIONS: Mapping[str, Function] = {
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "ceil": math.ceil,
    "floor": math.floor,
    "abs": cast(Function, abs),
    "min": cast(Function, min),
    "max": cast(Function, max),
    "mod": cast(Function, operator.mod),
    "pow": _power,
    "reciprocal": _inverted,
    "divisor": divisor,
    "at_most": at_most,
}


def _collect(terms: list[tuple[Monomial, Fraction]]) -> Size:
    total: dict[Monomial, Fraction] = {}
    for monomial, coefficient in terms:
        total[monomial] = bounded(total.get(monomial, Fraction(0)) + coefficient)
    kept = [(m, c) for m, c in total.items() if c]
    if sum(_weight(m) for m, _ in kept) > _MAX_WEIGHT:
        raise OverflowError("the expression is too long")
    return Size(tuple(sorted(kept, key=_term_order)))


def _term_order(term: tuple[Monomial, Fraction]) -> str:
    return str(term[0])


def _weight(monomial: Monomial) -> int:
    """How many names and functions it is written with; what nests doubles, if it is repeated."""
    return 1 + sum(_atom_weight(atom) for atom, _ in monomial)


def _atom_weight(atom: Atom) -> int:
    return 1 + sum(_weight(m) for a in atom.arguments for m, _ in a.terms)


def _product(left: Monomial, right: Monomial) -> Monomial:
    exponents: dict[Atom, int] = {}
    for atom, exponent in (*left, *right):
        exponents[atom] = exponents.get(atom, 0) + exponent
    return tuple(sorted(((a, e) for a, e in exponents.items() if e), key=lambda p: str(p[0])))


def _reciprocal(value: Size) -> Size:
    if not value.terms:
        raise ZeroDivisionError("division by zero")
    (monomial, coefficient), *more = value.terms
    if more:
        return function("reciprocal", value)
    return Size(((tuple((a, -e) for a, e in monomial), 1 / coefficient),))


def _atom_value(atom: Atom, names: Mapping[str, int | float]) -> int | float | Fraction:
    if not atom.function:
        return names[atom.name]
    return FUNCTIONS[atom.function](*(_total(a, names) for a in atom.arguments))


def _plain(value: float | Fraction) -> int | float:
    if isinstance(value, Fraction):
        return int(value) if value.denominator == 1 else float(value)
    return value


def _term(monomial: Monomial, coefficient: Fraction) -> str:
    above = [str(a) if e == 1 else f"{a}**{e}" for a, e in monomial if e > 0]
    below = [str(a) if e == -1 else f"{a}**{-e}" for a, e in monomial if e < 0]
    number = str(coefficient.numerator)
    if abs(coefficient.numerator) == 1 and above:
        number = "-" if coefficient < 0 else ""
    if coefficient.denominator != 1:
        below = [str(coefficient.denominator), *below]
    text = "*".join([number, *above] if number not in ("", "-") else above)
    return ("-" if number == "-" else "") + "/".join([text, *below])
