"""Diagnostics: where they point, how they read, and what carries them."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import soon

from surgery.errors import (
    ArtifactError,
    DefinitionError,
    Diagnostic,
    PlanError,
    Report,
    SelectionError,
    Source,
    Span,
    SpecSyntaxError,
    StateError,
    SurgeryError,
    error_of,
    refuse,
)

TEXT = "match /q/\n  apply lorra(r=8)\n"
SOURCE = Source("a.peft", TEXT)
SPAN = Span(SOURCE, TEXT.index("lorra"), TEXT.index("("))


def test_a_diagnostic_shows_the_place_underlined() -> None:
    found = Diagnostic(
        "E121", "unknown method `lorra`", SPAN, "did you mean `lora`?", hint="there are: lora"
    )
    assert str(found) == (
        "error[E121]: unknown method `lorra`\n"
        "  ┌─ a.peft:2:9\n"
        "2 │   apply lorra(r=8)\n"
        "  │         ^^^^^ did you mean `lora`?\n"
        "  = help: there are: lora"
    )


def test_notes_have_excerpts_of_their_own() -> None:
    first = Span(SOURCE, 0, 5)
    shown = str(Diagnostic("E107", "twice", SPAN, related=(("first here", first),)))
    assert "1 │ match /q/\n  │ ^^^^^ first here" in shown


def test_without_a_place_there_is_only_the_message() -> None:
    assert str(Diagnostic("E501", "cannot read a.peft")) == "error[E501]: cannot read a.peft"
    assert str(Diagnostic("E205", "past the end", severity="warning")).startswith("warning[E205]")


@given(st.text("ab\n\r\t\x0b\u2028é", max_size=40), st.data())
def test_every_offset_has_a_line_and_a_column(text: str, data: st.DataObject) -> None:
    source = Source("s", text)
    offset = data.draw(st.integers(0, len(text)))
    line, column = source.position(offset)
    lines = text.split("\n")
    assert sum(len(one) + 1 for one in lines[: line - 1]) + column - 1 == offset
    assert source.line_at(offset) == lines[line - 1].rstrip("\r")
    shown = str(Diagnostic("E003", "m", Span(source, offset, len(text))))
    assert f"s:{line}:{column}" in shown


def test_the_underline_stands_where_the_text_does_after_tabs_and_in_long_lines() -> None:
    tabbed = Source("s", "\tlet x = y")
    assert "│ \t        ^" in str(Diagnostic("E101", "m", Span(tabbed, 9, 10)))
    text = "a" * 5000 + "!" + "b" * 5000
    shown = str(Diagnostic("E003", "m", Span(Source("s", text), 5000, 5001))).splitlines()
    assert max(map(len, shown)) < 140
    assert shown[2][shown[3].index("^")] == "!"


def test_as_plain_data_it_has_lines_and_columns_from_one() -> None:
    assert Diagnostic("E121", "m", SPAN, related=(("n", SPAN),)).as_json() == {
        "code": "E121",
        "severity": "error",
        "message": "m",
        "label": "",
        "hint": "",
        "span": {"file": "a.peft", "line": 2, "column": 9, "end_line": 2, "end_column": 14},
        "related": [
            {
                "note": "n",
                "span": {"file": "a.peft", "line": 2, "column": 9, "end_line": 2, "end_column": 14},
            }
        ],
    }
    assert Diagnostic("E501", "m").as_json()["span"] is None


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("E001", SpecSyntaxError),
        ("E101", DefinitionError),
        ("E201", SelectionError),
        ("E301", PlanError),
        ("E401", StateError),
        ("E501", ArtifactError),
    ],
)
def test_the_family_of_the_first_error_names_the_exception(
    code: str, expected: type[SurgeryError]
) -> None:
    warning = Diagnostic("E205", "w", severity="warning")
    found = error_of([warning, Diagnostic(code, "m", SPAN)])
    assert type(found) is expected
    assert isinstance(found, SurgeryError)
    again = pickle.loads(pickle.dumps(found))
    assert type(again) is expected
    assert again.diagnostics == found.diagnostics
    assert str(again) == str(found)


def test_refusing_raises_at_once() -> None:
    with pytest.raises(DefinitionError, match="E101") as caught:
        refuse("E101", "m", SPAN, label="l", hint="h")
    assert caught.value.diagnostics == (Diagnostic("E101", "m", SPAN, "l", "h"),)


def test_a_report_raises_everything_together_and_nothing_twice() -> None:
    report = Report()
    report.warning("E205", "w")
    report.stop()
    assert not report.failed
    report.error("E101", "a", SPAN)
    report.extend([Diagnostic("E102", "b"), Diagnostic("E101", "a", SPAN)])
    assert report.failed
    with pytest.raises(DefinitionError) as caught:
        report.stop()
    assert [d.code for d in caught.value.diagnostics] == ["E205", "E101", "E102"]


def test_ten_thousand_findings_are_kept_and_some_are_shown() -> None:
    source = Source("s", "x\n" * 10_000)
    report = Report()
    with soon():
        for at in range(10_000):
            report.error("E003", "m", Span(source, 2 * at, 2 * at + 1))
        error = error_of(report.found)
    assert len(error.diagnostics) == 10_000
    assert str(error).endswith("and 9970 more")


def test_a_part_of_a_span_is_counted_from_its_start() -> None:
    assert SPAN.text == "lorra"
    assert SPAN.within(1, 3).text == "or"
    assert str(SPAN) == "a.peft:2:9"
