"""What an adapter adds to a weight as one product B @ A: exact by its form, or cut off at a rank.

A form that has such a product keeps its numbers; of any other change of W the product of some rank
that is nearest to it is its truncated singular value decomposition (Eckart and Young, 1936).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from surgery.algebra.derive import parameters_in
from surgery.algebra.equations import Parameter
from surgery.algebra.expr import WEIGHT, Expr, depends_on
from surgery.algebra.factors import Factors, change, rank_of
from surgery.algebra.interpret import Domain, Evaluator
from surgery.algebra.kinds import beyond
from surgery.algebra.rules import is_zero
from surgery.algebra.scalars import Scalars, typed
from surgery.algebra.sums import difference
from surgery.arguments import Arguments, Link
from surgery.check import unstated
from surgery.errors import SurgeryError
from surgery.language import syntax as ast
from surgery.model import storage
from surgery.plan import Assignment, plan_assignments
from surgery.planned import PlannedSite, SiteClass

_linalg: Any = torch.linalg  # its functions carry no types


@dataclass(frozen=True, slots=True)
class Product:
    """left [out, rank] @ right [rank, in], in float64; of a batch of matrices stacked.

    error: the part of the change that is left out, as a ratio of lengths; None where the equation
    itself is such a product, and its numbers are these.
    """

    left: Tensor
    right: Tensor
    error: float | None

    @property
    def rank(self) -> int:
        """The columns of the left factor."""
        return int(self.right.shape[-2])


def obstacle(form: SiteClass) -> str:
    """Why what is put on a class of sites is no change of their weight alone; "" where it is."""
    still = form.derived.still
    if still is None:
        return f"it has no merged weight: {form.derived.reason}"
    if still.bias.op != "bias" and not is_zero(still.bias):
        return "it changes the bias as well, and a product beside the weight cannot"
    return ""


def known_rank(form: SiteClass) -> int | None:
    """The rank of the exact product, by the form of the equation; None where there is none."""
    factors = _factors(form)
    return None if factors is None else rank_of(factors, form.names)


def read_of(form: SiteClass) -> tuple[bool, frozenset[str]]:
    """Whether the change is made of the base's weight, and which parameters it is made of."""
    found = [e for pair in _factors(form) or () for e in pair] or [*filter(None, (_dense(form),))]
    reads = any(depends_on(e, WEIGHT) for e in found)
    return reads, frozenset(name for e in found for name in parameters_in(e))


def product(site: PlannedSite, tensors: Mapping[str, Tensor], rank: int | None) -> Product:
    """What a site's parameters add to its weight: exact, or of `rank` columns at most.

    tensors: by the names of the parameters. rank: needed where there is no exact product.
    """
    batch = site.site.batch
    each = [
        _product(site.form, _Values(site, tensors, index), rank)
        for index in ([None] if batch is None else range(batch))
    ]
    if batch is None:
        return each[0]
    errors = [one.error for one in each if one.error is not None]
    left, right = (torch.stack([getattr(one, n) for one in each]) for n in ("left", "right"))
    return Product(left, right, max(errors) if errors else None)


@lru_cache(maxsize=512)
def _factors(form: SiteClass) -> Factors | None:
    still = form.derived.still
    return None if still is None else change(still.weight, form.names)


def _dense(form: SiteClass) -> Expr | None:
    still = form.derived.still
    return None if still is None else difference(still.weight, WEIGHT)


def _product(form: SiteClass, values: _Values, rank: int | None) -> Product:
    factors = _factors(form)
    if factors is None:
        dense = _dense(form)
        assert rank is not None  # what has no exact product is asked for a rank before
        assert dense is not None  # no change at all is a product of no columns
        return nearest(values.of(dense), rank)
    sizes, wide = form.sizes, torch.float64
    none = torch.zeros(sizes.fan_out, 0, dtype=wide), torch.zeros(0, sizes.fan_in, dtype=wide)
    left = torch.cat([none[0], *(values.of(a) for a, _ in factors)], 1)
    right = torch.cat([none[1], *(values.of(b) for _, b in factors)], 0)
    if rank is None or right.shape[0] <= rank:
        return Product(left, right, None)
    return shortened(left, right, rank)


