"""Checksums depend on the bytes alone."""

from __future__ import annotations

import hashlib
import weakref

import pytest
import torch

import surgery.checksums as checksums
from surgery.checksums import Checksum, bytes_of, checksum, machine
from surgery.digests import digest

WHOLE = torch.arange(77, dtype=torch.int32).view(7, 11)


def test_blocks_give_what_the_whole_gives() -> None:
    expected = Checksum().add(WHOLE).hexdigest()
    assert Checksum().add(WHOLE[:3]).add(WHOLE[3:]).hexdigest() == expected
    rest = Checksum()
    for row in WHOLE:
        rest.add(row)
    assert rest.hexdigest() == rest.hexdigest() == expected
    data = b"".join(n.to_bytes(4, "little") for n in range(77))
    assert expected == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("most", [1, 12, 30, 2**24])
def test_how_a_tensor_lies_makes_no_difference(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "_PIECE", most)
    apart = WHOLE.mT.contiguous().mT
    assert Checksum().add(apart).hexdigest() == Checksum().add(WHOLE).hexdigest()
    for shape in ((), (0,), (0, 5), (5, 0)):
        tensor = torch.zeros(shape).requires_grad_()
        assert Checksum().add(tensor).hexdigest() == hashlib.sha256(bytes_of(tensor)).hexdigest()
    empty = torch.zeros(5, 0, 3).transpose(0, 2)
    assert Checksum().add(empty).hexdigest() == Checksum().hexdigest()


def test_the_bytes_of_a_tensor_keep_it() -> None:
    found = bytes_of(torch.full((2**20,), 7, dtype=torch.uint8))
    others = [torch.zeros(2**20, dtype=torch.uint8) for _ in range(3)]
    assert found[:3] == found[-3:] == b"\7\7\7"
    del others
    gone = torch.ones(5)
    left = weakref.ref(gone)
    view = bytes_of(gone)
    del gone, view
    assert left() is None


def test_any_bit_any_dtype_and_any_shape_make_another() -> None:
    other = WHOLE.clone()
    other[6, 10] ^= 1
    made = {checksum(t) for t in (WHOLE, other, WHOLE.view(11, 7), WHOLE.view(torch.float32))}
    assert len(made) == 4
    zeros = torch.zeros(3)
    assert checksum(zeros) != checksum(-zeros)


def test_a_small_weight_s_digest_is_its_checksum() -> None:
    assert digest(WHOLE.float()).sha256 == checksum(WHOLE.float())


def test_a_machine_says_what_it_is() -> None:
    found = machine()
    assert found["torch"] == torch.__version__
    assert all(found.values())
    assert {*map(type, found.values())} == {str}
