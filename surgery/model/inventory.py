"""A model seen once: its modules in order, which of them could be sites, what shares weights.

A module that is reachable by several paths is one site, known by the first path; the others are
names that select it too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from surgery.language.syntax import Tie
from surgery.model.holder import ADAPTERS, children_of, parameters_of
from surgery.model.layers import (
    Geometry,
    LayerKind,
    Mode,
    Sizes,
    kind_of,
    matrix_like,
    weight_kind_of,
)
from surgery.model.parts import Part
from surgery.model.storage import identity


@dataclass(frozen=True, slots=True)
class Site:
    """A layer that a method can be put on.

    path: dotted, from the root; "" if the root itself. A part's ends with its name.
    part: which rows of the module's matrix it is, if not all.
    mode: how it is reached.
    tie: what becomes of a weight that it shares with other layers; None if it shares none.
    followers: the layers that go on sharing its weight, adapted or not.
    dtype, device: of the weight as it lies; an offloaded weight lies on meta.
    layer: the index in the container that the scope indexes, else in the outermost list on the
        path, else None.
    container: the path of the container that the scope indexes or names, None without a scope.
    """

    path: str
    module: nn.Module = field(repr=False, compare=False)
    kind: LayerKind = field(repr=False)
    sizes: Sizes
    geometry: Geometry | None
    dtype: torch.dtype
    device: torch.device
    has_bias: bool
    layer: int | None
    container: str | None = None
    part: Part | None = None
    mode: Mode = "call"
    tie: Tie | None = None
    followers: tuple[nn.Module, ...] = field(default=(), repr=False, compare=False)

    @property
    def owner(self) -> str:
        """The path of the module."""
        return self.path if self.part is None else self.path.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Entry:
    """One path of a module. `parent` and `end` are indices of entries, as `first` is.

    end: the index after the last entry below this one.
    first: the entry by which the module is known; its own index unless met before.
    kind: the row that knows its weight. own_forward: no row knows what it does with it.
    layer: the index in the outermost list on the path, if there is one.
    weighted: whether it owns a weight of two or more axes, whether or not a row knows its kind.
    """

    path: str
    module: nn.Module = field(repr=False, compare=False)
    parent: int
    end: int
    first: int
    layer: int | None
    kind: LayerKind | None = field(repr=False)
    weighted: bool
    own_forward: bool = False

    @property
    def name(self) -> str:
        """The last name of the path."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Inventory:
    """All modules but adapters, each before what lies below it.

    pool: the entries a selector looks at, in order: known kinds and owners of unknown weights.
    ties: for each site that shares its weight, the full names of the other parameters.
    """

    entries: tuple[Entry, ...]
    pool: tuple[int, ...]
    ties: Mapping[str, tuple[str, ...]]

    @property
    def by_path(self) -> dict[str, int]:
        """The candidates by path."""
        return {self.entries[index].path: index for index in self.pool}

    def children(self, index: int) -> list[int]:
        """The direct children of an entry, in order."""
        found: list[int] = []
        at = index + 1
        while at < self.entries[index].end:
            found.append(at)
            at = self.entries[at].end
        return found

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of all modules; tied ones as often as they are owned, lazy ones never."""
        for entry in self.entries:
            every = parameters_of(entry.module).values()
            yield from (p for p in every if p is not None and not is_lazy(p))

    def below(self, index: int) -> tuple[int, ...]:
        """The part of the pool at or below an entry."""
        start, stop = bisect_left(self.pool, index), bisect_left(self.pool, self.entries[index].end)
        return self.pool[start:stop]


def survey(model: nn.Module) -> Inventory:
    """Walk a model once; reads no weight's data, and changes nothing."""
    entries = _Walk().run(model)
    pool = tuple(i for i, e in enumerate(entries) if e.kind is not None or e.weighted)
    return Inventory(tuple(entries), pool, _ties(entries))


class _Walk:
    """One walk in order of registration; a path that returns to its own ancestor is left out."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, nn.Module, int, int | None]] = []
        self._ends: list[int] = []
        self._first: dict[int, int] = {}
        self._above: set[int] = set()

    def run(self, model: nn.Module) -> list[Entry]:
        self._visit("", model, -1, None)
        return [self._entry(i, *row) for i, row in enumerate(self._rows)]

    def _visit(self, path: str, module: nn.Module, parent: int, layer: int | None) -> None:
        index = len(self._rows)
        self._rows.append((path, module, parent, layer))
        self._ends.append(index + 1)
        self._first.setdefault(id(module), index)
        self._above.add(id(module))
        listed = layer is None and isinstance(module, nn.ModuleList | nn.Sequential)
        for position, (name, child) in enumerate(_walked(module)):
            if id(child) not in self._above:
                below = f"{path}.{name}" if path else name
                self._visit(below, child, index, position if listed else layer)
        self._above.discard(id(module))
        self._ends[index] = len(self._rows)

    def _entry(
        self, index: int, path: str, module: nn.Module, parent: int, layer: int | None
    ) -> Entry:
        first = self._first[id(module)]
        kind, known = kind_of(module), weight_kind_of(module)
        weighted = matrix_like(module)
        end, own = self._ends[index], kind is None
        return Entry(path, module, parent, end, first, layer, known, weighted, own)


def _walked(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in children_of(module).items():
        if child is not None and name != ADAPTERS:
            yield name, child


def _ties(entries: list[Entry]) -> dict[str, tuple[str, ...]]:
    """The sites whose weight other parameters share, and those parameters' names."""
    owners: dict[Hashable, list[tuple[str, str]]] = {}
    for index, entry in enumerate(entries):
        if entry.first != index:
            continue
        for name, parameter in parameters_of(entry.module).items():
            if parameter is not None:
                full = f"{entry.path}.{name}" if entry.path else name
                owners.setdefault(identity(entry.module, name), []).append((entry.path, full))
    found: dict[str, tuple[str, ...]] = {}
    for group in owners.values():
        for path, full in group if len(group) > 1 else ():
            if full == _join(path, "weight"):
                found[path] = tuple(other for _, other in group if other != full)
    return found


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def site_at(
    entry: Entry,
    kind: LayerKind,
    layer: int | None,
    container: str | None,
    part: Part | None = None,
    mode: Mode = "call",
    tie: Tie | None = None,
    followers: tuple[nn.Module, ...] = (),
) -> Site:
    """The site of an entry or of a part of it, whose weight must be a readable one."""
    weight = parameters_of(entry.module)["weight"]
    assert weight is not None
    return Site(
        path=entry.path if part is None else _join(entry.path, part.name),
        module=entry.module,
        kind=kind,
        sizes=sizes_of(kind.sizes(entry.module), part),
        geometry=kind.geometry(entry.module),
        dtype=weight.dtype,
        device=weight.device,
        has_bias=parameters_of(entry.module).get("bias") is not None,
        layer=layer,
        container=container,
        part=part,
        mode=mode,
        tie=tie,
        followers=followers,
    )


def sizes_of(whole: Sizes, part: Part | None) -> Sizes:
    """The sizes of a part of a matrix; of all of it for None."""
    return whole if part is None else replace(whole, fan_out=part.length)
