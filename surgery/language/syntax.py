"""The abstract syntax: one frozen node per form, each with the span it was read from.

Spans are left out of equality, so two texts that mean the same compare and hash equal.
"""

from __future__ import annotations

from typing import Literal

from surgery.language.expressions import (
    Binary,
    BinaryOperator,
    Call,
    Conditional,
    Expression,
    Keyword,
    LiveThen,
    Name,
    Number,
    Slice,
    Subscript,
    Text,
    Truth,
    Unary,
)
from surgery.language.node import Node, node

# What stands in a module of its own, and is of the syntax as all else.
__all__ = [
    "Binary",
    "BinaryOperator",
    "Call",
    "Conditional",
    "Expression",
    "Keyword",
    "LiveThen",
    "Name",
    "Number",
    "Slice",
    "Subscript",
    "Text",
    "Truth",
    "Unary",
]

# ------------------------------------------------------------------- selectors and scopes


@node
class Regex(Node):
    r"""`/q_proj|v_proj/`; `pattern` is without the slashes, `\/` still escaped."""

    pattern: str


@node
class Glob(Node):
    """`mlp.*`, `{up,down}_proj`, `q_proj`."""

    pattern: str


@node
class Role(Node):
    """`@query`: what plays a part, whatever an architecture calls it; `name` is without the `@`."""

    name: str


Pattern = Regex | Glob | Role


@node
class Either(Node):
    """`A | B`."""

    left: Selector
    right: Selector


@node
class Both(Node):
    """`A & B`."""

    left: Selector
    right: Selector


@node
class Complement(Node):
    """`not A`."""

    operand: Selector


@node
class Indices(Node):
    """`[0, 3, -1]`; in scopes and of rows."""

    values: tuple[Expression, ...]


@node
class Rows(Node):
    """`q_proj[0:64]`, `embed_tokens[5, 9]`: of each thing that the pattern takes, some rows."""

    pattern: Pattern
    rows: Slice | Indices


Selector = Pattern | Either | Both | Complement | Rows


@node
class Every(Node):
    """`[*]`."""


Index = Every | Indices | Slice


@node
class Step(Node):
    """One `container[index]` of a scope; without an index, the container itself."""

    container: Pattern
    index: Index | None = None


@node
class Scope(Node):
    """`encoder.layers[0:3].experts[*]`: each step is looked up below the one before."""

    steps: tuple[Step, ...]


# ------------------------------------------------------------------------------ statements


@node
class Rate(Node):
    """`lr = 16x`, so many times the learning rate; `lr = 1e-4`, one in its place.

    name: of the parameter that it is of; "" for all.
    """

    value: Expression
    times: bool
    name: str = ""


@node
class Application(Node):
    """`name(r=8) lr = 2x, B = 16x`."""

    method: str
    arguments: tuple[Keyword, ...] = ()
    rates: tuple[Rate, ...] = ()


@node
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
Verb = Literal["train", "save"]


@node
class Match(Node):
    """`match SELECTION apply M(args) then N(args) share`.

    `then` holds what is applied after `application`, each to the site as all before it leave it.
    `at` says which tokens all that is for, as in `at first(5) | last(5)`; all, where it is empty.
    `[0, -1]` is there a call of the name "".
    `tie` says what becomes of a weight that several layers share: all of them change, or the
    selected one gets a weight of its own.
    """

    selection: Selection
    application: Application
    tie: Tie | None = None
    then: tuple[Application, ...] = ()
    at: tuple[Call, ...] = ()

    @property
    def applications(self) -> tuple[Application, ...]:
        """All that is applied, in order."""
        return (self.application, *self.then)


@node
class Train(Node):
    """`train SELECTION lr = 2x share`: copies of parameters; `save SELECTION`: of whole modules."""

    verb: Verb
    selection: Selection
    tie: Tie | None = None
    rates: tuple[Rate, ...] = ()


