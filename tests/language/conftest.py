"""What the tests of the language share: the mistakes of a text, with what they underline."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from surgery.errors import Diagnostic, SpecSyntaxError
from surgery.language.parse import parse

Refused = Callable[[str], tuple[Diagnostic, ...]]
Marked = Callable[[str], list[tuple[str, str]]]


def _refused(text: str) -> tuple[Diagnostic, ...]:
    with pytest.raises(SpecSyntaxError) as caught:
        parse(text)
    return caught.value.diagnostics


@pytest.fixture
def refused() -> Refused:
    """The findings of a text that must not parse."""
    return _refused


@pytest.fixture
def marked() -> Marked:
    """The same, as codes and the exact text that each underlines, with its line and column."""

    def show(text: str) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for one in _refused(text):
            assert one.span is not None
            line, column = one.span.source.position(one.span.start)
            found.append((one.code, f"{line}:{column} {one.span.text}"))
        return found

    return show
