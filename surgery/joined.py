"""Parameters that a loaded model makes of a checkpoint's tensors, and where in these they lie.

A parameter may be a tensor under another name, several of them one after the other, or a part of
one, in any order of rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from surgery.checkpoint import Checkpoint
from surgery.file_places import Source, Span, Target, WriteBytes


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows of a tensor, `count` from `row` on, that are a parameter's from `at` on."""

    tensor: str
    row: int
    at: int
    count: int


@dataclass(frozen=True, slots=True)
class Joined:
    """A parameter by the stretches that it is made of, in order, without holes.

    shape: of the parameter, in elements; its rows are all but the last axis, and those of a vector
    its elements. width: elements of a row.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    width: int
    stretches: tuple[Stretch, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the tensors that it is made of, each once."""
        return tuple(dict.fromkeys(s.tensor for s in self.stretches))

    def inside(self, tensor: str) -> tuple[Span, ...]:
        """From which element of the parameter to before which a tensor is."""
        own = (s for s in self.stretches if s.tensor == tensor)
        return tuple((s.at * self.width, (s.at + s.count) * self.width) for s in own)

    def covered(self, tensor: str) -> tuple[Span, ...]:
        """From which element of the tensor to before which the parameter is."""
        own = (s for s in self.stretches if s.tensor == tensor)
        return tuple((s.row * self.width, (s.row + s.count) * self.width) for s in own)

    def source(self, checkpoint: Checkpoint) -> Source:
        """The parameter to be read, in a checkpoint whose tensors may have another dtype by now."""
        own = checkpoint.entry(self.stretches[0].tensor).torch_dtype or self.dtype

        def read(start: int, stop: int, into: Tensor) -> Tensor:
            for s, first, at, count in self._among(start, stop, own.itemsize):
                checkpoint.read_bytes(s.tensor, at, at + count, into[first : first + count])
            return into[: stop - start]

        return Source(own, self.shape, read)

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """All of it."""
        source = self.source(checkpoint)
        data = torch.empty(prod(self.shape) * source.dtype.itemsize, dtype=torch.uint8)
        return source.read(0, data.numel(), data).view(source.dtype).view(self.shape)

    def target(self, tensor: str, dtype: torch.dtype, write: WriteBytes) -> Target:
        """The place of the parameter's rows in one of its tensors; those of others go nowhere."""

        def put(start: int, data: Tensor) -> None:
            whole = data.flatten().view(torch.uint8)
            for s, first, at, count in self._among(start, start + whole.numel(), dtype.itemsize):
                if s.tensor == tensor:
                    write(at, whole[first : first + count])

        return Target(dtype, put)

    def _among(self, start: int, stop: int, size: int) -> Iterator[tuple[Stretch, int, int, int]]:
        """Of bytes of the parameter: the stretch, where in them, where in the tensor, how many."""
        row = self.width * size
        first = bisect_right(self.stretches, start // row, key=lambda s: s.at) - 1
        for s in self.stretches[first:]:
            begin, end = max(start, s.at * row), min(stop, (s.at + s.count) * row)
            if begin >= stop:
                return
            if begin < end:
                yield s, begin - start, s.row * row + begin - s.at * row, end - begin


@dataclass(frozen=True, slots=True)
class Names:
    """A model's parameters by a checkpoint's tensors.

    whole: of those that are a tensor each, its name. joined: the others. shapes: of all, by the
    model's names. refused: those that cannot be merged on files, and why.
    """

    whole: Mapping[str, str] = field(default_factory=dict[str, str])
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = field(
        default_factory=dict[str, tuple[torch.dtype, tuple[int, ...]]]
    )
    joined: Mapping[str, Joined] = field(default_factory=dict[str, Joined])
    refused: Mapping[str, str] = field(default_factory=dict[str, str])

    def instead_of(
        self, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What a checkpoint has by the model's names; what is none of its parameters by its own."""
        joined = (tensor for one in self.joined.values() for tensor in one.tensors)
        taken = {*self.whole.values(), *joined}
        rest = {n: own for n, own in shapes.items() if n not in taken}
        return {**rest, **self.shapes}
