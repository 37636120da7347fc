"""Whether adapters can be composed as it is asked, and what is against it where they cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from surgery import low_rank
from surgery.algebra.scalars import did_you_mean
from surgery.combining import WAYS, Sign
from surgery.composed import NO_WEIGHTS, Asked, Place, Term, base_copy, left_of_base, obstacle
from surgery.conversion import first_target, target_of
from surgery.errors import Report, refuse


@dataclass(frozen=True, slots=True)
class How:
    """How adapters become one.

    how: `cat` lays the factors of what is added to W side by side, which is exact; `svd` takes the
        nearest product of a rank; `linear` adds up the parameters, which is another adapter than
        the sum; `ties`, `dare_linear`, `dare_ties` and `magnitude_prune` prune the parameters
        before, and with `_svd` behind the name the changes of W.
    rank: of a product that is cut off; by default the largest of an adapter's own there.
    to: a method that adds a product of two trained factors to W; by default the adapters' own, if
        it is one.
    density: the share of elements that pruning leaves. sign: how a sign is elected, `total` or
        `frequency`. seed: of what dare draws.
    """

    how: str = "cat"
    rank: int | None = None
    to: str | None = None
    density: float | None = None
    sign: Sign = "total"
    seed: int = 0


def asked_of(options: How, every: tuple[Place, ...]) -> Asked:
    """What is asked for. Raises ArtifactError: E582 for what is no option, E523 for a method."""
    report = Report()
    way = WAYS.get(options.how)
    if way is None:
        near = did_you_mean(options.how, WAYS)
        hint = f"{near or 'there are:'} {', '.join(WAYS)}"
        refuse("E582", f"there is no way `{options.how}` to compose adapters", hint=hint)
    if options.rank is not None and (options.rank < 1 or way.of != "changes"):
        cut = ", ".join(w.name for w in WAYS.values() if w.of == "changes")
        message = f"there is no product of rank {options.rank} in `{way.name}`"
        report.error("E582", message, hint=f"a rank of 1 or more goes with {cut}")
    if way.prunes and not (options.density is not None and 0 < options.density <= 1):
        message = f"`{way.name}` leaves a share of the elements, and density is {options.density}"
        report.error("E582", message, hint="give a density above 0 and at most 1, such as 0.5")
    if not way.prunes and options.density is not None:
        pruning = ", ".join(w.name for w in WAYS.values() if w.prunes)
        message = f"`{way.name}` prunes nothing, and has no density"
        report.error("E582", message, hint=f"a density goes with {pruning}")
    if options.sign not in get_args(Sign):
        hint = f"there are: {', '.join(get_args(Sign))}"
        report.error("E582", f"no sign is elected by `{options.sign}`", hint=hint)
    report.stop()
    aim = target_of(options.to) if options.to else _own_target(every) or target_of(first_target())
    density = 1.0 if options.density is None else options.density
    return Asked(way, options.rank, aim, density, options.sign, options.seed)


def _own_target(every: tuple[Place, ...]) -> low_rank.Target | None:
    """The one method that all adapters have, if it adds just any product."""
    links = {
        link.method.name: link.method
        for place in every
        for term in place
        if not place[0].site.site.at.tensor
        for link in term.site.form.links
    }
    (method, *others) = links.values() or (None,)
    return None if method is None or others else low_rank.target(method)


def check_places(every: tuple[Place, ...], asked: Asked) -> None:
    """All that cannot be composed: E580, E582 and E584, once for a class of sites."""
    report = Report()
    seen = set[tuple[int, ...]]()
    for place in every:
        key = tuple(id(term.site.form) for term in place)
        if key in seen:
            continue
        seen.add(key)
        for term, (code, message, hint) in _against(place, asked):
            report.error(code, message, term.site.span, hint=hint)
    report.stop()


_Finding = tuple[str, str, str]
"""A code, a message and a hint."""


def _against(place: Place, asked: Asked) -> Iterator[tuple[Term, _Finding]]:
    if place[0].site.site.at.tensor:
        yield from ((place[0], one) for one in _against_copies(place))
        return
    against = _against_chain if asked.way.of == "parameters" else _against_change
    for term in place:
        yield from ((term, one) for one in against(term, asked))


def _against_copies(place: Place) -> Iterator[_Finding]:
    where = f"`{place[0].site.path}` is a copy"
    if not all(term.plain for term in place):
        yield "E580", f"{where}, and none follows another", "leave out `then`"
    elif left_of_base(place) and base_copy(place).is_meta:
        message = f"{where}, and the numbers before it leave something of the base's own"
        yield "E584", message, f"{_WEIGHTS}, or let the numbers add up to 1"


def _against_chain(term: Term, asked: Asked) -> Iterator[_Finding]:
    if not term.plain:
        message = f"`{asked.way.name}` combines parameters, and `{term.site.adapter}` has none"
        yield "E582", message, "`then` goes with how='cat' and how='svd'"


def _against_change(term: Term, asked: Asked) -> Iterator[_Finding]:
    """What is against what a term adds to W."""
    form, ranked = term.site.form, low_rank.known_rank(term.site.form) is not None
    where = f"`{term.site.path}` has {form.named or term.site.adapter}"
    reason = low_rank.obstacle(form)
    if reason:
        hint = "let `activate` mix them; or combine parameters: how='linear'"
        yield "E580", f"{where}: {reason}", hint
    elif asked.way.of == "factors" and not ranked:
        message = f"{where}, whose equation adds no product of few columns to W"
        yield "E580", message, "how='svd' takes the nearest of a rank, and says how near it is"
    elif obstacle((term,)):
        yield "E584", f"{where}, and {NO_WEIGHTS}", _WEIGHTS
    elif asked.way.of == "changes" and asked.rank is None and not ranked:
        yield "E582", f"{where}, whose change of W has no rank of its own", "give a rank: rank=8"


_WEIGHTS = "give the base with its weights: base=MODEL, or --base"
