"""What is missing from a base that was recomputed, packed: W from the inverse of W'.

A merge rounds W' = round(W + D), so the inverse gives back What = round(W' - D) and not always W.
The difference of the two, counted in representable numbers, is what is kept. Rounding loses about
as many bits of a weight as the merged weight's exponent is above its own; whoever decodes knows
both W' and What, so the elements are told apart by it. Most are of class 0, where nothing was
lost: differences are rare there, and their places are kept, counted among the elements of this
class. Those raised to another class are few and their places known: each class is a stream of its
own, but the highest ones are one where they have few elements.

    file   = version  count  checksum of the base  piece*       (every 2**20 elements a piece)
    piece  = way  [exponent]  stream of class 0, 1, … 11

Streams are told by `surgery.streams`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from surgery.checksums import bytes_of
from surgery.streams import (
    FAR,
    NEAR,
    NOTHING,
    SPARSE,
    Reader,
    damaged,
    nonzero_places,
    read,
    read_sparse,
    sample,
    sparse,
    stream,
    varint,
)

VERSION = 1
PIECE = 2**20
"""Elements that are packed at a time, which bounds the memory; 16 bits of them are 2 MiB."""

CLASSES = 12
_FEW = 256
"""Elements that are not worth a stream of their own."""

_AT_ONCE = 2**18
"""Elements that are compared at a time: what is made of them stays in a processor's cache."""

_CHANCE = 64
"""Bits that one way is better than the other in a sample by chance."""

_RARE = 0.04
"""Where fewer elements than this differ, there is little to be won by another way."""

_VERBATIM, _BESIDE, _ALONE = 0, 1, 2
"""The ways: the base itself; by the exponents of W' and What; by that of What alone, where each
element is made of many and the rounding of all of them is in it."""


def packed(base: Tensor, found: Tensor, merged: Tensor) -> bytes:
    """What leads from `found` (What) to `base` (W), beside `merged` (W').

    All are of one dtype and shape, on any device. Every bit pattern comes back, NaN's too.
    """
    _check_alike(base, found, merged)
    parts: list[bytes] = []
    seen = 0
    for one in zip(_pieces(base), _pieces(found), _pieces(merged), strict=True):
        seen = zlib.crc32(bytes_of(one[0]), seen)
        parts.append(_packed_piece(*one))
    return b"".join((bytes([VERSION]), varint(base.numel()), seen.to_bytes(4, "little"), *parts))


def unpacked(data: bytes, found: Tensor, merged: Tensor) -> Tensor:
    """The base, of the shape and on the device of `found`.

    Raises ValueError where `data` is damaged, or `found` or `merged` is not what it was.
    """
    _check_alike(found, merged)
    reader = Reader(data)
    if reader.byte() != VERSION or reader.varint() != found.numel():
        damaged()
    expected = int.from_bytes(reader.take(4), "little")
    flat = torch.empty(found.shape, dtype=found.dtype)
    into = torch.split(_elements(flat), PIECE)
    seen = 0
    for one, *others in zip(into, _pieces(found), _pieces(merged), strict=True):
        one.copy_(_unpacked_piece(reader, others[0], others[1]))
        seen = zlib.crc32(bytes_of(one), seen)
    if seen != expected or not reader.ended:
        damaged()
    return flat.to(found.device)


def _check_alike(first: Tensor, *others: Tensor) -> None:
    for other in others:
        if other.shape != first.shape or other.dtype != first.dtype:
            message = f"{other.dtype} {[*other.shape]} beside {first.dtype} {[*first.shape]}"
            raise ValueError(message)


# --------------------------------------------------------------------------------- the numbers


@dataclass(frozen=True, slots=True)
class _Format:
    """How a dtype's numbers lie in an integer of its size.

    floating: with a sign bit first and an exponent above `mantissa` bits.
    """

    floating: bool
    mantissa: int


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@cache
def _format(dtype: torch.dtype) -> _Format:
    if not dtype.is_floating_point:
        return _Format(False, 0)
    return _Format(True, -int(math.log2(torch.finfo(dtype).eps)))


