"""Selectors on a module tree: which sites a statement means, and every way it may mean none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from surgery.errors import Report, Span
from surgery.language import syntax as ast
from surgery.model.bypassed import READ_BY_OWNER
from surgery.model.facts import Holds
from surgery.model.holder import parameters_of
from surgery.model.hooked import integration_of, replaced_forward
from surgery.model.inventory import Entry, Inventory, Site, site_at, survey
from surgery.model.layers import Mode, base_class, qualified_name
from surgery.model.nearest import listing, plural, tails
from surgery.model.parts import Part
from surgery.model.scopes import Names, regions_of
from surgery.model.selection import Found, View, chosen
from surgery.model.storage import unreadable

__all__ = ["Holds", "Inventory", "Names", "Site", "admit", "select", "survey"]

_LIFTED = frozenset({"E201", "E202", "E203", "E211", "E212", "E214"})
"""What `optional` lifts: all that says that something selects nothing."""


def select(
    selection: ast.Selection,
    inventory: Inventory,
    report: Report,
    names: Names,
    holds: Holds,
    tie: ast.Tie | None = None,
) -> tuple[Site, ...]:
    """The sites that `S in SCOPE where COND except S expect N` means, in module order.

    `names` evaluates an index or a count; None says that it has reported why it cannot. What is
    wrong goes to `report` (E201 to E214), and the sites that are right are given all the same.
    """
    before = len(report.found)
    mine = Report()
    regions = regions_of(selection.scopes, inventory, mine, names)
    sites: tuple[Site, ...] = ()
    if regions is not None and (selection.optional or not mine.failed):
        view = View.of(inventory, regions, _scope_text(selection.scopes))
        found = chosen(selection, view, mine, holds)
        sites = _admit(found, selection.selector.span, inventory, mine, tie)
    lifted = _LIFTED if selection.optional else frozenset[str]()
    report.extend(d for d in mine.found if d.code not in lifted)
    failed = any(d.severity == "error" for d in report.found[before:])
    if regions is not None and not failed:
        _check_count(selection, sites, report, names)
    return sites


def _scope_text(scopes: Sequence[ast.Scope]) -> str:
    if not scopes:
        return "the model"
    first, last = scopes[0].span, scopes[-1].span
    return Span(first.source, first.start, last.end).text


# ------------------------------------------------------------------------------- admission


def _admit(
    found: Found, span: Span, inventory: Inventory, report: Report, tie: ast.Tie | None
) -> tuple[Site, ...]:
    """The sites that can be adapted; E207 to E209 for the others, once for each reason."""
    sites: list[Site] = []
    refused: dict[tuple[str, str], list[Entry]] = {}
    for (first, part), answers in found.items():
        entry, kind = inventory.entries[first], inventory.entries[first].kind
        refusal = _refusal(entry, inventory, tie)
        if refusal is not None or kind is None:
            assert refusal is not None
            refused.setdefault(refusal, []).append(entry)
            continue
        index, region = answers[0]
        layer = inventory.entries[index].layer if region.layer is None else region.layer
        mode = _mode(entry, [index for index, _ in answers], inventory)
        tied = _tied(entry, inventory, tie)
        sites.append(site_at(entry, kind, layer, region.container, part, mode, *tied))
    if tie is not None and sites and not refused and not any(site.tie for site in sites):
        hint = f"leave `{tie}` out"
        report.error("E216", "nothing that is selected shares its weight", span, hint=hint)
    for (code, reason), entries in refused.items():
        leave = f"leave it out: `except {entries[0].name}`" if sites else ""
        hint = "; or ".join(filter(None, (_TIES, leave))) if code == "E207" else leave or _ALONE
        _report_refusal(code, reason, hint, entries, span, report)
    return tuple(sites)


def admit(
    index: int,
    span: Span,
    inventory: Inventory,
    report: Report,
    part: Part | None = None,
    tie: ast.Tie | None = None,
) -> Site | None:
    """The site of one entry of the pool, or of some rows of it.

    None where E207 to E209 was reported for it, or E306 for rows that it does not have.
    """
    entry = inventory.entries[index]
    refusal = _refusal(entry, inventory, tie)
    if refusal is None and entry.kind is not None:
        rows = entry.kind.sizes(entry.module).fan_out
        if part is not None and not 0 <= part.start < part.stop <= part.whole == rows:
            message = f"`{entry.path}` has {rows} rows, and not the part {part.name}"
            report.error("E306", message, hint=_OF_ANOTHER)
            return None
        mode = _mode(entry, [index], inventory)
        tied = _tied(entry, inventory, tie)
        return site_at(entry, entry.kind, entry.layer, None, part, mode, *tied)
    assert refusal is not None
    _report_refusal(*refusal, _OF_ANOTHER, [entry], span, report)
    return None


def _mode(entry: Entry, indices: list[int], inventory: Inventory) -> Mode:
    """By its weight where its call is not what a row says, or may never come."""
    bypassed = any(_bypassed(inventory.entries[index], inventory) for index in indices)
    own = entry.own_forward or replaced_forward(entry.module)
    return "value" if own or bypassed else "call"


def _tied(
    entry: Entry, inventory: Inventory, tie: ast.Tie | None
) -> tuple[ast.Tie | None, tuple[nn.Module, ...]]:
    """What becomes of the weight that a layer shares, and the layers that follow it."""
    names = inventory.ties.get(entry.path, ())
    if not names or tie is None:
        return None, ()
    return tie, _sharing(names, inventory) if tie == "share" else ()


def _sharing(names: Sequence[str], inventory: Inventory) -> tuple[nn.Module, ...]:
    """The modules of some weights, by their full names."""
    at = {entry.path: entry for entry in inventory.entries}
    return tuple(at[name.rpartition(".")[0]].module for name in names)


def _unshared(entry: Entry, names: Sequence[str], inventory: Inventory) -> bool:
    """Whether some of the layers that share a weight cannot follow it."""
    weight = parameters_of(entry.module)["weight"]
    every = (entry.module, *_sharing(names, inventory))
    same = all(parameters_of(module).get("weight") is weight for module in every)
    return not same or any(integration_of(module) is not None for module in every)


def _refusal(
    entry: Entry, inventory: Inventory, tie: ast.Tie | None = None
) -> tuple[str, str] | None:
    """Why a module cannot be a site: code and reason."""
    if entry.kind is None:
        cls = type(entry.module).__name__
        return "E208", f"no layer kind knows the weight of {cls}"
    objection = unreadable(entry.module) or entry.kind.objection(entry.module)
    if objection:
        return "E209", objection
    others = inventory.ties.get(entry.path, ())
    shared = ", ".join(f"`{other}`" for other in others)
    if others and tie is None:
        return "E207", f"it shares its weight with {shared}"
    if tie == "share" and others and _unshared(entry, others, inventory):
        return "E209", f"{shared} cannot follow it: it is offloaded, or no layer's weight itself"
    return None


def _bypassed(entry: Entry, inventory: Inventory) -> bool:
    """Whether the owner may read the weight without calling the layer."""
    if entry.parent < 0:
        return False
    owner = base_class(inventory.entries[entry.parent].module)
    return any((qualified_name(cls), entry.name) in READ_BY_OWNER for cls in owner.__mro__)


_TIES = "write `share` after the method for all of them to change, or `untie` for this one alone"
_ALONE = "nothing else is selected, so leave the statement out, or select other modules"
_OF_ANOTHER = "the adapter was made for another model"


def _report_refusal(
    code: str, reason: str, hint: str, entries: list[Entry], span: Span, report: Report
) -> None:
    paths = [entry.path for entry in entries]
    more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
    named = paths[0] or "the model itself"
    report.error(code, f"`{named}`{more} cannot be adapted: {reason}", span, hint=hint)


# ---------------------------------------------------------------------------------- expect


def _check_count(
    selection: ast.Selection, sites: Sequence[Site], report: Report, names: Names
) -> None:
    """E206 if `expect` says another number."""
    wanted = None if selection.expect is None else names(selection.expect)
    if selection.expect is None or wanted is None or wanted == len(sites):
        return
    if not isinstance(wanted, int) or isinstance(wanted, bool):
        message = f"`expect` takes a whole number, not {wanted!r}"
        report.error("E206", message, selection.expect.span, hint=f"{len(sites)} are selected")
        return
    counts = listing(tails((site.path for site in sites), ""))
    report.error(
        "E206",
        f"expected {plural(wanted, 'site')}, found {len(sites)}",
        selection.expect.span,
        label=f"{len(sites)} are selected",
        hint=f"they are {counts}" if sites else "",
    )
