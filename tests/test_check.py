"""What is wrong with a spec before there is a model: names, values, methods, arguments."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import soon

from surgery.algebra.axes import Size
from surgery.check import Names, Resolved, findings, resolve, site_dependent
from surgery.errors import DefinitionError, Diagnostic, SurgeryError
from surgery.language import syntax as ast
from surgery.language.library import Library
from surgery.language.parse import parse

LIBRARY = Library.standard()


def found(text: str, values: dict[str, object] | None = None) -> list[Diagnostic]:
    return findings(parse(text), LIBRARY, values)


def resolved(text: str, values: dict[str, object] | None = None) -> Resolved:
    return resolve(parse(text), LIBRARY, values)


def marked(text: str) -> tuple[str, str, int]:
    """A text without its «marks», what they enclose, and where that stands."""
    before, _, rest = text.partition("«")
    inside, _, after = rest.partition("»")
    return before + inside + after, inside, len(before)


BAD = [
    ("E101", "match /q/ apply lora(r = «rnak»)"),
    ("E101", "let a = «b1» match /q/ apply lora()"),
    ("E101", "param p: int = «a» let a = 3 match /q/ apply lora()"),
    ("E101", "match /q/ apply lora(r = «sqroot»(4))"),
    ("E103", 'match /q/ apply lora(r = «"x"» + 1)'),
    ("E104", "match /q/ apply lora(r = «max(4)»)"),
    ("E105", "match /q/ apply lora(alpha = «1 / 0»)"),
    ("E105", "match /q/ apply lora(r = «10**10**10»)"),
    ("E105", "match /q/ apply lora(r = «1e999»)"),
    (
        "E105",
        "let a = «((10**300)**300)**300» match /q/ apply lora()".replace(
            "«((10**300)**300)**300»", "(«(10**300)**300»)**300"
        ),
    ),
    ("E106", "«param layer: int = 3» match /q/ apply lora()"),
    ("E101", "let w = «layer» match /q/ apply lora() activate w * default"),
    ("E105", "match /q/ apply lora() activate «1 / 0» * default"),
    ("E105", "match /q/ apply lora() activate «1e30 * default»"),
    ("E106", "«adapter none { match /q/ apply lora() }»"),
    ("E106", "«adapter for { match /q/ apply lora() }»"),
    ("E107", "let a = 3 «let a = 4» match /q/ apply lora()"),
    ("E107", "let a = 3 «param a: int = 4» match /q/ apply lora()"),
    ("E107", "match /q/ apply lora(r = 3, «r = 4»)"),
    ("E111", "match /q/ apply lora(«r = 0»)"),
    ("E111", "match /q/ apply lora(«r = 3 - 6»)"),
    ("E111", "match /q/ apply lora(r = 3, «dropout = 1.5»)"),
    (
        "E115",
        "«let a = b» let b = a match /q/ apply lora()".replace(
            "«let a = b» let b = a", "let a = b «let b = a»"
        ),
    ),
    ("E115", "«let a = a + 1» match /q/ apply lora()"),
    ("E118", "«param p: int» match /q/ apply lora(r = p)"),
    ("E118", "method m(r: int) on matrix { W' = W } match /q/ apply «m()»"),
    ("E119", "match /q/ apply lora(«r = 2.5»)"),
    ("E119", 'match /q/ apply lora(«r = "x"»)'),
    ("E119", "match /q/ apply lora(«r = true»)"),
    ("E119", "match /q/ apply lora(«r = null»)"),
    ("E119", "match /q/ apply lora(«rslora = 1»)"),
    ("E119", "match /q/ apply ia3(«side = 3»)"),
    ("E119", "match /q/ apply ia3(«side = layer»)"),
    ("E119", "«param p: int = 2.5» match /q/ apply lora(r = p)"),
    ("E121", "match /q/ apply «bnoe»(r = 8)"),
    ("E122", "match /q/ apply lora(«rnak» = 8)"),
    ("E122", "match /q/ apply ia3(«r» = 8)"),
]


@pytest.mark.parametrize(("code", "text"), BAD)
def test_what_is_wrong_is_underlined(code: str, text: str) -> None:
    text, place, start = marked(text)
    matching = [d for d in found(text) if d.code == code]
    assert matching, found(text)
    (one, *more) = matching
    assert one.span is not None
    assert (one.span.text, one.span.start) == (place, start)
    assert not more
    assert one.label or one.hint, one


def test_a_mistake_at_the_arguments_shows_the_definition_beside_it() -> None:
    (one,) = found("match /q/ apply lora(alpha = 3, r = 0)")
    ((note, place),) = one.related
    assert note == "needed here"
    assert place.source.name.endswith("lora.peft")
    assert place.text == "r"


ADAPTERS = "adapter a { match /q/ apply lora() } adapter b { match /v/ apply lora() } "


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("E131", "activate «c»"),
        ("E131", "activate a + 2*(«c» then b)"),
        ("E131", "param w: float = 1 activate «ww» * a"),
        ("E132", "activate «2»"),
        ("E132", "activate a * «b»"),
        ("E132", "activate a + «1»"),
        ("E132", "activate «2» - a"),
        ("E132", "activate sqrt(«a»)"),
        ("E132", "activate a then «2»"),
        ("E132", "activate «3» then a"),
        ("E132", "activate «2» / a"),
        ("E132", "activate a % «2»"),
        ("E132", "let a = 3 activate «a»"),
        ("E103", 'let w = "x" activate «w» * a'),
        ("E133", "activate a «activate b»"),
        ("E133", "activate a «activate a»"),
    ],
)
def test_what_is_no_mix_of_adapters(code: str, text: str) -> None:
    text, place, _ = marked(ADAPTERS + text)
    (one,) = found(text)
    assert one.code == code
    assert one.span is not None
    assert one.span.text == place
    assert one.hint or one.label


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", None),
        ("activate none", "none"),
        ("activate b", "b"),
        ("activate 1.0 * b", "b"),
        ("param w: float = 0.75 let v = 1 - w activate w*a + v*b", "0.75*a + 0.25*b"),
        ("activate -(a - 2*b)", "-a + 2*b"),
        ("activate a then b then none", "a then b"),
        ("activate (a then b) then a - a", "a then b"),
        ("activate a / 4 + sqrt(4) * a - b", "2.25*a - b"),
        ("activate 3 * (a + 0.5 * (b then a))", "3*a + 1.5*(b then a)"),
        ("activate (a + b) then (b - a)", "(a + b) then (b - a)"),
        ("activate a - a", "none"),
    ],
)
def test_what_is_live_has_one_form(text: str, wanted: str | None) -> None:
    live = resolved(ADAPTERS + text).live
    assert (None if live is None else str(live)) == wanted
    if wanted is not None:
        assert resolved(f"{ADAPTERS} activate {wanted}").live == live


def test_what_is_live_takes_the_values_of_a_caller() -> None:
    text = f"{ADAPTERS} param w: float activate w*a + (1 - w)*b"
    assert str(resolved(text, {"w": 0.25}).live) == "0.25*a + 0.75*b"
    assert str(resolved(text, {"w": 1}).live) == "a"
    (one,) = found(text)
    assert one.code == "E118"


@pytest.mark.parametrize(
    ("text", "near"),
    [
        (f"{ADAPTERS} adapter facts {{ match /k/ apply ia3() }} activate fact", "facts"),
        ("match /q/ apply bnoe(r = 8)", "bone"),
        ("match /q/ apply lora(rsloar = true)", "rslora"),
        ("let rank = 3 match /q/ apply lora(r = rnak)", "rank"),
    ],
)
def test_the_nearest_name_is_offered(text: str, near: str) -> None:
    (one,) = found(text)
    assert one.label == f"did you mean `{near}`?"


def test_many_mistakes_are_found_in_one_run() -> None:
    text = """
    param p: int = "x"
    let c = q
    let a = 2
    let a = 3
    method m(in: int) on matrix { W' = W @ W }
    match /q/ apply lora(rank = 3, r = p)
    match /k/ apply nothing(r = 3)
    adapter other { match /v/ apply bone(r = 0) }
    """
    codes = {"E119", "E101", "E107", "E106", "E108", "E122", "E121", "E111"}
    assert {d.code for d in found(text)} == codes


def test_what_failed_once_is_not_reported_again_where_it_is_used() -> None:
    text = "param p: int = 2.5 let a = p let c = a match /q/ apply lora(r = c, alpha = a)"
    assert [d.code for d in found(text)] == ["E119"]


def test_a_spec_that_adapts_nothing_says_so() -> None:
    assert [d.code for d in found("param p: int = 3")] == ["E116"]
    assert found("method m() on matrix { W' = -W }") == []


# ------------------------------------------------------------------------------------- values


def test_params_take_the_values_that_are_given() -> None:
    text = 'param r: int = 8 param s: float = r / 2 param t: text = "a" param u: bool = false'
    text += " match /q/ apply lora(r = r)"
    assert resolved(text).values == {"r": 8, "s": 4.0, "t": "a", "u": False}
    given: dict[str, object] = {"r": "32", "s": 3, "t": "b", "u": "true"}
    assert resolved(text, given).values == {"r": 32, "s": 3.0, "t": "b", "u": True}
    assert isinstance(resolved(text, given).values["s"], float)


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        ("int", "eight"),
        ("int", "2.5"),
        ("int", 2.5),
        ("int", True),
        ("int", float("nan")),
        ("int", [8]),
        ("float", "1e999"),
        ("float", float("inf")),
        ("float", "nan"),
        ("float", 10**400),
        ("float", "9" * 5000),
        ("bool", "yes"),
        ("bool", 1),
        ("text", 3),
        ("int", object()),
        ("int", "1" * 400),
    ],
)
def test_a_value_of_another_type_is_refused(type_: str, value: object) -> None:
    text = f"param p: {type_} match /q/ apply bone()"
    (one,) = found(text, {"p": value})
    assert one.code == "E119"
    assert one.hint or one.label


def test_a_value_for_no_param_is_refused() -> None:
    (one,) = found("param rank: int = 3 match /q/ apply lora(r = rank)", {"rnak": 3})
    assert (one.code, one.hint) == ("E117", "did you mean `rank`?")


def test_what_depends_on_the_site_is_open_and_tried_both_ways() -> None:
    text = """
    let deep = layer >= 20
    let rank = (16 if layer < 4 else (8 if layer < 8 else in / 4))
    match /q/ apply lora(r = rank, alpha = 2 * rank if deep else 3)
    """
    assert found(text.replace("let deep = layer >= 20", "").replace("deep", "layer > 9")) == []
    bad = text.replace("in / 4", "0").replace("if deep", "if layer > 9")
    assert [d.code for d in found(bad.replace("let deep = layer >= 20", ""))] == ["E111"]


def test_names_of_a_site_come_first_and_lets_follow_it() -> None:
    names = resolved("let twice = 2 * layer match /q/ apply lora(r = twice)").names
    assert names.at({"layer": 3})["twice"] == 6
    assert names.at({"layer": 5})["twice"] == 10
    assert set(names) == {"twice"}
    assert len(names.at({"layer": 3})) == 2
    assert "layer" not in names
    with pytest.raises(KeyError):
        names["nothing"]
    with pytest.raises(DefinitionError):
        names["twice"]


def test_a_let_is_evaluated_once_and_a_long_chain_soon() -> None:
    chain = "let a0 = 1 " + " ".join(f"let a{i + 1} = (a{i} + a{i}) / 2" for i in range(900))
    with soon():
        names = resolved(f"{chain} match /q/ apply lora(r = a900)").names
        assert names["a900"] == 1


def test_an_argument_depends_on_the_site_if_it_mentions_it() -> None:
    def first(text: str) -> ast.Application:
        (statement,) = parse(text).statements
        assert isinstance(statement, ast.Match)
        return statement.application

    assert not site_dependent(first("match /q/ apply lora(r = p)"), ())
    assert site_dependent(first("match /q/ apply lora(r = p)"), ("p",))
    assert site_dependent(first("match /q/ apply lora(r = 8 if max(layer, 2) < 3 else 4)"), ())


def test_symbols_stay_symbols_in_an_open_argument() -> None:
    names: Names = resolved("let half = in / 2 match /q/ apply lora(r = half)").names
    assert isinstance(names.at({"in": Size(())})["half"], Size)


# --------------------------------------------------------------------------------- robustness

VALID = """param rank: int = 16
let alpha = 2 * rank
method own(r: int = 4, side: text = "a") on matrix {
  train A[r, in] ~ kaiming_uniform(a = sqrt(5))
  if side == "a" { train B[out, r] = 0; W' = W + B @ A } else { x' = x + x @ transpose(A) @ A }
}
match /q_proj|v_proj/ in layers[0:12] apply lora(r = rank if layer < 20 else 2*rank, dropout=0.05)
adapter code { match {up,down}_proj except *.2.* apply own(r = 3, side = "b") expect 4 }
"""
PIECES = [
    "0",
    "10**99",
    "1e999",
    "(",
    ")",
    "layer",
    "null",
    "true",
    '"x"',
    "-",
    "/ 0",
    "{",
    "}",
    "=",
    "r",
    "W",
]


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_no_mutation_raises_anything_but_a_surgery_error(seed: int, count: int) -> None:
    rng = random.Random(seed)
    words: list[str] = [*VALID.split(" ")]
    for _ in range(count):
        at = rng.randrange(len(words))
        words[at] = rng.choice([rng.choice(PIECES), rng.choice(words), "", words[at][::-1]])
    with soon():
        try:
            shown = [str(one) for one in found(" ".join(words))]
        except SurgeryError as error:
            shown = [str(one) for one in error.diagnostics]
    assert all(one.startswith(("error[E1", "error[E0")) for one in shown)


@pytest.mark.parametrize(
    "value",
    [
        "1" + " + 1" * 113,
        "-" * 112 + "1",
        "1" + " ** 1" * 113,
        "1 if true else " * 113 + "1",
        "1 if " + "not " * 108 + "true else 2",
        "1 if " + " and ".join(["layer > 1"] * 108) + " else 2",
        "(" * 98 + "1" + ")" * 98,
        "sqrt(" * 98 + "1" + ")" * 98,
    ],
)
def test_what_is_just_not_too_deep_is_read_far_down_the_stack(value: str) -> None:
    def down(levels: int) -> list[Diagnostic]:
        return down(levels - 1) if levels else found(f"match /q/ apply lora(r = {value})")

    assert down(200) == []


def test_the_valid_one_is_valid() -> None:
    assert found(VALID) == []


def test_a_spec_of_mistakes_alone_is_done_soon() -> None:
    text = "\n".join(f"match /q/ apply lora(r = x{i})" for i in range(800))
    with soon():
        assert 100 <= len(found(text)) < 110
