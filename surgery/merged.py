"""A site of a model, merged into its weights and taken out of them, and what a merge tells.

A merge never writes into a base tensor. With an exact undo it keeps corrections in place of the
base where arithmetic leads back, and gives the very same parameter back where somebody holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal
from weakref import ref

import torch
from torch import Tensor, nn

from surgery import merging, quantized
from surgery.algebra.beginnings import stream
from surgery.algebra.rows import is_reproducible
from surgery.checksums import Checksum, checksum, machine
from surgery.merge_report import MergeReport, SiteMerge
from surgery.merging import How, Leaves, MergedMatrix, leaves_of
from surgery.model import storage
from surgery.model.holder import parameters_of
from surgery.model.hooked import execution_device
from surgery.model.stored import Kept
from surgery.planned import PlannedSite
from surgery.precision import Round, Rounding, measured, rounded
from surgery.quantized import NOTHING_SAID, Taken

Undo = Literal["exact", "algebraic", "none"]


@dataclass(frozen=True, slots=True)
class Options:
    """How a merge is done: what it keeps, how it rounds, and by which seed where by chance.

    quantized: what becomes of quantised weights. holds: whether the base's own tensors are kept
    where corrections could be, since they are there anyway. partial: whether what cannot merge
    goes on running.
    """

    undo: Undo = "exact"
    round: Round = "nearest"
    seed: int = 0
    quantized: Taken = NOTHING_SAID
    holds: bool = False
    partial: bool = False


class Released:
    """A parameter that a merge replaced and does not hold: itself, as long as another holds it."""

    def __init__(self, parameter: nn.Parameter | None) -> None:
        """Let go of it."""
        self._held = None if parameter is None else ref(parameter)

    def parameter(self) -> nn.Parameter | None:
        """The very object, or None."""
        return None if self._held is None else self._held()

    def __reduce__(self) -> tuple[Callable[..., Released], tuple[None]]:
        """A copy of a model has parameters of its own."""
        return Released, (None,)

    def __deepcopy__(self, memo: dict[int, object]) -> Released:
        """As `__reduce__`."""
        return Released(None)


NOBODY = Released(None)


@dataclass(frozen=True, slots=True)
class MergedSite:
    """What a merge kept of one site.

    weight, bias: the base's own, where they were replaced and are kept. released: the base's own
    weight where corrections are kept in its place. matrices: of each matrix what was found and
    kept. told: a checksum of the parameters that it was made of; sums: of each merged matrix,
    where the undo is exact. machine: on which it was merged.
    """

    site: PlannedSite
    matrices: tuple[MergedMatrix, ...] = ()
    weight: Kept | None = None
    bias: Kept | None = None
    released: Released = field(default=NOBODY)
    told: str = ""
    sums: tuple[str, ...] = ()
    machine: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def packed(self) -> bool:
        """Whether corrections lead back, and not the base itself."""
        return any(matrix.packed is not None for matrix in self.matrices)

    @property
    def rounding(self) -> Rounding:
        """What rounding lost, over all matrices."""
        return sum((matrix.rounding for matrix in self.matrices), Rounding())


# --------------------------------------------------------------------------------------- there


def merge_site(site: PlannedSite, parameters: Mapping[str, Tensor], options: Options) -> MergedSite:
    """Put a site's adapter into its weight and bias; if that fails, all is as it was.

    What is kept is what leads back whatever the undo; see `without_base`.
    """
    module, at, kind = site.site.module, site.site.at, site.form.kind
    whole = storage.read(module, kind, at)
    assert whole is not None  # checked before anything was changed
    new_weight, new_bias = merging.changes(site.form.derived)
    packs = new_weight and options.undo == "exact" and not options.holds and _leads_back(site)
    dtype = quantized.dtype_of(site.site, options.quantized)
    made = torch.empty(whole.shape, dtype=dtype, device=whole.device)
    drawn = stream(options.seed, "merge", site.path) if options.round != "nearest" else None
    how = How(dtype, options.round, drawn)
    bias = storage.read_bias(module, at)
    matrices = tuple(
        merging.merge(leaves, _rows_of(one), _rows_into(into), how, keep=packs)
        for leaves, one, into in zip(
            _leaves_of(site, parameters, bias), _each(site, whole), _each(site, made), strict=True
        )
    )
    done = MergedSite(site, matrices, told=_told(parameters), machine=machine())
    if new_weight:
        done = replace(done, weight=storage.detach_parameter(module, at, "weight"))
    if new_bias:
        done = replace(done, bias=storage.detach_parameter(module, at, "bias"))
    try:
        if new_weight:
            done = _installed(done, made, whole, options)
        if new_bias:
            new = _joined([matrix.bias for matrix in matrices if matrix.bias is not None], site)
            own = parameters_of(module).get(at.bias)
            own_dtype = dtype if own is None else own.dtype
            storage.write_bias(module, kind, at, rounded(new, own_dtype))
    except BaseException:
        put_back(done)
        raise
    if packs and done.weight is not None:
        done = replace(done, weight=None, released=Released(done.weight.parameter))
    return done


def _installed(done: MergedSite, made: Tensor, whole: Tensor, options: Options) -> MergedSite:
    """Let a site have its merged weight; what is quantised again is not what was made."""
    site, what = done.site, options.quantized
    if quantized.packing_at(site.site) is None:
        install(site, made)
        return done
    now = quantized.install(site, made, what)
    if what.how != "requantize":
        return done
    every = zip(done.matrices, _each(site, made), _each(site, now), _each(site, whole), strict=True)
    lost = (replace(m, rounding=measured(a.double(), b, c)) for m, a, b, c in every)
    # A call may lay codes out anew, and round their scales, so nothing tells whether they changed.
    return replace(done, matrices=tuple(lost), sums=())


LEAST = 2**16
"""Bytes of a weight from which on corrections are kept; below that they would not pay."""


def _leads_back(site: PlannedSite) -> bool:
    """Whether corrections may stand for the base: arithmetic leads back, and the base is here."""
    inverse = site.form.derived.inverse.weight
    plain = storage.storage_of(site.site.module, site.site.at.parameter) is storage.PLAIN
    # A bias that is trained is small, and another site may change it after this one.
    if not plain or inverse is None or site.site.at.tensor or _weight_bytes(site) < LEAST:
        return False
    # What is computed otherwise elsewhere is seen in the last bits, of which 16 have none.
    return is_reproducible(inverse) or site.form.base_dtype.itemsize <= 2


def without_base(merged: MergedSite) -> MergedSite:
    """What is kept by a merge that does not keep the base."""
    return replace(merged, weight=None)


def _leaves_of(
    site: PlannedSite, parameters: Mapping[str, Tensor], bias: Tensor | None
) -> tuple[Leaves, ...]:
    """As `merging.leaves_of`, to compute where the site's module does if it can."""
    device = execution_device(site.site.module)
    device = torch.device("cpu") if device.type in _NO_DOUBLE else device
    return leaves_of(site, parameters, bias, device)


