"""Trees to texts and back; and a text laid out keeps its meaning and every comment."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, cast, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import Source, Span
from surgery.language import syntax as ast
from surgery.language.formatting import formatted
from surgery.language.outline import RESERVED
from surgery.language.parse import parse, tokens
from surgery.language.phrases import PHRASES
from surgery.language.printer import BLOCKS, to_text
from surgery.resources import specs_dir

SPAN = Span(Source("", ""), 0, 0)  # of trees that nothing was read for
NODES = {
    value
    for value in vars(ast).values()
    if isinstance(value, type) and issubclass(value, ast.Node) and value is not ast.Node
}
FOLDERS = ("examples", "formats", "methods", "statements")
FILES = [path for folder in FOLDERS for path in sorted((specs_dir() / folder).glob("*.peft"))]

EVERYTHING = """\
use "parts/own.peft"
param rank: int = 16
param note: text
let wide = 2 * rank if rank < 8 else rank

optional match (/q_proj|v\\/x/ | mlp.* | @key[-64:rank]) & not @norm
  in encoder.layers[0:12:2].@experts[*] | a . b[0, -1]
  where type == Linear and in % 8 == 0
  except down_proj
  apply own(r = 8, alpha = wide if layer > 3 else 0.5, side = "in", plain = true)
  then own(r=2, alpha=rank) lr = 2x, A = (0.9 ** layer)x
  then other() lr S = 1e-4
  share
  expect 3 * rank

train bias in layers[*] lr = 0.5x
save lm_head untie

adapter code {
  match q_proj apply own(r=-8, side="in")
  optional train /.*norm.*/
    in encoder.layers[0:12:2].@experts[*] | a . b[0, -1]
    where numel % 8 == 0 or type == LayerNorm
    except final_norm
    share
    expect 3 * rank
}

adapter both = 0.7 * default - (code then default) / rank by svd(rank = 2 * rank)
adapter same = 1.0 * code

activate 0.7 * default - (code then default) / rank

