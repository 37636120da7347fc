"""What a command says: its result on stdout, findings and progress on stderr."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from surgery.errors import Diagnostic, SurgeryError

JsonOption = Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout.")]

_STYLES = {"error": "bold red", "warning": "bold yellow"}


@dataclass(slots=True)
class Result:
    """What a command found out: as text, as plain data, and whether all is well."""

    text: str = ""
    data: Mapping[str, object] = field(default_factory=dict[str, object])
    findings: tuple[Diagnostic, ...] = ()
    passed: bool = True


@contextmanager
def command(as_json: bool) -> Generator[Result]:
    """The edge of a command: fill in the result, and it is said, or what was refused.

    Whatever else is printed meanwhile goes to stderr. Ends the process with 1 if it was refused.
    """
    _be_lenient()
    result = Result()
    try:
        with redirect_stdout(sys.stderr):
            yield result
    except SurgeryError as error:
        _say_findings(error.diagnostics, as_json)
        raise typer.Exit(1) from None
    _say(result, as_json)
    if not result.passed:
        raise typer.Exit(1)


def _be_lenient() -> None:
    """Let a terminal that lacks a character show an escape for it, and not fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _say(result: Result, as_json: bool) -> None:
    if as_json:
        _print_json({"diagnostics": [d.as_json() for d in result.findings], **result.data})
        return
    show(result.findings)
    if result.text:
        typer.echo(result.text)


def _say_findings(diagnostics: tuple[Diagnostic, ...], as_json: bool) -> None:
    if as_json:
        _print_json({"diagnostics": [d.as_json() for d in diagnostics]})
    else:
        show(diagnostics)


def _print_json(data: Mapping[str, object]) -> None:
    typer.echo(json.dumps(data, indent=2))


# --------------------------------------------------------------------------------- findings


def show(diagnostics: Iterable[Diagnostic]) -> None:
    """Findings on stderr, coloured on a terminal and as they are anywhere else."""
    console = Console(stderr=True)
    for diagnostic in diagnostics:
        # No wrapping: the underline must stay below what it underlines.
        console.print(styled(diagnostic), "", sep="\n", soft_wrap=True)


def styled(diagnostic: Diagnostic) -> Text:
    """The text of a finding with its parts coloured."""
    style = _STYLES[diagnostic.severity]
    text = Text(str(diagnostic))
    text.highlight_regex(r"\A[^:\n]+", style)
    text.highlight_regex(r"(?m)^ *│[ \t]*(\^+.*)$", style)
    text.highlight_regex(r"(?m)^ *\d* *[┌│]─?", "blue")
    text.highlight_regex(r"(?m)^ *= help:", "cyan")
    return text


# --------------------------------------------------------------------------------- progress


class Steps:
    """A bar on stderr that names the step in hand; nothing where stderr is no terminal."""

    def __init__(self, progress: Progress, total: int) -> None:
        """Begin with nothing done of `total` steps."""
        self._progress = progress
        self._task = progress.add_task("", total=total)
        self._begun = False

    def __call__(self, name: str) -> None:
        """Say that a step begins, and the one before it is done."""
        self._progress.update(self._task, description=name, advance=int(self._begun))
        self._begun = True

    def note(self, what: str) -> None:
        """Say what the step in hand is at."""
        self._progress.update(self._task, description=what)


@contextmanager
def steps(total: int) -> Generator[Steps]:
    """A bar for so many steps, gone when they are done."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as progress:
        yield Steps(progress, total)
