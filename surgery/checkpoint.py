"""Checkpoints on disk: safetensors files and their index, of which only headers are kept in memory.

Tensors are read by rows, into a buffer that the caller uses again and again. Nothing is mapped into
memory, so a file's size is never this process's; nothing is opened for writing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from math import prod
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import cast

import torch
from torch import Tensor

from surgery.disk import Closing, memory_of, open_to_read, read_at
from surgery.errors import Report, SurgeryError, refuse
from surgery.headers import Entry, Shard, read_header
from surgery.store import read_json

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
WHOLE = f"model{SUFFIX}"
INDEX = f"model{INDEX_SUFFIX}"


@dataclass(slots=True)
class Checkpoint(Closing):
    """Tensors in files: their headers, and a way to read them. Closed, it keeps no file open.

    folder: where the files are. shards: by their names below it. tensors: of all shards, in order.
    index: the name of the file that says which shard has what, if there is one. others: the other
    files below the folder, none of which are in hidden folders; none for one file
    that is `alone`.
    """

    folder: Path
    shards: Mapping[str, Shard]
    index: str | None
    others: tuple[Path, ...]
    alone: bool = False
    tensors: Mapping[str, Entry] = field(init=False)
    _open: dict[Path, int] = field(default_factory=dict[Path, int], init=False, repr=False)
    _opening: Lock = field(default_factory=Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        """Put the tensors of all shards together."""
        self.tensors = {
            name: entry for shard in self.shards.values() for name, entry in shard.entries.items()
        }

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        with self._opening:
            while self._open:
                os.close(self._open.popitem()[1])

    @property
    def source(self) -> Path:
        """What is read: the folder, or the one file that is meant without those beside it."""
        return self.folder / next(iter(self.shards)) if self.alone else self.folder

    def entry(self, name: str) -> Entry:
        """The tensor of a name. Raises ArtifactError (E533) if there is none."""
        if name not in self.tensors:
            near = get_close_matches(name, self.tensors, 1, 0.6)
            hint = f"did you mean `{near[0]}`?" if near else "`surgery inspect` lists what there is"
            refuse("E533", f"{self.folder} has no tensor `{name}`", hint=hint)
        return self.tensors[name]

    def read(
        self,
        name: str,
        start_row: int = 0,
        stop_row: int | None = None,
        into: Tensor | None = None,
    ) -> Tensor:
        """The rows of a tensor from one to another, all by default; the one of no axes is whole.

        into: bytes (uint8, one axis, on the CPU) with room for the rows; what is given back is a
        view of them, good until they are used again. Threads may read at once, into other bytes.

        Raises ArtifactError: E531 if the file has become shorter, E533 for a tensor that is not
        there, or of a dtype that torch does not have. ValueError for rows outside of it.
        """
        entry = self.entry(name)
        dtype = entry.torch_dtype
        if dtype is None:
            message = f"`{name}` has the dtype {entry.dtype}, which this torch does not have"
            refuse("E533", message, hint="it can be copied, and nothing can be made of it")
        stop = entry.rows if stop_row is None else stop_row
        if not 0 <= start_row <= stop <= entry.rows:
            raise ValueError(f"`{name}` has {entry.rows} rows, and not {start_row} to {stop}")
        shape = (stop - start_row, *entry.shape[1:]) if entry.shape else ()
        if not prod(shape):
            return torch.empty(shape, dtype=dtype)
        width = entry.row_bytes
        return self.read_bytes(name, start_row * width, stop * width, into).view(dtype).view(shape)

    def read_bytes(self, name: str, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        """Some bytes of a tensor of any dtype, in offsets from its beginning, as `read` does it."""
        entry = self.entry(name)
        if not 0 <= start <= stop <= entry.bytes:
            raise ValueError(f"`{name}` has {entry.bytes} bytes, and not {start} to {stop}")
        count = stop - start
        found = torch.empty(count, dtype=torch.uint8) if into is None else into[:count]
        if found.numel() < count or found.dtype != torch.uint8 or not found.is_contiguous():
            raise ValueError(f"`into` has no room for {count} bytes")
        read_at(self._file(entry.file), memory_of(found), entry.start + start, entry.file)
        return found

    def _file(self, path: Path) -> int:
        with self._opening:
            if path not in self._open:
                self._open[path] = open_to_read(path)
            return self._open[path]

    def fingerprint(self) -> dict[str, object]:
        """What shows that a later run has the same files: sizes, times and digests of headers."""
        stated: dict[str, object] = {
            name: [shard.size, shard.modified, shard.sha256] for name, shard in self.shards.items()
        }
        for path in self._beside():
            stat = (self.folder / path).stat()
            stated[path] = [stat.st_size, stat.st_mtime_ns]
        return stated

    def _beside(self) -> Iterator[str]:
        yield from (str(PurePosixPath(path)) for path in self.others)
        if self.index is not None:
            yield self.index

    def check_unchanged(self) -> None:
        """Whether the shards are those that were opened. Raises ArtifactError (E537) if not."""
        report = Report()
        for shard in self.shards.values():
            try:
                stat = shard.path.stat()
                same = (stat.st_size, stat.st_mtime_ns) == (shard.size, shard.modified)
            except OSError:
                same = False
            if not same:
                message = f"{shard.path} was changed while it was read"
                report.error("E537", message, hint="run it again when nothing writes there")
        report.stop()


# ------------------------------------------------------------------------------------ opening


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in a folder, or that of an index or a safetensors file itself.

    A folder has model.safetensors.index.json, model.safetensors, or one index or safetensors file
    of another name. Raises ArtifactError with all that is wrong: E530 if there is none, or not one;
    E531 for files that are damaged; E532 for an index that does not fit its files.
    """
    path = Path(path)
    report = Report()
    if path.is_dir():
        main = _main_file(path)
        folder, alone = path, False
    elif path.is_file():
        main, folder = path.name, path.parent
        alone = not main.endswith(INDEX_SUFFIX)
    else:
        hint = "name a folder with safetensors files, or one of them"
        refuse("E530", f"there is no checkpoint {path}", hint=hint)
    if main.endswith(INDEX_SUFFIX):
        shards, index = _indexed(folder, main, report), main
    else:
        found = read_header(folder / main, report)
        shards, index = {main: found} if found is not None else {}, None
    report.stop()
    own = {*shards, main}
    others = () if alone else tuple(p for p in _files(folder) if p.as_posix() not in own)
    return Checkpoint(folder, shards, index, others, alone)


