"""One matrix of a site, merged and made again by blocks of rows, in float64.

What a merge in memory and one on files have in common: W comes in rows from a reader, W' goes in
rows to a writer, and what is kept for the way back is the difference between the base's bits and
those that the inverse gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import inf, lcm
from typing import Any

import torch
from torch import Tensor

from surgery.algebra.derive import Derived, witness_leaf
from surgery.algebra.expr import BIAS, MERGED, WEIGHT, Expr
from surgery.algebra.interpret import Domain
from surgery.algebra.products import BITS
from surgery.algebra.rows import RowEvaluator, by_rows, step
from surgery.algebra.rules import is_zero
from surgery.checksums import Checksum
from surgery.corrections import packed, unpacked
from surgery.mixture import owned_parameters
from surgery.planned import PlannedSite
from surgery.precision import Round, Rounding, measured, rounded

Read = Callable[[int, int], Tensor]
"""Rows of a matrix, from one to before another, in the dtype in which they are stored."""

Write = Callable[[int, int, Tensor], None]
"""Takes such rows."""

_linalg: Any = torch.linalg  # which does not say that it has its error

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

    def evaluator(
        self, reproducible: bool, witnesses: Mapping[str, Tensor], bits: int = BITS
    ) -> RowEvaluator:
        """Of the site's equations; what is made of parameters alone is made once."""
        anchor = torch.zeros((), dtype=torch.float64, device=self.device)

        def leaf(expr: Expr) -> Tensor:
            return witnesses[expr.text("name")] if expr.op == "witness" else self.leaf(expr)

        domain = Domain(self.site.form.names, leaf, lambda: anchor)
        return RowEvaluator(domain, reproducible, bits)


def leaves_of(
    site: PlannedSite,
    parameters: Mapping[str, Tensor],
    bias: Tensor | None,
    device: torch.device | str = "cpu",
) -> tuple[Leaves, ...]:
    """What each matrix of a site is made of besides W.

    parameters, bias: of the whole site; of a batch, of every matrix, but what all of them share.
    """
    if site.site.batch is None:
        return (Leaves(site, parameters, bias, device),)
    shared = {name for name, _, p in owned_parameters(site) if p.shared}
    return tuple(
        Leaves(
            site,
            {n: v if n in shared else v[i] for n, v in parameters.items()},
            None if bias is None else bias[i],
            device,
        )
        for i in range(site.site.batch)
    )


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


class Wide:
    """Rows in float64, block after block in the same memory, where results may overwrite them."""

    def __init__(self, device: torch.device | str) -> None:
        """On the device to compute on."""
        self._room = torch.empty((0,), dtype=torch.float64, device=device)

    def __call__(self, rows: Tensor) -> Tensor:
        """The rows, valid until the next."""
        if self._room.numel() < rows.numel():
            self._room = self._room.new_empty((rows.numel(),))
        return self._room[: rows.numel()].view(rows.shape).copy_(rows.detach())


def bits_of(base: torch.dtype) -> int:
    """Of the operands of products on the way back to a base of a dtype, see `rows.RowEvaluator`.

    So many more than the base's own significand has that hardly an element is rounded otherwise;
    with 24, a product of up to 32 terms is one exact product. With other bits the inverse gives
    other rows: these numbers belong to the format of what is kept, and may not change.
    """
    return _BITS_OF.get(base, 34)


_BITS_OF = {torch.bfloat16: 24, torch.float64: BITS}


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


