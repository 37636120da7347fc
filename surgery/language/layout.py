"""Documents that know where they may be broken, and the text of one at a width.

After Wadler, "A prettier printer", 2003, without recursion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

INDENT = 2  # columns


@dataclass(frozen=True, slots=True)
class Line:
    """Where a line may end; as long as it does not, `flat` stands there."""

    flat: str


@dataclass(frozen=True, slots=True)
class Nest:
    """What is indented further if it is broken."""

    doc: Doc


@dataclass(frozen=True, slots=True)
class Group:
    """What is broken nowhere if it fits on its line, and at each of its own ends if not."""

    doc: Doc


Doc: TypeAlias = "str | Line | Nest | Group | tuple[Doc, ...]"

SPACE = Line(" ")
NOTHING = Line("")


def filled(parts: Sequence[Doc], separator: str = "") -> Doc:
    """Some parts, as many on each line as fit."""
    return (*parts[:1], _further(parts[1:], separator))


def hanging(parts: Sequence[Doc], separator: str = "") -> Doc:
    """The same, with the lines after the first indented."""
    return (*parts[:1], Nest(_further(parts[1:], separator)))


def _further(parts: Sequence[Doc], separator: str) -> Doc:
    return tuple((separator, Group((SPACE, part))) for part in parts)


def laid_out(doc: Doc, width: int, indent: int) -> str:
    """The text of a document that is indented by some columns.

    No line is longer than `width` columns unless there is no place to break it. Time is linear in
    the length of the text.
    """
    out = [" " * indent]
    column = indent
    todo: list[_Todo] = [(indent, False, doc)]
    while todo:
        level, flat, one = todo.pop()
        match one:
            case str():
                out.append(one)
                column += len(one)
            case tuple():
                todo.extend((level, flat, part) for part in reversed(one))
            case Nest(inner):
                todo.append((level + INDENT, flat, inner))
            case Group(inner):
                todo.append((level, flat or _fits(width - column, inner, todo), inner))
            case Line(text) if flat:
                out.append(text)
                column += len(text)
            case Line():
                out.append("\n" + " " * level)
                column = level
    return "".join(out)


_Todo = tuple[int, bool, Doc]
"""An indentation, whether nothing is broken, and what is to be written."""

_END: _Todo = (0, False, NOTHING)


def _fits(room: int, doc: Doc, behind: Sequence[_Todo]) -> bool:
    """Whether a document fits unbroken, with what stands behind it up to where that may break."""
    after = reversed(behind)
    todo = [(0, True, doc)]
    while room >= 0:
        _, flat, one = todo.pop() if todo else next(after, _END)
        match one:
            case str():
                room -= len(one)
            case tuple():
                todo.extend((0, flat, part) for part in reversed(one))
            case Nest(inner) | Group(inner):
                todo.append((0, flat, inner))
            case Line(text) if flat:
                room -= len(text)
            case Line():
                return True
    return False
