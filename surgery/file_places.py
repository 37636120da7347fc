"""Where the matrix of a site lies in a checkpoint's tensor, read and written by its rows.

A matrix that lies as [out, in] is read where it is. One that lies the other way round, as tables of
embeddings do, has rows that are columns of its tensor; it is turned in memory, or on disk where it
is large.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import mkstemp
from typing import Protocol

import torch
from torch import Tensor

from surgery.checksums import bytes_of
from surgery.disk import Closing, read_at, write_at
from surgery.model.layers import LayerKind
from surgery.model.parts import ParameterSlice
from surgery.planned import PlannedSite
from surgery.precision import rounded

ReadBytes = Callable[[int, int, Tensor], Tensor]
"""Bytes of a tensor from one offset to before another, into bytes that have room for them."""

WriteBytes = Callable[[int, Tensor], None]
"""Puts bytes at an offset of a tensor."""

Span = tuple[int, int]
"""From one number to before another."""

IN_MEMORY = 32 * 2**20
"""Bytes of a matrix that is turned in memory; a larger one is turned on disk."""

_COPIED = 2**19  # elements at a time

_TURNED = 16 * 2**20  # bytes that are turned at a time


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of a checkpoint. dtype: of its elements; `read` gives its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: ReadBytes


@dataclass(frozen=True, slots=True)
class Target:
    """The place of the tensor in what is written; its elements may be of another dtype."""

    dtype: torch.dtype
    write: WriteBytes


class Place(Protocol):
    """A matrix [out, in] of a tensor: rows as they were, and rows to come in their place."""

    def read(self, start: int, stop: int) -> Tensor:
        """Rows as they lie in the source, until the next ones are read."""
        ...

    def write(self, start: int, stop: int, rows: Tensor) -> None:
        """Rows of the target's dtype. Each is written after it was read, and once."""
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of a matrix that stand together: `count` from `row` on, in the tensor from `at` on."""

    row: int
    at: int
    count: int


def turned(kind: LayerKind) -> bool:
    """Whether the rows of a matrix are columns of its tensor."""
    probe = torch.empty((2, 3), device="meta")
    return kind.to_matrix(probe).shape != probe.shape and tuple(kind.to_matrix(probe).shape) == (
        3,
        2,
    )


def size_of(site: PlannedSite) -> tuple[int, int]:
    """[out, in] of the matrix, or of each where a site is a batch of them."""
    sizes = site.form.sizes
    return sizes.fan_out, sizes.fan_in


def runs_of(at: ParameterSlice, shape: tuple[int, ...], index: int | None, rows: int) -> list[Run]:
    """Where the rows of a matrix stand in a tensor, counted in rows of the matrix.

    index: which matrix of a batch. rows: of the whole matrix that a site is, or is part of.
    """
    if at.tensor:
        rest = prod(shape[1:])
        picked = at.picked or range(shape[0] if shape else 1)
        found = [Run(i * rest, row * rest, rest) for i, row in enumerate(picked)]
        return [*_joined(found)]
    first = (at.index if index is None else index) or 0
    if at.part is None:
        return [Run(0, first * rows, rows)]
    found, row = list[Run](), 0
    for start, stop in at.part.spans():
        found.append(Run(row, first * rows + start, stop - start))
        row += stop - start
    return [*_joined(found)]


def rows_inside(
    site: PlannedSite, shape: tuple[int, ...], index: int | None, inside: Sequence[Span]
) -> Span | None:
    """From which row of a site's matrix to before which some elements of a tensor are, if any are.

    Of a matrix whose rows are columns of the tensor, all of them.
    """
    at, (rows, columns) = site.site.at, size_of(site)
    if turned(site.form.kind) and not at.tensor:
        size, number = _whole(site) * columns, (at.index if index is None else index) or 0
        return (0, rows) if any(_both(Run(0, number * size, size), 1, inside)) else None
    columns = 1 if at.tensor else columns
    runs = runs_of(at, shape, None if at.tensor else index, _whole(site))
    found = [
        (run.row + start // columns - run.at, run.row + -(-stop // columns) - run.at)
        for run in runs
        for start, stop in _both(run, columns, inside)
    ]
    return (min(start for start, _ in found), max(stop for _, stop in found)) if found else None


def _whole(site: PlannedSite) -> int:
    """The rows of the matrix that a site is, or is part of."""
    return size_of(site)[0] if site.site.at.part is None else site.site.at.part.whole


def _both(run: Run, columns: int, inside: Sequence[Span]) -> Iterator[Span]:
    """The elements of a run that are inside."""
    first, last = run.at * columns, (run.at + run.count) * columns
    for start, stop in inside:
        if max(first, start) < min(last, stop):
            yield max(first, start), min(last, stop)


def _joined(runs: list[Run]) -> Iterator[Run]:
    held: Run | None = None
    for run in runs:
        if held is not None and held.at + held.count == run.at:
            held = Run(held.row, held.at, held.count + run.count)
            continue
        if held is not None:
            yield held
        held = run
    if held is not None:
        yield held


class Places(Closing):
    """The matrices of one tensor."""

    def __init__(
        self, source: Source, target: Target, scratch: Path, inside: Sequence[Span] | None = None
    ) -> None:
        """Read from one, written to the other. scratch: a folder for what is turned on disk.

        inside: the elements that the target has room for, if not all.
        """
        self._source, self._target, self._scratch = source, target, scratch
        self._inside = ((0, prod(source.shape)),) if inside is None else inside
        self._turned: dict[int, _Turned] = {}
        self._taken: list[tuple[int, int]] = []

    def of(self, site: PlannedSite, index: int | None) -> Place:
        """The place of a site's matrix, or of one of its batch."""
        at, (rows, columns) = site.site.at, size_of(site)
        if at.tensor:
            return self._rows(runs_of(at, self._source.shape, None, rows), 1)
        if at.part is not None:
            rows = at.part.whole
        if not turned(site.form.kind):
            return self._rows(runs_of(at, self._source.shape, index, rows), columns)
        number = (at.index if index is None else index) or 0
        if number not in self._turned:
            first = number * rows * columns
            self._taken.append((first, first + rows * columns))
            self._turned[number] = _Turned(
                (rows, columns), first, self._source, self._target, self._scratch
            )
        whole = self._turned[number]
        return whole if at.part is None else _Part(runs_of(at, (), 0, rows), whole)

    def _rows(self, runs: list[Run], columns: int) -> Place:
        self._taken += [(r.at * columns, (r.at + r.count) * columns) for r in runs]
        return _Rows(runs, columns, self._source, self._target)

    def close(self) -> None:
        """Let go of what was turned."""
        for one in self._turned.values():
            one.close()
        self._turned.clear()

    def finish(self) -> None:
        """Put what was written where it belongs, and beside it what is in no matrix, as it was."""
        for one in self._turned.values():
            one.finish()
        taken = sorted(self._taken)
        for first, last in self._inside:
            at = first
            for start, stop in (*taken, (last, last)):
                self._copy(at, min(start, last))
                at = max(at, stop)

    def _copy(self, start: int, stop: int) -> None:
        size = self._source.dtype.itemsize
        for first in range(start, stop, _COPIED):
            count = min(_COPIED, stop - first)
            data = torch.empty(count * size, dtype=torch.uint8)
            self._source.read(first * size, (first + count) * size, data)
            values = data.view(self._source.dtype)
            if self._target.dtype != self._source.dtype:
                values = rounded(values.double(), self._target.dtype)
            self._target.write(first * self._target.dtype.itemsize, values.view(torch.uint8))


