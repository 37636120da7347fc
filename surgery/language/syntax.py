"""The abstract syntax: one frozen node per form, each with the span it was read from.

Spans are left out of equality, so two texts that mean the same compare and hash equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from surgery.errors import Span

# ---------------------------------------------------------------------------- expressions


@dataclass(frozen=True, slots=True)
class Node:
    """The root of all nodes."""

    span: Span = field(compare=False, repr=False, kw_only=True)


@dataclass(frozen=True, slots=True)
class Number(Node):
    """`8`, `0.05`, `1e-4`; an int stays an int."""

    value: int | float


@dataclass(frozen=True, slots=True)
class Text(Node):
    """`"out"`; `value` is without the quotes."""

    value: str


@dataclass(frozen=True, slots=True)
class Truth(Node):
    """`true` or `false`."""

    value: bool


@dataclass(frozen=True, slots=True)
class Name(Node):
    """`r`, `W`, `in`."""

    id: str


@dataclass(frozen=True, slots=True)
class Keyword(Node):
    """`name = value` inside a call."""

    name: str
    value: Expression


@dataclass(frozen=True, slots=True)
class Call(Node):
    """`f(a, b, name = c)`; `Aᵀ` is `transpose(A)`."""

    function: str
    arguments: tuple[Expression, ...]
    keywords: tuple[Keyword, ...] = ()


BinaryOperator = Literal[
    "+", "-", "*", "/", "//", "%", "**", "@", "==", "!=", "<", "<=", ">", ">=", "and", "or"
]


@dataclass(frozen=True, slots=True)
class Binary(Node):
    """`left operator right`; comparisons and `and`, `or` included."""

    operator: BinaryOperator
    left: Expression
    right: Expression


@dataclass(frozen=True, slots=True)
class Unary(Node):
    """`-a` or `not a`."""

    operator: Literal["-", "not"]
    operand: Expression


@dataclass(frozen=True, slots=True)
class Conditional(Node):
    """`then if condition else other`."""

    then: Expression
    condition: Expression
    other: Expression


@dataclass(frozen=True, slots=True)
class Slice(Node):
    """`start:stop:step`, each part optional; in tensors and in scopes."""

    start: Expression | None = None
    stop: Expression | None = None
    step: Expression | None = None


@dataclass(frozen=True, slots=True)
class Subscript(Node):
    """`A[:, :in]`: a slice of each axis."""

    value: Expression
    items: tuple[Slice, ...]


Expression = Number | Text | Truth | Name | Call | Binary | Unary | Conditional | Slice | Subscript

# ------------------------------------------------------------------- selectors and scopes


@dataclass(frozen=True, slots=True)
class Regex(Node):
    r"""`/q_proj|v_proj/`; `pattern` is without the slashes, `\/` still escaped."""

    pattern: str


@dataclass(frozen=True, slots=True)
class Glob(Node):
    """`mlp.*`, `{up,down}_proj`, `q_proj`."""

    pattern: str


Selector = Regex | Glob


@dataclass(frozen=True, slots=True)
class Every(Node):
    """`[*]`."""


@dataclass(frozen=True, slots=True)
class Indices(Node):
    """`[0, 3, -1]`."""

    values: tuple[Expression, ...]


Index = Every | Indices | Slice


@dataclass(frozen=True, slots=True)
class Step(Node):
    """One `container[index]` of a scope; without an index, the container itself."""

    container: Selector
    index: Index | None = None


@dataclass(frozen=True, slots=True)
class Scope(Node):
    """`encoder.layers[0:3].experts[*]`: each step is looked up below the one before."""

    steps: tuple[Step, ...]


# ------------------------------------------------------------------------------ statements


@dataclass(frozen=True, slots=True)
class Application(Node):
    """`name(r=8)`."""

    method: str
    arguments: tuple[Keyword, ...] = ()


@dataclass(frozen=True, slots=True)
class Match(Node):
    """`match S in SCOPE except S apply M(args) expect N`."""

    selector: Selector
    scope: Scope | None
    exclude: Selector | None
    application: Application
    expect: Expression | None = None


ValueType = Literal["int", "float", "text", "bool"]


@dataclass(frozen=True, slots=True)
class Param(Node):
    """`param rank: int = 16`: a value the caller may set."""

    name: str
    type: ValueType
    default: Expression | None = None


@dataclass(frozen=True, slots=True)
class Let(Node):
    """`let alpha = 2 * rank`; in a spec and in a method."""

    name: str
    value: Expression


@dataclass(frozen=True, slots=True)
class Adapter(Node):
    """`adapter code { … }`."""

    name: str
    body: tuple[Match, ...]


# --------------------------------------------------------------------------------- methods


@dataclass(frozen=True, slots=True)
class Argument(Node):
    """One argument of a method's signature; `default` may use the arguments before it."""

    name: str
    type: ValueType
    default: Expression | None = None


@dataclass(frozen=True, slots=True)
class Draw(Node):
    """`~ kaiming_uniform(a = sqrt(5))`: a random beginning."""

    distribution: Call


@dataclass(frozen=True, slots=True)
class Declaration(Node):
    """`train A[r, in] ~ …`, `frozen P[n] = …`, `shared A[r, in] ~ …`.

    `shared` alone is frozen; `shared train` is trained.
    """

    name: str
    shape: tuple[Expression, ...]
    beginning: Draw | Expression
    trained: bool
    shared: bool = False


Target = Literal["W", "b", "x", "y"]


@dataclass(frozen=True, slots=True)
class Equation(Node):
    """`W' = …`."""

    target: Target
    value: Expression


@dataclass(frozen=True, slots=True)
class Branch(Node):
    """`if COND { … } else { … }` around declarations and equations."""

    condition: Expression
    then: tuple[Item, ...]
    other: tuple[Item, ...] = ()


Item = Declaration | Let | Equation | Branch


@dataclass(frozen=True, slots=True)
class Method(Node):
    """`method name(r: int = 8) on matrix { … }`."""

    name: str
    arguments: tuple[Argument, ...]
    kind: str
    body: tuple[Item, ...]


# --------------------------------------------------------------------------------- formats


@dataclass(frozen=True, slots=True)
class Field(Node):
    """`config dropout_prob on linear, conv2d = dropout else 0`.

    Written, the field has the value of the expression over the method's arguments. Read, an
    expression that is one argument's name binds it; any other must have the value found.
    `default` is what an absent field means to the format's own reader, and what the field means at
    sites whose kind is not among `kinds` (empty: it holds for all).
    """

    name: str
    value: Expression
    default: Expression | None = None
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tensor(Node):
    """`tensor A on conv2d = "A.weight" as "r (c h w) -> r c h w" if groups == 1`.

    `kinds` names the layer kinds it is for (empty: all others); the key follows the site's
    path, and `layout` is an einops pattern from the method's shape to the file's. `condition`,
    over the method's arguments and the site's facts, says where the row holds.
    """

    name: str
    kinds: tuple[str, ...]
    key: str
    layout: str | None = None
    condition: Expression | None = None


@dataclass(frozen=True, slots=True)
class Format(Node):
    """`format NAME METHOD { … }`: how a checkpoint format spells a method."""

    name: str
    method: str
    fields: tuple[Field, ...]
    tensors: tuple[Tensor, ...]


Statement = Match | Param | Let | Adapter | Method | Format


@dataclass(frozen=True, slots=True)
class Spec(Node):
    """A whole file."""

    statements: tuple[Statement, ...]
