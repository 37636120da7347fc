"""Values with the same bits anywhere: how exact they are, in any order and on any machine."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, cast

import machine
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from library_calls import CASES, derived
from machine import numbers
from torch import Tensor

from surgery.algebra.axes import size
from surgery.algebra.expr import BIAS, WEIGHT, Expr
from surgery.algebra.ops import OPS
from surgery.algebra.products import BITS, moved, product
from surgery.algebra.reproducible import NAMES, norm, placed, solved, total
from surgery.algebra.rows import is_reproducible
from surgery.algebra.rules import make

TESTS = Path(__file__).parents[1]


def rows(values: Tensor) -> list[list[float]]:
    return cast(Any, values).tolist()


def far(*shape: int, seed: int = 0) -> Tensor:
    """The same, whose magnitudes differ by up to 2¹²."""
    spread = (numbers(*shape, seed=seed + 1) * 12).round()
    return numbers(*shape, seed=seed) * torch.exp2(spread)


# ------------------------------------------------------------------------------------- products

SIZES = st.integers(1, 13)


_NONE = Fraction(0)


def true_product(a: Tensor, b: Tensor) -> list[list[Fraction]]:
    return [
        [
            sum((Fraction(x) * Fraction(y) for x, y in zip(r, c, strict=True)), _NONE)
            for c in rows(b.T)
        ]
        for r in rows(a)
    ]


@given(SIZES, st.integers(1, 70), SIZES, st.integers(0, 99), st.sampled_from([26, 34, 48, BITS]))
@settings(max_examples=25)
def test_a_product_is_as_exact_as_it_says(m: int, k: int, n: int, seed: int, bits: int) -> None:
    a, b = far(m, k, seed=seed), far(k, n, seed=seed + 7)
    made = product(a, b, bits)
    largest = a.abs().amax(1, keepdim=True) * b.abs().amax(0, keepdim=True)
    for i, row in enumerate(true_product(a, b)):
        for j, exact in enumerate(row):
            bound = math.ulp(float(exact)) + k * 2.0 ** (3 - bits) * float(largest[i, j])
            assert abs(Fraction(float(made[i, j])) - exact) <= bound


@given(SIZES, st.integers(1, 200), SIZES, st.data())
@settings(max_examples=25)
def test_no_order_or_block_changes_a_bit(m: int, k: int, n: int, data: st.DataObject) -> None:
    a, b = far(m, k), far(k, n, seed=3)
    made = product(a, b)
    order = torch.tensor(data.draw(st.permutations(range(k))))
    assert torch.equal(product(a[:, order], b[order]), made)
    cut = data.draw(st.integers(0, m))
    assert torch.equal(torch.cat((product(a[:cut], b), product(a[cut:], b))), made)
    assert torch.equal(product(a, b[:, 0]), made[:, 0])
    assert torch.equal(product(b.T, a.T), product(b.T.contiguous(), a.T.contiguous()))
    several = product(torch.stack((a, -a)), torch.stack((b, b)))
    assert torch.equal(several, torch.stack((made, -made)))


def test_a_product_is_added_in_place() -> None:
    a, b, x = numbers(7, 300), numbers(300, 1100, seed=3), numbers(7, 1100, seed=5)
    for far in (1.0, 2.0**450):
        made = product(a * far, b)
        assert torch.equal(moved(x.clone(), 1, a * far, b), x + made)
        assert torch.equal(moved(x.clone(), -1, a * far, b), x - made)
    assert torch.equal(moved(x.clone(), 1, a[:, :0], b[:0]), x)


def test_a_large_product_is_made_in_pieces_of_the_same_bits() -> None:
    a, b = numbers(300, 17), numbers(17, 1000, seed=3)
    rows = [product(a[i : i + 1], b) for i in range(0, 300, 37)]
    assert torch.equal(torch.cat(rows), product(a, b)[::37])
    stack = torch.stack([numbers(90, 64, seed=i) for i in range(31)])
    sides = torch.stack([numbers(64, 64, seed=i + 50) for i in range(31)])
    assert torch.equal(product(stack, sides)[30], product(stack[30], sides[30]))


@pytest.mark.parametrize("power", [-1000, -450, 450, 900])
def test_a_product_far_from_one_has_the_same_bits(power: int) -> None:
    a, b = numbers(5, 11), numbers(11, 3, seed=3)
    back = -power // 2
    moved = product(a * 2.0**power, b * 2.0**back)
    assert torch.equal(moved * 2.0**back, product(a, b) * 2.0 ** (power + 2 * back))


def test_what_is_not_finite_stays_so_and_spoils_no_other_row() -> None:
    a, b = numbers(5, 11), numbers(11, 3, seed=3)
    spoiled = a.clone()
    spoiled[1, 2], spoiled[3, 4] = torch.nan, torch.inf
    made = product(spoiled, b)
    assert [bool(row.isnan().all()) for row in made] == [False, True, False, True, False]
    assert torch.equal(made[::2], product(a, b)[::2])


def test_zeros_and_nothing_have_a_product() -> None:
    nothing = torch.zeros(3, 5, dtype=torch.float64)
    assert torch.equal(product(nothing, numbers(5, 2)), nothing[:, :2])
    assert product(numbers(3, 0), numbers(0, 2)).abs().sum() == 0
    assert product(numbers(0, 3), numbers(3, 2)).shape == (0, 2)


# --------------------------------------------------------------------------- sums, eliminations


@given(st.integers(1, 300), st.integers(0, 99))
def test_sums_and_lengths_are_those_of_exact_sums(n: int, seed: int) -> None:
    a = far(2, n, seed=seed)
    for row, summed, length in zip(rows(a), total(a), norm(a), strict=True):
        assert abs(float(summed) - math.fsum(row)) <= 1e-15 * math.fsum(map(abs, row))
        assert float(length) == pytest.approx(math.hypot(*row), rel=1e-15)


def test_a_length_neither_overflows_nor_vanishes() -> None:
    a = numbers(1, 7)
    for power in (-700, 700):
        assert torch.equal(norm(a * 2.0**power) * 2.0**-power, norm(a))


@pytest.mark.parametrize("n", [1, 2, 7, 32])
def test_elimination_solves(n: int) -> None:
    a, b = numbers(3, n, n), numbers(3, n, 5, seed=3)
    a[1] = a[1].flip(0)  # its diagonal is not what to divide by
    made = solved(a, b)
    torch.testing.assert_close(a @ made, b, rtol=1e-9, atol=1e-9)


def test_elimination_divides_by_the_largest() -> None:
    a = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()
    assert torch.equal(solved(a, numbers(2, 2)), numbers(2, 2).flip(0))
    assert not solved(torch.zeros(2, 2).double(), numbers(2, 2)).isfinite().any()


def test_entries_at_one_place_are_added_in_their_order() -> None:
    v, flat = numbers(40), (torch.arange(40) * 7) % 11
    made = torch.zeros(13).double()
    for value, place in zip(v, flat, strict=True):
        made[place] += value
    assert torch.equal(placed(v, flat, 13), made)


# ---------------------------------------------------------------------------------------- table


def test_every_value_is_an_operators() -> None:
    assert {name for name, op in OPS.items() if op.exact is not None} == NAMES


def test_what_libraries_approximate_is_said_to_be_so() -> None:
    settled: dict[str, bool] = {}
    for call, _ in CASES:
        found = derived(call)
        assert found.still is not None
        roots = [found.still.weight, found.still.bias, found.inverse.weight]
        own = all(is_reproducible(root) for root in roots if root is not None)
        settled[call] = own
    assert {call for call, own in settled.items() if not own} == {
        "fourierft(n_frequency=9, scaling=2, random_loc_seed=3)",  # a Fourier transform
        "road(group_size=10)",  # sines
        'road(variant="road_2", group_size=10)',
        'road(variant="road_4", group_size=10)',
        "vblora(r=2, num_vectors=6, vector_length=4, dropout=0.1)",  # a softmax
        'deft(r=3, decomposition_method="qr")',  # a factorization
        'peanut(r=3, depth=2, act_fn="gelu")',
    }


def test_powers_are_products_where_they_are_whole() -> None:
    assert is_reproducible(make("power", WEIGHT, exponent=size(3)))
    assert not is_reproducible(make("power", BIAS, exponent=size(0.5)))


# ------------------------------------------------------------------------------------- machines

MACHINES: tuple[tuple[dict[str, str], int, int], ...] = (
    ({"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, 2, 48),
)
"""What makes libraries choose other instructions, with how many threads and rows at a time."""


CALLS = (
    "dora(r=16, alpha=3)",
    "oft(block_size=32, use_cayley_neumann=false)",
    "oft(block_size=8, coft=true, block_share=true)",
    "hra(r=5, apply_GS=true)",
    "boft(block_size=8, n_butterfly_factor=2)",
    "bat(r=16)",
)


@cache
def roots() -> dict[str, Expr]:
    """The merge with each call, and the way back."""
    made: dict[str, Expr] = {}
    for call in CALLS:
        found = derived(call, site=machine.SITE)
        assert found.still is not None
        assert found.inverse.weight is not None
        made |= {f"{call} merged": found.still.weight, f"{call} back": found.inverse.weight}
    return made


@pytest.mark.parametrize(("variables", "threads", "rows"), MACHINES)
def test_another_machine_comes_to_the_same_bits(
    variables: dict[str, str], threads: int, rows: int
) -> None:
    paths = os.pathsep.join((str(TESTS), str(TESTS.parent)))
    done = subprocess.run(
        [sys.executable, str(TESTS / "machine.py"), str(threads), str(rows)],
        env={**os.environ, **variables, "PYTHONPATH": paths},
        input=pickle.dumps(roots()),
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == here()


@cache
def here() -> dict[str, str]:
    return machine.digests(roots(), rows=128)
