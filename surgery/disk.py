"""Bytes in files and in memory: read and written whole, at a place, and copied by the kernel."""

from __future__ import annotations

import ctypes
import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Self, cast

from torch import Tensor

from surgery.errors import refuse

BLOCK = 2**23
"""Bytes that are in memory at once where the kernel does not copy by itself."""

_MOST_AT_ONCE = 2**30
_ELSEWHERE = {
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.ETXTBSY,
}
"""Why the kernel may not copy by itself, and all is well: other file systems, an older kernel."""


def open_to_read(path: Path) -> int:
    """A descriptor of a file. Raises ArtifactError (E531) if it cannot be read."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        refuse("E531", f"cannot read {path}: {error.strerror}", hint="check the path")


class Closing(ABC):
    """What is open until the end of a `with`, or until it is closed."""

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *about: object) -> None:
        """Close it."""
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Let go of what is open; it may be closed twice."""


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor without gaps, where they lie, on the CPU."""
    count = tensor.numel() * tensor.element_size()
    if not count:
        return memoryview(b"")
    return memoryview((ctypes.c_char * count).from_address(tensor.data_ptr())).cast("B")


def read_at(file: int, memory: memoryview, at: int, path: Path) -> None:
    """Fill some memory from a place of a file. Raises ArtifactError (E531)."""
    done = 0
    while done < len(memory):
        try:
            count = os.preadv(file, [memory[done:]], at + done)
        except OSError as error:
            refuse("E531", f"cannot read {path}: {error.strerror}", hint="check the disk")
        if not count:
            message = f"{path} ends at byte {at + done:,}, before it ended when it was opened"
            refuse("E531", message, hint="run it again when nothing writes there")
        done += count


def allocate(file: int, size: int) -> None:
    """Take the space of a file, where the file system can do that."""
    take = cast("Callable[[int, int, int], None] | None", getattr(os, "posix_fallocate", None))
    if take is not None and size:
        try:
            return take(file, 0, size)
        except OSError as error:
            if error.errno not in _ELSEWHERE:
                raise
    os.ftruncate(file, size)


def write_at(file: int, memory: memoryview, at: int) -> None:
    """Write some memory to a place of a file, all of it. Raises OSError."""
    done = 0
    while done < len(memory):
        done += os.pwrite(file, memory[done:], at + done)


def copy_range(source: int, at: int, target: int, to: int, count: int, path: Path) -> None:
    """Copy a stretch of a file to another, in the kernel where it can; `path` is the source's.

    Raises ArtifactError (E531) where it ends too early, OSError.
    """
    done = _copied_by_kernel(source, at, target, to, count)
    room = bytearray(min(BLOCK, count - done))
    while done < count:
        block = memoryview(room)[: count - done]
        read_at(source, block, at + done, path)
        write_at(target, block, to + done)
        done += len(block)


def _copied_by_kernel(source: int, at: int, target: int, to: int, count: int) -> int:
    """How many of the bytes the kernel has copied by itself."""
    done = 0
    if not hasattr(os, "copy_file_range"):
        return done
    while done < count:
        size = min(count - done, _MOST_AT_ONCE)
        try:
            moved = os.copy_file_range(source, target, size, at + done, to + done)
        except OSError as error:
            if error.errno not in _ELSEWHERE:
                raise
            break
        if not moved:
            break
        done += moved
    return done


@contextmanager
def opened(path: Path) -> Generator[int]:
    """A file to be read, as a descriptor. Raises ArtifactError (E531)."""
    file = open_to_read(path)
    try:
        yield file
    finally:
        os.close(file)


def write_whole(path: Path, data: bytes) -> None:
    """A file of some bytes, there only with all of them."""
    new = path.with_name(f"{path.name[:200]}.new")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(folder: Path) -> None:
    """Have the names in a folder on the disk. Raises OSError."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
