"""Texts to trees: every form of the language, and where two of them could be mixed up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from surgery.errors import Source, Span
from surgery.language import syntax as ast
from surgery.language.parse import load, parse
from surgery.resources import specs_dir

SPAN = Span(Source("", ""), 0, 0)  # spans are no part of equality
LAYERS = ast.Glob("layers", span=SPAN)


def number(value: float) -> ast.Number:
    return ast.Number(value, span=SPAN)


def name(word: str) -> ast.Name:
    return ast.Name(word, span=SPAN)


def binary(left: ast.Expression, operator: str, right: ast.Expression) -> ast.Binary:
    return ast.Binary(cast("ast.BinaryOperator", operator), left, right, span=SPAN)


def keyword(word: str, value: ast.Expression) -> ast.Keyword:
    return ast.Keyword(word, value, span=SPAN)


def piece(start: int | None = None, stop: int | None = None, step: int | None = None) -> ast.Slice:
    made = [None if part is None else number(part) for part in (start, stop, step)]
    return ast.Slice(*made, span=SPAN)


def value_of(text: str) -> ast.Expression:
    (statement,) = parse(f"let v = {text}").statements
    assert isinstance(statement, ast.Let)
    return statement.value


def match_of(text: str) -> ast.Match:
    (statement,) = parse(text).statements
    assert isinstance(statement, ast.Match)
    return statement


def method_of(body: str) -> ast.Method:
    (statement,) = parse(f"method m() on matrix {{ {body} }}").statements
    assert isinstance(statement, ast.Method)
    return statement


def nodes(node: ast.Node) -> Iterator[ast.Node]:
    yield node
    for field in node.__dataclass_fields__:
        value: Any = getattr(node, field)
        for child in cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (value,):
            if isinstance(child, ast.Node):
                yield from nodes(child)


# ---------------------------------------------------------------------------- statements


def test_the_line_on_the_card() -> None:
    found = match_of("match /q_proj|v_proj/ in layers[0:12] apply bone(r=8)")
    assert found == ast.Match(
        ast.Selection(
            ast.Regex("q_proj|v_proj", span=SPAN),
            (ast.Scope((ast.Step(LAYERS, piece(0, 12), span=SPAN),), span=SPAN),),
            span=SPAN,
        ),
        ast.Application("bone", (keyword("r", number(8)),), span=SPAN),
        span=SPAN,
    )


def test_every_clause() -> None:
    found = match_of("match mlp.* in layers[0:-2] except down_proj apply bone(r=8) expect 60")
    assert found.selection.selector == ast.Glob("mlp.*", span=SPAN)
    assert found.selection.exclude == ast.Glob("down_proj", span=SPAN)
    assert found.selection.expect == number(60)


def test_what_is_applied_one_after_the_other() -> None:
    found = match_of("match q apply m() then n(r=8) then m() share expect 2")
    names = [application.method for application in found.applications]
    assert (found.application.method, names) == ("m", ["m", "n", "m"])
    assert found.applications[1].arguments == (keyword("r", number(8)),)
    assert (found.tie, found.selection.expect) == ("share", number(2))
    assert match_of("match then apply m()").then == ()


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("layers", None),
        ("layers[*]", ast.Every(span=SPAN)),
        ("layers[3]", ast.Indices((number(3),), span=SPAN)),
        ("layers[0, 3, 5]", ast.Indices((number(0), number(3), number(5)), span=SPAN)),
        ("layers[::2]", piece(step=2)),
        ("layers[:12]", piece(stop=12)),
        ("layers[5:]", piece(5)),
        ("layers[1:7:2]", piece(1, 7, 2)),
        ("layers[:]", piece()),
    ],
)
def test_indices(text: str, index: ast.Index | None) -> None:
    (scope,) = match_of(f"match q in {text} apply m()").selection.scopes
    assert scope.steps == (ast.Step(LAYERS, index, span=SPAN),)


def test_an_index_from_the_end() -> None:
    (scope,) = match_of("match q in layers[-4:] apply m()").selection.scopes
    start = ast.Unary("-", number(4), span=SPAN)
    assert scope.steps[0].index == ast.Slice(start, span=SPAN)


def test_a_scope_of_several_steps() -> None:
    (scope,) = match_of("match q in encoder.layers[0:3].experts[*] apply m()").selection.scopes
    assert [step.container for step in scope.steps] == [
        ast.Glob("encoder.layers", span=SPAN),
        ast.Glob("experts", span=SPAN),
    ]


def test_params_lets_and_adapters() -> None:
    spec = parse(
        """
        param rank: int = 16   # a caller may set it
        param name: text
        let alpha = 2 * rank
        adapter code { match mlp apply m(r=4); match up apply m() }
        """
    )
    rank, named, alpha, code = spec.statements
    assert rank == ast.Param("rank", "int", number(16), span=SPAN)
    assert named == ast.Param("name", "text", span=SPAN)
    assert alpha == ast.Let("alpha", binary(number(2), "*", name("rank")), span=SPAN)
    assert isinstance(code, ast.Adapter)
    assert [one.selection.selector for one in code.body] == [glob("mlp"), glob("up")]


def glob(pattern: str) -> ast.Glob:
    return ast.Glob(pattern, span=SPAN)


A, B, C = glob("a"), glob("b"), glob("c")


def either(left: ast.Selector, right: ast.Selector) -> ast.Either:
    return ast.Either(left, right, span=SPAN)


def both(left: ast.Selector, right: ast.Selector) -> ast.Both:
    return ast.Both(left, right, span=SPAN)


def without(operand: ast.Selector) -> ast.Complement:
    return ast.Complement(operand, span=SPAN)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a | b | c", either(either(A, B), C)),
        ("a & b & c", both(both(A, B), C)),
        ("a | b & c", either(A, both(B, C))),
        ("a & b | c", either(both(A, B), C)),
        ("a & (b | c)", both(A, either(B, C))),
        ("not a & b", both(without(A), B)),
        ("not (a & b)", without(both(A, B))),
        ("not not a", without(without(A))),
        ("((a))", A),
        ("/x|y/ | {b,c}", either(ast.Regex("x|y", span=SPAN), glob("{b,c}"))),
        ("@query|@key", either(ast.Role("query", span=SPAN), ast.Role("key", span=SPAN))),
        ("nota | inb & wherec", either(glob("nota"), both(glob("inb"), glob("wherec")))),
        ("not.a | in.b | *where", either(either(glob("not.a"), glob("in.b")), glob("*where"))),
    ],
)
def test_set_algebra(text: str, wanted: ast.Selector) -> None:
    selection = match_of(f"match {text} except {text} apply m()").selection
    assert (selection.selector, selection.exclude) == (wanted, wanted)


def test_selectors_have_the_spans_of_their_texts() -> None:
    selector = match_of("match a | (not /b/ & @c) apply m()").selection.selector
    assert isinstance(selector, ast.Either)
    assert selector.span.text == "a | (not /b/ & @c)"
    assert selector.right.span.text == "not /b/ & @c"
    assert isinstance(selector.right, ast.Both)
    assert (selector.right.left.span.text, selector.right.right.span.text) == ("not /b/", "@c")


def test_scopes_joined() -> None:
    first, second, third = match_of(
        "match a in b[0].c | @layers[*] | /d/ apply m()"
    ).selection.scopes
    assert [step.container for step in first.steps] == [B, C]
    assert second.steps == (
        ast.Step(ast.Role("layers", span=SPAN), ast.Every(span=SPAN), span=SPAN),
    )
    assert third.steps == (ast.Step(ast.Regex("d", span=SPAN), span=SPAN),)
    assert [s.span.text for s in (first, second, third)] == ["b[0].c", "@layers[*]", "/d/"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("type == Linear", binary(name("type"), "==", name("Linear"))),
        ('name == "q"', binary(name("name"), "==", ast.Text("q", span=SPAN))),
        ("tied", name("tied")),
        ("in % 8 == 0", binary(binary(name("in"), "%", number(8)), "==", number(0))),
        ("tied or in < out", binary(name("tied"), "or", binary(name("in"), "<", name("out")))),
    ],
)
def test_where(text: str, wanted: ast.Expression) -> None:
    for clauses in (f"where {text}", f"in b where {text} except c", f"where ({text}) except c"):
        selection = match_of(f"match a {clauses} apply m()").selection
        assert selection.where == wanted
        assert (selection.exclude is not None) == ("except" in clauses)


def test_optional() -> None:
    spec = parse(
        "optional match a apply m() match b apply m() adapter x { optional match c apply m() }"
    )
    first, second, adapter = spec.statements
    assert isinstance(first, ast.Match)
    assert isinstance(second, ast.Match)
    assert isinstance(adapter, ast.Adapter)
    found = [one.selection.optional for one in (first, second, *adapter.body)]
    assert found == [True, False, True]
    assert first.span.text == "optional match a apply m()"
    assert first != match_of("match a apply m()")


def test_use() -> None:
    assert parse('use "sub/a.peft"').statements == (ast.Use("sub/a.peft", span=SPAN),)


def test_a_method() -> None:
    (found,) = parse(
        """
        method m(r: int = 8, alpha: float = r, side: text) on matrix {
          train A[r, in]  ~ kaiming_uniform(a = sqrt(5))
          frozen P[out / r] = 0
          shared S[in, r] = 1
          shared train T[r] = 1
          let V = W + (alpha / r) * A
          W' = V
        }
        """
    ).statements
    assert isinstance(found, ast.Method)
    assert (found.name, found.kind) == ("m", "matrix")
    assert [(a.name, a.type) for a in found.arguments] == [
        ("r", "int"),
        ("alpha", "float"),
        ("side", "text"),
    ]
    assert found.arguments[1].default == name("r")
    root = ast.Call("sqrt", (number(5),), span=SPAN)
    draw = ast.Draw(ast.Call("kaiming_uniform", (), (keyword("a", root),), span=SPAN), span=SPAN)
    a, p, s, t, _, equation = found.body
    assert a == ast.Declaration("A", (name("r"), name("in")), draw, trained=True, span=SPAN)
    ratio = binary(name("out"), "/", name("r"))
    assert p == ast.Declaration("P", (ratio,), number(0), trained=False, span=SPAN)
    assert isinstance(s, ast.Declaration)
    assert isinstance(t, ast.Declaration)
    assert [(x.trained, x.shared) for x in (s, t)] == [(False, True), (True, True)]
    assert equation == ast.Equation("W", name("V"), span=SPAN)


def test_branches() -> None:
    found = method_of(
        """
        if side == "out" { train l[out] = 1;  y' = l * y }
        else if side == "in" { x' = 2 * x }
        else { y' = y }
        """
    )
    (branch,) = found.body
    assert isinstance(branch, ast.Branch)
    assert branch.condition == binary(name("side"), "==", ast.Text("out", span=SPAN))
    assert [type(item) for item in branch.then] == [ast.Declaration, ast.Equation]
    (other,) = branch.other
    assert isinstance(other, ast.Branch)
    assert other.other == (ast.Equation("y", name("y"), span=SPAN),)


def test_a_branch_may_follow_an_item() -> None:
    found = method_of("let s = r if r == 1 { W' = W } b' = b")
    assert [type(item) for item in found.body] == [ast.Let, ast.Branch, ast.Equation]


def test_a_format() -> None:
    (found,) = parse(
        """
        format peft m {
          config peft_type = "LORA"
          config lora_alpha = alpha else 8
          config rate on linear, conv2d = rate else 0
          config bias = null else false
          config lr = one_of(true, false, "gaussian", reason = "…")
          config init = (true if init_weights == "default" else init_weights) else true
          tensor A = "lora_A.weight"
          tensor A on conv2d, linear = "A" as "r (c h w) -> r c h w" if groups == 1 and side == "in"
        }
        """
    ).statements
    assert isinstance(found, ast.Format)
    assert (found.name, found.method) == ("peft", "m")
    kind, alpha, rate, bias, lr, init = found.fields
    assert kind == ast.Field("peft_type", ast.Text("LORA", span=SPAN), span=SPAN)
    assert alpha == ast.Field("lora_alpha", name("alpha"), number(8), span=SPAN)
    assert rate.kinds == ("linear", "conv2d")
    assert (bias.value, bias.default) == (name("null"), ast.Truth(False, span=SPAN))
    assert isinstance(lr.value, ast.Call)
    assert [word.name for word in lr.value.keywords] == ["reason"]
    assert isinstance(init.value, ast.Conditional)
    plain, laid = found.tensors
    assert plain == ast.Tensor("A", (), "lora_A.weight", span=SPAN)
    assert (laid.kinds, laid.layout) == (("conv2d", "linear"), "r (c h w) -> r c h w")
    assert isinstance(laid.condition, ast.Binary)
    assert laid.condition.operator == "and"


# --------------------------------------------------------------------------------- traps


def test_a_division_before_a_regex() -> None:
    alpha, match = parse("let a = alpha / r / 2\nmatch /x/ apply m(r = a / 2 / 3)").statements
    half = binary(binary(name("alpha"), "/", name("r")), "/", number(2))
    assert alpha == ast.Let("a", half, span=SPAN)
    assert isinstance(match, ast.Match)
    assert match.selection.selector == ast.Regex("x", span=SPAN)


@pytest.mark.parametrize("pattern", [r"a#b", r"a\/b", r"\(", r"[#\/]x", 'a"b'])
def test_signs_inside_a_regex(pattern: str) -> None:
    assert match_of(f"match /{pattern}/ apply m()").selection.selector == ast.Regex(
        pattern, span=SPAN
    )


def test_the_name_in_beside_the_keyword() -> None:
    parse("match q in layers[0:2] apply m(r = in / 2, in = in)\nmatch v apply m()")
    found = method_of("train A[r, in] = 0  W' = W + A[:, :in]")
    assert isinstance(found.body[0], ast.Declaration)
    assert found.body[0].shape == (name("r"), name("in"))


def test_a_power_beside_a_glob() -> None:
    spec = parse("let a = 10**12 match ** apply m(r = 2**3)")
    assert spec.statements[0] == ast.Let("a", binary(number(10), "**", number(12)), span=SPAN)
    assert isinstance(spec.statements[1], ast.Match)
    assert spec.statements[1].selection.selector == ast.Glob("**", span=SPAN)


@pytest.mark.parametrize(
    "glob",
    [
        *("mlp.*", "in_proj", "attention.self.query", "{up,down}_proj", "*", "0", "init", "share"),
        *("adapter", "format.let", "match", "apply_me", "in.out", "not_q", "*.weight", "expect"),
    ],
)
def test_words_in_selectors_are_selectors(glob: str) -> None:
    found = match_of(f"match {glob} in {glob} except {glob} apply m()")
    wanted = ast.Glob(glob, span=SPAN)
    assert (found.selection.selector, found.selection.exclude) == (wanted, wanted)


def test_words_of_the_grammar_may_be_names() -> None:
    spec = parse("param text: text\nlet config = on + int\nlet tensor = frozen\nlet as = peft")
    assert len(spec.statements) == 4


def test_lines_and_separators_mean_nothing() -> None:
    flat = "let a = 1 let b = 2 match q apply m ( r = a )"
    spread = "let\n a\n =\r\n1;;\nlet b = 2 # a comment\n;match q\n\n apply m(r\n=a)\t;"
    assert parse(flat) == parse(spread)


def test_the_blocks_of_the_language_page() -> None:
    spec = parse(
        """
        # Comments run to the end of the line.
        param rank: int = 16                     # a caller may set it: --set rank=32
        let   alpha = 2 * rank                   # a local name
        match q in layers[0:12]    apply lora(r=rank, alpha=alpha, dropout=0.05)
        match v in layers[12:-2]   apply dora(r = rank if layer < 20 else 2*rank)
        match mlp.* in layers[0:-2] except down_proj   apply bone(r=8)          expect 60
        adapter code {
          match mlp apply lora(r=4)
        }
        method dora(r: int = 8, alpha: float = r) on matrix {
          train A[r, in]  ~ kaiming_uniform(a = sqrt(5))
          train B[out, r] = 0
          let   V = W + (alpha / r) * B @ A
          train m[out] = rownorm(W)
          W' = (m / stop_gradient(rownorm(V))) * rows(V)
        }
        method ia3(side: text = "out") on matrix {
          if side == "out" { train l[out] = 1;       y' = l * y }
          else             { train l[channels] = 1;  x' = l * x }
        }
        """
    )
    assert len(spec.statements) == 8


@pytest.mark.parametrize(
    "path", sorted(specs_dir().rglob("*.peft")), ids=lambda path: cast("Path", path).stem
)
def test_every_spec_that_is_shipped(path: Path) -> None:
    assert load(path).statements
