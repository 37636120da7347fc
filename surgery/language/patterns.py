"""Selectors as automata: regexes and globs by one engine, in time linear in the path.

A pattern answers for a path if it matches the whole of some dotted tail of it. The automaton is
non-deterministic and its deterministic states are made as paths ask for them, so no pattern is slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from surgery.errors import Diagnostic, Report, Span, SurgeryError, refuse
from surgery.language import syntax as ast

MAX_STATES = 10_000
_MAX_CACHED = 20_000
_SPECIAL = frozenset("\\.[]()|?*+{}^$")
_CLASSES = {
    "d": (("0", "9"),),
    "w": (("0", "9"), ("A", "Z"), ("a", "z"), ("_", "_")),
    "s": ((" ", " "), ("\t", "\r")),
}


# ------------------------------------------------------------------------------ syntax


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of some ranges, or of none of them."""

    ranges: tuple[tuple[str, str], ...]
    negated: bool = False

    def has(self, character: str) -> bool:
        """Whether the character is among them."""
        return any(a <= character <= b for a, b in self.ranges) != self.negated


@dataclass(frozen=True, slots=True)
class Sequence:
    """One after the other; `spread` if a choice among them counts as one between the wholes."""

    parts: tuple[Part, ...]
    spread: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several; `places` are their offsets in the pattern."""

    options: tuple[Part, ...]
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`least` to `most` times; None for no end."""

    part: Part
    least: int
    most: int | None


Part = Chars | Sequence | Choice | Repeat

_ANY = Chars((), negated=True)
_IN_NAME = Chars(((".", "."),), negated=True)


