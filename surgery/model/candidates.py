"""What a selector may take of a module: its weight, its other matrices, slices of either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import nn

from surgery.model.bare import Bare, bare, unknown
from surgery.model.fused import split
from surgery.model.holder import parameters_of
from surgery.model.inventory import Entry, Inventory, sizes_of
from surgery.model.layers import MATRIX, TENSOR, LayerKind
from surgery.model.parts import WHOLE, ParameterSlice, Part
from surgery.model.roles import plays


@dataclass(frozen=True, slots=True)
class Candidate:
    """A slice of a module's parameter that may become a site.

    path: as selectors see it: the module's for its weight, the parameter's own for others.
    kind: None where nothing knows how the weight acts.
    role: the role that it plays by itself, as rows of what plays several.
    shy: whether it is taken only by who names it.
    by: the paths by which it is selected, where these are others than its own.
    """

    at: ParameterSlice
    path: str
    kind: LayerKind | None
    role: str = ""
    shy: bool = False
    by: tuple[str, ...] | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths by which it is selected."""
        return (self.path,) if self.by is None else self.by


def candidates(
    index: int,
    inventory: Inventory,
    roles: Sequence[str] = (),
    matrix: int | None = None,
    head: int | None = None,
) -> tuple[Candidate, ...]:
    """The candidates of an entry, wholes before their rows.

    roles: those whose rows are asked for. matrix: of batches, and of nothing else, this one. head:
    of queries, keys and values, and of nothing else, the rows of this one.
    """
    found = _wholes(inventory.entries[index])
    if matrix is not None:
        found = [replace(one, at=replace(one.at, index=matrix)) for one in found if _batch(one)]
    if roles:
        rows = [(one, parts_of(index, one, inventory)) for one in found]
        found += [_part(one, p[role], role) for one, p in rows for role in roles if role in p]
    if head is None:
        return tuple(found)
    return tuple(_heads(found, index, inventory, head))


def kind_at(entry: Entry, at: ParameterSlice) -> LayerKind | None:
    """The kind of a slice of an entry's module."""
    module = entry.module
    if at.tensor:
        return TENSOR
    if at.parameter == "weight" and entry.kind is not None:
        return entry.kind
    if at.parameter in entry.used:
        return entry.used[at.parameter].kind
    weight = parameters_of(module).get(at.parameter)
    if weight is None or weight.dim() not in (2, 3):
        return None
    return (bare(module, at.parameter, entry.cls) or unknown(module, at.parameter)).kind


def parts_of(index: int, whole: Candidate, inventory: Inventory) -> Mapping[str, Part]:
    """The parts of a candidate by their roles; empty where it is one thing."""
    entry = inventory.entries[index]
    if whole.kind is None:
        return {}
    rows = sizes_of(whole.kind, entry.module, replace(whole.at, part=None)).fan_out
    if whole.at.parameter == "weight":
        owner = inventory.entries[entry.parent].module if entry.parent >= 0 else None
        return {} if owner is None else split(owner, entry.name, rows)
    row = bare(entry.module, whole.at.parameter, entry.cls)
    if row is None or row.roles is None:
        return {}
    parts = row.roles(entry.module, rows)
    return parts if all(part.fits for part in parts.values()) else {}


def _wholes(entry: Entry) -> list[Candidate]:
    found: list[Candidate] = []
    if entry.kind is not None or entry.weighted:
        found.append(_weight(entry))
    for name in entry.bare:
        known = bare(entry.module, name, entry.cls)
        used = entry.used.get(name)
        row: Bare = known or unknown(entry.module, name)
        if used is not None:
            row = Bare(used.kind, used.bias, row.roles)
        path = f"{entry.path}.{name}" if entry.path else name
        at = ParameterSlice(name, row.bias)
        found.append(Candidate(at, path, row.kind, shy=known is None))
    return found


def _weight(entry: Entry) -> Candidate:
    if entry.kind is not None:
        return Candidate(WHOLE, entry.path, entry.kind)
    kind = MATRIX if _dims(entry.module, "weight") == 2 else None
    return Candidate(ParameterSlice(bias=unknown(entry.module, "weight").bias), entry.path, kind)


