"""Integers as bytes, where many are zero or small.

    stream = nothing | numbers | places values | digits rest

Numbers are varints, least bits first; bytes are entropy coded by zlib (Huffman codes alone). What
is read may be damaged: it ends, and raises ValueError wherever that is seen.
"""

from __future__ import annotations

import zlib
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from surgery.checksums import bytes_of

SAMPLE = 2**12
"""Elements by which it is chosen how to code all of them."""

SPARSE = 0.2
"""Where fewer elements than this differ, their places are kept and not a code for each."""

NOTHING, NEAR, FAR = 0, 1, 2
_BYTES = 6
_DIGITS = {3: (1, 5), 4: (2, 3), 5: (7, 2), _BYTES: (127, 1)}
"""How a dense stream is coded: the largest magnitude of a digit, and how many are one byte.

Huffman codes take whole bits, so digits that are rarely not zero are coded five at once.
"""

_LISTED = 7
"""A stream of few numbers: a varint for each, of 2 n or, where it is negative, -2 n - 1."""

_LITTLE = 256
"""Up to so many numbers they are quicker told one by one."""

_MOST = torch.tensor([[most] for most, _ in _DIGITS.values()], dtype=torch.int8)
_DEEPEST = 32
"""Streams in one another: two for each byte of a number, and as many before those as are small."""


def damaged() -> NoReturn:
    """Refuse what cannot be read, or is not what it is for."""
    raise ValueError("the kept difference from the base is damaged, or the weights have changed")


# --------------------------------------------------------------------------------- the streams


def stream(values: Tensor, depth: int = 0) -> bytes:
    """Integers [n] as bytes, by what they are: few, all zero, zero but for some, or digits.

    depth: the streams that this one is in.
    """
    count = int(values.count_nonzero())
    if not count:
        return bytes([NOTHING])
    if values.numel() <= _LITTLE:
        return _listed(values)
    if count > SPARSE * values.numel():
        return _dense(values, depth)
    places = nonzero_places(values)
    return sparse(places, values.index_select(0, places), values.numel(), depth)


def read(reader: Reader, size: int, dtype: torch.dtype, depth: int = 0) -> Tensor:
    """The integers [size] that `stream` was given; depth: the streams that this one is in."""
    kind = reader.byte()
    if kind == NOTHING:
        return torch.zeros(size, dtype=dtype)
    if kind == _LISTED:
        return _read_listed(reader, size, dtype)
    if depth > _DEEPEST:
        damaged()
    if kind in _DIGITS:
        return _read_dense(reader, kind, size, dtype, depth)
    if kind not in (NEAR, FAR):
        damaged()
    places, values = read_sparse(reader, kind, size, dtype, depth)
    return torch.zeros(size, dtype=dtype).index_copy_(0, places, values)


def _listed(values: Tensor) -> bytes:
    numbers = [2 * n if n >= 0 else -2 * n - 1 for n in _list(values)]
    coded = bytes(numbers) if max(numbers) < 128 else b"".join(map(varint, numbers))
    return bytes([_LISTED]) + _deflated(coded)


def _list(values: Tensor) -> list[int]:
    found = cast("Any", values).tolist()  # torch does not say of what
    return cast("list[int]", found)


def _read_listed(reader: Reader, size: int, dtype: torch.dtype) -> Tensor:
    if not 0 < size <= _LITTLE:
        damaged()
    data = reader.inflated(10 * size, least=size)
    inner, single = Reader(data), len(data) == size
    numbers = list(data) if single else [inner.varint() for _ in range(size)]
    if not (single or inner.ended) or max(numbers) >> torch.iinfo(dtype).bits:
        damaged()
    return torch.tensor([n >> 1 ^ -(n & 1) for n in numbers], dtype=dtype)


