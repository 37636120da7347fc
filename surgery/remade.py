"""What a folder leaves out because the base or a seed says it, made again where that is asked.

What has a seed is drawn again before it is left out, and compared. A file whose tensors are in
pieces by a parameter that it lacks is read rightly only if that is here what it was there; so it is
made while the folder is read, and held against all that the file tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.errors import Report
from surgery.mapping import StateDictMapping
from surgery.mapping.keys import Row
from surgery.mapping.pieces import Several, pieces_of, sizes_of
from surgery.materialize import redrawn, site_tensors
from surgery.planned import Plan, PlannedSite
from surgery.store import TensorFile

_CLOSE = 1e-2  # of the largest element: files may have 16 bits, and other machines other rounding


def with_remade(
    plan: Plan,
    mapping: StateDictMapping,
    file: TensorFile,
    tensors: Mapping[str, Tensor],
    form: str,
) -> dict[str, Tensor]:
    """The tensors by adapted names, and of the base what the pieces of some are cut by.

    file, form: where they come from, and under which keys they stand there. Raises ArtifactError
    (E518) where the base here says something else than the file does, or nothing yet (meta).
    """
    report, found = Report(), dict(tensors)
    rows = {row.adapted: row for row in mapping.rows}
    for site in plan.sites:
        own = {p.name: rows.get(site.adapted(p.name)) for p in site.form.parameters}
        cut = [(row, p) for row in own.values() if row and (p := _pieces(row, form)) and p.by]
        if cut and site.adapted(cut[0][1].by) not in found:
            _Remade(site, found, file, form).complete(sorted(cut, key=_narrow), report)
    report.stop()
    return found


def unlike_drawn(
    plan: Plan, mapping: StateDictMapping, tensors: Mapping[str, Tensor], form: str
) -> str:
    """A tensor, by its adapted name, that a form has no key for and its seed says otherwise; or "".

    mapping: of one adapter.
    """
    left = {r.adapted for r in mapping.rows if r.redrawn and r.key(form) is None}
    for name, again in redrawn(plan, left & tensors.keys()):
        tensor = tensors[name].detach()
        if not tensor.is_meta and not torch.equal(again.to(tensor.dtype), tensor.cpu()):
            return name
    return ""


def _pieces(row: Row, form: str) -> Several | None:
    return pieces_of(row.key(form) or "")


def _narrow(cut: tuple[Row, Several]) -> bool:
    return cut[1].within


@dataclass(frozen=True, slots=True)
class _Remade:
    """One site with what is known of its tensors, by adapted names."""

    site: PlannedSite
    found: dict[str, Tensor]
    file: TensorFile
    form: str

    def complete(self, cut: Sequence[tuple[Row, Several]], report: Report) -> None:
        """Add the groups, or say why what the file has is not made of them."""
        names = {p.name: self.site.adapted(p.name) for p in self.site.form.parameters}
        again = {p.name for p in self.site.form.parameters if p.redrawn}
        given = {n: self.found[a] for n, a in names.items() if a in self.found and n not in again}
        made = site_tensors(self.site, 0, given)
        by = cut[0][1].by
        if made[by].is_meta:
            message = f"which rows of `{self.site.path}` stand together is seen in its weights"
            report.error("E518", message, hint="they are on meta; load them before the adapter")
            return
        alike = all(_alike(made[n], self.found[names[n]]) for n in again if names[n] in self.found)
        for row, pieces in cut:
            there = [self.file.shapes[key] for key in pieces.keys]
            here = pieces.shapes(row.file_shape(self.form), sizes_of(made[by]))
            if there != here or not alike:
                message = (
                    f"`{pieces.keys[0]}` … are of {_lengths(there)} rows, and the weights of "
                    f"`{self.site.path}` ask for {_lengths(here) if here != there else 'others'}"
                )
                report.error("E518", message, hint=_OTHER_BASE)
                return
        self.found[names[by]] = made[by]


_OTHER_BASE = "attach the adapter to the base that it was trained on, neither quantised nor changed"


def _lengths(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(str(shape[0]) for shape in shapes)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two are near, whatever the signs: those of singular vectors are nobody's choice."""
    one, other = one.abs().double().cpu(), other.abs().double().cpu()
    return bool((one - other).abs().max() <= _CLOSE * one.max())
