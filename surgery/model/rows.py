"""`q_proj[0:64]`, `embed_tokens[5, 9]`: some rows of what a pattern takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch.nn.parameter import is_lazy

from surgery.errors import Report
from surgery.language import syntax as ast
from surgery.model.candidates import Candidate
from surgery.model.holder import parameters_of
from surgery.model.inventory import Entry, sizes_of
from surgery.model.parts import Part

Names = Callable[[ast.Expression], object]


def rows_of(
    one: Candidate, entry: Entry, node: ast.Rows, names: Names, report: Report
) -> Candidate | None:
    """A candidate cut to some rows, counted as Python does.

    Of a parameter as it lies they are entries of its first axis; of a matrix, those of W[out, in].
    None where E217 was reported: rows that it does not have, or that do not stand together where
    they must.
    """
    if one.kind is None:
        return one  # which is refused for that
    if one.at.tensor:
        return _picked(one, entry, node, names, report)
    if isinstance(node.rows, ast.Indices):
        message = "the rows of a matrix that is adapted stand together"
        return _refused(node, message, "write a slice, such as `[5:6]`", report)
    there = sizes_of(one.kind, entry.module, one.at).fan_out
    run = _run(one, node, node.rows, there, names, report)
    if run is None:
        return None
    start, stop = run
    if run == (0, there):
        return one
    part = one.at.part
    if part is not None and part.times > 1:
        hint = "select by `in heads[…]`, or slice the whole layer"
        return _refused(node, f"the rows of `{one.path}` come in turns", hint, report)
    first, whole = (0, there) if part is None else (part.start, part.whole)
    name = f"rows_{start}_{stop}" if part is None else f"{part.name}_rows_{start}_{stop}"
    cut = Part.run(name, first + start, first + stop, whole)
    return replace(one, at=replace(one.at, part=cut))


def _run(
    one: Candidate, node: ast.Rows, rows: ast.Slice, there: int, names: Names, report: Report
) -> tuple[int, int] | None:
    """Where a slice of so many rows begins and ends; None where E217 was reported."""
    given = (rows.start, rows.stop)
    bounds = [_whole(part, names, report) for part in given]
    if any(b is None and part is not None for b, part in zip(bounds, given, strict=True)):
        return None
    start, stop = (_from_start(bound, there) for bound in bounds)
    start, stop = 0 if start is None else start, there if stop is None else stop
    if rows.step is not None:
        return _refused(node, "rows stand together", "leave the step out", report)
    if not 0 <= start < stop <= there:
        return _absent(one, node, there, report)
    return start, stop


def _picked(
    one: Candidate, entry: Entry, node: ast.Rows, names: Names, report: Report
) -> Candidate | None:
    """Some entries of the first axis of a parameter as it lies."""
    weight = parameters_of(entry.module)[one.at.parameter]
    assert weight is not None  # it is a candidate
    if one.path not in one.paths:
        message = "`save` keeps whole modules, and rows are no module"
        return _refused(node, message, f"write `train` for rows of `{one.path}`", report)
    if is_lazy(weight):
        return one  # which is refused for that
    if weight.dim() < 2:
        hint = "name the table, or leave the rows out"
        return _refused(node, f"`{one.path}` is no table with rows", hint, report)
    there = len(weight)
    if isinstance(node.rows, ast.Slice):
        run = _run(one, node, node.rows, there, names, report)
        rows = None if run is None else [*range(*run)]
    else:
        rows = _listed(one, node, node.rows, there, names, report)
    if rows is None or rows == [*range(there)]:
        return None if rows is None else one
    return replace(one, at=replace(one.at, picked=tuple(rows)))


def _listed(
    one: Candidate, node: ast.Rows, rows: ast.Indices, there: int, names: Names, report: Report
) -> list[int] | None:
    """The rows of a list, each once; None where E217 was reported."""
    found = [_from_start(_whole(value, names, report), there) for value in rows.values]
    known = [row for row in found if row is not None]
    if len(known) < len(found):
        return None
    if not all(0 <= row < there for row in known):
        return _absent(one, node, there, report)
    if len({*known}) < len(known):
        return _refused(node, "a row stands twice", "name each row once", report)
    return known


def _absent(one: Candidate, node: ast.Rows, there: int, report: Report) -> None:
    hint = f"it has {there} rows, 0 to {there - 1}"
    _refused(node, f"`{one.path}` has no such rows", hint, report)


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


def _refused(node: ast.Rows, message: str, hint: str, report: Report) -> None:
    report.error("E217", message, node.rows.span, hint=hint)