method own(r: int = 8, alpha: float) on matrix {
  train A[r, in] ~ normal(std = 1e-4), lr = 16x
  frozen P[out / r] = (1 if r == 2 else 3)
  shared train S[r] = 0, lr = (alpha * r)x
  W := W - P @ (A + 1)
  if not (r == 8 or alpha < -1) {
    let part = Aᵀ[:, :in] @ f(A, n = r // 2)
    W' = (alpha / r) * W - part ** 2
  } else if r > 1e999 {
    y' = y
  } else {
    b' = b
  }
}

format peft own {
  config alpha on linear, conv2d = alpha else 8
  config kind = "OWN"
  tensor A on conv2d = "own_A.weight" as "r c -> c r" if groups == 1 and dilation == 1
}
"""


def nodes(node: ast.Node) -> Iterator[ast.Node]:
    yield node
    for field in node.__dataclass_fields__:
        value: Any = getattr(node, field)
        for child in cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (value,):
            if isinstance(child, ast.Node):
                yield from nodes(child)


# --------------------------------------------------------------------------------- random trees

TAKEN = {
    *(
        "match",
        "param",
        "let",
        "adapter",
        "activate",
        "method",
        "format",
        "use",
        "optional",
        "where",
        "apply",
    ),
    *("except", "expect", "if", "else", "and", "or", "not", "true", "false", *RESERVED),
    *("train", "save"),
}
WORDS = ("r", "W", "in", "alpha", "int", "on", "as", "config", "tensor", "frozen", "shared", "type")

ascii_names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]*", fullmatch=True)
names = (st.sampled_from(WORDS) | ascii_names).filter(lambda word: word not in TAKEN)
texts = st.text(st.characters(codec="utf-8", exclude_characters='"\n'), max_size=6)
types = st.sampled_from(get_args(ast.ValueType))
spans = st.just(SPAN)


def some(strategy: st.SearchStrategy[Any], least: int = 0) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(strategy, min_size=least, max_size=3).map(tuple)


def made(node: type[ast.Node], *parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(node, *parts, span=spans)


numbers = st.one_of(
    st.integers(0, 9),
    st.integers(0, 10**3998),
    st.floats(0, allow_nan=False, allow_infinity=True).map(abs),
    st.sampled_from([1e-05, 1e16, 2.0, 0.1, 5e-324]),
)
atoms = st.one_of(
    made(ast.Number, numbers),
    made(ast.Text, texts),
    made(ast.Truth, st.booleans()),
    made(ast.Name, names),
)


def calls(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    functions = st.just("transpose") | names.filter(lambda word: word != "in")
    return made(ast.Call, functions, some(inner), some(made(ast.Keyword, names, inner)))


def slices(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    part = st.none() | inner
    return made(ast.Slice, part, part, part)


def grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        made(ast.Binary, st.sampled_from(get_args(ast.BinaryOperator)), inner, inner),
        made(ast.Unary, st.sampled_from(["-", "not"]), inner),
        made(ast.Conditional, inner, inner, inner),
        made(ast.Call, st.just("transpose"), st.tuples(inner)),
        made(ast.Subscript, inner, some(slices(inner), 1)),
        calls(inner),
    )


expressions = st.recursive(atoms, grown, max_leaves=6)
default = st.none() | expressions

globs = st.from_regex(r"[A-Za-z0-9_*.{},-]*[A-Za-z0-9_*}]", fullmatch=True)
no_globs = ("in", "where", "except", "apply", "not")
regexes = st.from_regex(r"(\\[^\n]|[^/\\\n])+", fullmatch=True)
patterns = st.one_of(
    made(ast.Glob, st.sampled_from(["q", "mlp.*", "{up,down}_proj", "match", "**", "not_q"])),
    made(ast.Glob, globs.filter(lambda glob: glob not in no_globs)),
    made(ast.Regex, regexes | st.sampled_from([r"a\/b", "#", 'a"b', r"\("])),
    made(ast.Role, names),
)
listed = made(ast.Indices, some(expressions, 1))
selectors = st.recursive(
    patterns | made(ast.Rows, patterns, slices(expressions) | listed),
    lambda inner: st.one_of(
        made(ast.Either, inner, inner),
        made(ast.Both, inner, inner),
        made(ast.Complement, inner),
    ),
    max_leaves=5,
)
indices = st.one_of(made(ast.Every), listed, slices(expressions))
scopes = made(ast.Scope, some(made(ast.Step, patterns, st.none() | indices), 1))
selections = made(
    ast.Selection,
    *(selectors, some(scopes), default, st.none() | selectors, default, st.booleans()),
)
plain_names = names.filter(lambda word: word != "in")
rate_of_all = made(ast.Rate, expressions, st.booleans())
rates_of_some = some(made(ast.Rate, expressions, st.booleans(), plain_names))
rate_or_none = st.just(()) | st.tuples(rate_of_all)
rates = st.tuples(rate_or_none, rates_of_some).map(lambda parts: (*parts[0], *parts[1]))
applications = made(ast.Application, names, some(made(ast.Keyword, names, expressions)), rates)
ties = st.none() | st.sampled_from(get_args(ast.Tie))
matches = made(ast.Match, selections, applications, ties, some(applications))
trains = made(ast.Train, st.sampled_from(get_args(ast.Verb)), selections, ties, rate_or_none)

# A transpose is printed as one, and stands nowhere in what is live.
values_only = calls(expressions).filter(lambda call: call.function != "transpose")
mixes = st.recursive(
    made(ast.Number, numbers) | made(ast.Name, plain_names) | values_only,
    lambda inner: st.one_of(
        made(ast.Binary, st.sampled_from(["+", "-", "*", "/", "//", "%", "@"]), inner, inner),
        made(ast.Unary, st.just("-"), inner),
        made(ast.LiveThen, inner, inner),
    ),
    max_leaves=6,
)
ways = made(ast.Call, names, st.just(()), some(made(ast.Keyword, names, expressions)))
lets = made(ast.Let, names, expressions)
beginnings = made(ast.Draw, calls(expressions)) | expressions
flags = (st.booleans(), st.booleans())
shapes = some(expressions, 1)
rate = st.none() | rate_of_all
declarations = made(ast.Declaration, names, shapes, beginnings, *flags, rate)
equations = made(ast.Equation, st.sampled_from("Wbxy"), expressions)
# What begins an item, of a method or of a format, is no name of what is set anew.
items_begin = ("train", "frozen", "shared", "config", "tensor")
assigns = made(ast.Assign, names.filter(lambda word: word not in items_begin), expressions)
items = st.recursive(
    declarations | lets | equations | assigns,
    lambda inner: made(ast.Branch, expressions, some(inner), some(inner)),
    max_leaves=5,
)
arguments = made(ast.Argument, names, types, default)
kinds = some(names)
fields = made(ast.Field, names, expressions, default, kinds)
tensors = made(ast.Tensor, names, kinds, texts, st.none() | texts, default)
statements = st.one_of(
    matches,
    trains,
    lets,
    made(ast.Param, names, types, default),
    made(ast.Use, texts),
    made(ast.Adapter, names, some(matches | trains)),
    made(ast.Activate, mixes),
    made(ast.Derived, names, mixes, st.none() | ways),
    made(ast.Method, names, some(arguments), names, some(items)),
    made(ast.Format, names, names, some(fields), some(tensors)),
)


@st.composite
def specs(draw: st.DrawFn) -> ast.Spec:
    """Whole specs; not a plain strategy, whose name would be longer than all its examples."""
    return draw(made(ast.Spec, some(statements, 1)))


def test_every_form_has_one_printer() -> None:
    assert {*PHRASES, *BLOCKS} == NODES
    assert not {*PHRASES} & {*BLOCKS}


def test_the_spec_of_everything_has_every_form() -> None:
    assert {type(node) for node in nodes(parse(EVERYTHING))} == NODES
    assert formatted(EVERYTHING) == to_text(parse(EVERYTHING)) == EVERYTHING


@given(specs())
def test_reading_what_was_printed_gives_the_tree(spec: ast.Spec) -> None:
    text = to_text(spec)
    again = parse(text)
    assert again == spec
    assert repr(again) == repr(spec)  # 2 and 2.0 are equal, but not the same
    assert to_text(again) == formatted(text) == text


@pytest.mark.parametrize("path", FILES, ids=lambda path: cast("Path", path).stem)
def test_the_specs_that_are_shipped_have_the_layout(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert formatted(text, str(path)) == text


# ----------------------------------------------------------------------------------- comments

# A long file has no form that a short one lacks, and takes seconds each time.
LONG = 10_000
WRITTEN = (path.read_text(encoding="utf-8") for path in FILES)
CORPUS = [*(text for text in WRITTEN if len(text) < LONG), EVERYTHING]
comments = st.sampled_from([' # "', "#{ a = 1", "#)\t ", "\n  # /x/\n", "\n\n# (\r\n\n", "#"])


def commented(text: str, data: st.DataObject) -> tuple[str, list[str]]:
    """A text with comments in some of its gaps, each with a mark that no other has."""
    found = [*tokens(text)]
    cuts = [0, *(token.end for token in found), len(text)]
    places = data.draw(st.sets(st.integers(1, len(cuts) - 2), max_size=6))
    parts: list[str] = []
    for index, (start, end) in enumerate(pairwise(cuts)):
        parts.append(text[start:end])
        if index + 1 in places:
            before, sign, after = data.draw(comments).partition("#")
            parts.append(f"{before}{sign}~{index}~{after}\n")
    return "".join(parts), [f"#~{place - 1}~" for place in sorted(places)]


@given(st.sampled_from(CORPUS) | specs().map(to_text), st.data())
def test_no_comment_is_lost_and_nothing_else_changes(text: str, data: st.DataObject) -> None:
    whole, marks = commented(text, data)
    spec = parse(whole)
    assert spec == parse(text)
    laid = formatted(whole)
    assert repr(parse(laid)) == repr(spec)
    assert formatted(laid) == laid
    assert sorted(re.findall(r"#~\d+~", laid)) == sorted(marks)
    wanted = [line.rstrip() for line in re.findall(r"#~[^\n]*", whole)]
    assert sorted(re.findall(r"#~[^\n]*", laid)) == sorted(wanted)
