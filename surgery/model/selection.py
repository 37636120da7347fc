"""Set algebra over the candidates of a model: what each clause of a statement leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import assert_never

from surgery.algebra.mentions import nodes
from surgery.errors import Report, Span
from surgery.language import syntax as ast
from surgery.model.facts import Holds, facts_of, nearest_word, values_asked
from surgery.model.fused import parts_of
from surgery.model.holder import parameters_of
from surgery.model.inventory import Entry, Inventory
from surgery.model.nearest import Meant, closest, listing, plural, tails
from surgery.model.parts import Part
from surgery.model.roles import RolePattern, Tails, compiled, roles_of
from surgery.model.scopes import Region

Key = tuple[int, Part | None]
"""What a candidate is known by: the index of its first entry, and which rows of it are meant."""

Found = Mapping[Key, Sequence[tuple[int, Region]]]
"""Candidates: every path that answers, and its region."""


def chosen(selection: ast.Selection, view: View, report: Report, holds: Holds) -> Found:
    """What all clauses leave; each that takes nothing, or leaves nothing, is reported."""
    view = replace(view, roles=_roles(selection))
    patterns = _Patterns(view.inventory, report)
    found = _whole(_taken(selection.selector, view, patterns))
    for node, pattern in patterns.known:
        _check_alternatives(pattern, node, view, report)
    if not report.failed:
        for node in patterns.idle:
            _report_idle(node, view, report)
    if found and selection.where is not None:
        found = _filtered(selection.where, found, view, report, holds)
    if found and selection.exclude is not None:
        found = _without(selection.exclude, found, view, report)
    return found


# ---------------------------------------------------------------------------------- matching


class _Patterns:
    """The patterns of a selector, each compiled once, in order.

    idle: the compounds that take nothing, although each of their parts takes something.
    """

    def __init__(self, inventory: Inventory, report: Report) -> None:
        self.inventory = inventory
        self.report = report
        self.known: list[tuple[ast.Pattern, Tails]] = []
        self.sound = True
        self.idle: list[ast.Both | ast.Complement] = []

    def __call__(self, node: ast.Pattern) -> Tails | None:
        """The compiled one; None if E007 or E213 was reported for it."""
        pattern = compiled(node, self.inventory, self.report)
        if pattern is None:
            self.sound = False
        else:
            self.known.append((node, pattern))
        return pattern

    def noted(self, node: ast.Both | ast.Complement, found: Found, parts_take: bool) -> Found:
        """What a compound takes, which is noted where it is nothing and its parts take some."""
        if parts_take and not found:
            self.idle.append(node)
        return found


@dataclass(frozen=True, slots=True)
class View:
    """The part of a model that a statement looks at; `text` is how the statement says it.

    roles: those that the statement names. Rows that play one of them are candidates as well.
    """

    inventory: Inventory
    pool: Sequence[tuple[int, Region]]
    text: str
    roles: tuple[str, ...] = ()

    @staticmethod
    def of(inventory: Inventory, regions: Sequence[Region], text: str) -> View:
        """Some regions of a model: the candidates in order, each with the first it lies in."""
        found: dict[int, Region] = {}
        for region in regions:
            for index in inventory.below(region.entry):
                found.setdefault(index, region)
        return View(inventory, sorted(found.items(), key=itemgetter(0)), text)

    def paths(self) -> list[str]:
        """The candidates' paths."""
        return [self.inventory.entries[index].path for index, _ in self.pool]

    def parts(self, index: int) -> tuple[Part | None, ...]:
        """All that is a candidate at an entry: the whole, and what plays a role by itself."""
        if not self.roles:
            return (None,)
        parts = parts_of(index, self.inventory)
        return (None, *(parts[role] for role in self.roles if role in parts))

    def grouped(self, takes: Callable[[str, Part | None], bool]) -> Found:
        """The candidates that are taken, by path and part: all paths that answer."""
        entries = self.inventory.entries
        found: dict[Key, list[tuple[int, Region]]] = {}
        for index, region in self.pool:
            for part in self.parts(index):
                if takes(entries[index].path, part):
                    found.setdefault((entries[index].first, part), []).append((index, region))
        return found

    def taken(self, node: ast.Pattern, pattern: Tails) -> Found:
        """What a pattern takes. A role takes the whole that plays it, or the rows that do."""
        if not isinstance(node, ast.Role):
            return self.grouped(lambda path, part: pattern.matches_tail(path))
        return self.grouped(
            lambda path, part: (
                pattern.matches_tail(path) if part is None else part.name == node.name
            )
        )


