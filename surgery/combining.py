"""Several tensors made one: their weighted sum, and what prunes them or elects signs before it.

TIES: Yadav et al., 2023, arXiv:2306.01708. DARE: Yu et al., 2023, arXiv:2311.03099. Sums of task
vectors: Ilharco et al., 2022, arXiv:2212.04089. As peft has them, signs are elected before the
numbers are multiplied in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from surgery.recipe import Sign

_linalg: Any = torch.linalg  # its functions carry no types

# ------------------------------------------------------------------------------------- pruning


@dataclass(frozen=True, slots=True)
class Pruning:
    """What is left of tensors before they are added up.

    density: the share of elements that stay, above 0 and at most 1. drawn: gives for the number of
    a tensor the generator that its random choices come from.
    """

    density: float
    sign: Sign
    drawn: Callable[[int], torch.Generator]


Combine = Callable[[Sequence[Tensor], Sequence[float], Pruning], Tensor]
"""Of tensors of one shape and as many numbers, one tensor."""


def summed(tensors: Sequence[Tensor], numbers: Sequence[float], _: Pruning) -> Tensor:
    """Σ cᵢ·tᵢ."""
    return sum((c * t for c, t in zip(numbers, tensors, strict=True)), torch.zeros_like(tensors[0]))


def largest(tensors: Sequence[Tensor], numbers: Sequence[float], how: Pruning) -> Tensor:
    """The sum of those elements of each that are largest."""
    return summed([_largest(t, how.density) for t in tensors], numbers, how)


def elected(tensors: Sequence[Tensor], numbers: Sequence[float], how: Pruning) -> Tensor:
    """Of the largest elements the mean of those whose sign most have (TIES)."""
    return _by_sign([_largest(t, how.density) for t in tensors], numbers, how)


def dropped(tensors: Sequence[Tensor], numbers: Sequence[float], how: Pruning) -> Tensor:
    """The sum of elements that chance leaves, each divided by its probability (DARE)."""
    return summed(_by_chance(tensors, how), numbers, how)


def dropped_elected(tensors: Sequence[Tensor], numbers: Sequence[float], how: Pruning) -> Tensor:
    """Of elements that chance leaves the mean of those whose sign most have (DARE, then TIES)."""
    return _by_sign(_by_chance(tensors, how), numbers, how)


def _largest(tensor: Tensor, density: float) -> Tensor:
    flat = tensor.flatten()
    kept = torch.topk(flat.abs(), int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).reshape(tensor.shape)


def _by_chance(tensors: Sequence[Tensor], how: Pruning) -> list[Tensor]:
    return [_thinned(t, how.density, how.drawn(i)) for i, t in enumerate(tensors)]


def _thinned(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    return tensor * (drawn < density).to(tensor.dtype) / density


def _by_sign(tensors: Sequence[Tensor], numbers: Sequence[float], how: Pruning) -> Tensor:
    stacked = torch.stack([*tensors])
    votes = stacked if how.sign == "total" else stacked.sign()
    majority = torch.where(votes.sum(0) >= 0, 1.0, -1.0).to(stacked.dtype)
    agrees = (stacked.sign() == majority).to(stacked.dtype)
    scaled = stacked * torch.tensor([*numbers], dtype=stacked.dtype).view(
        -1, *(1,) * (stacked.dim() - 1)
    )
    return (scaled * agrees).sum(0) / agrees.sum(0).clamp(min=1.0)


COMBINES: Mapping[str, Combine] = {
    "": summed,
    "ties": elected,
    "dare_linear": dropped,
    "dare_ties": dropped_elected,
    "magnitude_prune": largest,
}
"""By what is done before tensors are added up, as `recipe.WAYS` has it."""


# ---------------------------------------------------------------------------- changes of a matrix


@dataclass(frozen=True, slots=True)
class Change:
    """What is added to a matrix, or to a batch of them, in float64: left @ right, or as it is.

    left: [..., out, r]; right: [..., r, in]. dense: in place of these where there are none.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    dense: Tensor | None = None

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """The two, where it is a product."""
        return None if self.left is None or self.right is None else (self.left, self.right)

    @property
    def matrix(self) -> Tensor:
        """All of its elements."""
        if self.factors is not None:
            return self.factors[0] @ self.factors[1]
        assert self.dense is not None
        return self.dense

    @property
    def batched(self) -> bool:
        """Whether it is of a batch of matrices."""
        part = self.dense if self.left is None else self.left
        return part is not None and part.dim() > 2

    def each(self) -> Iterator[Change]:
        """Of a batch each by itself."""
        if not self.batched:
            yield self
        elif self.factors is None:
            yield from (Change(dense=one) for one in self.matrix)
        else:
            yield from (Change(*pair) for pair in zip(*self.factors, strict=True))

    def __mul__(self, number: float) -> Change:
        """Times a number."""
        if self.factors is not None:
            return Change(self.factors[0] * number, self.factors[1])
        return Change(dense=self.matrix * number)

    def __add__(self, other: Change) -> Change:
        """The sum: of two products the one whose factors lie side by side."""
        mine, theirs = self.factors, other.factors
        if mine is None or theirs is None:
            return Change(dense=self.matrix + other.matrix)
        return Change(torch.cat([mine[0], theirs[0]], -1), torch.cat([mine[1], theirs[1]], -2))

    def length(self) -> float:
        """The root of the sum of all squares (the Frobenius norm)."""
        if self.factors is None or not _narrow(*self.factors):
            return float(self.matrix.square().sum()) ** 0.5
        left, right = self.factors
        core = _linalg.qr(left)[1] @ _linalg.qr(right.mT)[1].mT
        return float(core.square().sum()) ** 0.5


def _narrow(left: Tensor, right: Tensor) -> bool:
    """Whether the factors are smaller than the matrix that they make."""
    return 2 * left.shape[-1] < min(left.shape[-2], right.shape[-1])


def together(changes: Sequence[Change], numbers: Sequence[float]) -> Change:
    """Σ cᵢ·Δᵢ, a product where all of them are."""
    return reduce(Change.__add__, (d * c for d, c in zip(changes, numbers, strict=True)))
