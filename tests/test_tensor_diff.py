"""Two checkpoints are told apart by every bit, and their distance is that of their numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoint_files import contents, every_dtype, sharded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery import tensor_diff
from surgery.checkpoint import Checkpoint
from surgery.errors import ArtifactError
from surgery.headers import DTYPES
from surgery.tensor_diff import TensorDiff, diff

# A library whose types are not complete.
files: Any = safetensors.torch


def compared(folder: Path, a: Tensor, b: Tensor, tolerance: float | None = None) -> TensorDiff:
    for name, tensor in (("a", a), ("b", b)):
        files.save_file({"w": tensor}, folder / name)
    found = diff(folder / "a", folder / "b", tolerance)
    (one,) = found.tensors
    assert found.equal == (one.verdict in ("equal", "close"))
    json.dumps(found.as_json(), allow_nan=False)
    return one


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.mark.parametrize("name", DTYPES)
def test_one_bit_is_enough_in_every_dtype(name: str, place: Path) -> None:
    tensor = every_dtype()[name]
    assert compared(place, tensor, tensor).verdict == "equal"
    other = tensor.clone()
    other.view(torch.uint8).view(-1)[2 if name == "BOOL" else 8] ^= 1
    one = compared(place, tensor, other)
    assert one.verdict == "different"
    assert one.absolute is not None
    assert one.described == (f"{name} {list(tensor.shape)}",) * 2


@given(st.integers(0, 12), st.integers(0, 6), st.floats(-4, 4), st.sampled_from([64, 88, 4096]))
@settings(max_examples=20)
def test_the_distance_is_that_of_the_elements(
    place: Path, row: int, column: int, other: float, block: int
) -> None:
    a = torch.randn(13, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    b = a.clone()
    b[row, column] = other
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_diff, "BLOCK", block)
        one = compared(place, a, b)
    assert one.absolute == (a - b).abs().max()
    assert one.relative == (a - b).abs().max() / a.abs().max()


@pytest.mark.parametrize(
    ("x", "y", "absolute", "relative"),
    [
        (0.0, -0.0, 0.0, 0.0),
        (float("nan"), 1.0, "inf", "inf"),
        (float("inf"), float("-inf"), "inf", "inf"),
        (float("inf"), 1.0, "inf", "inf"),
        (0.0, 1.0, 1.0, "inf"),
    ],
)
def test_what_is_not_finite_has_a_distance(
    x: float, y: float, absolute: object, relative: object, tmp_path: Path
) -> None:
    same = [float("nan"), float("inf"), 0.0]
    one = compared(tmp_path, torch.tensor([*same, x]), torch.tensor([*same, y]))
    found = one.as_json()
    assert (found["absolute"], found["relative"]) == (absolute, relative)
    assert one.verdict == "different"


def test_a_tolerance_is_for_numbers_whatever_their_dtype(place: Path) -> None:
    a = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    assert compared(place, a, a.bfloat16()).verdict == "of other dtype"
    assert compared(place, a, a.bfloat16(), 1e-2).verdict == "close"
    assert compared(place, a, a.bfloat16(), 1e-5).verdict == "of other dtype"
    assert compared(place, a.half(), a.half().double(), 0.0).verdict == "close"
    assert compared(place, a, a + 1, 1e-2).verdict == "different"
    assert compared(place, a, a.T.contiguous(), 1e9).verdict == "of other shape"
    assert compared(place, a[:0], a[:0].half(), 0.0).verdict == "close"


def test_no_more_than_a_block_is_read_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, sizes = Checkpoint.read_bytes, list[int]()

    def counted(
        self: Checkpoint, name: str, start: int, stop: int, into: Tensor | None = None
    ) -> Tensor:
        sizes.append(stop - start)
        return read(self, name, start, stop, into)

    monkeypatch.setattr(Checkpoint, "read_bytes", counted)
    monkeypatch.setattr(tensor_diff, "BLOCK", 64)
    a = torch.ones(3, 101)
    assert compared(place, a, a + torch.eye(3, 101)).absolute == 1
    assert max(sizes) <= 64


def test_shards_do_not_matter_and_missing_tensors_do(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    tensors = sharded(one, 3)
    files.save_file(tensors, other / "model.safetensors")
    names: list[str] = []
    assert diff(one, other, progress=names.append).equal
    assert sorted(names) == sorted(tensors)
    files.save_file(
        {**dict([*tensors.items()][1:]), "new": torch.ones(2)}, other / "model.safetensors"
    )
    found = diff(one, other)
    assert not found.equal
    assert [t.verdict for t in found.tensors if t.verdict != "equal"] == ["only in A", "only in B"]
    assert str(found).endswith("\n\n5 equal, 1 only in A, 1 only in B")
    before = contents(tmp_path)
    diff(one, other)
    assert contents(tmp_path) == before
    with pytest.raises(ArtifactError, match="E530"):
        diff(one, tmp_path / "no")


def test_what_says_what_tensors_mean_counts_and_the_rest_is_said(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        files.save_file({"w": torch.ones(3)}, tmp_path / name / "adapter_model.safetensors")
        text = json.dumps({"r": 4, "lora_alpha": 8, "peft_version": name})
        (tmp_path / name / "adapter_config.json").write_text(text)
        (tmp_path / name / "README.md").write_text(name)
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found.equal
    assert found.files == ("README.md: differs",)
    (tmp_path / "a" / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 16}')
    (tmp_path / "b" / "README.md").unlink()
    found = diff(tmp_path / "a", tmp_path / "b")
    assert not found.equal
    assert found.files == (
        "README.md: only in A",
        "adapter_config.json: differs in lora_alpha",
    )
    file = "adapter_model.safetensors"
    assert diff(tmp_path / "a" / file, tmp_path / "b" / file).files == ()
