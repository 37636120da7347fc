"""`mapping.json`: the sites of a saved adapter as they were resolved, and what reading it takes.

A folder says in which version of the language it was written, and which features it has besides:
one that is required and not known is refused, one that is optional is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn, TypeVar, cast, get_args

import torch

from surgery import language
from surgery.algebra.kinds import KINDS, beyond
from surgery.algebra.places import Places, stated_place
from surgery.algebra.scalars import did_you_mean
from surgery.arguments import Arguments, Link
from surgery.check import Resolved, typed
from surgery.digests import Digest
from surgery.errors import Report, SurgeryError, refuse
from surgery.language import syntax as ast
from surgery.mapping import StateDictMapping
from surgery.model.parts import WHOLE, ParameterSlice, Part
from surgery.plan import Assignment
from surgery.planned import PlannedSite, links_data
from surgery.rating import Rates, data_of, stated

VERSION = 1

PARTS = "parts"
"""Sites that are slices of a parameter; who does not know them would adapt a whole layer."""

BASE_DIGESTS = "base-digests"
"""What the base's weights were."""

TIES = "ties"
"""Sites whose weight other layers share, and what becomes of it."""

CHAINS = "chains"
"""Methods that follow another at a site; who does not know them would put on the first alone."""

COPIES = "copies"
"""Sites that are parameters as they lie, of which the adapter has copies of its own."""

ROWS = "rows"
"""Sites that are some rows of a parameter as it lies; who does not know them would copy it all."""

RATES = "learning-rates"
"""What statements say that their parameters learn at."""

CALLS = "calls"
"""Sites that are the calls of modules, and none of their weights."""

PLACES = "places"
"""Sites that are adapted for some tokens; who does not know them would adapt them for all."""

FEATURES = frozenset({COPIES, ROWS, PARTS, TIES, CHAINS, BASE_DIGESTS, RATES, CALLS, PLACES})

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")


def manifest_data(
    sites: Iterable[PlannedSite],
    adapter: str,
    mapping: StateDictMapping,
    *,
    form: str,
    peft: str,
    seed: int,
    base: Mapping[str, Digest],
) -> dict[str, object]:
    """The manifest as plain data.

    form: under which keys the tensors stand. peft: why it is no peft folder, or "". base: digests
    of the base's weights, by the paths of sites.
    """
    sites = tuple(sites)
    needs = {
        PARTS: any(s.site.at != WHOLE and not (s.site.at.tensor or s.site.at.kind) for s in sites),
        CALLS: any(s.site.at.kind for s in sites),
        PLACES: any(s.form.places for s in sites),
        COPIES: any(s.site.at.tensor for s in sites),
        ROWS: any(s.site.at.picked for s in sites),
        TIES: any(s.site.tie is not None for s in sites),
        CHAINS: any(len(s.form.links) > 1 for s in sites),
    }
    required = [name for name, needed in needs.items() if needed]
    optional = [BASE_DIGESTS] * bool(base) + [RATES] * any(s.rates for s in sites)
    return {
        "version": VERSION,
        "language": language.VERSION,
        "features": {"required": required, "optional": optional},
        "adapter": adapter,
        "seed": seed,
        "form": form,
        "peft": peft,
        "sites": [_site(site, base.get(site.path)) for site in sites],
        "tensors": [
            {"file": row.key(form), "native": row.native, "adapted": row.adapted}
            for row in mapping.rows
            if row.key(form) is not None
        ],
    }


def _site(site: PlannedSite, base: Digest | None) -> dict[str, object]:
    places = site.form.places
    return {
        "path": site.site.owner,
        **_slice(site.site.at),
        **({} if site.site.tie is None else {"tie": site.site.tie}),
        "kind": site.form.kind.name,
        "out": site.form.sizes.fan_out,
        "in": site.form.sizes.fan_in,
        **links_data(site.form.links),
        **data_of(site.rates),
        **({"at": [[one.kind, *one.numbers] for one in places]} if places else {}),
        **({} if base is None else {"base": asdict(base)}),
    }


def _slice(at: ParameterSlice) -> dict[str, object]:
    """Which part of a module a site is; nothing for all of its weight."""
    stated = {} if at.kind else asdict(at)  # a site's kind is told of each
    return {name: value for name, value in stated.items() if value != _WHOLE[name]}


_WHOLE = asdict(WHOLE)

_NEWER = "it was saved by a newer version of surgery; read it with that one"


