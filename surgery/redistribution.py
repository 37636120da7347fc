"""Arguments that are known only when all sites are: a plan with other arguments at some sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery import lower
from surgery.algebra.axes import Size, evaluate, names_in
from surgery.algebra.equations import Share
from surgery.algebra.interpret import Domain, Evaluator
from surgery.algebra.scalars import typed
from surgery.arguments import Arguments, Link
from surgery.errors import refuse
from surgery.language import syntax as ast
from surgery.materialize import Leaves
from surgery.observation import Data, Seen, check_data, is_meta, needs, observe
from surgery.plan import Assignment, plan_assignments
from surgery.planned import Plan, PlannedSite
from surgery.switching import base_alone

Given = Mapping[tuple[str, str], "Arguments | None"]
"""By adapter and path of a site the arguments of its method; None where the site is left out."""


def looked_at(
    plan: Plan, model: nn.Module, data: Data | None, seed: int, dtype: torch.dtype | None
) -> tuple[Plan, Seen]:
    """What data shows of the sites, and the plan with what follows from it.

    dtype: as for `plan`. Raises StateError (E421, E422) where sites need data that is not there, or
    shows nothing of them; otherwise as `plan` does.
    """
    check_data(plan.sites, data)
    seen: Seen = {}
    if any(map(needs, plan.sites)):
        if data is None:  # it all lies on meta
            return plan, seen
        with base_alone(model):
            seen = observe(model, plan.sites, data)
    made = redistributed(plan, model, seen, seed, dtype)
    lower.check(made)
    return made, seen


def redistributed(
    plan: Plan, model: nn.Module, seen: Seen, seed: int, dtype: torch.dtype | None
) -> Plan:
    """The plan with each site's share of what `among` shares out; a share of none leaves it out.

    seen: what data shows of the sites. dtype: as for `plan`. Raises as `plan` does.
    """
    given: dict[tuple[str, str], Arguments | None] = {}
    for sites in _groups(plan):
        scores = {s.path: _scores(s, seen, seed) for s in sites}
        counts = {name: _counted(name, sites, scores) for name in _shared(sites[0])}
        for site in sites:
            shares = {name: counts[name][site.path] for name in counts}
            given[site.adapter, site.path] = changed(site, shares)
    return with_arguments(plan, model, given, dtype) if given else plan


def _groups(plan: Plan) -> Iterator[Sequence[PlannedSite]]:
    """The sites of each adapter that have one method whose arguments are shared out."""
    groups: dict[tuple[str, str], list[PlannedSite]] = {}
    for site in plan.sites:
        if _shared(site):
            groups.setdefault((site.adapter, site.form.named), []).append(site)
    return iter(groups.values())


def _shared(site: PlannedSite) -> Mapping[str, Share]:
    """What is shared out among all sites, by name."""
    shares = site.form.derived.equations.shares
    return {s.name: s for s in shares if s.count is not None}


def _scores(site: PlannedSite, seen: Seen, seed: int) -> Mapping[str, Tensor]:
    """The elements that compete, on the CPU, by the name of the share."""
    if site.site.batch is not None:
        refuse(
            "E422",
            f"`{site.path}` is a batch of matrices, which have their arguments together",
            site.span,
            hint="select its matrices one by one, as in `in experts[*]`",
        )
    if is_meta(site):
        refuse(
            "E422",
            f"what is shared out at `{site.path}` is made of its weights, which are on meta",
            site.span,
            hint="compile the adapter where the base has its weights",
        )
    names = (seed, site.adapter, site.path)
    leaves = Leaves(site, site.site.at, {}, seen.get((site.adapter, site.path), {}), names)
    anchor = torch.zeros((), dtype=torch.float64)
    values = Evaluator(Domain(site.form.names, leaves, lambda: anchor))
    with torch.no_grad():
        return {n: values.value(s.scores).cpu() for n, s in _shared(site).items()}


def _counted(
    name: str, sites: Sequence[PlannedSite], scores: Mapping[str, Mapping[str, Tensor]]
) -> Mapping[str, int]:
    """How many of each site's elements are among the largest; of equal ones those that come first.

    There are as many of the largest as the counts of all sites make.
    """
    budget = sum(evaluate(_count(_shared(s)[name]), s.form.names) for s in sites)
    values = torch.cat([scores[s.path][name] for s in sites])
    owners = torch.repeat_interleave(torch.tensor([len(scores[s.path][name]) for s in sites]))
    order = torch.sort(values, descending=True, stable=True).indices[: round(budget)]
    counted: Any = torch.bincount(owners[order], minlength=len(sites))
    counts: list[int] = counted.tolist()
    return dict(zip((s.path for s in sites), counts, strict=True))


def _count(share: Share) -> Size:
    assert share.count is not None  # it is one that is shared out
    return share.count


def changed(site: PlannedSite, shares: Mapping[str, int]) -> Arguments | None:
    """A site's arguments with its shares known; None if one of them is nothing.

    Raises DefinitionError where an argument becomes what it cannot be.
    """
    if 0 in shares.values():
        return None
    (link,) = site.form.links
    types: dict[str, ast.ValueType] = {a.name: a.type for a in link.method.arguments}
    values = dict(link.arguments)
    for name, size in site.form.derived.equations.changes:
        if names_in(size) <= {*site.form.names, *shares}:
            value = evaluate(size, {**site.form.names, **shares})
            values[name] = typed(value, types[name], name, link.method.span)
    return tuple(values.items())


def with_arguments(
    plan: Plan, model: nn.Module, given: Given, dtype: torch.dtype | None = None
) -> Plan:
    """The plan with other arguments at some sites, and without those that have none.

    dtype: as for `plan`. Raises PlanError where arguments do not fit.
    """
    made = [
        plan_assignments(plan.resolved, model, _assignments(plan, name, given), name, dtype)
        for name in plan.adapters
    ]
    return replace(
        plan,
        sites=tuple(site for one in made for site in one.sites),
        shared=tuple(shared for one in made for shared in one.shared),
    )


def _assignments(plan: Plan, adapter: str, given: Given) -> Iterator[Assignment]:
    for site in (s for s in plan.sites if s.adapter == adapter):
        links, key = site.form.links, (adapter, site.path)
        if key in given:
            arguments = given[key]
            if arguments is None:
                continue
            links = (Link(links[0].method, arguments),)
        at = site.site
        told = (at.at, at.tie, site.rates, site.form.places)
        yield Assignment(at.owner, links, site.span, *told)
