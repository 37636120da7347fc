"""Sizes: a commutative ring with reciprocals of one term, exact, and always soon done."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.algebra.axes import Scalar, Size, evaluate, function, names_in, size, symbol

NAMES = {"in": 7, "out": 11, "r": 3}

numbers = st.integers(-6, 6) | st.fractions(-3, 3, max_denominator=5)
leaves = st.sampled_from([symbol(n) for n in NAMES]) | numbers.map(size)
sizes = st.recursive(
    leaves,
    lambda inner: (
        st.tuples(inner, inner).map(lambda p: p[0] + p[1])
        | st.tuples(inner, inner).map(lambda p: p[0] - p[1])
        | st.tuples(inner, inner).map(lambda p: p[0] * p[1])
    ),
    max_leaves=6,
)


def exact(value: Scalar) -> Fraction:
    """The number by plain arithmetic over the terms."""
    total = Fraction(0)
    for monomial, coefficient in size(value).terms:
        for atom, exponent in monomial:
            coefficient *= Fraction(NAMES[atom.name]) ** exponent
        total += coefficient
    return total


@given(sizes, sizes, sizes)
def test_sizes_are_a_commutative_ring(a: Size, b: Size, c: Size) -> None:
    assert a + b == b + a
    assert a * b == b * a
    assert (a + b) + c == a + (b + c)
    assert (a * b) * c == a * (b * c)
    assert a * (b + c) == a * b + a * c
    assert a + 0 == a
    assert a * 1 == a
    assert a - a == size(0)
    assert a - b == a + -b
    assert hash(a + b) == hash(b + a)


@given(sizes, sizes)
def test_evaluation_is_a_homomorphism(a: Size, b: Size) -> None:
    assert exact(a + b) == exact(a) + exact(b)
    assert exact(a * b) == exact(a) * exact(b)
    assert evaluate(a, NAMES) == pytest.approx(float(exact(a)))


@given(sizes, st.sampled_from([*NAMES]), numbers.filter(bool))
def test_division_by_one_term_is_undone_by_multiplication(
    a: Size, name: str, number: int | Fraction
) -> None:
    divisor = symbol(name) * number
    assert a / divisor * divisor == a
    assert exact(a / divisor) == exact(a) / exact(divisor)


def test_division_by_a_sum_is_an_atom_of_its_own() -> None:
    whole, part = symbol("out"), symbol("r") + 1
    assert whole / part == whole / (1 + symbol("r"))
    assert evaluate(whole / part, NAMES) == 11 / 4


@given(sizes, st.integers(0, 3))
def test_powers_are_repeated_products(a: Size, exponent: int) -> None:
    product = size(1)
    for _ in range(exponent):
        product = product * a
    assert a**exponent == product


def test_functions_are_evaluated_where_they_can_be() -> None:
    assert function("sqrt", 16) == size(4)
    assert function("max", 3, 5) == size(5)
    root = function("sqrt", symbol("r") + 1)
    assert root.number is None
    assert evaluate(root, NAMES) == 2
    assert names_in(root * symbol("in") - 2) == {"r", "in"}


def test_whole_results_are_ints() -> None:
    assert isinstance(evaluate(symbol("out") * 2, NAMES), int)
    assert evaluate(symbol("out") / 2, NAMES) == 5.5


def test_they_print_as_they_are_written() -> None:
    r, fan_in = symbol("r"), symbol("in")
    assert str(r * (r - 1) / 2) in ("-r/2 + r**2/2", "r**2/2 - r/2")
    assert str(fan_in / r) == "in/r"
    assert str(size(0)) == "0"
    assert str(function("ceil", fan_in / 4)) == "ceil(in/4)"


@pytest.mark.parametrize(
    "value",
    [
        lambda: function("sqrt", symbol("in") - 100),
        lambda: 1 / (symbol("in") - 7),
        lambda: symbol("in") ** (symbol("in") ** 16),
        lambda: (((symbol("in") ** 16) ** 16) ** 16) ** 16,
        lambda: function("exp", symbol("in") ** 5),
        lambda: function("pow", symbol("r") - 4, size(1) / 3),
    ],
)
def test_what_has_no_value_is_nan(value: Callable[[], Size]) -> None:
    assert math.isnan(evaluate(value(), NAMES))


def test_a_free_name_is_not_a_value() -> None:
    with pytest.raises(KeyError):
        evaluate(symbol("m"), NAMES)


@pytest.mark.parametrize("value", [math.inf, math.nan, 10**400, -(10**400), 2**1001])
def test_what_is_not_finite_is_no_size(value: float) -> None:
    with pytest.raises((OverflowError, ValueError)):
        size(value)


def test_no_expression_grows_without_end() -> None:
    every = sum((symbol(name) for name in "abcdefgh"), start=size(0))
    with pytest.raises(OverflowError):
        _ = every**16

    def nested() -> Size:
        value = symbol("r")
        for _ in range(100):
            value = function("sqrt", value + value * symbol("in"))
        return value

    with pytest.raises(OverflowError):
        nested()
    with pytest.raises(ZeroDivisionError):
        _ = every / (symbol("r") - symbol("r"))