class _Reader:
    """Recursive descent over a regex; nesting is bounded by the spec's own guard."""

    def __init__(self, text: str, span: Span) -> None:
        self.text = text
        self.span = span
        self.at = 0

    def fail(self, message: str, start: int, end: int, hint: str = "") -> None:
        refuse("E007", message, self.span.within(start, max(end, start + 1)), hint=hint)

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def choice(self) -> Part:
        options, places = [], []
        while True:
            start = self.at
            options.append(self.sequence())
            places.append((start, self.at))
            if self.peek() != "|":
                break
            self.at += 1
        return options[0] if len(options) == 1 else Choice(tuple(options), tuple(places))

    def sequence(self) -> Part:
        parts: list[Part] = []
        while self.peek() not in ("", "|", ")"):
            parts.append(self.repeated())
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def repeated(self) -> Part:
        start = self.at
        part = self.atom()
        bounds = self.bounds()
        if bounds is None:
            return part
        if self.bounds() is not None:
            self.fail("a repeat of a repeat", start, self.at)
        least, most = bounds
        if most is None and _endless(part):
            self.fail(
                "an unbounded repeat of a repeat",
                start,
                self.at,
                "bound one of them, as in `(a+){1,4}`",
            )
        return Repeat(part, least, most)

    def bounds(self) -> tuple[int, int | None] | None:
        match self.peek():
            case "?":
                self.at += 1
                return 0, 1
            case "*":
                self.at += 1
                return 0, None
            case "+":
                self.at += 1
                return 1, None
            case "{":
                return self.braces()
            case _:
                return None

    def braces(self) -> tuple[int, int | None]:
        start = self.at
        end = self.text.find("}", start)
        inside = self.text[start + 1 : end] if end > 0 else ""
        low, comma, high = inside.partition(",")
        digits = all(p.isascii() and p.isdigit() for p in (low, high) if p)
        if end < 0 or not low or not digits:
            self.fail("a repeat is {m}, {m,} or {m,n}", start, end + 1)
        self.at = end + 1
        if max(len(low), len(high)) > 5:
            self.fail("this repeat is too long", start, self.at)
        least = int(low)
        most = int(high) if high else None if comma else least
        if most is not None and most < least:
            self.fail(f"{{{inside}}} is empty: {most} < {least}", start, self.at)
        return least, most

    def atom(self) -> Part:
        start, character = self.at, self.peek()
        self.at += 1
        match character:
            case "(":
                return self.group(start)
            case "[":
                return self.set(start)
            case ".":
                return _ANY
            case "\\":
                return self.escape(start)
            case "?" | "*" | "+" | "{":
                self.fail(f"nothing stands before `{character}`", start, self.at)
            case "^" | "$":
                self.fail(
                    f"`{character}` is not needed: the whole of a name is matched", start, self.at
                )
            case _:
                pass
        return Chars(((character, character),))

    def group(self, start: int) -> Part:
        if self.peek() == "?":
            if self.text[self.at : self.at + 2] != "?:":
                self.fail(
                    "look-around and named groups are not part of selectors", start, self.at + 2
                )
            self.at += 2
        inside = self.choice()
        if self.peek() != ")":
            self.fail("this group is not closed", start, self.at)
        self.at += 1
        return inside

    def escape(self, start: int) -> Part:
        character = self.peek()
        self.at += 1
        if character in ("d", "w", "s"):
            return Chars(_CLASSES[character])
        if character in ("D", "W", "S"):
            return Chars(_CLASSES[character.lower()], negated=True)
        if character == "" or (character.isalnum() and character.isascii()):
            hint = "a back-reference is not linear" if character.isdigit() else ""
            self.fail(f"`\\{character}` is not part of selectors", start, self.at, hint)
        return Chars(((character, character),))

    def set(self, start: int) -> Part:
        negated = self.peek() == "^"
        self.at += negated
        ranges: list[tuple[str, str]] = []
        first = True
        while first or self.peek() != "]":
            first = False
            ranges += self.range(start)
        self.at += 1
        return Chars(tuple(ranges), negated)

    def range(self, start: int) -> tuple[tuple[str, str], ...]:
        low = self.set_member(start)
        if len(low) > 1 or low[0][0] != low[0][1]:
            return low
        if self.peek() != "-" or self.text[self.at + 1 : self.at + 2] in ("]", ""):
            return low
        self.at += 1
        high = self.set_member(start)
        if len(high) > 1 or high[0][1] < low[0][0]:
            self.fail("this range is empty", start, self.at)
        return ((low[0][0], high[0][1]),)

    def set_member(self, start: int) -> tuple[tuple[str, str], ...]:
        character = self.peek()
        if character == "":
            self.fail("this set is not closed", start, self.at)
        self.at += 1
        if character != "\\":
            return ((character, character),)
        part = self.escape(self.at - 1)
        assert isinstance(part, Chars)
        if part.negated:
            self.fail("a negated class inside a set", start, self.at)
        return part.ranges


def _endless(part: Part) -> bool:
    """Whether some repeat without an end is inside."""
    match part:
        case Chars():
            return False
        case Sequence():
            return any(map(_endless, part.parts))
        case Choice():
            return any(map(_endless, part.options))
        case Repeat():
            return part.most is None or _endless(part.part)


def _regex(text: str, span: Span) -> Part:
    reader = _Reader(text, span)
    part = reader.choice()
    if reader.at < len(text):
        reader.fail("this group was never opened", reader.at, reader.at + 1)
    return part


def _glob(text: str, span: Span, offset: int = 0) -> Part:
    """A glob: `*` inside a name, `**` across dots, `{a,b}` one of several."""
    parts: list[Part] = []
    at = 0
    while at < len(text):
        if text.startswith("**", at):
            parts.append(Repeat(_ANY, 0, None))
            at += 2
        elif text[at] == "*":
            parts.append(Repeat(_IN_NAME, 0, None))
            at += 1
        elif text[at] == "{":
            end = _closing(text, at, span, offset)
            parts.append(_options(text, at + 1, end, span, offset))
            at = end + 1
        elif text[at] == "}":
            refuse("E007", "this brace was never opened", span.within(offset + at, offset + at + 1))
        else:
            parts.append(Chars(((text[at], text[at]),)))
            at += 1
    return parts[0] if len(parts) == 1 else Sequence(tuple(parts), spread=True)


