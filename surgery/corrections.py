"""What is missing from a base that was recomputed, packed: W from the inverse of W'.

A merge rounds W' = round(W + D), so the inverse gives back What = round(W' - D) and not always W.
The difference of the two, counted in representable numbers, is what is kept. Rounding loses about
as many bits of a weight as the merged weight's exponent is above its own; whoever decodes knows
both W' and What, so the elements are told apart by it. Where nothing was lost, differences are
rare and their places are kept; elsewhere each class is a dense stream with a code of its own.

    file   = version  count  checksum of the base  piece*       (every 2**20 elements a piece)
    piece  = way  [exponent]  stream of class 0, 1, … 11
    stream = nothing | places values | digits rest

Numbers are varints, least bits first; bytes are entropy coded by zlib (Huffman codes alone).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NoReturn

import torch
from torch import Tensor

from surgery.checksums import bytes_of

VERSION = 1
PIECE = 2**20
"""Elements that are packed at a time, which bounds the memory; 16 bits of them are 2 MiB."""

CLASSES = 12
_CHANCE = 64
"""Bits that one way is better than the other in a sample by chance."""

SAMPLE = 2**12
"""Elements by which it is chosen how to code all of them."""

SPARSE = 0.2
"""Where fewer elements than this differ, their places are kept and not a code for each."""

_NOTHING, _NEAR, _FAR = 0, 1, 2
_BYTES = 6
_DIGITS = {3: (1, 5), 4: (2, 3), 5: (7, 2), _BYTES: (127, 1)}
"""How a dense stream is coded: the largest magnitude of a digit, and how many are one byte.

