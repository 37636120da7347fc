"""One site of an adapter that is made of several: what it becomes, and how far it is from them.

What adapters add to W is known by their equations: as two factors where the algebra finds some,
else as a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from surgery import low_rank, materialize
from surgery.algebra.beginnings import stream
from surgery.algebra.degrees import Share, shares
from surgery.algebra.equations import Parameter
from surgery.algebra.expr import BIAS, WEIGHT, zeros
from surgery.algebra.sums import difference
from surgery.arguments import Arguments, Link
from surgery.artifact import Loaded
from surgery.combining import COMBINES, Change, Pruning, together
from surgery.conversion import tensors_at
from surgery.errors import Report
from surgery.live import Live
from surgery.mixture import MixedSite, live_sites, owned_parameters
from surgery.model.holder import shared_name
from surgery.model.hooked import execution_device
from surgery.plan import Assignment
from surgery.planned import Plan, PlannedSite, SiteClass
from surgery.recipe import Sign, Way
from surgery.report import shown


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter, under the name that it has in the expression: `loaded.adapter`.

    own: the name that it has where it comes from.
    """

    loaded: Loaded
    plan: Plan
    own: str

    def bank(self, site: PlannedSite, p: Parameter) -> Tensor:
        """A parameter that sites share, whole."""
        group = self.plan.groups[site.form.bank(site.adapter, p)]
        return self.loaded.tensors[shared_name(site.adapter, group, p.declared_name)]


Sources = Mapping[str, Source]
"""By the names that they have in the expression."""


@dataclass(frozen=True, slots=True)
class Term:
    """What one term of the expression is at a place: an adapter, or a chain of some."""

    number: float
    site: PlannedSite
    sources: Sources = field(repr=False)

    @property
    def plain(self) -> bool:
        """Whether it is an adapter, and no chain."""
        return not isinstance(self.site, MixedSite)

    @property
    def source(self) -> Source:
        """The adapter's own. KeyError for a chain."""
        return self.sources[self.site.adapter]

    def tensors(self) -> dict[str, Tensor]:
        """Its parameters there, by their names."""
        found: dict[str, Tensor] = {}
        known: dict[str, dict[str, Tensor]] = {}
        for name, site, p in owned_parameters(self.site):
            if site.adapter not in known:
                source = self.sources[site.adapter]
                known[site.adapter] = tensors_at(site, source.plan, source.loaded)
            found[name] = known[site.adapter][p.name]
        return found

    def change(self) -> Change:
        """What it adds to W, or to the parameter that it has a copy of."""
        if not self.site.site.at.tensor:
            return change_at(self.site, self.tensors())
        (copy,) = self.tensors().values()
        return Change(dense=copy.to("cpu", torch.float64) - base_copy((self,)).cpu().double())


Place = tuple[Term, ...]
"""All terms that have a site on the same part of the same parameter."""


def places(live: Live, sources: Sources) -> tuple[Place, ...]:
    """The places of an expression's adapters, in their order.

    Raises PlanError (E309) with all places where they do not fit together.
    """
    plans = {name: source.plan for name, source in sources.items()}
    live_sites(live, plans)
    found: dict[tuple[object, ...], list[Term]] = {}
    for number, what in live.terms:
        for site in live_sites(Live(((1.0, what),)), plans):
            key = (id(site.site.module), site.site.at)
            found.setdefault(key, []).append(Term(number, site, sources))
    return tuple(map(tuple, found.values()))


def change_at(site: PlannedSite, tensors: Mapping[str, Tensor]) -> Change:
    """What a site's parameters add to W, which must be no obstacle."""
    if low_rank.known_rank(site.form) is None:
        return Change(dense=low_rank.added(site, tensors))
    one = low_rank.product(site, tensors, None)
    return Change(one.left, one.right)


def wanted(place: Place) -> Change:
    """What the expression says is added to W: Σ cᵢ (Wᵢ' - W)."""
    return together([term.change() for term in place], [term.number for term in place])


def obstacle(place: Place) -> str:
    """Why what is added to W at a place cannot be told; "" where it can."""
    on_meta = execution_device(place[0].site.site.module).type == "meta"
    if place[0].site.site.at.tensor:
        return NO_WEIGHTS if on_meta else ""
    for term in place:
        reason = low_rank.obstacle(term.site.form)
        if reason:
            return reason
        if on_meta and low_rank.read_of(term.site.form)[0]:
            return NO_WEIGHTS
    return ""


NO_WEIGHTS = "what that adds to W is made of W, and the base's weights are not there"


# ---------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True, slots=True)
class Asked:
    """How adapters become one.

    rank: of each product, at most; by default the largest that an adapter has there. aim: the
    method that the product becomes. density, sign, seed: see `combining.Pruning`.
    """

    way: Way
    rank: int | None
    aim: low_rank.Target
    density: float
    sign: Sign
    seed: int

    def combined(self, tensors: Sequence[Tensor], numbers: Sequence[float], *at: str) -> Tensor:
        """Tensors made one; `at` names them, for what is drawn."""

        def drawn(index: int) -> torch.Generator:
            return stream(self.seed, "compose", *at, index)

        combine = COMBINES[self.way.pruning]
        return combine(tensors, numbers, Pruning(self.density, self.sign, drawn))

    def summed(self) -> bool:
        """Whether what is asked for is the very sum."""
        return not self.way.prunes


