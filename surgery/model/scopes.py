"""`in SCOPE`: which parts of a model a selector looks into.

A step names containers by the tail rule, below each part that the step before chose, and takes
some of their children. Every container that answers counts; one inside another answer does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import assert_never

from torch import nn

from surgery.errors import Report, Span
from surgery.language.syntax import Every, Expression, Index, Indices, Scope, Slice, Step
from surgery.model.candidates import batch_size, heads_of
from surgery.model.inventory import Inventory, joined
from surgery.model.nearest import closest, listing, plural, tails
from surgery.model.roles import RolePattern, Tails, compiled

Names = Callable[[Expression], object]

HEADS = "heads"
"""By this name a scope has the heads of an attention, as in `in self_attn.heads[3]`."""


@dataclass(frozen=True, slots=True)
class Region:
    """A chosen entry with all below it.

    layer: the position in the container of the first step that has an index.
    container: the path of the container that the last step names; None for the whole model.
    matrix: of the batches of matrices in it, this one alone. head: of the queries, keys and values
        in it, the rows of this head alone.
    """

    entry: int
    layer: int | None = None
    container: str | None = None
    matrix: int | None = None
    head: int | None = None


def regions_of(
    scopes: Sequence[Scope], inventory: Inventory, report: Report, names: Names
) -> tuple[Region, ...] | None:
    """The regions of all scopes, in their order; the whole model if there are none.

    What an error was reported for adds none; None if `names` gave None for an index. Regions of
    different scopes may overlap.
    """
    if not scopes:
        return (Region(0),)
    found = [_resolved(scope, inventory, report, names) for scope in scopes]
    known = [some for some in found if some is not None]
    if len(known) < len(found):
        return None
    return tuple(dict.fromkeys(region for some in known for region in some))


def _resolved(
    scope: Scope, inventory: Inventory, report: Report, names: Names
) -> tuple[Region, ...] | None:
    """The regions of a scope, disjoint and in module order; with errors, those without one.

    `names` evaluates an index, or gives None if it has reported why it cannot, and then so does
    this. Reports E203 (no such container), E204 (an index that is not there), E205 (a slice past
    the end, a warning), E212 (a role that the model lacks), E214 (nothing in the scope).
    """
    regions: tuple[Region, ...] = (Region(0),)
    for step in scope.steps:
        if any(names(value) is None for value in _expressions(step.index)):
            return None
        regions = _descend(step, regions, inventory, report, names)
        if not regions:
            return ()
    return regions


def _descend(
    step: Step, regions: Sequence[Region], inventory: Inventory, report: Report, names: Names
) -> tuple[Region, ...]:
    mine = Report()
    reach = _Reach(step, inventory, mine, names)
    containers = _containers(step, regions, inventory, mine)
    chosen = tuple(part for container in containers for part in reach.into(container))
    if not chosen and not mine.failed:
        mine.error("E214", "the scope is empty", step.span, label="this chooses nothing")
    report.extend(mine.found)
    return chosen


def _expressions(index: Index | None) -> tuple[Expression, ...]:
    match index:
        case None | Every():
            return ()
        case Indices(values):
            return values
        case Slice(start, stop, step):
            return tuple(part for part in (start, stop, step) if part is not None)
        case _:
            assert_never(index)


# ------------------------------------------------------------------------------- containers


def _containers(
    step: Step, regions: Sequence[Region], inventory: Inventory, report: Report
) -> list[Region]:
    """The entries a step names below the regions; each keeps the layer of its region."""
    pattern = compiled(step.container, inventory, report, container=True)
    if pattern is None:
        return []
    found = [answer for region in regions for answer in _answers(pattern, region, inventory)]
    found = found or [a for r in regions for a in _headed(pattern, r, inventory)]
    missing = _missing(pattern, step.container.span, regions, inventory, bool(found))
    for alternative, span in missing:
        _report_missing(alternative, span, regions, inventory, report)
    return found


def _answers(pattern: Tails, region: Region, inventory: Inventory) -> Iterator[Region]:
    entries = inventory.entries
    at = region.entry + 1
    while at < entries[region.entry].end:
        if pattern.matches_tail(_relative(at, region, inventory)):
            yield Region(at, region.layer)
            at = entries[at].end  # what lies inside an answer does not count
        else:
            at += 1


def _headed(pattern: Tails, region: Region, inventory: Inventory) -> Iterator[Region]:
    """The attentions whose `heads` a step names: they are rows of its layers, and no module."""
    for at in range(region.entry, inventory.entries[region.entry].end):
        path = _relative(at, region, inventory)
        named, other = (f"{path}.{name}" if path else name for name in (HEADS, "\0"))
        by_name = pattern.matches_tail(named) and not pattern.matches_tail(other)
        if by_name and heads_of(at, inventory):
            yield Region(at, region.layer, head=-1)


def _relative(index: int, region: Region, inventory: Inventory) -> str:
    """The path of an entry from a region's own entry."""
    above = inventory.entries[region.entry].path
    return inventory.entries[index].path[len(above) + 1 if above else 0 :]


