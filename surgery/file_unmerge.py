"""A merged folder made the base's again, file by file and byte for byte."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, cast

from torch import Tensor

from surgery import merging
from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.checksums import Checksum, bytes_of, machine
from surgery.errors import Report, refuse
from surgery.file_merge import CONFIG, Progress, config_of
from surgery.file_places import Place, Places, Target
from surgery.file_plan import jobs_of, merged_of, source_of
from surgery.file_record import (
    ADAPTERS,
    LEFT,
    Record,
    TensorRecord,
    is_added,
    key,
    read_record,
)
from surgery.file_tensors import Biases, Lately, sum_of
from surgery.folder_sites import Adapted, Wanted, adapted
from surgery.headers import Entry, parse_header
from surgery.merging import Leaves, Packed, leaves_of
from surgery.shards import Output, ShardWriter

_NAME = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class FileUnmerge:
    """What was made the base's again; `str` is a line, `as_json` plain data.

    out: the folder. tensors: the names of those that had changed. note: what became of an earlier
    run that did not end.
    """

    out: Path
    tensors: tuple[str, ...]
    note: str = ""

    def as_json(self) -> dict[str, object]:
        """As plain data."""
        return {"out": str(self.out), "tensors": [*self.tensors], "note": self.note}

    def __str__(self) -> str:
        """What there is, and what became of an earlier run."""
        made = f"{len(self.tensors)} tensors are the base's again: {self.out}"
        return "\n".join(filter(None, [made, self.note]))


def unmerge_files(
    folder: str | Path, out: str | Path | None = None, *, progress: Progress | None = None
) -> FileUnmerge:
    """Make the files that `merge_files` merged, of what it wrote: the same bytes.

    out: a new folder; by default the merged one is replaced, once all of the other is written.

    Raises ArtifactError, with the merged folder as it was and nothing else written: E548 where a
    merged tensor was changed since, E549 where this machine does not make the base's bits again,
    E550 for a folder that
    does not say what was merged, E538 for one that says it wrongly; E520, E530 to E537 for files.
    """
    folder = Path(folder)
    record = read_record(folder)
    # In place it is the folder that stands where the merged one does, and is put there at the end.
    aim = folder.with_name(f"{folder.resolve().name}.unmerged") if out is None else Path(out)
    with open_checkpoint(folder) as checkpoint:
        config = config_of(checkpoint) if record.config is None else _plain(record.config, folder)
        wanted = [_wanted(folder, *one) for one in record.adapters.items()]
        run = _Run(adapted(checkpoint, wanted, config), record, progress)
        try:
            done = run.write(aim)
        finally:
            record.close()
    if out is None:
        _replace(folder, aim)
        return FileUnmerge(folder, done.tensors, done.note)
    return done


def _plain(text: str, folder: Path) -> dict[str, object]:
    try:
        return cast("dict[str, object]", json.loads(text))
    except ValueError:
        refuse("E538", f"the config that {folder} kept is no JSON", hint="copy the folder again")


def _wanted(folder: Path, name: str, factor: float) -> Wanted:
    if not _NAME.fullmatch(name):
        refuse("E538", f"{folder} has an adapter of the name {name!r}", hint="copy it again")
    return Wanted(folder / ADAPTERS / name, factor, name)


def _replace(folder: Path, by: Path) -> None:
    """Let one folder stand in another's place; that one is there until this one is."""
    real = Path(os.path.realpath(folder))
    before = real.with_name(f".{real.name}.merged")
    shutil.rmtree(before, ignore_errors=True)
    os.rename(real, before)
    try:
        os.rename(by, real)
    except OSError:
        os.rename(before, real)
        raise
    shutil.rmtree(before, ignore_errors=True)


