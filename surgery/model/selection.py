"""Set algebra over the candidates of a model: what each clause of a statement leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import assert_never

from surgery.algebra.mentions import nodes
from surgery.errors import Report, Span
from surgery.language import syntax as ast
from surgery.model.bare import beside
from surgery.model.called import POOLS
from surgery.model.candidates import Candidate, candidates, parts_of
from surgery.model.facts import Holds, facts_of, nearest_word, values_asked
from surgery.model.inventory import Entry, Inventory
from surgery.model.nearest import Meant, closest, listing, plural, tails
from surgery.model.parts import ParameterSlice
from surgery.model.roles import RolePattern, Tails, compiled, roles_of
from surgery.model.rows import rows_of
from surgery.model.scopes import Names, Region
from surgery.model.tensors import elsewhere, noun, tensors

Key = tuple[int, ParameterSlice]
"""What a candidate is known by: the index of its first entry, and which slice of it is meant."""

Answer = tuple[int, Region, Candidate]
"""An entry, the region that it is in, and what of it is meant."""

Found = Mapping[Key, Sequence[Answer]]
"""Candidates: every path that answers."""


def chosen(selection: ast.Selection, view: View, report: Report, holds: Holds) -> Found:
    """What all clauses leave; each that takes nothing, or leaves nothing, is reported."""
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
    names: evaluates the bounds of a slice; None where it has reported why it cannot.
    verb: of a statement that takes parameters as they lie.
    """

    inventory: Inventory
    pool: Sequence[Answer]
    text: str
    roles: tuple[str, ...]
    names: Names
    verb: ast.Verb | None = None

    @staticmethod
    def of(
        inventory: Inventory,
        regions: Sequence[Region],
        text: str,
        roles: tuple[str, ...],
        names: Names,
        verb: ast.Verb | None = None,
        kind: str = "",
    ) -> View:
        """The candidates in some regions in order, each with the first of them; see `select`."""
        if verb is not None or kind:
            pool = tensors(inventory, regions, verb) if verb else POOLS[kind](inventory, regions)
            return View(inventory, pool, text, roles, names, verb)
        found: dict[tuple[int, int | None, int | None], Region] = {}
        for region in regions:
            for index in inventory.below(region.entry):
                found.setdefault((index, region.matrix, region.head), region)
        pool = [
            (index, region, one)
            for (index, matrix, head), region in sorted(found.items(), key=_by_entry)
            for one in candidates(index, inventory, roles, matrix, head)
        ]
        return View(inventory, pool, text, roles, names)

    def paths(self) -> list[str]:
        """The candidates' paths, but for what must be named."""
        some = (one for _, _, one in self.pool if not one.shy)
        if self.verb is None:
            return [one.path for one in some]
        return [*dict.fromkeys(path for one in some for path in one.paths)]

    def grouped(self, takes: Callable[[Candidate], bool]) -> Found:
        """The candidates that are taken: all paths that answer."""
        entries = self.inventory.entries
        found: dict[Key, list[Answer]] = {}
        for index, region, one in self.pool:
            if takes(one):
                found.setdefault((entries[index].first, one.at), []).append((index, region, one))
        return found

    def taken(self, node: ast.Pattern, pattern: Tails) -> Found:
        """What a pattern takes. A role takes the whole that plays it, or the rows that do."""
        role = node.name if isinstance(node, ast.Role) else None
        return self.grouped(lambda one: _takes(pattern, role, one))


def _by_entry(row: tuple[tuple[int, int | None, int | None], Region]) -> tuple[int, ...]:
    index, *rest = row[0]
    return index, *(-1 if i is None else i for i in rest)


def _takes(pattern: Tails, role: str | None, one: Candidate) -> bool:
    if role is not None and one.role:
        return one.role == role
    if not any(map(pattern.matches_tail, one.paths)):
        return False
    # A pattern that would take any name does not name this one.
    return not one.shy or not pattern.matches_tail(f"{one.path.rpartition('.')[0]}.\0")


def _taken(node: ast.Selector, view: View, patterns: _Patterns) -> Found:
    match node:
        case ast.Either(left, right):
            return _union(_taken(left, view, patterns), _taken(right, view, patterns))
        case ast.Both(left, right):
            some, others = _taken(left, view, patterns), _taken(right, view, patterns)
            return patterns.noted(node, _common(some, others), bool(some and others))
        case ast.Complement(operand):
            taken = _taken(operand, view, patterns)
            everything = view.grouped(lambda one: not one.shy)
            torn = {whole for key in taken for whole in _around(key)}
            # A whole of which the operand takes some rows is neither in it nor outside of it.
            left = {
                key: answers
                for key, answers in everything.items()
                if not _covered(key, taken) and key not in torn
            }
            return patterns.noted(node, left, bool(taken))
        case ast.Rows(pattern, _):
            return _sliced(node, _taken(pattern, view, patterns), view, patterns.report)
        case ast.Regex() | ast.Glob() | ast.Role():
            pattern = patterns(node)
            return {} if pattern is None else view.taken(node, pattern)
        case _:
            assert_never(node)


