"""Adapters merged into a checkpoint on disk, tensor by tensor; the model is never built.

What an adapter does not name is copied byte for byte. What it names is read, merged and written in
blocks of rows where the method's equation allows it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from hashlib import file_digest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch

from surgery.artifact import FILES
from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.checksums import machine
from surgery.errors import refuse
from surgery.file_after import After
from surgery.file_left import check_left, left_sites, save_left
from surgery.file_plan import (
    FilePlan,
    Job,
    check_digests,
    check_dtypes,
    jobs_of,
    merged_of,
    planned,
)
from surgery.file_quantized import unquantised
from surgery.file_ranks import Ranks, joined
from surgery.file_record import (
    ADAPTERS,
    LEFT,
    RECORD,
    SIDE,
    Side,
    TensorRecord,
    changed_of,
    is_added,
    key,
    plain,
    record_data,
    reported,
)
from surgery.file_tensors import Options, Tensors
from surgery.folder_sites import Adapted, Wanted, adapted, named
from surgery.headers import Shard
from surgery.merge_report import Accepted, MergeReport
from surgery.merged import Undo
from surgery.precision import Round
from surgery.quantized import Quantized
from surgery.shards import Output
from surgery.store import read_json

Progress = Callable[[str, int, int], None]
"""Is told what is done: a tensor's name, how many bytes are done, and of how many."""

CONFIG = "config.json"

WORKERS = min(2, os.cpu_count() or 1)
"""Tensors that are merged at a time."""

Adapters = str | Path | Iterable[str | Path | tuple[str | Path, float]]
"""The folder of an adapter, or of several, each alone or with a number that it is multiplied by."""


@dataclass(frozen=True, slots=True)
class FileMerge:
    """What a merge of files wrote; `str` is a table, `as_json` plain data.

    out: the folder. report: of what was merged, a row a site. whole: the tensors that were not
    merged by rows. note: what became of an earlier run that did not end. left: the folders in `out`
    of what was not merged of adapters, each with what it is multiplied by, and its sites' paths.
    """

    out: Path
    report: MergeReport
    plan: FilePlan
    whole: tuple[str, ...]
    note: str = ""
    left: Mapping[str, tuple[float, tuple[str, ...]]] = field(
        default_factory=dict[str, tuple[float, tuple[str, ...]]]
    )

    def as_json(self) -> dict[str, object]:
        """As plain data."""
        return {
            "out": str(self.out),
            "note": self.note,
            "whole": [*self.whole],
            "left": [
                {"folder": folder, "factor": factor, "sites": [*paths]}
                for folder, (factor, paths) in self.left.items()
            ],
            **self.report.as_json(),
        }

    def __str__(self) -> str:
        """The table of sites, then what was written."""
        plan = self.plan
        copied = f"{len(plan.changes)} tensors merged, {plan.copied} copied: {self.out}"
        left = (
            f"{len(paths)} sites are not merged: attach {self.out / folder}"
            + (f", times {factor:g}" if factor != 1 else "")
            for folder, (factor, paths) in self.left.items()
        )
        return "\n".join([str(self.report), copied, *left, *filter(None, [self.note])])


# ---------------------------------------------------------------------------------- what to do


def wanted_of(adapters: Adapters) -> tuple[Wanted, ...]:
    """The folders of adapters, and how much of each.

    Raises ArtifactError (E552) for none, and for a number that leaves nothing of one.
    """
    given = [adapters] if isinstance(adapters, str | Path) else adapters
    found: list[Wanted] = []
    for one in given:
        folder, factor = one if isinstance(one, tuple) else (one, 1.0)
        if not (abs(factor) > 0 and abs(factor) < float("inf")):
            hint = "give each adapter a number that is not 0, or leave it out"
            refuse("E552", f"{folder} is merged {factor} times", hint=hint)
        found.append(Wanted(Path(folder), float(factor)))
    if not found:
        refuse("E552", "there is no adapter to merge", hint="name the folder of one, or of several")
    folders = [one.folder.resolve() for one in found]
    twice = next((one for one in folders if folders.count(one) > 1), None)
    if twice is not None:
        refuse("E552", f"{twice} is named twice", hint="name it once, with the sum of its numbers")
    return named(found)


