"""Files of exported programs, `.pt2`: how one is read as a model, and how one is written."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from surgery.errors import refuse
from surgery.integrations import transformers
from surgery.store import write_atomic

if TYPE_CHECKING:
    from torch.export import ExportedProgram

SUFFIX = ".pt2"
"""How the name of such a file ends."""


def load_program(reference: str, *, trust: bool = False) -> ExportedProgram:
    """The program in a file that `torch.export.save` wrote.

    trust: allow it, since torch may unpickle what is in the file. Raises ArtifactError: E501 if
    there is no such file, E502 if it cannot be read as a program, E505 without `trust`.
    """
    if not os.path.isfile(reference):
        hint = "give the file that torch.export.save wrote"
        refuse("E501", f"the program `{reference}` does not exist", hint=hint)
    if not trust:
        hint = "add --trust (in Python: trust=True) if you know where it comes from"
        refuse("E505", f"reading `{reference}` may run code that is in it", hint=hint)
    from torch import export

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return export.load(reference)
    except Exception as error:  # a damaged file may fail anywhere in the reader
        said = (str(error).strip().splitlines() or [""])[0]
        what = f"`{reference}` cannot be read as a program: {type(error).__name__}: {said}"
        refuse("E502", what, hint="export and save it again, with this version of torch")


def example_inputs(
    model: nn.Module | ExportedProgram,
) -> tuple[tuple[object, ...], Mapping[str, object]]:
    """Inputs to run a model on: a program's own, or such as its config asks for.

    Raises StateError: E413 for a model of which none are known, E419 for a program without any.
    """
    if isinstance(model, nn.Module):
        return (), transformers.example_inputs(model)
    if model.example_inputs is None:
        hint = "export it again with example inputs, or use surgery.verify in Python"
        refuse("E419", "the program has no example inputs", hint=hint)
    return model.example_inputs


def save_program(path: Path, program: ExportedProgram) -> None:
    """Write a program to a file, whole or not at all. Raises ArtifactError (E513)."""
    from torch import export

    def write(new: Path) -> None:
        export.save(program, new)

    write_atomic(path, write)
