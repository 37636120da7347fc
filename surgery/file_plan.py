"""What a merge of files would do: which tensors change, by which sites, and in how much memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from surgery import merging
from surgery.algebra.expr import WEIGHT, depends_on
from surgery.algebra.rows import whole_bytes
from surgery.digests import Digest, digest_of, picked
from surgery.errors import Report, refuse
from surgery.file_places import (
    IN_MEMORY,
    Places,
    Source,
    Span,
    Target,
    rows_inside,
    size_of,
    turned,
)
from surgery.file_quantized import QuantisedWeight, held
from surgery.folder_sites import Adapted, Adapter
from surgery.headers import Entry
from surgery.joined import Joined
from surgery.partial import LEAVE, can_merge, check_some, listed, report_lost, stays
from surgery.planned import PlannedSite
from surgery.quantized import Quantized
from surgery.report import aligned, shown_bytes, shown_shape


@dataclass(frozen=True, slots=True)
class Share:
    """What of a tensor is one parameter: all of it, or where it is `joined` what that has of it.

    weights: the sites that the parameter is the weight of.
    """

    weights: tuple[PlannedSite, ...]
    joined: Joined | None = None

    def places(self, tensor: str, source: Source, target: Target, scratch: Path) -> Places:
        """Its matrices, of which what is the tensor's is written to the target."""
        one = self.joined
        if one is None:
            return Places(source, target, scratch)
        aim = one.target(tensor, target.dtype, target.write)
        return Places(source, aim, scratch, one.inside(tensor))

    def matrices(self, site: PlannedSite, tensor: str) -> Iterator[tuple[int | None, Span | None]]:
        """Which matrices of a batch are in the tensor, and from which row to which; None is all."""
        for index in (None,) if site.site.batch is None else range(site.site.batch):
            if self.joined is None:
                yield index, None
                continue
            inside = self.joined.inside(tensor)
            rows = rows_inside(site, self.joined.shape, index, inside)
            if rows is not None:
                yield index, rows


@dataclass(frozen=True, slots=True)
class Job:
    """A tensor that changes: the sites that it is the weight of, and those that it is the bias of.

    Either may be some rows of it alone; it is not both. quantised: what is known of a weight of few
    bits, which is taken whole. joins: the parameters that it is part of, if it is none by itself,
    and which of the sites are on each.
    """

    entry: Entry
    weights: tuple[PlannedSite, ...] = ()
    biases: tuple[PlannedSite, ...] = ()
    quantised: QuantisedWeight | None = None
    joins: tuple[Share, ...] = ()

    @property
    def shares(self) -> tuple[Share, ...]:
        """The parameters that it is, with their sites."""
        return self.joins or (Share(self.weights),)

    @property
    def rest(self) -> tuple[Span, ...]:
        """The elements that are in no parameter that changes; of what is joined alone."""
        if not self.joins:
            return ()
        name, last = self.entry.name, prod(self.entry.shape)
        every = [
            span for s in self.joins if s.joined is not None for span in s.joined.covered(name)
        ]
        found, at = list[Span](), 0
        for start, stop in (*sorted(every), (last, last)):
            if at < start:
                found.append((at, start))
            at = max(at, stop)
        return tuple(found)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor, or of what it stands for."""
        return self.entry.shape if self.quantised is None else self.quantised.shape

    @property
    def kind(self) -> str:
        """The dtype of the tensor, by the format's name, or how it is quantised."""
        return self.entry.dtype if self.quantised is None else self.quantised.kind

    @property
    def by_rows(self) -> bool:
        """Whether it is merged block after block of rows."""
        return self.quantised is None and all(
            merging.by_blocks(site.form.derived) for site in self.weights
        )

    @property
    def peak(self) -> int:
        """The bytes of memory that merging it takes, about."""
        own = max((_peak(site, self.entry) for site in self.weights), default=3 * self.entry.bytes)
        return own if self.quantised is None else own + _WHOLE * prod(self.quantised.shape)


_WHOLE = 20
"""Bytes for each quantised weight: what it stands for before and after, and again, in float32."""


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


