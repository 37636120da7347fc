"""The commands: each reads its arguments, calls the function of its name, and says the result.

What is slow to import is imported inside a command, so that `--help` does not wait for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import surgery
from surgery.cli import checkpoints, composing, folders, merging
from surgery.cli.inputs import (
    check_output,
    check_program,
    parse_values,
    read_data,
    read_model,
    read_spec,
    title,
)
from surgery.cli.output import JsonOption, command, steps
from surgery.errors import Diagnostic, SurgeryError, refuse

if TYPE_CHECKING:
    from torch import nn

    from surgery.artifact import SaveReport
    from surgery.language.syntax import Spec
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
        help="A folder with a config.json, a hub id, a .pt2 file, or python:package.mod:factory.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="The value of a `param`; may be repeated."),
]
SeedOption = Annotated[int, typer.Option(help="The seed of the random beginnings.")]
TrustOption = Annotated[
    bool,
    typer.Option("--trust", help="Let MODEL run code (python:…, a .pt2 file), and --data."),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="FILE.py:NAME",
        help="Batches for beginnings that read data; or python:package.mod:name.",
    ),
]
ProgramOption = Annotated[
    Path | None,
    typer.Option("--program", metavar="FILE", help="Of a .pt2 MODEL: the adapted one to write."),
]
OutputOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="OUT", help="The folder to write the adapter to.")
]
OtherOption = Annotated[
    str | None,
    typer.Option("--diff", metavar="OTHER", help="Show what another spec would do otherwise."),
]
AgainstOption = Annotated[
    str | None,
    typer.Option("--against", metavar="MODEL2", help="Show what is otherwise on another model."),
]
_CODE = re.compile(r"E[0-9]{3}")

MethodArgument = Annotated[
    str, typer.Argument(metavar="METHOD", help="A method by its name, or the code of an error.")
]
ArgumentsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[ARG=VALUE]...", help="Arguments of the method.")
]
InOption = Annotated[int | None, typer.Option("--in", help="The layer's inputs (fan-in).")]
OutOption = Annotated[int | None, typer.Option("--out", help="The layer's outputs (fan-out).")]
KindOption = Annotated[str, typer.Option("--kind", help="The kind of the layer.")]
SpecOption = Annotated[
    Path | None, typer.Option("--spec", metavar="FILE", help="A .peft file that may define it.")
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


# ------------------------------------------------------------------------------------- format


FilesArgument = Annotated[
    list[str], typer.Argument(metavar="FILE...", help=".peft files; - is standard input.")
]
CheckOption = Annotated[
    bool, typer.Option("--check", help="Write nothing; end with 1 if a file would change.")
]
ShowOption = Annotated[bool, typer.Option("--diff", help="Write nothing; show what would change.")]


@app.command()
def fmt(files: FilesArgument, check: CheckOption = False, diff: ShowOption = False) -> None:
    """Lay spec files out in the one way there is; comments and meaning stay."""
    from surgery.cli.rewriting import rewriting

    stdout = typer.get_binary_stream("stdout")  # for bytes, whatever a terminal takes
    findings: list[Diagnostic] = []
    said: list[str] = []
    with command(False) as result:
        for file in files:
            try:
                made = rewriting(file)
                said += made.difference() if diff else made.notice(check)
                if not check and not diff:
                    made.write(stdout)
            except SurgeryError as error:
                findings += error.diagnostics
                continue
            result.passed &= not (check and made.changes)
        result.text, result.findings = "\n".join(said), tuple(findings)
        result.passed &= not findings


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
    diff: OtherOption = None,
    against: AgainstOption = None,
    trust: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Show what a spec would do to a model; of a folder or hub id, only the config is read."""
    values = parse_values(sets or [])
    with command(json) as result, steps(2) as step:
        read = read_spec(spec)
        other = None if diff is None else read_spec(diff)
        step("reading the model's config")
        base = read_model(model, meta=True, trust=trust)
        base_there = None if against is None else read_model(against, meta=True, trust=trust)
        step("planning")
        made = surgery.plan(read, base, values=values)
        if other is None and base_there is None:
            result.text, result.data = str(made), made.as_json()
            return
        theirs = values if other is None else _own(values, other)
        there = surgery.plan(other or read, base_there or base, values=theirs)
        found = made.diff(there)
        sides = (title(spec), model), (title(diff or spec), against or model)
        result.text = "\n".join([*_sides(*sides), str(found)])
        result.data = found.as_json()


