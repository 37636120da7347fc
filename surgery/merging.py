"""One matrix of a site, merged and made again by blocks of rows, in float64.

What a merge in memory and one on files have in common: W comes in rows from a reader, W' goes in
rows to a writer, and what is kept for the way back is the difference between the base's bits and
those that the inverse gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor

from surgery.algebra.derive import Derived, witness_leaf
from surgery.algebra.expr import BIAS, MERGED, WEIGHT, Expr
from surgery.algebra.interpret import Domain
from surgery.algebra.rows import RowEvaluator, by_rows, step
from surgery.algebra.rules import is_zero
from surgery.checksums import Checksum
from surgery.corrections import packed, unpacked
from surgery.planned import PlannedSite
from surgery.precision import Round, Rounding, measured, rounded

Read = Callable[[int, int], Tensor]
"""Rows of a matrix, from one to before another, in the dtype in which they are stored."""

Write = Callable[[int, int, Tensor], None]
"""Takes such rows."""

BLOCK = 2**19
"""Elements of W in a block: 4 MiB in float64, which stays in a processor's cache."""


@dataclass(frozen=True, slots=True)
class Leaves:
    """What the equations of one matrix are made of besides W.

    parameters: by the names that the site has for them, those of one matrix. bias: b [out]; None
    where the site has none. device: where to compute.
    """

    site: PlannedSite
    parameters: Mapping[str, Tensor]
    bias: Tensor | None = None
    device: torch.device | str = "cpu"

    @property
    def derived(self) -> Derived:
        """What follows from the site's equations."""
        return self.site.form.derived

    def leaf(self, expr: Expr) -> Tensor:
        """A parameter or b, in its own dtype, where it is computed with."""
        match expr.op:
            case "parameter":
                name = expr.text("name")
                return self.site.form.matrix(name, self.parameters[name].detach()).to(self.device)
            case _:
                assert self.bias is not None, expr.op
                return self.bias.detach().to(self.device)

    def wide(self, value: Tensor) -> Tensor:
        """A tensor in float64, where it is computed with."""
        return value.detach().to(self.device, torch.float64)

    def evaluator(self, reproducible: bool, witnesses: Mapping[str, Tensor]) -> RowEvaluator:
        """Of the site's equations; what is made of parameters alone is made once."""
        anchor = torch.zeros((), dtype=torch.float64, device=self.device)

        def leaf(expr: Expr) -> Tensor:
            return witnesses[expr.text("name")] if expr.op == "witness" else self.leaf(expr)

        return RowEvaluator(Domain(self.site.form.names, leaf, lambda: anchor), reproducible)


@dataclass(frozen=True, slots=True)
class How:
    """How a merge rounds: to a dtype, and at random by a generator where `round` says so."""

    dtype: torch.dtype
    round: Round = "nearest"
    generator: torch.Generator | None = None


@dataclass(frozen=True, slots=True)
class Packed:
    """What leads from the merged rows of a matrix back to the base's, to the bit.

    blocks: from which row to before which, and the corrections of what the inverse gives for them.
    dtype: of the base. base, merged: checksums of all rows.
    """

    blocks: tuple[tuple[int, int, bytes], ...]
    dtype: torch.dtype
    base: str
    merged: str

    @property
    def bytes(self) -> int:
        """The bytes kept."""
        return sum(len(data) for *_, data in self.blocks)


@dataclass(frozen=True, slots=True)
class MergedMatrix:
    """What a merge of one matrix found: errors, witnesses and b' [out] in float64, the way back."""

    rounding: Rounding
    witnesses: Mapping[str, Tensor]
    bias: Tensor | None
    packed: Packed | None


# ------------------------------------------------------------------------------------- blocks


def by_blocks(derived: Derived) -> bool:
    """Whether W' and the way back are made block after block, with no need of the whole of W."""
    return all(map(by_rows, made(derived)))


