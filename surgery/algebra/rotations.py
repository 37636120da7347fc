"""Orthogonal matrices: products of reflections, orthonormal columns, butterflies of blocks.

Each is a value as in `values` and, where it can be applied to a vector, a rule as in `applying`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.algebra import values
from surgery.algebra.applying import Applier, Vector
from surgery.algebra.applying import householder as reflected
from surgery.algebra.expr import Expr, node
from surgery.algebra.values import Facts, called, wide_dtype

_linalg: Any = torch.linalg  # its functions carry no types


# -------------------------------------------------------------------------------- reflections


def reflectors(facts: Facts, u: Tensor) -> Tensor:
    """[n, r] to the R [r, n] with which I - U R is the product of the columns' reflections.

    R = T⁻¹ Uᵀ, where T has the upper triangle of Uᵀ U and half of its diagonal: Joffrin and Low's
    form of the product, "Blocking the Householder method", of columns of any length. Of a column of
    length 0 there is no reflection, and its row is 0.
    """
    return called(_reflectors, u)


def _reflectors(u: Tensor) -> Tensor:
    wide = u.to(wide_dtype(u))
    with _unnarrowed(u.device):  # what is solved is not to be narrow
        gram = wide.transpose(-1, -2) @ wide
    squares = gram.diagonal(dim1=-2, dim2=-1)
    t = gram.triu(1) + torch.diag_embed(squares / 2 + (squares == 0).to(wide.dtype))
    solved: Tensor = _linalg.solve_triangular(t, wide.transpose(-1, -2), upper=True)
    return solved.to(u.dtype)


def _unnarrowed(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast, which some devices (meta) do not have."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def neumann(facts: Facts, q: Tensor) -> Tensor:
    """I + Q + Q² + … + Q^terms of [..., n, n]: what (I - Q)^-1 begins with."""
    one = q.new_ones((facts.shape[-1],)).diag()
    total = one.expand(facts.shape)
    for _ in range(facts.integer("terms")):
        total = one + torch.matmul(q, total)
    return total


def householder(facts: Facts, u: Tensor) -> Tensor:
    """I - 2 u uᵀ / |u|² of [n]; of [n, r] the product of its columns' reflections, as [n, n].

    Of zeros it is the identity.
    """
    if len(facts.arguments[0]) == 1:
        return values.householder(facts, u)
    one = u.new_ones((facts.shape[0],)).diag()
    return one - torch.matmul(u, called(_reflectors, u))


def reflect(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    """The reflection of x; of several columns x - U (R x)."""
    columns = expr.args[0]
    if len(columns.shape) == 1:
        return reflected(go, expr, v)
    made = node("reflectors", (columns,), columns.shape[::-1])

    def through_columns(x: Tensor) -> Tensor:
        inner = F.linear(x, go.value(made))  # [..., r]
        return x - F.linear(inner, go.value(columns))

    return go.mapped(expr, v, through_columns)


def orthonormal(facts: Facts, u: Tensor) -> Tensor:
    """Gram and Schmidt's orthonormal columns of [n, r], r ≤ n: each spans with those before it.

    A column that lies in what those before it span is 0: what is left of it is rounding alone, and
    has no direction.
    """
    return called(_orthonormal, u)


# In every dtype the same, or a merge in a wider one would see directions where a forward sees none.
_ROUNDING = torch.finfo(torch.float32).eps


def _orthonormal(u: Tensor) -> Tensor:
    wide = u.to(wide_dtype(u))
    with _unnarrowed(u.device):
        lengths, found = _linalg.vector_norm(wide, dim=0), wide[:, :0]
        for column in range(wide.shape[1]):
            rest = wide[:, column]
            for _ in range(2):  # once is not orthogonal where little is left
                rest = rest - found @ (found.transpose(0, 1) @ rest)
            left = _linalg.vector_norm(rest)
            lies = left <= wide.shape[0] * _ROUNDING * lengths[column]
            direction = torch.where(lies, 0.0, rest) / torch.where(lies, 1.0, left)
            found = torch.cat((found, direction.unsqueeze(1)), 1)
    return found.to(u.dtype)


def qr(facts: Facts, u: Tensor) -> Tensor:
    """Q of u = Q R for [n, r], r ≤ n, with the signs that reflections leave and torch gives."""
    return called(_qr, u)


def _qr(u: Tensor) -> Tensor:
    return _linalg.qr(u.to(wide_dtype(u)))[0].to(u.dtype)


# ---------------------------------------------------------------------------------- butterflies


def butterfly(facts: Facts, blocks: Tensor) -> Tensor:
    """[m, n, b, b] to the product F_0 F_1 ... of [n b, n b]; see `_factor`."""
    one = blocks.new_ones((facts.shape[0],)).diag()
    return _through(one, blocks, facts.arguments[0]).transpose(-1, -2)


def fly(go: Applier, expr: Expr, v: Vector) -> Vector | None:
    """Factor by factor, the last first."""
    blocks = expr.args[0]
    shape = go.facts(expr).arguments[0]
    return go.mapped(expr, v, lambda x: _through(x, go.value(blocks), shape))


def _through(x: Tensor, blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
    for level in range(shape[0] - 1, -1, -1):
        x = _factor(x, torch.select(blocks, -4, level), level, shape)
    return x


def _factor(x: Tensor, blocks: Tensor, level: int, shape: tuple[int, ...]) -> Tensor:
    """F_level x = P B Pᵀ x of [..., n b], for the blocks [n, b, b] of the diagonal B.

    P takes half-blocks of b / 2 in groups of 2^(level + 1), those of even place before the others.
    """
    _, n, b, _ = shape
    half = 2**level
    if level:
        x = _exchanged(x, (-1, 2, half, b // 2))
    parts = cast(Tensor, x.unflatten(-1, (n, b))).unsqueeze(-2)  # [..., n, 1, b]
    x = torch.matmul(parts, blocks.transpose(-1, -2)).flatten(-3)
    return _exchanged(x, (-1, half, 2, b // 2)) if level else x


def _exchanged(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The last axis in four, of which the middle two change places."""
    return cast(Tensor, x.unflatten(-1, sizes)).transpose(-2, -3).flatten(-4)
