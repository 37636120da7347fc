"""One tensor of a checkpoint, copied, or merged with what is kept for the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from surgery import merging
from surgery.algebra.beginnings import stream
from surgery.errors import refuse
from surgery.file_places import Places, Source, Target, size_of
from surgery.file_plan import Job, places, reads_weight, source_of
from surgery.file_record import MatrixRecord, Side, TensorRecord, key, packed_pieces
from surgery.folder_sites import Adapted
from surgery.headers import Entry
from surgery.merge_report import Way
from surgery.merged import Undo
from surgery.merging import How, Leaves, MergedMatrix
from surgery.mixture import owned_parameters
from surgery.model.parts import ENTRIES
from surgery.model.storage import bias_of
from surgery.planned import PlannedSite
from surgery.precision import Round, Rounding, measured, rounded
from surgery.shards import ShardWriter

SMALL = 2**12
"""Bytes of a tensor of which the base itself is kept: corrections would not pay."""

_PIECE = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Options:
    """How files are merged.

    undo: `exact` keeps what `unmerge_files` makes the base's bytes of; `none` nothing. round, seed:
    as for `Inverse.merge`. dtype: of the merged tensors, if not the base's own.
    """

    undo: Undo = "exact"
    round: Round = "nearest"
    seed: int = 0
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Raises ArtifactError (E552) for what files cannot be merged with."""
        if self.undo not in ("exact", "none"):
            hint = "files are merged with undo `exact` or `none`"
            refuse("E552", f"there is no undo `{self.undo}` for files", hint=hint)
        if self.dtype is not None and not self.dtype.is_floating_point:
            hint = "name a floating one: bfloat16, float16, float32, float64"
            refuse("E552", f"weights cannot be {self.dtype}", hint=hint)

    def as_json(self) -> dict[str, object]:
        """As plain data."""
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return {"undo": self.undo, "round": self.round, "seed": self.seed, "dtype": dtype}


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a merge may lose."""

    max_rel_err: float | None = None
    nonfinite: bool = False

    def check(self, path: str, found: Rounding) -> None:
        """Raises StateError: E430 for what is not finite, E431 for what rounding loses."""
        if not (found.finite or self.nonfinite):
            counts = (
                (found.overflowed, "are beyond the range of its dtype"),
                (found.nonfinite, "are infinite or no number"),
            )
            beyond = " and ".join(f"{count:,} {what}" for count, what in counts if count)
            refuse(
                "E430",
                f"`{path}`: of {found.elements:,} merged weights {beyond}",
                hint="look at the adapter's scale and at the dtype of the base; with "
                "allow_nonfinite they are merged all the same",
            )
        if self.max_rel_err is not None and found.relative > self.max_rel_err:
            refuse(
                "E431",
                f"`{path}`: rounding is off by {found.relative:.1e} of the largest weight",
                hint=f"{self.max_rel_err:.1e} is accepted; merge to a wider dtype",
            )


def pieces_of(entry: Entry) -> Iterator[memoryview]:
    """The bytes of a tensor in its file, piece by piece."""
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        for at in range(0, entry.bytes, _PIECE):
            yield memoryview(file.read(min(_PIECE, entry.bytes - at)))


def sum_of(entry: Entry) -> str:
    """A checksum of the bytes of a tensor in its file."""
    found = sha256()
    for piece in pieces_of(entry):
        found.update(piece)
    return found.hexdigest()


def leaves_of(
    site: PlannedSite, parameters: Mapping[str, Tensor], bias: Tensor | None
) -> tuple[Leaves, ...]:
    """What each matrix of a site is made of besides W. bias: of the site, of every matrix."""
    if site.site.batch is None:
        return (Leaves(site, parameters, bias),)
    shared = {name for name, _, p in owned_parameters(site) if p.shared}
    return tuple(
        Leaves(
            site,
            {n: v if n in shared else v[i] for n, v in parameters.items()},
            None if bias is None else bias[i],
        )
        for i in range(site.site.batch)
    )


def indices(site: PlannedSite) -> Iterator[int | None]:
    """Which matrices of a batch a site is; None where it is one."""
    yield from (None,) if site.site.batch is None else range(site.site.batch)


class Biases:
    """The biases that sites have before a merge, or the copies that an adapter has of them.

    read: the tensor of a name, as the base has it.
    """

    def __init__(self, found: Adapted, read: Callable[[str], Tensor]) -> None:
        """Of the sites of some adapters."""
        self._found, self._read = found, read
        self._copies = {
            name: site
            for site in found.sites
            if site.site.at.tensor and (name := found.tensor(site)) is not None
        }

    def of(self, site: PlannedSite) -> Tensor | None:
        """What a site's equations read as b; None where there is none."""
        name = self._found.tensor(site, site.site.at.bias) if site.form.has_bias else None
        if name is None or site.site.at.tensor:
            return None
        whole = self._read(name)
        copy = self._copies.get(name)
        if copy is not None and copy.site.at.whole:
            whole = self._copied(copy, whole)
        return bias_of(site.site.at, whole)

    def _copied(self, site: PlannedSite, base: Tensor) -> Tensor:
        made = torch.empty((base.numel(), 1), dtype=base.dtype)
        column = base.reshape(-1, 1)

        def write(start: int, stop: int, rows: Tensor) -> None:
            made[start:stop] = rows

        leaves = Leaves(site, self._found.parameters(site))
        how = How(base.dtype)
        merging.merge(leaves, lambda start, stop: column[start:stop], write, how, keep=False)
        return made.reshape(base.shape)


