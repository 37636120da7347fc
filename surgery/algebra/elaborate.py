"""From a method's syntax to its expressions, with every name resolved and every shape checked.

The same walk checks a definition, with its arguments as symbols, and instantiates it at a site,
with its arguments as values; `in`, `out` and `channels` stay symbols in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import assert_never, cast

from surgery.algebra import scalars
from surgery.algebra.axes import Scalar, Size, evaluate, names_in, size
from surgery.algebra.beginnings import DISTRIBUTIONS
from surgery.algebra.expr import (
    BIAS,
    CHANNELS,
    IN,
    INPUT,
    OUT,
    OUTPUT,
    WEIGHT,
    Attribute,
    Expr,
    Shape,
    number,
    parameter,
)
from surgery.algebra.ops import OPS
from surgery.algebra.rules import make
from surgery.algebra.scalars import Open, Scalars, kind, unknown_name
from surgery.algebra.shapes import Mismatch, activation, show
from surgery.errors import Span, refuse
from surgery.language import syntax as ast

RESERVED = frozenset({"W", "b", "x", "y", "in", "out", "channels", "layer"})
SIZES: Mapping[str, Size] = {"in": IN, "out": OUT, "channels": CHANNELS}
SITE: Mapping[str, Expr] = {"W": WEIGHT, "b": BIAS, "x": INPUT, "y": OUTPUT}
KINDS = ("matrix",)


@dataclass(frozen=True, slots=True)
class Random:
    """A random beginning: a distribution with its arguments; with a `seed` it can be redrawn."""

    distribution: str
    arguments: tuple[tuple[str, float], ...]
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Parameter:
    """A declared parameter: its shape, how it begins, whether it is trained and shared."""

    name: str
    shape: Shape
    beginning: Random | Expr
    trained: bool
    shared: bool
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Equations:
    """What a method says of a site: its parameters, and W', b', x', y' where it gives them."""

    parameters: tuple[Parameter, ...]
    weight: Expr | None = None
    bias: Expr | None = None
    input: Expr | None = None
    output: Expr | None = None


@dataclass(frozen=True, slots=True)
class _Rows:
    """`rows(M)` or `cols(M)`, waiting for the vector beside it."""

    matrix: Expr
    op: str


@dataclass(frozen=True, slots=True)
class _Drop:
    """`drop(p)`, waiting for the size of the matrix beside it."""

    probability: Size


_TARGETS: Mapping[str, tuple[str, Shape]] = {
    "W": ("weight", WEIGHT.shape),
    "b": ("bias", BIAS.shape),
    "x": ("input", INPUT.shape),
    "y": ("output", OUTPUT.shape),
}


class Elaborator(Scalars):
    """Evaluates a method's body; tensors are `Expr`s, everything else is a scalar."""

    def __init__(
        self,
        arguments: Mapping[str, object],
        decide: scalars.Decide = scalars.undecided,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.scope: dict[str, object] = {**SIZES, **SITE, **arguments}
        super().__init__(self.scope, decide)
        self.sizes = sizes or {}
        self.parameters: list[Parameter] = []
        self.targets: dict[str, Expr] = {}

    def run(self, items: Iterable[ast.Item]) -> Equations:
        """The equations of a body. Raises DefinitionError."""
        self._items(items)
        if not self.targets:
            refuse("E120", "a method needs an equation for W', b', x' or y'")
        fields = {_TARGETS[t][0]: e for t, e in self.targets.items()}
        return Equations(tuple(self.parameters), **fields)

    # ------------------------------------------------------------------------------ items

    def _items(self, items: Iterable[ast.Item]) -> None:
        for item in items:
            match item:
                case ast.Let():
                    self._define(item.name, self(item.value), item.span)
                case ast.Declaration():
                    self._declare(item)
                case ast.Equation():
                    self._equation(item)
                case ast.Branch():
                    self._items(item.then if self.holds(item.condition) else item.other)
                case _:
                    assert_never(item)

    def _define(self, name: str, value: object, span: Span) -> None:
        if name in RESERVED:
            refuse("E106", f"`{name}` is reserved in an equation", span, hint="use another name")
        if name in self.scope:
            refuse("E107", f"`{name}` is defined twice", span, hint="use another name")
        self.scope[name] = value

    def _declare(self, item: ast.Declaration) -> None:
        shape = tuple(self._size(s) for s in item.shape)
        for length, place in zip(shape, item.shape, strict=True):
            _positive(length, place.span)
        self._define(item.name, parameter(item.name, shape), item.span)
        beginning = self._beginning(item.beginning, shape)
        self.parameters.append(
            Parameter(item.name, shape, beginning, item.trained, item.shared, item.span)
        )

    def _beginning(self, item: ast.Draw | ast.Expression, shape: Shape) -> Random | Expr:
        if isinstance(item, ast.Draw):
            return self._random(item.distribution)
        value = self.tensor(item)
        if value.is_scalar or value.shape == shape:
            return value
        refuse(
            "E108",
            f"the beginning has shape {show(value.shape)}, the parameter {show(shape)}",
            item.span,
        )

    def _random(self, call: ast.Call) -> Random:
        row = DISTRIBUTIONS.get(call.function)
        if row is None:
            unknown_name(call.function, call.span, DISTRIBUTIONS, noun="distribution")
            raise AssertionError
        arguments: dict[str, float] = {}
        seed: int | None = None
        for keyword in call.keywords:
            if keyword.name not in row.arguments and keyword.name != "seed":
                unknown_name(keyword.name, keyword.span, [*row.arguments, "seed"], "argument")
            value = scalars.plain(self.number(keyword.value))
            if keyword.name == "seed":
                seed = value if isinstance(value, int) else 0
            elif isinstance(value, int | float):  # a symbol while the definition is checked
                arguments[keyword.name] = float(value)
        if call.arguments:
            refuse("E104", f"name the arguments of {call.function}()", call.arguments[0].span)
        return Random(call.function, tuple(sorted(arguments.items())), seed)

    def _equation(self, item: ast.Equation) -> None:
        value = self.tensor(item.value)
        shape = _TARGETS[item.target][1]
        if item.target in self.targets:
            refuse("E107", f"{item.target}' is given twice", item.span)
        if value.shape != shape:
            refuse(
                "E108",
                f"{item.target}' must have shape {show(shape)}",
                item.value.span,
                label=f"this has shape {show(value.shape)}",
            )
        self.targets[item.target] = value

    def holds(self, condition: ast.Expression) -> bool:
        """Whether a condition holds; at a site, sizes in it are numbers."""
        if not self.sizes:
            return super().holds(condition)
        numeric = {n: _numeric(v, self.sizes) for n, v in self.scope.items()}
        return Scalars(numeric).holds(condition)

    # ------------------------------------------------------------------------ expressions

    def tensor(self, expr: ast.Expression) -> Expr:
        """The value as a tensor; a number becomes a constant."""
        value = self(expr)
        if isinstance(value, Expr):
            return value
        if isinstance(value, _Rows):
            refuse("E109", "rows(…) and cols(…) stand only beside a vector and *, /", expr.span)
        if isinstance(value, _Drop):
            refuse("E109", "drop(p) stands only beside @", expr.span)
        if isinstance(value, str | bool | Open) or value is None:
            refuse("E103", "a tensor is needed here", expr.span, label=f"this is {kind(value)}")
        return number(cast(Scalar, value))

    def unary(self, expr: ast.Unary) -> object:
        """`-A` of a tensor; the rest as for scalars."""
        if expr.operator == "-" and isinstance(operand := self(expr.operand), Expr):
            return self.build(expr, "neg", operand)
        return super().unary(expr)

    def binary(self, expr: ast.Binary) -> object:
        """`+ - * / @ **` of tensors; the rest as for scalars."""
        if expr.operator not in _OPERATORS:
            return super().binary(expr)
        left, right = self(expr.left), self(expr.right)
        if not any(isinstance(v, Expr | _Rows | _Drop) for v in (left, right)):
            return super().binary(expr)
        match expr.operator:
            case "@":
                return self._product(expr, left, right)
            case "*" | "/" if isinstance(left, _Rows) or isinstance(right, _Rows):
                return self._scaled(expr, left, right)
            case "**":
                exponent = size(self.number(expr.right))
                return self.build(expr, "power", self.tensor(expr.left), exponent=exponent)
            case "*":
                return self._times(expr, self.tensor(expr.left), self.tensor(expr.right))
            case _:
                op = _OPERATORS[expr.operator]
                return self.build(expr, op, self.tensor(expr.left), self.tensor(expr.right))

    def _product(self, expr: ast.Binary, left: object, right: object) -> Expr:
        if isinstance(right, _Drop) and isinstance(left, Expr) and left.shape:
            right = self._dropped(expr, right, left.shape[-1])
        if isinstance(left, _Drop) and isinstance(right, Expr) and right.shape:
            left = self._dropped(expr, left, right.shape[0])
        if isinstance(left, Expr) and isinstance(right, Expr):
            if activation(right):
                refuse("E108", "an activation stands on the left of @", expr.right.span)
            return self.build(expr, "matmul", left, right)
        return self.build(expr, "matmul", self.tensor(expr.left), self.tensor(expr.right))

    def _dropped(self, expr: ast.Binary, drop: _Drop, length: Size) -> Expr:
        return self.build(expr, "drop", size=length, p=drop.probability)

    def _scaled(self, expr: ast.Binary, left: object, right: object) -> Expr:
        """`v * rows(M)`, `rows(M) * v`, `rows(M) / v`."""
        if isinstance(left, _Rows):
            rows, factor = left, self.tensor(expr.right)
            if expr.operator == "/":
                factor = self.build(expr, "div", number(1), factor)
        elif isinstance(right, _Rows) and expr.operator == "*":
            rows, factor = right, self.tensor(expr.left)
        else:
            refuse("E109", "rows(…) and cols(…) cannot be divided by", expr.span)
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

    def call(self, expr: ast.Call) -> object:
        """An operator by name, or a function of numbers."""
        sugar = _SUGAR.get(expr.function)
        if sugar is not None:
            return sugar(self, expr)
        op = OPS.get(expr.function)
        if op is None or op.spelled is None:
            known = [*(n for n, o in OPS.items() if o.spelled is not None), *_SUGAR]
            if expr.function not in scalars.SCALAR_FUNCTIONS:
                unknown_name(
                    expr.function, expr.span, [*known, *scalars.SCALAR_FUNCTIONS], "operator"
                )
            return super().call(expr)
        if expr.function in scalars.SCALAR_FUNCTIONS and not isinstance(
            self(expr.arguments[0]) if expr.arguments else None, Expr
        ):
            return super().call(expr)
        return self._operator(expr, op.spelled)

    def _operator(self, expr: ast.Call, spelled: tuple[str, ...]) -> Expr:
        given: dict[str, ast.Expression] = {}
        names = [n for n in spelled if n != "tensor"]
        tensors = spelled.count("tensor")
        if len(expr.arguments) > len(spelled):
            refuse("E104", f"{expr.function}() takes {len(spelled)} arguments", expr.span)
        given.update(zip(names, expr.arguments[tensors:], strict=False))
        for keyword in expr.keywords:
            if keyword.name not in names:
                unknown_name(keyword.name, keyword.span, names, "argument")
            given[keyword.name] = keyword.value
        missing = [n for n in names if n not in given]
        if len(expr.arguments) < tensors or missing:
            wants = ", ".join(spelled)
            refuse("E104", f"{expr.function}({wants}) needs all its arguments", expr.span)
        arguments = (self.tensor(a) for a in expr.arguments[:tensors])
        attrs = {n: self._size(given[n]) for n in names}
        return self.build(expr, expr.function, *arguments, **attrs)

    def build(self, expr: ast.Expression, op: str, *args: Expr, **attrs: Attribute) -> Expr:
        """`make`, with a mismatch reported where it stands in the source."""
        if any(map(activation, args)) and not OPS[op].tokenwise:
            refuse("E108", f"{op} does not take an activation", expr.span)
        try:
            return make(op, *args, **attrs)
        except Mismatch as mismatch:
            shown = ", ".join(show(a.shape) for a in args)
            refuse("E108", f"shapes do not fit: {mismatch}", expr.span, label=f"{op} of {shown}")
        except ZeroDivisionError:
            refuse("E105", "division by zero", expr.span)

    def subscript(self, expr: ast.Subscript) -> Expr:
        """`A[:, :in]`: a slice of each axis, without a step."""
        value = self.tensor(expr.value)
        bounds: list[Attribute] = []
        for axis, item in zip(value.shape, expr.items, strict=False):
            if item.step is not None:
                refuse("E102", "slices of tensors have no step", item.span)
            start = size(0) if item.start is None else self._size(item.start)
            stop = axis if item.stop is None else self._size(item.stop)
            bounds.append((start, stop))
        bounds += [(size(0), None)] * (len(expr.items) - len(bounds))
        return self.build(expr, "slice", value, bounds=tuple(bounds))

    def _size(self, expr: ast.Expression) -> Size:
        return size(self.number(expr))


_OPERATORS: Mapping[str, str] = {
    "+": "add",
    "-": "sub",
    "*": "mul",
    "/": "div",
    "@": "matmul",
    "**": "power",
}


def _rows_of(op: str) -> Callable[[Elaborator, ast.Call], object]:
    def sugar(self: Elaborator, expr: ast.Call) -> object:
        return _Rows(self.tensor(_only(expr)), op)

    return sugar


def _drop_of(self: Elaborator, expr: ast.Call) -> object:
    return _Drop(size(self.number(_only(expr))))


def _layout_of(self: Elaborator, expr: ast.Call) -> object:
    """`rearrange(A, "pattern", n = …)`; `reduce` takes the reduction after the pattern."""
    texts = [self(a) for a in expr.arguments[1:]]
    wanted = 2 if expr.function == "reduce" else 1
    if len(texts) != wanted or not all(isinstance(t, str) for t in texts):
        refuse("E104", f'{expr.function}(tensor, "pattern", …) is what is meant', expr.span)
    attrs: dict[str, Attribute] = {"pattern": cast(str, texts[0])}
    if wanted == 2:
        attrs["by"] = cast(str, texts[1])
    axes = tuple((k.name, size(self.number(k.value))) for k in expr.keywords)
    return self.build(
        expr, expr.function, self.tensor(expr.arguments[0]), **attrs, axes=cast(Attribute, axes)
    )


def _concat_of(self: Elaborator, expr: ast.Call) -> object:
    axis: object = 0
    for keyword in expr.keywords:
        if keyword.name != "axis":
            unknown_name(keyword.name, keyword.span, ["axis"], "argument")
        axis = scalars.plain(self.number(keyword.value))
    if not isinstance(axis, int) or not expr.arguments:
        refuse("E104", "concat(A, B, …, axis = 0) is what is meant", expr.span)
    return self.build(expr, "concat", *(self.tensor(a) for a in expr.arguments), axis=axis)


def _only(expr: ast.Call) -> ast.Expression:
    if len(expr.arguments) != 1 or expr.keywords:
        refuse("E104", f"{expr.function}() takes one argument", expr.span)
    return expr.arguments[0]


_SUGAR: Mapping[str, Callable[[Elaborator, ast.Call], object]] = {
    "rows": _rows_of("scale_rows"),
    "cols": _rows_of("scale_cols"),
    "drop": _drop_of,
    "rearrange": _layout_of,
    "repeat": _layout_of,
    "reduce": _layout_of,
    "concat": _concat_of,
}


def _numeric(value: object, sizes: Mapping[str, int]) -> object:
    if isinstance(value, Size) and names_in(value) <= sizes.keys():
        return evaluate(value, sizes)
    return value


def _positive(length: Size, span: Span) -> None:
    value = length.number
    if value is not None and value < 1:
        refuse(
            "E111",
            f"a size must be at least 1, and `{span.text}` is {scalars.plain(length)}",
            span,
        )


# --------------------------------------------------------------------- signatures and definitions


@lru_cache(maxsize=512)
def instantiate(
    method: ast.Method,
    arguments: tuple[tuple[str, object], ...],
    sizes: tuple[tuple[str, int], ...] = (),
) -> Equations:
    """A method with its arguments given, at a site of these sizes. Raises DefinitionError.

    The sizes decide conditions such as `in % 8 == 0`; in shapes they stay symbols.
    """
    return Elaborator(dict(arguments), sizes=dict(sizes)).run(method.body)
