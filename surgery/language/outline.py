"""A text's brackets and statements, seen without parsing it.

The parser must not be handed a text that is nested too deep, and after a syntax error it has to
find the next statement. Both need no more than the brackets and the keywords that are none of a
comment, a text or a selector.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

# What a selector stands behind.
_SELECTING = frozenset({"match", "train", "save"})

STATEMENTS = _SELECTING | {
    *("optional", "param", "let", "adapter", "activate", "method", "format", "use")
}

# Words that have a meaning in the language, or will have one; none of them may be a name.
RESERVED = frozenset(
    {"then", "share", "untie", "at", "init", "lr", "stack", "parallel", "average", "fuse"}
)

# What stands inside an adapter.
_INSIDE = _SELECTING | {"optional"}

# What begins items of a method as well, where it begins no statement.
_ITEMS = frozenset({"train"})

_SKIP = r"""(?P<skip>\#[^\n]*|"[^"\n]*")"""
_BRACKETS = r"(?P<open>[(\[{])|(?P<close>[)\]}])"
_CODE = re.compile(rf"{_SKIP}|(?P<word>[A-Za-z_][A-Za-z0-9_]*)|{_BRACKETS}")
# A glob's own braces are no brackets; one without a partner is.
_BRACES = r"\{(?:[A-Za-z0-9_*.,-]|\{[A-Za-z0-9_*.,-]*\})*\}"
_SELECTOR = re.compile(
    rf"{_SKIP}|(?P<regex>/(?:\\[^\n]|[^/\\\n])+/)"
    rf"|(?P<word>(?:[A-Za-z0-9_*.,-]|{_BRACES})+)|{_BRACKETS}"
)
_CLOSES = {")": "(", "]": "[", "}": "{"}

Kind = Literal["word", "open", "close"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a text that should be a statement; offsets, `end` exclusive."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Lexeme:
    """A bracket, or a word that may begin a statement, inside `depth` brackets."""

    kind: Kind
    text: str
    start: int
    depth: int


@dataclass(frozen=True, slots=True)
class Outline:
    """The brackets and leading words of a text, in order."""

    lexemes: tuple[Lexeme, ...]
    length: int

    def too_deep(self, most: int) -> int | None:
        """The offset of the first bracket that opens more than `most` levels, or None."""
        found = (x.start for x in self.lexemes if x.kind == "open" and x.depth >= most)
        return next(found, None)

    def pairs(self) -> dict[int, int]:
        """The offset of each bracket that is closed, and where it is."""
        waiting: list[Lexeme] = []
        found: dict[int, int] = {}
        for lexeme in self.lexemes:
            if lexeme.kind == "open":
                waiting.append(lexeme)
            elif lexeme.kind == "close":
                opener = _opener(waiting, _CLOSES[lexeme.text])
                if opener is not None:
                    found[waiting[opener].start] = lexeme.start
                    del waiting[opener:]
        return found

    def unclosed(self) -> tuple[int, ...]:
        """The offsets of brackets that nothing closes."""
        closed = self.pairs()
        openers = (x.start for x in self.lexemes if x.kind == "open")
        return tuple(at for at in openers if at not in closed)

    def pieces(self) -> tuple[Piece, ...]:
        """The statements in order; an `adapter` comes before those inside it.

        A bracket that has no partner is taken to be a mistake of its own statement: the next one
        begins in spite of it.
        """
        starts, ends = self._marks()
        tops = [*(at for at, inside in starts if not inside), self.length]
        cuts = sorted([*(at for at, _ in starts), *ends, self.length])
        return tuple(Piece(at, _next(cuts if inside else tops, at)) for at, inside in starts)

    def _marks(self) -> tuple[list[tuple[int, bool]], list[int]]:
        """Where statements start, and whether inside an adapter; and where adapters end."""
        pairs = self.pairs()
        change = {**dict.fromkeys(pairs, 1), **dict.fromkeys(pairs.values(), -1)}
        starts: list[tuple[int, bool]] = []
        ends: list[int] = []
        level, statement, before = 0, "", ""
        for lexeme in self.lexemes:
            level += change.get(lexeme.start, 0)
            continued = before == "optional" and lexeme.text in _SELECTING
            before = lexeme.text
            if continued:
                continue
            if lexeme.kind == "word" and level == 0:
                statement = lexeme.text
                starts.append((lexeme.start, False))
            elif lexeme.text in _INSIDE and level == 1 and statement == "adapter":
                starts.append((lexeme.start, True))
            elif lexeme.text == "}" and level == 0:
                ends.append(lexeme.start)
        return starts, ends


def outline(text: str) -> Outline:
    """The outline of any text, in time linear in its length."""
    return Outline(tuple(_lexemes(text)), len(text))


def _next(sorted_offsets: list[int], at: int) -> int:
    return sorted_offsets[bisect_right(sorted_offsets, at)]


def _opener(waiting: list[Lexeme], bracket: str) -> int | None:
    """Which of the waiting brackets a closing one belongs to: the last of its kind."""
    for index in range(len(waiting) - 1, -1, -1):
        if waiting[index].text == bracket:
            return index
    return None


@dataclass(frozen=True, slots=True)
class _Clause:
    """Where in a `match` or `train` a text is: behind which word, and how deep that stands."""

    word: str
    depth: int

    def selects(self, depth: int) -> bool:
        """Whether there are selectors at a depth; else there are expressions."""
        if self.word == "in":
            return depth == self.depth
        return self.word == "except" or self.word in _SELECTING

    def ends_at(self, word: str, depth: int) -> bool:
        """Whether a word ends the clause; in an expression `in` is a name."""
        return bool(self.word) and word in _CLAUSES and (word != "in" or self.selects(depth))


_CLAUSES = frozenset({"in", "where", "except", "apply"})
_NONE = _Clause("", 0)


def _lexemes(text: str) -> Iterator[Lexeme]:
    at = depth = 0
    clause, top = _NONE, ""
    while found := (_SELECTOR if clause.selects(depth) else _CODE).search(text, at):
        word, start, first = found.group(), found.start(), _first(text, at, found.start())
        at = found.end()
        match found.lastgroup:
            case "open":
                yield Lexeme("open", word, start, depth)
                depth += 1
            case "close":
                depth = max(0, depth - 1)
                yield Lexeme("close", word, start, depth)
            case "word" if clause.ends_at(word, depth):
                clause = _NONE if word == "apply" else _Clause(word, clause.depth)
            case "word" if word in _ITEMS and top == "method" and depth:
                continue
            case "word" if word in STATEMENTS and (first or not clause.selects(depth)):
                clause = _Clause(word, depth) if word in _SELECTING else _NONE
                top = top if depth else word
                yield Lexeme("word", word, start, depth)
            case _:
                continue


def _first(text: str, before: int, start: int) -> bool:
    """Whether a lexeme is the first of its line; the one before ended at `before`."""
    gap = text[before:start]
    return (before == 0 or "\n" in gap) and not gap.rpartition("\n")[2].strip()
