"""What is kept of a base beside its inverse: every bit comes back, few bytes are kept."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import surgery.corrections as corrections
import surgery.streams as streams
from surgery.checksums import bytes_of
from surgery.corrections import packed, unpacked

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
EIGHT = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
OTHERS = (torch.complex64, torch.int8, torch.uint8, torch.int16, torch.int64, torch.bool)
DTYPES = FLOATS + EIGHT + OTHERS


def drawn(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Every bit by chance."""
    if dtype is torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    size = (*shape, dtype.itemsize)
    data = torch.randint(256, size, generator=generator, dtype=torch.uint8)
    return data.view(dtype).view(shape)


def raw(tensor: Tensor) -> bytes:
    return bytes(bytes_of(tensor.resolve_conj().contiguous()))


def agrees(base: Tensor, found: Tensor, merged: Tensor) -> bytes:
    """Pack and unpack, to the bit; what was packed."""
    data = packed(base, found, merged)
    back = unpacked(data, found, merged)
    assert (back.dtype, back.shape) == (base.dtype, base.shape)
    assert raw(back) == raw(base)
    return data


def refused(data: bytes, found: Tensor, merged: Tensor) -> None:
    with pytest.raises(ValueError, match="is damaged, or the weights have changed"):
        unpacked(data, found, merged)


# ----------------------------------------------------------------------------------- every bit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=10)
@given(st.integers(0, 2**32), st.integers(0, 97), st.sampled_from([0.0, 0.02, 0.3, 1.0]))
def test_every_bit_pattern_comes_back(
    dtype: torch.dtype, seed: int, size: int, share: float
) -> None:
    """Whatever three tensors hold, and of how many of them the base and What differ."""
    generator = torch.Generator().manual_seed(seed)
    base, found, merged = (drawn(generator, dtype, size) for _ in range(3))
    differ = torch.rand(size, generator=generator) < share
    agrees(base, torch.where(differ, found, base), merged)


