"""Bases of inputs that several matrices have in common, and matrices as these bases see them.

Each is computed on the CPU in the steps of those who make it anew whenever they load, since
eigenvalues that are nearly equal leave it to rounding which basis they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from surgery.algebra.axes import Scalar
from surgery.algebra.expr import Expr, Shape
from surgery.algebra.shapes import Attrs, Mismatch, rank, show
from surgery.algebra.values import Facts

_linalg: Any = torch.linalg  # whose functions carry no types

COMMON = "common_basis"
"""The operator that, of W, may be what all sites share: it is then of the W of all of them."""


def basis_shape(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[m, n] to [n, n]."""
    _, columns = rank(args[0], 2)
    return (columns, columns)


def coordinates_shape(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[m, n] as it is, beside [n, n]."""
    shape, basis = rank(args[0], 2), rank(args[1], 2)
    if basis != (shape[1], shape[1]):
        raise Mismatch(f"{show(basis)} is no basis of the {shape[1]} columns of {show(shape)}")
    return shape


def basis_of(matrices: Sequence[Tensor], ridge: float) -> Tensor:
    """The basis [n, n], float32 on the CPU, of matrices [m, n] with rows of their own.

    It is that of the higher-order singular value decomposition, Rᵀ Z: of all rows A = Q R, and Z
    are the eigenvectors of the mean of (Qᵢᵀ Qᵢ + ridge)⁻¹. Where there are fewer rows than
    columns it is the right singular vectors of A, completed.
    """
    alone = [m.detach().to("cpu", torch.float32) for m in matrices]
    every = torch.cat(alone)
    rows, columns = every.shape
    if rows < columns:
        return _linalg.svd(every, full_matrices=True)[2].T
    q, r = _linalg.qr(every)
    total = torch.zeros(columns, columns)
    for own in q.split([len(m) for m in alone]):
        total += _linalg.inv(own.T @ own + ridge * torch.eye(columns))
    total /= len(alone)
    return r.T @ _linalg.eigh(total)[1]


def common_basis(facts: Facts, a: Tensor) -> Tensor:
    """[m, n] to [n, n]: the basis of one matrix."""
    return basis_of([a], float(facts.number(cast(Scalar, facts.attrs["ridge"])))).to(a)


def coordinates(facts: Facts, a: Tensor, basis: Tensor) -> Tensor:
    """C [m, n] with C Vᵀ = A for a basis V [n, n]; of a singular one by its pseudo-inverse."""
    own, v = a.to("cpu", torch.float64), basis.to("cpu", torch.float64)
    try:
        return _linalg.solve(v, own.T).T.to(a)
    except RuntimeError:
        return (own @ _linalg.pinv(v, rtol=1e-6).T).to(a)