def plan_files(
    adapters: Adapters,
    model: str | Path,
    *,
    quantized: Quantized | None = None,
    partial: bool = False,
    workers: int = WORKERS,
) -> FilePlan:
    """What `merge_files` would do. Nothing is written; raises as it does."""
    with open_checkpoint(model) as checkpoint:
        found = adapted(checkpoint, wanted_of(adapters), config_of(checkpoint))
        sites = merged_of(found, quantized, partial)
        return planned(found, sites, jobs_of(found, sites), workers)


def merge_files(
    adapters: Adapters,
    model: str | Path,
    out: str | Path,
    *,
    undo: Undo = "exact",
    round: Round = "nearest",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    quantized: Quantized | None = None,
    partial: bool = False,
    max_rel_err: float | None = None,
    allow_nonfinite: bool = False,
    workers: int = WORKERS,
    force: bool = False,
    progress: Progress | None = None,
) -> FileMerge:
    """Merge saved adapters, ours or peft's, into a safetensors checkpoint, as a new folder.

    adapters: a folder, or several; each may come with a number that it is multiplied by, and what
        is merged is their sum. model: a folder with one safetensors file or an index of several, or
        such a file. out: a new folder, which is there when all of it is; a run that was killed is
        gone on with by the same call.
    undo: `exact` keeps in the folder what `unmerge_files` makes the base's bytes of; `none` keeps
        nothing. round, seed, max_rel_err, allow_nonfinite: as for `Inverse.merge`.
    dtype: of the merged tensors, where it is not to be the base's.
    quantized: what weights of 4 or 8 bits become: `dequantize`, plain, of `dtype` or that of the
        first plain tensor; `requantize`, quantised again, which counts as rounding; `separate`,
        they stay, and `unmerged/NAME` in `out` is what is left, to attach to the merged model.
    partial: leave so also what has no merged weight, and merge the rest.
    workers: how many tensors are merged at a time. force: merge into another base than the adapter
        was made on. progress: is told of each tensor that is done.

    Under `torchrun` each rank merges its share of the files, and the folder is the same.

    Raises, with `out` not there and the inputs as they were: ArtifactError (E520, E522, E530 to
    E554), PlanError where an adapter does not fit, StateError (E403, E424, E430, E431, E495).
    """
    options = Options(undo, round, seed, dtype, quantized, partial)
    with open_checkpoint(model) as checkpoint, joined() as ranks:
        _check_base(checkpoint)
        found = adapted(checkpoint, wanted_of(adapters), config_of(checkpoint))
        run = _Run(found, options, Accepted(max_rel_err, allow_nonfinite), ranks)
        run.workers, run.progress = max(1, workers), progress
        run.sources = [checkpoint.folder] if Path(model).is_dir() else []
        if not force and ranks.first:
            run.check_base()
        return run.write(Path(out))


def _check_base(checkpoint: Checkpoint) -> None:
    if any(path.as_posix() == RECORD for path in checkpoint.others):
        refuse(
            "E551",
            f"{checkpoint.folder} is a merged folder already",
            hint="`surgery unmerge` it first, or merge all adapters at once; to merge on what is "
            f"merged, and have no way back, remove its {RECORD}",
        )


def config_of(checkpoint: Checkpoint) -> dict[str, object]:
    """The config.json beside a checkpoint as plain data; empty if there is none."""
    if not any(path.as_posix() == CONFIG for path in checkpoint.others):
        return {}
    return read_json(checkpoint.folder / CONFIG)


# --------------------------------------------------------------------------------------- doing


