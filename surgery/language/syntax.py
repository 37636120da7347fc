"""The abstract syntax: one frozen node per form, each with the span it was read from.

Spans are left out of equality, so two texts that mean the same compare and hash equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeVar, dataclass_transform

from surgery.errors import Span

# ---------------------------------------------------------------------------- expressions


_T = TypeVar("_T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def _node(cls: type[_T]) -> type[_T]:
    """A frozen dataclass that inherits from `Node` what need not be written for each class.

    Writing it for each is a tenth of the time that importing the package takes.
    """
    return dataclass(frozen=True, slots=True, eq=False, repr=False)(cls)


@_node
class Node:
    """The root of all nodes."""

    span: Span = field(kw_only=True)

    def __eq__(self, other: object) -> bool:
        """Whether both mean the same."""
        return type(other) is type(self) and _parts(other) == _parts(self)

    def __hash__(self) -> int:
        """Of what it means."""
        return hash((type(self), _parts(self)))

    def __repr__(self) -> str:
        """The form and its parts."""
        return f"{type(self).__name__}({', '.join(map(repr, _parts(self)))})"


def _parts(node: Node) -> tuple[object, ...]:
    """All that a node means: its fields, but where it was read from."""
    return tuple(getattr(node, name) for name in node.__match_args__)


@_node
class Number(Node):
    """`8`, `0.05`, `1e-4`; an int stays an int."""

    value: int | float


@_node
class Text(Node):
    """`"out"`; `value` is without the quotes."""

    value: str


@_node
class Truth(Node):
    """`true` or `false`."""

    value: bool


@_node
class Name(Node):
    """`r`, `W`, `in`."""

    id: str


@_node
class Keyword(Node):
    """`name = value` inside a call."""

    name: str
    value: Expression


@_node
class Call(Node):
    """`f(a, b, name = c)`; `Aᵀ` is `transpose(A)`."""

    function: str
    arguments: tuple[Expression, ...]
    keywords: tuple[Keyword, ...] = ()


BinaryOperator = Literal[
    "+", "-", "*", "/", "//", "%", "**", "@", "==", "!=", "<", "<=", ">", ">=", "and", "or"
]


@_node
class Binary(Node):
    """`left operator right`; comparisons and `and`, `or` included."""

    operator: BinaryOperator
    left: Expression
    right: Expression


@_node
class Unary(Node):
    """`-a` or `not a`."""

    operator: Literal["-", "not"]
    operand: Expression


@_node
class Conditional(Node):
    """`then if condition else other`."""

    then: Expression
    condition: Expression
    other: Expression


@_node
class Slice(Node):
    """`start:stop:step`, each part optional; in tensors and in scopes."""

    start: Expression | None = None
    stop: Expression | None = None
    step: Expression | None = None


@_node
class Subscript(Node):
    """`A[:, :in]`: a slice of each axis."""

    value: Expression
    items: tuple[Slice, ...]


Expression = Number | Text | Truth | Name | Call | Binary | Unary | Conditional | Slice | Subscript

# ------------------------------------------------------------------- selectors and scopes


@_node
class Regex(Node):
    r"""`/q_proj|v_proj/`; `pattern` is without the slashes, `\/` still escaped."""

    pattern: str


@_node
class Glob(Node):
    """`mlp.*`, `{up,down}_proj`, `q_proj`."""

    pattern: str


@_node
class Role(Node):
    """`@query`: what plays a part, whatever an architecture calls it; `name` is without the `@`."""

    name: str


Pattern = Regex | Glob | Role


@_node
class Either(Node):
    """`A | B`."""

    left: Selector
    right: Selector


@_node
class Both(Node):
    """`A & B`."""

    left: Selector
    right: Selector


@_node
class Complement(Node):
    """`not A`."""

    operand: Selector


Selector = Pattern | Either | Both | Complement


@_node
class Every(Node):
    """`[*]`."""


@_node
class Indices(Node):
    """`[0, 3, -1]`."""

    values: tuple[Expression, ...]


Index = Every | Indices | Slice


@_node
class Step(Node):
    """One `container[index]` of a scope; without an index, the container itself."""

    container: Pattern
    index: Index | None = None


@_node
class Scope(Node):
    """`encoder.layers[0:3].experts[*]`: each step is looked up below the one before."""

    steps: tuple[Step, ...]


# ------------------------------------------------------------------------------ statements


@_node
class Application(Node):
    """`name(r=8)`."""

    method: str
    arguments: tuple[Keyword, ...] = ()


@_node
class Selection(Node):
    """`optional … S in SCOPE | SCOPE where COND except S … expect N`: which sites.

    `scopes` is empty for the whole model.
    """

    selector: Selector
    scopes: tuple[Scope, ...] = ()
    where: Expression | None = None
    exclude: Selector | None = None
    expect: Expression | None = None
    optional: bool = False


Tie = Literal["share", "untie"]


@_node
class Match(Node):
    """`match SELECTION apply M(args) share`.

    `tie` says what becomes of a weight that several layers share: all of them change, or the
    selected one gets a weight of its own.
    """

    selection: Selection
    application: Application
    tie: Tie | None = None


ValueType = Literal["int", "float", "text", "bool"]


@_node
class Param(Node):
    """`param rank: int = 16`: a value the caller may set."""

    name: str
    type: ValueType
    default: Expression | None = None


@_node
class Let(Node):
    """`let alpha = 2 * rank`; in a spec and in a method."""

    name: str
    value: Expression


@_node
class Use(Node):
    """`use "file.peft"`: brings in the methods, formats and lets of another file."""

    path: str


@_node
class Adapter(Node):
    """`adapter code { … }`."""

    name: str
    body: tuple[Match, ...]


# --------------------------------------------------------------------------------- methods


@_node
class Argument(Node):
    """One argument of a method's signature; `default` may use the arguments before it."""

    name: str
    type: ValueType
    default: Expression | None = None


@_node
class Draw(Node):
    """`~ kaiming_uniform(a = sqrt(5))`: a random beginning."""

    distribution: Call


@_node
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


@_node
class Equation(Node):
    """`W' = …`."""

    target: Target
    value: Expression


@_node
class Branch(Node):
    """`if COND { … } else { … }` around declarations and equations."""

    condition: Expression
    then: tuple[Item, ...]
    other: tuple[Item, ...] = ()


Item = Declaration | Let | Equation | Branch


@_node
class Method(Node):
    """`method name(r: int = 8) on matrix { … }`."""

    name: str
    arguments: tuple[Argument, ...]
    kind: str
    body: tuple[Item, ...]


# --------------------------------------------------------------------------------- formats


@_node
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


@_node
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


@_node
class Format(Node):
    """`format NAME METHOD { … }`: how a checkpoint format spells a method."""

    name: str
    method: str
    fields: tuple[Field, ...]
    tensors: tuple[Tensor, ...]


Statement = Match | Param | Let | Adapter | Method | Format | Use


@_node
class Spec(Node):
    """A whole file."""

    statements: tuple[Statement, ...]