def _taken(node: ast.Selector, view: View, patterns: _Patterns) -> Found:
    match node:
        case ast.Either(left, right):
            return _union(_taken(left, view, patterns), _taken(right, view, patterns))
        case ast.Both(left, right):
            some, others = _taken(left, view, patterns), _taken(right, view, patterns)
            return patterns.noted(node, _common(some, others), bool(some and others))
        case ast.Complement(operand):
            taken = _taken(operand, view, patterns)
            everything = view.grouped(lambda path, part: True)
            split = {first for first, part in taken if part is not None}
            # A whole of which the operand takes some rows is neither in it nor outside of it.
            left = {
                key: answers
                for key, answers in everything.items()
                if not _covered(key, taken) and (key[1] is not None or key[0] not in split)
            }
            return patterns.noted(node, left, bool(taken))
        case ast.Regex() | ast.Glob() | ast.Role():
            pattern = patterns(node)
            return {} if pattern is None else view.taken(node, pattern)
        case _:
            assert_never(node)


def _covered(key: Key, taken: Found) -> bool:
    """Whether a candidate is taken, by itself or as a part of what is."""
    return key in taken or (key[0], None) in taken


def _whole(found: Found) -> Found:
    """The candidates in module order, without parts of what is there as a whole."""
    kept = [k for k in found if k[1] is None or (k[0], None) not in found]
    kept.sort(key=lambda k: (k[0], -1 if k[1] is None else k[1].start))
    return {key: found[key] for key in kept}


def _roles(selection: ast.Selection) -> tuple[str, ...]:
    """The roles that a statement selects by."""
    given = (selection.selector, selection.exclude)
    every = [n.name for node in given if node for n in nodes(node) if isinstance(n, ast.Role)]
    return tuple(dict.fromkeys(every))


def _report_torn(
    node: ast.Selector, taken: Found, found: Found, view: View, report: Report
) -> bool:
    """E215 where `except` would take some rows out of what is selected as a whole."""
    torn = [first for first, part in taken if part is not None and (first, None) in found]
    if not torn:
        return False
    path = view.inventory.entries[torn[0]].path
    others = ", ".join(f"`@{name}`" for name in parts_of(torn[0], view.inventory))
    report.error(
        "E215",
        f"`except {node.span.text}` takes rows out of `{path}`, which is selected as a whole",
        node.span,
        hint=f"select its parts instead: it has {others}",
    )
    return True


def _union(left: Found, right: Found) -> Found:
    """What either takes; a module that both take answers by the paths of both, in order."""
    return {
        first: sorted({*left.get(first, ()), *right.get(first, ())}, key=itemgetter(0))
        for first in {**left, **right}
    }


def _common(left: Found, right: Found) -> Found:
    """What both take; a module answers by the paths that both take, else by those of both."""
    every = _union(left, right)
    found: dict[Key, Sequence[tuple[int, Region]]] = {}
    for first in left.keys() & right.keys():
        shared = {*left[first]} & {*right[first]}
        found[first] = [a for a in every[first] if a in shared] or every[first]
    return found


def _check_alternatives(pattern: Tails, node: ast.Pattern, view: View, report: Report) -> None:
    """E201 for a pattern, or an alternative of it, that takes no candidate in the scope."""
    if isinstance(pattern, RolePattern):
        if not view.taken(node, pattern):
            _report_no_role(pattern, node.span, view, report)
        return
    paths = view.paths()
    for alternative, span in _alternatives(pattern, node):
        if not any(map(alternative.matches_tail, paths)):
            _report_nothing(alternative, span, view, report)


def _alternatives(pattern: Tails, node: ast.Pattern) -> tuple[tuple[Tails, Span], ...]:
    several = len(pattern.alternatives) > 1
    return pattern.alternatives if several else ((pattern, node.span),)


def _report_idle(node: ast.Both | ast.Complement, view: View, report: Report) -> None:
    message = f"`{node.span.text}` selects nothing in {view.text}"
    if isinstance(node, ast.Both):
        label, hint = "no site is in both", "`A | B` takes what either takes"
    else:
        label, hint = f"`{node.operand.span.text}` takes all there is", "leave it out"
    report.error("E201", message, node.span, label=label, hint=hint)


def _without(node: ast.Selector, found: Found, view: View, report: Report) -> Found:
    """What is left after `except`; E202 for what takes nothing away, E201 if nothing is left."""
    entries = view.inventory.entries
    firsts = {first for first, _ in found}
    paths = [entries[i].path for i, _ in view.pool if entries[i].first in firsts]
    gone: set[Key] = set()
    for part in _summands(node):
        patterns = _Patterns(view.inventory, report)
        every = _taken(part, view, patterns)
        taken = {key for key in found if _covered(key, every)}
        gone |= taken
        if _report_torn(part, every, found, view, report):
            continue
        if isinstance(part, ast.Regex | ast.Glob):
            _check_exceptions(part, patterns, paths, report)
        elif not taken and patterns.sound:
            message = f"`except {part.span.text}` removes nothing"
            hint = f"selected are {listing(tails(paths, ''))}"
            report.error("E202", message, part.span, hint=hint)
    left = {first: answers for first, answers in found.items() if first not in gone}
    if not left:
        hint = "take away less, or leave the statement out"
        report.error("E201", "`except` leaves nothing", node.span, hint=hint)
    return left


