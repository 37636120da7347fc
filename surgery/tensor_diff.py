"""Two checkpoints, or two saved adapters, compared tensor by tensor in little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.errors import SurgeryError, refuse
from surgery.headers import Entry
from surgery.report import aligned, shown_shape
from surgery.store import read_json

BLOCK = 2**21
"""Bytes of each tensor that are compared at once; in float64 they are up to eight times as many."""

Verdict = Literal[
    "equal", "close", "different", "of other dtype", "of other shape", "only in A", "only in B"
]
"""close: not equal, and by no more than the tolerance."""

_WELL: tuple[Verdict, ...] = ("equal", "close")

_MEANING = ("adapter_config.json", "adapter.peft", "mapping.json")
"""Files that say what an adapter's tensors mean."""

_ABOUT = frozenset(
    {"base_model_name_or_path", "inference_mode", "peft_version", "revision", "seed"}
)
"""What they say besides."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """One tensor in A and in B.

    absolute: the largest difference of two elements; relative: that by the largest element of A, in
    absolute values. Both are None where there is nothing to subtract: one of the two is missing, of
    another shape, or of a dtype that torch does not have. described: dtype and shape in A and in B.
    """

    name: str
    verdict: Verdict
    absolute: float | None = None
    relative: float | None = None
    described: tuple[str, str] = ("", "")

    def as_json(self) -> dict[str, object]:
        """As plain data; numbers that JSON does not have are texts."""
        a, b = self.described
        numbers = {"absolute": _plain(self.absolute), "relative": _plain(self.relative)}
        return {"name": self.name, "verdict": self.verdict, **numbers, "a": a, "b": b}


def _plain(number: float | None) -> float | str | None:
    return number if number is None or number < inf else str(number)


@dataclass(frozen=True, slots=True)
class Difference:
    """All tensors of two checkpoints, in A's order, and then those of B alone.

    files: what differs in other files, a line each. meant: whether some of that says what the
    tensors mean, as an adapter's config does.
    """

    tensors: tuple[TensorDiff, ...]
    files: tuple[str, ...] = ()
    meant: bool = False

    @property
    def equal(self) -> bool:
        """Whether all tensors are equal, or within the tolerance, and mean the same."""
        return not self.meant and all(one.verdict in _WELL for one in self.tensors)

    def as_json(self) -> dict[str, object]:
        """As plain data."""
        tensors = [one.as_json() for one in self.tensors]
        return {"equal": self.equal, "tensors": tensors, "files": [*self.files]}

    def __str__(self) -> str:
        """The tensors that are not equal, and a count of each verdict."""
        rows = [
            [one.name, one.verdict, _number(one.absolute), _number(one.relative), _both(one)]
            for one in self.tensors
            if one.verdict != "equal"
        ]
        head = ["tensor", "", "absolute", "relative", "dtype and shape"]
        lines = [*aligned([head, *rows]), ""] if rows else []
        lines += [*self.files, ""] if self.files else []
        found = [one.verdict for one in self.tensors]
        counts = ", ".join(f"{found.count(v)} {v}" for v in dict.fromkeys(found)) or "no tensors"
        return "\n".join([*lines, counts])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _both(one: TensorDiff) -> str:
    return " → ".join(dict.fromkeys(filter(None, one.described)))


def diff(
    a: str | Path,
    b: str | Path,
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> Difference:
    """Compare the tensors of two checkpoints or adapters' folders, bit by bit.

    tolerance: how large a relative difference is still well; without one, bits are compared. With
    one the same numbers in another dtype are well too. progress: is told each tensor's name.
    Raises ArtifactError as `open_checkpoint` does.
    """
    with open_checkpoint(a) as first, open_checkpoint(b) as second:
        found: list[TensorDiff] = []
        for name in dict.fromkeys([*first.tensors, *second.tensors]):
            if progress is not None:
                progress(name)
            found.append(_compared(name, first, second, tolerance))
        both = Path(a).is_dir() and Path(b).is_dir()
        beside = [*_files(first, second)] if both else []
    meant = any(means for _, means in beside)
    return Difference(tuple(found), tuple(line for line, _ in beside), meant)


def _described(entry: Entry) -> str:
    return f"{entry.dtype} {shown_shape(entry.shape)}"


def _compared(name: str, a: Checkpoint, b: Checkpoint, tolerance: float | None) -> TensorDiff:
    one, other = a.tensors.get(name), b.tensors.get(name)
    if one is None or other is None:
        there = ("" if one is None else _described(one), "" if other is None else _described(other))
        return TensorDiff(name, "only in B" if one is None else "only in A", described=there)
    described = (_described(one), _described(other))
    if one.shape != other.shape:
        return TensorDiff(name, "of other shape", described=described)
    if one.dtype == other.dtype and same_bytes(name, a, b):
        return TensorDiff(name, "equal", 0.0, 0.0, described)
    verdict: Verdict = "different" if one.dtype == other.dtype else "of other dtype"
    if one.torch_dtype is None or other.torch_dtype is None:
        return TensorDiff(name, verdict, described=described)
    absolute, relative = _distance(name, a, b)
    if tolerance is not None and relative <= tolerance:
        verdict = "close"
    return TensorDiff(name, verdict, absolute, relative, described)


def same_bytes(name: str, a: Checkpoint, b: Checkpoint) -> bool:
    """Whether a tensor, of one dtype and shape, is the same in two checkpoints, bit by bit."""
    size = a.entry(name).bytes
    mine, other = (torch.empty(min(size, BLOCK), dtype=torch.uint8) for _ in "ab")
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        x, y = a.read_bytes(name, start, stop, mine), b.read_bytes(name, start, stop, other)
        wide = (stop - start) // 8 * 8  # eight at a time are five times as quick
        if not torch.equal(x[:wide].view(torch.int64), y[:wide].view(torch.int64)):
            return False
        if not torch.equal(x[wide:], y[wide:]):
            return False
    return True


def _distance(name: str, a: Checkpoint, b: Checkpoint) -> tuple[float, float]:
    """The largest difference, and by the largest element of A."""
    largest = distance = 0.0
    for x, y in _blocks(name, a, b):
        same = (x == y) | (x.isnan() & y.isnan())
        apart = torch.where(same, 0.0, (x - y).abs()).nan_to_num(nan=inf, posinf=inf)
        distance = max(distance, float(apart.max()))
        known = x.abs()[x.isfinite()]
        largest = max(largest, float(known.max()) if known.numel() else 0.0)
    return distance, distance / largest if largest else (inf if distance else 0.0)


def _blocks(name: str, a: Checkpoint, b: Checkpoint) -> Iterator[tuple[Tensor, Tensor]]:
    """The elements of both, in float64 or complex, one block after another; a row may be long."""
    one, other = a.entry(name), b.entry(name)
    count = one.bytes // _width(one)
    step = max(1, BLOCK // 8)
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield _elements(a, one, start, stop), _elements(b, other, start, stop)


def _width(entry: Entry) -> int:
    assert entry.torch_dtype is not None
    return entry.torch_dtype.itemsize


def _elements(checkpoint: Checkpoint, entry: Entry, start: int, stop: int) -> Tensor:
    width, dtype = _width(entry), entry.torch_dtype
    assert dtype is not None
    found = checkpoint.read_bytes(entry.name, start * width, stop * width).view(dtype)
    return found.to(torch.complex128 if dtype.is_complex else torch.float64)


# -------------------------------------------------------------------------------- other files


def _files(a: Checkpoint, b: Checkpoint) -> Iterator[tuple[str, bool]]:
    """What differs beside the tensors, and whether it says what they mean."""
    ours, theirs = ({p.as_posix() for p in c.others} for c in (a, b))
    for name in sorted(ours | theirs):
        if name not in ours or name not in theirs:
            yield f"{name}: only in {'A' if name in ours else 'B'}", False
            continue
        one, other = a.folder / name, b.folder / name
        if _equal_files(one, other):
            continue
        fields = _fields(one, other)
        if name in _MEANING and fields is not None:
            fields = [field for field in fields if field not in _ABOUT]
        if fields != []:
            said = f"differs in {', '.join(fields)}" if fields else "differs"
            yield f"{name}: {said}", name in _MEANING


def _equal_files(one: Path, other: Path) -> bool:
    try:
        with one.open("rb") as x, other.open("rb") as y:
            while (p := x.read(BLOCK)) == (q := y.read(BLOCK)) and p:
                continue
    except OSError as error:
        refuse("E511", f"cannot read {error.filename}: {error.strerror}", hint="check the path")
    return p == q


def _fields(one: Path, other: Path) -> list[str] | None:
    """The fields in which two JSON objects differ; None for other files."""
    if one.suffix != ".json":
        return None
    try:
        x, y = read_json(one), read_json(other)
    except SurgeryError:
        return None
    return [name for name in _in_order(x, y) if x.get(name) != y.get(name)]


def _in_order(x: Mapping[str, object], y: Mapping[str, object]) -> Iterable[str]:
    return dict.fromkeys([*x, *y])
