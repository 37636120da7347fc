"""What is said about texts that are no specs: code, the exact place, and what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import Diagnostic, SpecSyntaxError
from surgery.language.outline import RESERVED
from surgery.language.parse import parse

Refused = Callable[[str], tuple[Diagnostic, ...]]
Marked = Callable[[str], list[tuple[str, str]]]


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("match /q/ aply m()", "1:11 aply", "did you mean `apply`?"),
        ("mtach /q/ apply m()", "1:1 mtach", "did you mean `match`?"),
        ("match /q/ excpt k apply m()", "1:11 excpt", "did you mean `except`?"),
        ("match /q/ apply m() expct 6", "1:21 expct", "did you mean `expect`?"),
        ("param a: itn = 3", "1:10 itn", "did you mean `int`?"),
        ("param a: string", "1:10 string", "expected `bool`, `float`, `int` or `text`"),
        ("format peft m { tensr A = 0 }", "1:17 tensr", "did you mean `tensor`?"),
        ("method m() on matrix { trian A[r] = 0 }", "1:24 trian", "did you mean `train`?"),
        ("method m() on matrix { W # \n = W }", "2:2 =", "equations such as `W' = …`"),
        ("method m() on matrix { W = W }", "1:24 W", "equations such as `W' = …`"),
        ("method m() on matrix { if a { } els { } }", "1:33 els", "did you mean `else`?"),
        ("let a = 3 +", "1:11 +", "expected an expression"),
        ("let a = (1 + 2", "1:14 2", "expected `)`"),
        ("let a = 1 < 2 < 3", "1:15 <", "unexpected `<`"),
        ("let a = 1 ! 2", "1:11 !", "unexpected `!`"),
        ("let = 3", "1:5 =", "expected a name"),
        ("match", "1:5 h", "expected a selector"),
        ("match apply m()", "1:7 apply", "expected a selector"),
        ("@", "1:1 @", "expected a statement"),
        ("\0", "1:1 \0", "unexpected U+0000"),
        ("match q apply m() in layers[0:2]", "1:19 in", "the order is: match S in SCOPE"),
        ("match q apply m(side='in')", "1:22 '", "texts stand in double quotes"),
        ("let \n a = \nmatch q apply m()", "3:1 match", "the one before is not finished"),
        ("let a = \ntrain bias", "2:1 train", "the one before is not finished"),
        ("train", "1:5 n", "expected a selector"),
        ("train bias apply m()", "1:12 apply", "expected"),
        ("train bias untie in layers[0]", "1:18 in", "the order is: match S in SCOPE"),
        ("save a, b", "1:7 ,", "`A | B` selects what either does"),
        ("train a where b = 3", "1:17 =", "`==` compares"),
    ],
)
def test_unexpected(text: str, place: str, said: str, marked: Marked, refused: Refused) -> None:
    assert marked(text) == [("E003", place)]
    assert said in str(refused(text)[0])


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("match a | apply m()", "1:11 apply", "expected a selector"),
        ("match a & apply m()", "1:11 apply", "expected a selector"),
        ("match a &", "1:9 &", "expected a selector"),
        ("match (a apply m()", "1:10 apply", "expected `)` or `|`"),
        ("match a) apply m()", "1:8 )", "expected `apply`"),
        ("match () apply m()", "1:8 )", "expected a selector"),
        ("match not apply m()", "1:11 apply", "expected a selector"),
        ("match a b apply m()", "1:9 b", "expected `&`, `[`, `apply`"),
        ("match a and b apply m()", "1:9 and", "`A & B` selects what both do"),
        ("match a or b apply m()", "1:9 or", "`A | B` selects what either does"),
        ("match a, b apply m()", "1:8 ,", "`A | B` selects what either does"),
        ("match a - b apply m()", "1:9 -", "`A & not B`"),
        ("match a || b apply m()", "1:10 |", "`|` and `&` are one sign each"),
        ("match !a apply m()", "1:7 !", "`not A` selects what A does not"),
        ("match @ apply m()", "1:7 @", "a role is one word: `@query`"),
        ("match @1 apply m()", "1:7 @", "a role is one word: `@query`"),
        ("match a in @ apply m()", "1:12 @", "a role is one word: `@query`"),
        ("match a in b | apply m()", "1:16 apply", "expected a container"),
        ("match a in | b apply m()", "1:12 |", "expected a container"),
        ("match a in apply m()", "1:12 apply", "expected a container"),
        ("match a in (b | c) apply m()", "1:12 (", "a scope is a path of containers"),
        ("match a in b & c apply m()", "1:14 &", "a scope is a path of containers"),
        ("match a in not b apply m()", "1:12 not", "a scope is a path of containers"),
        ("match a where apply m()", "1:15 apply", "expected an expression"),
        ("match a where type = Linear apply m()", "1:20 =", "`==` compares"),
        ("match a where x in b apply m()", "1:17 in", "the order is: match S in SCOPE where"),
        ("match a except b where x apply m()", "1:18 where", "the order is: match S in SCOPE"),
        ("match a apply m() share then n()", "1:25 then", "the order is: match S in SCOPE"),
        ("match a apply m() expect 2 then n()", "1:28 then", "the order is: match S in SCOPE"),
        ("match a apply m() then", "1:22 n", "expected a name"),
        ("activate 0.5 a", "1:14 a", "expected an operator"),
        ("activate a then + b c", "1:21 c", "`then`"),
        ("activate a then match q apply m()", "1:17 match", "the one before is not finished"),
        ("activate", "1:8 e", "this statement is not finished"),
        ("activate a == b", "1:12 ==", "unexpected"),
        ("adapter a { activate a }", "1:13 activate", "the one before is not finished"),
        ("match a apply m() than n()", "1:19 than", "did you mean `then`?"),
        ("match a wher b apply m()", "1:9 wher", "did you mean `where`?"),
        ("optinal match a apply m()", "1:1 optinal", "did you mean `optional`?"),
        ("optional let x = 1", "1:10 let", "expected `match`"),
        ("optional", "1:8 l", "expected `match`"),
        ("use file", "1:5 file", "expected a text in double quotes"),
    ],
)
def test_unfinished_clauses(
    text: str, place: str, said: str, marked: Marked, refused: Refused
) -> None:
    assert marked(text) == [("E003", place)]
    assert said in str(refused(text)[0])


def test_a_parenthesis_of_a_selector_that_is_not_closed_is_shown(refused: Refused) -> None:
    (found,) = refused("match (a | b apply m()")
    assert [(note, span.text, span.start) for note, span in found.related] == [
        ("this is not closed", "(", 6)
    ]


@pytest.mark.parametrize("word", sorted(RESERVED))
@pytest.mark.parametrize(
    "text",
    [
        "let NAME = 3",
        "param NAME: int = 3",
        "let a = NAME + 1",
        "let a = NAME(1)",
        "adapter NAME { match q apply m() }",
        "method NAME() on matrix { W' = W }",
        "method m(NAME: int = 3) on matrix { W' = W }",
        "method m() on matrix { frozen NAME[in] = 0 }",
        "match q apply m(NAME = 3)",
    ],
)
def test_reserved_words_are_no_names(text: str, word: str, marked: Marked) -> None:
    at = text.index("NAME") + 1
    assert marked(text.replace("NAME", word)) == [("E003", f"1:{at} {word}")]


def test_a_word_that_only_begins_so_is_a_name() -> None:
    assert parse("let init_weights = lr_2 + attend + averaged(a, stacked = 1)").statements


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("match q apply m(8)", ["1:17 8"]),
        ("match q apply m(r = 2, 8, -r)", ["1:24 8", "1:27 -r"]),
        ("match q apply m(f(1), a = 2)", ["1:17 f(1)"]),
    ],
)
def test_arguments_need_names(text: str, places: list[str], marked: Marked) -> None:
    assert marked(text) == [("E008", place) for place in places]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('let a = f("out)  ', '1:11 "out)'),
        ("match /q_proj apply m()", "1:7 /q_proj apply m()"),
        ("match a | /b apply m()", "1:11 /b apply m()"),
        ("match (not /b apply m()", "1:12 /b apply m()"),
        ("match a in b | /c apply m()", "1:16 /c apply m()"),
    ],
)
def test_not_closed_on_the_line(text: str, place: str, marked: Marked) -> None:
    assert marked(text) == [("E006", place)]


def test_a_bracket_that_is_not_closed_is_shown(refused: Refused) -> None:
    first, second = refused("match q apply m(r=8\nmatch v apply m(r=)")
    assert first.code == second.code == "E003"
    (note, span), *rest = first.related
    assert (note, span.text, str(span), rest) == ("this is not closed", "(", "<spec>:1:16", [])
    assert second.related == ()


def test_the_empty_spec(refused: Refused) -> None:
    for text in ("", "  \n ", "# nothing"):
        (found,) = refused(text)
        assert found.code == "E005"
        assert "match" in found.hint


# -------------------------------------------------------------------------- several in one run


def test_every_statement_is_read(marked: Marked) -> None:
    text = """\
