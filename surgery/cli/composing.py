"""The command that makes one saved adapter of several."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from surgery.cli.inputs import NewOption, TrustOption, check_output, read_model
from surgery.cli.output import JsonOption, command, steps

if TYPE_CHECKING:
    from torch import nn

_NAME = re.compile(r"[A-Za-z_]\w*")

ExpressionArgument = Annotated[
    str, typer.Argument(metavar="EXPRESSION", help="What is made, such as '0.7*a + 0.3*b'.")
]
AdaptersOption = Annotated[
    list[str],
    typer.Option("--adapter", "-a", metavar="NAME=DIR", help="A saved adapter; repeatable."),
]
HowOption = Annotated[
    str,
    typer.Option(
        metavar="WAY",
        help="cat, svd, linear; ties, dare_linear, dare_ties or magnitude_prune, also with _svd.",
    ),
]
RankOption = Annotated[
    int | None, typer.Option(metavar="R", help="Of what is cut off (svd); by default the largest.")
]
ToOption = Annotated[
    str | None, typer.Option("--to", metavar="METHOD", help="A method that adds B @ A to W.")
]
DensityOption = Annotated[
    float | None, typer.Option(metavar="X", help="The share of elements that pruning leaves.")
]
SignOption = Annotated[
    Literal["total", "frequency"], typer.Option(help="How ties elects the sign of an element.")
]
SeedOption = Annotated[int, typer.Option(metavar="N", help="Of what dare draws.")]
BaseOption = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="The model they are for, where equations read its weights."),
]
NameOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="The new adapter's own name in the folder.")
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Compose what was made on different bases all the same.")
]


def compose(
    expression: ExpressionArgument,
    adapter: AdaptersOption,
    output: NewOption,
    how: HowOption = "cat",
    rank: RankOption = None,
    to: ToOption = None,
    density: DensityOption = None,
    sign: SignOption = "total",
    seed: SeedOption = 0,
    base: BaseOption = None,
    name: NameOption = None,
    force: ForceOption = False,
    trust: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Write the adapter that a mix of saved ones is, and say how far it is from their sum."""
    folders = _folders(adapter)
    with command(json) as result, steps(2) as step:
        from surgery.composing import compose as composed

        check_output(output, force=False)
        if base is not None:
            step("reading the model")
        model = None if base is None else _module(base, trust=trust)
        step("composing")
        made = composed(
            expression,
            folders,
            output,
            how=how,
            rank=rank,
            to=to,
            density=density,
            sign=sign,
            seed=seed,
            base=model,
            name=name,
            force=force,
        )
        result.text, result.data = str(made), made.as_json()


def _folders(pairs: list[str]) -> dict[str, str]:
    """`NAME=DIR` pairs as a mapping. A pair of another form, or a repeated name, is bad usage."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not equals or not folder or not _NAME.fullmatch(name):
            raise typer.BadParameter(f"`{pair}` is not NAME=DIR", param_hint="--adapter")
        if name in found:
            raise typer.BadParameter(f"`{name}` is given twice", param_hint="--adapter")
        found[name] = folder
    return found


def _module(reference: str, *, trust: bool) -> nn.Module:
    from surgery.compiling import target_of

    return target_of(read_model(reference, meta=False, trust=trust), None)
