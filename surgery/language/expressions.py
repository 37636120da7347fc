"""The nodes of expressions, in specs and in methods; `surgery.language.syntax` has them all."""

from __future__ import annotations

from typing import Literal

from surgery.language.node import Node, node


@node
class Number(Node):
    """`8`, `0.05`, `1e-4`; an int stays an int."""

    value: int | float


@node
class Text(Node):
    """`"out"`; `value` is without the quotes."""

    value: str


@node
class Truth(Node):
    """`true` or `false`."""

    value: bool


@node
class Name(Node):
    """`r`, `W`, `in`."""

    id: str


@node
class Keyword(Node):
    """`name = value` inside a call."""

    name: str
    value: Expression


@node
class Call(Node):
    """`f(a, b, name = c)`; `Aᵀ` is `transpose(A)`."""

    function: str
    arguments: tuple[Expression, ...]
    keywords: tuple[Keyword, ...] = ()


BinaryOperator = Literal[
    "+", "-", "*", "/", "//", "%", "**", "@", "==", "!=", "<", "<=", ">", ">=", "and", "or"
]


@node
class Binary(Node):
    """`left operator right`; comparisons and `and`, `or` included."""

    operator: BinaryOperator
    left: Expression
    right: Expression


@node
class Unary(Node):
    """`-a` or `not a`."""

    operator: Literal["-", "not"]
    operand: Expression


@node
class Conditional(Node):
    """`then if condition else other`."""

    then: Expression
    condition: Expression
    other: Expression


@node
class Slice(Node):
    """`start:stop:step`, each part optional; in tensors and in scopes."""

    start: Expression | None = None
    stop: Expression | None = None
    step: Expression | None = None


@node
class Subscript(Node):
    """`A[:, :in]`: a slice of each axis."""

    value: Expression
    items: tuple[Slice, ...]


@node
class LiveThen(Node):
    """`a then b`: an adapter on the model that has another already; only behind `activate`."""

    left: Expression
    right: Expression


Expression = (
    Number
    | Text
    | Truth
    | Name
    | Call
    | Binary
    | Unary
    | Conditional
    | Slice
    | Subscript
    | LiveThen
)
