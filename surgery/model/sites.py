"""Selectors on a module tree: which sites a statement means, and every way it may mean none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn
from torch.nn.parameter import is_lazy

from surgery.errors import Report, Span
from surgery.language import syntax as ast
from surgery.model import called
from surgery.model.bare import out_of_reach
from surgery.model.bypassed import read_by
from surgery.model.candidates import kind_at
from surgery.model.facts import Holds
from surgery.model.holder import parameters_of
from surgery.model.hooked import integration_of, packing_of, replaced_forward
from surgery.model.inventory import (
    Entry,
    Inventory,
    Site,
    joined,
    site_at,
    sizes_of,
    survey,
)
from surgery.model.layers import LayerKind, Mode
from surgery.model.nearest import listing, plural, tails
from surgery.model.parts import WHOLE, ParameterSlice
from surgery.model.scopes import Names, regions_of
from surgery.model.selection import Found, View, chosen, roles_named
from surgery.model.storage import unreadable
from surgery.model.tensors import modules_meant

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
    verb: ast.Verb | None = None,
    kind: str = "",
) -> tuple[Site, ...]:
    """The sites that `S in SCOPE where COND except S expect N` means, in module order.

    verb: `train` or `save`, behind which they are parameters as they lie. kind: of sites that are
    nothing which a parameter holds.

    `names` evaluates an index or a count; None says that it has reported why it cannot. What is
    wrong goes to `report` (E201 to E214), and the sites that are right are given all the same.
    """
    before = len(report.found)
    mine = Report()
    regions = regions_of(selection.scopes, inventory, mine, names)
    sites: tuple[Site, ...] = ()
    paths: list[str] = []
    if regions is not None and (selection.optional or not mine.failed):
        text = _scope_text(selection.scopes)
        view = View.of(inventory, regions, text, roles_named(selection), names, verb, kind)
        found = chosen(selection, view, mine, holds)
        sites = _admit(found, selection.selector.span, inventory, mine, tie)
        paths = [site.path for site in sites]
        if verb == "save":
            taken = (answers[0][2] for answers in found.values())
            paths = sorted(modules_meant(selection.selector, taken, inventory))
    lifted = _LIFTED if selection.optional else frozenset[str]()
    report.extend(d for d in mine.found if d.code not in lifted)
    failed = any(d.severity == "error" for d in report.found[before:])
    if regions is not None and not failed:
        _check_count(selection, paths, _NOUNS[verb], report, names)
    return sites


_NOUNS: Mapping[ast.Verb | None, str] = {None: "site", "train": "parameter", "save": "module"}
"""What `expect` counts."""


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
    refused: dict[tuple[str, str], list[tuple[Entry, ParameterSlice]]] = {}
    for (first, at), answers in found.items():
        entry = inventory.entries[first]
        index, region, one = answers[0]
        layer = inventory.entries[index].layer if region.layer is None else region.layer
        if at.kind:
            objection = called.objection(first, inventory)
            if objection:
                refused.setdefault(("E209", objection), []).append((entry, at))
            else:
                sites.append(called.call_site(first, layer, region.container, inventory))
            continue
        refusal = _refusal(entry, one.kind, at, inventory, tie)
        if refusal is not None or one.kind is None:
            assert refusal is not None
            refused.setdefault(refusal, []).append((entry, at))
            continue
        mode = _mode(entry, one.kind, at, [index for index, _, _ in answers], inventory)
        if mode == "value" and _is_packed(entry, at):
            refused.setdefault(("E209", _UNREACHED), []).append((entry, at))
            continue
        tied = _tied(entry, at, inventory, tie)
        sites.append(site_at(entry, one.kind, layer, region.container, at, mode, *tied))
    if tie is not None and sites and not refused and not any(site.tie for site in sites):
        hint = f"leave `{tie}` out"
        report.error("E216", "nothing that is selected shares its weight", span, hint=hint)
    for (code, reason), some in refused.items():
        (entry, at), paths = some[0], [_path_at(*one) for one in some]
        name = paths[0].rpartition(".")[2] if not at.tensor else joined(entry.name, at.parameter)
        leave = f"leave it out: `except {name}`" if sites else ""
        ties = f"write `share` {'at the end' if at.tensor else 'after the method'} {_TIES}"
        hint = "; or ".join(filter(None, (ties, leave))) if code == "E207" else leave or _ALONE
        _report_refusal(code, reason, hint, paths, span, report)
    return tuple(sites)


def admit(
    index: int,
    span: Span,
    inventory: Inventory,
    report: Report,
    at: ParameterSlice = WHOLE,
    tie: ast.Tie | None = None,
) -> Site | None:
    """The site of one entry of the pool, or of a slice of it.

    None where E207 to E209 was reported for it, or E306 for a slice that it does not have.
    """
    entry = inventory.entries[index]
    if at.kind:
        objection = called.objection(index, inventory)
        if not objection:
            return called.call_site(index, entry.layer, None, inventory)
        _report_refusal("E209", objection, _OF_ANOTHER, [entry.path], span, report)
        return None
    kind = kind_at(entry, at)
    if parameters_of(entry.module).get(at.parameter) is None or not _fits(entry, kind, at):
        message = f"`{entry.path}` has no {'.'.join(at.names) or at.parameter}"
        report.error("E306", message, hint=_OF_ANOTHER)
        return None
    refusal = _refusal(entry, kind, at, inventory, tie)
    mode = "call" if kind is None else _mode(entry, kind, at, [index], inventory)
    if mode == "value" and _is_packed(entry, at):
        refusal = refusal or ("E209", _UNREACHED)
    if refusal is None and kind is not None:
        tied = _tied(entry, at, inventory, tie)
        return site_at(entry, kind, entry.layer, None, at, mode, *tied)
    assert refusal is not None
    _report_refusal(*refusal, _OF_ANOTHER, [_path_at(entry, at)], span, report)
    return None


def _fits(entry: Entry, kind: LayerKind | None, at: ParameterSlice) -> bool:
    """Whether a parameter has such a matrix, and that such rows."""
    weight = parameters_of(entry.module).get(at.parameter)
    if weight is None or kind is None or is_lazy(weight):
        return True  # which is refused for another reason
    if at.index is not None and not (kind.bare and weight.dim() == 3 and at.index < len(weight)):
        return False
    if at.picked:
        return weight.dim() > 1 and all(row < len(weight) for row in at.picked)
    rows = sizes_of(kind, entry.module, replace(at, part=None)).fan_out
    return at.part is None or (at.part.fits and at.part.whole == rows)


def _mode(
    entry: Entry, kind: LayerKind, at: ParameterSlice, indices: list[int], inventory: Inventory
) -> Mode:
    """By its value where the module's call is not what a row says, or may never come."""
    if at.tensor:
        return "value"
    used = entry.used.get(at.parameter)
    if used is not None:
        return "value" if used.by_value else "call"
    bypassed = any(_bypassed(inventory.entries[index], inventory) for index in indices)
    own = kind.bare or entry.own_forward or replaced_forward(entry.module)
    return "value" if own or bypassed else "call"


