"""What a merge tells: what rounding lost and what is kept, site by site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surgery.precision import Rounding
from surgery.report import aligned, shown_bytes

Way = Literal["corrections", "base", "nothing"]
"""What leads back from a merge: corrections of what arithmetic gives, or the base itself."""


@dataclass(frozen=True, slots=True)
class SiteMerge:
    """What a merge did to one site.

    rounding: what rounding lost. kept: the bytes kept for the way back, of so many of the weight.
    way: `corrections` of what arithmetic gives, the `base` itself, or `nothing`.
    """

    path: str
    rounding: Rounding
    way: Way
    kept: int
    bytes: int


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did, site by site; `str` is a table."""

    sites: tuple[SiteMerge, ...]

    @property
    def kept(self) -> int:
        """The bytes kept for the way back."""
        return sum(site.kept for site in self.sites)

    @property
    def bytes(self) -> int:
        """The bytes of the merged weights."""
        return sum(site.bytes for site in self.sites)

    def as_json(self) -> dict[str, object]:
        """The report as plain data."""
        return {"kept": self.kept, "bytes": self.bytes, "sites": [*map(_plain, self.sites)]}

    def __str__(self) -> str:
        """A row a site, then the totals."""
        header = ["site", "rounding", "of the change", "overflowed", "kept", "of the weight"]
        lines = aligned([header, *map(_row, self.sites)])
        share = self.kept / self.bytes if self.bytes else 0.0
        total = f"{shown_bytes(self.kept)} are kept for the way back, {share:.2%} of the weights"
        return "\n".join([*lines, "", total])


def _row(site: SiteMerge) -> list[str]:
    found, share = site.rounding, site.kept / site.bytes if site.bytes else 0.0
    return [
        site.path or "(the model itself)",
        f"{found.relative:.1e}",
        f"{found.lost:.1e}",
        f"{found.overflowed:,}",
        f"{site.way}, {shown_bytes(site.kept)}" if site.kept else site.way,
        f"{share:.2%}",
    ]


def _plain(site: SiteMerge) -> dict[str, object]:
    found = site.rounding
    return {
        "path": site.path,
        "error": found.error,
        "relative_error": found.relative,
        "lost": found.lost,
        "overflowed": found.overflowed,
        "nonfinite": found.nonfinite,
        "way": site.way,
        "kept": site.kept,
        "bytes": site.bytes,
    }
