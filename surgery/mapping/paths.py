"""Which sites a config means: lists of endings, and regexes that are matched in linear time.

A config comes from anywhere, so none of its regexes is given to a matcher that can be made slow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import cast

from surgery.errors import Report, Source, Span, refuse
from surgery.language.patterns import compile_selector
from surgery.language.syntax import Regex

_LITERAL = r"(?:\\[^A-Za-z0-9]|[\w-])+"
_LITERALS = re.compile(rf"{_LITERAL}(?:\|{_LITERAL})*")
_EXACT = re.compile(r"\^\(\?:(.*)\)\$?")
_ESCAPE = re.compile(r"\\(.)")

Taker = Callable[[str], bool]


def exactly(paths: Iterable[str]) -> str:
    """The regex for the whole of some paths and no other."""
    return "|".join(map(re.escape, paths))


def at_start(paths: Iterable[str]) -> str:
    """The same for a reader that would take the regex at the end of a path as well."""
    return f"^(?:{exactly(paths)})"


def member(path: str, value: object) -> bool:
    """Whether a list of endings, or a regex for the whole path, takes a path.

    Raises DefinitionError and SpecSyntaxError for a regex that is not taken.
    """
    match value:
        case str():
            return _whole(value)(path)
        case list():
            return any(path.endswith(str(e)) for e in cast("list[object]", value))
        case _:
            return False


def override(path: str, value: object) -> object:
    """The value of the first regex that takes the end of a path; None if none does."""
    patterns = cast("dict[str, object]", value) if isinstance(value, Mapping) else {}
    for pattern, found in patterns.items():
        if _tail(pattern)(path):
            return found
    return None


def kept(path: str, key: str, value: object) -> int | None:
    """How many a table of lists, by path and key, says are kept of a path; None if it does not.

    A name may follow the key. What is no list of true and false says nothing.
    """
    table = cast("dict[str, object]", value) if isinstance(value, Mapping) else {}
    for name, found in table.items():
        if name == f"{path}.{key}" or name.startswith(f"{path}.{key}."):
            marks: list[object] = cast("list[object]", found) if isinstance(found, list) else [None]
            return marks.count(True) if all(isinstance(m, bool) for m in marks) else None
    return None


@lru_cache(maxsize=256)
def _whole(pattern: str) -> Taker:
    """Whether a regex is the whole of a path."""
    known = _literals(pattern)
    if known is not None:
        return known.__contains__
    return _matcher(pattern, whole=True)


@lru_cache(maxsize=256)
def _tail(pattern: str) -> Taker:
    """Whether a regex is the whole of a path, or of what follows one of its dots."""
    exact = _EXACT.fullmatch(pattern)
    known = None if exact is None else _literals(exact.group(1))
    if known is not None:
        return known.__contains__
    return _matcher(pattern, whole=pattern.startswith("^"))


def _literals(pattern: str) -> frozenset[str] | None:
    """The texts that a regex lists, if it does nothing else."""
    if _LITERALS.fullmatch(pattern) is None:
        return None
    return frozenset(_ESCAPE.sub(r"\1", text) for text in re.findall(_LITERAL, pattern))


def _matcher(pattern: str, *, whole: bool) -> Taker:
    body = pattern.removeprefix("^").removesuffix("$")
    span = Span(Source("a pattern in the config", pattern), 0, len(pattern))
    if body != pattern and "|" in body:
        refuse(
            "E515",
            f'the pattern "{pattern}" has an anchor beside |',
            span,
            hint="write it without ^ and $",
        )
    report = Report()
    start = len(pattern) - len(pattern.removeprefix("^"))
    compiled = compile_selector(Regex(body, span=span.within(start, start + len(body))), report)
    report.stop()
    assert compiled is not None  # what is wrong was reported
    return compiled.matches_whole if whole else compiled.matches_tail
