"""Every operator by itself: its value against plain torch, its shape rule, its inverse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from surgery.algebra import shapes
from surgery.algebra.axes import Size, size
from surgery.algebra.cost import numbers
from surgery.algebra.expr import (
    BIAS,
    CHANNELS,
    IN,
    OUT,
    WEIGHT,
    Expr,
    Shape,
    node,
    number,
    parameter,
    zeros,
)
from surgery.algebra.interpret import Domain, Evaluator
from surgery.algebra.ops import OPS, through
from surgery.algebra.rounding import NF4
from surgery.algebra.rules import make
from surgery.algebra.shapes import Mismatch

SITE = {"in": 6, "out": 15, "channels": 2}
untyped: Any = torch
linalg: Any = torch.linalg


def tensor(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5


def p(name: str, *shape: int | Size) -> Expr:
    return parameter(name, tuple(map(size, shape)))


def leaf(expr: Expr) -> Tensor:
    name = expr.text("name") if expr.op == "parameter" else expr.op
    return tensor(numbers(expr, SITE), sum(map(ord, name)))


def value(expr: Expr, leaves: Callable[[Expr], Tensor] = leaf) -> Tensor:
    domain = Domain(SITE, leaves, lambda: torch.zeros((), dtype=torch.float64))
    return Evaluator(domain).value(expr)


def skewed(v: Tensor, n: int) -> Tensor:
    square = torch.zeros((*v.shape[:-1], n, n), dtype=v.dtype)
    at = 0
    for i in range(n):
        for j in range(i + 1, n):
            square[..., i, j] = v[..., at]
            square[..., j, i] = -v[..., at]
            at += 1
    return square


def turned(q: Tensor) -> Tensor:
    one = torch.eye(q.shape[-1], dtype=q.dtype)
    return (one - q) @ linalg.inv(one + q)


def powers_to_three(q: Tensor) -> Tensor:
    return torch.eye(3, dtype=q.dtype) + q + q @ q + q @ q @ q


def reflection(u: Tensor) -> Tensor:
    return torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(u, u) / u.dot(u)


def blocks_of(s: Tensor) -> Tensor:
    return untyped.block_diag(*s)


def signed(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of which the largest element of each u is above 0."""
    u, s, v = linalg.svd(a, full_matrices=False)
    for i in range(len(s)):
        if u[:, i][u[:, i].abs().argmax()] < 0:
            u[:, i], v[i] = -u[:, i], -v[i]
    return u, s, v


def narrow(a: Tensor) -> list[Tensor]:
    """The same in float32, with whatever signs torch gives."""
    return [part.double() for part in linalg.svd(a.float(), full_matrices=False)]


def positive(a: Tensor) -> tuple[Tensor, Tensor]:
    """Q and R by the process of Gram and Schmidt, so that R's diagonal is above 0."""
    q = torch.zeros_like(a)
    for i in range(a.shape[1]):
        rest = a[:, i] - q[:, :i] @ (q[:, :i].T @ a[:, i])
        q[:, i] = rest / rest.square().sum().sqrt()
    return q, q.T @ a


def reflected_by(u: Tensor) -> Tensor:
    """R of I - U R, the reflections by the columns one after the other."""
    product = torch.eye(len(u), dtype=u.dtype)
    for column in u.T:
        product = product @ reflection(column)
    return linalg.pinv(u) @ (torch.eye(len(u), dtype=u.dtype) - product)


def flown(blocks: Tensor) -> Tensor:
    """The factors of a butterfly of eight, each with its permutation written out."""
    product = torch.eye(8, dtype=blocks.dtype)
    for level, order in zip(blocks, ("01234567", "02134657", "02461357"), strict=True):
        mixed = torch.eye(8, dtype=blocks.dtype)[list(map(int, order))]
        product = product @ mixed @ blocks_of(level) @ mixed.T
    return product


def projected(a: Tensor) -> tuple[Tensor, Tensor]:
    """Two singular vectors of each side, as torch finds them after a seed of 3."""
    with untyped.random.fork_rng(devices=[]):
        untyped.manual_seed(3)
        u, _, v = untyped.svd_lowrank(a.float(), q=2, niter=2)
    return u.double(), v.T.double()