# ------------------------------------------------------------------------------- as [out, in]


def _inside(runs: Iterable[Run], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Of rows from one to another: from where in them, from where in the tensor, how many."""
    for run in runs:
        first, last = max(start, run.row), min(stop, run.row + run.count)
        if first < last:
            yield first - start, run.at + first - run.row, last - first


class _Rows:
    """A matrix whose rows lie one after the other, or in several runs."""

    def __init__(self, runs: list[Run], columns: int, source: Source, target: Target) -> None:
        self._runs, self._columns = runs, columns
        self._source, self._target = source, target
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def read(self, start: int, stop: int) -> Tensor:
        width = self._columns * self._source.dtype.itemsize
        count = (stop - start) * width
        if self._buffer.numel() < count:
            self._buffer = torch.empty(count, dtype=torch.uint8)
        for row, at, rows in _inside(self._runs, start, stop):
            into = self._buffer[row * width : (row + rows) * width]
            self._source.read(at * width, (at + rows) * width, into)
        found = self._buffer[:count].view(self._source.dtype)
        return found.view(stop - start, self._columns)

    def write(self, start: int, stop: int, rows: Tensor) -> None:
        width = self._columns * self._target.dtype.itemsize
        data = rows.contiguous().flatten().view(torch.uint8)
        for row, at, count in _inside(self._runs, start, stop):
            self._target.write(at * width, data[row * width : (row + count) * width])


# ------------------------------------------------------------------------------- as [in, out]


class _Turned:
    """A matrix that lies as [in, out], turned before its rows are read, and back at the end."""

    def __init__(
        self, size: tuple[int, int], first: int, source: Source, target: Target, scratch: Path
    ) -> None:
        self._rows, self._columns = size
        self._first, self._source, self._target = first, source, target
        self._before = self._store(source.dtype, scratch)
        # A row is written after it was read, so one of the same size can take its place.
        same = source.dtype.itemsize == target.dtype.itemsize
        self._after = self._before if same else self._store(target.dtype, scratch)
        for start, stop in self._stored_blocks():
            width = self._rows * source.dtype.itemsize
            begin = first * source.dtype.itemsize + start * width
            data = torch.empty((stop - start) * width, dtype=torch.uint8)
            self._source.read(begin, begin + data.numel(), data)
            stored = data.view(source.dtype).view(stop - start, self._rows)
            self._before.put(start, stored.t().contiguous())

    def _store(self, dtype: torch.dtype, scratch: Path) -> _Store:
        large = self._rows * self._columns * dtype.itemsize > IN_MEMORY
        return (_OnDisk if large else _InMemory)(self._rows, self._columns, dtype, scratch)

    def _stored_blocks(self) -> Iterator[tuple[int, int]]:
        width = self._rows * max(self._source.dtype.itemsize, self._target.dtype.itemsize)
        step = max(1, _TURNED // max(1, width))
        for start in range(0, self._columns, step):
            yield start, min(start + step, self._columns)

    def read(self, start: int, stop: int) -> Tensor:
        return self._before.rows(start, stop).view(self._source.dtype)

    def write(self, start: int, stop: int, rows: Tensor) -> None:
        self._after.put_rows(start, rows.contiguous())

    def finish(self) -> None:
        """Put what was written in its place."""
        dtype = self._target.dtype
        for start, stop in self._stored_blocks():
            stored = self._after.columns(start, stop).view(dtype).t().contiguous()
            at = (self._first + start * self._rows) * dtype.itemsize
            self._target.write(at, stored.flatten().view(torch.uint8))

    def close(self) -> None:
        """Let go of it."""
        for store in {id(s): s for s in (self._before, self._after)}.values():
            store.close()


class _Store(Protocol):
    """A matrix [rows, columns] that is written by columns and read by rows, and back again."""

    def put(self, column: int, block: Tensor) -> None: ...
    def rows(self, start: int, stop: int) -> Tensor: ...
    def put_rows(self, row: int, block: Tensor) -> None: ...
    def columns(self, start: int, stop: int) -> Tensor: ...
    def close(self) -> None: ...


class _InMemory:
    def __init__(self, rows: int, columns: int, dtype: torch.dtype, scratch: Path) -> None:
        del scratch
        self._data = torch.empty((rows, columns), dtype=dtype)

    def put(self, column: int, block: Tensor) -> None:
        self._data[:, column : column + block.shape[1]] = block

    def rows(self, start: int, stop: int) -> Tensor:
        return self._data[start:stop].clone()

    def put_rows(self, row: int, block: Tensor) -> None:
        self._data[row : row + block.shape[0]].view(block.dtype).copy_(block)

    def columns(self, start: int, stop: int) -> Tensor:
        return self._data[:, start:stop].contiguous()

    def close(self) -> None:
        self._data = self._data[:0]


_ASIDE = Path("(a file without a name)")


def nameless(folder: Path) -> int:
    """A file that has no name, and is gone when it is closed."""
    file, path = mkstemp(dir=folder)
    os.unlink(path)
    return file


class _OnDisk:
    """The same in a file that has no name and is gone when it is closed."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, scratch: Path) -> None:
        self._rows, self._columns, self._dtype = rows, columns, dtype
        self._file = nameless(scratch)
        os.posix_fallocate(self._file, 0, rows * columns * dtype.itemsize)

    def put(self, column: int, block: Tensor) -> None:
        size = self._dtype.itemsize
        data, width = bytes_of(block), block.shape[1] * size
        for row in range(self._rows):
            at = (row * self._columns + column) * size
            write_at(self._file, data[row * width : (row + 1) * width], at)

    def rows(self, start: int, stop: int) -> Tensor:
        found = torch.empty((stop - start, self._columns), dtype=self._dtype)
        at = start * self._columns * self._dtype.itemsize
        read_at(self._file, bytes_of(found), at, _ASIDE)
        return found

    def put_rows(self, row: int, block: Tensor) -> None:
        write_at(self._file, bytes_of(block), row * self._columns * self._dtype.itemsize)

    def columns(self, start: int, stop: int) -> Tensor:
        found, size = (
            torch.empty((self._rows, stop - start), dtype=self._dtype),
            self._dtype.itemsize,
        )
        data, width = bytes_of(found), (stop - start) * size
        for row in range(self._rows):
            into = data[row * width : (row + 1) * width]
            read_at(self._file, into, (row * self._columns + start) * size, _ASIDE)
        return found

    def close(self) -> None:
        os.close(self._file)


class _Part:
    """Some rows of a matrix that is turned."""

    def __init__(self, runs: list[Run], whole: _Turned) -> None:
        self._runs, self._whole = runs, whole

    def read(self, start: int, stop: int) -> Tensor:
        parts = [
            self._whole.read(at, at + count) for _, at, count in _inside(self._runs, start, stop)
        ]
        return torch.cat(parts)

    def write(self, start: int, stop: int, rows: Tensor) -> None:
        for row, at, count in _inside(self._runs, start, stop):
            self._whole.write(at, at + count, rows[row : row + count])
