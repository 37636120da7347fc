"""A part of a layer's weight that is a site by itself: some rows of `W[out, in]`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `start` to `stop` (exclusive) of a matrix of `whole` rows, and of its bias.

    name: what the part is called below its module, in paths and keys.
    """

    name: str
    start: int
    stop: int
    whole: int

    @property
    def length(self) -> int:
        """The number of rows."""
        return self.stop - self.start

    def of(self, tensor: Tensor, axis: int = 0) -> Tensor:
        """The part of a tensor whose `axis` counts the rows of the whole; a view."""
        return tensor.narrow(axis, self.start, self.length)


def overlap(one: Part | None, other: Part | None) -> bool:
    """Whether a row is in both; None is the whole."""
    if one is None or other is None:
        return True
    return one.start < other.stop and other.start < one.stop


def cut(part: Part | None, tensor: Tensor) -> Tensor:
    """The rows of a part; all of them for None."""
    return tensor if part is None else part.of(tensor)
