"""The commands that merge adapters into checkpoints on disk, and take them out again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from surgery.cli.output import JsonOption, Steps, command, steps

if TYPE_CHECKING:
    import torch

    from surgery.file_merge import Progress

PathsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="[ADAPTER] MODEL",
        help="The folder of an adapter, unless --adapter is given, and that of a checkpoint.",
    ),
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", "-a", metavar="DIR[:NUMBER]", help="An adapter, times a number; repeatable."
    ),
]
OutOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="The folder to write.")
]
UndoOption = Annotated[
    Literal["exact", "none"],
    typer.Option("--undo", help="What is kept for `surgery unmerge`: all that it takes, or none."),
]
RoundOption = Annotated[
    Literal["nearest", "stochastic"],
    typer.Option("--round", help="How merged weights are rounded to their dtype."),
]
SeedOption = Annotated[
    int, typer.Option("--seed", metavar="N", help="Of the draws of --round stochastic.")
]
DtypeOption = Annotated[
    Literal["bfloat16", "float16", "float32", "float64"] | None,
    typer.Option("--dtype", help="Of the merged tensors; by default each keeps its own."),
]
QuantizedOption = Annotated[
    Literal["dequantize", "requantize", "separate"] | None,
    typer.Option("--quantized", help="What becomes of weights of 4 or 8 bits; see the docs."),
]
PartialOption = Annotated[
    bool,
    typer.Option(
        "--partial",
        help="Leave what cannot merge as an adapter in OUT/unmerged; merge the rest.",
    ),
]
ErrorOption = Annotated[
    float | None,
    typer.Option(
        "--max-rel-err", metavar="X", help="Refuse rounding worse than X of the largest weight."
    ),
]
NonfiniteOption = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Go on where a weight is infinite or no number.")
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", metavar="N", help="Tensors that are merged at a time.")
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Merge into another base than the adapter was made on.")
]
DryOption = Annotated[
    bool, typer.Option("--dry-run", help="Say which tensors would change, and write nothing.")
]


def merge(
    paths: PathsArgument,
    output: OutOption = None,
    adapter: AdapterOption = None,
    undo: UndoOption = "exact",
    round: RoundOption = "nearest",
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
    quantized: QuantizedOption = None,
    partial: PartialOption = False,
    max_rel_err: ErrorOption = None,
    allow_nonfinite: NonfiniteOption = False,
    workers: WorkersOption = None,
    force: ForceOption = False,
    dry_run: DryOption = False,
    json: JsonOption = False,
) -> None:
    """Merge adapters into a checkpoint on disk, in little memory and without the model's code."""
    adapters, model = _named(paths, adapter)
    if output is None and not dry_run:
        raise typer.BadParameter("it is needed, unless with --dry-run", param_hint="--output")
    with command(json) as result, steps(1) as step:
        from surgery.file_merge import WORKERS, merge_files, plan_files

        at_once = WORKERS if workers is None else workers
        if output is None or dry_run:
            plan = plan_files(
                adapters, model, quantized=quantized, partial=partial, workers=at_once
            )
            result.text, result.data = str(plan), plan.as_json()
            return
        made = merge_files(
            adapters,
            model,
            output,
            undo=undo,
            round=round,
            seed=seed,
            dtype=_dtype(dtype),
            quantized=quantized,
            partial=partial,
            max_rel_err=max_rel_err,
            allow_nonfinite=allow_nonfinite,
            workers=at_once,
            force=force,
            progress=_told(step),
        )
        result.text, result.data = str(made), made.as_json()


def _named(paths: list[str], options: list[str] | None) -> tuple[list[tuple[str, float]], str]:
    """The adapters with their numbers, and the checkpoint."""
    *before, model = paths
    if len(before) != (0 if options else 1):
        wanted = "MODEL alone beside --adapter" if options else "ADAPTER and MODEL"
        raise typer.BadParameter(f"give {wanted}", param_hint="[ADAPTER] MODEL")
    return [_weighted(one) for one in (*before, *(options or ()))], model


def _weighted(text: str) -> tuple[str, float]:
    """`DIR:NUMBER`, or a folder as it is."""
    folder, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        return folder, float(number)
    except ValueError:
        return text, 1.0


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    import torch

    return cast("torch.dtype", getattr(torch, name))


def _told(step: Steps) -> Progress:
    def tell(name: str, done: int, total: int) -> None:
        step.note(f"{done / max(1, total):4.0%}  {name}")

    return tell


FolderArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="A folder that `surgery merge` wrote.")
]
BackOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="OUT", help="A new folder; by default DIR itself."),
]


def unmerge(folder: FolderArgument, output: BackOption = None, json: JsonOption = False) -> None:
    """Make the checkpoint that was merged again, byte for byte, of what is kept with it."""
    with command(json) as result, steps(1) as step:
        from surgery.file_unmerge import unmerge_files

        made = unmerge_files(folder, output, progress=_told(step))
        result.text, result.data = str(made), made.as_json()
