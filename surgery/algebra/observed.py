"""What a beginning may read beside W and b: what data shows of a site, and numbers drawn at random.

Each is a leaf: it has no arguments, and a value only while parameters begin. What data shows is
gone afterwards, so it can be made again from no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from surgery.algebra.axes import Size, size
from surgery.algebra.equations import Equations, Parameter
from surgery.algebra.expr import IN, INPUT, OUT, WEIGHT, Expr, Shape, node, walk


@dataclass(frozen=True, slots=True)
class Sight:
    """What data shows of one thing at a site.

    of: what it is asked of, x or W. shape: of its value.
    """

    of: Expr
    shape: Shape


SIGHTS: Mapping[str, Sight] = {
    "comoment": Sight(INPUT, (IN, IN)),
    "moment": Sight(INPUT, (IN, IN)),
    "gradient": Sight(WEIGHT, (OUT, IN)),
}
"""`comoment(x)` is Σ (x - m)(x - m)ᵀ over all inputs, m their mean; `moment(x)` the mean over all
calls of the layer of Σ x xᵀ, the inputs of each call divided by the largest of their elements;
`gradient(W)` the mean over all batches of the gradient of the loss."""

DRAWN = "gaussian"
"""`gaussian(m, n)`: a matrix of independent normal numbers, others wherever it is written."""

LEAVES = frozenset({*SIGHTS, DRAWN})


def sight(name: str) -> Expr:
    """A leaf that stands for what data shows. KeyError for an unknown name."""
    return node(name, (), SIGHTS[name].shape)


def gaussian(rows: Size, columns: Size, number: int) -> Expr:
    """A leaf of normal numbers; those of one number are the same."""
    return node(DRAWN, (), (rows, columns), (("number", size(number)),))


def seen(roots: Iterable[Expr]) -> frozenset[str]:
    """The names of all that data must show for some expressions to have a value."""
    return frozenset(e.op for root in roots for e in walk(root)) & SIGHTS.keys()


def seen_by(equations: Equations) -> frozenset[str]:
    """The names of all that data must show for a site to begin."""
    return seen([*_beginnings(equations.parameters), *(s.scores for s in equations.shares)])


def _beginnings(parameters: Iterable[Parameter]) -> Iterator[Expr]:
    return (p.beginning for p in parameters if isinstance(p.beginning, Expr))


def is_lasting(beginning: Expr) -> bool:
    """Whether it can be computed again later: it reads no data, and draws nothing."""
    return all(e.op not in LEAVES for e in walk(beginning))
