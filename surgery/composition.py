"""What composing several adapters made, site by site, and how far that is from their sum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from surgery.artifact import SaveReport
from surgery.report import aligned


@dataclass(frozen=True, slots=True)
class ComposedSite:
    """One site of the new adapter.

    rank: of what is added to W, where that is a product by its equation. error: the length of what
    is added to W beyond Σ cᵢ (Wᵢ' - W), as a share of the length of that (Frobenius norms), as the
    tensors are now; None where there is no such sum, or the base's weights are not there. cut: the
    share that a rank cuts off of what was asked for; None where nothing is cut off. length: of the
    sum.
    """

    path: str
    rank: int | None
    error: float | None
    cut: float | None = None
    length: float = 0.0


@dataclass(frozen=True, slots=True)
class Composition:
    """A new adapter and what it is made of. `str` is a table, `as_json` plain data.

    how: by which way. exact: whether it is the sum, but for the rounding of its tensors. unchanged:
    paths to which nothing is added, and which it has not. saved: what was written, if it was.
    """

    expression: str
    how: str
    name: str
    sites: tuple[ComposedSite, ...]
    unchanged: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    exact: bool = False
    saved: SaveReport | None = None

    @property
    def error(self) -> float | None:
        """Over all sites whose error is known, as one; None where that is none."""
        known = [(s.error, s.length) for s in self.sites if s.error is not None]
        if not known:
            return None
        if any(error == float("inf") for error, _ in known):
            return float("inf")
        whole = sum(length**2 for _, length in known)
        apart = sum((error * length) ** 2 for error, length in known)
        return (apart / whole) ** 0.5 if whole else 0.0

    @property
    def summary(self) -> str:
        """In a line what it is made of, how, and how near that is."""
        return f"{self.name} = {self.expression}, {self.how}: {_told(self)}"

    def __str__(self) -> str:
        """A row a site, what holds of all, the files."""
        return "\n".join(_lines(self))

    def as_json(self) -> dict[str, object]:
        """As plain data."""
        rows = [
            {"path": s.path, "rank": s.rank, "error": s.error, "cut": s.cut} for s in self.sites
        ]
        data: dict[str, object] = {
            "expression": self.expression,
            "how": self.how,
            "adapter": self.name,
            "exact": self.exact,
            "error": self.error,
            "sites": rows,
            "unchanged": [*self.unchanged],
            "notes": [*self.notes],
        }
        if self.saved is not None:
            data |= {"files": [str(p) for p in self.saved.files], "peft": self.saved.peft}
        return data


def _lines(made: Composition) -> Iterator[str]:
    rows = [[s.path or _ROOT, _number(s.rank), _share(s.error), _share(s.cut)] for s in made.sites]
    yield from aligned([["site", "rank", "off the sum", "cut off"], *rows])
    yield ""
    yield made.summary
    yield from (f"{path}: nothing is added, and it is left out" for path in made.unchanged)
    yield from made.notes
    if made.saved is not None:
        yield from (str(path) for path in made.saved.files)
        yield f"peft cannot read it: {made.saved.peft}" if made.saved.peft else "peft reads it"


_ROOT = "(the model itself)"


def _told(made: Composition) -> str:
    if made.exact:
        return "exactly that, but for the rounding of its tensors"
    if made.error is None:
        return "how far that is from the sum of the changes is not known"
    return f"off the sum of the changes by {made.error:.2e} of its length"


def _number(rank: int | None) -> str:
    return "–" if rank is None else str(rank)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}"