class Manifest:
    """`mapping.json`, of which nothing is believed before it is checked."""

    def __init__(self, path: Path, data: Mapping[str, object]) -> None:
        """Take the content of a file. Raises ArtifactError: E514, E521 for what is not known."""
        self.path = path
        self.data = data
        if data.get("version") != VERSION:
            self._refuse(f"`version` is {data.get('version')!r}, and {VERSION} is known")
        self._check_needs()

    def _check_needs(self) -> None:
        """E521 for what this version does not have: of the language, and of features."""
        report = Report()
        needed = self.data.get("language", language.VERSION)
        if type(needed) is not int or needed < 1:
            self._refuse(f"`language` is {needed!r}, which is no version")
        if needed > language.VERSION:
            report.error(
                "E521",
                f"{self.path}: it is written in version {needed} of the language, and "
                f"{language.VERSION} is the newest that is known",
                hint=_NEWER,
            )
        for name in self._required():
            if name not in FEATURES:
                message = f"{self.path}: it needs `{name}`, which is not known here"
                report.error("E521", message, hint=_NEWER)
        report.stop()

    def _required(self) -> list[str]:
        features = self.data.get("features", {})
        stated = cast("dict[str, object]", features if isinstance(features, dict) else {"": None})
        for names in stated.values():
            some = cast("list[object]", names if isinstance(names, list) else [None])
            if not all(isinstance(name, str) for name in some):
                self._refuse(f"`features` is {features!r}, which is no lists of names")
        return cast("list[str]", stated.get("required", []))

    def check_keys(self, keys: Iterable[str]) -> None:
        """Whether the tensors that it lists are those that its sites have (E514)."""
        listed = cast("list[object]", self._typed("tensors", list))
        files = [
            cast("dict[str, object]", row).get("file") for row in listed if isinstance(row, dict)
        ]
        if len(files) != len(listed) or sorted(map(str, files)) != sorted(keys):
            self._refuse("`tensors` does not list the tensors of its sites")

    def base_digests(self, sites: Iterable[PlannedSite]) -> dict[str, Digest]:
        """The digests that it states of the base's weights, by path; `sites` as it lists them."""
        found: dict[str, Digest] = {}
        entries = cast("list[dict[str, object]]", self._typed("sites", list))
        for site, entry in zip(sites, entries, strict=True):
            if "base" in entry:
                found[site.path] = self._digest(entry["base"])
        return found

    def _digest(self, stated: object) -> Digest:
        entry = cast("dict[str, object]", stated if isinstance(stated, dict) else {})
        dtype, sha256 = entry.get("dtype"), entry.get("sha256")
        if (
            not isinstance(dtype, str)
            or not isinstance(getattr(torch, dtype, None), torch.dtype)
            or not (isinstance(sha256, str) and _SHA256.fullmatch(sha256))
        ):
            self._refuse(f"{stated!r} is no digest of a weight")
        return Digest(dtype, sha256)

    def _refuse(self, what: str) -> NoReturn:
        refuse("E514", f"{self.path}: {what}", hint="save the adapter again")

    @property
    def adapter(self) -> str:
        """The adapter's name, which becomes part of the names of modules."""
        name = self.data.get("adapter")
        if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name):
            self._refuse(f"`adapter` is {name!r}, which is no name")
        return name

    @property
    def form(self) -> str:
        """Under which keys the tensors stand."""
        return self._typed("form", str)

    @property
    def seed(self) -> int:
        """The seed of what can be drawn again."""
        return self._typed("seed", int)

    def _typed(self, name: str, kind: type[T]) -> T:
        value = self.data.get(name)
        if not isinstance(value, kind):
            self._refuse(f"`{name}` is missing")
        return value

    def assignments(self, resolved: Resolved) -> tuple[Assignment, ...]:
        """The sites with their methods and arguments. Raises with all that do not hold together."""
        report = Report()
        made: list[Assignment] = []
        seen: dict[str, list[ParameterSlice]] = {}
        for entry in cast("list[object]", self._typed("sites", list)):
            try:
                one = self._assignment(entry, resolved)
            except SurgeryError as error:
                report.extend(error.diagnostics)
                continue
            there = seen.setdefault(one.path, [])
            if any(one.at.meets(at) for at in there):
                report.error(
                    "E514", f"{self.path}: `{one.path}` stands twice", hint="leave one of them out"
                )
            there.append(one.at)
            made.append(one)
        report.stop()
        return tuple(made)

    def _assignment(self, stated: object, resolved: Resolved) -> Assignment:
        entry = cast("dict[str, object]", stated if isinstance(stated, dict) else {})
        path, more = entry.get("path"), entry.get("then", [])
        if not isinstance(path, str) or not isinstance(more, list):
            self._refuse("a site is not described by path, method and arguments")
        each = (entry, *cast("list[object]", more))
        links = tuple(self._link(one, path, resolved) for one in each)
        at, tie = self._slice(entry), self._tie(entry.get("tie"))
        if any((link.method.kind in KINDS) is at.tensor for link in links):
            self._refuse(f"`{path}` has a method that is for another kind of site")
        rates = self._rates(entry.get("lr", []), path, links)
        places = self._places(entry.get("at", []))
        return Assignment(path, links, links[0].method.span, at, tie, rates, places)

    def _places(self, listed: object) -> tuple[Places, ...]:
        rows = cast("list[object]", listed) if isinstance(listed, list) else [None]
        some = [stated_place(row) for row in rows]
        found = tuple(place for place in some if place is not None)
        if len(found) != len(rows):
            self._refuse(f"{listed!r} are no places of a text")
        return found

    def _rates(self, listed: object, path: str, links: Sequence[Link]) -> Rates:
        rows = cast("list[object]", listed) if isinstance(listed, list) else [None]
        some = [stated(cast("dict[str, object]", r)) for r in rows if isinstance(r, dict)]
        found = tuple(r for r in some if r is not None and 0 <= r.link < len(links))
        if len(found) != len(rows):
            self._refuse(f"`{path}` has {listed!r}, which are no learning rates")
        return found

    def _link(self, stated: object, path: str, resolved: Resolved) -> Link:
        entry = cast("dict[str, object]", stated if isinstance(stated, dict) else {})
        name, given = entry.get("method"), entry.get("arguments")
        if not isinstance(name, str) or not isinstance(given, dict):
            self._refuse("a site is not described by path, method and arguments")
        method = resolved.library.method(name)
        if method is None:
            hint = did_you_mean(name, resolved.library.names())
            refuse("E514", f"{self.path}: `{path}` has the unknown method `{name}`", hint=hint)
        return Link(method, self._arguments(method, cast("dict[str, object]", given)))

    def _tie(self, stated: object) -> ast.Tie | None:
        if stated is not None and stated not in get_args(ast.Tie):
            self._refuse(f"{stated!r} does not say what becomes of a shared weight")
        return cast("ast.Tie | None", stated)

    def _slice(self, entry: Mapping[str, object]) -> ParameterSlice:
        kind = entry.get("kind")
        if isinstance(kind, str) and beyond(kind):
            return ParameterSlice("", bias="", kind=kind)
        names = ("parameter", "bias", "index", "tensor")
        stated = {n: entry.get(n, _WHOLE[n]) for n in names}
        parameter, bias, index, tensor = stated.values()
        part = self._part(entry.get("part"))
        if not (isinstance(parameter, str) and isinstance(bias, str)):
            self._refuse(f"{stated!r} is no slice of a parameter")
        picked = self._picked(entry.get("picked", []))
        if tensor is True and bias == "" and index is None and part is None:
            return ParameterSlice(parameter, bias, tensor=True, picked=picked)
        if picked or tensor is not False:
            self._refuse(f"{stated!r} is no slice of a parameter")
        if not (index is None or (type(index) is int and index >= 0)):
            self._refuse(f"{stated!r} is no slice of a parameter")
        return ParameterSlice(parameter, bias, index, part)

    def _picked(self, stated: object) -> tuple[int, ...]:
        rows = cast("list[object]", stated) if isinstance(stated, list) else [None]
        if not all(type(row) is int and row >= 0 for row in rows) or len({*rows}) != len(rows):
            self._refuse(f"{stated!r} are no rows of a parameter")
        return cast("tuple[int, ...]", tuple(rows))

    def _part(self, stated: object) -> Part | None:
        if stated is None:
            return None
        entry = cast("dict[str, object]", stated if isinstance(stated, dict) else {})
        once = {"period": entry.get("whole")}  # where they stand together
        names = ("name", "start", "stop", "whole", "period")
        name, *rows = (entry.get(n, once.get(n)) for n in names)
        if not (isinstance(name, str) and _IDENTIFIER.fullmatch(name)) or not all(
            type(row) is int for row in rows
        ):
            self._refuse(f"{stated!r} is no part of a layer")
        part = Part(name, *cast("tuple[int, int, int, int]", rows))
        if not part.fits:
            self._refuse(f"{stated!r} is no part of a layer")
        return part

    def _arguments(self, method: ast.Method, given: Mapping[str, object]) -> Arguments:
        names = [a.name for a in method.arguments]
        if sorted(given) != sorted(names):
            self._refuse(f"{method.name} has the arguments {names}, and here are {list(given)}")
        return tuple(
            (a.name, typed(given[a.name], a.type, a.name, a.span)) for a in method.arguments
        )
