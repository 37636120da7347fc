"""The data of a plan: the sites, what they share, the whole. All of it is frozen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import torch

from surgery.algebra.axes import names_in
from surgery.algebra.derive import parameters_in
from surgery.algebra.equations import Parameter
from surgery.algebra.expr import render
from surgery.algebra.observed import seen_by, sight
from surgery.algebra.places import shown as shown_places
from surgery.arguments import Arguments, Link
from surgery.check import Resolved
from surgery.errors import Diagnostic, Span
from surgery.language import syntax as ast
from surgery.model.holder import parameter_name
from surgery.model.parts import Part
from surgery.model.sites import Site
from surgery.model.tensors import buffers_beside
from surgery.rating import Rates, data_of, written
from surgery.report import aligned, shown_bytes, shown_shape
from surgery.site_class import SharedKey, SiteClass

if TYPE_CHECKING:
    from surgery.difference import PlanDiff
    from surgery.work import Work


@dataclass(frozen=True)
class PlannedSite:
    """One site with what is put on it, and what its statement has that learn at."""

    site: Site
    adapter: str
    form: SiteClass
    span: Span = field(compare=False, repr=False)
    rates: Rates = ()

    @property
    def path(self) -> str:
        """The dotted path of the site."""
        return self.site.path

    @property
    def holders(self) -> tuple[str, ...]:
        """The names of the holders of its parameters, from its module's own on."""
        return (self.adapter, *self.site.at.names)

    @property
    def call(self) -> str:
        """What is put on it, as a statement has it."""
        calls = enumerate(self.form.calls)
        every = " then ".join(f"{call}{written(self.rates, link)}" for link, call in calls)
        return every + shown_places(self.form.places)

    def adapted(self, name: str) -> str:
        """The name that one of its parameters has in the adapted model."""
        return parameter_name(self.site.owner, self.holders, name)


@dataclass(frozen=True)
class SharedParameter:
    """A parameter of all applications of a method with equal arguments in one adapter.

    shape: the largest that any of its sites asks for, in elements.
    base: the dtype of the weight of the first of them.
    after: where it goes on with the stream of others, how many numbers these take.
    """

    adapter: str
    method: str
    arguments: Arguments
    parameter: Parameter
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    base: torch.dtype
    after: int | None = None

    @property
    def key(self) -> SharedKey:
        """What names it within a plan."""
        return self.adapter, self.method, self.arguments, self.parameter.name


@dataclass(frozen=True, slots=True)
class MethodUse:
    """What a plan puts on some sites, and what becomes of it in a merge.

    method: by name, or a chain of them. on: the kind of site, `matrix`, `call` or, of a copy that
    is trained as it lies, `parameter`. sites: how many. merge: the class. reason: why it is in no
    weight; "" where it can be.
    """

    method: str
    on: str
    sites: int
    merge: str
    reason: str


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
        """The adapters by name, in the order of the file."""
        named = (name for name, _ in self.resolved.adapters)
        return tuple(dict.fromkeys([*named, *(site.adapter for site in self.sites)]))

    @cached_property
    def groups(self) -> Mapping[SharedKey, str]:
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
    def methods(self) -> tuple[MethodUse, ...]:
        """What is put on sites: the methods, each once for a kind of site and what it merges to."""
        every = Counter(map(_use, self.sites))
        return tuple(MethodUse(*use[:2], count, *use[2:]) for use, count in every.items())

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
                    yield prod(site.form.stored[p.name]), p.trained, site.form.dtype_of(p)
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
    lines += ["", *_equations(plan), *_merges(plan), "", *_totals(plan)]
    lines += [str(d) for d in plan.diagnostics]
    return "\n".join(lines)


def _row(site: PlannedSite, several: bool) -> list[str]:
    form = site.form
    trained = sum(prod(form.stored[p.name]) for p in form.parameters if p.trained)
    return [
        site.path or "(the model itself)",
        form.kind.name,
        " × ".join(map(str, _lengths(form))) or "a number",
        f"{site.adapter}: {site.call}" if several else site.call,
        " ".join(f"{n}{shown_shape(s)}" for n, s in form.stored.items()),
        f"{trained:,}",
        form.derived.merge_class,
    ]


def _lengths(form: SiteClass) -> tuple[int, ...]:
    """Of the axes of a site: batch, out and in, or those of a parameter that is no matrix."""
    if form.shape is not None:
        return form.shape
    if form.at.kind:  # the width of its hidden states
        return (form.sizes.fan_out,)
    matrix = (form.sizes.fan_out, form.sizes.fan_in)
    return matrix if form.batch is None else (form.batch, *matrix)


def _use(site: PlannedSite) -> tuple[str, str, str, str]:
    """The method of a site, its kind, and what becomes of it in a merge."""
    form = site.form
    on = "parameter" if form.at.tensor else form.derived.equations.kind.name
    return form.named, on, form.derived.merge_class, form.derived.reason


