"""The operator table: shape rule, value, apply and inverse of every operator, one row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.algebra import (
    applying,
    bases,
    chance,
    clustered,
    cuts,
    reproducible,
    rotations,
    rounding,
    shapes,
    undoing,
    values,
)
from surgery.algebra.applying import Applier, Vector
from surgery.algebra.expr import Attribute, Expr
from surgery.algebra.expr import Shape as Symbolic

__all__ = ["OPS", "Op", "through"]

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]

ShapeRule = Callable[[tuple[Expr, ...], Mapping[str, Attribute]], Symbolic]
ValueRule = Callable[..., Tensor]
ApplyRule = Callable[[Applier, Expr, Vector], "Vector | None"]
UndoRule = Callable[[undoing.Build, Expr, int, Expr], "Expr | None"]
Through = Callable[[Expr], "tuple[int, ...] | None"]
Work = Callable[[Shape, Shapes], int]


# ------------------------------------------------------------------------------------- through


def _alone(expr: Expr) -> tuple[int, ...]:
    return ()


def _first(expr: Expr) -> tuple[int, ...]:
    return (0,)


def _second(expr: Expr) -> tuple[int, ...]:
    return (1,)


def _both(expr: Expr) -> tuple[int, ...] | None:
    # A number that is added to a matrix is one in every place, and has no structure to use.
    return None if any(a.is_scalar for a in expr.args) else (0, 1)


def _beside_number(expr: Expr) -> tuple[int, ...] | None:
    left, right = expr.args
    if right.is_scalar:
        return (0,)
    return (1,) if left.is_scalar and expr.op == "mul" else None


# ---------------------------------------------------------------------------------------- work


def _elements(shape: Shape, arguments: Shapes) -> int:
    return prod(shape)


def _rows(shape: Shape, arguments: Shapes) -> int:
    return shape[0]


def _matmul_work(shape: Shape, arguments: Shapes) -> int:
    return prod(shape) * arguments[0][-1]


def _inverse_work(shape: Shape, arguments: Shapes) -> int:
    return 2 * prod(shape) * shape[-1]


def _powers_work(shape: Shape, arguments: Shapes) -> int:
    return prod(shape) * shape[-1]


def _factorisation_work(shape: Shape, arguments: Shapes) -> int:
    return 8 * prod(arguments[0]) * min(arguments[0])


def _nothing(shape: Shape, arguments: Shapes) -> int:
    return 0


def _columns(shape: Shape, arguments: Shapes) -> int:
    return shape[1]


def _all_elements(shape: Shape, arguments: Shapes) -> int:
    return sum(map(prod, arguments))


def _kron_work(shape: Shape, arguments: Shapes) -> int:
    (p, q), (s, _) = arguments
    return shape[1] * s + q * p * s


def _fourier_work(shape: Shape, arguments: Shapes) -> int:
    return prod(shape) * prod(shape).bit_length()


def _transformed(shape: Shape, arguments: Shapes) -> int:
    p, q, b = arguments[0]
    return 2 * p * q * (b + 2) + (p + q) * b * b.bit_length()


def _gram_work(shape: Shape, arguments: Shapes) -> int:
    n, r = arguments[0]
    return 2 * n * r * r


def _reflections_work(shape: Shape, arguments: Shapes) -> int:
    return prod(shape) * (1 if len(arguments[0]) == 1 else arguments[0][1])


def _all_twice(shape: Shape, arguments: Shapes) -> int:
    return 2 * prod(arguments[0])


def _butterfly_work(shape: Shape, arguments: Shapes) -> int:
    return shape[0] * prod(arguments[0])


# --------------------------------------------------------------------------------------- table


@dataclass(frozen=True, slots=True)
class Op:
    """One row.

    name: as in `Expr.op`.
    spelled: whether a method may call it by name; the rest is reached by a sign or a sugar.
    shape: arguments and constants to a shape.
    value: `value(facts, *tensors)`; see `values`.
    apply: None where the matrix has no structure to use; see `applying`.
    undo: None where there is no inverse; see `undoing`.
    through: the arguments that `apply` applies in their turn, None where it does not apply after
        all; the others it needs as values.
    numbers: whether its value takes Python numbers beside tensors.
    tokenwise: whether it takes activations, token by token.
    work: multiplications to make the value, from the sizes of the result and the arguments.
    apply_work: multiplications a token of `apply` itself, from the same sizes.
    begins: whether it stands in beginnings alone, being no work for a forward.
    times: the constant that says how often `work` is done; "" for once.
    cut: what a part of the value is made of; None where it needs all arguments whole, see `cuts`.
    exact: a value of the same bits on any machine; None where there is none, see `reproducible`.
    """

    name: str
    shape: ShapeRule
    value: ValueRule
    apply: ApplyRule | None = None
    undo: UndoRule | None = None
    spelled: tuple[str, ...] | None = None
    through: Through = _alone
    numbers: bool = False
    tokenwise: bool = False
    work: Work = _elements
    apply_work: Work = _rows
    begins: bool = False
    times: str = ""
    cut: cuts.Rule | None = None
    exact: ValueRule | None = None


def _elementwise(name: str, function: Callable[[Tensor], Tensor]) -> Op:
    def value(facts: values.Facts, a: Tensor) -> Tensor:
        return function(a)

    return Op(name, shapes.unary, value, spelled=("tensor",), tokenwise=True)


def _factor(name: str, shape: ShapeRule, value: ValueRule) -> Op:
    spelled = ("tensor", "rank")
    return Op(name, shape, value, spelled=spelled, work=_factorisation_work, begins=True)


_T = ("tensor",)
_ROWS: tuple[Op, ...] = (
    Op("add", shapes.same, values.add, applying.add, undoing.add, None, _both, True, True),
    Op("sub", shapes.same, values.sub, applying.sub, undoing.sub, None, _both, True, True),
    Op("neg", shapes.unary, values.neg, applying.neg, undoing.neg, None, _first, True, True),
    Op("mul", shapes.same, values.mul, applying.mul, undoing.mul, None, _beside_number, True, True),
    Op("div", shapes.same, values.div, applying.div, undoing.div, None, _beside_number, True, True),
    Op("power", shapes.unary, values.power, numbers=True, tokenwise=True),
    Op(
        "matmul",
        shapes.matmul,
        values.matmul,
        applying.matmul,
        undoing.matmul,
        through=_both,
        tokenwise=True,
        work=_matmul_work,
        apply_work=_nothing,
    ),
    Op("transpose", shapes.transpose, values.transpose, None, undoing.transpose, _T, work=_nothing),
    Op(
        "scale_rows",
        shapes.scale_rows,
        values.scale_rows,
        applying.scale_rows,
        undoing.scale,
        through=_second,
    ),
    Op(
        "scale_cols",
        shapes.scale_cols,
        values.mul,
        applying.scale_cols,
        undoing.scale,
        through=_second,
        apply_work=_columns,
    ),
    Op("scale", shapes.scale, values.mul, tokenwise=True),
    Op("shift", shapes.scale, values.add, tokenwise=True),
    Op("channelwise", shapes.channelwise, values.channelwise),
    Op("diag", shapes.diag, values.diag, applying.diag, None, _T),
    Op(
        "blockdiag",
        shapes.blockdiag,
        values.blockdiag,
        applying.blockdiag,
        None,
        _T,
        apply_work=_all_elements,
    ),
    Op(
        "kron",
        shapes.kron,
        values.kron,
        applying.kron,
        None,
        ("tensor", "tensor"),
        apply_work=_kron_work,
    ),
    Op(
        "tile",
        shapes.tile,
        values.tile,
        applying.tile,
        None,
        ("tensor", "columns"),
        through=_first,
        apply_work=_columns,
    ),
    Op("eye", shapes.eye, values.eye, applying.eye, None, ("size",), apply_work=_nothing),
    Op("zeros", shapes.unary, values.zeros, work=_nothing),
    Op("drop", shapes.eye, values.eye, applying.drop, None),
    Op("skew", shapes.skew, values.skew, None, None, ("tensor", "size")),
    Op("cayley", shapes.square, values.cayley, None, None, _T, work=_inverse_work),
    Op(
        "neumann",
        shapes.square,
        rotations.neumann,
        spelled=("tensor", "terms"),
        work=_powers_work,
        times="terms",
    ),
    Op("noise", shapes.noise, chance.noise, spelled=_T, tokenwise=True),
    Op(
        "rotate_half",
        shapes.rotate_half,
        values.rotate_half,
        applying.rotate_half,
        undoing.rotate_half,
        ("tensor", "size"),
        through=_first,
        apply_work=_nothing,
    ),
    Op("inverse", shapes.square, values.inverse, None, None, _T, work=_inverse_work),
    Op(
        "householder",
        shapes.householder,
        rotations.householder,
        rotations.reflect,
        None,
        _T,
        work=_reflections_work,
        apply_work=_all_twice,
    ),
    Op("reflectors", shapes.transpose, rotations.reflectors, work=_gram_work),
    Op("orthonormal", shapes.orthonormal, rotations.orthonormal, None, None, _T, work=_gram_work),
    Op("qr", shapes.orthonormal, rotations.qr, None, None, _T, work=_gram_work),
    Op(
        "butterfly",
        shapes.butterfly,
        rotations.butterfly,
        rotations.fly,
        None,
        _T,
        work=_butterfly_work,
        apply_work=_all_elements,
    ),
    _factor("left_singular", shapes.some_columns, values.left_singular),
    _factor("least_left_singular", shapes.some_columns, values.least_left_singular),
    _factor("singular_values", shapes.some, values.singular_values),
    _factor("svd_left", shapes.some_columns, values.svd_left),
    _factor("svd_values", shapes.some, values.svd_values),
    _factor("svd_right", shapes.some_rows, values.svd_right),
    _factor("right_singular", shapes.some_rows, values.right_singular),
    _factor("qr_q", shapes.some_columns, values.qr_q),
    _factor("qr_r", shapes.some_rows, values.qr_r),
    Op(
        "lowrank_left",
        shapes.some_columns,
        clustered.lowrank_left,
        spelled=("tensor", "rank", "seed"),
        work=_factorisation_work,
        begins=True,
    ),
    Op(
        "lowrank_right",
        shapes.some_rows,
        clustered.lowrank_right,
        spelled=("tensor", "rank", "seed"),
        work=_factorisation_work,
        begins=True,
    ),
    Op(
        "clusters",
        clustered.clusters_shape,
        clustered.clusters,
        spelled=("tensor", "k", "steps", "seed"),
        begins=True,
    ),
    Op(
        "principal",
        clustered.principal_shape,
        clustered.principal,
        spelled=("tensor", "tensor", "rank"),
        work=_factorisation_work,
        begins=True,
    ),
    Op(
        bases.COMMON,
        bases.basis_shape,
        bases.common_basis,
        spelled=("tensor", "ridge"),
        work=_factorisation_work,
        begins=True,
    ),
    Op(
        "coordinates",
        bases.coordinates_shape,
        bases.coordinates,
        spelled=("tensor", "tensor"),
        work=_factorisation_work,
        begins=True,
    ),
    Op("ungrouped", clustered.ungrouped_shape, clustered.ungrouped, spelled=("tensor", "tensor")),
    Op("nf4", shapes.transformed, rounding.nf4, spelled=_T, begins=True),
    Op("int8", shapes.transformed, rounding.int8, spelled=_T, begins=True),
    Op("trace", shapes.traced, values.trace, spelled=_T, work=_nothing),
    Op("rearrange", shapes.rearrange, values.layout("rearrange"), None, undoing.rearrange),
    Op("repeat", shapes.repeat, values.layout("repeat")),
    Op("reduce", shapes.reduce, values.layout("reduce")),
    Op("concat", shapes.concat, values.concat, work=_nothing),
    Op("slice", shapes.subscript, values.sliced, work=_nothing),
    Op(
        "scatter",
        shapes.scatter,
        values.scatter,
        spelled=("tensor", "tensor", "rows", "columns"),
        work=_nothing,
    ),
    Op("largest", shapes.largest, values.largest, spelled=("tensor", "count"), begins=True),
    Op("gather", shapes.gather, values.gather, spelled=("tensor", "tensor"), work=_nothing),
    Op(
        "circulant",
        shapes.circulant,
        values.circulant,
        applying.circulant,
        None,
        _T,
        work=_nothing,
        apply_work=_transformed,
    ),
    Op("ifft2", shapes.transformed, values.ifft2, None, None, _T, work=_fourier_work),
    Op("rownorm", shapes.rowwise, values.rownorm, None, None, _T),
    Op("colnorm", shapes.colwise, values.colnorm, None, None, _T),
    Op("stop_gradient", shapes.unary, values.detach, None, undoing.transparent, _T),
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
    _elementwise("softmax", values.softmax),
    Op("topk", shapes.topk, values.topk, spelled=("tensor", "k"), work=_all_elements),
)

OPS: Mapping[str, Op] = {
    row.name: replace(
        row, cut=cuts.CUTS.get(row.name), exact=reproducible.exact(row.name, row.value)
    )
    for row in _ROWS
}


def through(expr: Expr) -> tuple[int, ...] | None:
    """The arguments that applying an expression goes through; None where it is built densely."""
    op = OPS.get(expr.op)
    return None if op is None or op.apply is None else op.through(expr)