BankKey = tuple[str, Arguments, str]
"""Of what sites share: the method, its arguments, and the parameter's name."""


@dataclass(frozen=True, slots=True)
class Made:
    """What a place becomes.

    tensors: by the names of parameters. cut: the part of what was asked for that a product of the
    rank has not, as a ratio of lengths; None where nothing is cut off.
    """

    assignment: Assignment
    tensors: Mapping[str, Tensor]
    rank: int | None = None
    cut: float | None = None


# ------------------------------------------------------------------------------------- products


def as_product(place: Place, asked: Asked) -> Made | None:
    """The place as one product of the aim; None where nothing is added to W."""
    changes, numbers = [t.change() for t in place], [t.number for t in place]
    if asked.summed():
        total = together(changes, numbers)
    else:
        every = [change.matrix for change in changes]
        total = Change(dense=asked.combined(every, numbers, place[0].site.path))
    whole = asked.way.of == "factors"
    made = total if whole else _shortened(total, rank_at(place, asked))
    if made.factors is None or not made.factors[1].shape[-2]:
        return None
    left, right = made.factors
    rank, aim = right.shape[-2], asked.aim
    dtype = _dtype(place)
    tensors = {
        aim.left: (left / aim.scale(rank)).to(dtype).contiguous(),
        aim.right: right.to(dtype).contiguous(),
    }
    cut = None if made is total else ratio((total + made * -1.0).length(), total.length())
    return Made(_assignment(place, (aim.link(rank),)), tensors, rank, cut)


def rank_at(place: Place, asked: Asked) -> int:
    """The rank of what a place becomes: what is asked, or the largest that one of them has."""
    form = place[0].site.form
    full = min(form.numbers(WEIGHT.shape))
    known = (low_rank.known_rank(term.site.form) for term in place)
    return min(full, asked.rank or max(full if r is None else r for r in known))


def _shortened(total: Change, rank: int) -> Change:
    """The nearest of a rank; a product of fewer columns as it is."""
    if total.factors is not None and total.factors[1].shape[-2] <= rank:
        return total
    each = [_nearest(one, rank) for one in total.each()]
    left, right = ([getattr(one, side) for one in each] for side in ("left", "right"))
    if total.batched:
        return Change(torch.stack(left), torch.stack(right))
    return Change(left[0], right[0])


def _nearest(total: Change, rank: int) -> low_rank.Product:
    if total.factors is not None:
        return low_rank.shortened(*total.factors, rank)
    return low_rank.nearest(total.matrix, rank)


def _dtype(place: Place) -> torch.dtype:
    """Of what a place becomes: one that holds all that is there."""
    every = (t for term in place for t in term.tensors().values() if t.is_floating_point())
    return reduce(torch.promote_types, (t.dtype for t in every))


def _assignment(place: Place, links: tuple[Link, ...]) -> Assignment:
    first = place[0].site
    site, rates = first.site, first.rates if links == first.form.links else ()
    places = first.form.places
    return Assignment(site.owner, links, first.span, site.at, site.tie, rates, places)


def ratio(part: float, whole: float) -> float:
    """One length as a share of another; of nothing at all 0."""
    if not part:
        return 0.0
    return part / whole if whole else float("inf")


# --------------------------------------------------------------------------------------- copies


def as_copy(place: Place, base: Tensor | None) -> Made:
    """Copies of a parameter, as one: T = T₀ + Σ cᵢ (Tᵢ - T₀), in which nothing is cut off.

    base: T₀ as the copies lie; None where the numbers leave nothing of it.
    """
    (name,) = (p.name for p in place[0].site.form.parameters)
    every = [term.tensors()[name] for term in place]
    total = sum((t.number * e.double() for t, e in zip(place, every, strict=True)), torch.zeros(()))
    if base is not None:
        total = total + left_of_base(place) * base.double()
    value = total.to(_dtype(place)).contiguous()
    return Made(_assignment(place, place[0].site.form.links), {name: value})


def left_of_base(place: Place) -> float:
    """The number before T₀ in a sum of copies; 0 where only rounding leaves something."""
    rest = 1.0 - sum(term.number for term in place)
    return rest if abs(rest) > _SAME else 0.0


_SAME = 1e-12


def base_copy(place: Place) -> Tensor:
    """What the copies at a place begin with; on meta where the base's weights are not there."""
    site = place[0].site
    (made,) = materialize.site_tensors(site, 0, {}).values()
    return made


# ------------------------------------------------------------------------------------ parameters