def shortened(left: Tensor, right: Tensor, rank: int) -> Product:
    """The nearest product of so many columns to another one, whose matrix is never made."""
    outer, inner = _linalg.qr(left)
    other, core = _linalg.qr(right.T)
    small = nearest(inner @ core.T, rank)
    return Product(outer @ small.left, small.right @ other.T, small.error)


def added(site: PlannedSite, tensors: Mapping[str, Tensor]) -> Tensor:
    """What a site's parameters add to its weight, in float64; of a batch of matrices stacked."""
    dense, batch = _dense(site.form), site.site.batch
    if dense is None:
        sizes = site.form.sizes
        lengths = (sizes.fan_out, sizes.fan_in)
        shape = lengths if batch is None else (batch, *lengths)
        return torch.zeros(shape, dtype=torch.float64)
    if batch is None:
        return _Values(site, tensors, None).of(dense)
    return torch.stack([_Values(site, tensors, index).of(dense) for index in range(batch)])


def nearest(change: Tensor, rank: int) -> Product:
    """The nearest product of so many columns to a matrix in float64, factors of equal lengths.

    Of a large matrix the singular vectors are found by subspace iteration (Halko, Martinsson and
    Tropp, 2011), which gives those of the `rank` largest values; the error is still measured.
    """
    left, values, right = _leading(change, rank)
    root = values.sqrt()
    found = Product(left * root, root[:, None] * right, None)
    total, rest = (float(m.square().sum()) for m in (change, change - found.left @ found.right))
    return Product(found.left, found.right, (rest / total) ** 0.5 if total else 0.0)


_SPARE, _TURNS = 16, 6
"""How many directions more than are wanted are followed, and how often."""


