"""Arguments that are told: by the sizes of all sites, in the model's order, or by a site's path.

`n' = total(m)` and `n' = before(m)` are sums over sites, `n' = place()` counts those before one,
and `name' = ending()` is the end of a path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from surgery.algebra.axes import Size, evaluate, names_in
from surgery.algebra.equations import Equations, Total
from surgery.algebra.scalars import typed
from surgery.arguments import Arguments, Link, told, without_told
from surgery.fit import equations_at
from surgery.language import syntax as ast
from surgery.model.endings import ending
from surgery.planned import PlannedSite, SiteClass

Key = tuple[str, str, Arguments]
"""An adapter, a method, and its arguments but for those that are told."""


@dataclass(frozen=True, slots=True)
class _Counting:
    """A method of a site that asks for the sizes of all: which of its links, and what it asks."""

    number: int
    equations: Equations
    arguments: Arguments

    def key(self, site: PlannedSite, total: Total) -> Key:
        """Whose sites it counts."""
        arguments = () if total.every else self.arguments
        return site.adapter, site.form.links[self.number].method.name, arguments


def with_totals(
    sites: Sequence[PlannedSite], place: Callable[[PlannedSite], int]
) -> Iterator[tuple[Link, ...]]:
    """The methods of each site, with the arguments that the sites tell.

    place: where a site stands in the model. A batch of matrices counts as one of them. Raises
    DefinitionError where an argument becomes what it cannot be.
    """
    # Once for a class of sites, since methods are long to look up.
    forms = {id(site.form): site.form for site in sites}
    counting = {i: tuple(_counting(form)) for i, form in forms.items()}
    sums: dict[tuple[Key, str], int | float] = {}
    before: dict[tuple[int, int, str], int | float] = {}
    for site in sorted((s for s in sites if counting[id(s.form)]), key=place):
        for one in counting[id(site.form)]:
            for total in one.equations.totals:
                at = (one.key(site, total), total.name)
                before[id(site), one.number, total.name] = sums.get(at, 0)
                sums[at] = sums.get(at, 0) + evaluate(total.term, site.form.names)
    for site in sites:
        links = [*site.form.links]
        for one in counting[id(site.form)]:
            known = {
                t.name: before[id(site), one.number, t.name]
                if t.before
                else sums[one.key(site, t), t.name]
                for t in one.equations.totals
            }
            names = {**site.form.names, **known}
            link = _changed(links[one.number], one.equations.changes, names)
            links[one.number] = _named(link, one.equations.endings, site.path)
        yield tuple(links)


def _counting(form: SiteClass) -> Iterator[_Counting]:
    for number, link in enumerate(form.links):
        if told(link.method):
            yield _Counting(number, equations_at(form, link), without_told(link))


def _changed(
    link: Link, changes: Sequence[tuple[str, Size]], names: dict[str, int | float]
) -> Link:
    types: dict[str, ast.ValueType] = {a.name: a.type for a in link.method.arguments}
    known, values = told(link.method), dict(link.arguments)
    for name, size in changes:
        if name in known and names_in(size) <= names.keys():
            values[name] = typed(evaluate(size, names), types[name], name, link.method.span)
    return Link(link.method, tuple(values.items()))


def _named(link: Link, names: Sequence[str], path: str) -> Link:
    """A method whose arguments of these names are the end of a path."""
    if not names:
        return link
    return Link(
        link.method, tuple((n, ending(path) if n in names else v) for n, v in link.arguments)
    )
