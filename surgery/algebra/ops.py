"""The operator table: shape rule, value, apply and inverse of every operator, one row each.

A value works on tensors and on `torch.fx` proxies alike, so it takes its sizes from `Facts` and
never from a tensor. `apply` acts on a vector without building the matrix; an operator without one
is built densely. `undo` solves `op(…, a, …) = target` for the argument `a`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.algebra import shapes
from surgery.algebra.axes import Scalar
from surgery.algebra.expr import IN, Attribute, Expr, Shape, number

_ONE = number(1)
_MINUS_ONE = number(-1)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a value may know besides its arguments: sizes in elements, constants as numbers."""

    shape: tuple[int, ...]
    arguments: tuple[tuple[int, ...], ...]
    attrs: Mapping[str, Attribute]
    anchor: Tensor  # of the dtype and device to make constants in
    number: Callable[[Scalar], int | float]

    def integer(self, name: str) -> int:
        """A constant that is a whole size."""
        return int(self.number(cast(Scalar, self.attrs[name])))


@dataclass(frozen=True, eq=False, slots=True)
class Vector:
    """One vector a token, on the way through an equation.

    tensor: [..., n], or [..., groups, n] while `grouped`; if `raw`, the site's own input in
        whatever form its kind takes, with `factor` [..., 1] to multiply what is read from it;
        `changed` if it is no longer just as it came.
    narrow: whether it may be in the dtype of the site's output, and not of the parameters.
    offset: a constant vector [n] still to be added; None for none.
    """

    tensor: Tensor
    raw: bool = False
    grouped: bool = False
    changed: bool = False
    narrow: bool = False
    factor: Tensor | None = None
    offset: Expr | None = None


class Applier(Protocol):
    """What an apply rule may ask of the interpreter."""

    def value(self, expr: Expr) -> Tensor:
        """The dense value."""
        ...

    def apply(self, expr: Expr, v: Vector) -> Vector:
        """The matrix `expr` [m, n] by v."""
        ...

    def features(self, v: Vector) -> Vector | None:
        """v with its features on the last axis; None where the input has no such form."""
        ...

    def scale(self, factors: Expr, v: Vector) -> Vector | None:
        """Each element of v by a factor [n]; None where the input cannot be scaled."""
        ...

    def base(self, v: Vector) -> Vector | None:
        """W by v; None where v is not in a form the site takes."""
        ...

    def drop(self, probability: float, v: Vector) -> Vector:
        """Dropout, active in training."""
        ...

    def multiply(self, factor: Expr, v: Vector) -> Vector:
        """v by a number."""
        ...

    def add(self, left: Vector, right: Vector, alpha: int) -> Vector:
        """left + alpha * right."""
        ...

    def mapped(self, expr: Expr, v: Vector, function: Callable[[Tensor], Tensor]) -> Vector | None:
        """A function that is `expr` on features; None where v has none or its rows are grouped."""
        ...

    def facts(self, expr: Expr) -> Facts:
        """The sizes of an expression."""
        ...


Build = Callable[..., Expr]
ShapeRule = Callable[[tuple[Expr, ...], Mapping[str, Attribute]], Shape]
ValueRule = Callable[..., Tensor]
ApplyRule = Callable[[Applier, Expr, Vector], "Vector | None"]
Work = Callable[[tuple[int, ...], tuple[tuple[int, ...], ...]], int]
UndoRule = Callable[[Build, Expr, int, Expr], "Expr | None"]


@dataclass(frozen=True, slots=True)
class Op:
    """One row.

    name: as in `Expr.op`.
    spelled: whether a method may call it by name; the rest is reached by a sign or a sugar.
    shape: arguments and constants to a shape.
    value: `value(facts, *tensors)`.
    apply: None where the matrix has no structure to use.
    undo: None where there is no inverse.
    through: the arguments that `apply` applies in their turn; the others it needs as values.
    tokenwise: whether it takes activations, token by token.
    work: multiplications to make the value, from the sizes of the result and the arguments.
    apply_work: multiplications a token of `apply` itself, from the same sizes.
    """

    name: str
    shape: ShapeRule
    value: ValueRule
    apply: ApplyRule | None = None
    undo: UndoRule | None = None
    spelled: tuple[str, ...] | None = None
    through: tuple[int, ...] = ()
    tokenwise: bool = False
    work: Work = lambda shape, arguments: prod(shape)
    apply_work: Work = lambda shape, arguments: shape[0]


