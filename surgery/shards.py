"""Checkpoints written: each tensor at its place in a file, and a folder that is there when whole.

A run writes to a folder beside the one it makes, with a record of each finished file, so that what
ends in the middle can be gone on with. That folder becomes the other by one renaming.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path, PurePosixPath
from threading import Lock
from types import TracebackType
from typing import cast

from torch import Tensor

from surgery.disk import (
    Closing,
    allocate,
    copy_range,
    memory_of,
    opened,
    sync,
    write_at,
    write_whole,
)
from surgery.errors import Report, SurgeryError, refuse
from surgery.headers import Entry, parse_header

ASIDE = ".aside/"
"""Files of these names are finished and gone on with as all are, and never in the folder made."""

# ------------------------------------------------------------------------------------- one file


class ShardWriter(Closing):
    """A safetensors file of a given header, whose tensors are put in their places in any order.

    Its space is taken at once, so a disk that is too full is found before any work is done. facts:
    plain data about the file, for who records it. Threads may write at once. Raises OSError.
    """

    def __init__(self, path: Path, header: bytes) -> None:
        """Begin a file with a header, the eight bytes of its length included."""
        report = Report()
        made = parse_header(path, header, None, report)
        report.stop()
        assert made is not None
        self.path = path
        self.entries: Mapping[str, Entry] = made.entries
        self.facts: dict[str, object] = {}
        self._missing = {name: entry.bytes for name, entry in made.entries.items()}
        self._counting = Lock()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._closed = False
        try:
            allocate(self._file, made.size)
            write_at(self._file, memoryview(header), 0)
        except BaseException:
            self.close()
            raise

    def copy(self, entry: Entry, name: str | None = None) -> None:
        """The bytes of a tensor elsewhere, as those of the tensor of a name, or of the same.

        Raises ValueError if there are more or fewer, ArtifactError (E531) if they cannot be read.
        """
        own = self.entries[entry.name if name is None else name]
        if own.bytes != entry.bytes:
            raise ValueError(f"`{own.name}` has {own.bytes} bytes, and not {entry.bytes}")
        with opened(entry.file) as source:
            copy_range(source, entry.start, self._file, own.start, own.bytes, entry.file)
        self._count(own, own.bytes)

    def write_rows(self, name: str, start_row: int, tensor: Tensor) -> None:
        """Rows of a tensor, from one on; of one without axes, all. Raises ValueError."""
        own = self.entries[name]
        shape = (*tensor.shape[:1], *own.shape[1:]) if own.shape else ()
        if tensor.dtype != own.torch_dtype or tensor.shape != shape:
            raise ValueError(
                f"`{name}` is {own.dtype} {list(own.shape)}, and this is {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
        self.write_bytes(name, start_row * own.row_bytes, tensor)

    def write_bytes(self, name: str, start: int, data: Tensor | bytes) -> None:
        """Some bytes of a tensor, at an offset from its beginning. Raises ValueError."""
        own = self.entries[name]
        plain = data.detach().cpu().contiguous() if isinstance(data, Tensor) else data
        memory = memory_of(plain) if isinstance(plain, Tensor) else memoryview(plain)
        if not 0 <= start <= start + len(memory) <= own.bytes:
            raise ValueError(
                f"`{name}` has {own.bytes} bytes: {len(memory)} at {start} are too many"
            )
        write_at(self._file, memory, own.start + start)
        self._count(own, len(memory))

    def _count(self, own: Entry, count: int) -> None:
        with self._counting:
            self._missing[own.name] -= count

    def finish(self) -> None:
        """Have all of it on the disk. Raises ValueError for tensors that are not written once."""
        wrong = [name for name, count in self._missing.items() if count]
        if wrong:
            raise ValueError(f"{self.path} has tensors that are not written once: {wrong[:4]}")
        os.fsync(self._file)
        self.close()

    def close(self) -> None:
        """Close the file as it is."""
        if not self._closed:
            self._closed = True
            os.close(self._file)


# ------------------------------------------------------------------------------------ a folder


class Output:
    """A folder that is made of files, one by one, and is there only when all of them are.

    note: what became of an earlier run: nothing, gone on with, or begun anew.

    What the operating system refuses is E535, and keeps the finished files for the same call to go
    on with. What else is refused inside would be refused again: nothing is kept.
    """

    def __init__(
        self,
        directory: str | Path,
        inputs: Mapping[str, object],
        sources: Iterable[Path] = (),
        *,
        joins: bool = False,
    ) -> None:
        """Begin, or go on with what was begun for the same inputs.

        inputs: plain data that say what is made of what. sources: folders that are read, in which
        it may not be. joins: write to what another process, that has begun, will finish.
        Raises ArtifactError: E520 if the folder is not new or empty, E534 if it is in a source,
        E535 if it cannot be written, E536 if another run is at it.
        """
        self.directory = Path(os.path.realpath(directory))
        self._named = Path(directory)  # as a person knows it
        self.partial = self.directory.parent / f".{self.directory.name}.partial"
        self.note = ""
        self._inputs = cast("dict[str, object]", json.loads(json.dumps(inputs)))
        self._lock: int | None = None
        self._over = False
        if joins:
            return
        with self._writing(""):
            self._sweep()
        _check_new(self._named, sources)
        with self._writing(""):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.partial, self._named)
            try:
                _check_new(self._named, ())  # another run may have finished meanwhile
                self._begin()
            except BaseException:
                if (self.partial / "journal.json").exists():
                    self._release()
                else:
                    self.abandon()
                raise

    @property
    def folder(self) -> Path:
        """The files so far."""
        return self.partial / "files"

    def place(self, name: str) -> Path:
        """Where a file lies while the folder is made."""
        path = PurePosixPath(name.removeprefix(ASIDE))
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError(f"{name!r} is no file below a folder")
        return (self.partial / "aside" if name.startswith(ASIDE) else self.folder) / path

    # ---------------------------------------------------------------------- earlier runs

    def _begin(self) -> None:
        stated = _read_plain(self.partial / "journal.json")
        if stated == self._inputs:
            self._clean(keep=[self.place(name) for name in self._recorded()])
            count = sum(1 for _ in self._recorded())
            self.note = f"goes on after {count} finished files of an earlier run" if count else ""
        else:
            if stated is not None:
                names = stated.keys() | self._inputs.keys()
                other = [n for n in sorted(names) if stated.get(n) != self._inputs.get(n)]
                self.note = f"starts anew: an earlier run had other {', '.join(other)}"
            self._clean(keep=[])
            shutil.rmtree(self._records, ignore_errors=True)
        for folder in (self.folder, self._records):
            folder.mkdir(exist_ok=True)
        if stated != self._inputs:
            write_whole(self.partial / "journal.json", _json(self._inputs))

    def _sweep(self) -> None:
        """Remove the record of a run that was ended when all was in place."""
        if (self.partial / "journal.json").exists() and not self.folder.exists():
            shutil.rmtree(self.partial, ignore_errors=True)

    @property
    def _records(self) -> Path:
        return self.partial / "done"

    def _clean(self, keep: Iterable[Path]) -> None:
        """Remove all files but some."""
        kept = {*keep}
        for folder in (self.folder, self.partial / "aside"):
            for path in sorted(folder.rglob("*")):
                if path not in kept and not path.is_dir():
                    path.unlink()

    def _recorded(self) -> Iterator[str]:
        """The finished files, by their names."""
        try:
            records = sorted(os.listdir(self._records))
        except OSError:  # there are none, or could be none
            return
        for record in records:
            stated = _read_plain(self._records / record) or {}
            name = stated.get("name")
            if isinstance(name, str) and self.done(name):
                yield name

    # ---------------------------------------------------------------------------- files

    def _record(self, name: str) -> Path:
        return self._records / f"{sha256(name.encode()).hexdigest()[:32]}.json"

    def done(self, name: str) -> bool:
        """Whether a file is finished, and as it was when it was."""
        stated = _read_plain(self._record(name))
        try:
            return stated is not None and stated.get("file") == _file(self.place(name))
        except OSError:
            return False

    def facts(self, name: str) -> dict[str, object]:
        """What was recorded of a finished file; nothing for one that is not."""
        stated = _read_plain(self._record(name)) if self.done(name) else None
        return cast("dict[str, object]", (stated or {}).get("facts", {}))

    @contextmanager
    def shard(self, name: str, header: bytes) -> Generator[ShardWriter]:
        """A file of tensors to be written, which is finished and recorded when the block ends.

        The facts of the writer are recorded with it.
        """
        with self._making(name) as path, ShardWriter(path, header) as writer:
            yield writer
            writer.finish()
            self._finished(name, writer.facts)

    def copy_file(self, source: Path, name: str) -> None:
        """A whole file of another place; nothing is done if it is finished."""
        if self.done(name):
            return
        with opened(source) as file, self._making(name) as path:
            size = os.fstat(file).st_size
            with path.open("wb") as target:
                copy_range(file, 0, target.fileno(), 0, size, source)
                os.fsync(target.fileno())
            self._finished(name, {})

    def write(self, name: str, data: bytes, facts: Mapping[str, object] | None = None) -> None:
        """A whole file of some bytes."""
        with self._making(name) as path:
            write_whole(path, data)
            self._finished(name, facts or {})

    @contextmanager
    def _making(self, name: str) -> Generator[Path]:
        """A place for a file that is gone again if it is not finished: it may take up the disk."""
        path = self.place(name)
        with self._writing(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield path
            except BaseException:
                path.unlink(missing_ok=True)
                raise

    def _finished(self, name: str, facts: Mapping[str, object]) -> None:
        stated = {"name": name, "file": _file(self.place(name)), "facts": dict(facts)}
        write_whole(self._record(name), _json(stated))

    @contextmanager
    def _writing(self, name: str) -> Generator[None]:
        """What the operating system refuses inside is E535, of a file or of all the folder."""
        try:
            yield
        except OSError as error:
            hint = _HINTS.get(error.errno or 0, "check the path, and the disk")
            if any(self._recorded()):
                plain = self._named.name not in ("", "..")
                place = self._named.with_name(self.partial.name) if plain else self.partial
                hint += f"; what is finished is kept in {place}: the same call goes on there"
            refuse("E535", f"cannot write {self._named / name}: {error.strerror}", hint=hint)

    # ------------------------------------------------------------------------------- end

    def finish(self) -> None:
        """Let the folder be there, with all its files on the disk. Raises ArtifactError (E535)."""
        with self._writing(""):
            folders = [self.folder, *(p for p in self.folder.rglob("*") if p.is_dir())]
            for folder in folders:
                sync(folder)
            os.rename(self.folder, self.directory)
            sync(self.directory.parent)
        self.abandon()

    def abandon(self) -> None:
        """Remove what was made, and the record of it."""
        self._over = True
        shutil.rmtree(self.partial, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Output:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Keep the finished files, if there are any, for a later run; unless it was refused."""
        if self._over or self._lock is None:
            return
        codes = {d.code for d in error.diagnostics} if isinstance(error, SurgeryError) else {"E535"}
        if "E535" in codes and any(self._recorded()):
            self._release()
        else:
            self.abandon()


