"""The commands: each reads its arguments, calls the function of its name, and says the result.

What is slow to import is imported inside a command, so that `--help` does not wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import surgery
from surgery.cli.inputs import check_output, parse_values, read_model, read_spec, title
from surgery.cli.output import command, steps
from surgery.errors import Diagnostic, SurgeryError, refuse

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery.artifact import SaveReport
    from surgery.runtime import Compiled

app = typer.Typer(
    name="surgery",
    help="Adapt a model as a spec says: match /query|value/ in layer[0:6] apply METHOD(r=8)",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SpecArgument = Annotated[
    str, typer.Argument(metavar="SPEC", help="A .peft file, or the text of a `match` statement.")
]
SpecsArgument = Annotated[
    list[str], typer.Argument(metavar="SPEC...", help=".peft files, or texts.")
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder with a config.json, a hub id, or python:package.module:factory.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="The value of a `param`; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout.")]
SeedOption = Annotated[int, typer.Option(help="The seed of the random beginnings.")]
TrustOption = Annotated[bool, typer.Option("--trust", help="Let MODEL run code (python:…).")]
OutputOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="OUT", help="The folder to write the adapter to.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Write into a folder that has files.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"surgery {surgery.__version__}")
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which this is.")
]


@app.callback()
def root(version: VersionOption = False) -> None:
    """Adapt a model as a spec says."""
    del version  # its callback has done the work


# ---------------------------------------------------------------------------- check and plan


@app.command()
def check(specs: SpecsArgument, sets: SetOption = None, json: JsonOption = False) -> None:
    """Say everything that can be seen to be wrong with specs, without a model."""
    values = parse_values(sets or [])
    with command(json) as result:
        findings = {spec: tuple(_findings(spec, values)) for spec in specs}
        fine = [spec for spec, found in findings.items() if not _failed(found)]
        result.text = "\n".join(f"{title(spec)}: nothing wrong" for spec in fine)
        result.findings = tuple(d for found in findings.values() for d in found)
        result.passed = len(fine) == len(findings)


def _findings(argument: str, values: dict[str, str]) -> Iterator[Diagnostic]:
    try:
        spec = read_spec(argument)
    except SurgeryError as error:
        yield from error.diagnostics
    else:
        yield from surgery.check(spec, values)


def _failed(findings: tuple[Diagnostic, ...]) -> bool:
    return any(d.severity == "error" for d in findings)


@app.command()
def plan(
    spec: SpecArgument,
    model: ModelArgument,
    sets: SetOption = None,
    trust: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Show what a spec would do to a model; of a folder or hub id, only the config is read."""
    values = parse_values(sets or [])
    with command(json) as result, steps(2) as step:
        read = read_spec(spec)
        step("reading the model's config")
        base = read_model(model, meta=True, trust=trust)
        step("planning")
        made = surgery.plan(read, base, values=values)
        result.text, result.data = str(made), made.as_json()


# ------------------------------------------------------------------------- compile and verify


@app.command(name="compile")
def compile_(
    spec: SpecArgument,
    model: ModelArgument,
    output: OutputOption,
    sets: SetOption = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
    trust: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Put a spec's adapters on a model, and write them to a folder ready to train or attach.

    A spec with several adapters writes each to a folder of its own below OUT.
    """
    values = parse_values(sets or [])
    with command(json) as result, steps(3) as step:
        read = read_spec(spec)
        check_output(output, force)
        step("reading the model")
        base = read_model(model, meta=False, trust=trust)
        step("compiling")
        compiled = surgery.compile(read, base, seed=seed, values=values)
        step("writing")
        saved = _save(compiled, output)
        result.text = "\n".join([str(compiled.plan), "", *_written(saved)])
        result.data = {**compiled.plan.as_json(), "saved": [*map(_saved_json, saved)]}


Saved = tuple[str, Path, "SaveReport"]
"""An adapter's name, its folder, and what was written there."""


def _save(compiled: Compiled, output: Path) -> list[Saved]:
    names = compiled.adapters
    folders = [output / name if len(names) > 1 else output for name in names]
    return [(n, f, compiled.save(f, n)) for n, f in zip(names, folders, strict=True)]


def _written(saved: list[Saved]) -> Iterator[str]:
    for name, folder, report in saved:
        yield f"the adapter `{name}` is in {folder}:"
        yield from (f"  {file.name:28}{file.stat().st_size:>12,} bytes" for file in report.files)
        if report.peft:
            yield f"  it has no adapter_config.json: {report.peft}"
        else:
            yield "  peft reads this folder as well"


def _saved_json(saved: Saved) -> dict[str, object]:
    name, folder, report = saved
    files = [str(f) for f in report.files]
    return {"adapter": name, "folder": str(folder), "files": files, "peft": report.peft}


@app.command()
def verify(
    spec: SpecArgument,
    model: ModelArgument,
    sets: SetOption = None,
    seed: SeedOption = 0,
    trust: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Try a spec on a model: does merging agree with the forward, and does the base come back?"""
    values = parse_values(sets or [])
    with command(json) as result, steps(8) as step:
        from surgery.integrations.transformers import example_inputs

        read = read_spec(spec)
        step("reading the model")
        base = read_model(model, meta=False, trust=trust)
        inputs = example_inputs(base)
        seen = surgery.verify(
            read, base, lambda m: _run(m, inputs), seed=seed, values=values, progress=step
        )
        result.text, result.data, result.passed = str(seen), seen.as_json(), seen.passed


def _run(model: nn.Module, inputs: dict[str, Tensor]) -> object:
    try:
        return model(**inputs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        asked = ", ".join(inputs)
        refuse(
            "E413",
            f"the model does not run on example inputs ({asked}): {error}",
            hint="call surgery.verify(spec, model, forward) in Python, with inputs of your own",
        )