# ---------------------------------------------------------------------------- sums, products


def _apply_add(go: Applier, expr: Expr, v: Vector) -> Vector:
    left, right = expr.args
    return go.add(go.apply(left, v), go.apply(right, v), 1)


def _apply_sub(go: Applier, expr: Expr, v: Vector) -> Vector:
    left, right = expr.args
    return go.add(go.apply(left, v), go.apply(right, v), -1)


def _apply_neg(go: Applier, expr: Expr, v: Vector) -> Vector:
    applied = go.apply(expr.args[0], v)
    return go.multiply(_MINUS_ONE, applied)


def _apply_mul(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    left, right = expr.args
    if left.is_scalar:
        return go.multiply(left, go.apply(right, v))
    if right.is_scalar:
        return go.multiply(right, go.apply(left, v))
    return None


def _apply_matmul(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    left, right = expr.args
    if go.features(v) is None and right.shape[0] == IN and not _passes(right):
        return None  # patches and indices can be read by a matrix once, and not be mixed before
    return go.apply(left, go.apply(right, v))


def _passes(expr: Expr) -> bool:
    """Whether a map of the input space into itself is diagonal, so that any input takes it."""
    match expr.op:
        case "drop" | "eye":
            return True
        case "diag":
            return expr.args[0].op == "channelwise"
        case "matmul":
            return all(map(_passes, expr.args))
        case _:
            return False


def _apply_scale_rows(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    return go.scale(expr.args[0], go.apply(expr.args[1], v))


def _apply_scale_cols(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    scaled = go.scale(expr.args[0], v)
    return None if scaled is None else go.apply(expr.args[1], scaled)


def _undo_add(build: Build, expr: Expr, index: int, target: Expr) -> Expr:
    return build("sub", target, expr.args[1 - index])


def _undo_sub(build: Build, expr: Expr, index: int, target: Expr) -> Expr:
    if index == 0:
        return build("add", target, expr.args[1])
    return build("sub", expr.args[0], target)


def _undo_neg(build: Build, expr: Expr, index: int, target: Expr) -> Expr:
    del expr, index
    return build("neg", target)


def _undo_mul(build: Build, expr: Expr, index: int, target: Expr) -> Expr:
    return build("div", target, expr.args[1 - index])


def _undo_div(build: Build, expr: Expr, index: int, target: Expr) -> Expr:
    if index == 0:
        return build("mul", target, expr.args[1])
    return build("div", expr.args[0], target)


def _undo_matmul(build: Build, expr: Expr, index: int, target: Expr) -> Expr | None:
    other = expr.args[1 - index]
    if len(other.shape) < 2 or other.shape[-1] != other.shape[-2]:
        return None
    inverse = build("inverse", other)
    return build("matmul", target, inverse) if index == 0 else build("matmul", inverse, target)


def _undo_transpose(build: Build, expr: Expr, index: int, target: Expr) -> Expr:
    del expr, index
    return build("transpose", target)


def _undo_scale(build: Build, expr: Expr, index: int, target: Expr) -> Expr | None:
    if index == 0:
        return None
    reciprocal = build("div", _ONE, expr.args[0])
    return build(expr.op, reciprocal, target)


def _undo_transparent(build: Build, expr: Expr, index: int, target: Expr) -> Expr:
    del build, expr, index
    return target


def _undo_rearrange(build: Build, expr: Expr, index: int, target: Expr) -> Expr:
    del index
    before, _, after = expr.text("pattern").partition("->")
    known = tuple(shapes.axis_sizes(expr.args[0].shape, dict(expr.attrs)).items())
    return build("rearrange", target, pattern=f"{after.strip()} -> {before.strip()}", axes=known)


def _value_mul(facts: Facts, a: Tensor, b: Tensor) -> Tensor:
    del facts
    return a * b


def _value_scale_rows(facts: Facts, v: Tensor, m: Tensor) -> Tensor:
    del facts
    return v.unsqueeze(-1) * m


def _value_matmul(facts: Facts, a: Tensor, b: Tensor) -> Tensor:
    del facts
    return torch.matmul(a, b)


def _value_add(facts: Facts, a: Tensor, b: Tensor) -> Tensor:
    del facts
    return a + b


def _value_sub(facts: Facts, a: Tensor, b: Tensor) -> Tensor:
    del facts
    return a - b


def _value_div(facts: Facts, a: Tensor, b: Tensor) -> Tensor:
    del facts
    return a / b


def _value_neg(facts: Facts, a: Tensor) -> Tensor:
    del facts
    return -a


def _value_transpose(facts: Facts, a: Tensor) -> Tensor:
    del facts
    return a.transpose(-1, -2)


def _value_power(facts: Facts, a: Tensor) -> Tensor:
    return a ** facts.number(cast(Scalar, facts.attrs["exponent"]))


# ------------------------------------------------------------------------ structured matrices


def _value_channelwise(facts: Facts, v: Tensor) -> Tensor:
    (length,), ((channels,),) = facts.shape, facts.arguments
    return v if length == channels else v.repeat_interleave(length // channels)


def _value_diag(facts: Facts, v: Tensor) -> Tensor:
    del facts
    return torch.diag_embed(v)


def _apply_diag(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    return go.scale(expr.args[0], v)


def _value_blockdiag(facts: Facts, blocks: Tensor) -> Tensor:
    # [n, p, q] -> [p, q, n, n] -> [n, p, n, q]
    spread = torch.diag_embed(blocks.permute(1, 2, 0)).permute(2, 0, 3, 1)
    return spread.reshape(facts.shape)


def _apply_blockdiag(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    blocks = expr.args[0]
    n, _, q = go.facts(expr).arguments[0]

    def blockwise(x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (n, q)).unsqueeze(-2)  # [..., n, 1, q]
        return torch.matmul(parts, go.value(blocks).transpose(-1, -2)).flatten(-3)

    return go.mapped(expr, v, blockwise)


def _value_kron(facts: Facts, a: Tensor, b: Tensor) -> Tensor:
    del facts
    return torch.kron(a.contiguous(), b.contiguous())


def _apply_kron(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    a, b = expr.args
    (_, q), (_, t) = go.facts(expr).arguments

    def two_products(x: Tensor) -> Tensor:
        inner = F.linear(x.unflatten(-1, (q, t)), go.value(b))  # [..., q, s]
        return torch.matmul(go.value(a), inner).flatten(-2)  # [..., p, s]

    return go.mapped(expr, v, two_products)


def _value_tile(facts: Facts, m: Tensor) -> Tensor:
    rows, columns = facts.shape
    width = facts.arguments[0][1]
    copies = -(-columns // width)
    tiled = m.repeat(1, copies)
    return tiled if copies * width == columns else tiled.narrow(1, 0, columns)


def _apply_tile(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    if expr.shape[1] == IN and v.grouped:
        return None
    features = go.features(v)
    if features is None:
        return None
    facts = go.facts(expr)
    columns, width = facts.shape[1], facts.arguments[0][1]
    copies = -(-columns // width)
    x = features.tensor
    if copies * width > columns:
        x = F.pad(x, (0, copies * width - columns))
    summed = x.unflatten(-1, (copies, width)).sum(-2)  # [..., width]
    return go.apply(expr.args[0], replace(features, tensor=summed))


def _value_eye(facts: Facts) -> Tensor:
    return facts.anchor.new_ones((facts.shape[0],)).diag()


def _apply_eye(go: Applier, expr: Expr, v: Vector) -> Vector:
    del go, expr
    return v


def _value_zeros(facts: Facts) -> Tensor:
    return facts.anchor.new_zeros(facts.shape)


def _apply_drop(go: Applier, expr: Expr, v: Vector) -> Vector:
    probability = expr.attr("p")
    return go.drop(float(go.facts(expr).number(cast(Scalar, probability))), v)


def _value_skew(facts: Facts, v: Tensor) -> Tensor:
    b = facts.integer("size")
    lead = facts.shape[:-2]
    upper = torch.triu_indices(b, b, 1, device=v.device)
    flat = v.new_zeros((*lead, b * b)).index_copy(-1, upper[0] * b + upper[1], v)
    square = flat.unflatten(-1, (b, b))
    return square - square.transpose(-1, -2)


def _value_cayley(facts: Facts, q: Tensor) -> Tensor:
    one = q.new_ones((facts.shape[-1],)).diag()
    return torch.linalg.solve(one + q, one - q, left=False)


def _value_inverse(facts: Facts, a: Tensor) -> Tensor:
    del facts
    return torch.linalg.inv(a)


def _value_householder(facts: Facts, u: Tensor) -> Tensor:
    unit = u / torch.linalg.vector_norm(u)
    return u.new_ones((facts.shape[0],)).diag() - 2 * torch.outer(unit, unit)


def _apply_householder(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    def reflect(x: Tensor) -> Tensor:
        u = go.value(expr.args[0])
        unit = u / torch.linalg.vector_norm(u)
        return x - 2 * torch.matmul(x, unit).unsqueeze(-1) * unit

    return go.mapped(expr, v, reflect)


# ------------------------------------------------------------------------- layout and slices


def _layout(name: str) -> ValueRule:
    def value(facts: Facts, a: Tensor) -> Tensor:
        sizes = {n: int(facts.number(s)) for n, s in shapes.given_axes(facts.attrs).items()}
        pattern = cast(str, facts.attrs["pattern"])
        return _einops(name, a, pattern, cast("str | None", facts.attrs.get("by")), sizes)

    return value


def _einops(name: str, a: Tensor, pattern: str, by: str | None, sizes: dict[str, int]) -> Tensor:
    import einops
    from torch import fx

    function = cast(Callable[..., Tensor], getattr(einops, name))
    rest = (pattern,) if by is None else (pattern, by)
    if isinstance(a, fx.Proxy):  # einops looks for a backend by type, and a proxy has none
        return cast(Tensor, a.tracer.create_proxy("call_function", function, (a, *rest), sizes))
    return function(a, *rest, **sizes)


def _value_concat(facts: Facts, *parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=cast(int, facts.attrs["axis"]))


def _value_slice(facts: Facts, a: Tensor) -> Tensor:
    bounds = cast(tuple[tuple[Scalar, Scalar | None], ...], facts.attrs["bounds"])
    for axis, (start, _) in enumerate(bounds):
        length = facts.shape[axis]
        if length != facts.arguments[0][axis]:
            a = a.narrow(axis, int(facts.number(start)), length)
    return a


# ------------------------------------------------------------------------ norms, nonlinearities


def _value_rownorm(facts: Facts, a: Tensor) -> Tensor:
    del facts
    return torch.linalg.vector_norm(a, dim=-1)


def _value_colnorm(facts: Facts, a: Tensor) -> Tensor:
    del facts
    return torch.linalg.vector_norm(a, dim=-2)


def _value_detach(facts: Facts, a: Tensor) -> Tensor:
    del facts
    return a.detach()


def _elementwise(name: str, function: Callable[[Tensor], Tensor]) -> Op:
    def value(facts: Facts, a: Tensor) -> Tensor:
        del facts
        return function(a)

    return Op(name, shapes.unary, value, spelled=("tensor",), tokenwise=True)


def _softmax(a: Tensor) -> Tensor:
    return torch.softmax(a, -1)


def _matmul_work(shape: tuple[int, ...], arguments: tuple[tuple[int, ...], ...]) -> int:
    return prod(shape) * arguments[0][-1]


def _inverse_work(shape: tuple[int, ...], arguments: tuple[tuple[int, ...], ...]) -> int:
    del arguments
    return 2 * prod(shape) * shape[-1]


def _nothing(shape: tuple[int, ...], arguments: tuple[tuple[int, ...], ...]) -> int:
    del shape, arguments
    return 0


def _columns(shape: tuple[int, ...], arguments: tuple[tuple[int, ...], ...]) -> int:
    del arguments
    return shape[1]


def _all_elements(shape: tuple[int, ...], arguments: tuple[tuple[int, ...], ...]) -> int:
    del shape
    return sum(map(prod, arguments))


def _kron_work(shape: tuple[int, ...], arguments: tuple[tuple[int, ...], ...]) -> int:
    (p, q), (s, _) = arguments
    return shape[1] * s + q * p * s


_T = ("tensor",)
_BOTH = (0, 1)
_ROWS: tuple[Op, ...] = (
    Op("add", shapes.same, _value_add, _apply_add, _undo_add, through=_BOTH, tokenwise=True),
    Op("sub", shapes.same, _value_sub, _apply_sub, _undo_sub, through=_BOTH, tokenwise=True),
    Op("neg", shapes.unary, _value_neg, _apply_neg, _undo_neg, through=(0,), tokenwise=True),
    Op("mul", shapes.same, _value_mul, _apply_mul, _undo_mul, through=_BOTH, tokenwise=True),
    Op("div", shapes.same, _value_div, None, _undo_div, tokenwise=True),
    Op("power", shapes.unary, _value_power, tokenwise=True),
    Op(
        "matmul",
        shapes.matmul,
        _value_matmul,
        _apply_matmul,
        _undo_matmul,
        through=_BOTH,
        tokenwise=True,
        work=_matmul_work,
        apply_work=_nothing,
    ),
    Op("transpose", shapes.transpose, _value_transpose, None, _undo_transpose, _T, work=_nothing),
    Op(
        "scale_rows",
        shapes.scale_rows,
        _value_scale_rows,
        _apply_scale_rows,
        _undo_scale,
        through=(1,),
    ),
    Op(
        "scale_cols",
        shapes.scale_cols,
        _value_mul,
        _apply_scale_cols,
        _undo_scale,
        through=(1,),
        apply_work=_columns,
    ),
    Op("scale", shapes.scale, _value_mul, tokenwise=True),
    Op("channelwise", shapes.channelwise, _value_channelwise),
    Op("diag", shapes.diag, _value_diag, _apply_diag, None, _T),
    Op(
        "blockdiag",
        shapes.blockdiag,
        _value_blockdiag,
        _apply_blockdiag,
        None,
        _T,
        apply_work=_all_elements,
    ),
    Op(
        "kron",
        shapes.kron,
        _value_kron,
        _apply_kron,
        None,
        ("tensor", "tensor"),
        apply_work=_kron_work,
    ),
    Op(
        "tile",
        shapes.tile,
        _value_tile,
        _apply_tile,
        None,
        ("tensor", "columns"),
        through=(0,),
        apply_work=_columns,
    ),
    Op("eye", shapes.eye, _value_eye, _apply_eye, None, ("size",), apply_work=_nothing),
    Op("zeros", shapes.unary, _value_zeros, work=_nothing),
    Op("drop", shapes.eye, _value_eye, _apply_drop, None),
    Op("skew", shapes.skew, _value_skew, None, None, ("tensor", "size")),
    Op("cayley", shapes.square, _value_cayley, None, None, _T, work=_inverse_work),
    Op("inverse", shapes.square, _value_inverse, None, None, _T, work=_inverse_work),
    Op("householder", shapes.diag, _value_householder, _apply_householder, None, _T),
    Op("rearrange", shapes.layout, _layout("rearrange"), None, _undo_rearrange),
    Op("repeat", shapes.layout, _layout("repeat")),
    Op("reduce", shapes.layout, _layout("reduce")),
    Op("concat", shapes.concat, _value_concat),
    Op("slice", shapes.subscript, _value_slice),
    Op("rownorm", shapes.rowwise, _value_rownorm, None, None, _T),
    Op("colnorm", shapes.colwise, _value_colnorm, None, None, _T),
    Op("stop_gradient", shapes.unary, _value_detach, None, _undo_transparent, _T),
    _elementwise("exp", torch.exp),
    _elementwise("log", torch.log),
    _elementwise("sqrt", torch.sqrt),
    _elementwise("abs", torch.abs),
    _elementwise("sin", torch.sin),
    _elementwise("cos", torch.cos),
    _elementwise("tanh", torch.tanh),
    _elementwise("sigmoid", torch.sigmoid),
    _elementwise("relu", F.relu),
    _elementwise("gelu", F.gelu),
    _elementwise("silu", F.silu),
    _elementwise("softmax", _softmax),
)

OPS: Mapping[str, Op] = {row.name: row for row in _ROWS}
