"""How several adapters become one: the ways that there are, and what each of them takes.

All that is known of a way before there is a model stands here, for callers and for specs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from surgery.algebra.scalars import did_you_mean
from surgery.language.syntax import ValueType

Sign = Literal["total", "frequency"]
"""How a sign is elected for each element: by the sum of all, or by how many have it."""


@dataclass(frozen=True, slots=True)
class Way:
    """How adapters become one.

    of: what is combined: their `parameters`, their `changes` of W, or the `factors` of these.
    pruning: what is done to these before they are added up; "" for nothing. elects: whether signs
    are elected; draws: whether chance has a part.
    """

    name: str
    of: Literal["parameters", "changes", "factors"]
    pruning: str = ""
    elects: bool = False
    draws: bool = False

    @property
    def prunes(self) -> bool:
        """Whether a share of the elements is left, the density."""
        return bool(self.pruning)

    @property
    def options(self) -> tuple[str, ...]:
        """The names of what may be given with it."""
        return tuple(name for name, (_, takes) in OPTIONS.items() if takes(self))


_PRUNING: tuple[tuple[str, bool, bool], ...] = (
    ("ties", True, False),
    ("dare_linear", False, True),
    ("dare_ties", True, True),
    ("magnitude_prune", False, False),
)

WAYS: Mapping[str, Way] = {
    way.name: way
    for way in (
        Way("cat", "factors"),
        Way("svd", "changes"),
        Way("linear", "parameters"),
        *(Way(n, "parameters", n, elects, draws) for n, elects, draws in _PRUNING),
        *(Way(f"{n}_svd", "changes", n, elects, draws) for n, elects, draws in _PRUNING),
    )
}
"""By the names that peft has for them."""


OPTIONS: Mapping[str, tuple[ValueType, Callable[[Way], bool]]] = {
    "rank": ("int", lambda way: way.of == "changes"),
    "density": ("float", lambda way: way.prunes),
    "sign": ("text", lambda way: way.elects),
    "seed": ("int", lambda way: way.draws),
    "to": ("text", lambda way: True),
}
"""What may be given with a way: its type, and the ways that take it."""


def takers(option: str) -> str:
    """The ways that take an option, by name."""
    return ", ".join(way.name for way in WAYS.values() if option in way.options)


@dataclass(frozen=True, slots=True)
class How:
    """How adapters become one.

    how: `cat` lays the factors of what is added to W side by side, which is exact; `svd` takes the
        nearest product of a rank; `linear` adds up the parameters, which is another adapter than
        the sum; `ties`, `dare_linear`, `dare_ties` and `magnitude_prune` prune the parameters
        before, and with `_svd` behind the name the changes of W.
    rank: of a product that is cut off; by default the largest of an adapter's own there.
    to: a method that adds a product of two trained factors to W; by default the adapters' own, if
        it is one.
    density: the share of elements that pruning leaves. sign: how a sign is elected, `total` or
        `frequency`. seed: of what dare draws.
    """

    how: str = "cat"
    rank: int | None = None
    to: str | None = None
    density: float | None = None
    sign: Sign = "total"
    seed: int = 0

    @property
    def alters(self) -> bool:
        """Whether even one adapter by itself becomes another: a cut, or what pruning leaves."""
        return self.rank is not None or self.density is not None

    def __str__(self) -> str:
        """The way with what is given, as it stands behind `by`."""
        given = (("rank", self.rank), ("density", self.density), ("to", self.to))
        told = [(name, value) for name, value in given if value is not None]
        told += [("sign", self.sign)] * (self.sign != "total") + [("seed", self.seed)] * bool(
            self.seed
        )
        shown = (f'"{value}"' if isinstance(value, str) else f"{value!r}" for _, value in told)
        pairs = (f"{name} = {text}" for (name, _), text in zip(told, shown, strict=True))
        return f"{self.how}({', '.join(pairs)})"


Unfit = tuple[str, str, str]
"""The name of an option, or `how`; what is wrong with it; and what to do."""


def unknown_way(name: str) -> Unfit:
    """What is said of a way that there is not."""
    near = did_you_mean(name, WAYS)
    hint = f"{near or 'there are:'} {', '.join(WAYS)}"
    return "how", f"there is no way `{name}` to compose adapters", hint


def unfit(asked: How) -> Iterator[Unfit]:
    """What is wrong with what is asked for, as far as no adapter is needed to see it."""
    way = WAYS.get(asked.how)
    if way is None:
        yield unknown_way(asked.how)
        return
    if asked.rank is not None and (asked.rank < 1 or way.of != "changes"):
        message = f"there is no product of rank {asked.rank} in `{way.name}`"
        yield "rank", message, f"a rank of 1 or more goes with {takers('rank')}"
    if way.prunes and not (asked.density is not None and 0 < asked.density <= 1):
        said = "no density says which" if asked.density is None else f"density is {asked.density}"
        message = f"`{way.name}` leaves a share of the elements, and {said}"
        yield "density", message, "give a density above 0 and at most 1, such as 0.5"
    if not way.prunes and asked.density is not None:
        message = f"`{way.name}` prunes nothing, and has no density"
        yield "density", message, f"a density goes with {takers('density')}"
    if asked.sign not in get_args(Sign):
        signs = ", ".join(get_args(Sign))
        yield "sign", f"no sign is elected by `{asked.sign}`", f"there are: {signs}"
