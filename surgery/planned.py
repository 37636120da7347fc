"""The data of a plan: classes of sites that are alike, the sites, what they share, the whole.

All of it is frozen, and all that is derived from a class of sites is derived once for the class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import torch

from surgery.algebra.axes import Size, evaluate
from surgery.algebra.derive import Derived
from surgery.algebra.equations import Parameter
from surgery.algebra.expr import render
from surgery.check import Arguments, Resolved
from surgery.errors import Diagnostic, Span
from surgery.language import syntax as ast
from surgery.model.holder import parameter_name
from surgery.model.layers import Geometry, LayerKind, Mode, Sizes
from surgery.model.parts import Part
from surgery.model.sites import Site
from surgery.report import aligned, shown, shown_bytes, shown_shape

if TYPE_CHECKING:
    from surgery.difference import PlanDiff
    from surgery.work import Work


@dataclass(frozen=True)
class SiteClass:
    """A method with its arguments at one shape of site.

    shapes: of each parameter, in elements, as this site sees it.
    dtype: of the parameters.
    part: which rows of the layer's matrix the sites are, if not all.
    mode: how the layer is reached.
    """

    method: ast.Method
    arguments: Arguments
    derived: Derived
    kind: LayerKind
    sizes: Sizes
    geometry: Geometry | None
    has_bias: bool
    base_dtype: torch.dtype
    dtype: torch.dtype
    part: Part | None = None
    mode: Mode = "call"

    def __hash__(self) -> int:
        """The hash of all fields, computed once: a class stands for hundreds of sites."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    def __getstate__(self) -> dict[str, object]:
        """The fields alone; what is derived from them is derived anew, hashes above all."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __deepcopy__(self, memo: dict[int, object]) -> SiteClass:
        """Itself, since it is immutable and shared by all sites that are alike."""
        return self

    @cached_property
    def names(self) -> Mapping[str, int | float]:
        """The sizes by their names in equations."""
        return dict(self.sizes.names)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each parameter in elements."""
        return {p.name: self.numbers(p.shape) for p in self.parameters}

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The declared parameters, in order."""
        return self.derived.equations.parameters

    def numbers(self, shape: tuple[Size, ...]) -> tuple[int, ...]:
        """A symbolic shape in elements."""
        return tuple(int(evaluate(s, self.names)) for s in shape)

    @cached_property
    def work(self) -> Work | None:
        """What a forward takes beyond the base's; None where the equation cannot run there."""
        from surgery.work import extra_work

        return extra_work(self, self.names)

    @cached_property
    def equation(self) -> str:
        """The equation as derived: `W' = …`, and `b' = …` where it is not b."""
        return _equation(self.derived)


def _equation(derived: Derived) -> str:
    merged, equations = derived.still, derived.equations
    if merged is None:
        weights = (("W'", equations.weight), ("b'", equations.bias))
        given = (*weights, ("x'", equations.input), ("y'", equations.output))
        return ", ".join(f"{name} = {render(e)}" for name, e in given if e is not None)
    parts = [] if merged.weight.op == "weight" else [f"W' = {render(merged.weight)}"]
    if merged.bias.op not in ("bias", "zeros"):
        parts.append(f"b' = {render(merged.bias)}")
    return ", ".join(parts) or "W' = W"


@dataclass(frozen=True)
class PlannedSite:
    """One site with what is put on it."""

    site: Site
    adapter: str
    form: SiteClass
    span: Span = field(compare=False, repr=False)

    @property
    def path(self) -> str:
        """The dotted path of the site."""
        return self.site.path

    @property
    def holders(self) -> tuple[str, ...]:
        """The names of the holders of its parameters, from its module's own on."""
        part = self.site.part
        return (self.adapter,) if part is None else (self.adapter, part.name)

    def adapted(self, name: str) -> str:
        """The name that one of its parameters has in the adapted model."""
        return parameter_name(self.site.owner, self.holders, name)


SharedKey = tuple[str, str, Arguments, str]
"""An adapter, a method, its arguments and a parameter's name."""


@dataclass(frozen=True)
class SharedParameter:
    """A parameter of all applications of a method with equal arguments in one adapter.

    shape: the largest that any of its sites asks for, in elements.
    """

    adapter: str
    method: str
    arguments: Arguments
    parameter: Parameter
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def key(self) -> SharedKey:
        """What names it within a plan."""
        return self.adapter, self.method, self.arguments, self.parameter.name


