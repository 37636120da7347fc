"""Where in a module a site's matrix lies: which parameter, which matrix of it, which rows.

A weight is seen as `W[out, in]`, or as a batch of such matrices; a bias lies beside its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

from torch import Tensor

ROWS, ENTRIES = -2, -1
"""The axis that counts the rows of a matrix, or of a batch of them; and that of a bias."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `start` to `stop` (exclusive) of each `period` rows of a matrix of `whole` rows.

    name: what the part is called below its module, in paths and keys.
    period: `whole` where the rows stand together; less where those of a head, or of a gate, take
        turns with those of others.
    """

    name: str
    start: int
    stop: int
    whole: int
    period: int

    @staticmethod
    def run(name: str, start: int, stop: int, whole: int) -> Part:
        """Rows that stand together."""
        return Part(name, start, stop, whole, whole)

    @property
    def times(self) -> int:
        """How often the rows come."""
        return self.whole // self.period

    @property
    def length(self) -> int:
        """The number of rows."""
        return (self.stop - self.start) * self.times

    @property
    def fits(self) -> bool:
        """Whether there are such rows."""
        inside = 0 <= self.start < self.stop <= self.period <= self.whole
        return inside and self.whole % self.period == 0

    def of(self, tensor: Tensor, axis: int) -> Tensor:
        """The part of a tensor whose `axis`, counted from the end, counts the rows of the whole.

        A view where the rows stand together.
        """
        if self.times == 1:
            return tensor.narrow(axis, self.start, self.length)
        return self._turns(tensor, axis).flatten(axis - 1, axis)

    def _turns(self, tensor: Tensor, axis: int) -> Tensor:
        """The part's rows, with an axis of `times` before their own; a view."""
        split = cast(Tensor, tensor.unflatten(axis, (self.times, self.period)))
        return split.narrow(axis, self.start, self.stop - self.start)

    def write(self, tensor: Tensor, rows: Tensor, axis: int) -> None:
        """Put rows into a tensor of the whole, in place."""
        into = self._turns(tensor, axis)
        into.copy_(cast(Tensor, rows.unflatten(axis, (self.times, self.stop - self.start))))

    def spans(self) -> Iterator[tuple[int, int]]:
        """The runs of rows, each with its start and end."""
        for first in range(0, self.whole, self.period):
            yield first + self.start, first + self.stop


def overlap(one: Part | None, other: Part | None) -> bool:
    """Whether a row is in both; None is the whole."""
    if one is None or other is None:
        return True
    if one.period == other.period:
        return one.start < other.stop and other.start < one.stop
    runs = sorted([*one.spans(), *other.spans()])
    return any(later[0] < earlier[1] for earlier, later in pairwise(runs))


def cut(part: Part | None, tensor: Tensor, axis: int = ROWS) -> Tensor:
    """The rows of a part; all of them for None."""
    return tensor if part is None else part.of(tensor, axis)


@dataclass(frozen=True, slots=True)
class ParameterSlice:
    """Which part of which parameter of a module is a matrix, or a batch of matrices.

    parameter, bias: the names of the parameters; what is called so may be absent if it is a bias.
    index: the matrix of a batch, if it is one of them alone.
    part: the rows, if not all.
    tensor: whether it is no matrix, but the parameter as it lies, of any number of axes.
    kind: the kind of site that it is, where it is nothing that a parameter holds.
    picked: of a parameter as it lies the entries of its first axis, in their order, if not all.
    """

    parameter: str = "weight"
    bias: str = "bias"
    index: int | None = None
    part: Part | None = None
    tensor: bool = False
    picked: tuple[int, ...] = ()
    kind: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """What it is called below its module: nothing, where it is the matrix of its `weight`."""
        if self.kind:
            return (self.kind,)
        whole = self.parameter == "weight" and not self.tensor
        own = () if whole else (self.parameter,)
        index = () if self.index is None else (str(self.index),)
        picked = (_picked_name(self.picked),) if self.picked else ()
        return (*own, *index, *picked, *(() if self.part is None else (self.part.name,)))

    @property
    def whole(self) -> bool:
        """Whether it is all of its parameter."""
        return self.index is None and self.part is None and not self.picked

    def one(self, stored: Tensor) -> Tensor:
        """The matrix of a batch, or its bias, or what is picked, as it is stored.

        A view, but for entries that do not stand together.
        """
        if self.picked:
            return entries(stored, self.picked)
        return stored if self.index is None else stored.select(0, self.index)

    def put(self, stored: Tensor, one: Tensor) -> None:
        """Put what `one` gives into what is stored, in place."""
        if self.picked:
            stored[list(self.picked)] = one
        else:
            self.one(stored).copy_(one)

    def rows(self, tensor: Tensor, axis: int) -> Tensor:
        """The rows of matrices [..., out, in] or entries of biases [..., out]."""
        return cut(self.part, tensor, axis)

    def meets(self, other: ParameterSlice) -> bool:
        """Whether two slices of one module have some element in common."""
        if (self.parameter, self.kind) != (other.parameter, other.kind):
            return False
        if self.picked and other.picked:
            return not set(self.picked).isdisjoint(other.picked)
        apart = None not in (self.index, other.index) and self.index != other.index
        return not apart and overlap(self.part, other.part)


def run_of(picked: tuple[int, ...]) -> tuple[int, int] | None:
    """Start and end of entries that stand together in order; None if they do not."""
    first, last = picked[0], picked[-1]
    return (first, last + 1) if picked == tuple(range(first, last + 1)) else None


def entries(stored: Tensor, picked: tuple[int, ...]) -> Tensor:
    """Some entries of the first axis of a tensor; a view where they stand together."""
    run = run_of(picked)
    return stored[list(picked)] if run is None else stored.narrow(0, run[0], len(picked))


_NAMED = 4  # more entries are counted, since no two slices of an adapter share their first


def _picked_name(picked: tuple[int, ...]) -> str:
    run = run_of(picked)
    if len(picked) == 1:
        return f"row_{picked[0]}"
    if run is not None:
        return f"rows_{run[0]}_{run[1]}"
    if len(picked) <= _NAMED:
        return f"rows_{'_and_'.join(map(str, picked))}"
    return f"rows_{picked[0]}_and_{len(picked) - 1}_more"


WHOLE = ParameterSlice()
"""All of a layer's weight, with its bias."""
