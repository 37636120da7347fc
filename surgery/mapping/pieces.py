"""Tensors that a file has in several, under keys that one key of a format stands for.

In a key `{:n}` stands for the numbers below n: the pieces are the tensor, cut evenly along its
first axis. A parameter C [rows, n] that has a 1 where a row is in a group says more: the pieces of
`{:n by C}` are the rows of one group each, and those of `{:n within C}` even ones of what a group
has. As a group of few rows has no more directions than these, the file then has no more columns
(`by`) or rows (`within`) than rows in the group, and what is beyond them is 0.

`{places, weights of n}` stands for the two names: of each last axis the file has the n largest
alone, under the one their places, under the other their softmax without the last, for all add up
to 1. Read, they are logarithms, and the others lie so far below that they are never among them.

`{places, sizes = n}` stands for two names as well: the tensor, and beside each of its rows n, which
is how long the axis is that the row has places of.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.errors import refuse

_NUMBERED = re.compile(r"\{:(\w+)((?: (?:by|within) \w+)?)\}")
_MEASURED = re.compile(r"\{(\w+), (\w+) = (\w+)\}")
_CHOSEN = re.compile(r"\{(\w+), (\w+) of (\w+)\}")

_LEAST, _BELOW = 1e-30, -1e4  # a weight of nothing has no logarithm; and float16 ends at 65504

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pieces:
    """The keys of a tensor's pieces in their order.

    by: the parameter that has the groups, or "". within: whether pieces are even all the same.
    """

    keys: tuple[str, ...]
    by: str = ""
    within: bool = False

    def shapes(self, whole: Shape, groups: Sequence[int]) -> list[Shape]:
        """The shape of each piece of a tensor, with groups of so many rows, if there are any."""
        even, rest = whole[0] // len(self.keys), whole[1:]
        if not self.by:
            return [(even, *rest)] * len(self.keys)
        if self.within:
            return [(min(even, rows), *rest) for rows in groups]
        return [(rows, *(min(rows, length) for length in rest)) for rows in groups]

    def fit(self, found: Mapping[str, Shape], whole: Shape) -> bool:
        """Whether the shapes of some tensors can be those of all pieces of one."""
        if not found.keys() >= set(self.keys) or not all(found[key] for key in self.keys):
            return False
        rows = [found[key][0] for key in self.keys]
        if [found[key] for key in self.keys] != self.shapes(whole, rows):
            return False
        return self.within or sum(rows) == whole[0]

    def joined(self, whole: Shape, parts: Sequence[Tensor]) -> Tensor:
        """The tensor that some pieces are."""
        even = whole[0] // len(self.keys)
        made = list[Tensor]()
        for part in parts:
            full = part.new_zeros(even if self.within else len(part), *whole[1:])
            full[tuple(slice(length) for length in part.shape)] = part
            made.append(full)
        return torch.cat(made)

    def cut(self, tensor: Tensor, groups: Sequence[int]) -> dict[str, Tensor]:
        """The pieces by their keys. Raises ArtifactError (E518) where more than zeros is lost."""
        even = [len(tensor) // len(self.keys)] * len(self.keys)
        own = torch.split(tensor, list(groups if self.by and not self.within else even))
        shapes = self.shapes(tuple(tensor.shape), groups)
        found = dict[str, Tensor]()
        for key, part, shape in zip(self.keys, own, shapes, strict=True):
            found[key] = part[tuple(map(slice, shape))].contiguous()
            if bool(part.count_nonzero() != found[key].count_nonzero()):
                message = f"`{key}` has no place for more directions than it has rows"
                refuse("E518", message, hint="set those beyond to 0, or keep the native form")
        return found


@dataclass(frozen=True, slots=True)
class Largest:
    """The keys of the places and of the weights of the largest elements, so many of them."""

    keys: tuple[str, str]
    count: int
    by: str = ""
    within: bool = False

    def shapes(self, whole: Shape, groups: Sequence[int]) -> list[Shape]:
        """The shape of the places, and of the weights."""
        del groups
        return [(*whole[:-1], self.count), (*whole[:-1], self.count - 1)]

    def fit(self, found: Mapping[str, Shape], whole: Shape) -> bool:
        """Whether the shapes of some tensors can be those of both."""
        return [found.get(key) for key in self.keys] == self.shapes(whole, ())

    def joined(self, whole: Shape, parts: Sequence[Tensor]) -> Tensor:
        """The logarithms. Raises ArtifactError (E518) for places that are none."""
        places, weights = parts[0].long(), parts[1]
        if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < whole[-1]:
            message = f"`{self.keys[0]}` has places outside of {whole[-1]}"
            refuse("E518", message, hint="its config and its tensors were not saved together")
        every = torch.cat((weights, 1 - weights.sum(-1, keepdim=True)), -1)
        least = every.new_full(whole, _BELOW)
        return least.scatter(-1, places, every.clamp(min=_LEAST).log())

    def cut(self, tensor: Tensor, groups: Sequence[int]) -> dict[str, Tensor]:
        """The places, in the least whole numbers that hold them, and the weights."""
        del groups
        largest, places = torch.topk(tensor, self.count, -1)
        weights = torch.softmax(largest, -1)[..., :-1].contiguous()
        kind = next(k for end, k in _WHOLE if tensor.shape[-1] < end)
        return dict(zip(self.keys, (places.to(kind), weights), strict=True))


@dataclass(frozen=True, slots=True)
class Measured:
    """The keys of a tensor, and of the one number that stands beside each of its rows."""

    keys: tuple[str, str]
    number: int
    by: str = ""
    within: bool = False

    def shapes(self, whole: Shape, groups: Sequence[int]) -> list[Shape]:
        """The shape of the tensor, and of the numbers."""
        del groups
        return [whole, whole[:1]]

    def fit(self, found: Mapping[str, Shape], whole: Shape) -> bool:
        """Whether the shapes of some tensors can be those of both."""
        return [found.get(key) for key in self.keys] == self.shapes(whole, ())

    def joined(self, whole: Shape, parts: Sequence[Tensor]) -> Tensor:
        """The tensor. Raises ArtifactError (E518) where the numbers are others."""
        del whole
        tensor, numbers = parts
        if bool((numbers != self.number).any()):
            message = f"`{self.keys[1]}` is {list(map(int, numbers))}, and {self.number} is meant"
            refuse("E518", message, hint="its config and its tensors were not saved together")
        return tensor

    def cut(self, tensor: Tensor, groups: Sequence[int]) -> dict[str, Tensor]:
        """The tensor and the numbers, whole ones as torch takes them for places."""
        del groups
        numbers = torch.full((len(tensor),), self.number, dtype=torch.int64)
        return dict(zip(self.keys, (tensor.to(torch.int64), numbers), strict=True))


Several = Pieces | Largest | Measured
"""The tensors of a file that are one here."""


_WHOLE = (
    (2**8, torch.uint8),
    (2**15, torch.int16),
    (2**31, torch.int32),
    (2**63, torch.int64),
)


def sizes_of(members: Tensor) -> Sequence[int]:
    """How many rows each group has, of [rows, groups]."""
    return list(map(int, members.sum(0)))


def numbered(key: str, arguments: Mapping[str, object]) -> str:
    """A key of a format with numbers in the place of the arguments that say how many there are."""
    key = _MEASURED.sub(lambda found: f"{{{found[1]}, {found[2]} = {arguments[found[3]]}}}", key)
    key = _CHOSEN.sub(lambda found: f"{{{found[1]}, {found[2]} of {arguments[found[3]]}}}", key)
    return _NUMBERED.sub(lambda found: f"{{:{arguments[found[1]]}{found[2]}}}", key)


def counted_in(key: str) -> tuple[str, ...]:
    """The arguments of which a key of a format says that there are so many pieces."""
    return tuple(found[1] for found in _NUMBERED.finditer(key))


def named_in(key: str) -> tuple[str, ...]:
    """The keys of a file that a key of a format names, whatever the arguments are."""
    found = _CHOSEN.search(key) or _MEASURED.search(key)
    if found is None:
        return (key,)
    return tuple(f"{key[: found.start()]}{name}{key[found.end() :]}" for name in found.group(1, 2))


def measured_in(key: str) -> tuple[tuple[str, str], ...]:
    """What the keys of a tensor and of its numbers have that others have not, if it has them."""
    if _MEASURED.search(key) is None:
        return ()
    tensor, numbers = (named.partition("{")[0] for named in named_in(key))
    return ((tensor, numbers),)


def pieces_of(key: str) -> Several | None:
    """The tensors of a file that a key stands for; None if it is that of one."""
    found = _CHOSEN.search(key)
    if found is not None:
        places, weights = named_in(key)
        return Largest((places, weights), int(found[3]))
    found = _MEASURED.search(key)
    if found is not None:
        tensor, numbers = named_in(key)
        return Measured((tensor, numbers), int(found[3]))
    found = _NUMBERED.search(key)
    if found is None:
        return None
    keys = (f"{key[: found.start()]}{i}{key[found.end() :]}" for i in range(int(found[1])))
    how, _, by = found[2].strip().partition(" ")
    return Pieces(tuple(keys), by, how == "within")


def joined(tensors: Mapping[str, Tensor], whole: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The same tensors with pieces joined; by the keys that say so, their shapes as a whole."""
    found = dict(tensors)
    for key, shape in whole.items():
        pieces = pieces_of(key)
        if pieces is not None and pieces.fit({k: tuple(t.shape) for k, t in found.items()}, shape):
            found[key] = pieces.joined(shape, [found.pop(k) for k in pieces.keys])
    return found