@dataclass(slots=True)
class Bank:
    """A parameter that sites share, of all the adapters that have one.

    share: what it takes of a number; None where it is not trained, and must be the same in all.
    told: by the adapter the number before it, and the tensor, whole.
    """

    share: Share | None
    told: dict[str, tuple[float, Tensor]] = field(default_factory=dict[str, tuple[float, Tensor]])

    def value(self, asked: Asked, *at: str) -> Tensor:
        """One tensor of all."""
        tensors = [tensor for _, tensor in self.told.values()]
        if self.share is None:
            return tensors[0].clone()
        return _one(tensors, [self.share.of(n) for n, _ in self.told.values()], asked, *at)


Banks = dict[BankKey, Bank]


def as_parameters(place: Place, asked: Asked, banks: Banks, report: Report) -> Made | None:
    """The place with parameters that are made of the terms' own; None with E583 where they differ.

    A number before a change that is a product of k of them is its k-th root before each.
    """
    first = place[0].site
    if all(t.site.form.links == first.form.links for t in place):
        return _alike(place, asked, banks, report)
    scales = [low_rank.number_before(t.site, asked.aim) for t in place]
    ranks = {t.site.form.shapes[asked.aim.right][0] for t in place if None not in scales}
    if None in scales or len(ranks) > 1:
        others = ", ".join(f"`{t.site.adapter}` has {_called(t, place)}" for t in place)
        report.error(
            "E583",
            f"at `{first.path}` parameters cannot be combined one by one: {others}",
            hint="combine what they add to W: how='cat', how='svd'",
        )
        return None
    numbers = [t.number * (s or 0.0) for t, s in zip(place, scales, strict=True)]
    every = [t.tensors() for t in place]
    tensors: dict[str, Tensor] = {}
    for name, share in ((asked.aim.right, Share(2)), (asked.aim.left, Share(2, False))):
        own = [e[name] for e in every]
        tensors[name] = _one(own, [share.of(n) for n in numbers], asked, first.path, name)
    (rank,) = ranks
    return Made(_assignment(place, (asked.aim.link(rank),)), tensors, rank)


def _called(term: Term, place: Place) -> str:
    """What a term has; of one method of all the arguments alone in which they differ."""
    methods = {tuple(link.method.name for link in t.site.form.links) for t in place}
    if len(methods) > 1 or len(term.site.form.links) != 1:
        return term.site.form.call
    every = [dict(t.site.form.arguments) for t in place]
    given = ((n, v) for n, v in term.site.form.arguments if any(e[n] != v for e in every))
    return f"{term.site.form.named}({', '.join(f'{n}={shown(v)}' for n, v in given)})"


def _alike(place: Place, asked: Asked, banks: Banks, report: Report) -> Made | None:
    form = place[0].site.form
    every = [t.tensors() for t in place]
    taken = _taken(form)
    found: dict[str, Tensor] = {}
    for p in form.parameters:
        share = taken.get(p.name)
        if p.shared:
            bank = banks.setdefault(form.bank("", p)[1:], Bank(share))
            bank.told |= {t.site.adapter: (t.number, t.source.bank(t.site, p)) for t in place}
            continue
        own = [e[p.name] for e in every]
        if share is not None:
            numbers = [share.of(t.number) for t in place]
            found[p.name] = _one(own, numbers, asked, place[0].site.path, p.name)
        elif all(torch.equal(own[0], other) for other in own[1:]):
            found[p.name] = own[0].clone()
        else:
            _refuse_untrained(place, p, report)
    return Made(_assignment(place, form.links), found, _rank(form))


def _rank(form: SiteClass) -> int | None:
    return None if low_rank.obstacle(form) else low_rank.known_rank(form)


def _refuse_untrained(place: Place, p: Parameter, report: Report) -> None:
    report.error(
        "E583",
        f"`{p.name}` of {place[0].site.form.named} is not trained, and at `{place[0].site.path}` "
        "the adapters have others",
        hint="adapters begun with one seed have the same; else how='svd' combines what they add",
    )


def _one(tensors: Sequence[Tensor], numbers: Sequence[float], asked: Asked, *at: str) -> Tensor:
    wide = [t.to("cpu", torch.float64) for t in tensors]
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    return asked.combined(wide, numbers, *at).to(dtype).contiguous()


def _taken(form: SiteClass) -> Mapping[str, Share]:
    """What each trained parameter takes of a number before the change."""
    names = [p.name for p in form.parameters if p.trained and not p.whole]
    still = form.derived.still
    if still is None:
        return dict.fromkeys(names, Share())
    bias = BIAS if form.has_bias else zeros(BIAS.shape)
    return shares((difference(still.weight, WEIGHT), difference(still.bias, bias)), names)


def check_banks(banks: Banks, report: Report) -> None:
    """E583 for what sites share and cannot be combined."""
    for (method, _, name), bank in banks.items():
        first, *others = (tensor for _, tensor in bank.told.values())
        reason = ""
        if any(other.shape != first.shape for other in others):
            reason = "has several shapes"
        elif bank.share is None and not all(torch.equal(first, other) for other in others):
            reason = "is not trained, and the adapters have others"
        if reason:
            message = f"`{name}`, which the sites of `{method}` share, {reason}"
            report.error("E583", message, hint="combine what they add to W: how='svd'")
