"""A model seen once: its modules in order, which of them could be sites, what shares weights.

A module that is reachable by several paths is one site, known by the first path; the others are
names that select it too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from surgery.language.syntax import Tie
from surgery.model.holder import ADAPTERS, children_of, parameters_of
from surgery.model.layers import (
    Geometry,
    LayerKind,
    Mode,
    Sizes,
    base_class,
    kind_of,
    matrix_like,
    weight_kind_of,
)
from surgery.model.parts import WHOLE, ParameterSlice, Part
from surgery.model.storage import counted, identity, seen

if TYPE_CHECKING:
    from surgery.model.traced import Outline, Used


@dataclass(frozen=True, slots=True)
class Site:
    """A layer that a method can be put on.

    path: dotted, from the root; "" if the root itself. What is not all of a module's weight has
        a name of its own below the module.
    at: which of the module's parameters it is, and which part of it.
    batch: the number of matrices, where it is a batch of them.
    shape: of the parameter, where it is taken as it lies and not as a matrix.
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
    at: ParameterSlice = WHOLE
    batch: int | None = None
    shape: tuple[int, ...] | None = None
    mode: Mode = "call"
    tie: Tie | None = None
    followers: tuple[nn.Module, ...] = field(default=(), repr=False, compare=False)

    @property
    def part(self) -> Part | None:
        """Which rows of the matrix it is, if not all."""
        return self.at.part

    @property
    def owner(self) -> str:
        """The path of the module."""
        names = self.path.split(".")
        return ".".join(names[: len(names) - len(self.at.names)])


@dataclass(frozen=True, slots=True)
class Entry:
    """One path of a module. `parent` and `end` are indices of entries, as `first` is.

    end: the index after the last entry below this one.
    first: the entry by which the module is known; its own index unless met before.
    kind: the row that knows its weight. own_forward: no row knows what it does with it.
    layer: the index in the outermost list on the path, if there is one.
    weighted: whether it owns a weight of two or more axes, whether or not a row knows its kind.
    bare: its other parameters that may be matrices, or batches of them.
    used: what a whole graph says of its parameters, by name; traced: which class it had before.
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
    bare: tuple[str, ...] = ()
    used: Mapping[str, Used] = field(default_factory=dict[str, "Used"], repr=False, compare=False)
    traced: type[nn.Module] | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The last name of the path."""
        return self.path.rpartition(".")[2]

    @property
    def cls(self) -> type[nn.Module]:
        """The class of the module, mounted or not; that which it was traced from."""
        return self.traced or base_class(self.module)


@dataclass(frozen=True, slots=True)
class Inventory:
    """All modules but adapters, each before what lies below it.

    pool: the entries a selector looks at, in order: those that own what may be a matrix.
    ties: for the full name of each parameter that is shared, those of the others.
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

    def counted(self) -> tuple[int, int]:
        """The elements of all parameters, of which packed ones have more, and their bytes.

        Tied ones count once, lazy ones not.
        """
        return counted(entry.module for entry in self.entries)

    def below(self, index: int) -> tuple[int, ...]:
        """The part of the pool at or below an entry."""
        start, stop = bisect_left(self.pool, index), bisect_left(self.pool, self.entries[index].end)
        return self.pool[start:stop]


def survey(model: nn.Module) -> Inventory:
    """Walk a model once; reads no weight's data, and changes nothing."""
    entries = _Walk(_outline(model)).run(model)
    own = ((i, e) for i, e in enumerate(entries) if e.kind is not None or e.weighted or e.bare)
    pool = tuple(i for i, _ in own)
    return Inventory(tuple(entries), pool, _ties(entries))


def _outline(model: nn.Module) -> Outline | None:
    """What the graph of a whole model says, if it has one."""
    if not isinstance(model, fx.GraphModule):
        return None
    from surgery.model.traced import Outline

    return Outline(model)


class _Walk:
    """One walk in order of registration; a path that returns to its own ancestor is left out."""

    def __init__(self, outline: Outline | None) -> None:
        self._outline = outline
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
        outline = self._outline
        listed = _listed(module) if outline is None else outline.listed(path, module)
        children = _walked(module) if outline is None else outline.children(path, module)
        for position, (name, child) in enumerate(children):
            if id(child) not in self._above:
                below = f"{path}.{name}" if path else name
                self._visit(below, child, index, position if listed and layer is None else layer)
        self._above.discard(id(module))
        self._ends[index] = len(self._rows)

    def _entry(
        self, index: int, path: str, module: nn.Module, parent: int, layer: int | None
    ) -> Entry:
        first = self._first[id(module)]
        kind, known = kind_of(module), weight_kind_of(module)
        weighted = matrix_like(module)
        end, own = self._ends[index], kind is None
        bare = _bare(module, known is not None or weighted)
        entry = Entry(path, module, parent, end, first, layer, known, weighted, own, bare)
        return entry if self._outline is None else _told(entry, self._outline)


