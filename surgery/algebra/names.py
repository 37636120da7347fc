"""The names of a spec and their values: params, lets, and what a site adds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from surgery.algebra.mentions import names as mentioned
from surgery.algebra.scalars import Decide, Scalars, undecided
from surgery.errors import Diagnostic, SurgeryError, error_of
from surgery.language import syntax as ast


@dataclass(frozen=True)
class Names(Mapping[str, object]):
    """Params, lets and what the site adds; a let is evaluated when it is first asked for.

    decide: what becomes of a condition that depends on what is not known.
    """

    params: Mapping[str, object]
    lets: Mapping[str, ast.Let]
    site: Mapping[str, object] = field(default_factory=dict[str, object])
    decide: Decide = undecided
    _known: dict[str, object] = field(
        init=False, repr=False, compare=False, default_factory=dict[str, object]
    )

    def __getitem__(self, name: str) -> object:
        """The value of a name. Raises KeyError; DefinitionError for a let that is wrong."""
        for place in (self.site, self.params):
            if name in place:
                return place[name]
        if name not in self.lets:
            raise KeyError(name)
        if name not in self._known:
            self._evaluate(name)
        found = self._known[name]
        if isinstance(found, SurgeryError):
            raise found
        return found

    def __contains__(self, name: object) -> bool:
        """Whether there is such a name; nothing is evaluated."""
        return name in self.site or name in self.params or name in self.lets

    def __iter__(self) -> Iterator[str]:
        """All names, those of the site first."""
        return iter(dict.fromkeys([*self.site, *self.params, *self.lets]))

    def __len__(self) -> int:
        """How many names there are."""
        return sum(1 for _ in self)

    def at(self, site: Mapping[str, object]) -> Names:
        """The same names at a site, whose own names come first."""
        return replace(self, site=site)

    def _evaluate(self, name: str) -> None:
        """Evaluate a let, those it is made of first; a long chain of them needs no recursion."""
        path = [name]
        while path:
            let = self.lets[path[-1]]
            missing = [n for n in mentioned(let.value) if self._waits_for(n)]
            circle = [n for n in missing if n in path]
            if circle or not missing:
                self._known[path.pop()] = (
                    _circle(path, circle[0], let) if circle else self._value(let)
                )
            else:
                path.append(missing[0])

    def _waits_for(self, name: str) -> bool:
        known = name in self.site or name in self.params or name in self._known
        return not known and name in self.lets

    def _value(self, let: ast.Let) -> object:
        try:
            return Scalars(self, self.decide)(let.value)
        except SurgeryError as error:
            return error


def _circle(path: list[str], name: str, let: ast.Let) -> SurgeryError:
    circle = " -> ".join([*path[path.index(name) :], name])
    return error_of(
        [
            Diagnostic(
                "E115",
                f"`{let.name}` is defined by itself: {circle}",
                let.span,
                hint="define one of them by numbers and params alone",
            )
        ]
    )
