"""The commands about what lies in files: what a folder holds, and how two of them differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli.output import JsonOption, command, steps

PathArgument = Annotated[
    Path,
    typer.Argument(
        metavar="PATH", help="A folder with an adapter or a checkpoint, or a safetensors file."
    ),
]
FirstArgument = Annotated[
    Path, typer.Argument(metavar="A", help="A checkpoint, or a folder with an adapter.")
]
SecondArgument = Annotated[Path, typer.Argument(metavar="B", help="Another.")]
ToleranceOption = Annotated[
    float | None,
    typer.Option(min=0.0, help="The relative difference of a tensor up to which all is well."),
]


def inspect(path: PathArgument, json: JsonOption = False) -> None:
    """Say what a folder holds; of tensors only names, dtypes and shapes are read."""
    with command(json) as result:
        from surgery.inspection import inspect as inspected

        found = inspected(path)
        result.text, result.data = str(found), found.as_json()


def diff(
    a: FirstArgument,
    b: SecondArgument,
    tolerance: ToleranceOption = None,
    json: JsonOption = False,
) -> None:
    """Compare two checkpoints, or two adapters, tensor by tensor; ends with 1 if they differ."""
    with command(json) as result, steps(1) as step:
        from surgery.tensor_diff import diff as compared

        found = compared(a, b, tolerance, step.note)
        result.text, result.data, result.passed = str(found), found.as_json(), found.equal
