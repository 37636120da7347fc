"""How parameters begin: the distributions, and one random stream for each parameter.

A stream is seeded by (seed, adapter, site, name) and drawn in float32 on the CPU, then rounded: the
same on every device and rank, in any order, and for any dtype up to rounding. The global
generators are not touched.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from surgery.errors import refuse

WHOLE = torch.int32
"""The dtype of parameters that are whole numbers, whatever that of the others is."""

AFTER = "after"
"""The argument by which a seed is that of torch's own generator: how much it has drawn before."""

_LARGEST = 1e30  # float32 ends at 3e38, and a bound is multiplied by a root


@dataclass(frozen=True, slots=True)
class Distribution:
    """A row: the arguments with their defaults, and how a tensor is filled.

    `fill(tensor, generator, **arguments)` works in place on float32; fan-in is the number of
    elements of one slice of the first axis, as torch counts it. `order`, if given, names two
    arguments of which the first may not be above the second, and `least` what some may not be
    below. `told`: all arguments must be given, and a seed is the generator's own, as others draw
    the same. `whole`: what is drawn are whole numbers, as int32. `dealt`: of a deck that is not
    torch's, so that nothing is drawn before it.
    """

    arguments: Mapping[str, float]
    fill: Callable[..., Tensor]
    order: tuple[str, str] | None = None
    least: Mapping[str, float] = field(default_factory=dict[str, float])
    told: bool = False
    whole: bool = False
    dealt: bool = False

    @property
    def named(self) -> tuple[str, ...]:
        """The names of all that can be said of a draw."""
        return (*self.arguments, "seed", *(() if self.dealt else (AFTER,)))

    @property
    def dtype(self) -> torch.dtype:
        """What is drawn."""
        return WHOLE if self.whole else torch.float32

    def objection(self, values: Mapping[str, float]) -> str:
        """What is wrong with some arguments; "" if nothing is."""
        for name in self.arguments:
            if abs(values[name]) > _LARGEST:
                return f"{name} = {values[name]:g} is too large"
        for name, least in self.least.items():
            if values[name] < least:
                return f"{name} = {values[name]:g} is below {least:g}"
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
    # In torch's order, so that the numbers are torch's to the last bit.
    bound = math.sqrt(3) * (math.sqrt(2 / (1 + a * a)) / math.sqrt(_fan_in(t)))
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