def _own(values: dict[str, str], spec: Spec) -> dict[str, str]:
    """The values of the params that a spec has: those of another spec are not its business."""
    from surgery.language.syntax import Param

    declared = {s.name for s in spec.statements if isinstance(s, Param)}
    return {name: value for name, value in values.items() if name in declared}


def _sides(here: tuple[str, str], there: tuple[str, str]) -> Iterator[str]:
    yield f"--- {here[0]} on {here[1]}"
    yield f"+++ {there[0]} on {there[1]}"


@app.command()
def explain(
    method: MethodArgument,
    arguments: ArgumentsArgument = None,
    fan_in: InOption = None,
    fan_out: OutOption = None,
    kind: KindOption = "linear",
    spec: SpecOption = None,
    json: JsonOption = False,
) -> None:
    """Say what a method is, and everything that is derived from it at a layer of some size."""
    from surgery.catalogue import entry, render

    given = parse_values(arguments or [], "ARG=VALUE")
    with command(json) as result:
        if _CODE.fullmatch(method):
            found = entry(method)
            if found is None:
                refuse("E121", f"no error has the code `{method}`", hint=_known_codes())
            result.text, result.data = render(found).rstrip("\n"), asdict(found)
            return
        from surgery.explanation import explain as explained

        file = None if spec is None else read_spec(str(spec))
        told = explained(method, given, fan_in=fan_in, fan_out=fan_out, kind=kind, spec=file)
        result.text, result.data = str(told), told.as_json()


def _known_codes() -> str:
    from surgery.catalogue import families

    codes = [[entry.code for entry in family.entries] for family in families()]
    return f"there are: {', '.join(f'{some[0]} to {some[-1]}' for some in codes if some)}"


# ------------------------------------------------------------------------- compile and verify


@app.command(name="compile")
def compile_(
    spec: SpecArgument,
    model: ModelArgument,
    output: OutputOption,
    sets: SetOption = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
    data: DataOption = None,
    trust: TrustOption = False,
    program: ProgramOption = None,
    json: JsonOption = False,
) -> None:
    """Put a spec's adapters on a model, and write them to a folder ready to train or attach.

    A spec with several adapters writes each to a folder of its own below OUT.
    """
    values = parse_values(sets or [])
    with command(json) as result, steps(4) as step:
        read = read_spec(spec)
        check_output(output, force)
        check_program(program, model)
        step("reading the model")
        base = read_model(model, meta=False, trust=trust)
        batches = read_data(data, step, trust=trust)
        step("compiling")
        compiled = surgery.compile(read, base, seed=seed, values=values, data=batches)
        step("writing")
        saved = _save(compiled, output)
        made = compiled.compositions.values()
        lines = [str(compiled.plan), *(one.summary for one in made), "", *_written(saved)]
        more = {"saved": [*map(_saved_json, saved)], "made": [one.as_json() for one in made]}
        result.data = {**compiled.plan.as_json(), **more}
        if program is not None:
            from surgery.integrations.programs import save_program

            save_program(program, compiled.export())
            lines.append(f"the adapted program is in {program}")
            result.data = {**result.data, "program": str(program)}
        result.text = "\n".join(lines)


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
    data: DataOption = None,
    trust: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Try a spec on a model: does merging agree with the forward, and does the base come back?"""
    values = parse_values(sets or [])
    with command(json) as result, steps(10) as step:
        from surgery.integrations.programs import example_inputs

        read = read_spec(spec)
        step("reading the model")
        base = read_model(model, meta=False, trust=trust)
        args, kwargs = example_inputs(base)
        batches = read_data(data, step, trust=trust)
        seen = surgery.verify(
            read,
            base,
            lambda m: _run(m, args, kwargs),
            seed=seed,
            values=values,
            progress=step,
            data=batches,
        )
        result.text, result.data, result.passed = str(seen), seen.as_json(), seen.passed


def _run(model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    try:
        return model(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        asked = ", ".join(kwargs) or "those of the program"
        refuse(
            "E413",
            f"the model does not run on example inputs ({asked}): {error}",
            hint="call surgery.verify(spec, model, forward) in Python, with inputs of your own",
        )


# ------------------------------------------------------------------------------------ folders

app.command()(folders.convert)
app.command()(composing.compose)
app.command()(folders.extract)
app.command(name="import")(folders.import_)
app.command()(checkpoints.inspect)
app.command()(checkpoints.diff)
app.command()(merging.merge)
app.command()(merging.unmerge)