def jobs_of(adapted: Adapted, sites: Sequence[PlannedSite]) -> dict[str, Job]:
    """The tensors that change, by their names. sites: those that are merged.

    Raises ArtifactError: E547 for a bias that a merge would add to a layer that has none, E552 for
    what is quantised in part.
    """
    report = Report()
    weights: dict[str, list[PlannedSite]] = {}
    biases: dict[str, list[PlannedSite]] = {}
    for site in sites:
        weight, bias = merging.changes(site.form.derived)
        if weight:
            for name in adapted.names(site, site.site.at.parameter):
                weights.setdefault(name, []).append(site)
        if bias:
            names = adapted.names(site, site.site.at.bias)
            for name in names:
                biases.setdefault(name, []).append(site)
            if not names or not adapted.joined.keys().isdisjoint(names):
                _report_bias(
                    site, "several tensors for it" if names else "no tensor for one", report
                )
    report.stop()
    joins = _joins(adapted, weights)
    return {
        name: Job(
            entry,
            (*weights.get(name, ()), *(s for share in joins.get(name, ()) for s in share.weights)),
            tuple(biases.get(name, ())),
            adapted.quantised.get(name),
            tuple(joins.get(name, ())),
        )
        for name, entry in adapted.checkpoint.tensors.items()
        if name in weights or name in biases or name in joins
    }


def _joins(
    adapted: Adapted, weights: Mapping[str, Sequence[PlannedSite]]
) -> dict[str, list[Share]]:
    """By tensors that parameters are joined of, those of which something changes in the tensor."""
    found: dict[str, list[Share]] = {}
    for name, sites in weights.items():
        joined = adapted.joined.get(name)
        every = Share(tuple(sites), joined)
        for tensor in () if joined is None else joined.tensors:
            if tensor in adapted.quantised:
                message = f"`{tensor}` is quantised, and part of `{name}` as the model is loaded"
                refuse("E552", message, hint="merge it into the loaded model, and save that")
            own = tuple(s for s in sites if next(every.matrices(s, tensor), None) is not None)
            if own:
                found.setdefault(tensor, []).append(Share(own, joined))
    return found


def check_dtypes(jobs: Mapping[str, Job], dtype: torch.dtype | None) -> None:
    """Raises ArtifactError (E552) where part of what a parameter is joined of would be cast."""
    for job in jobs.values() if dtype is not None else ():
        for share in job.joins:
            left = [n for n in share.joined.tensors if n not in jobs] if share.joined else []
            if left:
                message = f"`{left[0]}` stays, and is one parameter with `{job.entry.name}`"
                refuse("E552", message, hint="merge without another dtype, or in memory")


_REMEDIES = (
    "with --quantized (quantized=) `dequantize` makes plain weights of them, `requantize` makes "
    "quantised ones again, and `separate` leaves them as they are, with their adapters beside"
)


def merged_of(
    adapted: Adapted, how: Quantized | None = None, partial: bool = False
) -> tuple[PlannedSite, ...]:
    """The sites that are merged.

    how: what becomes of quantised weights. partial: whether what cannot merge is left. Raises with
    all that cannot be merged: StateError (E403) for sites whose equation has no merged weight, or
    (E495) where that is all of them, and (E424) where nothing is said of quantised weights;
    ArtifactError (E553) where all sites are to stay.
    """
    report = Report()
    able = [site for site in adapted.sites if can_merge(site) or not partial]
    merged = _plain_of(adapted, able, how, report)
    report_lost(merged, _PART if any(map(can_merge, merged)) else LEAVE, report)
    report.stop()
    check_some(adapted.sites, merged, " + ".join(a.wanted.name for a in adapted.adapters))
    return merged


_PART = "--partial (partial=True) merges the other sites, and writes an adapter of these beside"