@pytest.mark.parametrize("dtype", FLOATS + EIGHT, ids=str)
@settings(max_examples=10)
@given(st.integers(0, 2**32), st.floats(0, 9), st.booleans())
def test_differences_of_every_size_come_back(
    dtype: torch.dtype, seed: int, most: float, one: bool
) -> None:
    """What is `most` doublings of a unit away, or by one element in some further."""
    generator = torch.Generator().manual_seed(seed)
    found, merged = (drawn(generator, dtype, 499) for _ in range(2))
    bits = found.view(INTEGERS[dtype.itemsize])
    away = (torch.randn(499, generator=generator) * (2**most - 1)).round()
    if one:
        away[torch.rand(499, generator=generator) < 0.03] = 3e4
    agrees((bits + away.to(bits.dtype)).view(dtype), found, merged)


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_numbers_of_sixteen_bits_come_back(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    base = every.view(dtype)
    agrees(base, base, base.flip(0))
    agrees(base, every.roll(1).view(dtype), base.flip(0))
    agrees(base, torch.zeros_like(base), base)


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0), (1,), (1, 1, 1), (2, 3, 5)])
def test_shapes_of_all_kinds(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    base, found, merged = (drawn(generator, torch.float16, *shape) for _ in range(3))
    agrees(base, found, merged)


def test_how_a_tensor_lies_makes_no_difference() -> None:
    generator = torch.Generator().manual_seed(5)
    base, found, merged = (drawn(generator, torch.float16, 13, 11) for _ in range(3))
    data = packed(base, found, merged)
    others = [t.mT.contiguous().mT for t in (base, found, merged)]
    assert not others[0].is_contiguous()
    assert packed(*others) == data
    assert raw(unpacked(data, *others[1:])) == raw(base)
    wide = torch.complex(torch.randn(7), torch.randn(7))
    agrees(wide.conj(), wide, wide.conj())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_samples_that_deceive(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the elements that are looked at are alike, and others are of every size."""
    monkeypatch.setattr(streams, "SAMPLE", 7)
    generator = torch.Generator().manual_seed(13)
    found = torch.zeros(7 * 60, dtype=dtype)
    bases = [drawn(generator, dtype, 7 * 60) for _ in range(4)]
    for base, small in zip(bases, (1, 2, 7, 127), strict=True):
        base.view(INTEGERS[dtype.itemsize])[::60] = small
        agrees(base, found, found)

    def smallest(_: Tensor) -> int:
        return 3

    monkeypatch.setattr(streams, "_digit_kind", smallest)
    for base in bases:
        agrees(base, found, found)


def test_what_overflowed_comes_back() -> None:
    base = torch.tensor([60000.0, -60000.0, 1.0, 6e-8, -0.0, 0.0, torch.nan], dtype=torch.float16)
    merged = torch.tensor([torch.inf, -torch.inf, 1.0, 2.0, 3.0, -3.0, torch.nan]).half()
    agrees(base, merged - 1, merged)


def test_a_large_tensor_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(7)
    base, found, merged = (drawn(generator, torch.bfloat16, 37, 7) for _ in range(3))
    monkeypatch.setattr(corrections, "PIECE", 61)
    data = agrees(base, found, merged)
    assert len(data) < 1.2 * 2 * base.numel() + 5 * 64


def test_tensors_that_differ_in_shape_or_dtype_are_refused() -> None:
    one = torch.zeros(3)
    with pytest.raises(ValueError, match=r"float32 \[5\] beside torch.float32 \[3\]"):
        packed(one, torch.zeros(5), one)
    with pytest.raises(ValueError, match="float64"):
        unpacked(b"", one, one.double())


# ------------------------------------------------------------------------------- damaged data


def example(size: int = 2003) -> tuple[bytes, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    base = (torch.randn(size, generator=generator) * 0.02).bfloat16()
    change = torch.randn(size, generator=generator, dtype=torch.float64) * 0.01
    merged = (base + change).bfloat16()
    found = (merged - change).bfloat16()
    return packed(base, found, merged), base, found, merged


def test_data_that_is_cut_or_goes_on_is_refused() -> None:
    data, _, found, merged = example()
    for stop in range(0, len(data), 3):
        refused(data[:stop], found, merged)
    refused(data + b"\0", found, merged)


def test_damage_is_seen() -> None:
    """Any byte, to any other: refused, or it makes no difference."""
    data, base, found, merged = example(211)
    for place in range(len(data)):
        for flipped in (1, 2, 64, 128, 255):
            changed = bytearray(data)
            changed[place] ^= flipped
            try:
                back = unpacked(bytes(changed), found, merged)
            except ValueError:
                continue
            assert raw(back) == raw(base)


def test_other_weights_are_seen() -> None:
    data, _, found, merged = example()
    for place in (0, 1000, 2002):
        other = found.clone()
        other[place] += 1
        refused(data, other, merged)
    refused(data, found[:-1], merged[:-1])
    refused(data, found.half(), merged.half())


def test_streams_in_one_another_end() -> None:
    """Nothing is as deep as that, and data is not read until the stack is full."""
    found = torch.zeros(5)
    made = zlib.compressobj(wbits=-15)
    zeros = made.compress(bytes(5)) + made.flush()
    deep = bytes([6, len(zeros)]) + zeros
    refused(b"\1\5\0\0\0\0\0" + 5000 * deep, found, found)
    shallow = b"\1\5" + zlib.crc32(bytes(20)).to_bytes(4, "little") + b"\0" + 7 * deep + b"\0"
    assert raw(unpacked(shallow, found, found)) == bytes(20)


# ------------------------------------------------------------------------------------- sizes

_linalg: Any = torch.linalg  # its functions carry no types
Change = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
SIZE = 1024


def normal(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def added(share: float) -> Change:
    """A product of rank 16, with a standard deviation that is a share of the weights'."""
    product = normal(SIZE, 16, seed=2) @ normal(16, SIZE, seed=3) / 4 * 0.02 * share
    return lambda w: w + product, lambda w: w - product


def scaled(spread: float) -> Change:
    factors = 1 + spread * normal(SIZE, 1, seed=4)
    return lambda w: w * factors, lambda w: w / factors


def turned(angle: float, block: int = 32) -> Change:
    """Orthogonal blocks, whose largest angle is given in radians."""
    halves = normal(SIZE // block, block, block, seed=5)
    skew = halves - halves.mT
    largest: Tensor = _linalg.matrix_norm(skew, 2, keepdim=True)
    blocks = torch.matrix_exp(skew / largest * angle)

    def by(turns: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda w: (turns @ w.view(-1, block, SIZE)).view(SIZE, SIZE)

    return by(blocks), by(blocks.mT)


def mirrored(count: int = 8) -> Change:
    """Reflections at as many hyperplanes."""
    across = torch.nn.functional.normalize(normal(SIZE, count, seed=6), dim=0)

    def at(order: range) -> Callable[[Tensor], Tensor]:
        def apply(weight: Tensor) -> Tensor:
            for index in order:
                vector = across[:, index : index + 1]
                weight = weight - 2 * (weight @ vector) @ vector.mT
            return weight

        return apply

    return at(range(count)), at(range(count - 1, -1, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("change", "percent"),
    [
        (added(1e-2), 0.4),
        (added(1e-1), 2),
        (added(1), 8),
        (scaled(0.1), 2.2),
        (turned(0.1), 3),
        (turned(1), 9),
        (mirrored(), 6),
    ],
    ids=["added 1e-2", "added 1e-1", "added 1", "scaled", "turned 0.1", "turned 1", "mirrored"],
)
def test_few_bytes_are_kept(dtype: torch.dtype, change: Change, percent: float) -> None:
    there, back = change
    base = (0.02 * normal(SIZE, SIZE)).to(dtype)
    merged = there(base.double()).to(dtype)
    found = back(merged.double()).to(dtype)
    data = packed(base, found, merged)
    assert torch.equal(unpacked(data, found, merged), base)
    assert 100 * len(data) < percent * base.numel() * base.element_size()


def test_equal_tensors_take_a_few_bytes() -> None:
    base = normal(101, 103).bfloat16()
    assert len(packed(base, base, base)) < 24


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_inverse_costs_little_more_than_the_base(dtype: torch.dtype) -> None:
    """Where What has nothing to do with W, the base itself is packed."""
    base, found = (0.02 * normal(211, 223, seed=s).to(dtype) for s in (7, 8))
    assert len(agrees(base, found, found)) < base.numel() * base.element_size()
    generator = torch.Generator().manual_seed(9)
    base, found = (drawn(generator, dtype, 211, 223) for _ in range(2))
    assert len(agrees(base, found, found)) < 1.01 * base.numel() * base.element_size() + 64
