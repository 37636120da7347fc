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
        return self.text.count("\n", 0, offset) + 1, offset - self.text.rfind("\n", 0, offset)

    def line_at(self, offset: int) -> str:
        """The text of the line in which an offset lies, without its end."""
        start = self.text.rfind("\n", 0, offset) + 1
        end = self.text.find("\n", offset)
        return self.text[start : end if end >= 0 else len(self.text)].rstrip("\r")


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
        """Where it begins, as `file:line:column`."""
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
        """The finding with the source line it is about, underlined."""
        parts = [f"{self.severity}[{self.code}]: {self.message}"]
        if self.span is not None:
            parts += _excerpt(self.span, self.label)
        for note, span in self.related:
            parts += _excerpt(span, note)
        if self.hint:
            parts.append(f"  = help: {self.hint}")
        return "\n".join(parts)

    def as_json(self) -> dict[str, object]:
        """The finding as plain data.

        `span` is null or has file, line, column, end_line and end_column; `related` are notes, each
        with a span.
        """
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


_WIDEST = 120


def _excerpt(span: Span, label: str) -> list[str]:
    line, column = span.source.position(span.start)
    text, at = _window(span.source.line_at(span.start), column - 1)
    width = max(1, min(span.end - span.start, len(text) - at))
    gutter = " " * len(str(line))
    # Tabs are kept in the margin so that the underline stands where the source does.
    margin = "".join("\t" if c == "\t" else " " for c in text[:at])
    return [
        f"{gutter} ┌─ {span}",
        f"{line} │ {text}".rstrip(),
        f"{gutter} │ {margin}{'^' * width} {label}".rstrip(),
    ]


def _window(text: str, at: int) -> tuple[str, int]:
    """A line that a screen has room for, and where an offset of the whole line is in it."""
    if len(text) <= _WIDEST:
        return text, at
    start = max(0, min(at - _WIDEST // 4, len(text) - _WIDEST))
    before, after = "…" * (start > 0), "…" * (start + _WIDEST < len(text))
    return f"{before}{text[start : start + _WIDEST]}{after}", at - start + len(before)


_SHOWN = 30


class SurgeryError(Exception):
    """The root of everything this package raises on purpose; holds one or more diagnostics."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        """Hold some diagnostics; the message shows the first of them."""
        self.diagnostics = tuple(diagnostics)
        shown = [str(d) for d in self.diagnostics[:_SHOWN]]
        more = len(self.diagnostics) - len(shown)
        super().__init__("\n\n".join([*shown, *([f"and {more} more"] if more else [])]))

    def __reduce__(self) -> tuple[type[SurgeryError], tuple[tuple[Diagnostic, ...]]]:
        """As the call that makes it."""
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
    _seen: set[Diagnostic] = field(default_factory=set[Diagnostic], init=False, repr=False)

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

    def arrange(self) -> None:
        """Put the findings in the order of their places: those of none first, then file by file."""
        files = dict.fromkeys(d.span.source.name for d in self.found if d.span is not None)
        order = {name: at for at, name in enumerate(files, 1)}
        self.found.sort(
            key=lambda d: (order[d.span.source.name], d.span.start) if d.span else (0, 0)
        )

    @property
    def failed(self) -> bool:
        """Whether an error is among the findings."""
        return any(d.severity == "error" for d in self.found)

    def stop(self) -> None:
        """Raise what was found, if any of it is an error."""
        if self.failed:
            raise error_of(self.found)

    def _keep(self, diagnostic: Diagnostic) -> None:
        if diagnostic not in self._seen:
            self._seen.add(diagnostic)
            self.found.append(diagnostic)
