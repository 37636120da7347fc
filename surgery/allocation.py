"""A budget that shrinks while an adapter is trained: which elements of trained vectors are kept.

Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023,
arXiv:2303.10512, sections 3.1 to 3.3. A method that says of an argument `r' = kept(E)` takes part:
E is the vector whose elements compete, and every parameter with an axis that is declared as r long
goes along with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.algebra.axes import size, symbol
from surgery.algebra.mentions import nodes
from surgery.errors import refuse
from surgery.language import syntax as ast
from surgery.mount import parameter_of
from surgery.planned import PlannedSite
from surgery.redistribution import changed, with_arguments
from surgery.runtime import Compiled
from surgery.state import Adapter, require_state
from surgery.switching import chosen
from surgery.tensors import tensors_of

if TYPE_CHECKING:
    from surgery.artifact import SaveReport

_linalg: Any = torch.linalg  # its functions carry no types


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a budget shrinks, and how importance is smoothed, by peft's names.

    target_r: elements a site, on the average, in the end. tinit, tfinal: steps at either end in
    which nothing is taken away. deltaT: every how many steps between them it is. total_step: of
    the training. beta1, beta2: of the running means of importance and of its uncertainty.
    orth_reg_weight: of the term that keeps directions apart.
    """

    total_step: int
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5

    @property
    def last(self) -> int:
        """The step at which the budget is at its end."""
        return self.total_step - self.tfinal

    def budget(self, step: int, whole: int, target: int) -> int:
        """How many elements are left at a step, of `whole` at first and `target` in the end."""
        if step <= self.tinit:
            return whole
        if step > self.last:
            return target
        left = 1 - (step - self.tinit) / (self.last - self.tinit)
        return int((whole - target) * left**3 + target)

    def objection(self) -> str:
        """What is wrong with it; "" if nothing is."""
        if not 0 <= self.tinit < self.last <= self.total_step:
            return "tinit must come before total_step - tfinal, and neither below 0"
        if self.target_r < 1 or self.deltaT < 1:
            return "target_r and deltaT are 1 or more"
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            return "beta1 and beta2 lie between 0 and 1"
        return "" if self.orth_reg_weight >= 0 else "orth_reg_weight is below 0"


@dataclass(frozen=True, slots=True)
class _Budgeted:
    """A site that takes part.

    vector: the name of the parameter whose elements compete. axes: for it and all that goes along
    with it the axis that they have in common. scored: those of them that are trained. share: what
    stands for the number that is kept.
    """

    site: PlannedSite
    vector: str
    axes: Mapping[str, int]
    scored: tuple[str, ...]
    share: str

    def parameter(self, name: str) -> nn.Parameter:
        """A parameter as it is on the model now."""
        return parameter_of(self.site.site.module, self.site.holders, name)

    def length(self) -> int:
        """How many elements compete here."""
        return self.parameter(self.vector).numel()