class _Run:
    """One way back."""

    def __init__(self, found: Adapted, record: Record, progress: Progress | None) -> None:
        self.found, self.record, self.progress = found, record, progress
        self.jobs = jobs_of(found, merged_of(found, record.quantized, record.partial))
        self.done = 0
        self.biases, self.lately = Biases(found, self._base), Lately(found)
        self.changed = {n: (s, row) for s, rows in record.shards.items() for n, row in rows.items()}
        own = {name for name, (_, row) in self.changed.items() if not row.of}
        missing = sorted(own ^ self.jobs.keys())
        if missing:
            self._damaged(f"does not fit its adapters at `{missing[0]}`")

    @property
    def checkpoint(self) -> Checkpoint:
        return self.found.checkpoint

    def _damaged(self, what: str) -> NoReturn:
        hint = "copy the merged folder again, as it was written"
        refuse("E538", f"what {self.record.folder} kept {what}", hint=hint)

    def _base(self, name: str) -> Tensor:
        """A tensor of the base: as it is, or the one that is kept."""
        if name not in self.changed:
            return self.found.read(name)
        shard, row = self.changed[name]
        if row.way != "base":
            self._damaged(f"has not the base of `{name}`")
        entry = self._headers(shard)[name]
        data, dtype = self.record.kept(shard).read(key(name)), entry.torch_dtype
        assert dtype is not None
        return data.view(dtype).view(entry.shape)

    def _header(self, shard: str) -> bytes:
        if shard not in self.record.headers:
            return self.checkpoint.shards[shard].header
        data = self.record.kept(shard).read(key("", None, "header"))
        return bytes(bytes_of(data))

    def _headers(self, shard: str) -> Mapping[str, Entry]:
        report = Report()
        made = parse_header(Path(shard), self._header(shard), None, report)
        report.stop()
        assert made is not None
        return made.entries

    # ---------------------------------------------------------------------------------- files

    def write(self, out: Path) -> FileUnmerge:
        inputs = {"merged": self.checkpoint.fingerprint()}
        with Output(out, inputs, [self.checkpoint.folder]) as output:
            for name in self.checkpoint.shards:
                if not output.done(name):
                    self._shard(name, output)
                self._tell(name)
            for path in self.checkpoint.others:
                name = path.as_posix()
                if not self._added(name):
                    output.copy_file(self.checkpoint.folder / path, name)
            if self.record.config is not None:
                output.write(CONFIG, self.record.config.encode())
            self._index(output)
            self.checkpoint.check_unchanged()
            output.finish()
            return FileUnmerge(out, tuple(self.changed), output.note)

    def _added(self, name: str) -> bool:
        """Whether a file is none of the base's, or not as it was there."""
        left = tuple(f"{LEFT}{adapter}/" for adapter in self.record.adapters)
        leaves = self.record.partial or self.record.quantized == "separate"
        again = name == CONFIG and self.record.config is not None
        return is_added(name) or again or (leaves and name.startswith(left))

    def _index(self, output: Output) -> None:
        name = self.checkpoint.index
        if name is None:
            return
        if self.record.index is not None:
            output.write(name, self.record.index.encode())
        else:
            output.copy_file(self.checkpoint.folder / name, name)

    def _shard(self, name: str, output: Output) -> None:
        shard, rows = self.checkpoint.shards[name], self.record.shards.get(name, {})
        with output.shard(name, self._header(name)) as writer:
            for entry_name in writer.entries:
                if entry_name in rows:
                    self._tensor(name, rows[entry_name], writer, output.partial)
                elif entry_name in shard.entries:
                    writer.copy(shard.entries[entry_name])
                else:
                    self._damaged(f"has not `{entry_name}`")

    def _tell(self, name: str) -> None:
        total = sum(shard.size for shard in self.checkpoint.shards.values())
        self.done += self.checkpoint.shards[name].size
        if self.progress is not None:
            self.progress(name, self.done, total)

    # -------------------------------------------------------------------------------- tensors

    def _tensor(self, shard: str, row: TensorRecord, writer: ShardWriter, scratch: Path) -> None:
        if row.way == "base":
            # Of what is in no merged file any more, nothing can have been changed.
            if row.merged and sum_of(self.checkpoint.entry(row.tensor)) != row.merged:
                self._edited(row.tensor)
            kept = self.record.kept(shard).entry(key(row.tensor))
            writer.copy(kept, row.tensor)
            if sum_of(writer.entries[row.tensor]) != row.base:
                self._damaged(f"of `{row.tensor}` is not the base's any more")
            return
        self._by_arithmetic(shard, row, writer, scratch)

    def _by_arithmetic(
        self, shard: str, row: TensorRecord, writer: ShardWriter, scratch: Path
    ) -> None:
        name = row.tensor
        source = source_of(self.found, name)
        dtype = writer.entries[name].torch_dtype
        assert dtype is not None
        matrices, number = iter(row.matrices), 0

        def write(start: int, data: Tensor) -> None:
            writer.write_bytes(name, start, data)

        job = self.jobs[name]
        for share in job.shares:
            joined = share.joined
            parameter = source if joined is None else joined.source(self.checkpoint)
            with share.places(name, parameter, Target(dtype, write), scratch) as own:
                for site in share.weights:
                    of_site = [*share.matrices(site, name)]
                    last = number + len(of_site) - 1
                    given = self.record.beside(shard, last, name, "parameter")
                    parameters = {**self.lately.parameters(site), **given}
                    leaves = leaves_of(site, parameters, self.biases.of(site))
                    for index, _ in of_site:
                        stated = next(matrices, None)
                        if stated is None or (stated.site, stated.index) != (site.path, index):
                            self._damaged(f"does not fit its adapters at `{name}`")
                        kept = self.record.packed(shard, number, name, stated)
                        witnesses = self.record.beside(shard, number, name, "witness")
                        self._matrix(name, leaves[index or 0], witnesses, kept, own.of(site, index))
                        number += 1
                own.finish()
        if job.rest:
            Places(source, Target(dtype, write), scratch, job.rest).finish()

    def _matrix(
        self,
        name: str,
        leaves: Leaves,
        witnesses: Mapping[str, Tensor],
        kept: Packed,
        place: Place,
    ) -> None:
        try:
            base, merged = merging.unmerge(leaves, witnesses, kept, place.read, place.write)
        except ValueError:
            self._check_edited(name, kept, place)
            self._another_machine(name)
        if merged != kept.merged:
            self._edited(name)
        if base != kept.base:
            self._another_machine(name)

    def _check_edited(self, name: str, kept: Packed, place: Place) -> None:
        seen = Checksum()
        for start, stop, _ in kept.blocks:
            seen.add(place.read(start, stop))
        if seen.hexdigest() != kept.merged:
            self._edited(name)

    def _edited(self, name: str) -> NoReturn:
        refuse(
            "E548",
            f"`{name}` was changed since it was merged",
            hint="what was kept leads back from the merged weights alone; take the base from where "
            "it came from",
        )

    def _another_machine(self, name: str) -> NoReturn:
        made, here = self.record.machine, machine()
        other = [f"{what} {made[what]}" for what in made if made[what] != here.get(what)]
        told = ", ".join(other) or "this very kind of machine"
        refuse(
            "E549",
            f"`{name}` does not come out as the base was: it was merged with {told}",
            hint="unmerge it there; nothing was changed here",
        )