def in_clusters(a: Tensor) -> Tensor:
    """Which of 3 clusters each of 15 rows is in, after ten steps from rows that NumPy draws."""
    parts = np.full(15, 1 / 15)
    centers = a[np.random.RandomState(5).choice(15, 3, replace=False, p=parts)]
    nearest = list[int]()
    for _ in range(10):
        nearest = [int((row - centers).square().sum(1).argmin()) for row in a]
        members = [[a[i] for i in range(15) if nearest[i] == k] for k in range(3)]
        centers = torch.stack([torch.stack(rows).mean(0) for rows in members])
    return torch.eye(3, dtype=a.dtype)[nearest]


def directions_of(a: Tensor, members: Tensor) -> Tensor:
    """The first two of each cluster's own."""
    return torch.cat([signed(torch.diag(column) @ a)[2][:2] for column in members.T])


def ungrouped(a: Tensor, members: Tensor) -> Tensor:
    """One row after the other, in the order of the clusters."""
    label = list(map(int, members.argmax(1)))
    found = torch.zeros_like(a)
    for row, place in enumerate(sorted(range(len(a)), key=lambda i: (label[i], i))):
        found[place] = a[row]
    return found


def nearest_codes(a: Tensor) -> Tensor:
    """Each of 64 elements in turn as the nearest code, by trying all of them."""
    flat, made = a.flatten(), list[Tensor]()
    for block in (flat[:64], flat[64:]):
        codes = torch.tensor(NF4, dtype=a.dtype) * block.abs().max()
        nearest = (block[:, None] - codes).abs().argmin(1)
        made.append(codes[nearest])
    return torch.cat(made).view_as(a)


def whole_parts(a: Tensor) -> Tensor:
    """Each row as whole parts of a 127th of its largest element."""
    return torch.stack([(row / row.abs().max() * 127).round() / 127 * row.abs().max() for row in a])


def largest_two(a: Tensor) -> Tensor:
    second = a.sort(descending=True)[0][:, 1:2]
    return torch.where(a >= second, a, -torch.inf)


def rolled(kernel: Tensor) -> Tensor:
    return torch.stack([kernel.roll(i) for i in range(len(kernel))])


def transformed(a: Tensor) -> Tensor:
    (m, n), (i, j) = a.shape, (torch.arange(k, dtype=a.dtype) for k in a.shape)
    turns = torch.outer(i, i)[:, None, :, None] / m + torch.outer(j, j)[None, :, None, :] / n
    return (torch.cos(2 * torch.pi * turns) * a).sum((2, 3)) / (m * n)


BLOCKS_OF_FOUR = p("k", 2, 3, 4)
A, B, C = p("A", OUT, 3), p("B", 3, IN), p("C", OUT, 3)
V, U, ROW = p("V", OUT), p("U", IN), p("R", 3)
BLOCKS, SQUARE = p("S", 3, 5, 2), p("Q", 3, 3)
TALL = p("T", IN, 4)
SKEW = p("Z", 7, 3)  # of more rows than columns
AXES: tuple[tuple[str, Size], ...] = (("n", size(3)),)


def right_directions(a: Tensor) -> Tensor:
    """Of one matrix Q has orthonormal columns, so that every basis is as good: R itself, turned."""
    r = linalg.qr(a.float())[1]
    q = linalg.qr(a.float())[0]
    ridged = q.T @ q + 0.5 * torch.eye(a.shape[1])
    return (r.T @ linalg.eigh(linalg.inv(ridged))[1]).double()


# For each operator: an expression, and the same in plain torch.
Case = tuple[Expr, Callable[..., Tensor]]


def one(expr: Expr, plain: Callable[[Tensor], Tensor]) -> Case:
    return expr, plain


def two(expr: Expr, plain: Callable[[Tensor, Tensor], Tensor]) -> Case:
    return expr, plain


def none(expr: Expr, plain: Callable[[], Tensor]) -> Case:
    return expr, plain