@dataclass(frozen=True)
class Plan:
    """What a spec does to a model. `str` is a table; `as_json` plain data.

    base_count, base_bytes: of the model's own parameters, tied ones counted once.
    """

    resolved: Resolved
    sites: tuple[PlannedSite, ...]
    shared: tuple[SharedParameter, ...]
    base_count: int
    base_bytes: int
    diagnostics: tuple[Diagnostic, ...] = ()

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters by name, in the order of the file; the first is the live one."""
        named = (name for name, _ in self.resolved.adapters)
        return tuple(dict.fromkeys([*named, *(site.adapter for site in self.sites)]))

    @cached_property
    def groups(self) -> Mapping[tuple[str, str, Arguments, str], str]:
        """For each shared parameter the group it is kept in: its method's name.

        Groups of one method with different arguments in one adapter are numbered from 2.
        """
        names: dict[tuple[object, ...], str] = {}
        taken: dict[tuple[str, str], int] = {}
        for shared in self.shared:
            group = (shared.adapter, shared.method, shared.arguments)
            if group not in names:
                count = taken[group[:2]] = taken.get(group[:2], 0) + 1
                names[group] = shared.method if count == 1 else f"{shared.method}_{count}"
        return {s.key: names[s.adapter, s.method, s.arguments] for s in self.shared}

    @cached_property
    def trainable(self) -> int:
        """The number of trainable elements, shared ones counted once."""
        return sum(count for count, trained, _ in self._tensors() if trained)

    @cached_property
    def total(self) -> int:
        """The number of elements of all adapters, frozen ones included."""
        return sum(count for count, _, _ in self._tensors())

    @cached_property
    def bytes(self) -> int:
        """The memory of all adapters, in bytes."""
        return sum(count * dtype.itemsize for count, _, dtype in self._tensors())

    def work(self, adapter: str) -> Work:
        """What a forward with an adapter takes beyond the base's, if each site sees each token."""
        from surgery.work import Work

        found = (s.form.work for s in self.sites if s.adapter == adapter)
        return sum((work for work in found if work is not None), Work(0, 0))

    def diff(self, other: Plan) -> PlanDiff:
        """What another plan does otherwise: sites that one of them lacks, and sites that differ."""
        from surgery.difference import difference

        return difference(self.as_json(), other.as_json())

    def _tensors(self) -> Iterator[tuple[int, bool, torch.dtype]]:
        for site in self.sites:
            for p in site.form.parameters:
                if not p.shared:
                    yield prod(site.form.shapes[p.name]), p.trained, site.form.dtype
        for shared in self.shared:
            yield prod(shared.shape), shared.parameter.trained, shared.dtype

    def __str__(self) -> str:
        """The table: a row a site, then the equations, then the totals."""
        return _table(self)

    def as_json(self) -> dict[str, object]:
        """The plan as plain data."""
        return _as_json(self)


# ------------------------------------------------------------------------------- how it is shown

MERGE_NOTES = {
    "exact": "merging changes no weight",
    "algebraic": "the merge can be undone by arithmetic alone",
    "witness": "undoing the merge needs a vector that the merge keeps",
    "snapshot": "undoing the merge needs the base weight itself",
    "none": "cannot be merged",
}


_TIE_NOTES: Mapping[ast.Tie, str] = {
    "share": "the layers that share this weight change with it",
    "untie": "merging gives the site a weight of its own",
}


def _table(plan: Plan) -> str:
    """The table: a row a site, then the equations, then the totals."""
    several = len(plan.adapters) > 1
    header = ["site", "kind", "out × in", "method", "parameters", "trained", "merge"]
    rows = [_row(site, several) for site in plan.sites]
    lines = aligned([header, *rows])
    lines += ["", *_equations(plan), "", *_totals(plan)]
    lines += [str(d) for d in plan.diagnostics]
    return "\n".join(lines)


def _row(site: PlannedSite, several: bool) -> list[str]:
    form = site.form
    call = f"{form.method.name}({_arguments(site)})"
    trained = sum(prod(form.shapes[p.name]) for p in form.parameters if p.trained)
    return [
        site.path or "(the model itself)",
        form.kind.name,
        f"{form.sizes.fan_out} × {form.sizes.fan_in}",
        f"{site.adapter}: {call}" if several else call,
        " ".join(f"{n}{shown_shape(s)}" for n, s in form.shapes.items()),
        f"{trained:,}",
        form.derived.merge_class,
    ]


