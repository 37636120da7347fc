"""The rows of the table of fused layers, against the classes that they are read off."""

from __future__ import annotations

import inspect
import re
from importlib import import_module

import pytest

from surgery.model.fused import FUSED, Fused

ROWS = [(row, owner) for row in FUSED for owner in row.owners]
ids = [f"{owner.rpartition('.')[2]}.{row.child}" for row, owner in ROWS]

SPLIT = re.compile(
    r"\.split\(|\.chunk\([23]|_split_heads|_reshape\(|, 3, |query_pos|3 \* self\.head_size|, 3,$",
    re.MULTILINE,
)
"""How an owner takes its parts apart."""


@pytest.mark.parametrize(("row", "owner"), ROWS, ids=ids)
def test_an_owner_calls_the_layer_and_takes_its_output_apart(row: Fused, owner: str) -> None:
    module, _, name = owner.rpartition(".")
    source = inspect.getsource(getattr(import_module(module), name))
    child = re.search(rf"self\.{row.child}\(", source)
    assert child is not None
    assert SPLIT.search(source, child.start()) is not None
