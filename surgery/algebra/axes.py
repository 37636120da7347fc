"""Symbolic sizes: exact sums of products of names, so that shapes can be checked before there are any.

`out / r`, `r * (r - 1) / 2` and `2 * in` are compared by their normal form. What has none (a root, a
ceiling) is an atom of its own, equal to itself alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Atom:
    """A name (`function` empty), or a function of sizes that does not simplify."""

    name: str
    function: str = ""
    arguments: tuple[Size, ...] = ()

    def __str__(self) -> str:
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
        return _collect([*self.terms, *size(other).terms])

    def __radd__(self, other: Scalar) -> Size:
        return size(other) + self

    def __neg__(self) -> Size:
        return Size(tuple((m, -c) for m, c in self.terms))

    def __sub__(self, other: Scalar) -> Size:
        return self + -size(other)

    def __rsub__(self, other: Scalar) -> Size:
        return size(other) - self

    def __mul__(self, other: Scalar) -> Size:
        right = size(other).terms
        return _collect([(_product(m, n), c * d) for m, c in self.terms for n, d in right])

    def __rmul__(self, other: Scalar) -> Size:
        return size(other) * self

    def __truediv__(self, other: Scalar) -> Size:
        return self * _reciprocal(size(other))

    def __rtruediv__(self, other: Scalar) -> Size:
        return size(other) / self

    def __pow__(self, exponent: Scalar) -> Size:
        whole = size(exponent).number
        if whole is None or whole.denominator != 1 or abs(whole) > 16:
            return function("pow", self, exponent)
        result = size(1)
        for _ in range(abs(int(whole))):
            result = result * self
        return result if whole >= 0 else 1 / result

    def __str__(self) -> str:
        if not self.terms:
            return "0"
        text = " + ".join(_term(m, c) for m, c in self.terms)
        return text.replace("+ -", "- ")


Scalar = int | float | Fraction | Size


def size(value: Scalar) -> Size:
    """A number as a size; a size as it is."""
    if isinstance(value, Size):
        return value
    return _collect([((), Fraction(value))])


def symbol(name: str) -> Size:
    """The size that is a name."""
    return Size(((((Atom(name), 1),), Fraction(1)),))


def function(name: str, *arguments: Scalar) -> Size:
    """A named function of sizes; evaluated at once where all of them are numbers."""
    sizes = tuple(size(a) for a in arguments)
    numbers = [s.number for s in sizes]
    known = [n for n in numbers if n is not None]
    if len(known) == len(sizes):
        return size(FUNCTIONS[name](*known))
    return Size(((((Atom("", name, sizes), 1),), Fraction(1)),))


def evaluate(value: Scalar, names: Mapping[str, int | float]) -> int | float:
    """The number a size stands for; an int where it is whole. Raises KeyError for a free name."""
    if not isinstance(value, Size):
        return _plain(value)
    total = Fraction(0)
    for monomial, coefficient in value.terms:
        term = coefficient
        for atom, exponent in monomial:
            term *= Fraction(_atom_value(atom, names)) ** exponent
        total += term
    return _plain(total)


def names_in(value: Size) -> frozenset[str]:
    """The names a size depends on."""
    found: set[str] = set()
    for monomial, _ in value.terms:
        for atom, _ in monomial:
            found |= (
                {atom.name} if not atom.function else set().union(*map(names_in, atom.arguments))
            )
    return frozenset(found)


def _power(base: Fraction, exponent: Fraction) -> float | Fraction:
    if exponent.denominator == 1 and abs(exponent) <= 64:
        return base ** int(exponent)
    return float(base) ** float(exponent)


FUNCTIONS: dict[str, Callable[..., int | float | Fraction]] = {
    "sqrt": lambda a: math.sqrt(a),
    "exp": lambda a: math.exp(a),
    "log": lambda a: math.log(a),
    "ceil": lambda a: math.ceil(a),
    "floor": lambda a: math.floor(a),
    "abs": abs,
    "min": min,
    "max": max,
    "mod": lambda a, b: a % b,
    "pow": _power,
    "reciprocal": lambda a: 1 / a,
}


def _collect(terms: list[tuple[Monomial, Fraction]]) -> Size:
    total: dict[Monomial, Fraction] = {}
    for monomial, coefficient in terms:
        total[monomial] = total.get(monomial, Fraction(0)) + coefficient
    kept = ((m, c) for m, c in total.items() if c)
    return Size(tuple(sorted(kept, key=lambda term: str(term[0]))))


def _product(left: Monomial, right: Monomial) -> Monomial:
    exponents: dict[Atom, int] = {}
    for atom, exponent in (*left, *right):
        exponents[atom] = exponents.get(atom, 0) + exponent
    return tuple(sorted(((a, e) for a, e in exponents.items() if e), key=lambda p: str(p[0])))


def _reciprocal(value: Size) -> Size:
    if not value.terms:
        raise ZeroDivisionError
    if len(value.terms) > 1:
        return function("reciprocal", value)
    monomial, coefficient = value.terms[0]
    return Size(((tuple((a, -e) for a, e in monomial), 1 / coefficient),))


def _atom_value(atom: Atom, names: Mapping[str, int | float]) -> int | float | Fraction:
    if not atom.function:
        return names[atom.name]
    return FUNCTIONS[atom.function](*(Fraction(evaluate(a, names)) for a in atom.arguments))


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