def _arguments(site: PlannedSite) -> str:
    return ", ".join(f"{n}={shown(v)}" for n, v in site.form.arguments)


def _equations(plan: Plan) -> list[str]:
    told = dict.fromkeys(tuple(_told(site)) for site in plan.sites)
    return [line for lines in told for line in lines]


def _told(site: PlannedSite) -> Iterator[str]:
    """A method's equation at a site, and what follows from it."""
    form = site.form
    note = form.derived.reason or MERGE_NOTES[form.derived.merge_class]
    yield f"{form.method.name}: {form.equation}"
    yield f"  {form.derived.merge_class}: {note}"
    if _adds_bias(site):
        yield f"  {form.method.name} adds a bias to layers that have none when it is merged"
    if form.mode == "value":
        yield "  W' is built whenever the weight is read, for the forward is not the layer's own"
    if site.site.tie is not None:
        yield f"  {_TIE_NOTES[site.site.tie]}"


def _adds_bias(site: PlannedSite) -> bool:
    merged = site.form.derived.still
    return merged is not None and not site.form.has_bias and merged.bias.op != "zeros"


def _totals(plan: Plan) -> list[str]:
    share = plan.trainable / plan.base_count if plan.base_count else 0
    lines = [
        f"{len(plan.sites)} sites, {plan.trainable:,} trainable of {plan.total:,} adapter "
        f"parameters, {shown_bytes(plan.bytes)}",
        f"the base has {plan.base_count:,} parameters, {shown_bytes(plan.base_bytes)}; "
        f"{share:.3%} of that is trained",
    ]
    lines += [_flops(plan, name) for name in plan.adapters]
    if plan.shared:
        names = ", ".join(
            f"{s.method}.{s.parameter.name}{shown_shape(s.shape)}" for s in plan.shared
        )
        lines.append(f"shared by all their sites and counted once: {names}")
    return lines


def _flops(plan: Plan, adapter: str) -> str:
    work = plan.work(adapter)
    named = f" with `{adapter}`" if len(plan.adapters) > 1 else ""
    once = f", and {work.call:,} a call" if work.call else ""
    return f"a forward{named} takes {work.token:,} FLOPs more for each token{once}"


def _as_json(plan: Plan) -> dict[str, object]:
    """The plan as plain data, one object a site."""
    return {
        "sites": [_site_json(site) for site in plan.sites],
        "shared": [
            {
                "adapter": s.adapter,
                "method": s.method,
                "arguments": dict(s.arguments),
                "name": s.parameter.name,
                "shape": list(s.shape),
                "trained": s.parameter.trained,
                "dtype": _dtype(s.dtype),
                "begins": s.parameter.begins,
            }
            for s in plan.shared
        ],
        "adapters": list(plan.adapters),
        "trainable": plan.trainable,
        "total": plan.total,
        "bytes": plan.bytes,
        "flops": {name: _work_json(plan.work(name)) for name in plan.adapters},
        "base": {"parameters": plan.base_count, "bytes": plan.base_bytes},
        "diagnostics": [d.as_json() for d in plan.diagnostics],
    }


def _site_json(site: PlannedSite) -> dict[str, object]:
    form = site.form
    return {
        "path": site.path,
        "adapter": site.adapter,
        "kind": form.kind.name,
        "in": form.sizes.fan_in,
        "out": form.sizes.fan_out,
        "layer": site.site.layer,
        "rows": None if form.part is None else [form.part.start, form.part.stop],
        "reached_by": form.mode,
        "dtype": _dtype(form.base_dtype),
        "bias": form.has_bias,
        "method": form.method.name,
        "arguments": dict(form.arguments),
        "equation": form.equation,
        "parameters": {
            p.name: {
                "shape": list(form.shapes[p.name]),
                "trained": p.trained,
                "shared": p.shared,
                "dtype": _dtype(form.dtype),
                "begins": p.begins,
            }
            for p in form.parameters
        },
        "merge": form.derived.merge_class,
        "reason": form.derived.reason,
        "adds_bias": _adds_bias(site),
        "flops": None if form.work is None else _work_json(form.work),
    }


def _work_json(work: Work) -> dict[str, object]:
    return {"token": work.token, "call": work.call}


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
