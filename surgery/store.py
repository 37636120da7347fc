"""Files: safetensors and JSON read without trust, written so that nothing is ever half there.

Reading never runs anything a file says. Writing goes to a neighbour first and moves it into place.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor

from surgery.errors import refuse

Writer = Callable[[Path], None]
"""Writes one file at the path it is given."""

MAX_JSON = 256 * 1024 * 1024


# ------------------------------------------------------------------------------------ reading


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...


class _Handle(Protocol):
    def keys(self) -> list[str]: ...
    def metadata(self) -> dict[str, str] | None: ...
    def get_slice(self, name: str) -> _Slice: ...
    def get_tensor(self, name: str) -> Tensor: ...


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping that reads a tensor when it is asked for.

    shapes: of every tensor, in elements, from the header alone. metadata: the header's texts.
    """

    def __init__(self, path: Path, handle: _Handle) -> None:
        """Read the header."""
        self.path = path
        self._handle = handle
        self._own: Mapping[str, str] = {}
        self._made: Mapping[str, Callable[[Tensor], Tensor]] = {}
        self._joined: Mapping[str, Callable[[], Tensor]] = {}
        with _reading(path):
            names = handle.keys()
            self.metadata: Mapping[str, str] = handle.metadata() or {}
            self.shapes: Mapping[str, tuple[int, ...]] = {
                name: tuple(handle.get_slice(name).get_shape()) for name in names
            }

    def __getitem__(self, name: str) -> Tensor:
        """A tensor, read now. KeyError if there is none of that name, ArtifactError (E512)."""
        if name not in self.shapes:
            raise KeyError(name)
        if name in self._joined:
            return self._joined[name]()
        with _reading(self.path):
            # A copy: the file may be replaced while the tensor lives.
            tensor = self._handle.get_tensor(self._own.get(name, name)).clone()
        return self._made[name](tensor) if name in self._made else tensor

    def renamed(self, names: Mapping[str, str]) -> TensorFile:
        """The same file with some of its tensors under other names: their own to the others."""
        other = copy(self)
        moved = {new: self._own.get(name, name) for name, new in names.items()}
        other._own = {**self._own, **moved}
        other._made = {names.get(name, name): make for name, make in self._made.items()}
        other.shapes = {names.get(name, name): shape for name, shape in self.shapes.items()}
        return other

    def made(
        self, name: str, new: str, shape: tuple[int, ...], make: Callable[[Tensor], Tensor]
    ) -> TensorFile:
        """The same file with another tensor, of a shape in elements, in place of one of its own.

        make: of the file's tensor the other, each time that it is asked for.
        """
        other = self.renamed({name: new})
        other._made = {**other._made, new: make}
        other.shapes = {**other.shapes, new: shape}
        return other

    def joined(
        self,
        names: Sequence[str],
        new: str,
        shape: tuple[int, ...],
        make: Callable[[Sequence[Tensor]], Tensor],
    ) -> TensorFile:
        """The same file with one tensor in place of several of its own, made of them in order."""
        other = self.renamed({})
        other._joined = {**self._joined, new: lambda: make([self[name] for name in names])}
        other.shapes = {n: s for n, s in self.shapes.items() if n not in names} | {new: shape}
        return other

    def without(self, name: str) -> TensorFile:
        """The same file without one of its tensors."""
        other = self.renamed({})
        other.shapes = {n: shape for n, shape in self.shapes.items() if n != name}
        return other

    def __iter__(self) -> Iterator[str]:
        """The names, in the file's order."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self.shapes)


def read_tensors(path: Path) -> TensorFile:
    """The tensors of a safetensors file, each read on demand, on the CPU.

    Raises ArtifactError: E511 if the file is missing, E512 if it is truncated, lies about its
    contents, or is of another kind (a pickle is never opened).
    """
    from safetensors import safe_open

    if not path.is_file():
        refuse("E511", f"there is no file {path}", hint="check the path")
    with _reading(path):
        handle = cast(_Handle, safe_open(str(path), framework="pt", device="cpu"))
    return TensorFile(path, handle)


@contextmanager
def _reading(path: Path) -> Generator[None]:
    """What goes wrong inside is the file's fault: E512."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        refuse(
            "E512",
            f"{path} is not a whole safetensors file: {_first_line(error)}",
            hint=_what_it_is(path),
        )


_COPY = "copy it again; it may have been cut off on the way"


