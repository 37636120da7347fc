"""What a merge tells: what rounding lost and what is kept, site by site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from surgery.errors import Report, Span
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


# ------------------------------------------------------------------------------ what is accepted


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a merge may lose.

    max_rel_err: the largest rounding error of a site, as a share of its largest weight; None for
    any. nonfinite: whether merged weights may be infinite or no number.
    """

    max_rel_err: float | None = None
    nonfinite: bool = False

    def check(self, merged: MergeReport, spans: Mapping[str, Span | None]) -> None:
        """Of every site, with the span of the statement that chose it; raises as `check_site`."""
        found = Report()
        for site in merged.sites:
            self._tell(site.path, site.rounding, spans[site.path], found)
        found.stop()

    def check_site(self, path: str, rounding: Rounding) -> None:
        """Raises StateError: E430 for what is not finite, E431 for what rounding loses."""
        found = Report()
        self._tell(path, rounding, None, found)
        found.stop()

    def _tell(self, path: str, rounding: Rounding, span: Span | None, found: Report) -> None:
        if not (rounding.finite or self.nonfinite):
            message = f"`{path}`: of {rounding.elements:,} merged weights {_beyond(rounding)}"
            found.error(
                "E430",
                message,
                span,
                hint="look at the adapter's scale and at the dtype of the base; "
                "allow_nonfinite merges all the same",
            )
        if self.max_rel_err is not None and rounding.relative > self.max_rel_err:
            found.error(
                "E431",
                f"`{path}`: rounding is off by {rounding.relative:.1e} of the largest weight",
                span,
                hint=f"{self.max_rel_err:.1e} is accepted; a wider dtype rounds less",
            )


def _beyond(rounding: Rounding) -> str:
    counts = (
        (rounding.overflowed, "are beyond the range of its dtype"),
        (rounding.nonfinite, "are infinite or no number"),
    )
    return " and ".join(f"{count:,} {what}" for count, what in counts if count)