CASES: dict[str, Case] = {
    "add": two(make("add", A, C), lambda a, c: a + c),
    "sub": two(make("sub", A, C), lambda a, c: a - c),
    "neg": one(make("neg", A), lambda a: -a),
    "mul": two(make("mul", A, C), lambda a, c: a * c),
    "div": two(make("div", A, C), lambda a, c: a / c),
    "power": one(make("power", A, exponent=size(3)), lambda a: a**3),
    "matmul": two(make("matmul", A, B), lambda a, b: a @ b),
    "transpose": one(make("transpose", A), lambda a: a.T),
    "scale_rows": two(make("scale_rows", V, A), lambda v, a: torch.diag(v) @ a),
    "scale_cols": two(make("scale_cols", ROW, A), lambda v, a: a @ torch.diag(v)),
    "scale": two(node("scale", (U, p("X", 4, IN)), (size(4), IN)), lambda u, x: x * u),
    "shift": two(node("shift", (U, p("X", 4, IN)), (size(4), IN)), lambda u, x: x + u),
    "channelwise": one(
        make("channelwise", p("L", CHANNELS)),
        lambda v: v.repeat_interleave(3),
    ),
    "diag": one(make("diag", V), torch.diag),
    "blockdiag": one(make("blockdiag", BLOCKS), lambda s: blocks_of(s)),
    "kron": two(make("kron", p("K", 3, 2), p("L", 5, 3)), torch.kron),
    "tile": one(make("tile", TALL, columns=OUT), lambda t: torch.cat([t] * 4, 1)[:, :15]),
    "eye": none(make("eye", size=IN), lambda: torch.eye(6, dtype=torch.float64)),
    "zeros": none(zeros((IN, OUT)), lambda: torch.zeros(6, 15, dtype=torch.float64)),
    "drop": none(make("drop", size=IN, p=size(0.5)), lambda: torch.eye(6, dtype=torch.float64)),
    "skew": one(make("skew", p("v", 2, 6), size=size(4)), lambda v: skewed(v, 4)),
    "cayley": one(
        make("cayley", make("skew", p("v", 2, 6), size=size(4))),
        lambda v: turned(skewed(v, 4)),
    ),
    "neumann": one(make("neumann", p("Q", 2, 3, 3), terms=size(3)), powers_to_three),
    "noise": one(node("noise", (p("X", 4, IN),), (size(4), IN)), torch.zeros_like),
    "rotate_half": one(
        make("rotate_half", p("A6", 12, 3), size=size(6)),
        lambda a: torch.cat([-a[3:6], a[:3], -a[9:], a[6:9]]),
    ),
    "inverse": one(make("inverse", SQUARE), linalg.inv),
    "householder": one(make("householder", V), reflection),
    "reflectors": one(make("reflectors", SKEW), reflected_by),
    "orthonormal": one(make("orthonormal", SKEW), lambda a: positive(a)[0]),
    "qr": one(make("qr", SKEW), lambda a: linalg.qr(a)[0]),
    "butterfly": one(make("butterfly", p("F", 3, 4, 2, 2)), flown),
    "left_singular": one(make("left_singular", SKEW, rank=size(2)), lambda a: signed(a)[0][:, :2]),
    "least_left_singular": one(
        make("least_left_singular", SKEW, rank=size(2)), lambda a: signed(a)[0][:, 1:]
    ),
    "svd_left": one(make("svd_left", SKEW, rank=size(2)), lambda a: narrow(a)[0][:, :2]),
    "svd_values": one(make("svd_values", SKEW, rank=size(2)), lambda a: narrow(a)[1][:2]),
    "svd_right": one(make("svd_right", SKEW, rank=size(2)), lambda a: narrow(a)[2][:2]),
    "singular_values": one(
        make("singular_values", SKEW, rank=size(2)), lambda a: linalg.svdvals(a)[:2]
    ),
    "right_singular": one(make("right_singular", SKEW, rank=size(2)), lambda a: signed(a)[2][:2]),
    "qr_q": one(make("qr_q", SKEW, rank=size(2)), lambda a: positive(a)[0][:, :2]),
    "qr_r": one(make("qr_r", SKEW, rank=size(2)), lambda a: positive(a)[1][:2]),
    "lowrank_left": one(
        make("lowrank_left", SKEW, rank=size(2), seed=size(3)), lambda a: projected(a)[0]
    ),
    "lowrank_right": one(
        make("lowrank_right", SKEW, rank=size(2), seed=size(3)), lambda a: projected(a)[1]
    ),
    "clusters": one(make("clusters", A, k=size(3), steps=size(10), seed=size(5)), in_clusters),
    "principal": two(make("principal", A, p("m", OUT, 2), rank=size(2)), directions_of),
    "common_basis": one(make("common_basis", SKEW, ridge=size(0.5)), right_directions),
    "coordinates": two(make("coordinates", A, SQUARE), lambda a, v: linalg.solve(v, a.T).T),
    "ungrouped": two(make("ungrouped", A, p("m", OUT, 4)), ungrouped),
    "nf4": one(make("nf4", p("N", 7, 11)), nearest_codes),
    "int8": one(make("int8", p("N", 7, 11)), whole_parts),
    "trace": one(make("trace", SQUARE), lambda a: a[0, 0] + a[1, 1] + a[2, 2]),
    "rearrange": one(
        make("rearrange", A, pattern="(n a) r -> r n a", axes=AXES),
        lambda a: rearrange(a, "(n a) r -> r n a", n=3),
    ),
    "repeat": one(
        make("repeat", A, pattern="o r -> o (n r)", axes=AXES),
        lambda a: repeat(a, "o r -> o (n r)", n=3),
    ),
    "reduce": one(
        make("reduce", A, pattern="(n a) r -> r n", by="sum", axes=AXES),
        lambda a: rearrange(a, "(n a) r -> r n a", n=3).sum(-1),
    ),
    "concat": two(
        make("concat", A, make("tile", TALL, columns=size(3)), axis=0),
        lambda a, t: torch.cat([a, t[:, :3]]),
    ),
    "slice": one(
        make("slice", A, bounds=((size(2), OUT), (size(0), size(2)))),
        lambda a: a[2:, :2],
    ),
    "rownorm": one(make("rownorm", A), lambda a: (a * a).sum(1).sqrt()),
    "colnorm": one(make("colnorm", A), lambda a: (a * a).sum(0).sqrt()),
    "stop_gradient": one(make("stop_gradient", A), lambda a: a),
    "exp": one(make("exp", A), torch.exp),
    "log": one(make("log", A), torch.log),
    "sqrt": one(make("sqrt", A), torch.sqrt),
    "abs": one(make("abs", make("neg", A)), lambda a: a.abs()),
    "sin": one(make("sin", A), torch.sin),
    "cos": one(make("cos", A), torch.cos),
    "tanh": one(make("tanh", A), torch.tanh),
    "sigmoid": one(make("sigmoid", A), torch.sigmoid),
    "relu": two(make("relu", make("sub", A, C)), lambda a, c: (a - c).clamp(min=0)),
    "gelu": one(make("gelu", A), lambda a: a * (1 + torch.erf(a / 2**0.5)) / 2),
    "silu": one(make("silu", A), lambda a: a * torch.sigmoid(a)),
    "softmax": one(make("softmax", A), lambda a: F.softmax(a, -1)),
    "topk": one(make("topk", A, k=size(2)), largest_two),
    "scatter": two(
        make("scatter", p("c", 4), p("e", 2, 4), rows=OUT, columns=IN),
        lambda c, e: torch.zeros(15, 6, dtype=c.dtype).index_put(
            (e[0].long(), e[1].long()), c, accumulate=True
        ),
    ),
    "largest": one(
        make("largest", A, count=size(4)),
        lambda a: a.flatten().argsort(descending=True)[:4].double(),
    ),
    "gather": two(make("gather", p("v", 5), p("i", 2, 3)), lambda v, i: v[i.long() % 5]),
    "circulant": one(
        make("circulant", BLOCKS_OF_FOUR),
        lambda k: torch.cat([torch.cat([rolled(b) for b in row], 1) for row in k]),
    ),
    "ifft2": one(make("ifft2", A), transformed),
}


