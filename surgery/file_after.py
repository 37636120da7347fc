"""What the files of a merged checkpoint have: headers of shards, and the index of all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import cast

from surgery.errors import refuse
from surgery.file_plan import Job
from surgery.file_quantized import dense_dtype
from surgery.file_tensors import Options
from surgery.folder_sites import Adapted
from surgery.headers import DTYPES, NAMES, Entry, Shard, make_header


@dataclass(frozen=True, slots=True)
class _Row:
    """A tensor as it is in what is written. width: bytes of an element; 0 where it is as before."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    width: int = 0


class After:
    """The headers and the index of what a merge writes."""

    def __init__(self, found: Adapted, jobs: Mapping[str, Job], options: Options) -> None:
        """Of some adapters on a checkpoint. jobs: the tensors that change, by their names."""
        self._checkpoint, self._options = found.checkpoint, options
        self._dense = dense_dtype(found.checkpoint, found.quantised)
        quantised = [job for job in jobs.values() if job.quantised is not None]
        self._jobs = {
            **jobs,
            **{n: job for job in quantised if job.quantised for n in job.quantised.beside},
        }
        dense = quantised if options.quantized == "dequantize" else []
        self.dequantised = tuple(job.entry.name for job in dense)
        """The names of the weights that are quantised no more."""
        self._gone = {n for job in dense if job.quantised for n in job.quantised.beside}

    def job(self, name: str) -> Job | None:
        """The job that a tensor is changed by, or an entry beside a quantised weight."""
        return self._jobs.get(name)

    def _row(self, entry: Entry) -> _Row:
        job = self._jobs.get(entry.name)
        if job is None or job.entry.name != entry.name:
            return _Row(entry.name, entry.dtype, entry.shape)
        dtype = self._options.dtype_of(job, self._dense)
        # The elements that hold codes may have the very dtype that plain weights have.
        dense = entry.name in self.dequantised
        if dtype is None or (dtype == entry.torch_dtype and not dense):
            return _Row(entry.name, entry.dtype, entry.shape)
        return _Row(entry.name, NAMES[dtype], job.shape, dtype.itemsize)

    def header(self, shard: Shard) -> bytes:
        """The first bytes of a file: those that it had, where its tensors are of the same sizes.

        Raises ArtifactError (E552) where no tensor would be left in it.
        """
        rows = [self._row(e) for n, e in shard.entries.items() if n not in self._gone]
        if shard.entries and not rows:
            hint = "quantise them again (`requantize`), or save the checkpoint in larger files"
            refuse("E552", f"{shard.path} has scales of dequantised weights alone", hint=hint)
        if len(rows) == len(shard.entries) and not any(row.width for row in rows):
            return shard.header
        # Elements have to lie at multiples of their sizes, so the widest are first.
        rows.sort(key=lambda row: -(DTYPES[row.dtype].itemsize if row.dtype in DTYPES else 1))
        return make_header(((row.name, row.dtype, row.shape) for row in rows), shard.metadata)

    def index(self) -> bytes | None:
        """The index of the shards; None where it stays as it is, or there is none."""
        name, tensors = self._checkpoint.index, self._checkpoint.tensors
        rows = [(entry, self._row(entry)) for n, entry in tensors.items() if n not in self._gone]
        if name is None or not (self._gone or any(row.width for _, row in rows)):
            return None
        data = (self._checkpoint.folder / name).read_bytes()
        stated = cast("dict[str, object]", json.loads(data))
        total = sum(prod(r.shape) * r.width if r.width else entry.bytes for entry, r in rows)
        metadata, places = stated.get("metadata"), stated.get("weight_map")
        if isinstance(metadata, dict):
            stated["metadata"] = {**cast("dict[str, object]", metadata), "total_size": total}
        if isinstance(places, dict):
            every = cast("dict[str, object]", places)
            stated["weight_map"] = {n: at for n, at in every.items() if n not in self._gone}
        return (json.dumps(stated, indent=2) + "\n").encode()
