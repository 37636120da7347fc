"""One tensor of a checkpoint, copied, or merged with what is kept for the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from surgery import merging
from surgery.algebra.beginnings import stream
from surgery.errors import refuse
from surgery.file_places import Places, Source, Target, size_of
from surgery.file_plan import Job, Share, places, reads_weight, source_of
from surgery.file_quantized import dense_dtype, filled, held, whole
from surgery.file_record import MatrixRecord, Side, TensorRecord, key, packed_pieces
from surgery.folder_sites import Adapted
from surgery.headers import Entry
from surgery.merge_report import Accepted, Way
from surgery.merged import Undo
from surgery.merging import How, Leaves, MergedMatrix, leaves_of
from surgery.model.parts import ENTRIES
from surgery.model.storage import bias_of
from surgery.planned import PlannedSite
from surgery.precision import Round, Rounding, measured, rounded
from surgery.quantized import Quantized
from surgery.quantized_files import quantiser
from surgery.shards import ShardWriter

SMALL = 2**12
"""Bytes of a tensor of which the base itself is kept: corrections would not pay."""

_PIECE = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Options:
    """How files are merged.

    undo: `exact` keeps what `unmerge_files` makes the base's bytes of; `none` nothing. round, seed:
    as for `Inverse.merge`. dtype: of the merged tensors, if not the base's own. quantized: what
    becomes of quantised weights. partial: whether what cannot merge is left as an adapter.
    """

    undo: Undo = "exact"
    round: Round = "nearest"
    seed: int = 0
    dtype: torch.dtype | None = None
    quantized: Quantized | None = None
    partial: bool = False

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
        return {
            "undo": self.undo,
            "round": self.round,
            "seed": self.seed,
            "dtype": dtype,
            "quantized": self.quantized,
            "partial": self.partial,
        }

    def dtype_of(self, job: Job, dense: torch.dtype) -> torch.dtype | None:
        """The dtype that a tensor has when it is merged; None where torch does not have it.

        dense: of plain weights that quantised ones become.
        """
        own = job.entry.torch_dtype
        if job.quantised is not None:
            return (self.dtype or dense) if self.quantized == "dequantize" else own
        return self.dtype if self.dtype and own and own.is_floating_point else own


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


def indices(site: PlannedSite) -> Iterator[int | None]:
    """Which matrices of a batch a site is; None where it is one."""
    yield from (None,) if site.site.batch is None else range(site.site.batch)


class Lately:
    """The adapters' tensors at the last sites; of experts, they are asked for again and again."""

    def __init__(self, found: Adapted) -> None:
        """Of the sites of some adapters."""
        self._found = found
        self._last: dict[str, dict[str, Tensor]] = {}

    def parameters(self, site: PlannedSite) -> dict[str, Tensor]:
        """As `Adapted.parameters`."""
        if site.site.batch is None:
            return self._found.parameters(site)
        known = self._last.get(site.path)
        if known is None:
            known = self._found.parameters(site)
            self._last = {**dict([*self._last.items()][-1:]), site.path: known}
        return known


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
        self.biases, self.lately = Biases(found, found.read), Lately(found)
        self.dense = dense_dtype(found.checkpoint, found.quantised)

    def copy(self, entry: Entry) -> None:
        """A tensor as it is."""
        self.writer.copy(entry)

    def merge(self, job: Job, names: Sequence[str]) -> list[TensorRecord]:
        """A tensor that changes. names: of its entries that are in this file."""
        if job.quantised is not None:
            return self._quantised(job, names)
        return [self._bias(job) if job.biases else self._weight(job)]

    # ------------------------------------------------------------------------------- weights

    def _weight(self, job: Job) -> TensorRecord:
        source = source_of(self.found, job.entry.name)
        target = self._target(job)
        exact = self.options.undo == "exact"
        keeps_base = exact and self._keeps_base(job, source, target.dtype)
        keep = exact and not keeps_base
        rows, kept = self._matrices(job, source, target, self.accepted, keep=keep)
        if keeps_base:
            return self._with_base(job.entry, job.by_rows, rows)
        way: Way = "corrections" if exact else "nothing"
        return TensorRecord(job.entry.name, way, kept, job.by_rows, tuple(rows))

    def _target(self, job: Job) -> Target:
        def write(start: int, data: Tensor) -> None:
            self.writer.write_bytes(job.entry.name, start, data)

        dtype = self.options.dtype_of(job, self.dense)
        assert dtype is not None  # no site is on what torch cannot read
        return Target(dtype, write)

    def _matrices(
        self, job: Job, source: Source, target: Target, accepted: Accepted, *, keep: bool
    ) -> tuple[list[MatrixRecord], int]:
        """Merge all matrices of a tensor; gives the bytes kept of them as well."""
        name, rows = job.entry.name, list[MatrixRecord]()
        kept, number = 0, 0
        for share in job.shares:
            with share.places(name, self._source(share, source), target, self.scratch) as own:
                for site in share.weights:
                    how = self._how(site, target.dtype, job)
                    parameters = self.lately.parameters(site)
                    leaves = leaves_of(site, parameters, self.biases.of(site))
                    total = Rounding()
                    for index, within in share.matrices(site, name):
                        one, place = leaves[index or 0], own.of(site, index)
                        done = merging.merge(
                            one, place.read, place.write, how, keep=keep, within=within
                        )
                        total += done.rounding
                        row, count = self._kept(name, number, site, index, done)
                        rows.append(row)
                        kept, number = kept + count, number + 1
                    accepted.check_site(site.path, total)
                    if keep:
                        kept += self._keep_parameters(name, number, site, parameters)
                own.finish()
        if job.rest:
            Places(source, target, self.scratch, job.rest).finish()
        return rows, kept

    def _source(self, share: Share, tensor: Source) -> Source:
        return tensor if share.joined is None else share.joined.source(self.found.checkpoint)

    def _how(self, site: PlannedSite, dtype: torch.dtype, job: Job) -> How:
        if self.options.round == "nearest":
            return How(dtype)
        drawn = f"{site.path}|{job.entry.name}" if job.joins else site.path
        return How(dtype, self.options.round, stream(self.options.seed, "merge", drawn))

    def _keeps_base(self, job: Job, source: Source, dtype: torch.dtype) -> bool:
        """Whether the base's own bytes are kept of a tensor."""
        elements = sum(
            rows * columns * (site.site.batch or 1)
            for site in job.weights
            for rows, columns in (size_of(site),)
        )
        partly = elements * source.dtype.itemsize < job.entry.bytes
        partly = partly or bool(job.joins)
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
        now = self.writer.entries.get(entry.name)
        base, merged = sum_of(entry), "" if now is None else sum_of(now)
        return TensorRecord(entry.name, "base", entry.bytes, by_rows, tuple(rows), base, merged)

    # ----------------------------------------------------------------------------- quantised

    def _quantised(self, job: Job, names: Sequence[str]) -> list[TensorRecord]:
        """A quantised weight that changes."""
        name, rows = job.entry.name, list[MatrixRecord]()
        if self.options.quantized == "requantize":
            rows = self._requantised(job, names)
        elif name in names:
            source, target = source_of(self.found, name), self._target(job)
            rows, _ = self._matrices(job, source, target, self.accepted, keep=False)
        return [self._entry(own, name, rows if own == name else []) for own in names]

    def _entry(self, name: str, weight: str, rows: list[MatrixRecord]) -> TensorRecord:
        of = "" if name == weight else weight
        if self.options.undo == "exact":
            made = self._with_base(self.found.checkpoint.entry(name), False, rows)
            return replace(made, of=of)
        return TensorRecord(name, "nothing", 0, False, tuple(rows), of=of)

    def _requantised(self, job: Job, names: Sequence[str]) -> list[MatrixRecord]:
        """Write the entries that another weight has; what is reported is all that it loses."""
        assert job.quantised is not None
        name, by = job.entry.name, quantiser()
        entries, base = whole(self.found.checkpoint, job.quantised)
        made = torch.empty_like(base)
        finite = Accepted(None, self.accepted.nonfinite)
        rows, _ = self._matrices(job, held(base), filled(made), finite, keep=False)
        new = by.requantised(name, entries, made)
        lost = self._lost(job, made, by.dequantised(name, new), base)
        for own in names:
            self.writer.write_bytes(own, 0, new[own])
        return [replace(row, rounding=one) for row, one in zip(rows, lost, strict=True)]

    def _lost(self, job: Job, made: Tensor, now: Tensor, base: Tensor) -> Iterator[Rounding]:
        """What each matrix lost between what was made of it, and what it is now."""
        nowhere = Target(base.dtype, lambda start, data: None)
        every = [Places(held(tensor), nowhere, self.scratch) for tensor in (made, now, base)]
        for site in job.weights:
            total = Rounding()
            for index in indices(site):
                found, three = Rounding(), [places.of(site, index) for places in every]
                for start, stop in merging.blocks(site):
                    exact, *others = (place.read(start, stop) for place in three)
                    found += measured(exact.double(), *others)
                total += found
                yield found
            self.accepted.check_site(site.path, total)

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
            self.accepted.check_site(site.path, rounding)
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
            with places(self.found, name, self.scratch) as own:
                pairs = zip(indices(site), leaves, strict=True)
                found = [merging.bias_of(one, own.of(site, index).read) for index, one in pairs]
        return found[0] if site.site.batch is None else torch.stack(found)