Huffman codes take whole bits, so digits that are rarely not zero are coded five at once.
"""

_MOST = torch.tensor([[most] for most, _ in _DIGITS.values()], dtype=torch.int8)
_DEEPEST = 32
"""Streams in one another: two for each byte of a number, and as many before those as are small."""

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
    return b"".join((bytes([VERSION]), _varint(base.numel()), seen.to_bytes(4, "little"), *parts))


def unpacked(data: bytes, found: Tensor, merged: Tensor) -> Tensor:
    """The base, of the shape and on the device of `found`.

    Raises ValueError where `data` is damaged, or `found` or `merged` is not what it was.
    """
    _check_alike(found, merged)
    reader = _Reader(data)
    if reader.byte() != VERSION or reader.varint() != found.numel():
        _fail()
    expected = int.from_bytes(reader.take(4), "little")
    flat = torch.empty(found.shape, dtype=found.dtype)
    into = torch.split(_elements(flat), PIECE)
    seen = 0
    for one, *others in zip(into, _pieces(found), _pieces(merged), strict=True):
        one.copy_(_unpacked_piece(reader, others[0], others[1]))
        seen = zlib.crc32(bytes_of(one), seen)
    if seen != expected or not reader.ended:
        _fail()
    return flat.to(found.device)


def _fail() -> NoReturn:
    raise ValueError("the kept difference from the base is damaged, or the weights have changed")


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


def _exponents(piece: Tensor) -> Tensor:
    """The exponents as they are stored, in 16 bits; subnormal numbers have the smallest but one."""
    form, bits = _format(piece.dtype), _bits(piece)
    if not form.floating:
        return torch.zeros(bits.shape, dtype=torch.int16)
    mask = torch.iinfo(bits.dtype).max >> form.mantissa
    return ((bits >> form.mantissa) & mask).to(torch.int16).clamp_(min=1)


# ---------------------------------------------------------------------------------- the pieces


def _packed_piece(base: Tensor, found: Tensor, merged: Tensor) -> bytes:
    difference = _counted(base) - _counted(found)
    way, floor = _way(difference, found, merged)
    data = bytes([way]) + _varint(floor)
    classes = _classes(way, floor, found, merged)
    data += b"".join(_parted(difference, classes))
    if 2 * len(data) > base.numel() * base.element_size():
        return min(data, bytes([_VERBATIM]) + _stream(_counted(base)), key=len)
    return data


def _unpacked_piece(reader: _Reader, found: Tensor, merged: Tensor) -> Tensor:
    way = reader.byte()
    if way == _VERBATIM:
        counted = _read(reader, found.numel(), _bits(found).dtype)
    else:
        floor = reader.varint()
        if way not in (_BESIDE, _ALONE) or floor >= 2**15:
            _fail()
        classes = _classes(way, floor, found, merged)
        counted = _joined(reader, classes, _bits(found).dtype).add_(_counted(found))
    bits = _mirrored(counted) if _format(found.dtype).floating else counted
    return bits.view(found.dtype)


def _classes(way: int, floor: int, found: Tensor, merged: Tensor) -> Tensor:
    """The class of each element, about the bits that rounding has lost."""
    own = _exponents(found)
    lost = floor - own if way == _ALONE else _exponents(merged).sub_(own)
    return lost.clamp_(0, CLASSES - 1).to(torch.int8)


def _way(difference: Tensor, found: Tensor, merged: Tensor) -> tuple[int, int]:
    """The way that codes an even sample in fewer bits, and its exponent."""
    one, own, other = (_sample(t).contiguous() for t in (difference, found, merged))
    if not one.numel():
        return _BESIDE, 0
    top = int(_exponents(own).max())
    beside = _cost(one, _classes(_BESIDE, 0, own, other))
    alone = _cost(one, _classes(_ALONE, top, own, other))
    return (_ALONE, top) if alone < 0.98 * beside - _CHANCE else (_BESIDE, 0)


def _cost(difference: Tensor, classes: Tensor) -> float:
    """The bits of an ideal code that knows the classes."""
    cells = classes.long() * 256 + difference.clamp(-127, 127).long() + 127
    cells = cells.bincount(minlength=CLASSES * 256).view(CLASSES, 256).double()
    return float(torch.xlogy(cells.sum(1), cells.sum(1)).sum() - torch.xlogy(cells, cells).sum())


def _parts(classes: Tensor) -> Iterator[Tensor | None]:
    """The places of each class that has elements, in order; None for all places.

    Where nearly all are of class 0, its stream runs over all places: the others, which come later,
    are zeros in it. That is fewer bits than it takes time to leave them out.
    """
    rest = classes.nonzero().view(-1)
    if 8 * rest.numel() < classes.numel():
        yield None
    elif rest.numel() < classes.numel():
        yield (classes == 0).nonzero().view(-1)
    own, order = classes.index_select(0, rest).sort(stable=True)
    counts = [int(count) for count in own.long().bincount()]
    parts = torch.split(rest.index_select(0, order), counts)
    yield from (places for places in parts if places.numel())


def _parted(difference: Tensor, classes: Tensor) -> Iterator[bytes]:
    """The stream of each class that has elements."""
    for places in _parts(classes):
        if places is None:
            yield _stream(difference.masked_fill(classes != 0, 0))
        else:
            yield _stream(difference.index_select(0, places))


def _joined(reader: _Reader, classes: Tensor, dtype: torch.dtype) -> Tensor:
    """The differences of all elements, from the streams of the classes."""
    found = torch.zeros(classes.shape, dtype=dtype)
    for places in _parts(classes):
        if places is None:
            found = _read(reader, classes.numel(), dtype)
        else:
            found.index_copy_(0, places, _read(reader, places.numel(), dtype))
    return found


# --------------------------------------------------------------------------------- the streams


def _stream(values: Tensor, depth: int = 0) -> bytes:
    """Integers [n] as bytes, by what they are: all zero, zero but for a few, or digits.

    depth: the streams that this one is in.
    """
    some = _sample(values)
    if int(some.count_nonzero()) > SPARSE * some.numel():
        return _dense(values, depth)
    places = values.nonzero().view(-1)
    if not places.numel():
        return bytes([_NOTHING])
    head = _sparse(places, values.numel())
    return head + _stream(values.index_select(0, places), depth + 1)


def _read(reader: _Reader, size: int, dtype: torch.dtype, depth: int = 0) -> Tensor:
    """The integers [size] that `_stream` was given; depth: the streams that this one is in."""
    kind = reader.byte()
    if kind == _NOTHING:
        return torch.zeros(size, dtype=dtype)
    if depth > _DEEPEST:
        _fail()
    if kind in _DIGITS:
        return _read_dense(reader, kind, size, dtype, depth)
    if kind not in (_NEAR, _FAR):
        _fail()
    places = _read_places(reader, kind, size)
    values = _read(reader, places.numel(), dtype, depth + 1)
    return torch.zeros(size, dtype=dtype).index_copy_(0, places, values)


def _sample(values: Tensor) -> Tensor:
    """Enough of them, evenly, to tell what they are like."""
    return values[:: max(1, values.numel() // SAMPLE)]


def _sparse(places: Tensor, size: int) -> bytes:
    """Places as the distances between them; those beyond a byte go on in the next.

    Distances are as good as memoryless, so that a byte 255 that stands for `not yet` costs no
    more than it must; but where nearly all are of this kind, they are integers of more bytes.
    """
    count = places.numel()
    gaps = torch.diff(places, prepend=places.new_tensor([-1])) - 1
    head = _varint(count)
    if size > 255 * count:
        return bytes([_FAR]) + head + _dense(gaps.to(torch.int32), 0)
    skipped = gaps // 255
    ends = (skipped + 1).cumsum(0) - 1
    coded = torch.full((int(ends[-1]) + 1,), 255, dtype=torch.uint8)
    coded[ends] = (gaps - 255 * skipped).to(torch.uint8)
    head += _varint(coded.numel())
    return bytes([_NEAR]) + head + _deflated(coded)


def _read_places(reader: _Reader, kind: int, size: int) -> Tensor:
    count = reader.varint()
    if not 0 < count <= size:
        _fail()
    if kind == _FAR:
        steps = _read(reader, count, torch.int32).long() + 1
        places = steps.cumsum(0) - 1
    else:
        length = reader.varint()
        if length > size:
            _fail()
        coded = reader.inflated(length)
        ended = coded != 255
        places = (coded.long() + ended).cumsum(0)[ended] - 1
    if places.numel() != count or int(places.min()) < 0 or int(places.max()) >= size:
        _fail()
    return places


def _dense(values: Tensor, depth: int) -> bytes:
    """A digit for each value, and the stream of what is left of those that are larger than it.

    Samples that deceive, again and again, must not lead deeper than is read.
    """
    kind = _digit_kind(values) if depth < _DEEPEST // 4 else _BYTES
    most, per = _DIGITS[kind]
    if per > 1:
        digits = values.clamp(-most, most)
        rest = values - digits
    else:  # the last byte, and then those before it
        digits = values.to(torch.int8)
        rest = values - digits
        rest = rest >> 8 if rest.element_size() > 1 else rest
    coded = _several(digits.to(torch.int8), most, per)
    return bytes([kind]) + _deflated(coded) + _stream(rest, depth + 1)


def _read_dense(reader: _Reader, kind: int, size: int, dtype: torch.dtype, depth: int) -> Tensor:
    most, per = _DIGITS[kind]
    coded = reader.inflated(-(-size // per))
    if per == 1:
        rest = _read(reader, size, dtype, depth + 1)
        return (rest << 8 if rest.element_size() > 1 else rest).add_(coded.view(torch.int8))
    base, parts = 2 * most + 1, list[Tensor]()
    for _ in range(per):
        parts.append((coded % base).to(torch.int8) - most)
        coded = coded // base
    digits = torch.cat(parts)[:size].to(dtype)
    return digits.add_(_read(reader, size, dtype, depth + 1))


def _digit_kind(values: Tensor) -> int:
    """The least digits that all but a few of the values are, by a sample."""
    some = _sample(values)
    beyond = ((some > _MOST) | (some < -_MOST)).sum(1)
    few = (kind for kind, n in zip(_DIGITS, beyond, strict=True) if 25 * int(n) < some.numel())
    return next(few, _BYTES)


def _several(digits: Tensor, most: int, per: int) -> Tensor:
    """Digits [n] → bytes [n / per], each of digits that are far from each other."""
    if per == 1:
        return digits.view(torch.uint8)
    length = -(-digits.numel() // per)
    padded = torch.zeros(length * per, dtype=torch.int8)
    padded[: digits.numel()] = digits
    parts = (padded + most).view(torch.uint8).view(per, length)
    found = parts[-1].clone()
    for part in reversed(parts[:-1]):
        found.mul_(2 * most + 1).add_(part)
    return found


# ------------------------------------------------------------------------------------- the bytes


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def _deflated(coded: Tensor) -> bytes:
    """The length of the coded bytes, and these."""
    made = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    data = made.compress(bytes_of(coded)) + made.flush()
    return _varint(len(data)) + data


class _Reader:
    """What was written, in order. Every method raises ValueError where it is not there."""

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)
        self.at = 0

    @property
    def ended(self) -> bool:
        return self.at == len(self.data)

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            _fail()
        self.at += count
        return self.data[self.at - count : self.at]

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        found = 0
        for shift in range(0, 63, 7):
            byte = self.byte()
            found |= (byte & 127) << shift
            if byte < 128:
                return found
        _fail()

    def inflated(self, count: int) -> Tensor:
        """So many bytes [count]; more are not made of whatever it is."""
        made = zlib.decompressobj(-15)
        try:
            found = made.decompress(self.take(self.varint()), count + 1)
        except zlib.error:
            _fail()
        if len(found) != count or not made.eof or made.unused_data:
            _fail()
        return torch.frombuffer(bytearray(found), dtype=torch.uint8) if count else _NO_BYTES


_NO_BYTES = torch.empty(0, dtype=torch.uint8)
