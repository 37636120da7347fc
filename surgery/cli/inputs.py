"""What stands on a command line, read: specs, values, models and output folders."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sized
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from surgery.errors import refuse

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from surgery.cli.output import Steps
    from surgery.language.syntax import Spec

NewOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="OUT", help="The folder to write, a new one.")
]
TrustOption = Annotated[bool, typer.Option("--trust", help="Let MODEL run code (python:…).")]

_LITERAL = re.compile(r"(?:^|\s)match\s")
_TITLE = 60  # characters
_NAME = re.compile(r"[A-Za-z_]\w*")


def read_spec(argument: str) -> Spec:
    """The spec in a file, or the argument itself if it is a `match` statement.

    Raises ArtifactError (E501) if it is neither, SpecSyntaxError.
    """
    from surgery.include import load
    from surgery.language.parse import parse

    if os.path.isfile(argument):  # a literal may be longer than a path can be
        return load(argument)
    if _LITERAL.search(argument):
        return parse(argument)
    what = "is a folder" if os.path.isdir(argument) else "does not exist"
    refuse("E501", f"the spec `{title(argument)}` {what}", hint=_near_spec(Path(argument)))


def title(argument: str) -> str:
    """How a spec is called: a file by its path, a text by its beginning."""
    whole = os.path.isfile(argument) or len(argument) <= _TITLE
    return argument if whole else f"{argument[: _TITLE - 1]}…"


def _near_spec(path: Path) -> str:
    folder = path if os.path.isdir(path) else path.parent
    names = sorted(p.name for p in folder.glob("*.peft")) if os.path.isdir(folder) else []
    near = get_close_matches(path.name, names, 1) or names[:1]
    if near:
        return f"did you mean `{folder / near[0]}`?"
    return "give a .peft file, or a text such as 'match /query|value/ apply METHOD(r=8)'"


def parse_values(pairs: list[str], option: str = "--set") -> dict[str, str]:
    """`name=value` pairs as a mapping. A pair of another form, or a repeated name, is bad usage."""
    values: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise typer.BadParameter(f"`{pair}` is not name=value", param_hint=option)
        if name in values:
            raise typer.BadParameter(f"`{name}` is set twice", param_hint=option)
        values[name] = value
    return values


def read_model(reference: str, *, meta: bool, trust: bool) -> nn.Module | ExportedProgram:
    """The model of a folder, a hub id, a program's file or a factory. Raises ArtifactError."""
    from surgery.integrations.programs import SUFFIX, load_program

    if reference.endswith(SUFFIX):
        return load_program(reference, trust=trust)
    from surgery.integrations.transformers import PYTHON, load_model

    if trust and reference.startswith(PYTHON):
        # An installed command does not look for modules where it is run, and `python -m` does.
        sys.path.insert(0, os.getcwd())
    return load_model(reference, meta=meta, trust=trust)


def read_data(reference: str | None, step: Steps, *, trust: bool) -> Batches | None:
    """The batches that a function gives, which are counted as they are read; None for none.

    Raises ArtifactError: E503 for what gives no batches, and as `factories.given_by` does.
    """
    if reference is None:
        return None
    from surgery.integrations.factories import PYTHON, given_by

    if trust and reference.startswith(PYTHON):
        sys.path.insert(0, os.getcwd())
    step("reading the data")
    found = given_by(reference, "batches", trust=trust)
    if not isinstance(found, Iterable) or isinstance(found, str | bytes | dict):
        hint = "it gives an iterable, such as a DataLoader, of what the model is called with"
        refuse(
            "E503",
            f"`{reference}` gives a {type(cast(object, found)).__name__}, and no batches",
            hint=hint,
        )
    return Batches(cast("Iterable[object]", found), step)


class Batches:
    """Batches that say on a bar how many of them have been read."""

    def __init__(self, batches: Iterable[object], step: Steps) -> None:
        """Some batches, read once or again and again."""
        self.batches = batches
        self.step = step
        self.total = f" of {len(batches):,}" if isinstance(batches, Sized) else ""

    def __iter__(self) -> Iterator[object]:
        """The batches, in order."""
        for count, batch in enumerate(self.batches, 1):
            self.step.note(f"batch {count:,}{self.total}")
            yield batch


def check_program(program: Path | None, model: str) -> None:
    """Refuse, before any work is done, a program that there cannot be, or in a folder's place."""
    from surgery.integrations.programs import SUFFIX

    if program is None:
        return
    named = program.name.endswith(SUFFIX) and model.endswith(SUFFIX)
    if not named:
        raise typer.BadParameter(f"both it and MODEL end in {SUFFIX}", param_hint="--program")
    if program.is_dir():
        refuse("E520", f"`{program}` is a folder", hint="name a file")


def check_output(directory: Path, force: bool) -> None:
    """Refuse to write over what is there (E520), before any work is done."""
    if directory.exists() and not directory.is_dir():
        refuse("E520", f"`{directory}` is a file", hint="name a folder")
    if directory.is_dir() and any(directory.iterdir()) and not force:
        hint = "name another, or add --force to replace the adapter in it"
        refuse("E520", f"the folder `{directory}` is not empty", hint=hint)
