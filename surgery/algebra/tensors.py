"""Evaluating expressions of tensors: each becomes an `Expr`, with its shape checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from surgery.algebra import scalars
from surgery.algebra.axes import Scalar, Size, size
from surgery.algebra.chance import TOGETHER
from surgery.algebra.equations import FACTS
from surgery.algebra.expr import CHANNELS, IN, Attribute, Expr, number
from surgery.algebra.kinds import MATRIX, Kind
from surgery.algebra.ops import OPS
from surgery.algebra.rules import make
from surgery.algebra.scalars import Open, Scalars, as_number, guarded, kind, unknown_name
from surgery.algebra.shapes import Mismatch, activation, show
from surgery.errors import Span, refuse
from surgery.language import syntax as ast

ACTIVATIONS = ("gelu", "relu", "sigmoid", "silu", "tanh")
"""The elementwise functions that an argument may name."""

MAX_DEPTH = 100
"""No equation nests deeper, its `let`s written out."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """`rows(M)` or `cols(M)`, waiting for the vector beside it."""

    matrix: Expr
    op: str


@dataclass(frozen=True, slots=True)
class _Drop:
    """`drop(p)`, waiting for the size of the matrix beside it."""

    probability: Size
    together: str = TOGETHER[0]


DROP_HINT = "write it beside @, in a product that is applied: `B @ A @ drop(p)`"
_BESIDE = "a vector scales rows as `v * rows(M)`, columns as `v * cols(M)`"
_ACTIVATION = (
    "of x and y there are only sums, products with numbers, vectors and matrices, and functions"
)

_OPERATORS: Mapping[str, str] = {
    "+": "add",
    "-": "sub",
    "*": "mul",
    "/": "div",
    "@": "matmul",
    "**": "power",
}


class Tensors(Scalars):
    """Evaluates expressions; tensors are `Expr`s, everything else is a scalar."""

    def __init__(
        self, arguments: Mapping[str, object], decide: scalars.Decide = scalars.undecided
    ) -> None:
        """Evaluate over a method's arguments and, once `at` was called, a site's; see `Scalars`."""
        self.scope: dict[str, object] = {**FACTS, **arguments}
        self.drops: dict[Expr, Span] = {}
        self.kind: Kind = MATRIX
        super().__init__(self.scope, decide)

    def at(self, kind: Kind) -> None:
        """Let the names of a kind of site be known."""
        self.kind = kind
        self.scope |= {n: value for n, value in kind.names.items() if n not in self.scope}

    def tensor(self, expr: ast.Expression) -> Expr:
        """The value as a tensor; a number becomes a constant."""
        return self.as_tensor(self(expr), expr)

    def as_tensor(self, value: object, expr: ast.Expression) -> Expr:
        """The value of an expression as a tensor. Raises DefinitionError (E103, E109)."""
        match value:
            case Expr():
                return value
            case _Rows():
                refuse(
                    "E109",
                    "a vector is missing here",
                    expr.span,
                    label="each row by what?",
                    hint=_BESIDE,
                )
            case _Drop():
                refuse("E109", "drop(p) stands only beside @", expr.span, hint=DROP_HINT)
            case str() | bool() | Open() | None:
                refuse("E103", "a tensor is needed here", expr.span, label=f"this is {kind(value)}")
            case _:
                return guarded(expr.span, lambda: number(cast(Scalar, value)))

    def size(self, expr: ast.Expression) -> Size:
        """The value as a size."""
        return guarded(expr.span, lambda: size(self.number(expr)))

    # -------------------------------------------------------------------------- operators

    def negative(self, expr: ast.Unary, value: object) -> object:
        """`-A` of a tensor; the rest as for scalars."""
        if _is_tensor(value):
            return self.build(expr, "neg", self.as_tensor(value, expr.operand))
        return super().negative(expr, value)

    def operate(self, expr: ast.Binary, left: object, right: object) -> object:
        """`+ - * / @ **` of tensors; the rest as for scalars."""
        op = _OPERATORS.get(expr.operator)
        if op is None or not (_is_tensor(left) or _is_tensor(right)):
            return super().operate(expr, left, right)
        if op == "matmul":
            return self._product(expr, left, right)
        if op in ("mul", "div") and (isinstance(left, _Rows) or isinstance(right, _Rows)):
            return self._scaled(expr, left, right)
        if op == "power":
            exponent = size(as_number(right, expr.right))
            return self.build(expr, op, self.as_tensor(left, expr.left), exponent=exponent)
        a, b = self.as_tensor(left, expr.left), self.as_tensor(right, expr.right)
        if op in ("add", "sub") and _is_shift(a, b):
            return self._shifted(expr, op, a, b)
        return self._times(expr, a, b) if op == "mul" else self.build(expr, op, a, b)

    def _shifted(self, expr: ast.Binary, op: str, a: Expr, b: Expr) -> Expr:
        """A vector that is added to each token of an activation, or taken from it."""
        negative = (make("neg", b) if op == "sub" else b) if activation(a) else b
        vector, tokens = (a, negative) if activation(b) else (negative, a)
        return self.build(expr, "shift", vector, tokens)

    def _product(self, expr: ast.Binary, left: object, right: object) -> Expr:
        if isinstance(right, _Drop) and isinstance(left, Expr) and left.shape:
            right = self._dropped(expr.right, right, left.shape[-1])
        if isinstance(left, _Drop) and isinstance(right, Expr) and right.shape:
            left = self._dropped(expr.left, left, right.shape[0])
        a, b = self.as_tensor(left, expr.left), self.as_tensor(right, expr.right)
        if activation(b):
            refuse(
                "E108",
                "an activation stands on the left of @",
                expr.right.span,
                hint="write `x @ transpose(M)`, which is M by each x",
            )
        return self.build(expr, "matmul", a, b)

    def _dropped(self, expr: ast.Expression, drop: _Drop, length: Size) -> Expr:
        attrs: dict[str, Attribute] = {"size": length, "p": drop.probability}
        if drop.together != TOGETHER[0]:
            attrs["together"] = drop.together
        made = self.build(expr, "drop", **attrs)
        self.drops[made] = expr.span
        return made

    def _scaled(self, expr: ast.Binary, left: object, right: object) -> Expr:
        """`v * rows(M)`, `rows(M) * v`, `rows(M) / v`."""
        if isinstance(left, _Rows):
            rows, factor = left, self.as_tensor(right, expr.right)
            if expr.operator == "/":
                factor = self.build(expr, "div", number(1), factor)
        elif isinstance(right, _Rows) and expr.operator == "*":
            rows, factor = right, self.as_tensor(left, expr.left)
        else:
            refuse("E109", "nothing is divided by rows(…) or cols(…)", expr.span, hint=_BESIDE)
        if factor.is_scalar:
            return self.build(expr, "mul", factor, rows.matrix)
        return self.build(expr, rows.op, factor, rows.matrix)

    def _times(self, expr: ast.Binary, left: Expr, right: Expr) -> Expr:
        for vector, act in ((left, right), (right, left)):
            if activation(act) and len(vector.shape) == 1:
                if vector.shape == (CHANNELS,) and act.shape[-1] == IN:
                    vector = make("channelwise", vector)
                return self.build(expr, "scale", vector, act)
        return self.build(expr, "mul", left, right)

    def build(self, expr: ast.Expression, op: str, *args: Expr, **attrs: Attribute) -> Expr:
        """`make`, with a mismatch reported where it stands in the source (E105, E108)."""
        if any(map(activation, args)) and not OPS[op].tokenwise:
            refuse("E108", f"{op} does not take an activation", expr.span, hint=_ACTIVATION)
        try:
            made = guarded(expr.span, lambda: make(op, *args, **attrs))
        except Mismatch as mismatch:
            shown = ", ".join(show(a.shape) for a in args)
            refuse("E108", f"shapes do not fit: {mismatch}", expr.span, label=f"{op} of {shown}")
        if made.depth > MAX_DEPTH:
            refuse(
                "E113",
                f"with its `let`s written out, this nests deeper than {MAX_DEPTH}",
                expr.span,
                hint="write it with fewer steps",
            )
        return made

    # ------------------------------------------------------------------------------ calls

    def call(self, expr: ast.Call) -> object:
        """An operator by name, or a function of numbers."""
        sugar = _SUGAR.get(expr.function)
        if sugar is not None:
            return sugar(self, expr)
        op = OPS.get(expr.function)
        if op is not None and op.spelled is not None:
            return self._operator(expr, op.spelled)
        if expr.function not in scalars.SCALAR_FUNCTIONS:
            unknown_name(expr.function, expr.span, _FUNCTIONS, "operator")
        return super().call(expr)

    def _operator(self, expr: ast.Call, spelled: tuple[str, ...]) -> object:
        name, tensors = expr.function, spelled.count("tensor")
        values = [self(a) for a in expr.arguments[:tensors]]
        if name in scalars.SCALAR_FUNCTIONS and not any(map(_is_tensor, values)):
            return self.computed(expr, [*values, *map(self, expr.arguments[tensors:])])
        given = self._named(expr, spelled)
        if len(values) < tensors or len(given) < len(spelled) - tensors:
            refuse(
                "E104", f"{name}() needs all its arguments", expr.span, hint=_form(expr, spelled)
            )
        arguments = (
            self.as_tensor(v, a) for v, a in zip(values, expr.arguments[:tensors], strict=True)
        )
        attrs = {n: self.size(given[n]) for n in spelled if n != "tensor"}
        return self.build(expr, name, *arguments, **attrs)

    def _named(self, expr: ast.Call, spelled: Sequence[str]) -> Mapping[str, ast.Expression]:
        """The arguments of an operator that are no tensors, by name."""
        names = [n for n in spelled if n != "tensor"]
        positional = expr.arguments[spelled.count("tensor") :]
        if len(positional) > len(names):
            refuse("E104", f"{expr.function}() takes no more", expr.span, hint=_form(expr, spelled))
        given = dict(zip(names, positional, strict=False))
        for keyword in expr.keywords:
            if keyword.name not in names:
                unknown_name(keyword.name, keyword.span, names, "argument")
            if keyword.name in given:
                refuse(
                    "E107", f"`{keyword.name}` is given twice", keyword.span, hint="leave one out"
                )
            given[keyword.name] = keyword.value
        return given

    def subscript(self, expr: ast.Subscript | ast.Slice) -> Expr:
        """`A[:, :in]`: a slice of each axis, without a step; negative bounds count from the end."""
        if isinstance(expr, ast.Slice):
            refuse(
                "E102", "a slice stands only behind a tensor", expr.span, hint="as in `A[:, :in]`"
            )
        value = self.tensor(expr.value)
        if len(expr.items) > len(value.shape):
            refuse(
                "E108",
                f"there are {len(expr.items)} slices",
                expr.span,
                label=f"of {show(value.shape)}",
            )
        bounds: list[Attribute] = []
        for axis, item in zip(value.shape, expr.items, strict=False):
            if item.step is not None:
                refuse(
                    "E102", "slices of tensors have no step", item.span, hint="as in `A[:, :in]`"
                )
            bounds.append(
                (self._bound(item.start, axis, size(0)), self._bound(item.stop, axis, axis))
            )
        return self.build(expr, "slice", value, bounds=tuple(bounds))

    def _bound(self, expr: ast.Expression | None, axis: Size, default: Size) -> Size:
        if expr is None:
            return default
        bound = self.size(expr)
        return axis + bound if bound.number is not None and bound.number < 0 else bound


def _form(expr: ast.Call, spelled: Sequence[str]) -> str:
    return f"{expr.function}({', '.join(spelled)}) is what is meant"


def _is_shift(left: Expr, right: Expr) -> bool:
    """Whether one is an activation, and the other a vector."""
    return any(activation(a) and len(b.shape) == 1 for a, b in ((left, right), (right, left)))


def _is_tensor(value: object) -> bool:
    return isinstance(value, Expr | _Rows | _Drop)


# ------------------------------------------------------------------- calls of another form


def _rows_of(op: str) -> Callable[[Tensors, ast.Call], object]:
    def sugar(self: Tensors, expr: ast.Call) -> object:
        return _Rows(self.tensor(_only(expr)), op)

    return sugar


def _drop_of(self: Tensors, expr: ast.Call) -> object:
    if len(expr.arguments) not in (1, 2) or expr.keywords:
        hint = 'drop(p) or drop(p, "rows") is what is meant'
        refuse("E104", "drop() takes a part and what is dropped together", expr.span, hint=hint)
    (place, *rest), together = expr.arguments, TOGETHER[0]
    probability = self.size(place)
    if probability.number is not None and not 0 <= probability.number < 1:
        refuse(
            "E111",
            f"`{place.span.text}` is {scalars.plain(probability)}, and no part that can be dropped",
            place.span,
            hint="drop a part from 0 to less than 1",
        )
    for named in rest:
        together = str(self(named))
        if together not in TOGETHER:
            listed = ", ".join(f'"{name}"' for name in TOGETHER)
            message = f"`{named.span.text}` is nothing that is dropped together"
            refuse("E111", message, named.span, hint=f"there are: {listed}")
    return _Drop(probability, together)


def _layout_of(self: Tensors, expr: ast.Call) -> object:
    """`rearrange(A, "pattern", n = …)`; `reduce` takes the reduction after the pattern."""
    texts = [self(a) for a in expr.arguments[1:]]
    wanted = 2 if expr.function == "reduce" else 1
    if len(texts) != wanted or not all(isinstance(t, str) for t in texts):
        form = 'tensor, "pattern", "sum"' if wanted == 2 else 'tensor, "pattern"'
        refuse("E104", "a pattern is missing", expr.span, hint=f"{expr.function}({form}, axis = …)")
    attrs: dict[str, Attribute] = {"pattern": cast(str, texts[0])}
    if wanted == 2:
        attrs["by"] = cast(str, texts[1])
    axes = tuple((k.name, self.size(k.value)) for k in expr.keywords)
    return self.build(
        expr, expr.function, self.tensor(expr.arguments[0]), **attrs, axes=cast(Attribute, axes)
    )


def _concat_of(self: Tensors, expr: ast.Call) -> object:
    axis: object = 0
    for keyword in expr.keywords:
        if keyword.name != "axis":
            unknown_name(keyword.name, keyword.span, ["axis"], "argument")
        axis = scalars.plain(self.number(keyword.value))
    if not isinstance(axis, int) or not expr.arguments:
        refuse("E104", "concat() joins tensors", expr.span, hint="concat(A, B, …, axis = 0)")
    return self.build(expr, "concat", *(self.tensor(a) for a in expr.arguments), axis=axis)


def _activation_of(self: Tensors, expr: ast.Call) -> object:
    """`activation(A, "gelu")`: the elementwise function that a text names."""
    match expr.arguments:
        case (tensor, text) if not expr.keywords:
            return self.build(expr, _activation(self, text), self.tensor(tensor))
        case _:
            form = 'activation(A, "relu") is what is meant'
            refuse("E104", "activation() takes a tensor and a text", expr.span, hint=form)


def _activation(self: Tensors, text: ast.Expression) -> str:
    chosen = self(text)
    if isinstance(chosen, Open) and chosen.type == "text":
        return ACTIVATIONS[0]  # each has the same shape, and the text will be known at a site
    if isinstance(chosen, str) and chosen in ACTIVATIONS:
        return chosen
    refuse(
        "E111",
        f"{scalars.shown(chosen)} is no activation that is known",
        text.span,
        label=scalars.did_you_mean(chosen, ACTIVATIONS) if isinstance(chosen, str) else "",
        hint=f"there are: {', '.join(ACTIVATIONS)}",
    )


def _only(expr: ast.Call) -> ast.Expression:
    if len(expr.arguments) != 1 or expr.keywords:
        refuse(
            "E104",
            f"{expr.function}() takes one argument",
            expr.span,
            hint=_form(expr, ("M",)),
        )
    return expr.arguments[0]


_SUGAR: Mapping[str, Callable[[Tensors, ast.Call], object]] = {
    "rows": _rows_of("scale_rows"),
    "cols": _rows_of("scale_cols"),
    "drop": _drop_of,
    "rearrange": _layout_of,
    "repeat": _layout_of,
    "reduce": _layout_of,
    "concat": _concat_of,
    "activation": _activation_of,
}
_FUNCTIONS = frozenset(
    {*(n for n, o in OPS.items() if o.spelled is not None), *_SUGAR, *scalars.SCALAR_FUNCTIONS}
)
