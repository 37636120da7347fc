"""One rounding from float64, and what is told of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import surgery.precision as precision
from surgery.precision import Rounding, measured, rounded

EIGHT = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
NARROW = (torch.bfloat16, torch.float16, *EIGHT)
INFINITE = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e5m2)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def wide(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def numbers(dtype: torch.dtype) -> Tensor:
    """All finite numbers of a dtype from 0 on, in float64, ascending."""
    codes = torch.arange(2 ** (8 * dtype.itemsize - 1)).to(INTEGERS[dtype.itemsize])
    found = codes.view(dtype).double()
    return found[found.isfinite()]


def same(found: Tensor, expected: Tensor) -> bool:
    """Bit by bit, but for which NaN it is."""
    nan = expected.isnan()
    signs = torch.equal(found.signbit() | nan, expected.signbit() | nan)
    return signs and torch.equal(found.nan_to_num(1e300), expected.nan_to_num(1e300))


# --------------------------------------------------------------------------------- to nearest


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_nearest_of_all_numbers_and_the_even_one_of_two(dtype: torch.dtype, sign: int) -> None:
    """At each number, midway to the next, and next to that in float64."""
    every = numbers(dtype)
    below, above = every[:-1], every[1:]
    middle = (below + above) / 2
    even = torch.where(torch.arange(len(below)) % 2 == 0, below, above)
    beyond, before = (torch.nextafter(middle, wide(to)) for to in (math.inf, 0.0))
    for exact, expected in ((every, every), (middle, even), (beyond, above), (before, below)):
        assert torch.equal(rounded(sign * exact, dtype).double(), sign * expected)


def test_the_conversion_alone_would_round_twice() -> None:
    exact = wide(1 + 2**-8 + 2**-40)
    assert exact.bfloat16().item() == 1.0
    assert rounded(exact, torch.bfloat16).item() == 1 + 2**-7


def test_single_precision_and_double_precision() -> None:
    generator = torch.Generator().manual_seed(1)
    exact = torch.randn(1009, generator=generator, dtype=torch.float64) * 1e-3
    assert torch.equal(rounded(exact, torch.float32), exact.float())
    assert torch.equal(rounded(exact, torch.float64), exact)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_no_neighbour_is_nearer(dtype: torch.dtype, number: float) -> None:
    every = numbers(dtype)
    if abs(number) > every[-1]:
        return
    found = rounded(wide(number), dtype).double()
    assert (found - number).abs() <= (every - abs(number)).abs().min()


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32], ids=str)
def test_what_is_beyond_is_no_number(dtype: torch.dtype) -> None:
    """From half a unit beyond the largest number: it is not made the largest."""
    largest = torch.finfo(dtype).max
    bits = torch.tensor([largest]).to(dtype).view(INTEGERS[dtype.itemsize])
    unit = largest - (bits - 1).view(dtype).double().item()
    lost = math.inf if dtype in INFINITE else math.nan
    near = rounded(wide(largest + 0.499 * unit, -largest - 0.499 * unit), dtype).double()
    assert torch.equal(near, wide(largest, -largest))
    over = wide(largest + 0.501 * unit, 2 * largest, 1e300 * largest, math.inf)
    for sign in (1, -1):
        assert same(rounded(sign * over, dtype).double(), wide(*[sign * lost] * 4))
    assert rounded(wide(math.nan), dtype).isnan().all()


@pytest.mark.parametrize("dtype", INFINITE, ids=str)
@pytest.mark.parametrize("how", ["nearest", "stochastic"])
def test_zeros_keep_their_signs(dtype: torch.dtype, how: str) -> None:
    assert how in ("nearest", "stochastic")
    found = rounded(wide(0.0, -0.0, 1e-300, -1e-300), dtype, how)
    assert same(found.double(), wide(0.0, -0.0, 0.0, -0.0))


def test_how_a_tensor_lies_makes_no_difference() -> None:
    exact = torch.linspace(-1, 1, 7 * 11, dtype=torch.float64).view(7, 11)
    there = exact.mT.contiguous().mT.requires_grad_()
    found = rounded(there, torch.bfloat16)
    assert found.is_contiguous()
    assert not found.requires_grad
    assert torch.equal(found, rounded(exact, torch.bfloat16))
    assert torch.equal(rounded(exact.float(), torch.float16), exact.float().half())
    for shape in ((), (0,), (0, 3), (1, 1)):
        assert rounded(torch.zeros(shape, dtype=torch.float64), torch.half).shape == shape


def test_weights_that_stay_as_they_are() -> None:
    """Where nearly all could lie midway as far as float32 can tell."""
    every = torch.arange(2**15).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    exact = every.double().repeat(3)
    exact[:100] = exact[:100].nextafter(wide(1.0))
    assert torch.equal(rounded(exact, torch.float16), every.repeat(3))


def test_zeros_and_what_is_subnormal_beside_others() -> None:
    """Numbers that are subnormal in float32 too, among some that are not and many zeros."""
    unit = 2.0**-133
    exact = wide(0.0, -0.0, 1.0, 2.5 * unit, 3.5 * unit, -0.5 * unit, 0.5001 * unit, -1e-320)
    found = rounded(exact.repeat(5), torch.bfloat16).double()
    expected = wide(0.0, -0.0, 1.0, 2 * unit, 4 * unit, -0.0, unit, -0.0)
    assert same(found, expected.repeat(5))


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32], ids=str)
def test_many_elements_are_rounded_and_measured_in_pieces(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(5)
    exact = torch.randn(13, 17, generator=generator, dtype=torch.float64)
    base = exact.bfloat16()
    whole = rounded(exact, dtype)
    for name in ("_PIECE", "_DRAWN"):
        monkeypatch.setattr(precision, name, 61)
    assert torch.equal(rounded(exact, dtype).double(), whole.double())
    drawn = rounded(exact, dtype, "stochastic", generator).double()
    assert ((drawn - exact).abs() <= 2 * torch.finfo(dtype).eps * exact.abs() + 2e-3).all()
    found, one = (
        measured(exact, whole, base),
        plainly(exact.view(-1), whole.view(-1), base.view(-1)),
    )
    assert (found.error, found.largest, found.elements) == (one.error, one.largest, 221)
    assert found.squared_error == pytest.approx(one.squared_error, rel=1e-12)
    assert found.squared_change == pytest.approx(one.squared_change, rel=1e-12)


# ---------------------------------------------------------------------------------- by chance


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32], ids=str)
def test_the_mean_of_many_draws_is_the_number(dtype: torch.dtype) -> None:
    """Between two neighbours each time; within five standard deviations of the mean."""
    draws, info = 4001, torch.finfo(dtype)
    least = info.tiny * info.eps  # subnormal numbers, and on both sides of zero
    exact = wide(1 + info.eps / 3, -1 - 0.9 * info.eps, 0.3, -0.07, 0.4 * least, -0.2 * least)
    generator = torch.Generator().manual_seed(2)
    found = rounded(exact.expand(draws, -1), dtype, "stochastic", generator).double()
    low, high = found.amin(0), found.amax(0)
    assert ((found == low) | (found == high)).all()
    assert ((low < exact) & (exact < high)).all()
    nearest = rounded(exact, dtype).double()
    assert ((nearest == low) | (nearest == high)).all()
    chance = (exact - low) / (high - low)
    deviation = (high - low) * (chance * (1 - chance) / draws).sqrt()
    assert ((found.mean(0) - exact).abs() < 5 * deviation).all()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_what_is_a_number_stays_by_chance_too(dtype: torch.dtype) -> None:
    every = numbers(dtype)
    both = torch.cat([every, -every])
    assert torch.equal(rounded(both, dtype, "stochastic").double(), both)
    beyond = every[-1:] * (1 + torch.finfo(dtype).eps / 5)
    assert (rounded(beyond.expand(997), dtype, "stochastic").double() == every[-1]).all()


def test_what_is_no_number_is_none_by_chance_either() -> None:
    found = rounded(wide(math.inf, -math.inf, 1e300, math.nan), torch.half, "stochastic")
    assert same(found.double(), wide(math.inf, -math.inf, math.inf, math.nan))


def test_draws_are_those_of_the_generator() -> None:
    exact = torch.linspace(-1, 1, 997, dtype=torch.float64)

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return rounded(exact, torch.bfloat16, "stochastic", generator)

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


# --------------------------------------------------------------------------------- what is lost


def plainly(exact: Tensor, found: Tensor, base: Tensor) -> Rounding:
    """The same, one element after another."""
    total = Rounding()
    for x, y, w in torch.stack([exact, found.double(), base.double()], 1):
        total += _of_one(float(x), float(y), float(w))
    return total


def _of_one(x: float, y: float, w: float) -> Rounding:
    if not math.isfinite(x):
        return Rounding(elements=1, nonfinite=1)
    if not math.isfinite(y):
        return Rounding(elements=1, overflowed=1)
    change = (x - w) ** 2 if math.isfinite(w) else 0.0
    return Rounding(abs(y - x), abs(x), 1, 0, 0, (y - x) ** 2, change)


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(0, 61), st.booleans(), st.booleans())
def test_what_rounding_lost(seed: int, size: int, special: bool, broken: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(size, generator=generator, dtype=torch.float64)
    base = torch.randn(size, generator=generator).half()
    if special and size > 3:
        exact[:4] = wide(math.inf, math.nan, 1e30, -65519.0)
    if broken and size:
        base[-1] = math.nan
    merged = rounded(exact, torch.half)
    one, other = measured(exact, merged, base), plainly(exact, merged, base)
    assert (one.error, one.largest, one.elements) == (other.error, other.largest, other.elements)
    assert (one.overflowed, one.nonfinite) == (other.overflowed, other.nonfinite)
    assert one.finite == (not (special and size > 3))
    assert one.squared_error == pytest.approx(other.squared_error, rel=1e-12)
    assert one.squared_change == pytest.approx(other.squared_change, rel=1e-12)
    parts = [measured(exact[s], merged[s], base[s]) for s in (slice(7), slice(7, None))]
    joined = parts[0] + parts[1]
    assert joined.squared_error == pytest.approx(one.squared_error, rel=1e-12)
    assert (joined.error, joined.overflowed) == (one.error, one.overflowed)


def test_shares() -> None:
    assert (Rounding().relative, Rounding().lost, Rounding().finite) == (0, 0, True)
    found = measured(wide(2.0, 1.25), wide(2.0, 1.0), wide(2.0, 0.75))
    assert found.relative == 0.125
    assert found.lost == 0.5
    assert measured(wide(1.25), wide(1.0), wide(1.25)).lost == math.inf


def test_what_is_measured_may_lie_anyhow() -> None:
    exact = torch.linspace(1, 2, 77, dtype=torch.float64).view(7, 11)
    merged, base = exact.bfloat16(), exact.float() + 1
    expected = measured(exact, merged, base)
    assert measured(*(t.mT.contiguous().mT for t in (exact, merged, base))) == expected
    assert measured(exact.float(), merged, base).elements == 77