def _elements(tensor: Tensor) -> Tensor:
    """The numbers of a contiguous tensor in a row; two for a complex one."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).view(-1)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's numbers in order, on the CPU, `PIECE` at a time; one empty piece of none."""
    flat = _elements(tensor.detach().resolve_conj().resolve_neg().contiguous())
    return (piece.cpu() for piece in torch.split(flat, PIECE))


def _bits(piece: Tensor) -> Tensor:
    return piece.view(_INTEGERS[piece.element_size()])


def _counted(piece: Tensor) -> Tensor:
    """The numbers as integers in the same order: neighbours differ by one, and -0 is below +0."""
    bits = _bits(piece)
    return _mirrored(bits) if _format(piece.dtype).floating else bits


def _mirrored(bits: Tensor) -> Tensor:
    """Of negative numbers every bit but the sign turned over, which undoes itself."""
    info = torch.iinfo(bits.dtype)
    return (bits >> (info.bits - 1)).bitwise_and_(info.max).bitwise_xor_(bits)


def _exponent_bits(dtype: torch.dtype) -> int:
    """Where the exponent lies in the integer of a dtype; nowhere of what has none."""
    form = _format(dtype)
    if not form.floating:
        return 0
    most = torch.iinfo(_INTEGERS[dtype.itemsize]).max
    return most >> form.mantissa << form.mantissa


def _exponents(piece: Tensor) -> Tensor:
    """The exponents as they are stored, in 16 bits; subnormal numbers have the smallest but one."""
    lying = _bits(piece) & _exponent_bits(piece.dtype)
    return (lying >> _format(piece.dtype).mantissa).to(torch.int16).clamp_(min=1)


def _differences(base: Tensor, found: Tensor) -> Tensor:
    return _counted(base) - _counted(found)


# ---------------------------------------------------------------------------------- the pieces


@dataclass(frozen=True, slots=True)
class _Raised:
    """The elements of a piece of `size` that are not of class 0.

    places: of these, by class and then ascending. sorted: ascending. counts: of each class.
    """

    size: int
    places: Tensor
    sorted: Tensor
    counts: tuple[int, ...]

    @property
    def others(self) -> int:
        """How many elements are of class 0."""
        return self.size - self.sorted.numel()

    def ranks(self, places: Tensor) -> Tensor:
        """How many elements of class 0 are before those at places."""
        return places - torch.searchsorted(self.sorted, places)

    def placed(self, ranks: Tensor) -> Tensor:
        """Places of elements of class 0, by how many of the class are before."""
        before = self.sorted - torch.arange(self.sorted.numel())
        return ranks + torch.searchsorted(before, ranks, right=True)

    @property
    def rest(self) -> Tensor:
        """The places of all elements of class 0."""
        return (
            torch.ones(self.size, dtype=torch.int8).index_fill_(0, self.sorted, 0).nonzero()[:, 0]
        )


def _packed_piece(base: Tensor, found: Tensor, merged: Tensor) -> bytes:
    way, floor = _way(base, found, merged)
    raised = _raised(way, floor, found, merged)
    there = raised.places
    values = _differences(base.index_select(0, there), found.index_select(0, there))
    parts = [bytes([way]), varint(floor), _level(base, found, raised)]
    parts += map(stream, torch.split(values, [*raised.counts]))
    data = b"".join(parts)
    if 2 * len(data) > base.numel() * base.element_size():
        return min(data, bytes([_VERBATIM]) + stream(_counted(base)), key=len)
    return data


def _unpacked_piece(reader: Reader, found: Tensor, merged: Tensor) -> Tensor:
    way, dtype = reader.byte(), _bits(found).dtype
    if way == _VERBATIM:
        return _number(read(reader, found.numel(), dtype), found.dtype)
    floor = reader.varint()
    if way not in (_BESIDE, _ALONE) or floor > 2**15:
        damaged()
    raised = _raised(way, floor, found, merged)
    places, values = _read_level(reader, raised, dtype)
    parts = [read(reader, count, dtype) for count in raised.counts]
    there = torch.cat([places, raised.places])
    own = _counted(found.index_select(0, there)).add_(torch.cat([values, *parts]))
    base = _bits(found).clone().index_copy_(0, there, _bits(_number(own, found.dtype)))
    return base.view(found.dtype)