def _tied(
    entry: Entry, at: ParameterSlice, inventory: Inventory, tie: ast.Tie | None
) -> tuple[ast.Tie | None, tuple[nn.Module, ...]]:
    """What becomes of the weight that a layer shares, and the layers that follow it."""
    names = inventory.ties.get(joined(entry.path, at.parameter), ())
    if not names or tie is None:
        return None, ()
    return tie, _sharing(names, inventory) if tie == "share" else ()


def _sharing(names: Sequence[str], inventory: Inventory) -> tuple[nn.Module, ...]:
    """The modules of some weights, by their full names."""
    by_path = {entry.path: entry for entry in inventory.entries}
    return tuple(by_path[name.rpartition(".")[0]].module for name in names)


def _unshared(entry: Entry, at: ParameterSlice, names: Sequence[str], inventory: Inventory) -> bool:
    """Whether some of the layers that share a weight cannot follow it."""
    weight = parameters_of(entry.module)[at.parameter]
    every = (entry.module, *_sharing(names, inventory))
    if _is_packed(entry, at):
        return True
    same = all(parameters_of(module).get(at.parameter) is weight for module in every)
    return not same or any(integration_of(module) is not None for module in every)


def _refusal(
    entry: Entry,
    kind: LayerKind | None,
    at: ParameterSlice,
    inventory: Inventory,
    tie: ast.Tie | None = None,
) -> tuple[str, str] | None:
    """Why a slice of a module cannot be a site: code and reason."""
    if kind is None:
        cls = type(entry.module).__name__
        return "E208", f"no layer kind knows the weight of {cls}"
    objection = unreadable(entry.module, at.parameter) or kind.objection(entry.module)
    what = "weight"
    if at.tensor:
        what, objection = "data", objection.replace("its weight", "it", 1) or _no_tensor(entry, at)
    objection = objection or (out_of_reach(entry.module) if kind.bare else "")
    if objection:
        return "E209", objection
    others = inventory.ties.get(joined(entry.path, at.parameter), ())
    shared = ", ".join(f"`{other}`" for other in others)
    if others and tie is None:
        return "E207", f"it shares its {what} with {shared}"
    if tie == "share" and others and _unshared(entry, at, others, inventory):
        why = "it is offloaded, quantised, or no layer's weight itself"
        return "E209", f"{shared} cannot follow it: {why}"
    return None


