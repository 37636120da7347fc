"""Source text to source text: the layout of `surgery.language.printer`, and every comment kept.

A comment is put by its place among the rows of the new text. Each row knows the stretch of the old
text that it alone was read from, so a comment stands behind a row, inside one, or between two.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from surgery.errors import Source, Span
from surgery.language.parse import Token, parse, tokens
from surgery.language.printer import Row, rows_of, text_of

_COMMENT = re.compile(r"#[^\n]*")


def formatted(text: str, name: str = "<spec>") -> str:
    """A spec's text in the one layout, with its comments; formatting it again changes nothing.

    A comment on a line of its own stays before what it precedes, one behind code at the end of its
    line. One in the middle of a statement goes before it. Raises SpecSyntaxError as `parse`.
    """
    spec = parse(text, name)
    source = spec.span.source
    found = [*tokens(text)]
    comments = [*_comments(source, found)]
    rows = [*_placed(rows_of(spec), _Braces.of(found))]
    made = text_of(_with_comments(rows, comments))
    again = _comments(Source(name, made), tokens(made))
    # Equal numbers may be unlike each other, `2` and `2.0`; what they look like may not.
    if repr(parse(made, name)) != repr(spec) or _texts(again) != _texts(comments):
        raise AssertionError(f"{name} would not mean the same any more")
    return made


def _comments(source: Source, found: Iterable[Token]) -> Iterator[Span]:
    """The comments, which stand between tokens; without the space that ends them."""
    at = 0
    for token in (*found, Token("", len(source.text), 0)):
        for comment in _COMMENT.finditer(source.text, at, token.start):
            start = comment.start()
            yield Span(source, start, start + len(comment.group().rstrip()))
        at = token.end


def _texts(comments: Iterable[Span]) -> list[str]:
    return sorted(comment.text for comment in comments)


# --------------------------------------------------------------------- rows and their stretches


@dataclass(frozen=True, slots=True)
class _Braces:
    """Where braces open, in order, and where each is closed."""

    openers: tuple[int, ...]
    partners: dict[int, int]

    @staticmethod
    def of(found: Iterable[Token]) -> _Braces:
        waiting: list[int] = []
        partners: dict[int, int] = {}
        for token in found:
            if token.kind == "LBRACE":
                waiting.append(token.start)
            elif token.kind == "RBRACE":
                partners[waiting.pop()] = token.start
        return _Braces(tuple(sorted(partners)), partners)

    def after(self, at: int) -> int:
        """The first that opens at a place or behind it."""
        return self.openers[bisect_left(self.openers, at)]


def _placed(rows: Iterable[Row], braces: _Braces) -> Iterator[Row]:
    """The rows, each with the stretch that it alone was read from instead of its statement's."""
    opened: list[int] = []
    for row in rows:
        start, end = row.span.start, row.span.end
        if row.part in ("middle", "close"):
            start = braces.partners[opened.pop()]
        if row.part in ("open", "middle"):
            # Of `else { if …` it is the brace behind the condition, as of `else if …`.
            opened.append(braces.after(max(start, row.span.start)))
            end = opened[-1] + 1
        yield replace(row, span=Span(row.span.source, start, end))


# ------------------------------------------------------------------------------------ comments


def _with_comments(rows: Sequence[Row], comments: Iterable[Span]) -> list[Row]:
    """The rows with the comments among them, or at their ends."""
    starts = [row.span.start for row in rows]
    ends = [row.span.end for row in rows]
    before: defaultdict[int, list[Row]] = defaultdict(list)
    behind: dict[int, Span] = {}
    for comment in comments:
        index = bisect_right(starts, comment.start) - 1
        if index >= 0 and comment.start < ends[index]:
            # It cannot stay inside. What stands before an `else` would belong to the wrong branch.
            after = rows[index].part == "middle"
            place = Span(comment.source, *[ends[index] if after else starts[index]] * 2)
            before[index + after].append(_comment(rows, index + after, comment.text, place))
        elif index >= 0 and "\n" not in comment.source.text[ends[index] : comment.start]:
            behind[index] = comment
        else:
            before[index + 1].append(_comment(rows, index + 1, comment.text, comment))
    own = [_ended(row, behind.get(index)) for index, row in enumerate(rows)]
    return [one for i, row in enumerate(own) for one in (*before[i], row)] + before[len(own)]


def _comment(rows: Sequence[Row], index: int, text: str, place: Span) -> Row:
    """A comment as a row of its own before another, as far from the margin as that."""
    if index == len(rows):
        return Row(text, 0, "comment", place)
    row = rows[index]
    return Row(text, row.depth + (row.part in ("middle", "close")), "comment", place)


def _ended(row: Row, comment: Span | None) -> Row:
    """A row with the comment behind it."""
    if comment is None:
        return row
    span = Span(row.span.source, row.span.start, comment.end)
    return replace(row, span=span, trailing=comment.text)