class Allocation:
    """What is left of an adapter's vectors, step by step; `allocate` makes it.

    Call `step` after each backward pass and the optimizer's step, before gradients are cleared, and
    add `loss()` to the loss before. `save` writes the adapter without what was taken away.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, schedule: Schedule) -> None:
        """Allocate the budget of an adapter on a model. Raises StateError (E423)."""
        self.model = model
        self.adapter = adapter
        self.schedule = schedule
        self.masks: dict[str, Tensor] = {}
        self._sites = tuple(_budgeted(adapter))
        self._importance: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self._whole = sum(one.length() for one in self._sites)
        _refuse_unfit(adapter, schedule, self._sites, self._whole)

    def step(self, step: int) -> int:
        """Take away what falls out of the budget at a step, counted from 0 or 1; gives the budget.

        The elements that are taken away are set to 0 and, after the last step at which any are,
        held there. Raises StateError (E423) where a gradient is missing.
        """
        schedule = self.schedule
        target = schedule.target_r * len(self._sites)
        budget = schedule.budget(step, self._whole, target)
        if step < schedule.last:
            self._look()
        between = schedule.tinit < step < schedule.last and step % schedule.deltaT == 0
        if between or step == schedule.last:
            self._choose(budget)
        if between or step >= schedule.last:
            self._take_away()
        return budget

    def loss(self) -> Tensor:
        """How far from orthonormal the directions are: the mean of |P Pᵀ - I|, times its weight."""
        terms = [
            _linalg.matrix_norm(_gram(one.parameter(name), one.axes[name]))
            for one in self._sites
            for name in one.scored
            if name != one.vector
        ]
        if not terms:
            return torch.zeros(())
        return self.schedule.orth_reg_weight * torch.stack(terms).mean()

    def save(self, directory: str | Path) -> SaveReport:
        """Write the adapter to a folder without the elements that were taken away.

        A site of which nothing is left is left out. Raises ArtifactError as `Compiled.save` does.
        """
        from surgery.artifact import save_adapter
        from surgery.digests import base_digests

        adapter, plan = self.adapter, self.adapter.plan
        kept = {one.site.path: self._mask(one) for one in self._sites}
        given = {
            (adapter.name, one.site.path): changed(
                one.site, {one.share: int(kept[one.site.path].sum())}
            )
            for one in self._sites
        }
        pruned = with_arguments(plan, self.model, given, self._sites[0].site.form.dtype)
        sites = [s for s in pruned.sites if s.adapter == adapter.name]
        return save_adapter(
            Path(directory),
            pruned,
            adapter.name,
            self._tensors(kept),
            adapter.seed,
            base_digests(self.model, iter(sites)),
            model=self.model,
        )

    # ---------------------------------------------------------------------------- importance

    def _look(self) -> None:
        """Smooth the importance |p dL/dp| of every element, and how uncertain it is."""
        for one in self._sites:
            for name in one.scored:
                now = _importance(one, name)
                key, zero = (one.site.path, name), torch.zeros_like(now)
                mean, spread = self._importance.get(key, (zero, zero))
                mean = self.schedule.beta1 * mean + (1 - self.schedule.beta1) * now
                apart = (now - mean).abs()
                spread = self.schedule.beta2 * spread + (1 - self.schedule.beta2) * apart
                self._importance[key] = mean, spread

    def _scores(self, one: _Budgeted) -> Tensor:
        """The score of each element: its own, and the mean of those that go along with it."""
        scores: dict[str, Tensor] = {}
        for name in one.scored:
            mean, spread = self._importance[one.site.path, name]
            scores[name] = _rows(mean * spread, one.axes[name]).mean(1)
        own = scores.pop(one.vector)
        return own + torch.stack([*scores.values()]).sum(0) if scores else own

    def _choose(self, budget: int) -> None:
        """Keep the elements with the largest scores, as many as the budget has; no tie is kept."""
        scores = {one.site.path: self._scores(one) for one in self._sites}
        surplus = self._whole - budget
        if surplus == 0:
            self.masks = {path: torch.ones_like(s, dtype=torch.bool) for path, s in scores.items()}
            return
        every = torch.cat([s.cpu() for s in scores.values()])
        threshold = float(torch.kthvalue(every, surplus)[0])
        self.masks = {path: s > threshold for path, s in scores.items()}

    def _take_away(self) -> None:
        with torch.no_grad():
            for one in self._sites:
                vector = one.parameter(one.vector)
                vector.masked_fill_(~self._mask(one).to(vector.device), 0.0)

    def _mask(self, one: _Budgeted) -> Tensor:
        every = torch.ones(one.length(), dtype=torch.bool)
        return self.masks.get(one.site.path, every)

    def _tensors(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's tensors, cut to what is kept."""
        found = tensors_of(self.model, self.adapter)
        for one in self._sites:
            places = kept[one.site.path].nonzero().flatten()
            for p in one.site.form.parameters:
                name = one.site.adapted(p.name)
                if not len(places):
                    del found[name]
                elif p.name in one.axes:
                    tensor = found[name]
                    found[name] = tensor.index_select(one.axes[p.name], places.to(tensor.device))
        return found