_NO_DOUBLE = frozenset({"mps"})
"""Devices without float64; their blocks are sent to the CPU."""


def _each(site: PlannedSite, whole: Tensor) -> Sequence[Tensor]:
    """Every matrix of a site, or bias, of one or of a batch."""
    return (whole,) if site.site.batch is None else tuple(whole)


def _joined(each: Sequence[Tensor], site: PlannedSite) -> Tensor:
    return each[0] if site.site.batch is None else torch.stack([*each])


def _rows_of(matrix: Tensor) -> merging.Read:
    return lambda start, stop: matrix[start:stop]


def _rows_into(matrix: Tensor) -> merging.Write:
    def write(start: int, stop: int, rows: Tensor) -> None:
        matrix[start:stop].copy_(rows)

    return write


def _told(parameters: Mapping[str, Tensor]) -> str:
    """A checksum of an adapter's parameters at a site."""
    found = Checksum()
    for _, value in sorted(parameters.items()):
        found.add(value)
    return found.hexdigest()


def install(site: PlannedSite, matrix: Tensor) -> None:
    """The site's weight becomes another, and the rest of its parameter stays."""
    storage.write(site.site.module, site.form.kind, site.site.at, matrix)
    _follow(site)


def _follow(site: PlannedSite) -> None:
    """Let the layers that share a site's weight share what it is now."""
    name = site.site.at.parameter
    for follower in site.site.followers:
        parameters_of(follower)[name] = parameters_of(site.site.module)[name]


# ---------------------------------------------------------------------------------------- back


def is_edited(merged: MergedSite) -> bool:
    """Whether the merged weight is no longer what the merge wrote, where that can be told.

    A base that is kept follows a model that was cast since; corrections are of the old dtype.
    """
    site = merged.site
    whole = storage.read(site.site.module, site.form.kind, site.site.at)
    if not merged.sums or whole is None:
        return False
    if whole.dtype != site.form.base_dtype and not merged.packed:
        return False
    return merged.sums != _sums(merged, whole)


def with_sums(merged: MergedSite) -> MergedSite:
    """The same with the checksums of what its merged weight is now."""
    packs = [matrix.packed for matrix in merged.matrices if matrix.packed is not None]
    if packs:
        return replace(merged, sums=tuple(kept.merged for kept in packs))
    whole = storage.read(merged.site.site.module, merged.site.form.kind, merged.site.site.at)
    changed, _ = merging.changes(merged.site.form.derived)
    return merged if whole is None or not changed else replace(merged, sums=_sums(merged, whole))


def _sums(merged: MergedSite, whole: Tensor) -> tuple[str, ...]:
    return tuple(Checksum().add(one).hexdigest() for one in _each(merged.site, whole))


def is_told_otherwise(merged: MergedSite, parameters: Mapping[str, Tensor]) -> bool:
    """Whether the adapter's parameters are no longer those that were merged."""
    return merged.told != _told(parameters)


