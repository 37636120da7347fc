"""What a method says of a site: its parameters, how they begin, and its equations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from surgery.algebra.axes import Size, evaluate
from surgery.algebra.expr import WEIGHT, Expr, Shape, render
from surgery.algebra.kinds import MATRIX, Kind
from surgery.algebra.rates import Rate
from surgery.algebra.scalars import Open
from surgery.errors import Span

FACTS: Mapping[str, Open] = {
    "has_bias": Open("has_bias", "bool"),
    "kind": Open("kind", "text"),
}
"""What conditions may ask of a site beside its sizes: whether its layer adds a bias, its kind."""

COUNTS = ("before", "place", "total")
"""`before(n)`, `total(n)`: sums over the sites of a method; `place()`: how many are before one."""

ENDING = "ending"
"""`ending()`: a text, the end of the site's path; see `Equations`."""

PLACING = frozenset({"largest"})
"""The operators whose values are places in a matrix, row by row: whole numbers."""


def reserved(kind: Kind) -> frozenset[str]:
    """The names that mean something by themselves in an equation of a kind."""
    return frozenset({"layer", *kind.names, *FACTS})


@dataclass(frozen=True, slots=True)
class Random:
    """A random beginning: a distribution with its arguments; with a `seed` it can be redrawn.

    whole: whether whole numbers are drawn. after: how many numbers of 32 bits torch's generator of
    the seed has drawn before, in the largest sizes of all that share it; None where a seed and a
    name have a stream of their own.
    """

    distribution: str
    arguments: tuple[tuple[str, float], ...]
    seed: int | None = None
    whole: bool = False
    after: Size | None = None

    def __str__(self) -> str:
        """As a method writes it."""
        seed = () if self.seed is None else (("seed", self.seed),)
        said = [f"{name}={value:g}" for name, value in (*self.arguments, *seed)]
        given = ", ".join([*said, *(() if self.after is None else (f"after={self.after}",))])
        return f"{self.distribution}({given})"


def drawn_after(beginning: Random, names: Mapping[str, int | float]) -> int | None:
    """How much the generator of a draw has drawn before, in these sizes."""
    return None if beginning.after is None else int(evaluate(beginning.after, names))


@dataclass(frozen=True, slots=True)
class Parameter:
    """A declared parameter: its shape, how it begins, whether it is trained and shared.

    link: which of the methods at the site it is of, where one comes after another; from 0 on.
    declared: its name in that method, where it has another here.
    of: the parameter whose beginning it keeps, which an equation needs after that has moved.
    again: whether that can be made again of the base and of what is in every file.
    rate: what it learns at, where the method says so.
    """

    name: str
    shape: Shape
    beginning: Random | Expr
    trained: bool
    shared: bool
    span: Span = field(compare=False, repr=False)
    link: int = 0
    declared: str = ""
    of: str = ""
    again: bool = False
    rate: Rate | None = None

    @property
    def declared_name(self) -> str:
        """Its name in the method that declares it."""
        return self.declared or self.name

    @property
    def whole(self) -> bool:
        """Whether it is made of whole numbers, which are never rounded to another dtype."""
        begins = self.beginning
        return begins.whole if isinstance(begins, Random) else begins.op in PLACING

    @property
    def redrawn(self) -> bool:
        """Whether it is always what its seed or the base says, so that no file needs to have it."""
        random = isinstance(self.beginning, Random) and self.beginning.seed is not None
        return self.again or (random and not self.trained)

    @property
    def begins(self) -> str:
        """How it begins, as text: a distribution or an expression."""
        beginning = self.beginning
        return render(beginning) if isinstance(beginning, Expr) else str(beginning)


@dataclass(frozen=True, slots=True)
class Share:
    """A number that only all sites together tell; in equations it is a symbol.

    scores: a vector. The number is how many of its elements are among the largest of those of all
        sites, of which there are `count` a site; or, where there is no count, how many of them an
        allocation leaves in the end.
    """

    name: str
    scores: Expr
    count: Size | None


@dataclass(frozen=True, slots=True)
class Total:
    """A number that the sizes of all sites tell; in equations it is a symbol.

    It is the sum of `term` over all sites of the method with equal arguments, or over those before
    this one alone; `every`: over those of whatever arguments.
    """

    name: str
    term: Size
    before: bool
    every: bool = False


@dataclass(frozen=True, slots=True)
class Equations:
    """The parameters in the order declared, and W', b', x', y' where they are given.

    weight [out, in], bias [out], input [tokens, in], output [tokens, out]; None where the site's
    own stays as it is. In `output` x is the input as `input` gives it.
    kind: of the sites; where it is no matrix, input and output are those of its row.
    joins: whether weight comes of a product with y, which mixes rows that groups keep apart.
    start: what W begins as, where a method says so.
    changes: what arguments become when the shares and totals in them are known.
    endings: the arguments that become the end of the site's path.
    """

    parameters: tuple[Parameter, ...]
    weight: Expr | None = None
    bias: Expr | None = None
    input: Expr | None = None
    output: Expr | None = None
    joins: bool = False
    start: Expr = WEIGHT
    changes: tuple[tuple[str, Size], ...] = ()
    shares: tuple[Share, ...] = ()
    totals: tuple[Total, ...] = ()
    endings: tuple[str, ...] = ()
    kind: Kind = MATRIX
