"""Selectors as automata: regexes and globs by one engine, in time linear in the path.

A pattern answers for a path if it matches the whole of some dotted tail of it. The automaton is
non-deterministic; its deterministic states are made as paths ask for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NoReturn

from surgery.errors import Report, Span, SurgeryError, refuse
from surgery.language import syntax as ast
from surgery.language.pattern_syntax import (
    Chars,
    Choice,
    Part,
    Repeat,
    Sequence,
    read_glob,
    read_regex,
)

MAX_STATES = 10_000

# States of all alternatives together, each of which is an automaton when it has to answer alone.
_MAX_SPREAD = 500_000

# Members of all deterministic states together, beyond which they are forgotten and made again.
_MAX_MEMBERS = 1_000_000


class Pattern:
    """A compiled selector: what it matches, where it stands, and what it is a choice of."""

    def __init__(self, part: Part, span: Span) -> None:
        """A pattern of what was read from `span`; the automaton is made when it is first used."""
        self.span = span
        self._part = part

    def matches_whole(self, path: str) -> bool:
        """Whether the whole path matches."""
        return self._whole.accepts(path)

    def matches_tail(self, path: str) -> bool:
        """Whether the whole of some dotted tail of the path matches."""
        if self.literal is not None:
            return path == self.literal or path.endswith(f".{self.literal}")
        return self._tail.accepts(path)

    @cached_property
    def literal(self) -> str | None:
        """The one text that matches, if there is only one."""
        parts = self._part.parts if isinstance(self._part, Sequence) else (self._part,)
        letters = [_letter(p) for p in parts]
        return None if None in letters else "".join(x for x in letters if x)

    @cached_property
    def alternatives(self) -> tuple[tuple[Pattern, Span], ...]:
        """Each alternative of a top-level `a|b`, or of a glob's braces, and where it stands.

        Without any, the pattern itself and all of its span.
        """
        found = tuple(
            (Pattern(part, self.span), self.span.within(a, b))
            for part, (a, b) in _alternatives(self._part)
        )
        return found or ((self, self.span),)

    def size(self) -> int:
        """The number of states. Raises OverflowError if there are too many."""
        return len(self._automaton.edges)

    @cached_property
    def _automaton(self) -> _Automaton:
        automaton = _Automaton()
        automaton.end = automaton.add(self._part, automaton.state())
        return automaton

    @cached_property
    def _whole(self) -> _Runner:
        return _Runner(self._automaton, tails=False)

    @cached_property
    def _tail(self) -> _Runner:
        return _Runner(self._automaton, tails=True)


def compile_selector(node: ast.Regex | ast.Glob, report: Report) -> Pattern | None:
    """The pattern of a selector, or None if E007 was reported for it."""
    try:
        part, span = _read(node)
        pattern = Pattern(part, span)
        _guard(pattern, part)
    except SurgeryError as error:
        report.extend(error.diagnostics)
        return None
    return pattern


def _read(node: ast.Regex | ast.Glob) -> tuple[Part, Span]:
    if len(node.pattern) > MAX_STATES:
        _refuse_size(node.span)
    match node:
        case ast.Regex():
            inside = node.span.within(1, 1 + len(node.pattern))  # without the slashes
            return read_regex(node.pattern, inside), inside
        case ast.Glob():
            return read_glob(node.pattern, node.span), node.span


def _guard(pattern: Pattern, part: Part) -> None:
    """Refuse what would take too many states, alone or by its alternatives."""
    try:
        size = pattern.size()
    except OverflowError:
        _refuse_size(pattern.span)
    count = sum(1 for _ in _alternatives(part))
    if size * count > _MAX_SPREAD:
        message = f"this pattern has too many alternatives ({count:,})"
        refuse("E007", message, pattern.span, hint="write several statements")


def _refuse_size(span: Span) -> NoReturn:
    message = f"this pattern needs more than {MAX_STATES:,} states"
    refuse("E007", message, span, hint="make its repeats shorter")


def _letter(part: Part) -> str | None:
    if isinstance(part, Chars) and not part.negated and len(part.ranges) == 1:
        low, high = part.ranges[0]
        return low if low == high else None
    return None


def _alternatives(part: Part) -> Iterator[tuple[Part, tuple[int, int]]]:
    match part:
        case Choice():
            for option, place in zip(part.options, part.places, strict=True):
                yield from _spread(option) or [(option, place)]
        case Sequence(spread=True):
            for index, one in enumerate(part.parts):
                for option, place in _spread(one):
                    alone = (*part.parts[:index], option, *part.parts[index + 1 :])
                    yield Sequence(alone), place
        case _:
            return


def _spread(part: Part) -> list[tuple[Part, tuple[int, int]]]:
    return list(_alternatives(part))


# --------------------------------------------------------------------------------- automaton


@dataclass(slots=True)
class _Automaton:
    """States with edges on characters and free moves; state 0 begins, `end` accepts."""

    edges: list[list[tuple[Chars, int]]] = field(default_factory=list[list[tuple[Chars, int]]])
    free: list[list[int]] = field(default_factory=list[list[int]])
    end: int = 0

    def state(self) -> int:
        if len(self.edges) >= MAX_STATES:
            raise OverflowError
        self.edges.append([])
        self.free.append([])
        return len(self.edges) - 1

    def add(self, part: Part, start: int) -> int:
        """Continue from `start` through `part`; gives the state after it."""
        match part:
            case Chars():
                after = self.state()
                self.edges[start].append((part, after))
                return after
            case Sequence():
                for one in part.parts:
                    start = self.add(one, start)
                return start
            case Choice():
                after = self.state()
                for option in part.options:
                    begin = self.state()
                    self.free[start].append(begin)
                    self.free[self.add(option, begin)].append(after)
                return after
            case Repeat():
                return self.repeat(part, start)

    def repeat(self, part: Repeat, start: int) -> int:
        for _ in range(part.least):
            start = self.add(part.part, start)
        after = self.state()
        if part.most is None:
            begin = self.state()
            self.free[start].append(begin)
            self.free[self.add(part.part, begin)].append(begin)
            self.free[begin].append(after)
            return after
        for _ in range(part.most - part.least):
            self.free[start].append(after)
            start = self.add(part.part, start)
        self.free[start].append(after)
        return after

    def closed(self, states: frozenset[int]) -> frozenset[int]:
        """All states that are reached by free moves."""
        seen, stack = set(states), list(states)
        while stack:
            for target in self.free[stack.pop()]:
                if target not in seen:
                    seen.add(target)
                    stack.append(target)
        return frozenset(seen)

    def classes(self) -> tuple[Chars, ...]:
        """The different sets of characters on the edges."""
        return tuple(dict.fromkeys(chars for row in self.edges for chars, _ in row))


class _Runner:
    """The deterministic side of an automaton, made as far as paths have asked for it.

    With `tails`, a run begins anew behind every dot.
    """

    def __init__(self, automaton: _Automaton, *, tails: bool) -> None:
        self.automaton = automaton
        self.tails = tails
        self.classes = automaton.classes()
        self.kinds: dict[str, frozenset[Chars]] = {}
        self.first = automaton.closed(frozenset({0}))
        self.forget()

    def forget(self) -> None:
        self.members: list[frozenset[int]] = []
        self.numbers: dict[frozenset[int], int] = {}
        self.steps: list[dict[str, int]] = []  # by character: the fast way
        self.moves: list[dict[tuple[frozenset[Chars], bool], int]] = []  # by kind of character
        self.weight = 0
        self.start = self.number(self.first)

    def accepts(self, path: str) -> bool:
        state = self.start
        for character in path:
            after = self.steps[state].get(character)
            state = self.step(state, character) if after is None else after
        return self.automaton.end in self.members[state]

    def step(self, state: int, character: str) -> int:
        """The state after a character, made if it is new."""
        kind = self.kind(character)
        restart = self.tails and character == "."
        after = self.moves[state].get((kind, restart))
        if after is None:
            states = self.after(self.members[state], kind)
            target = states | self.first if restart else states
            if self.weight > _MAX_MEMBERS:
                self.forget()
                return self.number(target)
            after = self.moves[state][kind, restart] = self.number(target)
        self.steps[state][character] = after
        return after

    def kind(self, character: str) -> frozenset[Chars]:
        """The classes that the character is in; characters of one kind move alike."""
        found = self.kinds.get(character)
        if found is None:
            found = frozenset(c for c in self.classes if c.has(character))
            self.kinds[character] = found
        return found

    def after(self, states: frozenset[int], kind: frozenset[Chars]) -> frozenset[int]:
        edges = self.automaton.edges
        moved = (target for s in states for chars, target in edges[s] if chars in kind)
        return self.automaton.closed(frozenset(moved))

    def number(self, states: frozenset[int]) -> int:
        if states not in self.numbers:
            self.numbers[states] = len(self.members)
            self.members.append(states)
            self.steps.append({})
            self.moves.append({})
            self.weight += len(states) + 1
        return self.numbers[states]
