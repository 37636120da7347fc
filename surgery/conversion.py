"""Saved adapters in another form: peft's folder, this program's own, or another method's sites.

Between the two forms of a folder no tensor changes by a bit. A method as the aim gets what the
adapter adds to each weight as one product of two factors, where it is a change of weights at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from surgery import low_rank, materialize
from surgery.algebra.scalars import did_you_mean
from surgery.artifact import Loaded, SaveReport, check_tensors, load_artifact, save_adapter
from surgery.check import unstated
from surgery.errors import Report, refuse
from surgery.language.library import Library
from surgery.mapping import Reason, peft_config
from surgery.model.holder import shared_name
from surgery.model.hooked import execution_device
from surgery.plan import Assignment, plan_assignments
from surgery.planned import Plan, PlannedSite

PEFT, NATIVE = "peft", "native"


@dataclass(frozen=True, slots=True)
class ConvertedSite:
    """One site of the adapter that was written.

    rank: of the product that is added to its weight. error: the part of the change that is left
    out, as a ratio of lengths (Frobenius norms); None where nothing is.
    """

    path: str
    rank: int
    error: float | None


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written. `str` is a table, `as_json` plain data.

    sites: where another method was the aim. unchanged: the paths of sites to which the adapter
    adds nothing, and which are left out. notes: what holds in training alone, and is not carried.
    """

    saved: SaveReport
    to: str
    sites: tuple[ConvertedSite, ...] = ()
    unchanged: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether no site lost anything but to the rounding of its factors."""
        return all(site.error is None for site in self.sites)

    def __str__(self) -> str:
        """As lines: the sites with what they lost, what was left out, the files."""
        return "\n".join(_lines(self))

    def as_json(self) -> dict[str, object]:
        """As plain data."""
        return {
            "to": self.to,
            "files": [str(path) for path in self.saved.files],
            "peft": self.saved.peft,
            "exact": self.exact,
            "sites": [{"path": s.path, "rank": s.rank, "error": s.error} for s in self.sites],
            "unchanged": list(self.unchanged),
            "notes": list(self.notes),
        }


def _lines(made: Conversion) -> Iterator[str]:
    for site in made.sites:
        error = "exact" if site.error is None else f"relative error {site.error:.2e}"
        yield f"{site.path}: rank {site.rank}, {error}"
    yield from (f"{path}: unchanged, and left out" for path in made.unchanged)
    yield from made.notes
    yield from (str(path) for path in made.saved.files)
    if made.to != NATIVE:
        yield f"peft cannot read it: {made.saved.peft}" if made.saved.peft else "peft reads it"


def convert(
    directory: str | Path,
    output: str | Path,
    model: nn.Module,
    *,
    to: str = PEFT,
    rank: int | None = None,
) -> Conversion:
    """Write a saved adapter, ours or peft's, to a new folder in another form.

    model: what the adapter is for; it is not touched, and may lie on meta unless `needs_weights`.
    to: `peft`, `native`, or a method that adds a product of two trained factors to W. rank: of that
    product; by default each site has the exact one that its equation has by its form, if any, and
    with a rank the nearest of that rank where there is none of at most so many columns.
    Raises ArtifactError: E520 if the folder has files already, E523 for an adapter or a method that
    does not allow it, and as `attach` does for the folder; PlanError where it does not fit the
    model. Nothing is written then.
    """
    check_output(Path(output))
    if rank is not None and rank < 1:
        refuse("E523", f"there is no product of rank {rank}", hint="a rank is 1 or more")
    opened = open_adapter(Path(directory), model)
    made = opened if to in (PEFT, NATIVE) else _changed(opened, model, to, rank)
    config = peft_config(made.plan, made.loaded.adapter, model)
    if to == PEFT and isinstance(config, Reason):
        hint = "convert it --to native, or to a method that peft knows"
        refuse("E523", f"peft has no form for {directory}: {config.text}", hint=hint)
    loaded = made.loaded
    saved = save_adapter(
        Path(output),
        made.plan,
        loaded.adapter,
        loaded.tensors,
        loaded.seed,
        loaded.base,
        peft=to != NATIVE,
        model=model,
    )
    return Conversion(saved, to, made.sites, made.unchanged, made.notes)


def needs_weights(directory: str | Path, model: nn.Module, *, to: str = PEFT) -> bool:
    """Whether a conversion reads the base's weights, so that a model on meta would not do.

    Raises as `convert` does for a folder or a model that does not fit.
    """
    loaded = load_artifact(Path(directory), model)
    plan = _plan(loaded, model)
    short = any(lacking(site, loaded) for site in plan.sites)
    if short or to in (PEFT, NATIVE):
        return short
    return any(low_rank.read_of(s.form)[0] for s in plan.sites if not s.site.at.tensor)


def check_output(output: Path) -> None:
    """Raises ArtifactError (E520) for what is there and is no empty folder."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        refuse("E520", f"`{output}` exists already", hint="name a folder that does not")