def _below(regions: Sequence[Region], inventory: Inventory) -> Iterator[str]:
    for region in regions:
        for index in range(region.entry + 1, inventory.entries[region.entry].end):
            yield _relative(index, region, inventory)


def _missing(
    pattern: Tails,
    span: Span,
    regions: Sequence[Region],
    inventory: Inventory,
    found: bool,
) -> list[tuple[Tails, Span]]:
    """The alternatives that name no container."""
    if len(pattern.alternatives) < 2:
        return [] if found else [(pattern, span)]
    paths = list(_below(regions, inventory))
    return [(a, s) for a, s in pattern.alternatives if not any(map(a.matches_tail, paths))]


def _report_missing(
    pattern: Tails, span: Span, regions: Sequence[Region], inventory: Inventory, report: Report
) -> None:
    if isinstance(pattern, RolePattern):
        message = f"this model has no `{span.text}`"
        report.error("E212", message, span, hint=_holding(regions, inventory))
        return
    wanted = pattern.literal or span.text.strip("/")
    counts = tails(_below(regions, inventory), wanted)
    near = closest(wanted, counts)
    label = near.question(f"{plural(sum(counts[n] for n in near.best), 'module')} here")
    hint = near.others(counts) if near.best else _holding(regions, inventory)
    report.error("E203", f"no module is called `{wanted}`", span, label=label, hint=hint)


def _holding(regions: Sequence[Region], inventory: Inventory) -> str:
    """What a scope could name: the lists below the regions, else whatever has children."""
    entries = inventory.entries
    below = [i for r in regions for i in range(r.entry + 1, entries[r.entry].end)]
    lists = [i for i in below if isinstance(entries[i].module, nn.ModuleList | nn.Sequential)]
    holding = lists or [i for i in below if entries[i].end > i + 1]
    return f"here are {listing(tails((entries[i].path for i in holding), ''))}" if holding else ""


# ----------------------------------------------------------------------------------- indices


@dataclass(frozen=True, slots=True)
class _Reach:
    """How one step takes children of a container."""

    step: Step
    inventory: Inventory
    report: Report
    names: Names

    def into(self, container: Region) -> list[Region]:
        """The children of one container that the step takes, in order, each once."""
        entry = self.inventory.entries[container.entry]
        index = self.step.index
        if container.head is not None:
            heads, path = heads_of(container.entry, self.inventory), joined(entry.path, HEADS)
            chosen = range(heads) if index is None else self._chosen(index, heads, path)
            return [Region(container.entry, container.layer, path, head=i) for i in chosen]
        if index is None:
            return [Region(container.entry, container.layer, entry.path)]
        children = self.inventory.children(container.entry)
        batch = batch_size(entry)
        found = [
            Region(children[i] if batch is None else container.entry, layer, entry.path, matrix)
            for i in self._chosen(index, batch or len(children), entry.path)
            for layer in (i if container.layer is None else container.layer,)
            for matrix in (None if batch is None else i,)
        ]
        return found

    def _chosen(self, index: Index, length: int, path: str) -> list[int]:
        return sorted(set(self._positions(index, length, path)))

    def _positions(self, index: Index, length: int, path: str) -> Sequence[int]:
        match index:
            case Every():
                return range(length)
            case Indices(values):
                return [i for v in values for i in self._position(v, length, path)]
            case Slice():
                return self._range(index, length, path)
            case _:
                assert_never(index)

    def _position(self, value: Expression, length: int, path: str) -> Iterator[int]:
        position = self._whole(value)
        if position is None:
            return
        if -length <= position < length:
            yield position % length
            return
        there = f"it has {_children(length)}"
        self.report.error(
            "E204", f"`{path}` has no child {position}", value.span, label=there + _span_of(length)
        )

    def _range(self, index: Slice, length: int, path: str) -> range:
        bounds = [self._optional(part) for part in (index.start, index.stop, index.step)]
        start, stop, step = bounds
        if step == 0:
            self.report.error("E204", "a slice has no step 0", index.span, hint="leave it out")
            return range(0)
        if any(bound is not None and not -length <= bound <= length for bound in (start, stop)):
            self.report.warning(
                "E205",
                f"the slice goes past the end of `{path}`",
                index.span,
                label=f"it has {_children(length)}" + _span_of(length),
            )
        return range(*slice(start, stop, step).indices(length))

    def _optional(self, value: Expression | None) -> int | None:
        return None if value is None else self._whole(value)

    def _whole(self, value: Expression) -> int | None:
        found = self.names(value)
        if isinstance(found, int) and not isinstance(found, bool):
            return found
        self.report.error(
            "E204",
            f"an index is a whole number, not {found!r}",
            value.span,
            hint="such as `layers[0]`, `layers[-1]`, `layers[0:12]` or `layers[*]`",
        )
        return None


def _children(length: int) -> str:
    return "1 child" if length == 1 else f"{length} children"


def _span_of(length: int) -> str:
    return f", 0 to {length - 1}" if length > 1 else ""
