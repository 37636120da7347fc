"""Nodes are frozen records, compared by what they mean."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any, cast

import pytest

from surgery.errors import Source, Span
from surgery.language import syntax as ast
from surgery.language.parse import parse

SPAN = Span(Source("a.peft", "r"), 0, 1)
TEXT = (
    "param r: int = 8 optional match @query | /v/ in layers[0:-1] where in % 8 == 0 apply lora(r=r)"
)


def test_a_node_is_compared_without_its_place() -> None:
    first, second = parse(TEXT), parse("\n  " + TEXT)
    assert first == second
    assert hash(first) == hash(second)
    assert first.statements[0].span != second.statements[0].span
    assert ast.Number(1, span=SPAN) != ast.Text("1", span=SPAN)
    assert ast.Name("r", span=SPAN) != ast.Text("r", span=SPAN)


def test_copies_and_pickles_are_the_same_node() -> None:
    spec = parse(TEXT)
    for other in (copy.copy(spec), copy.deepcopy(spec), pickle.loads(pickle.dumps(spec))):
        assert other == spec
        assert other.span.text == spec.span.text
        assert repr(other) == repr(spec)


def test_a_node_is_frozen() -> None:
    node = cast(Any, ast.Name("r", span=SPAN))
    with pytest.raises(FrozenInstanceError):
        node.id = "s"
    with pytest.raises(FrozenInstanceError):
        del node.id
    with pytest.raises(FrozenInstanceError):
        node.other = 1
    assert node.id == "r"
    assert replace(node, id="s") == ast.Name("s", span=SPAN)


def test_a_node_has_its_fields_and_no_others() -> None:
    made = cast(Any, ast.Slice)
    assert made(span=SPAN) == ast.Slice(None, None, None, span=SPAN)
    for arguments, named in (
        ((), {}),
        ((1, 2, 3, 4), {"span": SPAN}),
        ((), {"span": SPAN, "x": 1}),
    ):
        with pytest.raises(TypeError):
            made(*arguments, **named)
    with pytest.raises(TypeError, match="needs value"):
        cast(Any, ast.Number)(span=SPAN)
