"""Two plans compared, as the plain data that they are: what only one does, and what differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from surgery.report import shown

Data = Mapping[str, object]
Key = tuple[str, str, int]
"""Of a site in a plan: its adapter, its path, and which of the methods on it."""

_NOT_COMPARED = frozenset({"path", "adapter"})
_TOTALS = ("trainable", "total", "bytes", "flops", "base")


@dataclass(frozen=True, slots=True)
class SiteDiff:
    """One site that both plans have, and the facts in which they differ: here and there."""

    adapter: str
    path: str
    facts: tuple[tuple[str, object, object], ...]


@dataclass(frozen=True, slots=True)
class PlanDiff:
    """What two plans do differently. `str` says it in lines; `as_json` is plain data.

    only_here, only_there: the sites that one plan alone has, as its `as_json` has them.
    changed: the sites of both whose facts differ, in the order of the first plan.
    shared: the parameters that sites share, and `totals`, the plans' totals, where they differ.
    """

    only_here: tuple[Data, ...] = ()
    only_there: tuple[Data, ...] = ()
    changed: tuple[SiteDiff, ...] = ()
    shared: tuple[object, object] | None = None
    totals: tuple[tuple[str, object, object], ...] = ()

    def __bool__(self) -> bool:
        """Whether there is any difference."""
        return bool(self.only_here or self.only_there or self.changed or self.shared or self.totals)

    def __str__(self) -> str:
        """A line for each site that one plan lacks, and the facts that differ at the others."""
        return "\n".join(_lines(self)) or "the plans are the same"

    def as_json(self) -> dict[str, object]:
        """The difference as plain data: `here` and `there` for each fact."""
        return {
            "only_here": [dict(site) for site in self.only_here],
            "only_there": [dict(site) for site in self.only_there],
            "changed": [
                {"adapter": c.adapter, "path": c.path, "facts": _sides(c.facts)}
                for c in self.changed
            ],
            "shared": self.shared and {"here": self.shared[0], "there": self.shared[1]},
            "totals": _sides(self.totals),
        }


def difference(here: Data, there: Data) -> PlanDiff:
    """What differs between two plans as `as_json` gives them."""
    ours, theirs = _sites(here), _sites(there)
    changed = (
        SiteDiff(key[0], key[1], facts)
        for key, site in ours.items()
        if key in theirs and (facts := _facts(site, theirs[key]))
    )
    return PlanDiff(
        only_here=tuple(site for key, site in ours.items() if key not in theirs),
        only_there=tuple(site for key, site in theirs.items() if key not in ours),
        changed=tuple(changed),
        shared=None if here["shared"] == there["shared"] else (here["shared"], there["shared"]),
        totals=tuple((n, here[n], there[n]) for n in _TOTALS if here[n] != there[n]),
    )


def _sites(plan: Data) -> dict[Key, Data]:
    found: dict[Key, Data] = {}
    for site in cast("list[Data]", plan["sites"]):
        adapter, path = str(site["adapter"]), str(site["path"])
        number = 0
        while (adapter, path, number) in found:
            number += 1
        found[adapter, path, number] = site
    return found


def _facts(here: Data, there: Data) -> tuple[tuple[str, object, object], ...]:
    names = [name for name in {**here, **there} if name not in _NOT_COMPARED]
    return tuple(
        (name, here.get(name), there.get(name))
        for name in names
        if here.get(name) != there.get(name)
    )


def _sides(facts: tuple[tuple[str, object, object], ...]) -> dict[str, object]:
    return {name: {"here": here, "there": there} for name, here, there in facts}


# --------------------------------------------------------------------------------- as text

_IN_WORDS = ("method", "arguments", "then", "kind", "in", "out", "parameters", "merge")
"""What is told of a site; the rest follows from these, or is told where these are the same."""


def _lines(diff: PlanDiff) -> Iterator[str]:
    several = len({str(s["adapter"]) for s in (*diff.only_here, *diff.only_there)}) > 1
    yield from (f"- {_site(site, several)}" for site in diff.only_here)
    yield from (f"+ {_site(site, several)}" for site in diff.only_there)
    for change in diff.changed:
        told = [f for f in change.facts if f[0] in _IN_WORDS] or list(change.facts)
        yield f"~ {change.path or _ROOT}"
        for name, here, there in told:
            yield from _fact(name, here, there)
    if diff.shared is not None:
        yield "what sites share differs:"
        yield from _fact("shared", *diff.shared)
    if not (diff.only_here or diff.only_there or diff.changed or diff.shared):
        yield from (line for total in diff.totals for line in _fact(*total))
        return
    if diff:
        yield _counts(diff)


_ROOT = "(the model itself)"


def _site(site: Data, several: bool) -> str:
    links = (site, *cast("list[Data]", site.get("then", [])))
    adapter = f"{site['adapter']}: " if several else ""
    return f"{site['path'] or _ROOT}  {adapter}{' then '.join(map(_call, links))}"


def _call(link: Data) -> str:
    given = ", ".join(f"{n}={shown(v)}" for n, v in cast(Data, link["arguments"]).items())
    return f"{link['method']}({given})"


def _fact(name: str, here: object, there: object) -> Iterator[str]:
    """One line a fact; of a mapping, a line for each entry that differs."""
    if not (isinstance(here, Mapping) and isinstance(there, Mapping)):
        yield f"    {name}: {_value(cast(object, here))} → {_value(there)}"
        return
    ours, theirs = cast(Data, here), cast(Data, there)
    for key in {**ours, **theirs}:
        if ours.get(key) != theirs.get(key):
            yield from _fact(f"{name} {key}", ours.get(key), theirs.get(key))


def _value(value: object) -> str:
    match value:
        case None:
            return "none"
        case Mapping():
            given = cast(Data, value)
            return " ".join(f"{name}={_value(v)}" for name, v in given.items())
        case list():
            return f"[{', '.join(map(_value, cast('list[object]', value)))}]"
        case _:
            return shown(value)


def _counts(diff: PlanDiff) -> str:
    counts = ((len(diff.only_here), "only here"), (len(diff.only_there), "only there"))
    parts = [f"{count} {where}" for count, where in (*counts, (len(diff.changed), "changed"))]
    trained = [f"{h:,} → {t:,} trainable" for n, h, t in diff.totals if n == "trainable"]
    return ", ".join([f"sites: {', '.join(parts)}", *trained])