def _importance(one: _Budgeted, name: str) -> Tensor:
    """What the loss changes by where each element becomes 0, to the first order."""
    parameter = one.parameter(name)
    gradient = parameter.grad
    if gradient is None:
        refuse(
            "E423",
            f"`{one.site.adapted(name)}` has no gradient",
            hint="call step() after backward() and before gradients are cleared",
        )
    return (parameter.detach() * gradient).abs()


def _rows(tensor: Tensor, axis: int) -> Tensor:
    """What stands at each place of an axis, as a row."""
    first = tensor.movedim(axis, 0)
    return first.reshape(len(first), -1)


def _gram(parameter: Tensor, axis: int) -> Tensor:
    """P Pᵀ - I of the rows that an axis makes."""
    rows = _rows(parameter, axis)
    return rows @ rows.mT - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)


# --------------------------------------------------------------------------------- who takes part


def _budgeted(adapter: Adapter) -> Iterator[_Budgeted]:
    for site in adapter.sites:
        equations = site.form.derived.equations
        for share in equations.shares:
            if share.count is None:
                length = size(symbol(share.name))
                argument = next((n for n, v in equations.changes if v == length), "")
                axes = dict(_along(site, argument))
                scored = tuple(p.name for p in site.form.parameters if p.trained and p.name in axes)
                yield _Budgeted(site, share.scores.text("name"), axes, scored, share.name)


def _along(site: PlannedSite, argument: str) -> Iterator[tuple[str, int]]:
    """The parameters with an axis that is declared to be an argument long, and which."""
    (link,) = site.form.links
    declared = {n.name: n for n in nodes(link.method) if isinstance(n, ast.Declaration)}
    for p in site.form.parameters:
        for axis, length in enumerate(declared[p.name].shape if p.name in declared else ()):
            if isinstance(length, ast.Name) and length.id == argument:
                if p.shared:
                    _refuse_shared(p.name, site)
                yield p.name, axis


def _refuse_shared(name: str, site: PlannedSite) -> None:
    refuse(
        "E423",
        f"`{name}` of {site.form.named} is shared by all sites, which keep different parts of it",
        hint="declare it without `shared`",
    )


def _refuse_unfit(
    adapter: Adapter, schedule: Schedule, sites: tuple[_Budgeted, ...], whole: int
) -> None:
    if not sites:
        refuse(
            "E423",
            f"`{adapter.name}` has no site with a vector that is kept in part",
            hint="a method says so of an argument: `r' = kept(E)`",
        )
    if any(one.site.site.batch is not None for one in sites):
        refuse(
            "E423",
            "the matrices of a batch are kept together, and have no vectors of their own",
            hint="select them one by one, as in `in experts[*]`",
        )
    wrong = schedule.objection()
    if not wrong and schedule.target_r * len(sites) > whole:
        wrong = f"target_r = {schedule.target_r} a site is more than there is"
    if wrong:
        refuse("E423", "this schedule cannot be followed", hint=wrong)


def allocate(
    compiled: Compiled,
    *,
    total_step: int,
    target_r: int = 8,
    tinit: int = 0,
    tfinal: int = 0,
    deltaT: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orth_reg_weight: float = 0.5,
    adapter: str | None = None,
) -> Allocation:
    """Let the budget of an adapter (the live one by default) shrink while it is trained.

    The other arguments are those of `Schedule`. Raises StateError: E423 for an adapter that has
    nothing to take away, or a schedule that makes no sense; E411 and E416 as `Compiled.save`.
    """
    schedule = Schedule(total_step, target_r, tinit, tfinal, deltaT, beta1, beta2, orth_reg_weight)
    state = require_state(compiled.model)
    return Allocation(compiled.model, chosen(state, adapter), schedule)


__all__ = ["Allocation", "Schedule", "allocate"]