class _Run:
    """One merge of files."""

    def __init__(
        self,
        found: Adapted,
        options: Options,
        accepted: Accepted,
        ranks: Ranks,
    ) -> None:
        self.found, self.options = found, options
        self.sites = merged_of(found, options.quantized, options.partial)
        self.jobs = jobs_of(found, self.sites)
        check_dtypes(self.jobs, options.dtype)
        self.accepted, self.ranks = accepted, ranks
        self.sources: list[Path] = []
        self.workers, self.done = 1, 0
        self.progress: Progress | None = None
        self.total = sum(shard.size for shard in found.checkpoint.shards.values())
        self.after = After(found, self.jobs, options)
        self.left = left_sites(found, self.sites)
        check_left(found, self.left)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.found.checkpoint

    def check_base(self) -> None:
        with TemporaryDirectory() as scratch:
            check_digests(self.found, Path(scratch))

    def write(self, out: Path) -> FileMerge:
        ranks, output = self.ranks, None
        inputs, sources = self._inputs(), [*self.sources, *self._folders()]
        with ranks.together():
            output = Output(out, inputs, sources) if ranks.first else None
        output = output or Output(out, inputs, sources, joins=True)
        with output:
            with ranks.together():
                sizes = [(name, shard.size) for name, shard in self.checkpoint.shards.items()]
                for name in sorted(ranks.share(sizes)):
                    self._shard(name, output)
                self.checkpoint.check_unchanged()
            records = self._records(output)
            with ranks.together():
                if ranks.first:
                    self._beside(output)
                    output.finish()
        plan = planned(self.found, self.sites, self.jobs, self.workers)
        whole = tuple(one.tensor for one in records if not one.by_rows and not one.of)
        factors = {a.wanted.name: a.wanted.factor for a in self.found.adapters}
        left = {f"{LEFT}{name}": (factors[name], paths) for name, paths in self.left.items()}
        return FileMerge(out, reported(records, self.found), plan, whole, output.note, left)

    def _folders(self) -> Iterator[Path]:
        return (adapter.wanted.folder for adapter in self.found.adapters)

    def _inputs(self) -> dict[str, object]:
        """All that the result depends on."""
        stated: dict[str, object] = {}
        for adapter in self.found.adapters:
            files = {path.name: _digest(path) for path in _own_files(adapter.wanted.folder)}
            stated[adapter.wanted.name] = [adapter.wanted.factor, files]
        own = {**self.options.as_json(), "workers": None}
        return {"base": self.checkpoint.fingerprint(), "adapters": stated, "options": own}

    # ------------------------------------------------------------------------------- shards

    def _shard(self, name: str, output: Output) -> None:
        """One file of tensors, and what is kept beside it."""
        shard = self.checkpoint.shards[name]
        tasks = self._tasks(shard)
        keeps = any(job for _, job in tasks.values()) and self.options.undo == "exact"
        if output.done(name) and (not keeps or output.done(SIDE + name)):
            self._tell(name, shard.size)
            return
        header = self.after.header(shard)
        with Side(output.partial) as side:
            with output.shard(name, header) as writer:
                tensors = Tensors(
                    self.found, self.options, self.accepted, side, writer, output.partial
                )

                def one(first: str) -> list[TensorRecord]:
                    names, job = tasks[first]
                    if job is None:
                        tensors.copy(shard.entries[first])
                    made = [] if job is None else tensors.merge(job, names)
                    self._tell(first, sum(shard.entries[own].bytes for own in names))
                    return made

                records = [r for some in self._all(one, [*tasks]) for r in some]
                writer.facts["changed"] = [*map(plain, records)]
                if keeps and header != shard.header:
                    writer.facts["header"] = True
                    side.add(key("", None, "header"), [shard.header])
            if keeps:
                side.save(output, SIDE + name)

    def _tasks(self, shard: Shard) -> dict[str, tuple[tuple[str, ...], Job | None]]:
        """What is done at a time, by the first of its tensors in a file: copied, or one job.

        The entries of a quantised weight may be in several files, and each of them has its own.
        """
        found: dict[str, tuple[tuple[str, ...], Job | None]] = {}
        seen: set[str] = set()
        for name in shard.entries:
            job = self.after.job(name)
            every = (name,) if job is None or job.quantised is None else job.quantised.entries
            if name not in seen:
                names = tuple(own for own in every if own in shard.entries)
                found[name] = names, job
                seen.update(names)
        return found

    def _all(
        self, one: Callable[[str], list[TensorRecord]], names: Sequence[str]
    ) -> list[list[TensorRecord]]:
        """Every tensor of a file, several at a time; the first that fails ends it."""
        if self.workers == 1:
            return [*map(one, names)]
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(one, name) for name in names]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            if any(future.exception() for future in done):
                pool.shutdown(cancel_futures=True)
            return [future.result() for future in futures if not future.cancelled()]

    def _tell(self, name: str, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(name, min(self.done, self.total), self.total)

    # ------------------------------------------------------------------------------- the rest

    def _records(self, output: Output) -> list[TensorRecord]:
        return [r for name in self.checkpoint.shards for r in changed_of(output.facts(name))]

    def _beside(self, output: Output) -> None:
        """All files but those of tensors."""
        config, index = self._config(), self.after.index()
        for path in self.checkpoint.others:
            if not is_added(path.as_posix()) and not (config and path.as_posix() == CONFIG):
                output.copy_file(self.checkpoint.folder / path, path.as_posix())
        before: dict[str, str | None] = {}
        if self.checkpoint.index is not None:
            own = self.checkpoint.folder / self.checkpoint.index
            output.write(self.checkpoint.index, index or own.read_bytes())
            before["index"] = own.read_text(encoding="utf-8") if index else None
        if config:
            before["config"] = (self.checkpoint.folder / CONFIG).read_text(encoding="utf-8")
            output.write(CONFIG, config)
        self._left(output)
        if self.options.undo != "exact":
            return
        for adapter in self.found.adapters:
            for path in _own_files(adapter.wanted.folder):
                output.copy_file(path, f"{ADAPTERS}{adapter.wanted.name}/{path.name}")
        facts = {name: output.facts(name) for name in self.checkpoint.shards}
        changed = {name: own for name, own in facts.items() if own.get("changed")}
        factors = {a.wanted.name: a.wanted.factor for a in self.found.adapters}
        data = record_data(changed, factors, machine(), before, self.options.as_json())
        output.write(RECORD, (json.dumps(data, indent=1) + "\n").encode())

    def _left(self, output: Output) -> None:
        """What is not merged of each adapter, as a folder."""
        for adapter in self.found.adapters:
            name = adapter.wanted.name
            if name not in self.left:
                continue
            with TemporaryDirectory() as scratch:
                save_left(self.found, adapter, self.left[name], Path(scratch) / name)
                for path in _own_files(Path(scratch) / name):
                    output.copy_file(path, f"{LEFT}{name}/{path.name}")

    def _config(self) -> bytes | None:
        """The config, where it says what is so no more: of tied weights, and of quantised ones."""
        before = config_of(self.checkpoint)
        config = before
        if self.found.unties:
            nested = {n: _untied(v) for n, v in config.items()}
            config = cast("dict[str, object]", _untied(nested))
        made = self.after.dequantised
        if made:
            tensors, weights = self.checkpoint.tensors, self.found.quantised
            config = unquantised(config, tensors, weights, made)
        return None if config == before else (json.dumps(config, indent=2) + "\n").encode()


def _untied(value: object) -> object:
    if not isinstance(value, dict) or "tie_word_embeddings" not in value:
        return cast(object, value)
    return {**cast("dict[str, object]", value), "tie_word_embeddings": False}


def _own_files(folder: Path) -> list[Path]:
    return [folder / name for name in sorted(FILES) if (folder / name).is_file()]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