def _check_exceptions(
    part: ast.Pattern, patterns: _Patterns, paths: list[str], report: Report
) -> None:
    """E202 for each alternative of a part of `except` that none of the selected paths has."""
    for _, pattern in patterns.known:
        for alternative, span in _alternatives(pattern, part):
            if not any(map(alternative.matches_tail, paths)):
                _report_no_exception(alternative, span, paths, report)


def _summands(node: ast.Selector) -> tuple[ast.Selector, ...]:
    """The parts of `A | B | …`, each of which should take something."""
    if isinstance(node, ast.Either):
        return (*_summands(node.left), *_summands(node.right))
    return (node,)


# ------------------------------------------------------------------------------------ where


def _filtered(
    where: ast.Expression, found: Found, view: View, report: Report, holds: Holds
) -> Found:
    """What a `where` leaves: the candidates of which it holds by one of their paths."""
    left: dict[Key, Sequence[tuple[int, Region]]] = {}
    for (first, part), answers in found.items():
        kept: list[tuple[int, Region]] = []
        for index, region in answers:
            held = holds(where, facts_of(index, region, view.inventory, part))
            if held is None:
                return {}  # it cannot be evaluated, which was said once
            kept += [(index, region)] * held
        if kept:
            left[first, part] = kept
    if not left:
        facts = [
            facts_of(i, r, view.inventory, part)
            for (_, part), answers in found.items()
            for i, r in answers
        ]
        report.error(
            "E211",
            f"`where {where.span.text}` leaves nothing",
            where.span,
            label=nearest_word(where, facts)
            or f"of {plural(len(found), 'site')} it holds for none",
            hint=values_asked(where, facts),
        )
    return left


# --------------------------------------------------------------------------- selecting nothing


def _report_nothing(pattern: Tails, span: Span, view: View, report: Report) -> None:
    wanted = pattern.literal or span.text.strip("/")
    counts = tails(view.paths(), wanted)
    near = closest(wanted, counts)
    label = near.question(_having(near, counts, view))
    hint = near.others(counts) if near.best else f"there are {listing(counts)}"
    hint = _elsewhere(pattern, view) or hint
    report.error("E201", f"`{wanted}` selects nothing in {view.text}", span, label=label, hint=hint)


def _having(near: Meant, counts: Counter[str], view: View) -> str:
    count = sum(counts[name] for name in near.best)
    have = "module has" if count == 1 else "modules have"
    return f"{count} {have} that name in {view.text}"


def _report_no_role(pattern: RolePattern, span: Span, view: View, report: Report) -> None:
    fused = {role for index, _ in view.pool for role in parts_of(index, view.inventory)}
    here = dict.fromkeys([*roles_of(view.inventory, view.paths()), *sorted(fused)])
    listed = ", ".join(f"`@{name}`" for name in here)
    hint = f"here are {listed}" if listed else f"there are {listing(tails(view.paths(), ''))}"
    label = _elsewhere(pattern, view)
    report.error("E212", f"nothing in {view.text} is a `{span.text}`", span, label=label, hint=hint)


def _elsewhere(pattern: Tails, view: View) -> str:
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


def _bare(pattern: Tails, view: View) -> str:
    """Whether the pattern names a parameter that a module owns beside or instead of a weight."""
    for entry in view.inventory.entries:
        for name in parameters_of(entry.module):
            path = f"{entry.path}.{name}" if entry.path else name
            if pattern.matches_tail(path):
                cls = type(entry.module).__name__
                return f"`{path}` is a parameter of a {cls}; a site is a module, not a parameter"
    return ""


def _holds(entry: Entry, view: View) -> bool:
    return any(entry.path and p.startswith(f"{entry.path}.") for p in view.paths())


def _report_no_exception(pattern: Tails, span: Span, paths: list[str], report: Report) -> None:
    wanted = pattern.literal or span.text.strip("/")
    counts = tails(paths, wanted)
    near = closest(wanted, counts)
    label = near.question()
    hint = near.others(counts) if near.best else f"selected are {listing(counts)}"
    report.error("E202", f"`except {wanted}` removes nothing", span, label=label, hint=hint)