def _is_packed(entry: Entry, at: ParameterSlice) -> bool:
    return packing_of(entry.module, at.parameter) is not None


_UNREACHED = "its weight is quantised, and is reached by nothing but its layer's own call"


def _no_tensor(entry: Entry, at: ParameterSlice) -> str:
    """Why no copy of a parameter can be trained, or ""."""
    own = parameters_of(entry.module)[at.parameter]
    return "its elements are complex" if own is not None and own.is_complex() else ""


def _path_at(entry: Entry, at: ParameterSlice) -> str:
    """What is refused: a module, or a parameter of it."""
    own = at.tensor or (at.parameter != "weight" and not at.kind)
    return joined(entry.path, at.parameter) if own else entry.path


def _bypassed(entry: Entry, inventory: Inventory) -> bool:
    """Whether a module above may read the weight without calling the layer."""
    chain: tuple[str, ...] = ()
    while entry.parent >= 0:
        chain = (entry.name, *chain)
        entry = inventory.entries[entry.parent]
        if read_by(entry.module, chain):
            return True
    return False


_TIES = "for all of them to change, or `untie` for this one alone"
_ALONE = "nothing else is selected, so leave the statement out, or select other modules"
_OF_ANOTHER = "the adapter was made for another model"


def _report_refusal(
    code: str, reason: str, hint: str, paths: list[str], span: Span, report: Report
) -> None:
    more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
    named = paths[0] or "the model itself"
    report.error(code, f"`{named}`{more} cannot be adapted: {reason}", span, hint=hint)


# ---------------------------------------------------------------------------------- expect


def _check_count(
    selection: ast.Selection, paths: Sequence[str], noun: str, report: Report, names: Names
) -> None:
    """E206 if `expect` says another number."""
    wanted = None if selection.expect is None else names(selection.expect)
    if selection.expect is None or wanted is None or wanted == len(paths):
        return
    if not isinstance(wanted, int) or isinstance(wanted, bool):
        message = f"`expect` takes a whole number, not {wanted!r}"
        report.error("E206", message, selection.expect.span, hint=f"{len(paths)} are selected")
        return
    counts = listing(tails(paths, ""))
    report.error(
        "E206",
        f"expected {plural(wanted, noun)}, found {len(paths)}",
        selection.expect.span,
        label=f"{len(paths)} are selected",
        hint=f"they are {counts}" if paths else "",
    )
