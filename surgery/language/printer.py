"""Syntax trees to text: the way back from `surgery.language.parse`.

Each form is one function and one row of a table: `BLOCKS` for those with braces, and `PHRASES` of
`surgery.language.phrases` for the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from surgery.errors import Span
from surgery.language import syntax as ast
from surgery.language.layout import INDENT, Doc, laid_out
from surgery.language.phrases import item_phrase, phrase, signature

WIDTH = 100  # columns


def to_text(spec: ast.Spec) -> str:
    """The text of a spec: reading it gives an equal tree.

    Where a node was read from a text, what means nothing is kept as it was written there: how a
    number or a transposition is spelled, the order of a format's rows, a blank line between
    statements or items.
    """
    return text_of(list(rows_of(spec)))


# --------------------------------------------------------------------------------------- rows

Part = Literal["plain", "open", "middle", "close", "comment"]


@dataclass(frozen=True, slots=True)
class Row:
    """What begins a line of its own.

    `span` is that of the statement or item it is of, `trailing` a comment at its end.
    """

    doc: Doc
    depth: int
    part: Part
    span: Span
    trailing: str = ""


def text_of(rows: Sequence[Row]) -> str:
    """The text of some rows, with at most one blank line between two."""
    leading = _leading(rows)
    parts: list[str] = []
    for index, row in enumerate(rows):
        if index and _parted(rows[index - 1], row, leading[index]):
            parts.append("\n")
        text = laid_out(row.doc, WIDTH, INDENT * row.depth)
        parts.append(f"{text}  {row.trailing}\n" if row.trailing else f"{text}\n")
    return "".join(parts)


def _leading(rows: Sequence[Row]) -> list[bool]:
    """Of each row, whether it is the first of a statement with braces, or a comment upon one."""
    found = [row.part == "open" and row.depth == 0 for row in rows]
    for index in range(len(rows) - 2, -1, -1):
        row, after = rows[index], rows[index + 1]
        if row.part == "comment" and found[index + 1]:
            found[index] = not _had_blank(row, after)
    return found


def _parted(before: Row, row: Row, leading: bool) -> bool:
    """Whether a blank line stands between two rows."""
    if before.part in ("open", "middle") or row.part in ("middle", "close"):
        return False
    if before.part == "close" and before.depth == 0:
        return True
    return (leading and before.part != "comment") or _had_blank(before, row)


_BLANK = re.compile(r"\n\s*\n")


def _had_blank(before: Row, row: Row) -> bool:
    source = row.span.source
    if before.span.source is not source:
        return False
    return _BLANK.search(source.text, before.span.end, row.span.start) is not None


def rows_of(spec: ast.Spec) -> Iterator[Row]:
    """The rows of a spec, in order, each with the span of its statement or item."""
    return BLOCKS[ast.Spec](spec, 0)


def _rows(nodes: Iterable[ast.Node], depth: int, doc: Callable[[Any], Doc]) -> Iterator[Row]:
    """The rows of some statements or items; `doc` prints those without braces."""
    for node in nodes:
        if type(node) in BLOCKS:
            yield from BLOCKS[type(node)](node, depth)
        else:
            yield Row(doc(node), depth, "plain", node.span)


def _spec(node: ast.Spec, depth: int) -> Iterator[Row]:
    return _rows(node.statements, depth, phrase)


def _adapter(node: ast.Adapter, depth: int) -> Iterator[Row]:
    yield Row(f"adapter {node.name} {{", depth, "open", node.span)
    yield from _rows(node.body, depth + 1, phrase)
    yield Row("}", depth, "close", node.span)


def _method(node: ast.Method, depth: int) -> Iterator[Row]:
    head = (f"method {node.name}", signature(node.arguments), f" on {node.kind} {{")
    yield Row(head, depth, "open", node.span)
    yield from _rows(node.body, depth + 1, item_phrase)
    yield Row("}", depth, "close", node.span)


def _branch(node: ast.Branch, depth: int) -> Iterator[Row]:
    yield Row(("if ", phrase(node.condition), " {"), depth, "open", node.span)
    yield from _rows(node.then, depth + 1, item_phrase)
    yield from _otherwise(node.other, node.span, depth)
    yield Row("}", depth, "close", node.span)


def _otherwise(items: tuple[ast.Item, ...], whole: Span, depth: int) -> Iterator[Row]:
    match items:
        case ():
            return
        case (ast.Branch() as branch,):
            head = ("} else if ", phrase(branch.condition), " {")
            yield Row(head, depth, "middle", branch.span)
            yield from _rows(branch.then, depth + 1, item_phrase)
            yield from _otherwise(branch.other, whole, depth)
        case _:
            yield Row("} else {", depth, "middle", whole)
            yield from _rows(items, depth + 1, item_phrase)


def _format(node: ast.Format, depth: int) -> Iterator[Row]:
    yield Row(f"format {node.name} {node.method} {{", depth, "open", node.span)
    members = sorted((*node.fields, *node.tensors), key=lambda member: member.span.start)
    yield from _rows(members, depth + 1, phrase)
    yield Row("}", depth, "close", node.span)


BLOCKS: Mapping[type[ast.Node], Callable[[Any, int], Iterator[Row]]] = {
    ast.Spec: _spec,
    ast.Adapter: _adapter,
    ast.Method: _method,
    ast.Branch: _branch,
    ast.Format: _format,
}
