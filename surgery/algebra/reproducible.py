"""Values in float64 with the same bits on any machine, with any number of threads, in any blocks.

Sums, norms and eliminations are element-wise operations in a fixed order, each of which IEEE 754
rounds alike everywhere; for products see `products`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from surgery.algebra import shapes, values
from surgery.algebra.axes import Size
from surgery.algebra.expr import Expr
from surgery.algebra.products import Kept, near, product
from surgery.algebra.values import Facts

ValueRule = Callable[..., Tensor]

# ----------------------------------------------------------------------------------------- sums


def total(a: Tensor, combine: Callable[[Tensor, Tensor], Tensor] = torch.add) -> Tensor:
    """The sum over the last axis of [..., n], in pairs, pairs of pairs and so on."""
    if not a.shape[-1]:
        return a.sum(-1)
    while (n := a.shape[-1]) > 1:
        half = n // 2
        paired = combine(a[..., :half], a[..., half : 2 * half])
        a = torch.cat((paired, a[..., 2 * half :]), -1) if n % 2 else paired
    return a.squeeze(-1)


def norm(a: Tensor) -> Tensor:
    """The length of each row of [..., n]."""
    wide = a.double()
    close, _, factors = near(wide, -1, torch.empty_like(wide))
    length = total(close * close).sqrt()
    return (length if factors is None else length * factors.squeeze(-1)).to(a.dtype)


def _matmul(facts: Facts, a: Tensor, b: Tensor) -> Tensor:
    return product(a, b, facts.bits, cast("Kept | None", facts.kept))


def _rownorm(facts: Facts, a: Tensor) -> Tensor:
    return norm(a)


def _colnorm(facts: Facts, a: Tensor) -> Tensor:
    return norm(a.transpose(-1, -2))


def _trace(facts: Facts, a: Tensor) -> Tensor:
    return total(a.diagonal(0, -2, -1))


def _reduced(facts: Facts, a: Tensor) -> Tensor:
    by = cast(str, facts.attrs["by"])
    if by in ("max", "min"):
        return values.layout("reduce")(facts, a)
    pattern = cast(str, facts.attrs["pattern"])
    before, after = shapes.parsed_pattern(pattern)
    left = {n for axis in after for n in axis}
    gone = " ".join(n for axis in before for n in axis if n not in left)
    laid = f"{pattern} ({gone})"
    axes = facts.attrs["axes"]
    rows = values.layout("rearrange")(replace(facts, attrs={"pattern": laid, "axes": axes}), a)
    if by == "prod":
        return total(rows, torch.mul)
    summed = total(rows)
    return summed / rows.shape[-1] if by == "mean" else summed


# --------------------------------------------------------------------------------- eliminations


def solved(a: Tensor, b: Tensor) -> Tensor:
    """A⁻¹ B of [..., n, n] and [..., n, m], by Gauss and Jordan's elimination with pivots.

    Of what is singular it is not finite. n³ operations, n at a time: for blocks of up to hundreds.
    """
    n = a.shape[-1]
    both = torch.cat((a, b), -1).double()
    for column in range(n):
        both = _pivoted(both, column)
        row = both[..., column, :] / both[..., column, column, None]
        factors = both[..., :, column].clone()
        factors[..., column] = 0
        both = both - factors.unsqueeze(-1) * row.unsqueeze(-2)
        both[..., column, :] = row
    return both[..., n:].to(a.dtype)


def _pivoted(both: Tensor, column: int) -> Tensor:
    """The row with the largest element of a column, of those from there on, in its place."""
    best = both[..., column:, column].abs().argmax(-1, keepdim=True) + column
    if bool((best == column).all()):
        return both
    here = torch.full_like(best, column)
    order = torch.arange(both.shape[-2], device=both.device).expand(both.shape[:-1]).clone()
    order.scatter_(-1, best, here)
    order[..., column] = best.squeeze(-1)
    return both.gather(-2, order.unsqueeze(-1).expand(both.shape))


def _inverse(facts: Facts, a: Tensor) -> Tensor:
    return solved(a, torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand(a.shape))


def _cayley(facts: Facts, q: Tensor) -> Tensor:
    # X (I + Q) = I - Q, of which both sides are polynomials in Q and change places.
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand(q.shape)
    return solved(one + q, one - q)


def _neumann(facts: Facts, q: Tensor) -> Tensor:
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    made = one.expand(q.shape)
    for _ in range(facts.integer("terms")):
        made = one + product(q, made)
    return made


# -------------------------------------------------------------------------------- orthogonality


def _reflectors(facts: Facts, u: Tensor) -> Tensor:
    """As `rotations.reflectors`, by substitution from below."""
    gram = product(u.transpose(-1, -2), u)
    squares = gram.diagonal(dim1=-2, dim2=-1)
    diagonal = squares / 2 + (squares == 0).to(u.dtype)
    rest = u.transpose(-1, -2).clone()
    for row in range(rest.shape[-2] - 1, -1, -1):
        rest[row] = rest[row] / diagonal[row]
        rest[:row] = rest[:row] - gram[:row, row, None] * rest[row]
    return rest


def _householder(facts: Facts, u: Tensor) -> Tensor:
    one = torch.eye(u.shape[0], dtype=u.dtype, device=u.device)
    if u.ndim > 1:
        return one - product(u, _reflectors(facts, u))
    length = norm(u)
    v = u / (length + (length == 0))
    return one - 2 * (v.unsqueeze(1) * v)


# In every dtype the same; see `rotations`.
_ROUNDING = torch.finfo(torch.float32).eps


def _orthonormal(facts: Facts, u: Tensor) -> Tensor:
    """As `rotations.orthonormal`."""
    lengths, found = norm(u.transpose(0, 1)), u[:, :0]
    for column in range(u.shape[1]):
        rest = u[:, column]
        for _ in range(2):  # once is not orthogonal where little is left
            rest = rest - product(found, product(found.transpose(0, 1), rest))
        left = norm(rest)
        lies = left <= u.shape[0] * _ROUNDING * lengths[column]
        direction = torch.where(lies, 0.0, rest) / torch.where(lies, 1.0, left)
        found = torch.cat((found, direction.unsqueeze(1)), 1)
    return found


# --------------------------------------------------------------------------------------- places


def placed(v: Tensor, flat: Tensor, count: int) -> Tensor:
    """[n] at places of zeros [count]; those at one place are added in their order."""
    made = v.new_zeros((count,))
    order = torch.argsort(flat, stable=True)
    at, v = flat[order], v[order]
    while len(at):
        first = torch.ones_like(at, dtype=torch.bool)
        first[1:] = at[1:] != at[:-1]
        made[at[first]] = made[at[first]] + v[first]
        at, v = at[~first], v[~first]
    return made


def _scatter(facts: Facts, v: Tensor, places: Tensor) -> Tensor:
    rows, columns = facts.shape
    at = places.long()
    flat = at[0] * columns + at[1] if at.ndim > 1 else at
    return placed(v, flat, rows * columns).view(rows, columns)


# ---------------------------------------------------------------------------------------- table


_MOST_FACTORS = 16


def _power(facts: Facts, a: Tensor) -> Tensor:
    exponent = facts.number(cast(Size, facts.attrs["exponent"]))
    if not isinstance(exponent, int) or abs(exponent) > _MOST_FACTORS:
        return values.power(facts, a)
    made = torch.ones_like(a)
    for _ in range(abs(exponent)):
        made = made * a
    return made if exponent >= 0 else 1 / made


_MOVING = (
    "add sub neg mul div transpose scale_rows scale_cols channelwise diag blockdiag kron tile eye"
    " zeros drop skew rotate_half rearrange repeat concat slice gather circulant ungrouped"
    " stop_gradient sqrt abs relu"
)
_SAME = frozenset(_MOVING.split())
"""The operators whose own values are such: moved elements, and what IEEE 754 says the result of."""

_EXACT: Mapping[str, ValueRule] = {
    "matmul": _matmul,
    "rownorm": _rownorm,
    "colnorm": _colnorm,
    "trace": _trace,
    "reduce": _reduced,
    "power": _power,
    "cayley": _cayley,
    "inverse": _inverse,
    "neumann": _neumann,
    "reflectors": _reflectors,
    "householder": _householder,
    "orthonormal": _orthonormal,
    "scatter": _scatter,
}


NAMES = _SAME | _EXACT.keys()
"""The operators with such a value."""


def exact(name: str, value: ValueRule) -> ValueRule | None:
    """The value of an operator with the same bits anywhere; None where it has none.

    None have those that a library approximates: exp, log, sin, cos, tanh and what is made of them,
    transforms, factorizations.
    """
    return value if name in _SAME else _EXACT.get(name)


def is_settled(expr: Expr) -> bool:
    """Whether an operator, of which there is such a value, has it with the constants here."""
    if expr.op != "power":
        return True
    exponent = cast(Size, expr.attr("exponent")).number
    return exponent is not None and exponent.denominator == 1 and abs(exponent) <= _MOST_FACTORS