def _dims(module: nn.Module, name: str) -> int:
    weight = parameters_of(module).get(name)
    return 0 if weight is None else weight.dim()


def _part(whole: Candidate, part: Part, role: str) -> Candidate:
    return replace(whole, at=replace(whole.at, part=part), role=role)


# ------------------------------------------------------------------------------------ batches


def _batch(one: Candidate) -> bool:
    return one.at.parameter != "weight" and one.kind is not None and one.kind.bare


def batch_size(entry: Entry) -> int | None:
    """The number of matrices in each batch that a module owns, if it owns any of equal numbers."""
    weights = (parameters_of(entry.module)[name] for name in entry.bare)
    sizes = {w.shape[0] for w in weights if w is not None and w.dim() == 3}
    return sizes.pop() if len(sizes) == 1 else None


# -------------------------------------------------------------------------------------- heads

_HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
"""What an attention calls the number of rows of a head; transformers and torch have these names."""

_HEADED = ("query", "key", "value")


@lru_cache(maxsize=4096)
def _headed(tail: str) -> bool:
    return any(plays(role, tail) for role in _HEADED)


def head_size(module: nn.Module) -> int | None:
    """The number of rows of a head of an attention, if the module says one."""
    own = vars(module)
    found = (own[name] for name in _HEAD_SIZES if name in own)
    return next((size for size in found if isinstance(size, int) and size > 0), None)


def heads_of(index: int, inventory: Inventory) -> int:
    """The most heads that queries, keys or values of an attention have; 0 where it has none."""
    entry = inventory.entries[index]
    size = head_size(entry.module)
    if size is None:
        return 0
    inside = [index, *inventory.children(index)]
    lengths = (_headed_rows(one, i, inventory) for i in inside for one in _headed_at(i, inventory))
    return max((length // size for length in lengths), default=0)


def _headed_at(index: int, inventory: Inventory) -> Iterator[Candidate]:
    """The candidates of an entry that have heads."""
    for one in candidates(index, inventory, _HEADED):
        if one.kind is not None and one.at.index is None and _has_heads(one):
            yield one


def _has_heads(one: Candidate) -> bool:
    return one.role in _HEADED or (not one.role and _headed(_tail(one.path)))


def _headed_rows(one: Candidate, index: int, inventory: Inventory) -> int:
    assert one.kind is not None
    return sizes_of(one.kind, inventory.entries[index].module, one.at).fan_out


def _tail(path: str) -> str:
    return ".".join(path.rsplit(".", 3)[-3:])


def _heads(
    found: Sequence[Candidate], index: int, inventory: Inventory, head: int
) -> Iterator[Candidate]:
    """Of each query, key and value the rows of one head."""
    entry = inventory.entries[index]
    owners = (entry, inventory.entries[entry.parent]) if entry.parent >= 0 else (entry,)
    sizes = (head_size(owner.module) for owner in owners)
    size = next((size for size in sizes if size is not None), None)
    for one in found:
        if size is None or one.kind is None or one.at.index is not None or not _has_heads(one):
            continue
        rows = sizes_of(one.kind, entry.module, replace(one.at, part=None)).fan_out
        part = _head(one.at.part, rows, size, head)
        if part is not None:
            yield replace(one, at=replace(one.at, part=part))


def _head(within: Part | None, rows: int, size: int, head: int) -> Part | None:
    """The rows of a head within those of a part; None where it has fewer heads."""
    start, stop, period = (0, rows, rows)
    if within is not None:
        start, stop, period = within.start, within.stop, within.period
    in_turn = (stop - start) // size
    if in_turn == 0 or (stop - start) % size or head >= in_turn * (rows // period):
        return None
    turn, place = divmod(head, in_turn)
    first = turn * period + start + place * size
    name = f"head_{head}" if within is None else f"{within.name}_head_{head}"
    return Part.run(name, first, first + size, rows)