match q aply m()
let a = 1
let b = (1 +
match v apply m(r=)
save lm_head share with
let c = 3
"""
    assert marked(text) == [
        ("E003", "1:9 aply"),
        ("E003", "3:12 +"),
        ("E003", "4:19 )"),
        ("E003", "5:20 with"),
    ]


def test_optional_statements_are_read_as_one(marked: Marked) -> None:
    text = """\
optional match q aply m()
optional
match v | /(/ & (/[/ | k) where a / (b) apply m(r=)
adapter code { optional match q aply m()
match k aply m() }
optional match q apply m()
"""
    assert marked(text) == [
        ("E003", "1:18 aply"),
        ("E003", "3:51 )"),
        ("E003", "4:33 aply"),
        ("E003", "5:9 aply"),
    ]


def test_statements_inside_an_adapter_are_read(marked: Marked) -> None:
    text = """\
adapter code {
match q aply m()
match v apply m(r=8 8)
match k apply m()
}
adapter { match q aply m() }
let = 3
"""
    assert marked(text) == [
        ("E003", "2:9 aply"),
        ("E003", "3:21 8"),
        ("E003", "6:9 {"),
        ("E003", "6:19 aply"),
        ("E003", "7:5 ="),
    ]


def test_a_regex_does_not_hide_what_follows(marked: Marked) -> None:
    text = "match /\\(match|let \\[/ aply m()\nmatch v apply m(r=)"
    assert marked(text) == [("E003", "1:24 aply"), ("E003", "2:19 )")]


def test_findings_end_somewhere(refused: Refused) -> None:
    assert len(refused("match q aply m()\n" * 1000)) == 40


BROKEN = [
    "match q aply m()",
    "let = 3",
    "match q apply m(r=)",
    "save x with",
    'let a = "b',
    "let a = (1",
]
SOUND = ["match q apply m(r=8)", "let a = b / 2 / 3", "match /q(u|v)/ apply m()", "param p: int"]


@given(st.lists(st.sampled_from(BROKEN + SOUND), min_size=1, max_size=9))
def test_each_broken_statement_is_found_once(lines: list[str]) -> None:
    text = "\n".join(f"{line}\nlet last{i} = 1" for i, line in enumerate(lines))
    broken = [line for line in lines if line in BROKEN]
    if not broken:
        assert parse(text)
        return
    with pytest.raises(SpecSyntaxError) as caught:
        parse(text)
    assert len(caught.value.diagnostics) == len(broken)