# --------------------------------------------------------------------------------- what is there


@dataclass(frozen=True, slots=True)
class Opened:
    """An adapter with its plan, all its tensors, and what is to be said of it."""

    loaded: Loaded
    plan: Plan
    sites: tuple[ConvertedSite, ...] = ()
    unchanged: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def open_adapter(directory: Path, model: nn.Module) -> Opened:
    """The adapter of a folder with all its tensors, those too that it leaves out.

    Raises as `load_artifact` does, and E523 for tensors that are made of a base that is on meta.
    """
    loaded = load_artifact(directory, model)
    plan = _plan(loaded, model)
    check_tensors(plan, loaded)
    tensors = {**loaded.tensors, **shared_again(plan, loaded)}
    loaded = replace(loaded, tensors=tensors)
    report = Report()
    for site in plan.sites:
        name = lacking(site, loaded)
        if name and execution_device(site.site.module).type == "meta":
            report.error("E523", f"`{name}` of `{site.path}` is made of the base", hint=_WEIGHTS)
    report.stop()
    for site in plan.sites:
        made = tensors_at(site, plan, loaded) if lacking(site, loaded) else {}
        own = {site.adapted(p.name): p.name for p in site.form.parameters if not p.shared}
        tensors |= {a: made[n] for a, n in own.items() if a not in tensors and n in made}
    return Opened(replace(loaded, tensors=tensors), plan)


_WEIGHTS = "give the model with its weights"


def _plan(loaded: Loaded, model: nn.Module) -> Plan:
    return plan_assignments(loaded.resolved, model, loaded.assignments, loaded.adapter)


def lacking(site: PlannedSite, loaded: Loaded) -> str:
    """A parameter of a site that the file does not have, for it can be made again; "" for none."""
    own = (p.name for p in site.form.parameters if not p.shared)
    return next((name for name in own if site.adapted(name) not in loaded.tensors), "")


def shared_again(plan: Plan, loaded: Loaded) -> dict[str, Tensor]:
    """What sites share and the file does not have, drawn again by its seed."""
    found: dict[str, Tensor] = {}
    for shared in plan.shared:
        name = shared_name(shared.adapter, plan.groups[shared.key], shared.parameter.name)
        if name not in loaded.tensors:
            cpu = torch.device("cpu")
            found[name] = materialize.shared_tensor(shared, loaded.seed, cpu)
    return found


def tensors_at(site: PlannedSite, plan: Plan, loaded: Loaded) -> dict[str, Tensor]:
    """The parameters of a site by their names, shared ones cut to what it uses."""
    given: dict[str, Tensor] = {}
    for p in site.form.parameters:
        if not p.shared:
            own = loaded.tensors.get(site.adapted(p.name))
            given |= {} if own is None else {p.name: own}
            continue
        key = site.form.bank(site.adapter, p)
        value = loaded.tensors[shared_name(site.adapter, plan.groups[key], p.declared_name)]
        for axis, length in enumerate(site.form.shapes[p.name]):
            value = value.narrow(axis, 0, length)
        given[p.name] = value
    if all(p.name in given for p in site.form.parameters):
        return given
    return {**given, **materialize.site_tensors(site, loaded.seed, given)}


# ------------------------------------------------------------------------------- another method


