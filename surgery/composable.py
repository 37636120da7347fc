"""Whether adapters can be composed as it is asked, and what is against it where they cannot."""

from __future__ import annotations

from collections.abc import Iterator

from surgery import low_rank
from surgery.composed import NO_WEIGHTS, Asked, Place, Term, base_copy, left_of_base, obstacle
from surgery.conversion import first_target, target_of
from surgery.errors import Report
from surgery.recipe import WAYS, How, unfit


def check_options(options: How) -> None:
    """E582 for all that is no option, or does not go with the way."""
    report = Report()
    for _, message, hint in unfit(options):
        report.error("E582", message, hint=hint)
    report.stop()


def asked_of(options: How, every: tuple[Place, ...]) -> Asked:
    """What is asked for. Raises ArtifactError: E582 for what is no option, E523 for a method."""
    check_options(options)
    way = WAYS[options.how]
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
