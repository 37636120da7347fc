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
"""Elements that a thread works on at a time: 1 MiB in float64 stays in a cache."""

_AWAY = 2**22
"""Elements that are worked on at a time on another device, where each step waits for the last."""

_DRAWN = 2**18
"""Elements for which there are draws at a time, which must not depend on how many threads are."""

_LOW = (1 << 29) - 1
"""The bits of a float64's mantissa that a float32 has no room for."""


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
    if dtype == torch.float32 and how == "nearest":
        return found.copy_(values).to(exact.device)
    if how == "nearest":
        size = _size(values)
        room = torch.empty(min(size, values.numel()), dtype=torch.int64, device=values.device)
        for one, into in zip(_pieces(values, size), _pieces(found, size), strict=True):
            _round(one, into, room[: len(one)])
    else:
        for one, into in zip(_pieces(values, _DRAWN), _pieces(found, _DRAWN), strict=True):
            into.copy_(_drawn(one, dtype, generator))
    return found.to(exact.device)


def _size(values: Tensor) -> int:
    return _PIECE * torch.get_num_threads() if values.is_cpu else _AWAY


def _pieces(tensor: Tensor, size: int) -> Iterator[Tensor]:
    """The elements in order; parts of the tensor itself where it is contiguous."""
    return iter(torch.split(tensor.detach().reshape(-1), size))


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
    def deep(self) -> bool:
        """Whether it has numbers that are subnormal in float32."""
        return self.least <= torch.finfo(torch.float32).tiny


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


def _round(exact: Tensor, into: Tensor, room: Tensor) -> None:
    """Write the nearest numbers of a narrow dtype, without rounding twice; all [n].

    The conversion of float64 goes through float32. So all bits that a float32 has no room for are
    gathered in its last one (rounding to odd): none that was not midway between two numbers of the
    dtype is then. room: int64 [n], for what is between.
    """
    bits, form = exact.view(torch.int64), _format(into.dtype)
    torch.bitwise_and(bits, _LOW, out=room)
    room.add_(_LOW).bitwise_or_(bits).bitwise_and_(~_LOW)
    odd = room.view(torch.float64)
    if form.beyond is not None:
        odd.masked_fill_(exact.abs() >= form.beyond, torch.nan)
    into.copy_(odd)
    if form.deep:
        _round_deep(exact, into, form)


def _round_deep(exact: Tensor, into: Tensor, form: _Format) -> None:
    """Write again, as multiples of their unit, those numbers that are subnormal in float32."""
    magnitudes = into.view(form.bits) & torch.iinfo(form.bits).max
    if not exact.numel() or int(magnitudes.amin()) > 1 << form.mantissa:
        return
    wide = exact.abs()
    places = ((wide > 0) & (wide <= form.least)).nonzero().view(-1)
    if places.numel():
        scale = 2.0**form.mantissa / form.least
        there = exact.index_select(0, places).mul_(scale).round_().div_(scale)
        into.index_copy_(0, places, there.to(into.dtype))


def _nearest(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest numbers of a dtype [n]."""
    if dtype == torch.float32:
        return exact.float()
    found = torch.empty(exact.shape, dtype=dtype, device=exact.device)
    _round(exact, found, torch.empty_like(exact, dtype=torch.int64))
    return found


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
        exact = exact.to("cpu", torch.float64)
    size, device = _size(exact), exact.device
    room = torch.empty(min(size, exact.numel()), dtype=torch.float64, device=device)
    found = Rounding()
    for one in zip(*(_pieces(t, size) for t in (exact, rounded, base)), strict=True):
        wide, narrow, own = (part.to(device) for part in one)
        found += _measured(wide, narrow, own, room[: len(wide)])
    return found


def _measured(exact: Tensor, rounded: Tensor, base: Tensor, room: Tensor) -> Rounding:
    """Of float64 and what is of any dtype; all [n], and `room` float64, for what is between."""
    count = exact.numel()
    if not count:
        return Rounding()
    error = room.copy_(rounded).sub_(exact)
    squared = float(torch.dot(error, error))
    if math.isfinite(squared):  # so all of both are finite: the common case, in few passes
        return _finite(exact, _most(error), squared, room.copy_(base).sub_(exact))
    before, after = exact.isfinite(), rounded.double().isfinite()
    both = before & after
    nonfinite = count - int(before.sum())
    overflowed = int((before & ~after).sum())
    exact, error, own = exact[both], error[both], base[both]
    others = Rounding(elements=count - len(exact), overflowed=overflowed, nonfinite=nonfinite)
    if not len(exact):
        return others
    squared = float(torch.dot(error, error))
    return others + _finite(exact, _most(error), squared, exact - own)


def _finite(exact: Tensor, error: float, squared: float, change: Tensor) -> Rounding:
    """Of elements that are finite, but perhaps for the base; error: the largest."""
    moved = float(torch.dot(change, change))
    if not math.isfinite(moved):  # of a base that is not finite
        change = change[change.isfinite()]
        moved = float(torch.dot(change, change))
    return Rounding(
        error=error,
        largest=_most(exact),
        elements=exact.numel(),
        squared_error=squared,
        squared_change=moved,
    )


def _most(values: Tensor) -> float:
    least, most = torch.aminmax(values)
    return max(-float(least), float(most))