def base_matrix(merged: MergedSite, parameters: Mapping[str, Tensor]) -> Tensor | None:
    """The base's matrix of a site, made again to the bit; None where this machine fails to."""
    site = merged.site
    whole = storage.read(site.site.module, site.form.kind, site.site.at)
    assert whole is not None
    packs = [m.packed for m in merged.matrices if m.packed is not None]
    made = torch.empty(whole.shape, dtype=packs[0].dtype, device=whole.device)
    every = zip(
        _leaves_of(site, parameters, _base_bias(merged)),
        merged.matrices,
        packs,
        _each(site, whole),
        _each(site, made),
        strict=True,
    )
    for leaves, matrix, kept, one, into in every:
        try:
            base, _ = merging.unmerge(
                leaves, matrix.witnesses, kept, _rows_of(one), _rows_into(into)
            )
        except ValueError:
            return None
        if base != kept.base:
            return None
    return made


def base_parameter(
    group: Sequence[MergedSite], tensors: Callable[[PlannedSite], Mapping[str, Tensor]]
) -> Tensor | None:
    """The base's own parameter in its stored layout, of which all that was merged is a group.

    None where it is not kept, is elsewhere and not to be had, or this machine fails to make it.
    """
    first = group[0].site.site
    whole = storage.stored(first.module, first.at)
    for merged in reversed(group):
        if merged.weight is not None:
            whole = merged.weight.tensor()
        elif merged.packed and whole is not None:
            base = base_matrix(merged, tensors(merged.site))
            if base is None:
                return None
            whole = storage.with_matrix(whole, merged.site.form.kind, merged.site.site.at, base)
    return whole


def _base_bias(merged: MergedSite) -> Tensor | None:
    site = merged.site.site
    if merged.bias is None:
        return storage.read_bias(site.module, site.at)
    kept = merged.bias.tensor()
    return None if kept is None else storage.bias_of(site.at, kept)


def held(merged: MergedSite) -> MergedSite | None:
    """The same with the base itself, where somebody holds it, unchanged; else None."""
    parameter, site = merged.released.parameter(), merged.site
    if parameter is None or not site.site.at.whole:
        return None
    matrix = storage.matrix_of(site.form.kind, site.site.at, parameter.detach())
    packs = [m.packed for m in merged.matrices if m.packed is not None]
    if [kept.base for kept in packs] != [*_sums(merged, matrix)]:
        return None
    return replace(merged, weight=Kept(parameter))


def restore(merged: MergedSite, base: Tensor) -> None:
    """Hold the base's matrix again, made anew: in the very object if somebody holds it."""
    site = merged.site
    install(site, base)
    parameter = merged.released.parameter()
    now = parameters_of(site.site.module)[site.site.at.parameter]
    if parameter is not None and now is not None and _same_bits(parameter, now):
        storage.put_back(site.site.module, site.site.at, "weight", Kept(parameter))
        _follow(site)
    put_back(merged)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    same = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return same and checksum(one) == checksum(other)


def put_back(merged: MergedSite) -> None:
    """Hold again what was kept of the base."""
    module, at = merged.site.site.module, merged.site.site.at
    if merged.weight is not None:
        storage.put_back(module, at, "weight", merged.weight)
        _follow(merged.site)
    if merged.bias is not None:
        storage.put_back(module, at, "bias", merged.bias)


def by_arithmetic(merged: MergedSite, parameters: Mapping[str, Tensor]) -> Tensor | None:
    """The base's matrix as arithmetic alone gives it; None where that is not finite."""
    site = merged.site
    whole = storage.read(site.site.module, site.form.kind, site.site.at)
    assert whole is not None
    made = torch.empty_like(whole)
    every = zip(
        _leaves_of(site, parameters, _base_bias(merged)),
        merged.matrices,
        _each(site, whole),
        _each(site, made),
        strict=True,
    )
    finite = [
        merging.inverted(leaves, matrix.witnesses, _rows_of(one), _rows_into(into))
        for leaves, matrix, one, into in every
    ]
    return made if all(finite) else None


# ---------------------------------------------------------------------------------- the report


def reported(merged: Iterable[MergedSite]) -> MergeReport:
    """The report on what was merged."""
    return MergeReport(tuple(map(_site_merge, merged)))


def _site_merge(merged: MergedSite) -> SiteMerge:
    packs = [m.packed for m in merged.matrices if m.packed is not None]
    value = None if merged.weight is None else merged.weight.tensor()
    size = _weight_bytes(merged.site)
    if packs:
        return SiteMerge(
            merged.site.path, merged.rounding, "corrections", sum(p.bytes for p in packs), size
        )
    if value is not None:
        return SiteMerge(merged.site.path, merged.rounding, "base", size, size)
    return SiteMerge(merged.site.path, merged.rounding, "nothing", 0, size)


def _weight_bytes(site: PlannedSite) -> int:
    weight = storage.read(site.site.module, site.form.kind, site.site.at)
    changed, _ = merging.changes(site.form.derived)
    return 0 if weight is None or not changed else weight.numel() * weight.element_size()
