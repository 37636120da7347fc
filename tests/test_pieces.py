"""Tensors that a file has in several: cut and joined again they are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import surgery
from surgery.mapping.pieces import joined, named_in, numbered, pieces_of

untyped = cast(Any, torch)

KEYS = {"": "a.{:4}.b", "by": "a.{:4 by C}.b", "within": "a.{:4 within C}.b"}


def groups_of(rows: list[int]) -> Tensor:
    """[rows, groups] with a 1 where a row is in a group."""
    return torch.eye(len(rows)).repeat_interleave(torch.tensor(rows), 0)


@pytest.mark.parametrize("how", KEYS)
@given(rows=st.lists(st.integers(1, 5), min_size=4, max_size=4), width=st.integers(1, 3))
def test_what_is_cut_is_joined_again(how: str, rows: list[int], width: int) -> None:
    key = KEYS[how]
    pieces = pieces_of(key)
    assert pieces is not None
    assert pieces.keys == tuple(f"a.{i}.b" for i in range(4))
    length = {"": 12, "by": sum(rows), "within": 4 * width}[how]
    whole = torch.arange(1.0, length * width + 1).reshape(length, width)
    # Beyond what few rows have there is nothing.
    row = torch.cat([torch.arange(width)] * 4) if how == "within" else torch.zeros(length)
    limit = groups_of(rows).sum(1) * 0 + torch.tensor(rows).repeat_interleave(torch.tensor(rows))
    if how == "by":
        whole = whole * (torch.arange(width) < limit.unsqueeze(1))
    if how == "within":
        whole = whole * (row < torch.tensor(rows).repeat_interleave(width)).unsqueeze(1)
    cut = pieces.cut(whole, rows)
    assert [tuple(t.shape) for t in cut.values()] == pieces.shapes(tuple(whole.shape), rows)
    back = joined({**cut, "other": whole}, {key: tuple(whole.shape)})
    assert back.keys() == {key, "other"}
    assert torch.equal(back[key], whole)


@pytest.mark.parametrize("how", ["by", "within"])
def test_nothing_is_lost_unseen(how: str) -> None:
    pieces = pieces_of(KEYS[how])
    assert pieces is not None
    with pytest.raises(surgery.SurgeryError, match="more directions than it has rows"):
        pieces.cut(torch.ones(8, 3), [1, 3, 3, 1])


@pytest.mark.parametrize(
    "shapes",
    [[(2, 3)] * 3, [(2, 3)] * 3 + [(3, 3)], [(2, 3)] * 3 + [(2, 2)], [(2, 3)] * 3 + [()]],
)
def test_what_is_no_whole_is_left_in_pieces(shapes: list[tuple[int, ...]]) -> None:
    parts = {f"a.{i}.b": torch.ones(shape) for i, shape in enumerate(shapes)}
    assert joined(parts, {KEYS[""]: (8, 3)}).keys() == parts.keys()


@given(st.permutations(range(7)), st.integers(1, 7))
def test_the_largest_have_their_places_and_softmax(order: list[int], count: int) -> None:
    key = numbered("x_{places, weights of k}", {"k": count})
    pieces = pieces_of(key)
    assert pieces is not None
    logits = torch.tensor([order], dtype=torch.float32) / 3
    cut = pieces.cut(logits, ())
    assert cut["x_places"].dtype == torch.uint8
    assert sorted(map(int, cut["x_places"][0])) == sorted(order.index(6 - i) for i in range(count))
    back = pieces.joined((1, 7), [*cut.values()])
    largest = logits.topk(count)
    softmax = torch.softmax(torch.full_like(logits, -1e9).scatter(-1, largest[1], largest[0]), -1)
    torch.testing.assert_close(torch.softmax(back, -1), softmax)
    assert back.isfinite().all()


def test_weights_that_add_up_to_more_than_one_are_numbers() -> None:
    pieces = pieces_of("x_{places, weights of 2}")
    assert pieces is not None
    back = pieces.joined((1, 5), [torch.tensor([[1, 3]]), torch.tensor([[1.0000001]])])
    torch.testing.assert_close(torch.softmax(back, -1)[0, 1], torch.tensor(1.0))
    assert back.isfinite().all()


def test_the_keys_that_a_format_names() -> None:
    assert named_in("a.{p, w of k}") == ("a.p", "a.w")
    assert named_in("a.{:k by C}") == ("a.{:k by C}",)
    assert pieces_of("a.b") is None


OWN = """
method stages(depth: int = 3) on matrix {
  train E[depth, 2, in] = 0
  train B[out, depth * 2] = 1
  W' = W + B @ rearrange(E, "d r i -> (d r) i")
}
format peft stages {
  config peft_type = "STAGES"
  config target_modules = sites()
  config depth = depth else 1
  tensor E on linear = "stages.{:depth}.weight" as "depth r i -> (depth r) i"
  tensor B on linear = "stages_B"
}
match * apply stages(depth = 5)
"""


def test_a_format_of_ones_own_numbers_its_keys(tmp_path: Path) -> None:
    compiled = surgery.compile(OWN, nn.Sequential(nn.Linear(7, 3)))
    with torch.no_grad():
        for tensor in compiled.parameters().values():
            tensor.copy_(torch.arange(float(tensor.numel())).reshape(tensor.shape))
    assert compiled.save(tmp_path).peft == ""
    written = compiled.mapping.rename(compiled.parameters(), to="peft")
    keys = [f"base_model.model.0.stages.{i}.weight" for i in range(5)]
    assert written.keys() == {*keys, "base_model.model.0.stages_B"}
    assert [tuple(written[key].shape) for key in keys] == [(2, 7)] * 5
    again = surgery.attach(tmp_path, nn.Sequential(nn.Linear(7, 3)), force=True)
    for name, tensor in compiled.parameters().items():
        assert torch.equal(again.parameters()[name], tensor)