def leaves_of(expr: Expr) -> list[Expr]:
    """The parameters in the order in which they stand."""
    if expr.op == "parameter":
        return [expr]
    return [leaf for arg in expr.args for leaf in leaves_of(arg)]


def test_every_operator_has_its_case() -> None:
    assert CASES.keys() == OPS.keys()


@pytest.mark.parametrize("name", OPS)
def test_the_value_is_that_of_plain_torch(name: str) -> None:
    expr, plain = CASES[name]
    arguments = leaves_of(expr)
    expected = plain(*map(leaf, dict.fromkeys(arguments)))
    found = value(expr)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", OPS)
def test_the_shape_rule_gives_the_shape_of_the_value(name: str) -> None:
    expr, _ = CASES[name]
    assert numbers(expr, SITE) == tuple(value(expr).shape)


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if op.shape is shapes.unary])
def test_a_number_is_taken_where_a_tensor_without_axes_is(name: str) -> None:
    """A rewrite may leave a number in the place of a tensor."""
    total = make("reduce", ROW, pattern="r -> ", by="sum", axes=())
    nothing = make("mul", number(0), total)
    shape: Shape = ()
    attrs = (("exponent", size(2)),) if name == "power" else ()
    arguments = () if name == "zeros" else (nothing,)
    found = value(node("add", (total, node(name, arguments, shape, attrs)), shape))
    assert found.shape == ()


