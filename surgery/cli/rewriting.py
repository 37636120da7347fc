"""What `surgery fmt` does to a file: it is read, laid out, and put back or compared."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import typer

from surgery.language.formatting import formatted
from surgery.language.parse import MAX_BYTES, decoded, read_bytes
from surgery.store import text_writer, write_atomic

PIPE = "-"
_STDIN = "<stdin>"


@dataclass(frozen=True, slots=True)
class Rewriting:
    """A file's text as it is and as it is laid out; `path` is None for standard input."""

    name: str
    path: Path | None
    before: str
    after: str

    @property
    def changes(self) -> bool:
        """Whether the two differ."""
        return self.before != self.after

    def write(self, stdout: BinaryIO) -> None:
        """Put the new text in the file's place, or on `stdout`. Raises ArtifactError (E513)."""
        if self.path is None:
            stdout.write(self.after.encode())
            return
        if not self.changes:
            return
        path = self.path.resolve()  # a link stays a link
        text = text_writer(self.after)

        def write(new: Path) -> None:
            text(new)
            shutil.copymode(path, new)

        write_atomic(path, write)

    def notice(self, check: bool) -> Iterator[str]:
        """A line that says what is done to a file, or with `check` would be; none if nothing."""
        if self.changes and (check or self.path is not None):
            yield f"{self.name}: {'would be ' * check}formatted"

    def difference(self) -> Iterator[str]:
        """The lines of a unified diff; none if nothing would change."""
        before, after = _lines(self.before), _lines(self.after)
        yield from difflib.unified_diff(before, after, self.name, self.name, lineterm="")


def rewriting(argument: str) -> Rewriting:
    """The file of a name, or standard input for `-`.

    Raises ArtifactError (E501) if it cannot be read, SpecSyntaxError.
    """
    if argument == PIPE:
        data, name, path = typer.get_binary_stream("stdin").read(MAX_BYTES + 1), _STDIN, None
    else:
        data, name, path = read_bytes(argument), argument, Path(argument)
    before = decoded(data, name)
    return Rewriting(name, path, before, formatted(before, name))


def _lines(text: str) -> list[str]:
    """The lines of a text; one that nothing ends is marked as such, as in any diff."""
    *lines, last = text.split("\n")
    return [*lines, f"{last}\n\\ No newline at end of file"] if last else lines