def _equations(plan: Plan) -> list[str]:
    told = dict.fromkeys(tuple(_told(site)) for site in plan.sites)
    return [line for lines in told for line in lines]


def _merges(plan: Plan) -> list[str]:
    """Where some of an adapter can merge and some cannot: a row a method, then what can be done."""
    stays = sum(site.form.derived.still is None for site in plan.sites)
    if stays in (0, len(plan.sites)):
        return []
    header = ["method", "on", "sites", "merge", "which means"]
    rows = [
        [one.method, one.on, f"{one.sites:,}", one.merge, one.reason or MERGE_NOTES[one.merge]]
        for one in plan.methods
    ]
    count = len(plan.sites)
    how = (
        f"merge(partial=True) merges at {count - stays} of {count} sites; the others go on running"
    )
    return ["", *aligned([header, *rows]), "", how]


def _told(site: PlannedSite) -> Iterator[str]:
    """A method's equation at a site, and what follows from it."""
    form = site.form
    note = form.derived.reason or MERGE_NOTES[form.derived.merge_class]
    yield f"{form.named}: {form.equation}"
    yield f"  {form.derived.merge_class}: {note}"
    if _adds_bias(site):
        yield f"  {form.named} adds a bias to layers that have none when it is merged"
    yield from _start(form)
    if site.site.at.tensor:
        what = f"{len(site.site.at.picked)} of its rows" if site.site.at.picked else "the parameter"
        yield f"  a copy of {what} is read and trained, and the base's own is not written"
        buffers = ", ".join(buffers_beside(site.site.module))
        if buffers:
            yield f"  not copied, for they are no parameters, are its buffers: {buffers}"
    elif form.mode == "value":
        yield "  W' is built whenever the weight is read, for the forward is not the layer's own"
    if site.site.tie is not None:
        yield f"  {_TIE_NOTES[site.site.tie]}"


def _start(form: SiteClass) -> Iterator[str]:
    equations = form.derived.equations
    taken = parameters_in(equations.start)
    kept = ", ".join(p.name for p in form.parameters if p.of or p.name in taken)
    if kept:
        yield f"  changes W at the start, by what is kept as {kept}; the base is not written"
    shown = ", ".join(render(sight(name)) for name in sorted(seen_by(equations)))
    if shown:
        yield f"  begins with {shown}, which is seen of data when it is compiled"
    counted = {share.name for share in equations.shares if share.count is not None}
    names = ", ".join(name for name, size in equations.changes if names_in(size) & counted)
    if names:
        yield f"  shared out among all sites of the method: {names}"


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
    lines += [f"made of other adapters: {one}" for one in plan.resolved.derived]
    if plan.resolved.live is not None:
        lines.append(f"live after compilation: {plan.resolved.live}")
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
        "methods": [asdict(one) for one in plan.methods],
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
        "derived": [one.as_json() for one in plan.resolved.derived],
        "live": None if plan.resolved.live is None else str(plan.resolved.live),
        "trainable": plan.trainable,
        "total": plan.total,
        "bytes": plan.bytes,
        "flops": {name: _work_json(plan.work(name)) for name in plan.adapters},
        "base": {"parameters": plan.base_count, "bytes": plan.base_bytes},
        "diagnostics": [d.as_json() for d in plan.diagnostics],
    }


def _rows(part: Part) -> dict[str, int]:
    return {"start": part.start, "stop": part.stop, "every": part.period, "of": part.whole}


def _site_json(site: PlannedSite) -> dict[str, object]:
    form = site.form
    return {
        "path": site.path,
        "adapter": site.adapter,
        "kind": form.kind.name,
        "in": form.sizes.fan_in,
        "out": form.sizes.fan_out,
        "layer": site.site.layer,
        "parameter": form.at.parameter,
        "matrix": form.at.index,
        "matrices": form.batch,
        "rows": [*form.at.picked] or (None if form.part is None else _rows(form.part)),
        "reached_by": form.mode,
        "dtype": _dtype(form.base_dtype),
        "bias": form.has_bias,
        **links_data(form.links),
        **data_of(site.rates),
        "equation": form.equation,
        "parameters": {
            p.name: {
                "shape": list(form.stored[p.name]),
                "trained": p.trained,
                "shared": p.shared,
                "dtype": _dtype(form.dtype_of(p)),
                "begins": p.begins,
            }
            for p in form.parameters
        },
        "merge": form.derived.merge_class,
        "reason": form.derived.reason,
        "adds_bias": _adds_bias(site),
        "flops": None if form.work is None else _work_json(form.work),
    }


def links_data(links: tuple[Link, ...]) -> dict[str, object]:
    """The first method and its arguments, and with `then` those of each that follows."""
    each = [{"method": k.method.name, "arguments": dict(k.arguments)} for k in links]
    return {**each[0], **({"then": each[1:]} if each[1:] else {})}


def _work_json(work: Work) -> dict[str, object]:
    return {"token": work.token, "call": work.call}


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
