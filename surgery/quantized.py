"""Sites whose weights lie in few bits: how a merge takes them, and what it makes of them.

A merged weight is no longer one of few bits, so a person says what becomes of it: `dequantize`, the
layer becomes a plain one; `requantize`, it is quantised again, which loses about as much as it did
the first time; `separate`, such layers go on running their adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from surgery.errors import Report, refuse
from surgery.model import storage
from surgery.model.holder import Holder, modules_of, parameters_of
from surgery.model.hooked import packing_of
from surgery.model.inventory import Site
from surgery.model.stored import Packing
from surgery.planned import PlannedSite

Quantized = Literal["dequantize", "requantize", "separate"]
"""What a merge makes of a quantised weight."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What a merge makes of quantised weights.

    how: None where nothing is said of them. dtype: of the plain layers that it makes of quantised
    ones; None for that in which each computes.
    """

    how: Quantized | None = None
    dtype: torch.dtype | None = None


NOTHING_SAID = Taken()

_REMEDIES = (
    "merge(quantized='dequantize') makes plain layers of them, 'requantize' quantises again, "
    "'separate' leaves them as they are, with their adapters"
)


def packing_at(site: Site) -> Packing | None:
    """What is known of a site's weight where it lies in few bits now; None where it does not."""
    row = packing_of(site.module, site.at.parameter)
    return None if row is None else row.packing


def check(sites: Iterable[PlannedSite], how: Quantized | None, undo: str, report: Report) -> None:
    """What keeps quantised sites from being merged so.

    Raises StateError (E424) where `how` is no such word. E424 is reported where there are
    quantised sites and nothing is said of them, E425 where they are to be undone by arithmetic.
    """
    if how is not None and how not in get_args(Quantized):
        refuse("E424", f"there is no quantized={how!r}", hint=_REMEDIES)
    found = [site for site in sites if packing_at(site.site) is not None]
    if not found or how == "separate":
        return
    first, span = found[0].path, found[0].span
    more = f" and at {len(found) - 1} more" if len(found) > 1 else ""
    if how is None:
        message = f"the weight at `{first}`{more} is quantised, and what it becomes is not said"
        report.error("E424", message, span, hint=_REMEDIES)
    elif undo == "algebraic":
        message = f"the weight at `{first}`{more} is quantised: arithmetic does not give it back"
        hint = "merge with undo='exact', which keeps the quantised weights, or undo='none'"
        report.error("E425", message, span, hint=hint)


def merged_by(sites: Sequence[PlannedSite], what: Taken) -> tuple[PlannedSite, ...]:
    """The sites that are merged; the others go on running as adapters.

    A module runs one or the other, so all sites of a module with a quantised weight stay.
    """
    if what.how != "separate":
        return tuple(sites)
    stay = {id(s.site.module) for s in sites if packing_of(s.site.module) is not None}
    return tuple(s for s in sites if id(s.site.module) not in stay)


def taken(model: nn.Module, how: Quantized | None) -> Taken:
    """What a merge of a model makes of its quantised weights.

    A plain layer takes inputs of its own dtype alone, so it has that of the model's other weights,
    the first of them.
    """
    modules = (m for _, m in modules_of(model) if not isinstance(m, Holder))
    dense = (m for m in modules if packing_of(m) is None)
    found = (p.dtype for m in dense for p in parameters_of(m).values() if p is not None)
    return Taken(how, next((dtype for dtype in found if dtype.is_floating_point), None))


def dtype_of(site: Site, what: Taken) -> torch.dtype:
    """The dtype that a merged weight is rounded to, before it may be quantised again."""
    packing = packing_at(site)
    if packing is None or what.how != "dequantize":
        weight = storage.seen(site.module, site.at.parameter)
        assert weight is not None
        return weight.dtype
    return what.dtype or packing.computes(site.module) or packing.dtype


def install(site: PlannedSite, matrix: Tensor, what: Taken) -> Tensor:
    """Let a site have a merged weight [out, in]; gives what its layer computes with from now on.

    matrix: in `dtype_of`. What was there is kept by `storage.detach_parameter` before, whose
    `storage.put_back` gives the very object back.
    """
    at, module, kind = site.site.at, site.site.module, site.form.kind
    packing = packing_at(site.site)
    if packing is not None and what.how == "dequantize":
        whole = matrix
        if at.part is not None:  # what the module has besides is a plain weight as well
            read = storage.read(module, kind, replace(at, part=None))
            assert read is not None  # on meta nothing is merged
            whole = read.to(matrix.dtype)
        packing.unpack(module, whole)
    if packing is None or what.how != "dequantize" or at.part is not None:
        storage.write(module, kind, at, matrix)
    found = storage.read(module, kind, at)
    assert found is not None
    return found
