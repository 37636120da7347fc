"""Which sites a config means: lists of endings, and regexes that are matched in linear time.

A config comes from anywhere, so none of its regexes is given to a matcher that can be made slow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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


def within(path: str, value: object) -> bool:
    """Whether one of some texts stands anywhere in a path."""
    return isinstance(value, list) and any(str(e) in path for e in cast("list[object]", value))


def group(path: str, order: Sequence[str], part: object) -> int:
    """Which group a path is in, where the paths are cut into equal ones by their order.

    part: of the paths, how many have no group of their own; 0 for a group each, 1 for one of all.
    """
    share = float(part) if isinstance(part, int | float) else 0.0
    count = max(1, round(len(order) * (1 - share)))
    length = max(1, len(order) // count)
    return min(order.index(path) // length, count - 1) if path in order else 0


def override(path: str, value: object, behind: bool = False) -> object:
    """The value of the first regex that takes the end of a path; None if none does.

    behind: whether the end must stand behind a dot.
    """
    patterns = cast("dict[str, object]", value) if isinstance(value, Mapping) else {}
    for pattern, found in patterns.items():
        if _behind_dot(pattern)(path) if behind else _tail(pattern)(path):
            return found
    return None


def ending(path: str) -> str:
    """The regex for as much of a path as can stand behind a dot; "" where nothing can."""
    return re.escape(path.partition(".")[2])


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


@lru_cache(maxsize=256)
def _behind_dot(pattern: str) -> Taker:
    """Whether a regex is the whole of what follows one of a path's dots."""
    if "|" in pattern or pattern.startswith("^"):
        span = Span(Source("a pattern in the config", pattern), 0, len(pattern))
        message = f'the pattern "{pattern}" means something else where an ending is asked for'
        refuse("E515", message, span, hint="write an ending of a path, without | and ^")
    takes = _matcher(pattern, whole=False)
    return lambda path: "." in path and takes(path.partition(".")[2])


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
