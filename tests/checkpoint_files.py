"""Small checkpoints in files, in shards, and what lies in them bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from surgery.checkpoint import INDEX
from surgery.errors import SurgeryError
from surgery.headers import DTYPES

# A library whose types are not complete.
files: Any = safetensors.torch


def every_dtype() -> dict[str, Tensor]:
    """A tensor of each dtype that torch and the format have, and some of strange shapes."""
    raw = torch.arange(3 * 5 * 8, dtype=torch.uint8)
    made = {name: raw.view(dtype).view(3, -1).clone() for name, dtype in DTYPES.items()}
    made["BOOL"] = torch.tensor([[True, False], [False, True], [True, True]])
    return {**made, "none": torch.empty(0, 7), "one": torch.tensor(3.5), "vector": torch.ones(11)}


def sharded(folder: Path, shards: int) -> dict[str, Tensor]:
    """Write a checkpoint of so many shards with an index; gives its tensors."""
    generator = torch.Generator().manual_seed(shards)
    tensors: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    for at in range(shards):
        name = f"model-{at + 1:05}-of-{shards:05}.safetensors"
        own = {
            f"layers.{at}.weight": torch.randn(13, 7, generator=generator).bfloat16(),
            f"layers.{at}.bias": torch.randn(13, generator=generator),
        }
        files.save_file(own, folder / name, {"format": "pt"})
        tensors |= own
        places |= dict.fromkeys(own, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tensors


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the files in a folder."""
    every = (files.load_file(path) for path in sorted(folder.glob("*.safetensors")))
    return {name: tensor for one in every for name, tensor in one.items()}


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are of one dtype, shape and bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = (t.contiguous().flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(x, y)


def contents(folder: Path) -> Mapping[str, bytes]:
    """All files below a folder, by their paths from it."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def refused(tmp_path: Path, code: str, call: Callable[[], object]) -> str:
    """What is said of what is refused, after which nothing is there."""
    before = contents(tmp_path)
    with pytest.raises(SurgeryError) as caught:
        call()
    assert {d.code for d in caught.value.diagnostics} == {code}
    assert all(d.hint for d in caught.value.diagnostics)
    assert contents(tmp_path) == before
    return str(caught.value)
