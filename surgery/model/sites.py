"""Selectors on a module tree: which sites a statement means, and every way it may mean none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from surgery.errors import Report, Span
from surgery.language.patterns import Pattern, compile_selector
from surgery.language.syntax import Match, Selector
from surgery.model.holder import parameters_of
from surgery.model.hooked import replaced_forward
from surgery.model.inventory import Entry, Inventory, Site, site_at, survey
from surgery.model.layers import BYPASSES, Bypass, qualified_name
from surgery.model.nearest import closest, listing, plural, tails
from surgery.model.scopes import Names, Region, resolve
from surgery.model.storage import unreadable

__all__ = ["Inventory", "Names", "Site", "admit", "select", "survey"]


def select(match: Match, inventory: Inventory, report: Report, names: Names) -> tuple[Site, ...]:
    """The sites that `match S in SCOPE except S expect N` means, in module order.

    `names` evaluates an index or a count; None says that it has reported why it cannot. What is
    wrong goes to `report` (E201 to E210), and the sites that are right are given all the same.
    """
    pattern = compile_selector(match.selector, report)
    exclude = None if match.exclude is None else compile_selector(match.exclude, report)
    regions = resolve(match.scope, inventory, report, names)
    if pattern is None or not regions or (exclude is None) != (match.exclude is None):
        return ()
    mine = Report()
    view = _View(inventory, regions, "the model" if match.scope is None else match.scope.span.text)
    found = view.matching(pattern)
    _check_alternatives(pattern, match.selector, bool(found), view, mine)
    if found and exclude is not None and match.exclude is not None:
        found = _without(exclude, match.exclude, found, view, mine)
        if not found:
            hint = "take away less, or leave the statement out"
            mine.error("E201", "`except` leaves nothing", match.exclude.span, hint=hint)
    sites = _admit(found, match.selector.span, inventory, mine)
    if not mine.failed:
        _check_count(match, sites, mine, names)
    report.extend(mine.found)
    return sites


# ---------------------------------------------------------------------------------- matching


@dataclass(frozen=True, slots=True)
class _View:
    """The part of a model that a statement looks at; `text` is how the statement says it."""

    inventory: Inventory
    regions: Sequence[Region]
    text: str

    def pool(self) -> Iterator[tuple[int, Region]]:
        """The candidates, each with the region it lies in."""
        for region in self.regions:
            for index in self.inventory.below(region.entry):
                yield index, region

    def paths(self) -> list[str]:
        """The candidates' paths."""
        return [self.inventory.entries[index].path for index, _ in self.pool()]

    def matching(self, pattern: Pattern) -> dict[int, list[tuple[int, Region]]]:
        """The candidates that a pattern takes: by first entry, in order, all paths that answer."""
        entries = self.inventory.entries
        found: dict[int, list[tuple[int, Region]]] = {}
        for index, region in self.pool():
            if pattern.matches_tail(entries[index].path):
                found.setdefault(entries[index].first, []).append((index, region))
        return dict(sorted(found.items()))


_Found = Mapping[int, Sequence[tuple[int, Region]]]


def _check_alternatives(
    pattern: Pattern, node: Selector, found: bool, view: _View, report: Report
) -> None:
    """E201 for a selector, or an alternative of it, that takes no candidate in the scope."""
    alternatives = _alternatives(pattern, node)
    if found and len(alternatives) == 1:
        return
    paths = view.paths()
    for alternative, span in alternatives:
        if not any(map(alternative.matches_tail, paths)):
            _report_nothing(alternative, span, view, report)


def _alternatives(pattern: Pattern, node: Selector) -> tuple[tuple[Pattern, Span], ...]:
    several = len(pattern.alternatives) > 1
    return pattern.alternatives if several else ((pattern, node.span),)


def _without(
    exclude: Pattern, node: Selector, found: _Found, view: _View, report: Report
) -> _Found:
    """What is left after `except`; E202 for an alternative of it that takes nothing away."""
    entries = view.inventory.entries
    paths = {first: [entries[i].path for i, _ in answers] for first, answers in found.items()}
    every = [path for group in paths.values() for path in group]
    for alternative, span in _alternatives(exclude, node):
        if not any(map(alternative.matches_tail, every)):
            _report_no_exception(alternative, span, every, report)
    return {f: a for f, a in found.items() if not any(map(exclude.matches_tail, paths[f]))}


# --------------------------------------------------------------------------- selecting nothing


def _report_nothing(pattern: Pattern, span: Span, view: _View, report: Report) -> None:
    wanted = pattern.literal or span.text.strip("/")
    counts = tails(view.paths(), wanted)
    near = closest(wanted, counts)
    label = ""
    if near:
        have = "module has" if counts[near] == 1 else "modules have"
        label = f"did you mean `{near}`? {counts[near]} {have} that name in {view.text}"
    hint = _elsewhere(pattern, view) or ("" if near else f"there are {listing(counts)}")
    report.error("E201", f"`{wanted}` selects nothing in {view.text}", span, label=label, hint=hint)


def _elsewhere(pattern: Pattern, view: _View) -> str:
    """What the pattern would take, were it not for the scope or for its owning no matrix."""
    entries = view.inventory.entries
    outside = [p for i in view.inventory.pool if pattern.matches_tail(p := entries[i].path)]
    if outside:
        many = plural(len(outside), "module")
        return f"{many} outside {view.text} would match, the first is `{outside[0]}`"
    for entry in entries:
        if pattern.matches_tail(entry.path):
            cls = type(entry.module).__name__
            below = f"; write `{entry.name}.**` for what lies below" if _holds(entry, view) else ""
            return f"`{entry.path}` is a {cls}, which owns no weight matrix{below}"
    return _bare(pattern, view)


