"""From float64 to a weight's dtype in one rounding, and what that rounding lost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Round = Literal["nearest", "stochastic"]

_PIECE = 2**17
"""Elements that are worked on at a time: 1 MiB in float64 stays in a processor's cache."""


# ------------------------------------------------------------------------------------ rounding


def rounded(
    exact: Tensor,
    dtype: torch.dtype,
    how: Round = "nearest",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The numbers of a float64 tensor in another floating dtype, contiguous, each rounded once.

    how: `nearest`, of two that are as near the even one (IEEE 754); `stochastic`, one of the two
        neighbours, the nearer with the greater probability, such that the mean is the number.
    generator: of the draws, on any device; the default one of the tensor's where it is None.
    What is beyond the largest number and half a unit is an infinity, or NaN in a dtype that has
    none: nothing is saturated.
    """
    values = exact.detach().contiguous()
    if values.dtype != torch.float64:  # it is exact, and a device may have no float64
        values = values.to("cpu", torch.float64)
    if dtype == torch.float64:
        return values.to(exact.device)
    found = torch.empty(values.shape, dtype=dtype, device=values.device)
    parts = zip(_pieces(values), _pieces(found), strict=True)
    for one, into in parts:
        into.copy_(_nearest(one, dtype) if how == "nearest" else _drawn(one, dtype, generator))
    return found.to(exact.device)


@dataclass(frozen=True, slots=True)
class _Format:
    """What rounding to a dtype has to know.

    mantissa: how many bits of it are stored. bits: the integers of its size. least, most: its
    smallest normal and its largest number. beyond: the least magnitude that is no number any more,
    of what has no infinities.
    """

    mantissa: int
    bits: torch.dtype
    least: float
    most: float
    beyond: float | None

    @property
    def tie(self) -> int:
        """Bits of a float32 that are all zero in whatever lies midway between two numbers."""
        return (1 << max(0, 22 - self.mantissa)) - 1


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@cache
def _format(dtype: torch.dtype) -> _Format:
    bits = _INTEGERS[dtype.itemsize]
    # Told by its numbers: `torch.finfo` is wrong about the unit of a dtype.
    above = (torch.ones(1, dtype=dtype).view(bits) + 1).view(dtype).double()
    mantissa = -round(math.log2(float(above) - 1))
    least = torch.tensor([1 << mantissa], dtype=bits).view(dtype).double()
    infinite = torch.tensor(math.inf).to(dtype).float().isinf().item()
    most = torch.finfo(dtype).max
    return _Format(mantissa, bits, float(least), most, None if infinite else _beyond(dtype))


def _beyond(dtype: torch.dtype) -> float:
    """The largest number and half a unit; beyond that only, if the largest number is even."""
    largest = torch.tensor([torch.finfo(dtype).max]).to(dtype)
    code = int(largest.view(torch.uint8))
    below = torch.tensor([code - 1], dtype=torch.uint8).view(dtype)
    limit = float(largest) + (float(largest) - float(below)) / 2
    return limit if code % 2 else math.nextafter(limit, math.inf)


def _nearest(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest numbers of a dtype, without rounding twice.

    The conversion of float64 goes through float32. That is as good as once, except where float32
    gives what lies midway between two numbers and was not there: few, which are converted again
    from the neighbour in float32 that has its last bit set (rounding to odd).
    """
    single = exact.float()
    if dtype == torch.float32:
        return single
    form = _format(dtype)
    found = single.to(dtype)
    doubtful = ((single.view(torch.int32) & form.tie) - 1) >> 31  # -1 where it is zero
    places = doubtful.nonzero().view(-1)
    if places.numel() > exact.numel() // 64:  # weights that stay as they are
        inexact = (single.double() - exact).nonzero().view(-1)
        places = inexact[doubtful[inexact] < 0]
    if places.numel():
        found[places] = _odd(exact[places], single[places]).to(dtype)
    if form.beyond is not None:
        found = torch.where(exact.abs() < form.beyond, found, torch.nan)
    return found


def _odd(exact: Tensor, single: Tensor) -> Tensor:
    """float32 next to float64: itself if it is equal, else the neighbour whose last bit is set."""
    bits = single.view(torch.int32)
    wide = single.double()
    even = (wide != exact) & (bits & 1 == 0) & exact.isfinite()
    outward = exact.abs() > wide.abs()
    step = torch.where(outward, 1, -1).to(torch.int32)
    return (bits + step * even).view(torch.float32)


def _drawn(exact: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """The number below or above in magnitude: the bits that are too many carry one or do not."""
    form = _format(dtype)
    extra = 52 - form.mantissa
    device = exact.device if generator is None else generator.device
    draws = torch.empty(exact.shape, dtype=torch.int64, device=device)
    draws.random_(0, 1 << extra, generator=generator)
    bits = exact.view(torch.int64) + draws.to(exact.device)
    found = (bits >> extra << extra).view(torch.float64).float().to(dtype)
    magnitude = exact.abs()
    others = (magnitude.clamp(form.least, form.most) - magnitude).nonzero().view(-1)
    if others.numel():  # whose units are not of their exponent, or that are no numbers
        found[others] = _drawn_between(exact[others], dtype, generator)
    return found


def _drawn_between(exact: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """The nearest number or its neighbour on the other side of the exact one."""
    near = _nearest(exact, dtype)
    wide = near.double()
    error = exact - wide
    other = _towards(near, error > 0)
    gap = (other.double() - wide).abs()
    device = exact.device if generator is None else generator.device
    draws = torch.rand(exact.shape, dtype=torch.float64, device=device, generator=generator)
    # Where the error or the gap is not finite, the nearest stays.
    turned = (draws.to(exact.device) * gap < error.abs()) & gap.isfinite() & error.isfinite()
    return torch.where(turned, other, near)


def _towards(numbers: Tensor, up: Tensor) -> Tensor:
    """The next number of the dtype above or below."""
    bits = numbers.view(_format(numbers.dtype).bits)
    info = torch.iinfo(bits.dtype)
    grown = up == (bits >= 0)  # away from zero
    stepped = bits + torch.where(grown, 1, -1).to(bits.dtype)
    # Across zero: the smallest number of the other sign.
    least = torch.where(up, 1, info.min + 1).to(bits.dtype)
    crossing = (bits & info.max) == 0
    stepped.masked_fill_((stepped == info.min) & ~grown, 0)  # not -0, which some dtypes have not
    return torch.where(crossing, least, stepped).view(numbers.dtype)


# ----------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, slots=True)
class Rounding:
    """What rounding the merged weights of a site lost; `a + b` is that of both blocks together.

    error: the largest absolute error of a weight, and largest: the largest magnitude of an exact
    one, both of those that are finite before and after. elements: all that were rounded.
    overflowed: how many were finite and are no longer. nonfinite: how many were not before.
    squared_error, squared_change: sums over those finite, of W' − exact and of exact − W.
    """

    error: float = 0.0
    largest: float = 0.0
    elements: int = 0
    overflowed: int = 0
    nonfinite: int = 0
    squared_error: float = 0.0
    squared_change: float = 0.0

    def __add__(self, other: Rounding) -> Rounding:
        """Of the elements of both."""
        return Rounding(
            max(self.error, other.error),
            max(self.largest, other.largest),
            self.elements + other.elements,
            self.overflowed + other.overflowed,
            self.nonfinite + other.nonfinite,
            self.squared_error + other.squared_error,
            self.squared_change + other.squared_change,
        )

    @property
    def relative(self) -> float:
        """The largest error as a share of the largest weight; 0 if there is none."""
        return self.error / self.largest if self.largest else 0.0

    @property
    def lost(self) -> float:
        """The root mean square of the error as a share of that of the change; inf of no change."""
        if not self.squared_error:
            return 0.0
        if not self.squared_change:
            return math.inf
        return math.sqrt(self.squared_error / self.squared_change)

    @property
    def finite(self) -> bool:
        """Whether all that came out are numbers."""
        return not (self.overflowed or self.nonfinite)


def measured(exact: Tensor, rounded: Tensor, base: Tensor) -> Rounding:
    """What was lost between W' in float64 and W' as it is stored; base: W, for the change.

    The three have one shape, and may be on any device and of any strides.
    """
    if exact.dtype != torch.float64:
        exact = exact.cpu()
    device = exact.device
    found = Rounding()
    for one in zip(_pieces(exact), _pieces(rounded), _pieces(base), strict=True):
        wide, narrow, own = (part.to(device).to(torch.float64) for part in one)
        found += _measured(wide, narrow, own)
    return found


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The elements in order; parts of the tensor itself where it is contiguous."""
    return iter(torch.split(tensor.detach().reshape(-1), _PIECE))


def _measured(exact: Tensor, rounded: Tensor, base: Tensor) -> Rounding:
    count = exact.numel()
    if not count:
        return Rounding()
    error = rounded - exact
    squared = float(torch.dot(error, error))
    if math.isfinite(squared):  # so all of both are finite: the common case, in few passes
        return _finite(exact, error, base, squared)
    before, after = exact.isfinite(), rounded.isfinite()
    both = before & after
    nonfinite = count - int(before.sum())
    overflowed = int((before & ~after).sum())
    error = error[both]
    squared = float(torch.dot(error, error))
    found = _finite(exact[both], error, base[both], squared) if error.numel() else Rounding()
    others = count - error.numel()
    return found + Rounding(elements=others, overflowed=overflowed, nonfinite=nonfinite)


def _finite(exact: Tensor, error: Tensor, base: Tensor, squared: float) -> Rounding:
    change = exact - base
    moved = float(torch.dot(change, change))
    if not math.isfinite(moved):  # of a base that is not finite
        change = change[change.isfinite()]
        moved = float(torch.dot(change, change))
    return Rounding(
        error=_most(error),
        largest=_most(exact),
        elements=exact.numel(),
        squared_error=squared,
        squared_change=moved,
    )


def _most(values: Tensor) -> float:
    least, most = torch.aminmax(values)
    return max(-float(least), float(most))
