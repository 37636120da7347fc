"""How the parameters of an adapter come into being, at a site or shared by many."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from surgery.algebra import observed
from surgery.algebra.axes import Size, evaluate
from surgery.algebra.bases import COMMON, basis_of
from surgery.algebra.beginnings import draw, drawn_again, stream
from surgery.algebra.cost import numbers
from surgery.algebra.derive import parameters_in
from surgery.algebra.equations import Parameter, Random, drawn_after
from surgery.algebra.expr import BIAS, WEIGHT, Expr, depends_on
from surgery.algebra.interpret import Domain, Evaluator
from surgery.algebra.observed import SIGHTS
from surgery.algebra.rules import constant
from surgery.model.endings import layer_number
from surgery.model.holder import parameters_of, shared_name
from surgery.model.hooked import execution_device
from surgery.model.parts import ParameterSlice
from surgery.model.storage import laid_out_like, read, read_bias, stored
from surgery.plan import Plan, PlannedSite, SharedParameter, SiteClass

Given = Callable[[Parameter], "Tensor | None"]

_NOTHING: Mapping[str, Tensor] = {}


def given_at(site: PlannedSite, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a site, by the names that it has for them, of tensors of a model's."""
    if not given:
        return {}
    names = {p.name: site.adapted(p.name) for p in site.form.parameters if not p.shared}
    # What is drawn again may be in no file, and whatever else must be was found missing before.
    return {name: given[adapted] for name, adapted in names.items() if adapted in given}


def site_tensors(
    site: PlannedSite, seed: int, given: Mapping[str, Tensor], seen: Mapping[str, Tensor] = _NOTHING
) -> dict[str, Tensor]:
    """The parameters of one site in their own dtype, on the device where it runs.

    given: values to use instead of the method's own beginning, and those of shared parameters, of
    which a beginning may be made. seen: what data showed there; see `algebra.observed`. Where the
    site is on meta, so is what begins there: *not yet*; a given value stays where it is.
    """
    batch, path = site.site.batch, site.path
    if batch is None:
        return _matrix_tensors(site, site.site.at, path, (seed, given, seen))
    # Each matrix of a batch begins as it would if it were a site by itself.
    at, shared = site.site.at, {p.name for p in site.form.parameters if p.shared}
    each = [
        _matrix_tensors(
            site,
            replace(at, index=i),
            _named(site, i),
            (
                seed,
                {n: t if n in shared else t[i] for n, t in given.items()},
                {n: t[i] for n, t in seen.items()},
            ),
        )
        for i in range(batch)
    ]
    return {name: torch.stack([one[name] for one in each]) for name in each[0]}


def _named(site: PlannedSite, index: int) -> str:
    """The path that one matrix of a batch has."""
    names = replace(site.site.at, index=index).names
    return ".".join([*filter(None, [site.site.owner]), *names])


_Told = tuple[int, Mapping[str, Tensor], Mapping[str, Tensor]]
"""The seed, what is given, and what data showed."""


def _matrix_tensors(
    site: PlannedSite, at: ParameterSlice, path: str, told: _Told
) -> dict[str, Tensor]:
    seed, given, seen = told
    form, module = site.form, site.site.module
    device = execution_device(module)
    made: dict[str, Tensor] = {}
    shared = {p.name: given[p.name] for p in form.parameters if p.shared and p.name in given}
    known = ChainMap(made, shared)
    leaves = Leaves(site, at, known, seen, (seed, site.adapter, path))
    values = Evaluator(Domain(form.names, leaves, lambda: torch.zeros((), dtype=torch.float64)))
    for p in form.parameters:
        if p.shared:
            continue
        if p.name in given:
            value = given[p.name]
            if p.name in form.lying:  # in the base's strides, so that the same kernels run
                value = laid_out_like(value, parameters_of(module)[at.parameter])
        elif _waits(p, known):
            value = torch.empty(_shape(p, form), device="meta")
        elif p.name in form.lying and p.beginning is WEIGHT and device.type != "meta":
            value = _copied(module, at, form.dtype)
        else:
            value = _begin(p, site, device, (seed, site.adapter, path), values)
        made[p.name] = placed(value, device, form.dtype_of(p))
    return made