def _told(entry: Entry, outline: Outline) -> Entry:
    """An entry with what the graph of the model says of it."""
    used = outline.used(entry.path, entry.module)
    traced = outline.class_of(entry.path, entry.module)
    weight = used.get("weight")
    kind, own = entry.kind, entry.own_forward
    if weight is not None:
        kind, own = weight.kind, weight.by_value
    bare = tuple(dict.fromkeys([*entry.bare, *(name for name in used if name != "weight")]))
    return replace(entry, kind=kind, own_forward=own, bare=bare, used=used, traced=traced)


def _listed(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential)


def _bare(module: nn.Module, weighted: bool) -> tuple[str, ...]:
    """The parameters of two or three axes, but for the weight of what is taken as a layer."""
    own = parameters_of(module)
    if not own or (weighted and len(own) <= 2 and "bias" in own):
        return ()
    return tuple(
        name
        for name, p in own.items()
        if p is not None
        and not (weighted and name in ("weight", "bias"))
        and not is_lazy(p)
        and p.dim() in (2, 3)
    )


def _walked(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in children_of(module).items():
        if child is not None and name != ADAPTERS:
            yield name, child


def _ties(entries: list[Entry]) -> dict[str, tuple[str, ...]]:
    """The parameters that share their data, by their full names, and the names of the others."""
    owners: dict[Hashable, list[str]] = {}
    for index, entry in enumerate(entries):
        if entry.first != index:
            continue
        for name, parameter in parameters_of(entry.module).items():
            if parameter is not None:
                full = joined(entry.path, name)
                owners.setdefault(identity(entry.module, name), []).append(full)
    found: dict[str, tuple[str, ...]] = {}
    for group in owners.values():
        for full in group if len(group) > 1 else ():
            found[full] = tuple(other for other in group if other != full)
    return found


def joined(path: str, *names: str) -> str:
    """What names are called below a path."""
    return ".".join([*filter(None, [path]), *names])


def site_at(
    entry: Entry,
    kind: LayerKind,
    layer: int | None,
    container: str | None,
    at: ParameterSlice = WHOLE,
    mode: Mode = "call",
    tie: Tie | None = None,
    followers: tuple[nn.Module, ...] = (),
) -> Site:
    """The site of an entry or of a slice of it, whose parameter must be a readable one."""
    own, weight = parameters_of(entry.module)[at.parameter], seen(entry.module, at.parameter)
    assert own is not None
    assert weight is not None
    return Site(
        path=joined(entry.path, *at.names),
        module=entry.module,
        kind=kind,
        sizes=sizes_of(kind, entry.module, at),
        geometry=kind.geometry(entry.module),
        dtype=weight.dtype,
        device=own.device,
        has_bias=parameters_of(entry.module).get(at.bias) is not None,
        layer=layer,
        container=container,
        at=at,
        batch=batch_of(kind, entry.module, at),
        shape=_lying(at, weight) if at.tensor else None,
        mode=mode,
        tie=tie,
        followers=followers,
    )


def _lying(at: ParameterSlice, weight: Tensor) -> tuple[int, ...]:
    """The shape of a parameter as it lies, or of what is picked of it."""
    return (len(at.picked), *weight.shape[1:]) if at.picked else tuple(weight.shape)


def sizes_of(kind: LayerKind, module: nn.Module, at: ParameterSlice) -> Sizes:
    """The sizes of a site as a matrix; of each matrix, where it is a batch of them."""
    whole = kind.sizes(module)
    if at.tensor:
        weight = parameters_of(module)[at.parameter]
        assert weight is not None
        return Sizes(1, prod(_lying(at, weight)), 1)
    if kind.bare:
        weight = parameters_of(module)[at.parameter]
        assert weight is not None
        fan_out, fan_in = kind.to_matrix(weight.detach()).shape[-2:]
        whole = Sizes(fan_in, fan_out, fan_in)
    return whole if at.part is None else replace(whole, fan_out=at.part.length)


def batch_of(kind: LayerKind, module: nn.Module, at: ParameterSlice) -> int | None:
    """The number of matrices, where a site is a batch of them."""
    weight = parameters_of(module)[at.parameter]
    assert weight is not None
    several = kind.bare and at.index is None and not at.tensor and weight.dim() > 2
    return weight.shape[0] if several else None
