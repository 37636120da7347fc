"""What can be wrong, where, and what to do about it.

A check never raises: it reports into a `Report`, so that one run finds as many mistakes as it can.
Only the edge of a stage raises, with everything that was found.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NoReturn


@dataclass(frozen=True, slots=True)
class Source:
    """A named text. `name` is what a person would open: a path, or `<spec>` for a literal."""

    name: str
    text: str = field(repr=False)

    def position(self, offset: int) -> tuple[int, int]:
        """The line and column (both from 1) of a character offset."""
        before = self.text[:offset]
        return before.count("\n") + 1, offset - (before.rfind("\n") + 1) + 1

    def line(self, number: int) -> str:
        """The text of line `number` (from 1), without its end."""
        lines = self.text.splitlines()
        return lines[number - 1] if number <= len(lines) else ""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a source, in character offsets; `end` is exclusive."""

    source: Source
    start: int
    end: int

    @property
    def text(self) -> str:
        """The stretch itself."""
        return self.source.text[self.start : self.end]

    def within(self, start: int, end: int) -> Span:
        """The part from `start` to `end`, in offsets from this span's own start."""
        return Span(self.source, self.start + start, self.start + end)

    def __str__(self) -> str:
        line, column = self.source.position(self.start)
        return f"{self.source.name}:{line}:{column}"


Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One finding. `label` stands under the underlined source, `hint` says what to do."""

    code: str
    message: str
    span: Span | None = None
    label: str = ""
    hint: str = ""
    related: tuple[tuple[str, Span], ...] = ()
    severity: Severity = "error"

    def __str__(self) -> str:
        parts = [f"{self.severity}[{self.code}]: {self.message}"]
        if self.span is not None:
            parts += _excerpt(self.span, self.label)
        for note, span in self.related:
            parts += _excerpt(span, note)
        if self.hint:
            parts.append(f"  = help: {self.hint}")
        return "\n".join(parts)

    def as_json(self) -> dict[str, object]:
        """The finding as plain data; `span` is null or has file, line, column, end_line, end_column."""
        return {
            "code": self.code,
            "severity": self.severity,
            "message": self.message,
            "span": None if self.span is None else _span_json(self.span),
            "label": self.label,
            "hint": self.hint,
            "related": [{"note": n, "span": _span_json(s)} for n, s in self.related],
        }


def _span_json(span: Span) -> dict[str, object]:
    line, column = span.source.position(span.start)
    end_line, end_column = span.source.position(max(span.start, span.end))
    return {
        "file": span.source.name,
        "line": line,
        "column": column,
        "end_line": end_line,
        "end_column": end_column,
    }


def _excerpt(span: Span, label: str) -> list[str]:
    line, column = span.source.position(span.start)
    text = span.source.line(line)
    width = max(1, min(span.end - span.start, len(text) - column + 1))
    gutter = " " * len(str(line))
    # Tabs are kept in the margin so that the underline stands where the source does.
    margin = "".join("\t" if c == "\t" else " " for c in text[: column - 1])
    return [
        f"{gutter} ┌─ {span}",
        f"{line} │ {text}",
        f"{gutter} │ {margin}{'^' * width} {label}".rstrip(),
    ]


class SurgeryError(Exception):
    """The root of everything this package raises on purpose; holds one or more diagnostics."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__("\n\n".join(str(d) for d in self.diagnostics))

    def __reduce__(self) -> tuple[type[SurgeryError], tuple[tuple[Diagnostic, ...]]]:
        return type(self), (self.diagnostics,)


class SpecSyntaxError(SurgeryError):
    """E0: the text is not a spec."""


class DefinitionError(SurgeryError):
    """E1: a name, type, argument or equation is wrong; no model is needed to see it."""


class SelectionError(SurgeryError):
    """E2: a selector or scope does not fit the model."""


class PlanError(SurgeryError):
    """E3: a method does not fit a site, or two statements do not fit each other."""


class StateError(SurgeryError):
    """E4: the model is not in a state in which the call makes sense."""


class ArtifactError(SurgeryError):
    """E5: a file is missing, damaged, or not what it says."""


_FAMILIES: dict[str, type[SurgeryError]] = {
    "E0": SpecSyntaxError,
    "E1": DefinitionError,
    "E2": SelectionError,
    "E3": PlanError,
    "E4": StateError,
    "E5": ArtifactError,
}


def error_of(diagnostics: Iterable[Diagnostic]) -> SurgeryError:
    """The exception for some findings; its type is that of the first error among them."""
    found = tuple(diagnostics)
    first = next(d for d in found if d.severity == "error")
    return _FAMILIES[first.code[:2]](found)


def refuse(
    code: str, message: str, span: Span | None = None, *, label: str = "", hint: str = ""
) -> NoReturn:
    """Raise the one error that makes it pointless to go on."""
    raise error_of([Diagnostic(code, message, span, label, hint)])


@dataclass(slots=True)
class Report:
    """Findings as they come in; `stop` raises them all together, if any is an error."""

    found: list[Diagnostic] = field(default_factory=list[Diagnostic])

    def error(
        self,
        code: str,
        message: str,
        span: Span | None = None,
        *,
        label: str = "",
        hint: str = "",
        related: tuple[tuple[str, Span], ...] = (),
    ) -> None:
        """Note an error; an identical one is kept once."""
        self._keep(Diagnostic(code, message, span, label, hint, related))

    def warning(
        self, code: str, message: str, span: Span | None = None, *, label: str = "", hint: str = ""
    ) -> None:
        """Note something that does not stop the run."""
        self._keep(Diagnostic(code, message, span, label, hint, severity="warning"))

    def extend(self, diagnostics: Iterable[Diagnostic]) -> None:
        """Take over findings made elsewhere."""
        for diagnostic in diagnostics:
            self._keep(diagnostic)

    @property
    def failed(self) -> bool:
        """Whether an error is among the findings."""
        return any(d.severity == "error" for d in self.found)

    def stop(self) -> None:
        """Raise what was found, if any of it is an error."""
        if self.failed:
            raise error_of(self.found)

    def _keep(self, diagnostic: Diagnostic) -> None:
        if diagnostic not in self.found:
            self.found.append(diagnostic)
