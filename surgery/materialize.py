"""How the parameters of an adapter come into being, at a site or shared by many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor

from surgery.algebra.axes import evaluate
from surgery.algebra.beginnings import draw, stream
from surgery.algebra.equations import Parameter, Random
from surgery.algebra.expr import BIAS, WEIGHT, Expr, depends_on
from surgery.algebra.interpret import Domain, Evaluator
from surgery.algebra.rules import constant
from surgery.model.hooked import execution_device
from surgery.model.parts import cut
from surgery.model.storage import read, read_bias
from surgery.plan import PlannedSite, SharedParameter, SiteClass

Given = Callable[[Parameter], "Tensor | None"]


def site_tensors(site: PlannedSite, seed: int, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of one site in their own dtype, on the device where it runs.

    given: values to use instead of the method's own beginning. Where the site is on meta, so is
    what begins there: *not yet*; a given value stays where it is.
    """
    form, module = site.form, site.site.module
    device = execution_device(module)
    made: dict[str, Tensor] = {}
    domain = Domain(form.names, _Leaves(site, made), lambda: torch.zeros((), dtype=torch.float64))
    for p in form.parameters:
        if p.shared:
            continue
        if p.name in given:
            value = given[p.name]
        else:
            value = _begin(p, form, device, (seed, site.adapter, site.path), Evaluator(domain))
        made[p.name] = placed(value, device, form.dtype)
    return made


def placed(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A value where it belongs; where that is not known yet (meta), it stays where it is."""
    return value.to(dtype=dtype) if device.type == "meta" else value.to(device, dtype)


def shared_tensor(shared: SharedParameter, seed: int, device: torch.device) -> Tensor:
    """A parameter that many sites share, at its full size."""
    p = shared.parameter
    if device.type == "meta":
        return torch.empty(shared.shape, dtype=shared.dtype, device=device)
    if isinstance(p.beginning, Random):
        names = (seed, shared.adapter, shared.method)
        return _drawn(p.beginning, p.name, shared.shape, names).to(device, shared.dtype)
    value = evaluate(constant(p.beginning), {})
    return torch.full(shared.shape, value, dtype=shared.dtype, device=device)


def _begin(
    p: Parameter,
    form: SiteClass,
    device: torch.device,
    names: tuple[str | int, ...],
    values: Evaluator,
) -> Tensor:
    shape = form.shapes[p.name]
    if device.type == "meta":
        return torch.empty(shape, dtype=form.dtype, device=device)
    if isinstance(p.beginning, Random):
        return _drawn(p.beginning, p.name, shape, names)
    if p.beginning.op == "number":
        value = evaluate(constant(p.beginning), form.names)
        return torch.full(shape, value, dtype=form.dtype, device=device)
    with torch.no_grad():
        value = values.value(p.beginning)
        return value.expand(shape) if value.dim() == 0 else value


def _drawn(
    beginning: Random, name: str, shape: tuple[int, ...], names: tuple[str | int, ...]
) -> Tensor:
    source = (beginning.seed,) if beginning.seed is not None else names
    generator = stream(*cast(tuple[str | int, ...], source), name)
    return draw(beginning.distribution, dict(beginning.arguments), shape, generator)


class _Leaves:
    """What a beginning may read: W and b as they lie, and the parameters before it; in float64."""

    def __init__(self, site: PlannedSite, made: Mapping[str, Tensor]) -> None:
        self.site = site
        self.made = made

    def __call__(self, expr: Expr) -> Tensor:
        module = self.site.site.module
        match expr.op:
            case "parameter":
                return self.made[expr.text("name")].double()
            case "weight":
                return cut(self.site.site.part, _double(read(module, self.site.form.kind)))
            case _:
                bias = read_bias(module)
                absent = torch.zeros(self.site.form.sizes.fan_out, dtype=torch.float64)
                return absent if bias is None else cut(self.site.site.part, _double(bias))


def _double(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # on meta nothing is begun
    return tensor.detach().double()


def reads_base(p: Parameter) -> bool:
    """Whether a parameter begins with something computed from W or b."""
    begin = p.beginning
    return isinstance(begin, Expr) and (depends_on(begin, WEIGHT) or depends_on(begin, BIAS))