def _what_it_is(path: Path) -> str:
    start = path.read_bytes()[:8] if path.is_file() and path.stat().st_size < 2**20 else b""
    if start[:1] == b"\x80" or start[:2] == b"PK":
        return "it is a pickle, which can run code when read; save it again as safetensors"
    return _COPY


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_text(path: Path, limit: int = MAX_JSON) -> str:
    """The text of a file. Raises ArtifactError: E511 if missing, E512 if not UTF-8 or too long."""
    try:
        size = path.stat().st_size
        if size > limit:
            message = f"{path} has {size:,} bytes, and {limit:,} is the most"
            refuse("E512", message, hint="it is not a file that `save` wrote")
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        refuse("E511", f"cannot read {path}: {error.strerror}", hint="check the path")
    except UnicodeDecodeError as error:
        refuse("E512", f"{path} is not UTF-8 at byte {error.start}", hint=_COPY)


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file. Raises ArtifactError: E511 if missing, E512 if it is no object."""
    text = read_text(path)
    try:
        value: object = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        refuse("E512", f"{path} is not JSON: {_first_line(error)}", hint=_COPY)
    if not isinstance(value, dict):
        refuse("E512", f"{path} holds no JSON object", hint=_COPY)
    return cast(dict[str, object], value)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


# ------------------------------------------------------------------------------------ writing


def tensors_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Writer:
    """Writes tensors as safetensors. It raises ArtifactError (E513) for one without data."""
    ready: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta:
            refuse("E513", f"`{name}` has no data yet (meta device)", hint="materialize() first")
        plain = tensor.detach().to("cpu").contiguous()
        # The format has no room for two names of one memory.
        plain = plain.clone() if plain.untyped_storage().data_ptr() in taken else plain
        taken.add(plain.untyped_storage().data_ptr())
        ready[name] = plain

    def write(path: Path) -> None:
        from safetensors import TensorSpec, serialize

        # The library's own `save_file` asks for NumPy, and makes the file readable for its owner
        # alone, whatever the umask says.
        specs = {
            name: TensorSpec(
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=list(tensor.shape),
                data_ptr=tensor.data_ptr(),
                data_len=tensor.numel() * tensor.element_size(),
            )
            for name, tensor in ready.items()
        }
        path.write_bytes(serialize(specs, {"format": "pt", **metadata}))

    return write


def text_writer(text: str) -> Writer:
    """Writes a text as UTF-8."""

    def write(path: Path) -> None:
        path.write_bytes(text.encode("utf-8"))

    return write


def json_writer(value: object) -> Writer:
    """Writes plain data as JSON that a person can read."""
    return text_writer(json.dumps(value, indent=2) + "\n")


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all. Raises ArtifactError (E513)."""
    write_atomic(path, tensors_writer(tensors, metadata or {}))


def write_atomic(path: Path, writer: Writer) -> None:
    """Write one file, whole or not at all: what stood there stands until the new one is complete.

    Raises ArtifactError (E513) if it cannot be written.
    """
    with _writing(path), _staging(path) as staged:
        _write(staged / path.name, writer)
        os.replace(staged / path.name, path)


def write_directory(
    directory: Path, files: Mapping[str, Writer], owned: Collection[str] = ()
) -> tuple[Path, ...]:
    """Write several files of a folder, all of them or none; gives their paths.

    owned: names that belong to the same set, and are removed where `files` has them no more.
    A new folder appears complete. In one that exists, files are replaced once all are written, and
    put back if that fails. Raises ArtifactError (E513).
    """
    with _writing(directory), _staging(directory) as staged:
        for name, writer in files.items():
            _write(staged / name, writer)
        _move_in(staged, directory, files, {*owned} - files.keys())
    return tuple(directory / name for name in files)


@contextmanager
def _staging(path: Path) -> Generator[Path]:
    """A new folder beside a path, on the same file system; gone afterwards, moved or not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    staged.mkdir()
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _write(path: Path, writer: Writer) -> None:
    writer(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _move_in(staged: Path, directory: Path, files: Collection[str], stale: Collection[str]) -> None:
    if not directory.exists():
        os.rename(staged, directory)
        return
    before = staged / ".before"
    before.mkdir()
    moved: list[str] = []
    added: list[str] = []
    try:
        for name in (*files, *stale):
            if (directory / name).exists():
                os.replace(directory / name, before / name)
                moved.append(name)
            if name in files:
                os.replace(staged / name, directory / name)
                added.append(name)
    except BaseException:
        for name in set(added) - set(moved):
            (directory / name).unlink(missing_ok=True)
        for name in moved:
            os.replace(before / name, directory / name)
        raise


@contextmanager
def _writing(path: Path) -> Generator[None]:
    """What the operating system refuses inside is E513."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        refuse(
            "E513",
            f"cannot write {path}: {reason or _first_line(error)}",
            hint="nothing was changed there",
        )