def _main_file(folder: Path) -> str:
    """The file by which a folder is read (E530)."""
    try:
        names = sorted(p.name for p in folder.iterdir() if p.is_file())
    except OSError as error:
        refuse("E530", f"cannot read {folder}: {error.strerror}", hint="check the path")
    known = [n for n in (WHOLE, INDEX) if n in names]
    found = (
        known
        or [n for n in names if n.endswith(INDEX_SUFFIX)]
        or [n for n in names if n.endswith(SUFFIX)]
    )
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(f"`{n}`" for n in found[:4]) + ", …" * (len(found) > 4)
        hint = "name the one that is meant, with its folder"
        refuse("E530", f"{folder} has not one checkpoint, but {listed}", hint=hint)
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth"))]
    hint = "name a folder with safetensors files, or one of them"
    if pickles:
        hint = f"`{pickles[0]}` is a pickle, which can run code; save it again as safetensors"
    refuse("E530", f"{folder} has no safetensors file", hint=hint)


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder but those in hidden ones, as paths from it, in order."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if (Path(here) / name).is_file():
                yield (Path(here) / name).relative_to(folder)


def _indexed(folder: Path, name: str, report: Report) -> dict[str, Shard]:
    """The shards that an index names, in the order of their names; E531 and E532 for both."""
    places = _weight_map(folder / name, report)
    shards: dict[str, Shard] = {}
    for file in sorted(set(places.values())):
        if not _inside(file):
            message = f"{folder / name}: `{file}` is no file below its folder"
            report.error("E532", message, hint=_TOGETHER)
        elif not (folder / file).is_file():
            message = f"{folder / name}: its shard `{file}` is missing"
            report.error("E532", message, hint=_near_file(folder, file))
        elif (shard := read_header(folder / file, report)) is not None:
            shards[file] = shard
    _check_index(folder / name, places, shards, report)
    return shards


_TOGETHER = "the index and its shards were not saved together; copy them again"


def _near_file(folder: Path, name: str) -> str:
    near = get_close_matches(name, [p.name for p in folder.iterdir()], 1, 0.9)
    return f"`{near[0]}` is there; was it renamed?" if near else "copy it to the folder"


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _weight_map(path: Path, report: Report) -> dict[str, str]:
    try:
        places = read_json(path).get("weight_map")
    except SurgeryError as error:
        report.extend(error.diagnostics)
        return {}
    stated = cast("dict[str, object]", places) if isinstance(places, dict) else {"": None}
    if not all(isinstance(file, str) for file in stated.values()):
        message = f"{path} has no `weight_map` of names to files"
        report.error("E532", message, hint="copy it again")
        return {}
    return cast("dict[str, str]", stated)


def _check_index(
    path: Path, places: Mapping[str, str], shards: Mapping[str, Shard], report: Report
) -> None:
    """Whether each tensor is where the index says, and in no other shard as well (E532)."""
    found: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard.entries:
            if name in found:
                message = f"{path}: `{name}` is both in {found[name]} and in {file}"
                report.error("E532", message, hint=_TOGETHER)
            elif name not in places:
                message = f"{path} does not list `{name}`, which {file} has"
                report.error("E532", message, hint=_TOGETHER)
            found[name] = file
    for name, file in places.items():
        if file in shards and name not in shards[file].entries:
            where = f"; {found[name]} has it" if name in found else ""
            message = f"{path}: {file} lacks `{name}`, which should be in it{where}"
            report.error("E532", message, hint=_TOGETHER)