def _bare(pattern: Pattern, view: _View) -> str:
    """Whether the pattern names a parameter that a module owns beside or instead of a weight."""
    for entry in view.inventory.entries:
        for name in parameters_of(entry.module):
            path = f"{entry.path}.{name}" if entry.path else name
            if pattern.matches_tail(path):
                cls = type(entry.module).__name__
                return f"`{path}` is a parameter of a {cls}; a site is a module, not a parameter"
    return ""


def _holds(entry: Entry, view: _View) -> bool:
    return any(entry.path and p.startswith(f"{entry.path}.") for p in view.paths())


def _report_no_exception(pattern: Pattern, span: Span, paths: list[str], report: Report) -> None:
    wanted = pattern.literal or span.text.strip("/")
    counts = tails(paths, wanted)
    near = closest(wanted, counts)
    label = f"did you mean `{near}`?" if near else ""
    hint = "" if near else f"selected are {listing(counts)}"
    report.error("E202", f"`except {wanted}` removes nothing", span, label=label, hint=hint)


# ------------------------------------------------------------------------------- admission


def _admit(found: _Found, span: Span, inventory: Inventory, report: Report) -> tuple[Site, ...]:
    """The sites that can be adapted; E207 to E210 for the others, once for each reason."""
    sites: list[Site] = []
    refused: dict[tuple[str, str], list[Entry]] = {}
    for first, answers in found.items():
        entry, kind = inventory.entries[first], inventory.entries[first].kind
        refusal = _refusal(entry, [index for index, _ in answers], inventory)
        if refusal is not None or kind is None:
            assert refusal is not None
            refused.setdefault(refusal, []).append(entry)
            continue
        index, region = answers[0]
        layer = inventory.entries[index].layer if region.layer is None else region.layer
        sites.append(site_at(entry, kind, layer, region.container))
    for (code, reason), entries in refused.items():
        hint = f"leave it out: `except {entries[0].name}`" if sites else _ALONE
        _report_refusal(code, reason, hint, entries, span, report)
    return tuple(sites)


def admit(index: int, span: Span, inventory: Inventory, report: Report) -> Site | None:
    """The site of one entry of the pool; None where E207 to E210 was reported for it."""
    entry = inventory.entries[index]
    refusal = _refusal(entry, [index], inventory)
    if refusal is None and entry.kind is not None:
        return site_at(entry, entry.kind, entry.layer, None)
    assert refusal is not None
    _report_refusal(*refusal, _OF_ANOTHER, [entry], span, report)
    return None


def _refusal(entry: Entry, indices: list[int], inventory: Inventory) -> tuple[str, str] | None:
    """Why a module cannot be a site: code and reason."""
    if entry.kind is None:
        cls = type(entry.module).__name__
        return "E208", f"no layer kind knows the forward of {cls}"
    for index in indices:
        bypass = _bypass(inventory.entries[index], inventory)
        if bypass is not None:
            return "E210", bypass.reason
    objection = _objection(entry.module) or entry.kind.objection(entry.module)
    if objection:
        return "E209", objection
    others = inventory.ties.get(entry.path)
    if others:
        shared = ", ".join(f"`{other}`" for other in others)
        return "E207", f"it shares its weight with {shared}"
    return None


def _objection(module: nn.Module) -> str:
    if replaced_forward(module):
        return "its forward was replaced on the instance, so another class would never be called"
    return unreadable(module)


def _bypass(entry: Entry, inventory: Inventory) -> Bypass | None:
    if entry.parent < 0:
        return None
    owner = type(inventory.entries[entry.parent].module)
    owner = cast(type[nn.Module], getattr(owner, "surgery_base", owner))
    return next(
        (b for cls in owner.__mro__ if (b := _BYPASSED.get((qualified_name(cls), entry.name)))),
        None,
    )


_ALONE = "nothing else is selected, so leave the statement out, or select other modules"
_OF_ANOTHER = "the adapter was made for another model"
_BYPASSED = {(bypass.owner, bypass.child): bypass for bypass in BYPASSES}


def _report_refusal(
    code: str, reason: str, hint: str, entries: list[Entry], span: Span, report: Report
) -> None:
    paths = [entry.path for entry in entries]
    more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
    named = paths[0] or "the model itself"
    report.error(code, f"`{named}`{more} cannot be adapted: {reason}", span, hint=hint)


# ---------------------------------------------------------------------------------- expect


def _check_count(match: Match, sites: Sequence[Site], report: Report, names: Names) -> None:
    """E206 if `expect` says another number."""
    wanted = None if match.expect is None else names(match.expect)
    if match.expect is None or wanted is None or wanted == len(sites):
        return
    if not isinstance(wanted, int) or isinstance(wanted, bool):
        message = f"`expect` takes a whole number, not {wanted!r}"
        report.error("E206", message, match.expect.span, hint=f"{len(sites)} are selected")
        return
    counts = listing(tails((site.path for site in sites), ""))
    report.error(
        "E206",
        f"expected {plural(wanted, 'site')}, found {len(sites)}",
        match.expect.span,
        label=f"{len(sites)} are selected",
        hint=f"they are {counts}",
    )