Selecting = Match | Train
"""The statements that put something on sites."""


ValueType = Literal["int", "float", "text", "bool"]


@node
class Param(Node):
    """`param rank: int = 16`: a value the caller may set."""

    name: str
    type: ValueType
    default: Expression | None = None


@node
class Let(Node):
    """`let alpha = 2 * rank`; in a spec and in a method."""

    name: str
    value: Expression


@node
class Use(Node):
    """`use "file.peft"`: brings in the methods, formats and lets of another file."""

    path: str


@node
class Adapter(Node):
    """`adapter code { … }`."""

    name: str
    body: tuple[Selecting, ...]


@node
class Derived(Node):
    """`adapter c = 0.7*a + 0.3*b by svd(rank = 8)`: an adapter that is made of others.

    A name in the expression is an adapter, or else a `param` or `let`. way: how they become one,
    with its arguments by name; None where that is not said.
    """

    name: str
    expression: Expression
    way: Call | None = None


@node
class Activate(Node):
    """`activate 0.7*a + 0.3*b`: what is live after compilation.

    A name in it is an adapter, or else a `param` or `let`.
    """

    expression: Expression


# --------------------------------------------------------------------------------- methods


@node
class Argument(Node):
    """One argument of a method's signature; `default` may use the arguments before it."""

    name: str
    type: ValueType
    default: Expression | None = None


@node
class Draw(Node):
    """`~ kaiming_uniform(a = sqrt(5))`: a random beginning."""

    distribution: Call


@node
class Declaration(Node):
    """`train A[r, in] ~ …`, `frozen P[n] = …`, `shared A[r, in] ~ …`.

    `shared` alone is frozen; `shared train` is trained. rate: what stands behind `, lr =`.
    """

    name: str
    shape: tuple[Expression, ...]
    beginning: Draw | Expression
    trained: bool
    shared: bool = False
    rate: Rate | None = None


@node
class Equation(Node):
    """`W' = …`."""

    target: Literal["W", "b", "x", "y"]
    value: Expression


@node
class Assign(Node):
    """`W := W - …`: what a name of the site means from here on, and in the equations."""

    target: str
    value: Expression


@node
class Branch(Node):
    """`if COND { … } else { … }` around declarations and equations."""

    condition: Expression
    then: tuple[Item, ...]
    other: tuple[Item, ...] = ()


Item = Declaration | Let | Equation | Assign | Branch


@node
class Method(Node):
    """`method name(r: int = 8) on matrix { … }`."""

    name: str
    arguments: tuple[Argument, ...]
    kind: str
    body: tuple[Item, ...]


# --------------------------------------------------------------------------------- formats


@node
class Field(Node):
    """`config dropout_prob on linear, conv2d = dropout else 0`.

    Written, it has the value of the expression over the method's arguments. Read, an argument's
    name binds it; any other expression must have the value found. `default` is what it means where
    it is absent, and at sites whose kind is not among `kinds` (empty: it holds for all).
    """

    name: str
    value: Expression
    default: Expression | None = None
    kinds: tuple[str, ...] = ()


@node
class Tensor(Node):
    """`tensor A on conv2d = "A.weight" as "r (c h w) -> r c h w" if groups == 1`.

    `kinds` are the layer kinds it is for (empty: all others); `layout` is an einops pattern from
    the method's shape to the file's; `condition` is over the arguments and the site's facts.
    """

    name: str
    kinds: tuple[str, ...]
    key: str
    layout: str | None = None
    condition: Expression | None = None


@node
class Format(Node):
    """`format NAME METHOD { … }`: how a checkpoint format spells a method."""

    name: str
    method: str
    fields: tuple[Field, ...]
    tensors: tuple[Tensor, ...]


Statement = Match | Train | Param | Let | Adapter | Derived | Activate | Method | Format | Use


@node
class Spec(Node):
    """A whole file."""

    statements: tuple[Statement, ...]
