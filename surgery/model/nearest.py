"""What a person may have meant by a name that selects nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from difflib import get_close_matches

_CLOSE = 0.6
_SHOWN = 5


def tails(paths: Iterable[str], like: str) -> Counter[str]:
    """How often each dotted tail with as many names as `like` ends one of the paths."""
    names = like.count(".") + 1
    return Counter(".".join(path.split(".")[-names:]) for path in paths if path)


def closest(name: str, counts: Counter[str]) -> str:
    """The name that exists and is the nearest, or ""; among equals, the most frequent."""
    by_frequency = [found for found, _ in counts.most_common()]
    return next(iter(get_close_matches(name, by_frequency, n=1, cutoff=_CLOSE)), "")


def listing(counts: Counter[str]) -> str:
    """The most frequent names with their counts, for a hint."""
    shown = [f"`{name}` ({count})" for name, count in counts.most_common(_SHOWN)]
    rest = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def plural(count: int, noun: str) -> str:
    """`1 module`, `12 modules`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
