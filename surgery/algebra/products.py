"""Products in float64 with the same bits on any machine, in any order and in any blocks.

A product is a sum of products of few-bit parts of its operands. Each of these is exact, since a
float64 has room for every partial sum of it, so it does not matter in which order, with or without
fused operations, a library adds.

The splitting is that of Ozaki et al., "Error-free transformations of matrix multiplication by using
fast routines of matrix multiplication and its applications", 2012.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

BITS = 54
"""Of each operand of a product, counted from the largest element of its row or column: as many as
make it as accurate as one in float64."""

_SUMS = 53  # that a float64 adds exactly
_MOST = 50  # of a part, to be split off by adding
_FAR = 400  # of exponents whose products, split, are far from both ends of float64
_AT_ONCE = 2**17  # elements of a result
_KEPT = 2**18  # elements of a right operand whose parts are kept


Cover = tuple[tuple[int, tuple[int, ...]], ...]
Rights = tuple[list[Tensor], "Tensor | None"]
Kept = MutableMapping[Tensor, tuple[Cover, Rights]]


def product(a: Tensor, b: Tensor, bits: int = BITS, kept: Kept | None = None) -> Tensor:
    """[..., m, k] @ [..., k, n], or [..., m, k] @ [k], of float64.

    The error of an element is at most an ulp of it and k 2⁻⁵¹ of the product of the largest
    magnitudes in its row and its column; on random matrices it is 0.4 to 1.0 times the error of a
    product in float64. With fewer `bits` it takes less time: the second part of the error is then
    k 2³⁻ᵇⁱᵗˢ of these. What is not finite makes its whole row or column nan.

    kept: where the parts of b are found, or put, if it comes again.
    """
    if b.ndim == 1:
        return product(a, b.unsqueeze(-1), bits).squeeze(-1)
    if not a.numel() or not b.numel():
        return torch.matmul(a, b)
    made = torch.empty((*a.shape[:-1], b.shape[-1]), dtype=torch.float64, device=a.device)
    cover = _cover(a.shape[-1], bits)
    if a.ndim == 2:
        _by_rows(a.double(), _right_parts(b, cover, kept), made, cover)
    else:
        lefts, rights = a.double().flatten(0, -3), b.flatten(0, -3)
        _by_batches(lefts, rights, made.flatten(0, -3), cover, kept)
    return made.to(a.dtype)


def moved(
    x: Tensor, sign: int, a: Tensor, b: Tensor, bits: int = BITS, kept: Kept | None = None
) -> Tensor:
    """Rows x [m, n] plus or, with a sign below 0, minus `product(a, b)`, put in the place of x."""
    if a.numel() and b.numel():
        cover = _cover(a.shape[-1], bits)
        _by_rows(a, _right_parts(b, cover, kept), x, cover, sign)
    return x


def kept_bytes(shape: tuple[int, ...], bits: int = BITS) -> int:
    """The bytes of the parts that are kept of a right operand [..., k, n]."""
    if prod(shape) > _KEPT:
        return 0
    besides = {beside for _, beside in _cover(shape[-2], bits)}
    return 8 * prod(shape) * sum(map(len, besides))


def _by_rows(a: Tensor, rights: Rights, made: Tensor, cover: Cover, sign: int = 0) -> None:
    """Some rows at a time, so that what is made on the way stays in a processor's cache."""
    rows = max(1, _AT_ONCE // a.shape[-1])
    room = _room(a[:rows], made[: max(1, _AT_ONCE // made.shape[-1])], cover)
    for at in range(0, len(a), rows):
        _multiplied(a[at : at + rows], rights, made[at : at + rows], room, sign)


def _by_batches(a: Tensor, b: Tensor, made: Tensor, cover: Cover, kept: Kept | None) -> None:
    """Some matrices at a time, for the same reason."""
    count = max(1, _AT_ONCE // (made.shape[-2] * max(made.shape[-1], a.shape[-1])))
    room, few = _room(a[:count], made[:count], cover), b.numel() <= _KEPT
    rights = _right_parts(b, cover, kept) if few else None
    for at in range(0, len(a), count):
        here = slice(at, at + count)
        own = _right_parts(b[here], cover) if rights is None else _cut(rights, here)
        _multiplied(a[here], own, made[here], room)


def _cut(rights: Rights, here: slice) -> Rights:
    parts, columns = rights
    return [part[here] for part in parts], None if columns is None else columns[here]


class _Room(NamedTuple):
    """Where the parts of the left operand, what is left of it, and products are made."""

    cover: Cover
    parts: Tensor
    rest: Tensor
    product: Tensor
    sum: Tensor


def _room(a: Tensor, made: Tensor, cover: Cover) -> _Room:
    parts = a.new_empty((len(cover), *a.shape))
    room = torch.empty((2, *made.shape), dtype=a.dtype, device=a.device)
    return _Room(cover, parts, a.new_empty(a.shape), room[0], room[1])


def _multiplied(a: Tensor, rights: Rights, made: Tensor, room: _Room, sign: int = 0) -> None:
    """The product in the place of `made`, or added to it or taken from it, by the sign."""
    n, (parts, columns) = len(a), rights
    close, exponents, rows = near(a, -1, room.rest[:n])
    widths = tuple(bits for bits, _ in room.cover)
    left = _split(close, exponents, widths, (room.parts[:, :n], room.rest[:n]))
    lefts = [left[place] for place, (_, wide) in enumerate(room.cover) for _ in wide]
    count = len(room.product)
    for at in range(0, n, count):
        here = slice(at, at + count)
        into = made[here]
        found = room.sum[: len(into)] if sign else into
        _added([one[here] for one in lefts], parts, found, room.product)
        if rows is not None:
            found *= rows[here]
        if columns is not None:
            found *= columns
        if sign:
            _ = into.add_(found) if sign > 0 else into.sub_(found)


def _added(lefts: list[Tensor], rights: list[Tensor], made: Tensor, room: Tensor) -> None:
    """The products, from the smallest on."""
    torch.matmul(lefts[-1], rights[-1], out=made)
    for left, right in zip(reversed(lefts[:-1]), reversed(rights[:-1]), strict=True):
        made += torch.matmul(left, right, out=room[: len(made)])


@lru_cache(maxsize=256)
def _cover(length: int, wanted: int) -> Cover:
    """The parts of the left operand, each by its bits and those of the right's parts beside it.

    The bits of two parts and of the length are those of an exact sum. Together the parts, from the
    highest bits on, make all products of bits down to those wanted, in as few products as can be.
    """
    room = _SUMS - (length - 1).bit_length()
    best: dict[int, tuple[int, Cover]] = {}
    for at in range(wanted - 1, -1, -1):
        choices = list[tuple[int, Cover]]()
        for bits in range(1, min(room, _MOST)):
            count = -(-(wanted - at) // (room - bits))
            more, after = best.get(at + bits, (0, ()))
            each = -(-(wanted - at) // count)
            choices.append((count + more, ((bits, (each,) * count), *after)))
        best[at] = min(choices, key=lambda choice: choice[0])
    return best[0][1]


def _right_parts(b: Tensor, cover: Cover, kept: Kept | None = None) -> Rights:
    """A part for each product, and what the columns of the result are multiplied by."""
    known = None if kept is None else kept.get(b)
    if known is not None and known[0] == cover:
        return known[1]
    wide = b.double()
    rest = torch.empty_like(wide)
    close, exponents, factors = near(wide, -2, rest)
    split = {
        beside: _split(close, exponents, beside, (wide.new_empty((len(beside), *b.shape)), rest))
        for _, beside in cover
    }
    found: Rights = [part for _, beside in cover for part in split[beside].unbind()], factors
    if kept is not None and b.numel() <= _KEPT:
        kept[b] = cover, found
    return found


def near(a: Tensor, axis: int, room: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """With exponents that are not far from 0, these, and what that is made up for by."""
    top = torch.abs(a, out=room).amax(axis, keepdim=True)
    exponents = (top.view(torch.int64) >> 52) - 1022  # |a| < 2 ** exponent
    if not bool(exponents.abs().amax() > _FAR):
        return a, exponents, None
    held = exponents.clamp(-_FAR, _FAR)
    moved = torch.where(top == 0, 0, exponents - held)
    return a * _power_of_two(-moved), held, _power_of_two(moved)


def _power_of_two(exponents: Tensor) -> Tensor:
    """Of whole numbers from -1022 to 1023, exactly."""
    return ((exponents + 1023) << 52).view(torch.float64)


def _split(
    a: Tensor, exponents: Tensor, widths: tuple[int, ...], room: tuple[Tensor, Tensor]
) -> Tensor:
    """Parts of so many bits each, the highest first; what is below the last is rounded away.

    room: where they are made, and what is left of them.
    """
    (parts, rest), bits = room, 0
    # Numbers so large that what is added to them is rounded to as many bits as a part has.
    scale = 1.5 * _power_of_two(exponents + 52)
    for place, width in enumerate(widths):
        bits += width
        large = scale * 2.0**-bits
        torch.add(a, large, out=parts[place]).sub_(large)
        if place + 1 < len(widths):
            a = torch.sub(a, parts[place], out=rest)
    return parts
