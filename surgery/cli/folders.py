"""The commands about adapters as others have them: folders converted, configs read as specs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgery.cli.inputs import NewOption, TrustOption, check_output, read_model
from surgery.cli.output import JsonOption, command, steps
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from torch import nn

FolderArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="A folder with an adapter, of this program or peft's.")
]
ForArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="The model that the adapter is for.")
]
ToOption = Annotated[
    str,
    typer.Option("--to", metavar="FORM", help="peft, native, or a method that adds B @ A to W."),
]
RankOption = Annotated[
    int | None,
    typer.Option(metavar="R", help="Of a method: the rank where the equation has no exact one."),
]


def convert(
    folder: FolderArgument,
    model: ForArgument,
    output: NewOption,
    to: ToOption = "peft",
    rank: RankOption = None,
    trust: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Write a saved adapter in another form; weights of MODEL are read only if they matter."""
    with command(json) as result, steps(3) as step:
        from surgery.conversion import convert as converted
        from surgery.conversion import needs_weights

        check_output(output, force=False)
        step("reading the model's config")
        base = _module(model, meta=True, trust=trust)
        try:
            whole = needs_weights(folder, base, to=to)
        except SurgeryError:  # what is wrong is said of the model with its weights, if it is
            whole = True
        if whole:
            step("reading the model")
            base = _module(model, meta=False, trust=trust)
        step("converting")
        made = converted(folder, output, base, to=to, rank=rank)
        result.text, result.data = str(made), made.as_json()


def _module(reference: str, *, meta: bool, trust: bool) -> nn.Module:
    from surgery.compiling import target_of

    return target_of(read_model(reference, meta=meta, trust=trust), None)


BaseArgument = Annotated[
    str,
    typer.Argument(metavar="BASE", help="A checkpoint: a folder or a safetensors file."),
]
TunedArgument = Annotated[
    str, typer.Argument(metavar="TUNED", help="One of the same model, after training.")
]
MostOption = Annotated[int, typer.Option("--rank", metavar="R", help="Of each product, at most.")]
MatchOption = Annotated[
    str, typer.Option("--match", metavar="SELECTOR", help="Which matrices, as a spec says it.")
]
AimOption = Annotated[
    str | None, typer.Option("--to", metavar="METHOD", help="A method that adds B @ A to W.")
]


def extract(
    base: BaseArgument,
    tuned: TunedArgument,
    output: NewOption,
    rank: MostOption,
    match: MatchOption = "*",
    to: AimOption = None,
    json: JsonOption = False,
) -> None:
    """Write the adapter that is nearest to what changed from BASE to TUNED; no model is built."""
    with command(json) as result, steps(1) as step:
        from surgery.extraction import extract as extracted

        def told(name: str, done: int, total: int) -> None:
            step(f"{name} ({done} of {total})")

        check_output(output, force=False)
        made = extracted(base, tuned, output, rank=rank, match=match, to=to, progress=told)
        result.text, result.data = str(made), made.as_json()


ConfigArgument = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", help="An adapter_config.json of peft's, or its folder."),
]
OptionalModel = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="What it is for; of a folder only the config is read."),
]


def import_(
    config: ConfigArgument,
    model: OptionalModel = None,
    trust: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Print the spec that does what a config of peft's does; with MODEL, compared at each site."""
    with command(json) as result:
        from surgery.integrations.imported import import_config

        base = None if model is None else _module(model, meta=True, trust=trust)
        text = import_config(config, base)
        result.text, result.data = text.rstrip("\n"), {"spec": text}