def _leading(change: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The singular vectors and values of the largest values, [out, rank], [rank], [rank, in]."""
    wide = rank + _SPARE
    if 4 * wide >= min(change.shape):
        left, values, right = _linalg.svd(change, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(change.shape[1], wide, generator=generator, dtype=torch.float64)
    basis = _linalg.qr(change @ drawn)[0]
    for _ in range(_TURNS):
        basis = _linalg.qr(change @ _linalg.qr(change.T @ basis)[0])[0]
    inner, values, right = _linalg.svd(basis.T @ change, full_matrices=False)
    return (basis @ inner)[:, :rank], values[:rank], right[:rank]


class _Values:
    """The values of a site's expressions in float64, of one matrix where it is a batch of them."""

    def __init__(self, site: PlannedSite, tensors: Mapping[str, Tensor], index: int | None) -> None:
        self.site = site
        self.tensors = tensors
        self.index = index
        self.shared = {p.name for p in site.form.parameters if p.shared}
        domain = Domain(site.form.names, self._leaf, lambda: torch.zeros((), dtype=torch.float64))
        self._evaluator = Evaluator(domain)

    def of(self, expr: Expr) -> Tensor:
        with torch.no_grad():
            return self._evaluator.value(expr)

    def _leaf(self, expr: Expr) -> Tensor:
        module, form, at = self.site.site.module, self.site.form, self.site.site.at
        name = expr.text("name") if expr.op == "parameter" else ""
        match expr.op:
            case "parameter":
                value = form.matrix(name, self.tensors[name])
            case "weight":
                value = storage.read(module, form.kind, at)
            case _:
                value = storage.read_bias(module, at)
        assert value is not None  # what reads the base is refused on meta
        if self.index is not None and name not in self.shared:
            value = value[self.index]
        return value.detach().to("cpu", torch.float64)


# ------------------------------------------------------------------------------------ the target


@dataclass(frozen=True, slots=True)
class Target:
    """A method that adds a product of two trained factors to W, times a number.

    argument: its rank. left, right: the names of the factors.
    """

    method: ast.Method
    argument: str
    left: str
    right: str

    def link(self, rank: int) -> Link:
        """The method at a rank, all other arguments being their defaults."""
        return Link(self.method, _filled(self.method, {self.argument: rank}))

    def scale(self, rank: int) -> float:
        """The number by which it multiplies the product."""
        return _scale(self, rank) or 1.0


@lru_cache(maxsize=64)
def target(method: ast.Method) -> Target | None:
    """The method as a target, or None if it adds something else than any product of its rank."""
    if beyond(method.kind):
        return None
    for argument in method.arguments:
        probe = _probe(method, argument.name, _PROBED) if argument.type == "int" else None
        shapes = {} if probe is None else {probe.form.shapes[p.name]: p for p in _factors_of(probe)}
        left, right = shapes.get((_OUT, _PROBED)), shapes.get((_PROBED, _IN))
        if left is None or right is None:
            continue
        found = Target(method, argument.name, left.name, right.name)
        if _scale(found, _PROBED) is not None:
            return found
    return None


_PROBED, _IN, _OUT = 3, 7, 5


def _factors_of(site: PlannedSite) -> tuple[Parameter, ...]:
    """The two parameters of a site; none if there are others, or they are not trained there."""
    found = site.form.parameters
    return found if len(found) == 2 and all(p.trained and not p.shared for p in found) else ()


def _probe(method: ast.Method, argument: str, rank: int) -> PlannedSite | None:
    """The method at a rank on a layer of its own; None where it does not fit there."""
    try:
        link = Link(method, _filled(method, {argument: rank}))
        made = plan_assignments(
            unstated("probe", method.span),
            nn.Sequential(nn.Linear(_IN, _OUT, device="cpu")),
            [Assignment("0", (link,), method.span)],
            "probe",
        )
    except SurgeryError:
        return None
    return made.sites[0]


@lru_cache(maxsize=256)
def _scale(found: Target, rank: int) -> float | None:
    """The number before B @ A, tried on numbers; None if the equation is another."""
    site = _probe(found.method, found.argument, rank)
    if site is None or obstacle(site.form) or site.form.derived.still is None:
        return None
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((_OUT, rank), (rank, _IN))
    )
    values = _Values(site, {found.left: left, found.right: right}, None)
    change = values.of(site.form.derived.still.weight) - values.of(WEIGHT)
    return _before(change, left @ right)


def number_before(site: PlannedSite, found: Target) -> float | None:
    """The number before B @ A at a site that has the target's method; None where it has another."""
    form, batch = site.form, site.site.batch
    dense = None if obstacle(form) or len(form.links) > 1 else _dense(form)
    if dense is None or form.method != found.method or depends_on(dense, WEIGHT):
        return None
    names = {p.name for p in form.parameters}
    if names != {found.left, found.right} or any(p.shared for p in form.parameters):
        return None
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(form.shapes[name], generator=generator, dtype=torch.float64)
        for name in (found.left, found.right)
    )
    tensors = {found.left: left, found.right: right}
    if batch is None:
        values = _Values(site, tensors, None)
    else:  # one matrix is as good as any
        values = _Values(site, {n: t[None] for n, t in tensors.items()}, 0)
    return _before(values.of(dense), left @ right)


def _before(change: Tensor, plain: Tensor) -> float | None:
    """The number that a matrix is times another one, if it is."""
    scale = float((change * plain).sum() / (plain * plain).sum())
    scale = float(round(scale)) if abs(scale - round(scale)) < _SAME else scale
    return scale if torch.allclose(change, scale * plain, rtol=_SAME, atol=_SAME) else None


_SAME = 1e-12


def _filled(method: ast.Method, given: Mapping[str, object]) -> Arguments:
    """The arguments of a method: given ones, and the defaults of the rest. Raises E104."""
    values: dict[str, object] = {}
    for a in method.arguments:
        if a.name in given:
            values[a.name] = given[a.name]
        elif a.default is not None:
            values[a.name] = typed(Scalars(values)(a.default), a.type, a.name, a.span)
    return tuple(values.items())