def _number(counted: Tensor, dtype: torch.dtype) -> Tensor:
    return (_mirrored(counted) if _format(dtype).floating else counted).view(dtype)


def _raised(way: int, floor: int, found: Tensor, merged: Tensor) -> _Raised:
    """The elements that have lost bits by rounding; by the exponents, and quick where they are few.

    What is subnormal has the unit of the next exponent; it may be of class 1 and not of 0.
    """
    mask, start, parts = _exponent_bits(found.dtype), 0, list[Tensor]()
    level = floor << _format(found.dtype).mantissa
    if level > mask:
        damaged()
    pairs = (torch.split(_bits(t), _AT_ONCE) for t in (found, merged))
    for own, other in zip(*pairs, strict=True):
        lost = level - (own & mask) if way == _ALONE else (other & mask).sub_(own & mask)
        parts.append(nonzero_places(lost.clamp_(min=0)).add_(start))
        start += own.numel()
    there = torch.cat(parts)
    classes = _classes(way, floor, found.index_select(0, there), merged.index_select(0, there))
    classes, order = classes.clamp_(min=1).sort(stable=True)
    counts = _joined([int(n) for n in classes.long().bincount(minlength=1)[1:]])
    return _Raised(found.numel(), there.index_select(0, order), there, counts)


def _joined(counts: list[int]) -> tuple[int, ...]:
    """Counts of which the last is not of a few, but those before it are added to it."""
    while len(counts) > 1 and counts[-1] < _FEW:
        counts[-2:] = [counts[-2] + counts[-1]]
    return tuple(counts)


def _classes(way: int, floor: int, found: Tensor, merged: Tensor) -> Tensor:
    """The class of each element, about the bits that rounding has lost."""
    own = _exponents(found)
    lost = floor - own if way == _ALONE else _exponents(merged).sub_(own)
    return lost.clamp_(0, CLASSES - 1).to(torch.int8)


def _way(base: Tensor, found: Tensor, merged: Tensor) -> tuple[int, int]:
    """The way that codes an even sample in fewer bits, and its exponent."""
    before, own, other = (sample(t).contiguous() for t in (base, found, merged))
    one = _differences(before, own)
    if int(one.count_nonzero()) <= _RARE * one.numel():
        return _BESIDE, 0
    top = int(_exponents(own).max()) if _format(own.dtype).floating else 0
    beside = _cost(one, _classes(_BESIDE, 0, own, other))
    alone = _cost(one, _classes(_ALONE, top, own, other))
    return (_ALONE, top) if alone < 0.98 * beside - _CHANCE else (_BESIDE, 0)


def _cost(difference: Tensor, classes: Tensor) -> float:
    """The bits of an ideal code that knows the classes."""
    cells = classes.long() * 256 + difference.clamp(-127, 127).long() + 127
    cells = cells.bincount(minlength=CLASSES * 256).view(CLASSES, 256).double()
    return float(torch.xlogy(cells.sum(1), cells.sum(1)).sum() - torch.xlogy(cells, cells).sum())


def _level(base: Tensor, found: Tensor, raised: _Raised) -> bytes:
    """The stream of class 0, whose places are only looked for where few differ."""
    differ = _bits(base) ^ _bits(found)
    some = sample(differ)
    if int(some.count_nonzero()) > SPARSE * some.numel():
        rest = raised.rest
        return stream(_differences(base.index_select(0, rest), found.index_select(0, rest)))
    places = nonzero_places(differ.index_fill_(0, raised.sorted, 0))
    if not places.numel():
        return bytes([NOTHING])
    values = _differences(base.index_select(0, places), found.index_select(0, places))
    return sparse(raised.ranks(places), values, raised.others)


def _read_level(reader: Reader, raised: _Raised, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Places of elements of class 0, and the differences of these; the others differ in nothing."""
    kind = reader.byte()
    if kind in (NEAR, FAR):
        ranks, values = read_sparse(reader, kind, raised.others, dtype)
        return raised.placed(ranks), values
    if kind == NOTHING:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=dtype)
    reader.at -= 1
    return raised.rest, read(reader, raised.others, dtype)
