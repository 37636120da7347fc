"""Brackets and statements, seen without parsing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.language.outline import outline

STATEMENTS = [
    "match /q(/ in a[0:2] except {b,c}.d apply m(r = (1))",
    "let a = b / (c) / 2",
    "param a: int = 3  # match (",
    'let a = f("match (")',
    "method m() on matrix { W' = W }",
    "format peft m { config match_ = 3 }",
    "optional match q apply m()",
    "match /(/ | (/[(/ & not /{/) apply m(r = (1) / 2 / 3)",
    "activate a + 2 * (b then c)",
    "adapter c = a + 2 * (b then c) by m(r = (1))",
    "match q in /(/[0:(n / 2)] | /[[]/ where (a / (b)) except /]/ & (/)/ | k) apply m()",
    "match (/(let/ | match) in let where in apply m()",
    'use "match ("',
    "save x",
    "train /(/ in a[0:2] except /[/ & q untie expect (3)",
    "optional save lm_head where (a / (b)) share",
]


def pieces(text: str) -> list[str]:
    return [text[p.start : p.end].strip() for p in outline(text).pieces()]


@given(st.lists(st.sampled_from(STATEMENTS)))
def test_statements_on_lines_of_their_own(lines: list[str]) -> None:
    found = pieces("\n".join(lines))
    assert found == lines


def test_statements_on_one_line() -> None:
    assert pieces("let a = 1 let b = 2 match q apply m() match v apply m()") == [
        "let a = 1",
        "let b = 2",
        "match q apply m()",
        "match v apply m()",
    ]


def test_words_inside_a_selector_begin_nothing() -> None:
    for text in (
        "match let in format.match except adapter apply m()",
        "match (let | not (match)) & param in use | method[0] except (format) apply m()",
    ):
        assert pieces(text) == [text]


def test_an_adapter_and_what_is_inside() -> None:
    inside = ["match q apply m()", "match v apply m(r=1)"]
    trains = "adapter a {\ntrain q\noptional save v\nmatch k apply m() }"
    assert pieces(trains) == [trains, "train q", "optional save v", "match k apply m()"]
    text = f"adapter a {{ {inside[0]} {inside[1]} }}"
    assert pieces(f"{text}\nlet b = 1") == [text, *inside, "let b = 1"]


def test_optional_and_its_match_are_one() -> None:
    inside = ["optional match q apply m()", "match v apply m()", "optional # (\n match k apply m()"]
    text = f"adapter a {{ {' '.join(inside)} }}"
    assert pieces(text) == [text, *inside]
    assert pieces("optional\nmatch q apply m()") == ["optional\nmatch q apply m()"]
    assert pieces("optional let a = 1") == ["optional", "let a = 1"]


@pytest.mark.parametrize("bracket", ["(", "[", "{", "([{", "([)"])
def test_a_bracket_without_a_partner_hides_nothing(bracket: str) -> None:
    assert pieces(f"let a = {bracket}\nlet b = 1") == [f"let a = {bracket}", "let b = 1"]


def test_brackets() -> None:
    found = outline("a([)]{")
    assert found.pairs() == {1: 3}
    assert found.unclosed() == (2, 5)
    assert outline("((()))").too_deep(2) == 2
    assert outline("((()))").too_deep(3) is None


@given(st.text(alphabet='match let(){}[]/"#\n .apply', max_size=80))
def test_pieces_cover_a_text_in_order(text: str) -> None:
    found = outline(text).pieces()
    starts = [piece.start for piece in found]
    assert starts == sorted(set(starts))
    assert all(piece.start < piece.end <= len(text) for piece in found)
