"""What a person may have meant by a name that selects nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches

_CLOSE = 0.6
_MARGIN = 0.05  # of likeness, within which no name is better than another
_MOST = 3
_SHOWN = 5


def tails(paths: Iterable[str], like: str) -> Counter[str]:
    """How often each dotted tail with as many names as `like` ends one of the paths."""
    names = like.count(".") + 1
    return Counter(".".join(path.split(".")[-names:]) for path in paths if path)


@dataclass(frozen=True, slots=True)
class Meant:
    """Up to three names that exist, the nearest first; among equals, the most frequent first.

    best: those of them that are as good as the first.
    """

    names: tuple[str, ...]
    best: tuple[str, ...]

    def question(self, told: str = "") -> str:
        """`did you mean …?`, and what is `told` of the name if it is one; "" if none is near."""
        *others, last = (f"`{name}`" for name in self.best or ("",))
        listed = f"{', '.join(others)} or {last}" if others else last
        question = f"did you mean {listed}?"
        if not self.best:
            return ""
        return f"{question} {told}" if told and not others else question

    def others(self, counts: Counter[str]) -> str:
        """What is near as well, with counts; "" if nothing is."""
        rest = Counter({n: counts[n] for n in self.names if n not in self.best})
        return f"near as well: {listing(rest)}" if rest else ""


def closest(name: str, counts: Counter[str]) -> Meant:
    """What a name may have been meant to be."""
    by_frequency = [found for found, _ in counts.most_common()]
    near = get_close_matches(name, by_frequency, n=max(len(by_frequency), 1), cutoff=_CLOSE)
    likeness = {found: _likeness(name, found) for found in near}
    order = {found: place for place, found in enumerate(by_frequency)}
    ranked = sorted(near, key=lambda found: (-likeness[found], order[found]))[:_MOST]
    best = (found for found in ranked if likeness[found] > likeness[ranked[0]] - _MARGIN)
    return Meant(tuple(ranked), tuple(best))


def _likeness(name: str, found: str) -> float:
    return SequenceMatcher(None, found, name).ratio()  # as `get_close_matches` asks


def listing(counts: Counter[str]) -> str:
    """The most frequent names with their counts, for a hint."""
    shown = [f"`{name}` ({count})" for name, count in counts.most_common(_SHOWN)]
    rest = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def plural(count: int, noun: str) -> str:
    """`1 module`, `12 modules`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