def _standard_uniform(t: Tensor, generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(t.shape[-1])
    coarse = torch.empty(t.shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)
    return t.copy_(coarse / coarse.std())


def _places(t: Tensor, generator: torch.Generator, rows: float, columns: float) -> Tensor:
    every = torch.randperm(int(rows) * int(columns), generator=generator)
    chosen = every[: t.shape[1]]
    return t.copy_(torch.stack([chosen // int(columns), chosen % int(columns)]))


def _off_diagonal(t: Tensor, generator: torch.Generator, size: float) -> Tensor:
    n = int(size)
    chosen = torch.randperm(n * (n - 1), generator=generator)[: t.shape[1]]
    rows, columns = chosen // (n - 1), chosen % (n - 1)
    return t.copy_(torch.stack([rows, columns + (columns >= rows)]))


def _dealt(
    t: Tensor, generator: torch.Generator, numbers: float, cards: float, first: float
) -> Tensor:
    deck = _deck(int(numbers), int(cards), generator.initial_seed())
    at = (int(first) + torch.arange(t.numel())) % len(deck)
    return t.copy_(deck[at].view(t.shape))


def _tally(t: Tensor, generator: torch.Generator, cards: float) -> Tensor:
    deck = _deck(t.numel(), int(cards), generator.initial_seed())
    return t.copy_(torch.bincount(deck, minlength=t.numel()).view(t.shape))


@lru_cache(maxsize=2)  # all sites are dealt of one
def _deck(numbers: int, cards: int, seed: int) -> Tensor:
    """Cards with the numbers from 0 on, each as often as another or once more, as numpy shuffles.

    Read from numpy 2: its default generator chooses what is there once more, and shuffles. Raises
    ArtifactError (E525) where it is not installed.
    """
    try:
        import numpy
    except ImportError:
        refuse("E525", "dealing numbers as NumPy does needs NumPy", hint="pip install numpy")
    generator = numpy.random.default_rng(seed)
    deck = numpy.repeat(numpy.arange(numbers), cards // numbers)
    if cards % numbers:
        more = generator.choice(numbers, size=cards % numbers, replace=False)
        deck = numpy.concatenate([deck, more])
    generator.shuffle(deck)
    return torch.tensor(deck, dtype=WHOLE)


PLACES, OFF_DIAGONAL, DEALT = "places", "off_diagonal", "dealt"

PAIRS: Mapping[str, tuple[str, str]] = {
    PLACES: ("rows", "columns"),
    OFF_DIAGONAL: ("size", "size"),
}
"""The distributions of rows above columns: which arguments say how many of both there are."""

# Names and arguments are torch.nn.init's, but for those that are whole numbers or count them.
DISTRIBUTIONS: Mapping[str, Distribution] = {
    "uniform": Distribution({"low": 0.0, "high": 1.0}, _uniform, order=("low", "high")),
    "normal": Distribution({"mean": 0.0, "std": 1.0}, _normal, least={"std": 0}),
    "kaiming_uniform": Distribution({"a": 0.0}, _kaiming_uniform),
    "paired_kaiming_uniform": Distribution({"a": 0.0}, _paired_kaiming_uniform),
    "kaiming_normal": Distribution({"a": 0.0}, _kaiming_normal),
    "xavier_uniform": Distribution({"gain": 1.0}, _xavier_uniform, least={"gain": 0}),
    "xavier_normal": Distribution({"gain": 1.0}, _xavier_normal, least={"gain": 0}),
    "standard_uniform": Distribution({}, _standard_uniform),
    PLACES: Distribution(
        {"rows": 0.0, "columns": 0.0},
        _places,
        least={"rows": 0, "columns": 0},
        told=True,
        whole=True,
    ),
    OFF_DIAGONAL: Distribution(
        {"size": 1.0}, _off_diagonal, least={"size": 1}, told=True, whole=True
    ),
    DEALT: Distribution(
        {"numbers": 1.0, "cards": 1.0, "first": 0.0},
        _dealt,
        least={"numbers": 1, "cards": 1, "first": 0},
        told=True,
        whole=True,
        dealt=True,
    ),
    "tally": Distribution({"cards": 1.0}, _tally, least={"cards": 1}, told=True, dealt=True),
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
    """A tensor of `shape` on the CPU, float32 or whole. KeyError for an unknown name."""
    row = DISTRIBUTIONS[distribution]
    values = {name: arguments.get(name, default) for name, default in row.arguments.items()}
    return row.fill(torch.empty(shape, dtype=row.dtype), generator, **values)


def drawn_again(
    distribution: str,
    arguments: Mapping[str, float],
    shape: tuple[int, ...],
    seed: int,
    name: str,
    after: int | None = None,
) -> Tensor:
    """A tensor that its seed alone determines, whatever it belongs to.

    after: how many numbers of 32 bits torch's generator of that seed has drawn before; None where
    each name has a stream of its own.
    """
    if after is not None:
        return draw(distribution, arguments, shape, _later(seed, after))
    if DISTRIBUTIONS[distribution].told:
        # A copy, for it becomes a parameter, and whoever writes to that must not change the next.
        return _placed(distribution, tuple(arguments.items()), shape, seed).clone()
    return draw(distribution, arguments, shape, stream(seed, name))


@lru_cache(maxsize=16)  # one for all sites of a shape: it permutes as many numbers as there are
def _placed(
    distribution: str, arguments: tuple[tuple[str, float], ...], shape: tuple[int, ...], seed: int
) -> Tensor:
    return draw(distribution, dict(arguments), shape, _later(seed, 0))


def _later(seed: int, count: int) -> torch.Generator:
    """Torch's generator of a seed after so many numbers, of which one of float32 takes 32 bits."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, _AT_ONCE):
        torch.empty(min(_AT_ONCE, count - start)).uniform_(generator=generator)
    return generator


_AT_ONCE = 1 << 22  # 16 MB