def _waits(p: Parameter, known: Mapping[str, Tensor]) -> bool:
    """Whether it begins with what is not there yet."""
    read = parameters_in(p.beginning) if isinstance(p.beginning, Expr) else ()
    return any(name not in known or known[name].is_meta for name in read)


def placed(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A value where it belongs; where that is not known yet (meta), it stays where it is."""
    unknown = value.is_meta or device.type == "meta"
    return value.to(dtype=dtype) if unknown else value.to(device, dtype)


def shared_tensor(
    shared: SharedParameter, seed: int, device: torch.device, sites: Sequence[PlannedSite] = ()
) -> Tensor:
    """A parameter that many sites share, at its full size.

    sites: all of the model, in its order, for one that begins with what their W have in common. As
    long as one of those is on meta, so is what begins: *not yet*.
    """
    p = shared.parameter
    if device.type == "meta":
        return torch.empty(shared.shape, dtype=shared.dtype, device=device)
    if isinstance(p.beginning, Random):
        names = (seed, shared.adapter, shared.method)
        told = (shared.after, shared.base)
        return _drawn(p.beginning, p.name, shared.shape, names, told).to(device, shared.dtype)
    if p.beginning.op == COMMON:
        return _in_common(shared, p.beginning, sites).to(device, shared.dtype)
    value = evaluate(constant(p.beginning), {})
    return torch.full(shared.shape, value, dtype=shared.dtype, device=device)


def _in_common(shared: SharedParameter, beginning: Expr, sites: Sequence[PlannedSite]) -> Tensor:
    """The basis of the W of all sites that share it, rounded as these are.

    They stand by the numbers of their layers, and of those of one number the last stands alone.
    """
    mine = (s for s in sites if s.adapter == shared.adapter)
    matrices: dict[int, Sequence[Tensor]] = {}
    for place, site in enumerate(s for s in mine if _applies(s, shared.method)):
        if shared.key not in {site.form.bank(site.adapter, p) for p in site.form.parameters}:
            continue
        weight = read(site.site.module, site.form.kind, site.site.at)
        if weight is None:
            return torch.empty(shared.shape, dtype=shared.dtype, device="meta")
        matrices[layer_number(site.path, place)] = (weight,) if weight.dim() == 2 else tuple(weight)
    ordered = [matrix for number in sorted(matrices) for matrix in matrices[number]]
    ridge = evaluate(cast(Size, beginning.attr("ridge")), {})
    return basis_of(ordered, ridge).to(ordered[0].dtype)


def _applies(site: PlannedSite, method: str) -> bool:
    return any(link.method.name == method for link in site.form.links)


def _begin(
    p: Parameter,
    site: PlannedSite,
    device: torch.device,
    names: tuple[str | int, ...],
    values: Evaluator,
) -> Tensor:
    form = site.form
    shape = _shape(p, form)
    if device.type == "meta":
        return torch.empty(shape, dtype=form.dtype_of(p), device=device)
    if isinstance(p.beginning, Random):
        told = (drawn_after(p.beginning, form.names), site.site.dtype)
        return _drawn(p.beginning, p.of or p.name, shape, names, told)
    if p.beginning.op == "number":
        value = evaluate(constant(p.beginning), form.names)
        return torch.full(shape, value, dtype=form.dtype, device=device)
    with torch.no_grad():
        value = values.value(p.beginning)
        value = value.expand(shape) if value.dim() == 0 else value.reshape(shape)
        # A copy, for parts of it may be what others begin with; and as it would come from a file.
        return value.clone(memory_format=torch.contiguous_format)


def _shape(p: Parameter, form: SiteClass) -> tuple[int, ...]:
    """Of a parameter as it lies, of one matrix where the site is a batch of them."""
    return form.stored[p.name] if p.name in form.lying else form.shapes[p.name]


def _copied(module: nn.Module, at: ParameterSlice, dtype: torch.dtype) -> Tensor:
    """A copy of what a site is of a parameter, with its strides and no arithmetic."""
    own = stored(module, at)
    assert own is not None  # on meta nothing is begun
    return at.one(own).to(dtype, copy=True)


def _drawn(
    beginning: Random,
    name: str,
    shape: tuple[int, ...],
    names: tuple[str | int, ...],
    told: tuple[int | None, torch.dtype],
) -> Tensor:
    """told: how much is drawn before, and the dtype of the base, which others round it to."""
    arguments, (after, base) = dict(beginning.arguments), told
    if beginning.seed is None:
        return draw(beginning.distribution, arguments, shape, stream(*names, name))
    found = drawn_again(beginning.distribution, arguments, shape, beginning.seed, name, after)
    keeps = after is None or beginning.whole or not base.is_floating_point or base.itemsize < 2
    return found if keeps else found.to(base)


def redrawn(plan: Plan, names: Set[str]) -> Iterator[tuple[str, Tensor]]:
    """Of some parameters, by adapted names, those that have a seed, as that says them."""
    for shared in plan.shared:
        name = shared_name(shared.adapter, plan.groups[shared.key], shared.parameter.name)
        if name in names and isinstance(shared.parameter.beginning, Random):
            yield name, shared_tensor(shared, 0, torch.device("cpu"))
    for site in plan.sites:
        for p in site.form.parameters:
            if site.adapted(p.name) in names and isinstance(p.beginning, Random):
                yield site.adapted(p.name), _of_seed(p, p.beginning, site)


def _of_seed(p: Parameter, beginning: Random, site: PlannedSite) -> Tensor:
    told = (drawn_after(beginning, site.form.names), site.site.dtype)
    one = _drawn(beginning, p.of or p.name, _shape(p, site.form), (), told)
    return one if site.site.batch is None else torch.stack([one] * site.site.batch)


class Leaves:
    """What a beginning may read, in float64.

    W and b as they lie, the parameters before it, what data showed, and numbers that are drawn.
    """

    def __init__(
        self,
        site: PlannedSite,
        at: ParameterSlice,
        made: Mapping[str, Tensor],
        seen: Mapping[str, Tensor],
        stream_of: tuple[str | int, ...],
    ) -> None:
        """Read at a site; `stream_of` names the streams of what is drawn."""
        self.site = site
        self.at = at
        self.made = made
        self.seen = seen
        self.stream_of = stream_of

    def __call__(self, expr: Expr) -> Tensor:
        """The value of a leaf."""
        module = self.site.site.module
        if expr.op in SIGHTS:
            return _double(self.seen[expr.op])
        match expr.op:
            case observed.DRAWN:
                names = (*self.stream_of, observed.DRAWN, str(expr.attr("number")))
                shape = numbers(expr, self.site.form.names)
                return (
                    draw("normal", {}, shape, stream(*names)).double().to(execution_device(module))
                )
            case "parameter":
                name = expr.text("name")
                known, own = self.made[name], self.site.form
                if any(p.shared and p.name == name for p in own.parameters):  # as large as any asks
                    known = known[tuple(map(slice, own.shapes[name]))]
                return own.matrix(name, known).double()
            case "weight":
                return _double(read(module, self.site.form.kind, self.at))
            case _:
                bias = read_bias(module, self.at)
                absent = torch.zeros(self.site.form.sizes.fan_out, dtype=torch.float64)
                return absent if bias is None else _double(bias)


def _double(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # on meta nothing is begun
    # A copy in any case: what begins as W is trained, and must not be the base's own.
    return tensor.detach().to(torch.float64, copy=True)


def reads_base(p: Parameter) -> bool:
    """Whether a parameter begins with something computed from W or b."""
    begin = p.beginning
    return isinstance(begin, Expr) and (depends_on(begin, WEIGHT) or depends_on(begin, BIAS))
