"""What a merge of files would do: which tensors change, by which sites, and in how much memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from surgery import merging
from surgery.algebra.expr import WEIGHT, depends_on
from surgery.algebra.rows import whole_bytes
from surgery.checkpoint import Checkpoint
from surgery.digests import Digest, digest_of, picked
from surgery.errors import Report, refuse
from surgery.file_places import IN_MEMORY, Places, Source, Target, size_of, turned
from surgery.folder_sites import Adapted, Adapter
from surgery.headers import Entry
from surgery.planned import PlannedSite
from surgery.report import aligned, shown_bytes, shown_shape


@dataclass(frozen=True, slots=True)
class Job:
    """A tensor that changes: the sites that it is the weight of, and those that it is the bias of.

    Either may be some rows of it alone; it is not both.
    """

    entry: Entry
    weights: tuple[PlannedSite, ...] = ()
    biases: tuple[PlannedSite, ...] = ()

    @property
    def by_rows(self) -> bool:
        """Whether it is merged block after block of rows."""
        return all(merging.by_blocks(site.form.derived) for site in self.weights)

    @property
    def peak(self) -> int:
        """The bytes of memory that merging it takes, about."""
        return max((_peak(site, self.entry) for site in self.weights), default=3 * self.entry.bytes)


_LIVE = 10  # blocks in float64 that live at once: W, W', the way back and what is on the way there


def _peak(site: PlannedSite, entry: Entry) -> int:
    _, columns = size_of(site)
    block = max((stop - start) * columns for start, stop in merging.blocks(site))
    still = site.form.derived.still
    assert still is not None  # what cannot merge is refused before
    kept = sum(whole_bytes(expr, site.form.names) for expr in merging.made(site.form.derived))
    lies = 0
    if turned(site.form.kind) and not site.site.at.tensor:
        lies = min(entry.bytes, IN_MEMORY) + 4 * IN_MEMORY // 2
    return 8 * block * _LIVE + kept + lies


def jobs_of(adapted: Adapted) -> dict[str, Job]:
    """The tensors that change, by their names.

    Raises with all that cannot be merged: StateError (E403) for sites whose equation has no merged
    weight, ArtifactError (E547) for a bias that a merge would add to a layer that has none.
    """
    report = Report()
    weights: dict[str, list[PlannedSite]] = {}
    biases: dict[str, list[PlannedSite]] = {}
    for site in adapted.sites:
        derived = site.form.derived
        if derived.still is None:
            message = f"`{site.path}` cannot merge: {derived.reason}"
            hint = "keep such an adapter unmerged; it runs as it is"
            report.error("E403", message, site.span, hint=hint)
            continue
        weight, bias = merging.changes(derived)
        if weight:
            for name in adapted.names(site, site.site.at.parameter):
                weights.setdefault(name, []).append(site)
        if bias:
            names = adapted.names(site, site.site.at.bias)
            for name in names:
                biases.setdefault(name, []).append(site)
            if not names:
                _report_bias(site, report)
    report.stop()
    return {
        name: Job(entry, tuple(weights.get(name, ())), tuple(biases.get(name, ())))
        for name, entry in adapted.checkpoint.tensors.items()
        if name in weights or name in biases
    }


def _report_bias(site: PlannedSite, report: Report) -> None:
    report.error(
        "E547",
        f"`{site.path}` has a bias once it is merged, and the checkpoint has no tensor for one",
        hint="merge it into the loaded model and save that; its config must then say that the "
        "layer has a bias",
    )


# ------------------------------------------------------------------------------------- digests


def source_of(checkpoint: Checkpoint, name: str) -> Source:
    """A tensor of a checkpoint to be read."""
    entry = checkpoint.entry(name)
    dtype = entry.torch_dtype
    assert dtype is not None  # no site is on what torch cannot read

    def read(start: int, stop: int, into: Tensor) -> Tensor:
        return checkpoint.read_bytes(name, start, stop, into)

    return Source(dtype, entry.shape, read)


def places(checkpoint: Checkpoint, name: str, scratch: Path) -> Places:
    """The matrices of a tensor, to be read alone."""
    source = source_of(checkpoint, name)
    return Places(source, Target(source.dtype, lambda start, data: None), scratch)


def check_digests(adapted: Adapted, scratch: Path) -> None:
    """Whether adapters were made on these very weights. Raises ArtifactError (E522) if not."""
    for adapter in adapted.adapters:
        differing = [s.path for s, d in _stated(adapter) if not _agrees(adapted, s, d, scratch)]
        if differing:
            refuse(
                "E522",
                f"{adapter.wanted.folder} was made on another base: of "
                f"{len(adapter.loaded.base)} weights {len(differing)} differ, the first at "
                f"`{differing[0]}`",
                hint="merge it into the base that it was made on; or all the same, with force",
            )


def _stated(adapter: Adapter) -> Iterator[tuple[PlannedSite, Digest]]:
    for site in adapter.stated.sites:
        if site.path in adapter.loaded.base:
            yield site, adapter.loaded.base[site.path]


def _agrees(adapted: Adapted, site: PlannedSite, stated: Digest, scratch: Path) -> bool:
    name = adapted.tensor(site)
    dtype: object = getattr(torch, stated.dtype)
    if name is None or not isinstance(dtype, torch.dtype):
        return True
    rows, columns = size_of(site)
    batch = site.site.batch
    shape = (rows, columns) if batch is None else (batch, rows, columns)
    some = picked(shape)
    chosen = None if some is None else cast("list[int]", cast(Any, some).tolist())
    with places(adapted.checkpoint, name, scratch) as own:
        if batch is not None:
            indices = range(batch) if chosen is None else chosen
            sample = torch.stack([own.of(site, i).read(0, rows).clone() for i in indices])
        elif chosen is None:
            sample = own.of(site, None).read(0, rows)
        else:
            place = own.of(site, None)
            sample = torch.cat([place.read(i, i + 1).clone() for i in chosen])
    if sample.dtype != dtype and not (sample.is_floating_point() and dtype.is_floating_point):
        return False
    return digest_of(sample, shape, dtype) == stated


# --------------------------------------------------------------------------------------- report


@dataclass(frozen=True, slots=True)
class Change:
    """A tensor that would change.

    sites: the paths of those it is made by. by_rows: whether block after block. peak: the bytes of
    memory that it takes, about.
    """

    tensor: str
    shape: tuple[int, ...]
    dtype: str
    sites: tuple[str, ...]
    by_rows: bool
    peak: int


@dataclass(frozen=True, slots=True)
class FilePlan:
    """What a merge of files would do; `str` is a table, `as_json` plain data.

    copied: the number of tensors that stay. bytes: of all tensors. peak: the bytes of memory that
    it takes besides the interpreter, about.
    """

    changes: tuple[Change, ...]
    copied: int
    bytes: int
    peak: int
    shards: int
    about: Mapping[str, float] = field(default_factory=dict[str, float])

    def as_json(self) -> dict[str, object]:
        """As plain data."""
        return {
            "adapters": dict(self.about),
            "shards": self.shards,
            "bytes": self.bytes,
            "peak": self.peak,
            "copied": self.copied,
            "changes": [
                {
                    "tensor": c.tensor,
                    "shape": [*c.shape],
                    "dtype": c.dtype,
                    "sites": [*c.sites],
                    "by_rows": c.by_rows,
                    "peak": c.peak,
                }
                for c in self.changes
            ],
        }

    def __str__(self) -> str:
        """A row a tensor that changes, then what stays and the memory."""
        header = ["tensor", "shape", "dtype", "merged"]
        rows = [
            [c.tensor, shown_shape(c.shape), c.dtype, "by rows" if c.by_rows else "whole"]
            for c in self.changes
        ]
        totals = (
            f"{len(self.changes)} tensors change and {self.copied} are copied, "
            f"{shown_bytes(self.bytes)} in {self.shards} files"
        )
        memory = f"it takes about {shown_bytes(self.peak)} of memory"
        return "\n".join([*aligned([header, *rows]), "", totals, memory])


def planned(adapted: Adapted, jobs: Mapping[str, Job], workers: int) -> FilePlan:
    """The plan of a merge with so many tensors at a time."""
    tensors = adapted.checkpoint.tensors
    changes = tuple(
        Change(
            name,
            job.entry.shape,
            job.entry.dtype,
            tuple(site.path for site in (*job.weights, *job.biases)),
            job.by_rows,
            job.peak,
        )
        for name, job in jobs.items()
    )
    peak = sum(sorted((change.peak for change in changes), reverse=True)[:workers])
    return FilePlan(
        changes,
        len(tensors) - len(changes),
        sum(entry.bytes for entry in tensors.values()),
        peak,
        len(adapted.checkpoint.shards),
        {a.wanted.name: a.wanted.factor for a in adapted.adapters},
    )


def reads_weight(site: PlannedSite) -> bool:
    """Whether the bias that a merge gives is made of W."""
    still = site.form.derived.still
    return still is not None and depends_on(still.bias, WEIGHT)
