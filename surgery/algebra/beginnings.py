"""How parameters begin: the distributions, and one random stream for each parameter.

A stream is seeded by (seed, adapter, site, name) and drawn in float32 on the CPU, then rounded: the
same on every device and rank, in any order, and for any dtype up to rounding. The global
generators are not touched.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

WHOLE = torch.int32
"""The dtype of parameters that are whole numbers, whatever that of the others is."""

_LARGEST = 1e30  # float32 ends at 3e38, and a bound is multiplied by a root


@dataclass(frozen=True, slots=True)
class Distribution:
    """A row: the arguments with their defaults, and how a tensor is filled.

    `fill(tensor, generator, **arguments)` works in place on float32; fan-in is the number of
    elements of one slice of the first axis, as torch counts it. `order`, if given, names two
    arguments of which the first may not be above the second, and `positive` those that may not be
    below 0. `whole`: what is drawn are places [2, n] of a matrix, whole numbers as int32, all
    arguments must be given, and a seed is torch's own, as others draw such places too.
    """

    arguments: Mapping[str, float]
    fill: Callable[..., Tensor]
    order: tuple[str, str] | None = None
    positive: tuple[str, ...] = ()
    whole: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """What is drawn."""
        return WHOLE if self.whole else torch.float32

    def objection(self, values: Mapping[str, float]) -> str:
        """What is wrong with some arguments; "" if nothing is."""
        for name in self.arguments:
            if abs(values[name]) > _LARGEST:
                return f"{name} = {values[name]:g} is too large"
        for name in self.positive:
            if values[name] < 0:
                return f"{name} = {values[name]:g} is below 0"
        if self.order is not None and values[self.order[0]] > values[self.order[1]]:
            return f"{self.order[0]} is above {self.order[1]}"
        return ""


def _fan_in(tensor: Tensor) -> int:
    return max(1, tensor.numel() // tensor.shape[0])


def _uniform(t: Tensor, generator: torch.Generator, low: float, high: float) -> Tensor:
    return t.uniform_(low, high, generator=generator)


def _normal(t: Tensor, generator: torch.Generator, mean: float, std: float) -> Tensor:
    return t.normal_(mean, std, generator=generator)


def _kaiming_uniform(t: Tensor, generator: torch.Generator, a: float) -> Tensor:
    bound = math.sqrt(6 / ((1 + a * a) * _fan_in(t)))
    return t.uniform_(-bound, bound, generator=generator)


def _paired_kaiming_uniform(t: Tensor, generator: torch.Generator, a: float) -> Tensor:
    if t.shape[-1] % 2:
        return _kaiming_uniform(t, generator, a)
    half = _kaiming_uniform(torch.empty(*t.shape[:-1], t.shape[-1] // 2), generator, a)
    return t.copy_(half.repeat_interleave(2, dim=-1))


def _kaiming_normal(t: Tensor, generator: torch.Generator, a: float) -> Tensor:
    return t.normal_(0, math.sqrt(2 / ((1 + a * a) * _fan_in(t))), generator=generator)


def _xavier_uniform(t: Tensor, generator: torch.Generator, gain: float) -> Tensor:
    bound = gain * math.sqrt(6 / (_fan_in(t) + t.shape[0]))
    return t.uniform_(-bound, bound, generator=generator)


def _xavier_normal(t: Tensor, generator: torch.Generator, gain: float) -> Tensor:
    return t.normal_(0, gain * math.sqrt(2 / (_fan_in(t) + t.shape[0])), generator=generator)


def _places(t: Tensor, generator: torch.Generator, rows: float, columns: float) -> Tensor:
    every = torch.randperm(int(rows) * int(columns), generator=generator)
    chosen = every[: t.shape[1]]
    return t.copy_(torch.stack([chosen // int(columns), chosen % int(columns)]))


# Names and arguments are torch.nn.init's, but for `places`.
DISTRIBUTIONS: Mapping[str, Distribution] = {
    "uniform": Distribution({"low": 0.0, "high": 1.0}, _uniform, order=("low", "high")),
    "normal": Distribution({"mean": 0.0, "std": 1.0}, _normal, positive=("std",)),
    "kaiming_uniform": Distribution({"a": 0.0}, _kaiming_uniform),
    "paired_kaiming_uniform": Distribution({"a": 0.0}, _paired_kaiming_uniform),
    "kaiming_normal": Distribution({"a": 0.0}, _kaiming_normal),
    "xavier_uniform": Distribution({"gain": 1.0}, _xavier_uniform, positive=("gain",)),
    "xavier_normal": Distribution({"gain": 1.0}, _xavier_normal, positive=("gain",)),
    "places": Distribution(
        {"rows": 0.0, "columns": 0.0}, _places, positive=("rows", "columns"), whole=True
    ),
}


def stream(*names: str | int) -> torch.Generator:
    """The generator of one parameter, seeded by all that names it."""
    digest = hashlib.blake2b("\0".join(map(str, names)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw(
    distribution: str,
    arguments: Mapping[str, float],
    shape: tuple[int, ...],
    generator: torch.Generator,
) -> Tensor:
    """A tensor of `shape` in float32 on the CPU; places in int32. KeyError for an unknown name."""
    row = DISTRIBUTIONS[distribution]
    values = {name: arguments.get(name, default) for name, default in row.arguments.items()}
    return row.fill(torch.empty(shape, dtype=row.dtype), generator, **values)


def drawn_again(
    distribution: str, arguments: Mapping[str, float], shape: tuple[int, ...], seed: int, name: str
) -> Tensor:
    """A tensor that its seed alone determines, whatever it belongs to."""
    if DISTRIBUTIONS[distribution].whole:
        return _placed(distribution, tuple(arguments.items()), shape, seed)
    return draw(distribution, arguments, shape, stream(seed, name))


@lru_cache(maxsize=16)  # one for all sites of a shape: it permutes as many numbers as there are
def _placed(
    distribution: str, arguments: tuple[tuple[str, float], ...], shape: tuple[int, ...], seed: int
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return draw(distribution, dict(arguments), shape, generator)