_HINTS: Mapping[int, str] = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room: the quota is used up",
    errno.EEXIST: "a file stands where a folder should be",
    errno.ENOTDIR: "a file stands where a folder should be",
    errno.ENOTEMPTY: "something was written there meanwhile; move it away",
    errno.EFBIG: "allow files of that size (ulimit -f), or write to another file system",
    errno.EACCES: "choose a folder in which you may write",
    errno.EPERM: "choose a folder in which you may write",
    errno.EROFS: "choose a folder on a file system that can be written",
}


def _check_new(directory: Path, sources: Iterable[Path]) -> None:
    """Whether there is nothing at a place, and it is in none of the folders that are read."""
    real = directory.resolve()
    report = Report()
    for source in map(Path, sources):
        folder = source.resolve()
        if real == folder or folder in real.parents:
            message = f"`{directory}` is the folder {source} that is read, or in it"
            report.error("E534", message, hint="write to a folder beside it")
    if not report.failed and directory.is_dir() and any(directory.iterdir()):
        report.error("E520", f"the folder `{directory}` is not empty", hint="name another")
    elif not report.failed and os.path.lexists(directory) and not directory.is_dir():
        report.error("E520", f"`{directory}` is a file", hint="name a folder")
    report.stop()


def _locked(partial: Path, directory: Path) -> int:
    """A descriptor that holds the lock of a folder, which is made if it is not there (E536)."""
    import fcntl  # not everywhere

    while True:
        partial.mkdir(exist_ok=True)
        path = partial / "lock"
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # a run that ended just now took the folder with it
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(file), path.stat()):
                return file
        except BlockingIOError:
            os.close(file)
            hint = "wait until it ends, or name another folder"
            refuse("E536", f"another run is making `{directory}`", hint=hint)
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _file(path: Path) -> list[int]:
    """By what a file is known again: its size in bytes, and when it was changed."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _read_plain(path: Path) -> dict[str, object] | None:
    """The object in a JSON file of this module; None where there is none."""
    try:
        value: object = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return cast("dict[str, object]", value) if isinstance(value, dict) else None
