"""Expressions: how tightly each operator binds, and the stretch of text each came from."""

from __future__ import annotations

import ast as python
from collections.abc import Iterator
from typing import Any, Literal, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import Source, Span
from surgery.language import syntax as ast
from surgery.language.parse import parse

SPAN = Span(Source("", ""), 0, 0)  # spans are no part of equality


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


def nodes(node: ast.Node) -> Iterator[ast.Node]:
    yield node
    for field in node.__dataclass_fields__:
        value: Any = getattr(node, field)
        for child in cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (value,):
            if isinstance(child, ast.Node):
                yield from nodes(child)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("0.05", 0.05),
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("2.", 2.0),
        ("10**12", None),
        ("1e999", float("inf")),
        ("9" * 5000, float("inf")),
    ],
)
def test_numbers(text: str, value: float | None) -> None:
    found = value_of(text)
    if value is None:
        assert found == binary(number(10), "**", number(12))
    else:
        assert isinstance(found, ast.Number)
        assert (found.value, type(found.value)) == (value, type(value))


def test_layout_operators() -> None:
    transposed = ast.Call("transpose", (name("A"),), span=SPAN)
    assert value_of("Aᵀ") == transposed
    assert value_of("B @ Aᵀ ** 2") == binary(name("B"), "@", binary(transposed, "**", number(2)))
    stop = ast.Slice(None, name("in"), span=SPAN)
    assert value_of("A[:, :in]") == ast.Subscript(name("A"), (piece(), stop), span=SPAN)
    assert value_of("f(a, b, side = in,)") == ast.Call(
        "f", (name("a"), name("b")), (keyword("side", name("in")),), span=SPAN
    )
    assert value_of("+a") == name("a")


names = st.sampled_from(["a", "W", "in", "rank", "alpha"]).map(name)
numbers = st.integers(0, 99).map(number)
OPERATORS: dict[str, type[python.operator]] = {
    "+": python.Add,
    "-": python.Sub,
    "*": python.Mult,
    "/": python.Div,
    "//": python.FloorDiv,
    "%": python.Mod,
    "**": python.Pow,
    "@": python.MatMult,
}
COMPARISONS: dict[str, type[python.cmpop]] = {
    "==": python.Eq,
    "!=": python.NotEq,
    "<": python.Lt,
    "<=": python.LtE,
    ">": python.Gt,
    ">=": python.GtE,
}


def unary(operator: Literal["-", "not"], operand: ast.Expression) -> ast.Unary:
    return ast.Unary(operator, operand, span=SPAN)


def conditional(
    then: ast.Expression, condition: ast.Expression, other: ast.Expression
) -> ast.Conditional:
    return ast.Conditional(then, condition, other, span=SPAN)


def call(*arguments: ast.Expression) -> ast.Call:
    return ast.Call("f", arguments, span=SPAN)


SIGNS: tuple[Literal["-", "not"], ...] = ("-", "not")


def _grown(inner: st.SearchStrategy[ast.Expression]) -> st.SearchStrategy[ast.Expression]:
    operators = st.sampled_from([*OPERATORS, *COMPARISONS, "and", "or"])
    return st.one_of(
        st.builds(binary, inner, operators, inner),
        st.builds(unary, st.sampled_from(SIGNS), inner),
        st.builds(conditional, inner, inner, inner),
        st.builds(call, inner, inner),
    )


expressions = st.recursive(names | numbers, _grown, max_leaves=12)


def as_python(node: ast.Expression) -> python.expr:
    """The same expression in Python's own tree; `in` is spelled `in_` there."""
    match node:
        case ast.Number():
            return python.Constant(node.value)
        case ast.Name():
            return python.Name("in_" if node.id == "in" else node.id)
        case ast.Unary():
            sign = python.USub() if node.operator == "-" else python.Not()
            return python.UnaryOp(sign, as_python(node.operand))
        case ast.Binary():
            return _binary_as_python(node.operator, as_python(node.left), as_python(node.right))
        case ast.Conditional():
            test, then, other = map(as_python, (node.condition, node.then, node.other))
            return python.IfExp(test, then, other)
        case ast.Call():
            return python.Call(python.Name(node.function), [*map(as_python, node.arguments)], [])
        case _:
            raise AssertionError(node)


def _binary_as_python(operator: str, left: python.expr, right: python.expr) -> python.expr:
    if operator in OPERATORS:
        return python.BinOp(left, OPERATORS[operator](), right)
    if operator in COMPARISONS:
        return python.Compare(left, [COMPARISONS[operator]()], [right])
    return python.BoolOp(python.And() if operator == "and" else python.Or(), [left, right])


@given(expressions)
def test_expressions_bind_as_in_python(expression: ast.Expression) -> None:
    # `unparse` writes only the brackets that Python needs.
    text = python.unparse(as_python(expression)).replace("in_", "in")
    assert value_of(text) == expression


# --------------------------------------------------------------------------------- spans

WHOLE = """\
param rank: int = 16
let alpha = (2 * rank) ** 2 - -3
match /q_proj|v_proj/ in a.layers[0:n].x[*] except {up,down} apply m(r = (rank + 1) * 2) expect 6
method m(r: int = 8) on matrix {
  train A[r, in] ~ draw(a = (sqrt(5)))
  if r == 1 or not (r < 2) { W' = (W + Aᵀ) @ A[:, (:in)[0:1]] }
}
""".replace("(:in)[0:1]", ":in")


def test_a_statement_is_the_text_of_its_span() -> None:
    for statement in parse(WHOLE).statements:
        assert parse(statement.span.text).statements == (statement,)


EXPRESSION = (
    ast.Number,
    ast.Text,
    ast.Truth,
    ast.Name,
    ast.Call,
    ast.Binary,
    ast.Unary,
    ast.Conditional,
    ast.Subscript,
)


def test_an_expression_is_the_text_of_its_span() -> None:
    found = [node for node in nodes(parse(WHOLE)) if isinstance(node, EXPRESSION)]
    assert len(found) > 30
    for node in found:
        assert value_of(f"({node.span.text})") == node


@given(expressions)
def test_every_expression_is_the_text_of_its_span(expression: ast.Expression) -> None:
    text = python.unparse(as_python(expression)).replace("in_", "in")
    for node in nodes(value_of(text)):
        assert value_of(node.span.text) == node


def test_a_selector_is_the_text_of_its_span() -> None:
    found = match_of("  match /q/ in {a,b}.c[1] except *.d apply m()")
    assert found.selection.selector.span.text == "/q/"
    assert found.selection.scopes[0].steps[0].container.span.text == "{a,b}.c"
    assert found.selection.exclude is not None
    assert found.selection.exclude.span.text == "*.d"
    assert (found.span.start, found.application.span.text) == (2, "m()")


def test_spans_count_characters() -> None:
    spec = parse("# ᵀᵀ é\nlet a = Bᵀ + c")
    (sum_,) = [node for node in nodes(spec) if isinstance(node, ast.Binary)]
    assert sum_.right.span.text == "c"
    assert str(sum_.right.span) == "<spec>:2:14"