@pytest.mark.parametrize(
    ("op", "args", "attrs", "reason"),
    [
        ("add", (A, B), {}, "differ, and there is no broadcasting"),
        ("mul", (A, V), {}, "no broadcasting"),
        ("matmul", (A, A), {}, "inner sizes 3 and out differ"),
        ("matmul", (V, A), {}, "needs a matrix on its left"),
        ("matmul", (BLOCKS, p("S2", 4, 2, 3)), {}, "leading axes"),
        ("transpose", (V,), {}, "at least 2 axes"),
        ("inverse", (A,), {}, "not square"),
        ("cayley", (A,), {}, "not square"),
        ("coordinates", (A, A), {}, "[out, 3] is no basis of the 3 columns of [out, 3]"),
        ("ungrouped", (A, SQUARE), {}, "clusters of 3 rows for the out rows of [out, 3]"),
        ("scale_rows", (ROW, A), {}, "3 factors for the out rows"),
        ("scale_cols", (V, A), {}, "out factors for the 3 columns"),
        ("channelwise", (V,), {}, "needs [channels]"),
        ("diag", (A,), {}, "needs 1 axes"),
        ("blockdiag", (A,), {}, "needs 3 axes"),
        ("kron", (A, V), {}, "needs 2 axes"),
        ("scatter", (ROW, SQUARE), {"rows": OUT, "columns": IN}, "have places [2, 3], not [3, 3]"),
        ("gather", (A, V), {}, "needs 1 axes"),
        ("largest", (V,), {"count": size(2)}, "needs 2 axes"),
        ("circulant", (A,), {}, "needs 3 axes"),
        ("ifft2", (ROW,), {}, "needs 2 axes"),
        ("topk", (number(1),), {"k": size(1)}, "at least 1 axes"),
        ("rotate_half", (BLOCKS,), {"size": size(2)}, "a vector or a matrix"),
        ("neumann", (A,), {"terms": size(2)}, "not square"),
        ("noise", (A,), {}, "varies from token to token, and [out, 3] does not"),
        ("skew", (ROW,), {"size": size(4)}, "has 6 entries, not 3"),
        ("concat", (A, B), {"axis": 1}, "differ beside axis 1"),
        ("concat", (A, B), {"axis": 5}, "no axis 5"),
        ("slice", (B,), {"bounds": ((size(0), size(4)),)}, "does not lie in an axis of 3"),
        ("slice", (B,), {"bounds": ((size(2), size(2)),)}, "does not lie in an axis of 3"),
        ("rearrange", (A,), {"pattern": "o r", "axes": ()}, "not a pattern"),
        ("rearrange", (A,), {"pattern": "o r -> r", "axes": ()}, "only on the left"),
        ("rearrange", (A,), {"pattern": "o r -> r o n", "axes": AXES}, "only on the right"),
        ("rearrange", (A,), {"pattern": "o o -> o", "axes": ()}, "stands twice"),
        ("rearrange", (A,), {"pattern": "(o r -> r o", "axes": ()}, "not closed"),
        ("rearrange", (A,), {"pattern": "((o) r) -> r o", "axes": ()}, "cannot be read at `(`"),
        ("rearrange", (A,), {"pattern": "o 2 -> 2 o", "axes": ()}, "cannot be read at `2`"),
        ("rearrange", (A,), {"pattern": "... r -> r ...", "axes": ()}, "cannot be read at `.`"),
        ("rearrange", (A,), {"pattern": "o -> o", "axes": ()}, "names 1 axes"),
        ("rearrange", (A,), {"pattern": "(a b) r -> a b r", "axes": ()}, "more than one size"),
        ("rearrange", (A,), {"pattern": "o r -> r o", "axes": AXES}, "has no axis n"),
        ("rearrange", (B,), {"pattern": "n i -> i n", "axes": (("n", size(2)),)}, "is 2, and"),
        ("repeat", (A,), {"pattern": "o r -> o r n", "axes": ()}, "add n = …"),
        ("reduce", (A,), {"pattern": "o r -> o", "by": "median", "axes": ()}, "not `median`"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    op: str, args: tuple[Expr, ...], attrs: Mapping[str, Any], reason: str
) -> None:
    with pytest.raises(Mismatch) as caught:
        make(op, *args, **attrs)
    assert reason in str(caught.value)


def test_names_that_python_or_einops_keep_are_good_axes() -> None:
    axes = (("pattern", size(3)),)
    expr = make("rearrange", A, pattern="(pattern in) axis -> in axis pattern", axes=axes)
    torch.testing.assert_close(value(expr), rearrange(leaf(A), "(n a) r -> a r n", n=3))


# ------------------------------------------------------------------------------------ inverses

TARGET = parameter("target", WEIGHT.shape)

# For each operator that can be undone: an expression over W, and the argument in which W is.
UNDONE: dict[str, tuple[Expr, int]] = {
    "add": (make("add", WEIGHT, p("M", OUT, IN)), 0),
    "sub": (node("sub", (p("M", OUT, IN), WEIGHT), WEIGHT.shape), 1),
    "neg": (make("neg", WEIGHT), 0),
    "mul": (make("mul", p("M", OUT, IN), WEIGHT), 1),
    "div": (node("div", (p("M", OUT, IN), WEIGHT), WEIGHT.shape), 1),
    "matmul": (make("matmul", make("householder", V), WEIGHT), 1),
    "transpose": (make("transpose", WEIGHT), 0),
    "scale_rows": (make("scale_rows", V, WEIGHT), 1),
    "scale_cols": (make("scale_cols", U, WEIGHT), 1),
    "rearrange": (
        make(
            "rearrange",
            WEIGHT,
            pattern="(n a) (c d) -> d (a n) c",
            axes=(
                ("n", size(3)),
                ("d", size(2)),
            ),
        ),
        0,
    ),
    "stop_gradient": (make("stop_gradient", WEIGHT), 0),
    "rotate_half": (make("rotate_half", make("transpose", WEIGHT), size=IN), 0),
}


def test_every_inverse_has_its_case() -> None:
    assert UNDONE.keys() == {n for n, op in OPS.items() if op.undo is not None}


@pytest.mark.parametrize("name", UNDONE)
def test_undoing_gives_the_argument_back(name: str) -> None:
    expr, index = UNDONE[name]
    undo = OPS[expr.op].undo
    assert undo is not None
    target = parameter("target", expr.shape)
    back = undo(make, expr, index, target)
    assert back is not None
    made = value(expr)

    def known(e: Expr) -> Tensor:
        return made if e is target else leaf(e)

    assert back.shape == expr.args[index].shape
    torch.testing.assert_close(value(back, known), value(expr.args[index]))


@pytest.mark.parametrize(("op", "other"), [("sub", 0), ("div", 0), ("matmul", 0)])
def test_the_other_side_is_undone_too(op: str, other: int) -> None:
    beside = make("eye", size=IN) if op == "matmul" else p("M", OUT, IN)
    beside = make("add", beside, p("N", IN, IN)) if op == "matmul" else beside
    expr = make(op, WEIGHT, beside)
    undo = OPS[op].undo
    assert undo is not None
    back = undo(make, expr, other, TARGET)
    assert back is not None
    made = value(expr)
    found = value(back, lambda e: made if e is TARGET else leaf(e))
    torch.testing.assert_close(found, leaf(WEIGHT))


def test_what_is_not_square_is_not_undone() -> None:
    undo = OPS["matmul"].undo
    assert undo is not None
    assert undo(make, make("matmul", A, B), 0, TARGET) is None


# --------------------------------------------------------------------------------------- table


def test_apply_goes_through_arguments_that_there_are() -> None:
    for expr, _ in CASES.values():
        assert all(i < len(expr.args) for i in through(expr) or ())


def test_a_product_of_two_matrices_by_elements_has_no_structure() -> None:
    assert through(make("mul", A, C)) is None
    assert through(make("mul", number(2), A)) == (1,)
    assert through(make("div", A, make("reduce", V, pattern="o -> ", by="max", axes=()))) == (0,)
    assert through(WEIGHT) is None
    assert through(BIAS) is None