def merge(
    leaves: Leaves,
    read: Read,
    write: Write,
    how: How,
    *,
    keep: bool,
    within: tuple[int, int] | None = None,
) -> MergedMatrix:
    """Make the merged rows of a matrix, and give them to the writer.

    within: from which row to before which they are wanted; where no vector is made beside them,
    blocks with none of these are left out.
    keep: what leads back to the bits of the base; witnesses are given in any case. What is kept
    corrects the inverse of the rows as they were written.
    """
    derived = leaves.derived
    assert derived.still is not None
    values, wide = leaves.evaluator(False, {}), Wide(leaves.device)
    vectors: dict[Expr, list[Tensor]] = {leaf: [] for leaf in _vectors(derived)}
    roots = (*_vectors(derived).values(), derived.still.weight)
    kept, rounding = _Keeping(leaves), Rounding()
    first, last = (0, inf) if within is None or vectors else within
    for start, stop in blocks(leaves.site):
        if stop <= first or start >= last:
            continue
        base = read(start, stop)
        own = {WEIGHT: wide(base)}
        *beside, exact = values.all_rows(roots, start, stop, own, spent=True)
        for parts, part in zip(vectors.values(), beside, strict=True):
            parts.append(part.clone())  # it may lie in the rows of W
        if derived.still.weight is WEIGHT:
            continue
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
    values, wide = leaves.evaluator(False, {}), Wide(leaves.device)
    parts: list[Tensor] = []
    for start, stop in blocks(leaves.site):
        own = {} if read is None else {WEIGHT: wide(read(start, stop))}
        parts.append(values.rows(still.bias, start, stop, own).clone())
    return _joined(parts)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Keeping:
    """Gathers, block by block, what leads back from merged rows to the base's."""

    def __init__(self, leaves: Leaves) -> None:
        self._leaves = leaves
        self._witnesses: dict[str, Tensor] = {}
        self._back: Back | None = None
        self._base, self._merged = Checksum(), Checksum()
        self._blocks: list[tuple[int, int, bytes]] = []
        self._dtype: torch.dtype | None = None

    def add(
        self, rows: tuple[int, int], base: Tensor, merged: Tensor, vectors: Mapping[Expr, Tensor]
    ) -> None:
        """The rows from one to before another, as they were and as they were written."""
        kept = {leaf: value for leaf, value in vectors.items() if leaf.op == "witness"}
        self._witnesses |= {leaf.text("name"): value for leaf, value in kept.items()}
        if self._back is None:
            self._back = Back(self._leaves, self._witnesses, base.dtype)
        found = self._back.rows(*rows, merged, kept)
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


class Back:
    """What the inverse gives for merged rows: the same bits here and on any other machine."""

    def __init__(self, leaves: Leaves, witnesses: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """To a base of a dtype."""
        self._back, self._dtype = leaves.derived.inverse.weight, dtype
        self._values = leaves.evaluator(True, witnesses, bits_of(dtype))
        self._wide = Wide(leaves.device)

    def rows(
        self, start: int, stop: int, merged: Tensor, own: Mapping[Expr, Tensor] | None = None
    ) -> Tensor:
        """Rows in the base's dtype, on the merged rows' device; themselves if nothing leads back.

        own: such rows of the witnesses, where they are not yet known whole.
        """
        exact = self.exact(start, stop, merged, own)
        return merged.to(self._dtype) if exact is None else rounded(exact, self._dtype)

    def exact(
        self, start: int, stop: int, merged: Tensor, own: Mapping[Expr, Tensor] | None = None
    ) -> Tensor | None:
        """The rows before they are rounded, valid until the next."""
        if self._back is None:
            return None
        wide = self._wide(merged)
        rows = {**(own or {}), MERGED: wide}
        try:
            (made,) = self._values.all_rows((self._back,), start, stop, rows, spent=True)
        except _linalg.LinAlgError:  # of a singular matrix, which it is each time
            return None
        # What is no number has bits that depend on the processor.
        room = wide if made.is_contiguous() else None
        return torch.nan_to_num(made, 0.0, torch.inf, -torch.inf, out=room)


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
    back, base, seen = Back(leaves, witnesses, kept.dtype), Checksum(), Checksum()
    for start, stop, data in kept.blocks:
        merged = read(start, stop)
        seen.add(merged)
        found = back.rows(start, stop, merged)
        rows = unpacked(data, found, _beside(merged, found))
        base.add(rows)
        write(start, stop, rows)
    return base.hexdigest(), seen.hexdigest()


def inverted(leaves: Leaves, witnesses: Mapping[str, Tensor], read: Read, write: Write) -> bool:
    """Make W from the merged rows by arithmetic alone; whether all of it is finite."""
    back, finite = leaves.derived.inverse.weight, True
    assert back is not None
    values, wide = leaves.evaluator(False, witnesses), Wide(leaves.device)
    for start, stop in blocks(leaves.site):
        merged = read(start, stop)
        (exact,) = values.all_rows((back,), start, stop, {MERGED: wide(merged)}, spent=True)
        finite = finite and bool(torch.isfinite(exact).all())
        write(start, stop, rounded(exact, merged.dtype, "nearest", None))
    return finite
