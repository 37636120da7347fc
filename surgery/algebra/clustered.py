"""Rows in clusters: which is in which, their own directions, and rows that stand by clusters.

The k-means and the decomposition by random projections draw as others do, so that what they made
can be made again: each is a value as in `values`, computed on the CPU in float32.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from surgery.algebra import values
from surgery.algebra.axes import Size
from surgery.algebra.expr import Expr, Shape
from surgery.algebra.shapes import Attrs, Mismatch, rank, show
from surgery.algebra.values import Facts

_torch: Any = torch  # some of its functions carry no types

_TOLERANCE = 1e-4  # of the mean variance of a column; when centers move less, they have settled


# --------------------------------------------------------------------------------------- shapes


def clusters_shape(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[m, n] to [m, k]."""
    return (rank(args[0], 2)[0], cast(Size, attrs["k"]))


def principal_shape(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[m, n] and [m, k] to [k * rank, n]."""
    return (rank(args[1], 2)[1] * cast(Size, attrs["rank"]), _grouped(args)[1])


def ungrouped_shape(args: tuple[Expr, ...], attrs: Attrs) -> Shape:
    """[m, n] as it is, beside [m, k]."""
    return _grouped(args)


def _grouped(args: tuple[Expr, ...]) -> Shape:
    shape, (count, _) = rank(args[0], 2), rank(args[1], 2)
    if shape[0] != count:
        raise Mismatch(f"clusters of {count} rows for the {shape[0]} rows of {show(shape)}")
    return shape


# -------------------------------------------------------------------------- random projections


def lowrank_left(facts: Facts, a: Tensor) -> Tensor:
    """[m, n] to [m, rank]: left singular vectors as `torch.svd_lowrank` finds them by its seed."""
    return _lowrank(facts, a)[0].to(a)


def lowrank_right(facts: Facts, a: Tensor) -> Tensor:
    """[m, n] to [rank, n]: right singular vectors as `torch.svd_lowrank` finds them by its seed."""
    return _lowrank(facts, a)[2].T.to(a)


def _lowrank(facts: Facts, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with _torch.random.fork_rng(devices=[]):
        _torch.manual_seed(facts.integer("seed"))
        return _torch.svd_lowrank(a.float().cpu(), q=facts.integer("rank"), niter=2)


# ------------------------------------------------------------------------------------- k-means


def clusters(facts: Facts, a: Tensor) -> Tensor:
    """[m, n] to [m, k]: a 1 where a row is in a cluster; at most `steps` steps of Lloyd's k-means.

    The first centers are k of the rows, drawn as NumPy's RandomState(seed) does; the steps, and the
    labels of the clusters, are those of scikit-learn's `KMeans(init="random", n_init=1)`.
    """
    k = facts.integer("k")
    x = a.float().cpu()
    x = x - x.mean(0)
    generator = torch.Generator().manual_seed(facts.integer("seed"))
    labels = _settled(x, x[_different(len(x), k, generator)], facts.integer("steps"))
    return torch.nn.functional.one_hot(labels, k).to(a)


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    """Numbers in [0, 1) of 53 bits, of two outputs of the Mersenne twister each, as NumPy's."""
    drawn = torch.empty(count, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    first, second = (drawn >> 32) & 0xFFFFFFFF, drawn & 0xFFFFFFFF
    return ((first >> 5) * 2**26 + (second >> 6)).double() / 2**53


def _different(count: int, wanted: int, generator: torch.Generator) -> list[int]:
    """So many different places of `count`, as NumPy's `choice` with equal parts draws them."""
    found = list[int]()
    parts = torch.full((count,), 1 / count, dtype=torch.float32).double()
    while len(found) < wanted:
        parts[found] = 0
        ends = parts.cumsum(0)
        drawn = _uniform(wanted - len(found), generator)
        places = torch.searchsorted(ends / ends[-1], drawn, right=True)
        found += dict.fromkeys(map(int, places))
    return found


def _settled(x: Tensor, centers: Tensor, steps: int) -> Tensor:
    """The cluster of each row [m], from centers [k, n]."""
    least, before = _TOLERANCE * x.var(0, correction=0).mean(), None
    for _ in range(steps):
        labels = _nearest(x, centers)
        moved = _centers(x, labels, centers)
        shift, centers = (moved - centers).square().sum(), moved
        if before is not None and torch.equal(labels, before):
            return labels
        if shift <= least:
            break
        before = labels
    return _nearest(x, centers)


def _nearest(x: Tensor, centers: Tensor) -> Tensor:
    return (centers.square().sum(1) - 2 * x @ centers.T).argmin(1)


def _centers(x: Tensor, labels: Tensor, before: Tensor) -> Tensor:
    """The mean of each cluster; of one that is empty the row that is farthest from its center."""
    members = torch.nn.functional.one_hot(labels, len(before)).to(x)
    far = (x - before[labels]).square().sum(1)
    empty = (members.sum(0) == 0).nonzero().flatten()
    if len(empty) and bool(far.max() > 0):
        rows = far.topk(len(empty)).indices
        members[rows] = 0
        members[rows, empty] = 1
    sizes = members.sum(0)
    means = members.T @ x / sizes.clamp(min=1).unsqueeze(1)
    return torch.where((sizes > 0).unsqueeze(1), means, means[sizes.argmax()])


# ------------------------------------------------------------------------------ rows by clusters


def principal(facts: Facts, a: Tensor, members: Tensor) -> Tensor:
    """[m, n] and clusters [m, k] to [k * rank, n]: of the rows of each their first directions.

    There are no more directions than rows; the others are zeros.
    """
    places = torch.arange(facts.integer("rank"), device=a.device).unsqueeze(1)
    made = list[Tensor]()
    for part in members.T:
        own = values.right_singular(facts, part.unsqueeze(1) * a)
        made.append(torch.where(places < part.sum(), own, 0.0))
    return torch.cat(made)


def ungrouped(facts: Facts, a: Tensor, members: Tensor) -> Tensor:
    """[m, n], whose rows stand cluster by cluster, with each row where the clusters [m, k] say."""
    order = torch.argsort(members.argmax(-1), stable=True)
    return torch.zeros_like(a).index_copy(0, order, a)
