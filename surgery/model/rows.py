"""`q_proj[0:64]`: some rows of what a pattern takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from surgery.errors import Report
from surgery.language import syntax as ast
from surgery.model.candidates import Candidate
from surgery.model.inventory import Entry, sizes_of
from surgery.model.parts import Part

Names = Callable[[ast.Expression], object]


def rows_of(
    one: Candidate, entry: Entry, node: ast.Rows, names: Names, report: Report
) -> Candidate | None:
    """A candidate cut to the rows of a slice, counted as Python does.

    None where E217 was reported: rows that it does not have, or that do not stand together.
    """
    if one.kind is None:
        return one  # which is refused for that
    if one.at.tensor:
        message = f"`{node.rows.span.text}` are rows, and a copy is of a whole parameter"
        return _refused(one, node, message, "leave the rows out", report)
    bounds = [_whole(part, names, report) for part in (node.rows.start, node.rows.stop)]
    given = (node.rows.start, node.rows.stop)
    if any(b is None and part is not None for b, part in zip(bounds, given, strict=True)):
        return None
    there = sizes_of(one.kind, entry.module, one.at).fan_out
    start, stop = (_from_start(bound, there) for bound in bounds)
    start, stop = 0 if start is None else start, there if stop is None else stop
    if node.rows.step is not None:
        return _refused(one, node, "rows stand together", "leave the step out", report)
    if not 0 <= start < stop <= there:
        label = f"it has {there} rows, 0 to {there - 1}"
        return _refused(one, node, f"`{one.path}` has no such rows", label, report)
    if (start, stop) == (0, there):
        return one
    part = one.at.part
    if part is not None and part.times > 1:
        hint = "select by `in heads[…]`, or slice the whole layer"
        return _refused(one, node, f"the rows of `{one.path}` come in turns", hint, report)
    first, whole = (0, there) if part is None else (part.start, part.whole)
    name = f"rows_{start}_{stop}" if part is None else f"{part.name}_rows_{start}_{stop}"
    cut = Part.run(name, first + start, first + stop, whole)
    return replace(one, at=replace(one.at, part=cut))


def _from_start(bound: int | None, length: int) -> int | None:
    return bound + length if bound is not None and bound < 0 else bound


def _whole(value: ast.Expression | None, names: Names, report: Report) -> int | None:
    found = None if value is None else names(value)
    if found is None or (isinstance(found, int) and not isinstance(found, bool)):
        return found
    assert value is not None
    message = f"a row is a whole number, not {found!r}"
    report.error("E217", message, value.span, hint="such as `q_proj[0:64]`")
    return None


def _refused(one: Candidate, node: ast.Rows, message: str, hint: str, report: Report) -> None:
    del one
    report.error("E217", message, node.rows.span, hint=hint)