def sample(values: Tensor) -> Tensor:
    """Enough of them, evenly, to tell what they are like."""
    return values[:: max(1, values.numel() // SAMPLE)]


def sparse(places: Tensor, values: Tensor, size: int, depth: int = 0) -> bytes:
    """Integers [size] that are zero but at some places, of which there is one at least."""
    return _sparse_places(places, size, depth) + stream(values, depth + 1)


def _sparse_places(places: Tensor, size: int, depth: int) -> bytes:
    """Places as the distances between them; those beyond a byte go on in the next.

    Distances are as good as memoryless, so that a byte 255 that stands for `not yet` costs no
    more than it must; but where nearly all are of this kind, each is a byte as it is and the rest.
    """
    count = places.numel()
    gaps = places.clone()
    gaps[1:].sub_(places[:-1]).sub_(1)
    if size > 255 * count:
        low, high = (gaps & 255).to(torch.uint8), (gaps >> 8).to(torch.int32)
        return bytes([FAR]) + varint(count) + bytes_of(low) + stream(high, depth + 1)
    skipped = gaps // 255
    ends = (skipped + 1).cumsum(0) - 1
    coded = torch.full((int(ends[-1]) + 1,), 255, dtype=torch.uint8)
    coded[ends] = (gaps - 255 * skipped).to(torch.uint8)
    head = bytes([NEAR]) + varint(count) + varint(coded.numel())
    return head + _deflated(bytes_of(coded))


def read_sparse(
    reader: Reader, kind: int, size: int, dtype: torch.dtype, depth: int = 0
) -> tuple[Tensor, Tensor]:
    """The places, and the integers there."""
    places = _read_places(reader, kind, size, depth)
    return places, read(reader, places.numel(), dtype, depth + 1)


def _read_places(reader: Reader, kind: int, size: int, depth: int) -> Tensor:
    count = reader.varint()
    if not 0 < count <= size:
        damaged()
    if kind == FAR:
        low = _tensor(reader.take(count))
        high = read(reader, count, torch.int32, depth + 1).long()
        places = (high.mul_(256).add_(low) + 1).cumsum(0) - 1
    else:
        length = reader.varint()
        if length > size:
            damaged()
        coded = _tensor(reader.inflated(length))
        ended = coded != 255
        places = (coded.long() + ended).cumsum(0)[ended] - 1
    if places.numel() != count or int(places.min()) < 0 or int(places.max()) >= size:
        damaged()
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
    return bytes([kind]) + _deflated(bytes_of(coded)) + stream(rest, depth + 1)


def _read_dense(reader: Reader, kind: int, size: int, dtype: torch.dtype, depth: int) -> Tensor:
    most, per = _DIGITS[kind]
    coded = _tensor(reader.inflated(-(-size // per)))
    if per == 1:
        rest = read(reader, size, dtype, depth + 1)
        return (rest << 8 if rest.element_size() > 1 else rest).add_(coded.view(torch.int8))
    base, parts = 2 * most + 1, list[Tensor]()
    for _ in range(per):
        parts.append((coded % base).to(torch.int8) - most)
        coded = coded // base
    digits = torch.cat(parts)[:size].to(dtype)
    return digits.add_(read(reader, size, dtype, depth + 1))


def _digit_kind(values: Tensor) -> int:
    """The least digits that all but a few of the values are, by a sample."""
    some = sample(values)
    beyond = _list((some.abs() > _MOST).sum(1))
    few = (kind for kind, n in zip(_DIGITS, beyond, strict=True) if 25 * n < some.numel())
    return next(few, _BYTES)


def _several(digits: Tensor, most: int, per: int) -> Tensor:
    """Digits [n] → bytes [n / per], each of digits that are far from each other."""
    if per == 1:
        return digits.view(torch.uint8)
    length, base = -(-digits.numel() // per), 2 * most + 1
    padded = torch.zeros(length * per, dtype=torch.int8)
    padded[: digits.numel()] = digits
    first, *others = reversed(padded.view(per, length).unbind())
    for part in others:
        first = torch.add(part, first, alpha=base)
    return first.view(torch.uint8) + most * sum(base**k for k in range(per))


# ------------------------------------------------------------------------------------- the bytes


def varint(number: int) -> bytes:
    """A number that is not negative, seven bits a byte."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def _deflated(coded: bytes | memoryview) -> bytes:
    """The length of the coded bytes, and these."""
    made = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    data = made.compress(coded) + made.flush()
    return varint(len(data)) + data


def _tensor(data: bytes | memoryview) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else _NO_BYTES


class Reader:
    """What was written, in order. Every method raises ValueError where it is not there."""

    def __init__(self, data: bytes | memoryview) -> None:
        """data: all that there is to read."""
        self.data = memoryview(data)
        self.at = 0

    @property
    def ended(self) -> bool:
        """Whether all was read."""
        return self.at == len(self.data)

    def take(self, count: int) -> memoryview:
        """So many bytes."""
        if count > len(self.data) - self.at:
            damaged()
        self.at += count
        return self.data[self.at - count : self.at]

    def byte(self) -> int:
        """One byte."""
        return self.take(1)[0]

    def varint(self) -> int:
        """A number of up to 70 bits."""
        found = 0
        for shift in range(0, 70, 7):
            byte = self.byte()
            found |= (byte & 127) << shift
            if byte < 128:
                return found
        damaged()

    def inflated(self, most: int, least: int | None = None) -> bytes:
        """So many bytes, or from the least on; more are not made of whatever it is."""
        made = zlib.decompressobj(-15)
        try:
            found = made.decompress(self.take(self.varint()), most + 1)
        except zlib.error:
            damaged()
        few = most if least is None else least
        if not few <= len(found) <= most or not made.eof or made.unused_data:
            damaged()
        return found


_NO_BYTES = torch.empty(0, dtype=torch.uint8)


def nonzero_places(values: Tensor) -> Tensor:
    """The places of integers [n] that are not zero, ascending; quick where these are few."""
    per = 8 // values.element_size()
    if per == 1 or values.numel() % per or values.storage_offset() % per:
        return values.nonzero().view(-1)
    words = values.view(torch.int64)
    some = words.nonzero().view(-1)
    if 3 * some.numel() > words.numel():
        return values.nonzero().view(-1)
    inner = words.index_select(0, some).view(values.dtype).nonzero().view(-1)
    shift = per.bit_length() - 1
    return some.index_select(0, inner >> shift).mul_(per).add_(inner.bitwise_and_(per - 1))