def _sliced(node: ast.Rows, found: Found, view: View, report: Report) -> Found:
    """The rows of a slice, of each candidate that has them."""
    left: dict[Key, list[Answer]] = {}
    for (first, _), answers in found.items():
        mine = Report()
        for index, region, one in answers:
            cut = rows_of(one, view.inventory.entries[index], node, view.names, mine)
            if cut is not None:
                left.setdefault((first, cut.at), []).append((index, region, cut))
        if mine.found:
            report.extend(mine.found[:1])
            return {}  # said once for all that are alike
    return left


def _covered(key: Key, taken: Found) -> bool:
    """Whether a candidate is taken, by itself or as a part of what is."""
    return key in taken or any(whole in taken for whole in _around(key))


def _around(key: Key) -> Iterator[Key]:
    """What a candidate is a slice of."""
    first, at = key
    if at.part is not None:
        yield first, replace(at, part=None)
    if at.index is not None:
        yield first, replace(at, index=None)
    if at.part is not None and at.index is not None:
        yield first, replace(at, part=None, index=None)


def _whole(found: Found) -> Found:
    """The candidates in module order, without slices of what is there as a whole."""
    kept = [key for key in found if not any(whole in found for whole in _around(key))]
    # The candidates of an entry came in order.
    kept.sort(key=_place)
    return {key: found[key] for key in kept}


def _place(key: Key) -> tuple[int, str, int, int]:
    """In the order of modules, then of matrices and rows."""
    first, at = key
    start = -1 if at.part is None else at.part.start
    return first, at.parameter, -1 if at.index is None else at.index, start


def roles_named(selection: ast.Selection) -> tuple[str, ...]:
    """The roles that a statement selects by."""
    given = (selection.selector, selection.exclude)
    every = [n.name for node in given if node for n in nodes(node) if isinstance(n, ast.Role)]
    return tuple(dict.fromkeys(every))


def _report_torn(
    node: ast.Selector, taken: Found, found: Found, view: View, report: Report
) -> bool:
    """E215 where `except` would take some rows out of what is selected as a whole."""
    torn = [whole for key in taken for whole in _around(key) if whole in found]
    if not torn:
        return False
    index, _, one = found[torn[0]][0]
    others = ", ".join(f"`@{name}`" for name in parts_of(index, one, view.inventory))
    report.error(
        "E215",
        f"`except {node.span.text}` takes rows out of `{one.path}`, which is selected as a whole",
        node.span,
        hint=f"select its parts instead: it has {others}" if others else "select its parts instead",
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
    found: dict[Key, Sequence[Answer]] = {}
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
    for alternative, span in _alternatives(pattern, node):
        if not any(_takes(alternative, None, one) for _, _, one in view.pool):
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
    some = (one for i, _, one in view.pool if entries[i].first in firsts)
    paths = [path for one in some for path in one.paths]
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
    left: dict[Key, Sequence[Answer]] = {}
    for key, answers in found.items():
        kept: list[Answer] = []
        for index, region, one in answers:
            held = holds(where, facts_of(index, region, view.inventory, one))
            if held is None:
                return {}  # it cannot be evaluated, which was said once
            kept += [(index, region, one)] * held
        if kept:
            left[key] = kept
    if not left:
        facts = [
            facts_of(i, region, view.inventory, one)
            for answers in found.values()
            for i, region, one in answers
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
    what = "module"
    if view.verb is not None:
        what = noun(near.best, (one.path for _, _, one in view.pool), view.verb)
    have = f"{what} has" if count == 1 else f"{what}s have"
    return f"{count} {have} that name in {view.text}"


def _report_no_role(pattern: RolePattern, span: Span, view: View, report: Report) -> None:
    pool = view.pool if view.verb is None else ()
    fused = {role for index, _, one in pool for role in parts_of(index, one, view.inventory)}
    here = dict.fromkeys([*roles_of(view.inventory, view.paths()), *sorted(fused)])
    listed = ", ".join(f"`@{name}`" for name in here)
    hint = f"here are {listed}" if listed else f"there are {listing(tails(view.paths(), ''))}"
    label = _elsewhere(pattern, view)
    report.error("E212", f"nothing in {view.text} is a `{span.text}`", span, label=label, hint=hint)


def _elsewhere(pattern: Tails, view: View) -> str:
    """What the pattern would take, were it not for the scope or for its owning no matrix."""
    if view.verb is not None:
        return elsewhere(pattern, view.inventory, view.verb, view.text)
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
    """Whether the pattern names a tensor that a module owns beside or instead of a weight."""
    for entry in view.inventory.entries:
        for name, told in beside(entry.module):
            path = f"{entry.path}.{name}" if entry.path else name
            if pattern.matches_tail(path):
                return f"`{path}` is {told.format(type(entry.module).__name__)}"
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