def _changed(opened: Opened, model: nn.Module, to: str, rank: int | None) -> Opened:
    """The adapter with each of its sites as a product; copies of parameters stay as they are."""
    aim = target_of(to)
    matrices = tuple(s for s in opened.plan.sites if not s.site.at.tensor)
    _check(matrices, rank)
    products = {
        site.path: low_rank.product(site, tensors_at(site, opened.plan, opened.loaded), rank)
        for site in matrices
    }
    assignments = tuple(_assignments(opened, aim, products))
    unchanged = tuple(path for path, one in products.items() if not one.rank)
    plan = plan_assignments(
        unstated(opened.loaded.adapter, aim.method.span),
        model,
        assignments,
        opened.loaded.adapter,
    )
    loaded = replace(
        opened.loaded,
        resolved=plan.resolved,
        assignments=assignments,
        tensors=dict(_named(plan, opened, aim, products)),
    )
    sites = tuple(ConvertedSite(p, one.rank, one.error) for p, one in products.items() if one.rank)
    return Opened(loaded, plan, sites, unchanged, tuple(notes_of(matrices)))


def target_of(name: str) -> low_rank.Target:
    """A method that adds a product of two trained factors to W. Raises ArtifactError (E523)."""
    library = Library.standard()
    method = library.method(name)
    if method is None:
        near = did_you_mean(name, (PEFT, NATIVE, *library.names()))
        refuse("E523", f"there is no form and no method `{name}`", hint=near)
    found = low_rank.target(method)
    if found is None:
        refuse(
            "E523",
            f"`{name}` does not add just any product of two trained factors to W",
            hint="name a method whose equation is W' = W + B @ A, of A[r, in] and B[out, r]",
        )
    return found


def first_target() -> str:
    """Of the methods that add just any product, the one that formats spell first."""
    library = Library.standard()
    spelled = sorted(library.all_formats(), key=lambda form: form.span.start)
    methods = ((form.method, library.method(form.method)) for form in spelled)
    return next(n for n, m in methods if m is not None and low_rank.target(m) is not None)


def _check(sites: Iterable[PlannedSite], rank: int | None) -> None:
    """E523 for every class of sites of which no product can be made, with the reason."""
    report, seen = Report(), set[int]()
    for site in sites:
        if id(site.form) in seen:
            continue
        seen.add(id(site.form))
        reason = low_rank.obstacle(site.form)
        where = f"`{site.path}` has {site.form.named}"
        if reason:
            hint = "keep it as it is; merge it into the model where no adapter is wanted"
            report.error("E523", f"{where}: {reason}", hint=hint)
        elif rank is None and low_rank.known_rank(site.form) is None:
            hint = "give a rank for the nearest product, whose error is then said for each site"
            message = f"{where}, whose equation adds no product of few columns to W"
            report.error("E523", message, hint=hint)
        elif low_rank.read_of(site.form)[0] and execution_device(site.site.module).type == "meta":
            message = f"{where}, and what that adds to W is made of W"
            report.error("E523", message, hint=_WEIGHTS)
    report.stop()


def _assignments(
    opened: Opened, aim: low_rank.Target, products: Mapping[str, low_rank.Product]
) -> Iterator[Assignment]:
    for site, before in zip(opened.plan.sites, opened.loaded.assignments, strict=True):
        if site.site.at.tensor:
            yield before
        elif products[site.path].rank:
            yield replace(before, links=(aim.link(products[site.path].rank),))


def _named(
    plan: Plan,
    opened: Opened,
    aim: low_rank.Target,
    products: Mapping[str, low_rank.Product],
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the new sites by their names, and those of the copies that stay."""
    before = opened.loaded.tensors
    for site in plan.sites:
        if site.site.at.tensor:
            yield from ((n, before[n]) for p in site.form.parameters if (n := site.adapted(p.name)))
            continue
        one, dtype = products[site.path], site.form.dtype
        yield site.adapted(aim.left), (one.left / aim.scale(one.rank)).to(dtype).contiguous()
        yield site.adapted(aim.right), one.right.to(dtype).contiguous()


def notes_of(sites: Iterable[PlannedSite]) -> Iterator[str]:
    """What holds of sites in training alone, and is not carried to another method."""
    dropped = [s for s in sites if _drops(s)]
    if dropped:
        yield f"dropout in training is not carried ({dropped[0].path} and others alike had it)"


def _drops(site: PlannedSite) -> bool:
    derived = site.form.derived
    return derived.merged is not None and derived.merged != derived.still