class Tensors:
    """The tensors of one file, copied or merged into their places; threads may do several."""

    def __init__(
        self,
        found: Adapted,
        options: Options,
        accepted: Accepted,
        side: Side,
        writer: ShardWriter,
        scratch: Path,
    ) -> None:
        """Write to a file, and to what is kept beside it."""
        self.found, self.options, self.accepted = found, options, accepted
        self.side, self.writer, self.scratch = side, writer, scratch
        self.biases = Biases(found, found.checkpoint.read)

    def copy(self, entry: Entry) -> None:
        """A tensor as it is."""
        self.writer.copy(entry)

    def merge(self, job: Job) -> TensorRecord:
        """A tensor that changes."""
        return self._bias(job) if job.biases else self._weight(job)

    # ------------------------------------------------------------------------------- weights

    def _weight(self, job: Job) -> TensorRecord:
        name, source = job.entry.name, source_of(self.found.checkpoint, job.entry.name)
        dtype = self._dtype(source)
        exact = self.options.undo == "exact"
        keeps_base = exact and self._keeps_base(job, source, dtype)

        def write(start: int, data: Tensor) -> None:
            self.writer.write_bytes(name, start, data)

        rows: list[MatrixRecord] = []
        kept, number = 0, 0
        with Places(source, Target(dtype, write), self.scratch) as own:
            for site in job.weights:
                drawn = None
                if self.options.round != "nearest":
                    drawn = stream(self.options.seed, "merge", site.path)
                how = How(dtype, self.options.round, drawn)
                parameters = self.found.parameters(site)
                leaves = leaves_of(site, parameters, self.biases.of(site))
                total = Rounding()
                for index, one in zip(indices(site), leaves, strict=True):
                    place = own.of(site, index)
                    keep = exact and not keeps_base
                    done = merging.merge(one, place.read, place.write, how, keep=keep)
                    total += done.rounding
                    row, count = self._kept(name, number, site, index, done)
                    rows.append(row)
                    kept, number = kept + count, number + 1
                self.accepted.check(site.path, total)
                if exact and not keeps_base:
                    kept += self._keep_parameters(name, number, site, parameters)
            own.finish()
        if keeps_base:
            return self._with_base(job.entry, job.by_rows, rows)
        way: Way = "corrections" if exact else "nothing"
        return TensorRecord(name, way, kept, job.by_rows, tuple(rows))

    def _dtype(self, source: Source) -> torch.dtype:
        return self.options.dtype or source.dtype

    def _keeps_base(self, job: Job, source: Source, dtype: torch.dtype) -> bool:
        """Whether the base's own bytes are kept of a tensor."""
        elements = sum(
            rows * columns * (site.site.batch or 1)
            for site in job.weights
            for rows, columns in (size_of(site),)
        )
        partly = elements * source.dtype.itemsize < job.entry.bytes
        return job.entry.bytes <= SMALL or (partly and dtype != source.dtype)

    def _kept(
        self, name: str, number: int, site: PlannedSite, index: int | None, done: MergedMatrix
    ) -> tuple[MatrixRecord, int]:
        packed = done.packed
        if packed is None:
            return MatrixRecord(site.path, index, done.rounding), 0
        blocks, pieces = packed_pieces(packed)
        self.side.add(key(name, number, "packed"), pieces)
        for witness, value in done.witnesses.items():
            self.side.add(key(name, number, f"witness|{witness}"), value)
        count = packed.bytes + sum(8 * w.numel() for w in done.witnesses.values())
        dtype = str(packed.dtype).removeprefix("torch.")
        row = MatrixRecord(
            site.path, index, done.rounding, packed.base, packed.merged, dtype, blocks
        )
        return row, count

    def _keep_parameters(
        self, name: str, number: int, site: PlannedSite, parameters: Mapping[str, Tensor]
    ) -> int:
        """What no folder has of an adapter, since it is made of the base; of the last matrix."""
        count = 0
        for own in self.found.made_of_base(site):
            value = parameters[own]
            self.side.add(key(name, number - 1, f"parameter|{own}"), value)
            count += value.numel() * value.element_size()
        return count

    def _with_base(self, entry: Entry, by_rows: bool, rows: list[MatrixRecord]) -> TensorRecord:
        """The record of a tensor of which the base's own bytes are kept."""
        pieces = [bytes(data) for data in pieces_of(entry)]
        self.side.add(key(entry.name), pieces)
        base, merged = sum_of(entry), sum_of(self.writer.entries[entry.name])
        return TensorRecord(entry.name, "base", entry.bytes, by_rows, tuple(rows), base, merged)

    # -------------------------------------------------------------------------------- biases

    def _bias(self, job: Job) -> TensorRecord:
        """A vector that is made of the sites it is the bias of, in memory; it is small."""
        entry = job.entry
        base = self.found.checkpoint.read(entry.name)
        wide = base.to(torch.float64)
        rows: list[MatrixRecord] = []
        for site in job.biases:
            part = bias_of(site.site.at, wide)
            made = self._made(site)
            before = bias_of(site.site.at, base)
            rounding = measured(made, rounded(made, self._bias_dtype(base)), before)
            self.accepted.check(site.path, rounding)
            rows.append(MatrixRecord(site.path, None, rounding))
            if site.site.at.part is None:
                part.copy_(made)
            else:
                site.site.at.part.write(site.site.at.one(wide), made, ENTRIES)
        drawn = None
        if self.options.round != "nearest":
            drawn = stream(self.options.seed, "merge", entry.name)
        done = rounded(wide, self._bias_dtype(base), self.options.round, drawn)
        self.writer.write_bytes(entry.name, 0, done)
        if self.options.undo == "exact":
            return self._with_base(entry, True, rows)
        return TensorRecord(entry.name, "nothing", 0, True, tuple(rows))

    def _bias_dtype(self, base: Tensor) -> torch.dtype:
        return self.options.dtype or base.dtype

    def _made(self, site: PlannedSite) -> Tensor:
        """The merged bias of a site in float64: [out], or [batch, out]."""
        leaves = leaves_of(site, self.found.parameters(site), self.biases.of(site))
        name = self.found.tensor(site)
        if name is None or not reads_weight(site):
            found = [merging.bias_of(one, None) for one in leaves]
        else:
            with places(self.found.checkpoint, name, self.scratch) as own:
                pairs = zip(indices(site), leaves, strict=True)
                found = [merging.bias_of(one, own.of(site, index).read) for index, one in pairs]
        return found[0] if site.site.batch is None else torch.stack(found)