def _options(text: str, start: int, end: int, span: Span, offset: int) -> Choice:
    places: list[tuple[int, int]] = []
    depth, begin = 0, start
    for at in range(start, end + 1):
        depth += {"{": 1, "}": -1}.get(text[at], 0) if at < end else 0
        if at == end or (text[at] == "," and depth == 0):
            places.append((begin, at))
            begin = at + 1
    options = tuple(_glob(text[a:b], span, offset + a) for a, b in places)
    return Choice(options, tuple((offset + a, offset + b) for a, b in places))


def _closing(text: str, start: int, span: Span, offset: int) -> int:
    depth = 0
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return at
    refuse("E007", "this brace is not closed", span.within(offset + start, offset + start + 1))


# --------------------------------------------------------------------------- automaton


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

    def step(self, states: frozenset[int], character: str) -> frozenset[int]:
        """The states after one character."""
        return self.closed(
            frozenset(t for s in states for chars, t in self.edges[s] if chars.has(character))
        )


class Pattern:
    """A compiled selector."""

    def __init__(self, part: Part, span: Span) -> None:
        self.part = part
        self.span = span
        self._automaton = _Automaton()
        self._automaton.end = self._automaton.add(part, self._automaton.state())
        self._start = self._automaton.closed(frozenset({0}))
        self._steps: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def matches_whole(self, path: str) -> bool:
        """Whether the whole path matches."""
        return self._accepts(path, frozenset())

    def matches_tail(self, path: str) -> bool:
        """Whether the whole of some dotted tail of the path matches."""
        return self._accepts(path, self._start)

    def _accepts(self, path: str, at_dot: frozenset[int]) -> bool:
        states = self._start
        for character in path:
            states = self._after(states, character)
            if character == ".":
                states = states | at_dot  # a tail begins here
        return self._automaton.end in states

    def _after(self, states: frozenset[int], character: str) -> frozenset[int]:
        key = (states, character)
        found = self._steps.get(key)
        if found is None:
            if len(self._steps) > _MAX_CACHED:
                self._steps.clear()
            found = self._steps[key] = self._automaton.step(states, character)
        return found

    @property
    def literal(self) -> str | None:
        """The one text that matches, if there is only one."""
        parts = self.part.parts if isinstance(self.part, Sequence) else (self.part,)
        letters = [_letter(p) for p in parts]
        return "".join(x for x in letters if x) if all(letters) else None

    @property
    def alternatives(self) -> tuple[tuple[Pattern, Span], ...]:
        """Each alternative of a top-level `a|b`, or of a glob's braces, and where it stands."""
        found = tuple(
            (Pattern(part, self.span), self.span.within(a, b))
            for part, (a, b) in _alternatives(self.part)
        )
        return found or ((self, self.span),)


def _letter(part: Part) -> str | None:
    if isinstance(part, Chars) and not part.negated and len(part.ranges) == 1:
        low, high = part.ranges[0]
        return low if low == high else None
    return None


def _alternatives(part: Part) -> Iterator[tuple[Part, tuple[int, int]]]:
    if isinstance(part, Choice):
        yield from zip(part.options, part.places, strict=True)
    elif isinstance(part, Sequence) and part.spread:
        for index, one in enumerate(part.parts):
            if isinstance(one, Choice):
                for option, place in zip(one.options, one.places, strict=True):
                    alone = (*part.parts[:index], option, *part.parts[index + 1 :])
                    yield Sequence(alone), place


def compile_selector(node: ast.Regex | ast.Glob, report: Report) -> Pattern | None:
    """The pattern of a selector, or None if E007 was reported for it."""
    try:
        return _compiled(node.pattern, isinstance(node, ast.Regex), node.span)
    except SurgeryError as error:
        report.extend(error.diagnostics)
    except OverflowError:
        message = f"this pattern needs more than {MAX_STATES:,} states"
        report.extend([Diagnostic("E007", message, node.span, hint="make its repeats shorter")])
    return None


@lru_cache(maxsize=256)
def _compiled(pattern: str, regex: bool, span: Span) -> Pattern:
    if not regex:
        return Pattern(_glob(pattern, span), span)
    inside = span.within(1, 1 + len(pattern))  # without the slashes
    return Pattern(_regex(pattern, inside), inside)
