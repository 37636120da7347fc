"""Which base an adapter was made on: a digest of the weight at each of its sites.

A weight of up to `MOST` elements is digested whole, a larger one by rows that are spread evenly
over it: any training changes them, and the 224 weights of a 7B model take about half a second and
not ten. A weight is digested as the matrix of its site, so its storage makes no difference.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
from torch import Tensor, nn

from surgery.algebra.expr import WEIGHT, depends_on
from surgery.errors import refuse
from surgery.inverse import tensors_at
from surgery.merged import MergedSite, base_parameter
from surgery.model.storage import matrix_of, read
from surgery.planned import PlannedSite
from surgery.state import State, require_state

MOST = 2**20
"""Elements: 2 MiB in 16 bits, which SHA-256 takes 1.5 to 4 ms for."""


@dataclass(frozen=True, slots=True)
class Digest:
    """dtype: of the weight, by torch's name. sha256: over dtype, shape and bytes, in hexadecimals.

    The bytes are those of the rows in order, as this machine has them.
    """

    dtype: str
    sha256: str


def digest(matrix: Tensor, dtype: torch.dtype | None = None) -> Digest:
    """The digest of a weight [out, in], read as another dtype if one is given."""
    return digest_of(_sample(matrix.detach()), tuple(matrix.shape), dtype or matrix.dtype)


def digest_of(rows: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Digest:
    """The digest of a weight of a shape, of its rows that are `picked`."""
    name = str(dtype).removeprefix("torch.")
    rows = rows.cpu().to(dtype).contiguous()
    found = hashlib.sha256(f"{name} {list(shape)} ".encode())
    # The bytes where they lie: `Tensor.numpy` would ask for a package that is not needed otherwise.
    count = rows.numel() * rows.element_size()
    found.update((ctypes.c_char * count).from_address(rows.data_ptr()) if count else b"")
    return Digest(name, found.hexdigest())


def _sample(matrix: Tensor) -> Tensor:
    rows = picked(tuple(matrix.shape))
    return matrix if rows is None else matrix.index_select(0, rows.to(matrix.device))


def picked(shape: tuple[int, ...]) -> Tensor | None:
    """The rows that are digested, which depend on the shape alone; None for all of them."""
    if prod(shape) <= MOST:
        return None
    count = min(shape[0], max(2, MOST * shape[0] // prod(shape)))
    return torch.arange(count) * (shape[0] - 1) // (count - 1)


# ---------------------------------------------------------------------------------- of a base


def base_digests(model: nn.Module, sites: Iterable[PlannedSite]) -> dict[str, Digest]:
    """The digest of the base's own weight at each site, by path; merged weights are not the base's.

    A site is left out where that weight is not there to be read: on meta, or after a merge that
    did not keep it; where it is quantised; and where W' is not made of W, as of a head that is
    drawn anew at each load, or of a site that is no weight.
    """
    state = require_state(model)
    merged: dict[tuple[int, str], list[MergedSite]] = {}
    for one in state.merged.values():
        merged.setdefault(_parameter(one.site), []).append(one)
    found: dict[str, Digest] = {}
    for site in sites:
        group = merged.get(_parameter(site), [])
        kept = not group or state.options.undo == "exact"
        weight = _base_weight(model, state, site, group) if kept and _reads_base(site) else None
        if weight is not None and not weight.is_meta:
            found[site.path] = digest(weight)
    return found


def _reads_base(site: PlannedSite) -> bool:
    still = site.form.derived.still
    if site.site.at.kind:  # which is in no weight
        return False
    return not site.form.kind.packed and (still is None or depends_on(still.weight, WEIGHT))


def _parameter(site: PlannedSite) -> tuple[int, str]:
    return id(site.site.module), site.site.at.parameter


def _base_weight(
    model: nn.Module, state: State, site: PlannedSite, group: Sequence[MergedSite]
) -> Tensor | None:
    if not group:
        return read(site.site.module, site.form.kind, site.site.at)
    stored = base_parameter(group, lambda one: tensors_at(model, state, one))
    return None if stored is None else matrix_of(site.form.kind, site.site.at, stored)


def check_base(sites: Iterable[PlannedSite], stated: Mapping[str, Digest], where: str) -> None:
    """Whether an adapter was made on these very weights. Raises ArtifactError (E522) if not.

    A weight is compared as the dtype that is stated, so a base may be loaded wider than it was.
    What has no digest, or no data yet (meta), is not compared, nor is what is quantised.
    """
    found = [s for s in sites if not s.form.kind.packed]
    compared = [(s, stated[s.path]) for s in found if s.path in stated]
    others = [(s, d) for s, d in compared if not _agrees(s, d)]
    if not others:
        return
    site, first = others[0]
    name = str(site.form.base_dtype).removeprefix("torch.")
    narrower = f"load the base in {first.dtype}, as it was; it is in {name}"
    other = "attach it to the base that it was made on"
    hint = other if first.dtype == name else narrower
    refuse(
        "E522",
        f"{where} was made on another base: of {len(compared)} weights {len(others)} differ, "
        f"the first at `{site.path}`",
        hint=f"{hint}; or attach it all the same, with force=True",
    )


def _agrees(site: PlannedSite, stated: Digest) -> bool:
    matrix = read(site.site.module, site.form.kind, site.site.at)
    if matrix is None:
        return True
    dtype = cast("torch.dtype", getattr(torch, stated.dtype))
    if dtype != matrix.dtype and not (dtype.is_floating_point and matrix.is_floating_point()):
        return False
    return digest(matrix, dtype) == stated
