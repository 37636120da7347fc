"""What of an adapter a merge puts into the weights, and what goes on running beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from surgery.errors import Report, Span, refuse
from surgery.planned import PlannedSite
from surgery.quantized import Taken, merged_by

LEAVE = "keep such an adapter unmerged; it runs as it is"
"""What can be done where no site of an adapter can merge."""


def can_merge(site: PlannedSite) -> bool:
    """Whether there is a weight that computes what is put on a site."""
    return site.form.derived.still is not None


def goes_in(sites: Sequence[PlannedSite], what: Taken, partial: bool) -> tuple[PlannedSite, ...]:
    """The sites that are merged; the others go on running as adapters.

    partial: leave those that cannot merge, which are refused otherwise.
    """
    own = merged_by(sites, what)
    return tuple(filter(can_merge, own)) if partial else own


def stays(sites: Iterable[PlannedSite], merged: Iterable[PlannedSite]) -> tuple[PlannedSite, ...]:
    """The sites that are not among those that are merged."""
    here = {site.path for site in merged}
    return tuple(site for site in sites if site.path not in here)


def report_lost(sites: Iterable[PlannedSite], hint: str, report: Report) -> None:
    """E403 for sites that cannot merge: one of each statement and reason, naming every site."""
    found: dict[tuple[Span | None, str], list[str]] = {}
    for site in sites:
        if not can_merge(site):
            found.setdefault((site.span, site.form.derived.reason), []).append(site.path)
    for (span, reason), paths in found.items():
        report.error("E403", f"{listed(paths)} cannot merge: {reason}", span, hint=hint)


def check_some(sites: Sequence[PlannedSite], merged: Sequence[PlannedSite], live: str) -> None:
    """Raises StateError (E495) where nothing of what is live is to be merged."""
    if merged:
        return
    reasons = dict.fromkeys(_reason(site) for site in sites)
    first = sites[0].span if sites else None
    message = f"nothing of `{live}` can merge: {'; '.join(reasons)}"
    refuse("E495", message, first, hint=LEAVE)


def _reason(site: PlannedSite) -> str:
    return site.form.derived.reason or "its weights are quantised, and stay as they are"


def listed(paths: Sequence[str]) -> str:
    """Some paths as a sentence has them."""
    *most, last = (f"`{path}`" for path in paths)
    return f"{', '.join(most)} and {last}" if most else last
