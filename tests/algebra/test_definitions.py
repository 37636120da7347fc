"""Bad definitions: each is found, under its code, with the place underlined exactly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import soon

from surgery.algebra.definitions import check_definition
from surgery.errors import Diagnostic, SurgeryError
from surgery.language import syntax as ast
from surgery.language.parse import parse


def checked(text: str) -> tuple[Diagnostic, ...]:
    statement = parse(text).statements[0]
    assert isinstance(statement, ast.Method)
    return check_definition(statement)


def marked(text: str) -> tuple[str, str, int]:
    """A text without its «marks», what they enclose, and where that stands."""
    before, _, rest = text.partition("«")
    inside, _, after = rest.partition("»")
    return before + inside + after, inside, len(before)


GOOD = "train A[r, in] = 0  train B[out, r] = 0"

# Code, signature, body; the place that must be underlined stands in «».
BAD: list[tuple[str, str, str]] = [
    ("E101", "", "W' = W + «Q»"),
    ("E101", "r: int", f"{GOOD} W' = W + «B1» @ A"),
    ("E101", "", "W' = «taanh»(W)"),
    ("E101", "", "W' = «nothing»(W)"),
    ("E101", "", "train A[out, in] ~ «kaiming»() W' = W + A"),
    ("E101", "", "train A[out, in] ~ normal(«sd» = 1) W' = W + A"),
    ("E101", "", "«V'» = W"),
    ("E101", "", "W' = W + A train A[out, in] = 0".replace("A train", "«A» train")),
    ("E101", "", "train A[out, in] = «A» W' = W + A"),
    ("E102", "", "train A[4, in] = 0 W' = W + «A[::2]»[0:1]".replace("«A[::2]»[0:1]", "A[«::2»]")),
    ("E102", "r: int", "let s = «r @ r» W' = s * W"),
    ("E103", "s: text", "W' = W * «s»"),
    ("E103", "s: text", "W' = W + «s»"),
    ("E103", "s: text", "if «s» { W' = W } else { W' = -W }"),
    ("E103", "s: text", "if «s» < 3 { W' = W } else { W' = -W }"),
    ("E103", "r: int", "if «r» { W' = W } else { W' = -W }"),
    ("E103", "", "train A[«W», in] = 0 W' = W"),
    ("E104", "", "W' = «transpose()»"),
    ("E104", "", "W' = «transpose(W, W)»"),
    ("E104", "", "train v[4, 6] = 0 W' = W @ blockdiag(«skew(v)»)"),
    ("E104", "r: int", "let s = «sqrt(r, r)» W' = s * W"),
    ("E104", "", "train A[out, in] ~ normal(«3») W' = W + A"),
    ("E104", "", "W' = «rearrange(W)»"),
    ("E105", "", "W' = «W / 0»"),
    ("E105", "", "W' = «1 / 0» * W"),
    ("E105", "r: int", "W' = «1 / (r - r)» * W"),
    ("E105", "", "W' = «sqrt(-1)» * W"),
    ("E105", "", "W' = «10**10**10» * W"),
    ("E105", "", "W' = «1e999» * W"),
    ("E105", "", f"W' = «{'9' * 5000}» * W"),
    ("E106", "«in»: int", "W' = W"),
    ("E106", "«b»: int", "W' = W"),
    ("E106", "«W»: int", "W' = W"),
    ("E106", "«channels»: int", "W' = W"),
    ("E106", "", "«train W[out, in] = 0» W' = W"),
    ("E106", "", "«train x[out] = 0» W' = W"),
    ("E106", "", "«train lambda[out] = 0» W' = W"),
    ("E106", "", "«let y = 3» W' = W"),
    ("E107", "r: int, «r»: int", "W' = W"),
    ("E107", "", "train A[4] = 0 «train A[5] = 0» W' = W"),
    ("E107", "r: int", "«let r = 3» W' = W"),
    ("E107", "", "W' = W «W' = -W»"),
    ("E108", "r: int", f"{GOOD} W' = W + «A @ B»"),
    ("E108", "r: int", f"{GOOD} W' = «W + A»"),
    ("E108", "", "W' = «rownorm(W)»"),
    ("E108", "", "y' = «x»"),
    ("E108", "", "b' = «W»"),
    ("E108", "r: int", "train A[r, in] = «W» W' = W"),
    ("E108", "", "train A[in, out] = 0 W' = W + «A @ x»".replace("«A @ x»", "A @ «x»")),
    ("E108", "", "y' = y + «rownorm(x)»"),
    ("E108", "", 'W\' = «rearrange(W, "o i -> o")»'),
    ("E108", "", 'W\' = «rearrange(W, "o i -> i o", n = 3)»'),
    ("E108", "", "train A[4, in] = 0 W' = W @ «A[:, :, :]»"),
    ("E108", "", "train A[4, in] = 0 let B = «A[0:5]» W' = W"),
    ("E109", "", "W' = «rows(W)»"),
    ("E109", "", "W' = W + «cols(W)»"),
    ("E109", "", "W' = «-rows(W)»".replace("«-rows(W)»", "-«rows(W)»")),
    ("E109", "", "W' = «2 / rows(W)»"),
    ("E109", "", "W' = W + «drop(0.5)»"),
    ("E111", "", "train A[«0», in] = 0 W' = W"),
    ("E111", "", "train A[«0 - 3», in] = 0 W' = W"),
    ("E111", "", "train A[«5 / 2», in] = 0 W' = W"),
    ("E111", "", "W' = W @ drop(«1»)"),
    ("E111", "", "W' = W @ drop(«-0.5»)"),
    ("E111", "", "train A[out, in] ~ «normal(std = -1)» W' = W + A"),
    ("E114", "", "W' = tanh(W @ «drop(0.5)»)"),
    ("E114", "r: int", f"{GOOD} W' = W * (W @ «drop(0.5)»)"),
    ("E114", "p: float", "b' = «drop(p)» @ b"),
    (
        "E114",
        "",
        "train A[out, in] = W @ «drop(0.5)» W' = W + A".replace(
            "W @ «drop(0.5)»", "«W @ drop(0.5)»"
        ),
    ),
    ("E114", "", 'y\' = reduce(W @ «drop(0.5)», "o i -> ", "sum") * y'),
    ("E119", 'r: int = «"x"»', "W' = W"),
    ("E119", "r: int = «0.5»", "W' = W"),
    ("E119", "r: text = «3»", "W' = W"),
    ("E119", "r: bool = «null»", "W' = W"),
    ("E119", "", "train A[out, in] ~ normal(seed = «0.5») W' = W + A"),
    ("E101", "r: int = «q», q: int = 3", "W' = W"),
    ("E123", "", "shared A[out, in] = «W» W' = W + A"),
    ("E123", "", "shared A[out, in] = «1 / in» W' = W + A"),
    ("E123", "", "shared A[out, in] ~ normal(std = «1 / in») W' = W + A"),
    ("E123", "", "shared train A[out, in] = 0 train B[out, in] = «A» W' = W + A + B"),
    ("E123", "", "shared A[in, in] = «common_basis(W, in)» W' = W @ A"),
    ("E123", "", "shared A[in, in] = «common_basis(2 * W, 1)» W' = W @ A"),
    ("E103", "r: int = 2", "r' = «ending()» W' = W"),
    ("E103", 'r: text = ""', "r' = 1 + «ending()» W' = W"),
    ("E138", 'r: text = ""', "let n = «ending()» W' = W"),
    ("E125", "", "x' = x + «y» @ W".replace("x + «y» @ W", "«x + y @ W»")),
    ("E126", "", "if «1 == 2» { W' = W } else { W' = -W }"),
    ("E126", "", "W' = (W if «true» else -W)"),
]


@pytest.mark.parametrize(("code", "signature", "body"), BAD)
def test_what_is_wrong_is_underlined(code: str, signature: str, body: str) -> None:
    text, place, start = marked(f"method m({signature}) on matrix {{ {body} }}")
    found = [d for d in checked(text) if d.code == code]
    assert found, checked(text)
    (one, *more) = found
    assert one.span is not None
    assert (one.span.text, one.span.start) == (place, start)
    assert not more
    assert one.label or one.hint, one


def test_an_unknown_kind_is_underlined() -> None:
    (found,) = checked('method m(a: text = ") on matrix {") on matrxi { W\' = W }')
    assert found.code == "E112"
    assert found.span is not None
    assert found.span.text == "matrxi"
    assert found.label == "did you mean `matrix`?"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("E113", "method m(%s) on matrix { %s W' = W }"),
        ("E120", "method m() on matrix { train A[out, in] = 0 }"),
        ("E120", "method m() on matrix { }"),
    ],
)
def test_what_is_wrong_with_the_whole_underlines_the_whole(code: str, text: str) -> None:
    if "%s" in text:
        names = [f"c{i}" for i in range(7)]
        text = text % (
            ", ".join(f"{n}: bool" for n in names),
            " ".join(f"if {n} {{ let a{n} = 1 }}" for n in names),
        )
    (found,) = checked(text)
    assert found.code == code
    assert found.span is not None
    assert found.span.text == text
    assert found.label or found.hint


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("W' = tanhh(W)", "tanh"),
        ("W' = W + channel * W", "channels"),
        ("train A[out, in] ~ kaiming_unifrom() W' = W + A", "kaiming_uniform"),
        ("train A[out, in] ~ normal(men = 1) W' = W + A", "mean"),
        ("train v[4, 6] = 0 W' = W @ blockdiag(skew(v, siez = 4))", "size"),
    ],
)
def test_the_nearest_name_is_offered(text: str, near: str) -> None:
    (found,) = checked(f"method m() on matrix {{ {text} }}")
    assert found.label == f"did you mean `{near}`?"


def test_every_branch_is_checked_whatever_the_defaults_are() -> None:
    text = """method m(side: text = "out", n: int = 0) on matrix {
      if side == "out" { W' = W }
      else if side == "in" { W' = W + P }
      else if n == 3 and not (n < 2) { W' = Q + W }
      else { W' = W * R }
    }"""
    assert {d.message for d in checked(text)} == {f"unknown name `{n}`" for n in "PQR"}


def test_branches_that_exclude_each_other_are_not_taken_together() -> None:
    text = """method m(side: text = "out") on matrix {
      if side == "out" { train l[out] = 1 }
      if side == "in" { train l[in] = 1 }
      if side != "out" and side != "in" { W' = W }
      if "out" == side { W' = l * rows(W) }
      if side == "in" { W' = l * cols(W) }
    }"""
    assert checked(text) == ()


def test_several_mistakes_of_different_branches_are_found_in_one_run() -> None:
    text = """method m(in: int = "x", s: bool) on matrx {
      if s { W' = W @ W } else { W' = rows(W) }
    }"""
    assert [d.code for d in checked(text)] == ["E112", "E106", "E119", "E108", "E109"]


# Signature and body of what must pass.
GOOD_METHODS = [
    (
        "tokens: int = 3",
        'train A[tokens, in] = 0 W\' = W + repeat(A[0:1], "t i -> (t o) i", o = out)',
    ),
    ("p: float = 0.1", "W' = drop(p) @ W"),
    ("p: float = 0.1", "y' = y @ drop(p)"),
    ("p: float = 0.1", "train A[out, in] = 0 W' = (W + A @ drop(p)) / 2"),
    ("", "y' = y + 1"),
    ("", "y' = tanh(y) * sigmoid(2)"),
    ("", "train s[out] = 0 y' = exp(s) * y b' = b - 1"),
    ("r: int = 4", "train A[r, in] = 0 train B[out, 2] = 0 W' = W + B @ (A[:2] - A[-2:])"),
    ("", 'W\' = rearrange(W, "(in a) axis -> (a in) axis", in = 3)'),
    ("", "train n[out] = rownorm(W) W' = (n / stop_gradient(rownorm(W))) * rows(W)"),
]


@pytest.mark.parametrize(("signature", "body"), GOOD_METHODS)
def test_what_is_right_is_right(signature: str, body: str) -> None:
    assert checked(f"method m({signature}) on matrix {{ {body} }}") == ()


# ------------------------------------------------------------------------------ size and time


def found_soon(text: str) -> tuple[Diagnostic, ...]:
    with soon():
        try:
            return checked(text)
        except SurgeryError as error:
            return error.diagnostics


@pytest.mark.parametrize(
    "body",
    [
        "let s = " + " + ".join("r" * 40) + " W' = s * W",
        "W' = W" + " + A" * 40,
        "let a0 = W " + " ".join(f"let a{i + 1} = a{i} + a{i}" for i in range(400)) + " W' = a400",
        "let a0 = S "
        + " ".join(f"let a{i + 1} = transpose(a{i} @ a{i})" for i in range(90))
        + " W' = W @ a90",
        "let a0 = r "
        + " ".join(f"let a{i + 1} = sqrt(a{i} + a{i} * in)" for i in range(400))
        + " W' = a400 * W",
        "let a0 = r + in + out + channels "
        + " ".join(f"let a{i + 1} = a{i} * a{i}" for i in range(60))
        + " W' = W",
        "let a0 = 10 " + " ".join(f"let a{i + 1} = a{i} ** 999" for i in range(9)) + " W' = a9 * W",
        "let z0 = y " + " ".join(f"let z{i + 1} = z{i} + z{i}" for i in range(90)) + " y' = z90",
        "let s = " + "sqrt(" * 50 + "r" + ")" * 50 + " W' = s * W",
    ],
)
def test_nothing_takes_long(body: str) -> None:
    signature = "r: int = 3"
    declared = "train A[out, in] = 0 train S[in, in] = 0"
    for found in found_soon(f"method m({signature}) on matrix {{ {declared} {body} }}"):
        assert found.code in ("E002", "E105", "E113"), found


WORDS = [
    *("W", "b", "x", "y", "in", "out", "r", "A", "v", "(", ")", "(", ")", "[", "]", ",", ":"),
    *("+", "-", "*", "/", "@", "**", "==", "<", "=", "~", "if", "else", "{", "}", "'", "ᵀ", ";"),
    *("train", "shared", "let", "rows", "drop", "normal", "eye", "skew", "rearrange", "tanh"),
    *('"a b -> b a"', '"o i -> "', "0", "1", "2.5", "1e999", "not", "and", "n =", "W' ="),
]


@given(st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join))
def test_no_body_raises_anything_but_a_surgery_error(body: str) -> None:
    declared = "train A[r, in] = 0 train v[in] = 1"
    for found in found_soon(f"method m(r: int = 3) on matrix {{ {declared} {body} }}"):
        assert found.code[:2] in ("E0", "E1")


EXPRESSIONS = st.recursive(
    st.sampled_from(
        ["W", "b", "x", "y", "A", "v", "r", "in", "2", "0", "1e999", '"t"', "true", "s"]
    ),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/@%<"), inner).map(" ".join).map("({})".format),
        st.tuples(
            st.sampled_from(sorted({"tanh", "rows", "drop", "sqrt", "eye", "max", "concat"})), inner
        ).map(lambda t: f"{t[0]}({t[1]})"),
        st.tuples(inner, inner, inner).map(lambda t: f"({t[0]} if {t[1]} else {t[2]})"),
        inner.map("transpose({})".format),
        st.tuples(inner, inner).map(lambda t: f"skew({t[0]}, {t[1]})"),
        inner.map('reduce({}, "a b -> b", "sum")'.format),
        inner.map("{}[1:, :-1]".format),
        inner.map("-{}".format),
    ),
    max_leaves=12,
)


@given(EXPRESSIONS, st.sampled_from("WbxyAv"))
def test_no_expression_raises_anything_but_a_surgery_error(expression: str, target: str) -> None:
    declared = "train A[r, in] = 0 train v[in] = 1"
    body = f"{declared} {target}' = {expression}"
    for found in found_soon(f'method m(r: int = 3, s: text = "a") on matrix {{ {body} }}'):
        assert found.code[:2] in ("E0", "E1")
        assert found.span is not None