def blocks(site: PlannedSite) -> tuple[tuple[int, int], ...]:
    """From which row to before which a site's matrix is merged, and made again, at a time."""
    derived, names = site.form.derived, site.form.names
    rows, columns = site.form.numbers(WEIGHT.shape)
    if not by_blocks(derived):
        return ((0, rows),)
    least = lcm(*(step(expr, names) for expr in made(derived)))
    size = max(1, BLOCK // max(1, columns * least)) * least
    return tuple((start, min(start + size, rows)) for start in range(0, rows, size))


def made(derived: Derived) -> Iterator[Expr]:
    """All that is made of W or W' by a merge or on the way back."""
    assert derived.still is not None
    yield derived.still.weight
    yield from _vectors(derived).values()
    if derived.inverse.weight is not None:
        yield derived.inverse.weight


def _vectors(derived: Derived) -> dict[Expr, Expr]:
    """What is made beside W', by the leaves that stand for it: witnesses, and b'."""
    assert derived.still is not None
    made = {witness_leaf(name, expr): expr for name, expr in derived.inverse.witnesses}
    if changes(derived)[1]:
        made[BIAS] = derived.still.bias
    return made


def changes(derived: Derived) -> tuple[bool, bool]:
    """Whether a merge changes the weight, and the bias."""
    merged = derived.still
    assert merged is not None
    untouched = merged.bias is BIAS or is_zero(merged.bias)
    return merged.weight is not WEIGHT, not untouched


# ------------------------------------------------------------------------------------- there


def merge(leaves: Leaves, read: Read, write: Write, how: How, *, keep: bool) -> MergedMatrix:
    """Make the merged rows of a matrix, and give them to the writer.

    keep: what leads back to the bits of the base; witnesses are given in any case. What is kept
    corrects the inverse of the rows as they were written.
    """
    derived = leaves.derived
    assert derived.still is not None
    values = leaves.evaluator(False, {})
    vectors: dict[Expr, list[Tensor]] = {leaf: [] for leaf in _vectors(derived)}
    kept, rounding = _Keeping(leaves), Rounding()
    for start, stop in blocks(leaves.site):
        base = read(start, stop)
        own = {WEIGHT: leaves.wide(base)}
        for leaf, expr in _vectors(derived).items():
            vectors[leaf].append(values.rows(expr, start, stop, own))
        if derived.still.weight is WEIGHT:
            continue
        exact = values.rows(derived.still.weight, start, stop, own)
        merged = rounded(exact, how.dtype, how.round, how.generator)
        rounding += measured(exact, merged, base)
        write(start, stop, merged)
        if keep:
            kept.add((start, stop), base, merged, {leaf: v[-1] for leaf, v in vectors.items()})
    whole = {leaf: _joined(parts) for leaf, parts in vectors.items()}
    bias = whole.pop(BIAS, None)
    witnesses = {leaf.text("name"): value for leaf, value in whole.items()}
    return MergedMatrix(rounding, witnesses, bias, kept.packed)


def bias_of(leaves: Leaves, read: Read | None) -> Tensor:
    """The merged bias [out] of a matrix alone, in float64. read: None where no row of W is read."""
    still = leaves.derived.still
    assert still is not None
    values = leaves.evaluator(False, {})
    parts: list[Tensor] = []
    for start, stop in blocks(leaves.site):
        own = {} if read is None else {WEIGHT: leaves.wide(read(start, stop))}
        parts.append(values.rows(still.bias, start, stop, own))
    return _joined(parts)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Keeping:
    """Gathers, block by block, what leads back from merged rows to the base's."""

    def __init__(self, leaves: Leaves) -> None:
        self._witnesses: dict[str, Tensor] = {}
        self._back = _Back(leaves, self._witnesses)
        self._base, self._merged = Checksum(), Checksum()
        self._blocks: list[tuple[int, int, bytes]] = []
        self._dtype: torch.dtype | None = None

    def add(
        self, rows: tuple[int, int], base: Tensor, merged: Tensor, vectors: Mapping[Expr, Tensor]
    ) -> None:
        """The rows from one to before another, as they were and as they were written."""
        kept = {leaf: value for leaf, value in vectors.items() if leaf.op == "witness"}
        self._witnesses |= {leaf.text("name"): value for leaf, value in kept.items()}
        found = self._back.rows(*rows, merged, base.dtype, kept)
        self._blocks.append((*rows, packed(base, found, _beside(merged, found))))
        self._base.add(base)
        self._merged.add(merged)
        self._dtype = base.dtype

    @property
    def packed(self) -> Packed | None:
        """All that was added; None if that is nothing."""
        if self._dtype is None:
            return None
        base, merged = self._base.hexdigest(), self._merged.hexdigest()
        return Packed(tuple(self._blocks), self._dtype, base, merged)


# -------------------------------------------------------------------------------------- back


class _Back:
    """What the inverse gives for merged rows: the same bits here and on any other machine."""

    def __init__(self, leaves: Leaves, witnesses: Mapping[str, Tensor]) -> None:
        self._leaves = leaves
        self._values = leaves.evaluator(True, witnesses)

    def rows(
        self,
        start: int,
        stop: int,
        merged: Tensor,
        dtype: torch.dtype,
        own: Mapping[Expr, Tensor],
    ) -> Tensor:
        """Rows in the base's dtype, on the merged rows' device; themselves if nothing leads back.

        own: such rows of the witnesses, where they are not yet known whole.
        """
        back = self._leaves.derived.inverse.weight
        if back is None:
            return merged.to(dtype)
        rows = {**own, MERGED: self._leaves.wide(merged)}
        try:
            exact = self._values.rows(back, start, stop, rows)
        except RuntimeError:  # of a singular matrix, which it is each time
            return merged.to(dtype)
        # What is no number has bits that depend on the processor.
        return rounded(exact.nan_to_num(0.0, torch.inf, -torch.inf), dtype, "nearest", None)


def _beside(merged: Tensor, found: Tensor) -> Tensor:
    """What foretells the corrections: the merged rows, in the base's dtype."""
    return merged.to(found.dtype)


def unmerge(
    leaves: Leaves, witnesses: Mapping[str, Tensor], kept: Packed, read: Read, write: Write
) -> tuple[str, str]:
    """Make the base's rows of a matrix again from the merged ones, and give them to the writer.

    Gives the checksums of what was written, and of what was read. Raises ValueError where what was
    kept is of other rows.
    """
    back, base, seen = _Back(leaves, witnesses), Checksum(), Checksum()
    for start, stop, data in kept.blocks:
        merged = read(start, stop)
        seen.add(merged)
        found = back.rows(start, stop, merged, kept.dtype, {})
        rows = unpacked(data, found, _beside(merged, found))
        base.add(rows)
        write(start, stop, rows)
    return base.hexdigest(), seen.hexdigest()


def inverted(leaves: Leaves, witnesses: Mapping[str, Tensor], read: Read, write: Write) -> bool:
    """Make W from the merged rows by arithmetic alone; whether all of it is finite."""
    back, finite = leaves.derived.inverse.weight, True
    assert back is not None
    values = leaves.evaluator(False, witnesses)
    for start, stop in blocks(leaves.site):
        merged = read(start, stop)
        exact = values.rows(back, start, stop, {MERGED: leaves.wide(merged)})
        finite = finite and bool(torch.isfinite(exact).all())
        write(start, stop, rounded(exact, merged.dtype, "nearest", None))
    return finite
