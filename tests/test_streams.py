"""Integers as bytes: all come back, and what is damaged is refused and ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.streams import Reader, nonzero_places, read, sparse, stream, varint

DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)


def back(data: bytes, size: int, dtype: torch.dtype) -> Tensor:
    reader = Reader(data)
    found = read(reader, size, dtype)
    assert reader.ended
    return found


def integers(seed: int, size: int, share: float, bits: float, dtype: torch.dtype) -> Tensor:
    """Some of any size up to so many bits, and the others zero."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(size, generator=generator, dtype=torch.float64) * 2**bits
    found *= torch.rand(size, generator=generator) < share
    info = torch.iinfo(dtype)
    return found.clamp(info.min, info.max / 2).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=20)
@given(
    st.integers(0, 2**32),
    st.sampled_from([1, 7, 256, 257, 1021]),
    st.sampled_from([0.0, 0.002, 0.02, 0.5, 1.0]),
    st.floats(0, 60),
)
def test_all_integers_come_back(
    dtype: torch.dtype, seed: int, size: int, share: float, bits: float
) -> None:
    values = integers(seed, size, share, bits, dtype)
    assert torch.equal(back(stream(values), size, dtype), values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_least_and_the_largest_come_back(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    for count in (1, 100):
        values = torch.tensor([info.min, info.max, -1, 1, 0] * count, dtype=dtype)
        assert torch.equal(back(stream(values), 5 * count, dtype), values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(st.integers(0, 2**32), st.integers(0, 99), st.sampled_from([0.0, 0.01, 0.1, 0.9]))
def test_places_are_those_of_what_is_not_zero(
    dtype: torch.dtype, seed: int, size: int, share: float
) -> None:
    """Also of a part of a tensor, wherever it begins."""
    values = integers(seed, size, share, 5, dtype)
    for part in (values, values[1:], values[8:], values[:88]):
        assert torch.equal(nonzero_places(part), part.nonzero().view(-1))


def test_few_places_of_many_take_few_bytes() -> None:
    places = torch.arange(1, 300) * 1009
    data = sparse(places, torch.ones(299, dtype=torch.int16), 2**20)
    values = torch.zeros(2**20, dtype=torch.int16).index_fill_(0, places, 1)
    assert torch.equal(back(data, 2**20, torch.int16), values)
    assert data == stream(values)
    assert len(data) < 299 * 1.5


def test_numbers_too_large_for_their_dtype_are_refused() -> None:
    data = stream(torch.full((5,), 300, dtype=torch.int32))
    with pytest.raises(ValueError, match="damaged"):
        back(data, 5, torch.int8)


def test_places_in_places_end() -> None:
    """Nothing is as deep as that, and data is not read until the stack is full."""
    deep = bytes([2]) + varint(1) + bytes([0])
    with pytest.raises(ValueError, match="damaged"):
        read(Reader(5000 * deep), 5, torch.int16)