def _plain_of(
    adapted: Adapted, sites: Sequence[PlannedSite], how: Quantized | None, report: Report
) -> tuple[PlannedSite, ...]:
    """Of some sites those to merge: where a weight is quantised, all of its module's or none."""
    if how is not None and how not in get_args(Quantized):
        refuse("E424", f"there is no quantized=`{how}`", hint=_REMEDIES)
    found = [site for site in sites if adapted.is_quantised(site)]
    if how is None:
        found = [site for site in found if adapted.tensor(site) in adapted.quantised]
    if not found or how in ("dequantize", "requantize"):
        return tuple(sites)
    more = f" and at {len(found) - 1} more" if len(found) > 1 else ""
    if how is None:
        message = (
            f"the weight at `{found[0].path}`{more} is quantised, and what it becomes is not said"
        )
        report.error("E424", message, hint=_REMEDIES)
        return tuple(sites)
    if len(found) == len(sites):
        message = f"all sites are on quantised weights, from `{found[0].path}` on: none is merged"
        hint = "attach the adapter to the model as it is; or `requantize` or `dequantize`"
        refuse("E553", message, hint=hint)
    return tuple(site for site in sites if not adapted.is_quantised(site))


def _report_bias(site: PlannedSite, has: str, report: Report) -> None:
    report.error(
        "E547",
        f"`{site.path}` has a bias once it is merged, and the checkpoint has {has}",
        hint="merge it into the loaded model and save that; its config must then say that the "
        "layer has a bias",
    )


# ------------------------------------------------------------------------------------- digests


def source_of(adapted: Adapted, name: str) -> Source:
    """A tensor of a checkpoint to be read; of a quantised weight, what it stands for, in memory."""
    if name in adapted.quantised:
        return held(adapted.read(name))
    if name in adapted.joined:
        return adapted.joined[name].source(adapted.checkpoint)
    checkpoint = adapted.checkpoint
    entry = checkpoint.entry(name)
    dtype = entry.torch_dtype
    assert dtype is not None  # no site is on what torch cannot read

    def read(start: int, stop: int, into: Tensor) -> Tensor:
        return checkpoint.read_bytes(name, start, stop, into)

    return Source(dtype, entry.shape, read)


def places(adapted: Adapted, name: str, scratch: Path) -> Places:
    """The matrices of a tensor, to be read alone."""
    source = source_of(adapted, name)
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
    if name is None or name in adapted.quantised or not isinstance(dtype, torch.dtype):
        return True
    rows, columns = size_of(site)
    batch = site.site.batch
    shape = (rows, columns) if batch is None else (batch, rows, columns)
    some = picked(shape)
    chosen = None if some is None else cast("list[int]", cast(Any, some).tolist())
    with places(adapted, name, scratch) as own:
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
    it takes besides the interpreter, about. left: the sites that are not merged.
    """

    changes: tuple[Change, ...]
    copied: int
    bytes: int
    peak: int
    shards: int
    about: Mapping[str, float] = field(default_factory=dict[str, float])
    left: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        """As plain data."""
        return {
            "adapters": dict(self.about),
            "shards": self.shards,
            "bytes": self.bytes,
            "peak": self.peak,
            "copied": self.copied,
            "left": [*self.left],
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
        left = [f"left as adapters: {listed(self.left)}"] if self.left else []
        return "\n".join([*aligned([header, *rows]), "", totals, *left, memory])


def planned(
    adapted: Adapted, sites: Sequence[PlannedSite], jobs: Mapping[str, Job], workers: int
) -> FilePlan:
    """The plan of a merge of some sites with so many tensors at a time."""
    tensors = adapted.checkpoint.tensors
    changes = tuple(
        Change(
            name,
            job.shape,
            job.kind,
            tuple(site.path for site in (*job.weights, *job.biases)),
            job.by_rows,
            job.peak,
        )
        for name, job in jobs.items()
    )
    beside = sum(len(job.quantised.beside) for job in jobs.values() if job.quantised is not None)
    peak = sum(sorted((change.peak for change in changes), reverse=True)[:workers])
    return FilePlan(
        changes,
        len(tensors) - len(changes) - beside,
        sum(entry.bytes for entry in tensors.values()),
        peak,
        len(adapted.checkpoint.shards),
        {a.wanted.name: a.wanted.factor for a in adapted.adapters},
        tuple(site.path for site in stays(adapted.sites, sites)),
    )


def reads_weight(site: PlannedSite) -> bool:
    """Whether the bias that a merge gives is made of W."""
    still = site.form.derived.still
    return still is not None and depends_on(still.bias, WEIGHT)
