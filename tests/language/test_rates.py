"""Learning rates: behind a parameter's declaration, an application, and `train` and `save`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

import surgery
from surgery.errors import DefinitionError, Diagnostic, PlanError, Source, Span
from surgery.language import syntax as ast
from surgery.language.formatting import formatted
from surgery.language.parse import parse

Refused = Callable[[str], tuple[Diagnostic, ...]]
Marked = Callable[[str], list[tuple[str, str]]]

SPAN = Span(Source("", ""), 0, 0)  # spans are no part of equality


def rate(value: float, times: bool, name: str = "") -> ast.Rate:
    return ast.Rate(ast.Number(value, span=SPAN), times, name, span=SPAN)


def rates_of(text: str) -> tuple[ast.Rate, ...]:
    (statement,) = parse(text).statements
    match statement:
        case ast.Match():
            return statement.application.rates
        case ast.Train():
            return statement.rates
        case _:
            raise AssertionError(statement)


def declared(body: str) -> list[ast.Item]:
    (method,) = parse(f"method m(r: int = 2, k: float = 3) on matrix {{ {body} }}").statements
    assert isinstance(method, ast.Method)
    return [*method.body]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("match q apply m(r=8) lr = 2x", (rate(2, True),)),
        ("match q apply m() lr = 1e-4 expect 3", (rate(1e-4, False),)),
        ("match q apply m() lr B = 16x share", (rate(16, True, "B"),)),
        (
            "match q apply m() lr = .5x, B = 16x, lr_2 = 1e-3",
            (rate(0.5, True), rate(16, True, "B"), rate(1e-3, False, "lr_2")),
        ),
        ("match q apply m() lr = (2)x", (rate(2, True),)),
        ("match q apply m() lr = (2)", (rate(2, False),)),
        ("train bias in layers[*] lr = 2x untie expect 3", (rate(2, True),)),
        ("optional save lm_head where numel > 5 except x lr = 1e-5x", (rate(1e-5, True),)),
        ("train lr", ()),
        ("match q apply m()", ()),
    ],
)
def test_what_statements_say(text: str, wanted: tuple[ast.Rate, ...]) -> None:
    assert rates_of(text) == wanted
    assert rates_of(formatted(text)) == wanted


def test_each_method_of_a_chain_has_its_own() -> None:
    (match,) = parse("match q apply a() lr = 2x then b() then c() lr S = 1e-4 expect 1").statements
    assert isinstance(match, ast.Match)
    each = [application.rates for application in match.applications]
    assert each == [(rate(2, True),), (), (rate(1e-4, False, "S"),)]


def test_what_a_method_says_of_its_parameters() -> None:
    items = declared("train A[r] = 0, lr = 4x shared train S[r] ~ normal(std = 1), lr = (r * k)x")
    first, second = items
    assert isinstance(first, ast.Declaration)
    assert isinstance(second, ast.Declaration)
    assert first.rate == rate(4, True)
    assert second.rate is not None
    assert second.rate.times
    assert second.rate.value.span.text == "r * k"


@pytest.mark.parametrize(
    "body",
    [
        "train A[in] = 0, lr = 16x\nx' = A * x",
        "train A[in] = 0, lr = 16 x' = A * x",
        "train A[in] = 0, lr = (k)\nx' = A * x",
        "train A[in] = 0, lr = (k) x' = A * x",
        "train A[in] = 0, lr = k x' = A * x",
        "train A[in] = 0 x' = A * x",
    ],
)
def test_an_equation_of_x_behind_it_is_none_of_it(body: str) -> None:
    declaration, equation = declared(body)
    assert isinstance(declaration, ast.Declaration)
    assert isinstance(equation, ast.Equation)
    assert equation.target == "x"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("match q apply m() lr = 2 x", "1:26 x"),
        ("match q apply m() lr 2x", "1:22 2x"),
        ("match q apply m() lr", "1:20 r"),
        ("match q apply m() lr = ", "1:22 ="),
        ("match q apply m() lr = 2x lr = 3x", "1:27 lr"),
        ("match q apply m() lr B = 2x, = 3x", "1:30 ="),
        ("train q lr B = 2x", "1:12 B"),
        ("match q apply m() expect 3 lr = 2x", "1:28 lr"),
        ("match q apply m() lr = 2xy", "1:25 xy"),
    ],
)
def test_what_is_no_rate_is_refused_at_its_place(text: str, place: str, marked: Marked) -> None:
    assert marked(text) == [("E003", place)]


def test_what_may_stand_there_is_said(refused: Refused) -> None:
    (found,) = refused("match q apply m() lr = ")
    assert "a multiple such as `16x`" in found.hint


# --------------------------------------------------------------------------------- what it means


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("match q apply lora(r=2) lr = 0x", "a learning rate of 0 is none"),
        ("match q apply lora(r=2) lr = (1 - 3)x", "a learning rate of -2 is none"),
        ("match q apply lora(r=2) lr C = 2x", "lora() has no parameter `C`"),
        ("match q apply vera(r=2) lr A = 2x", "vera() does not train `A`"),
        ("match q apply lora(r=2) lr B = 2x, B = 2x", "the learning rate of `B` is given twice"),
        ("train q lr = (0 - 1)x", "a learning rate of -1 is none"),
        ("method m() on matrix { frozen A[in] = 1, lr = 2x; x' = A * x }", "`A` is not trained"),
        ("method m() on matrix { shared A[r, 3] = 1, lr = 2x; W' = W }", "unknown name `r`"),
        ("method m() on matrix { train A[in] = 1, lr = -2; x' = A * x }", "of -2 is none"),
    ],
)
def test_what_cannot_be_a_rate_is_found_without_a_model(text: str, said: str) -> None:
    (found,) = surgery.check(text)
    assert found.code == ("E101" if "unknown" in said else "E139")
    assert said in found.message
    assert found.hint or found.label


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("match q apply lora(r=2) lr = nothing", "E101"),
        ('match q apply lora(r=2) lr = "fast"', "E119"),
        ("match q apply lora(r=2) lr = (1 / 0)x", "E105"),
        ('method m() on matrix { train A[in] = 1, lr = "a"; x\' = A * x }', "E103"),
    ],
)
def test_what_is_no_number_is_found_as_elsewhere(text: str, code: str) -> None:
    assert [found.code for found in surgery.check(text)] == [code]


def test_every_way_of_a_condition_is_looked_at() -> None:
    text = "match q in layers[*] apply lora(r=2) lr = (1 if layer < 4 else 0)x"
    (found,) = surgery.check(text)
    assert found.code == "E139"


def test_an_argument_may_be_one() -> None:
    method = "method m(k: float = 2) on matrix { train A[in] = 1, lr = (k)x; x' = A * x }"
    assert surgery.check(f"{method} match q apply m(k=3)") == ()
    (found,) = surgery.check(f"{method} match q apply m(k=-3)")
    assert (found.code, found.span and found.span.text) == ("E139", "k=-3")


def test_the_word_is_still_no_name() -> None:
    assert [found.code for found in surgery.check("let lr = 2 match q apply lora()")] == ["E003"]


def test_two_rates_of_what_all_sites_share_are_refused() -> None:
    method = "method m() on matrix { shared train S[3] = 0; train l[in] = 1; x' = l * x }"
    model = nn.ModuleDict({"q": nn.Linear(5, 7), "k": nn.Linear(5, 7)})
    with pytest.raises(DefinitionError) as caught:
        surgery.plan(f"{method} match q apply m() lr = 2x match k apply m()", model)
    (found,) = caught.value.diagnostics
    assert found.code == "E139"
    assert [span.text for _, span in found.related] == ["match q apply m() lr = 2x"]
    for fine in ("lr l = 2x", "lr = 2x, S = 1e-4"):
        other = "" if "S" not in fine else "lr S = 1e-4"
        surgery.plan(f"{method} match q apply m() {fine} match k apply m() {other}", model)


def test_a_rate_by_layers_needs_layers() -> None:
    model = nn.ModuleDict({"q": nn.Linear(5, 7)})
    with pytest.raises(PlanError, match="is in no layer"):
        surgery.plan("match q apply lora(r=2) lr = (0.5 ** layer)x", model)
