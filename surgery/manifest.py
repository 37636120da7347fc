"""`mapping.json`: the sites of a saved adapter as they were resolved, and what reading it takes.

A folder says in which version of the language it was written, and which features it has besides:
one that is required and not known is refused, one that is optional is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn, TypeVar, cast, get_args

import torch

from surgery import language
from surgery.check import Arguments, Resolved, typed
from surgery.digests import Digest
from surgery.errors import Report, SurgeryError, refuse
from surgery.language import syntax as ast
from surgery.mapping import StateDictMapping
from surgery.model.parts import Part, overlap
from surgery.plan import Assignment
from surgery.planned import PlannedSite

VERSION = 1

PARTS = "parts"
"""Sites that are rows of a layer; who does not know them would adapt the whole layer."""

BASE_DIGESTS = "base-digests"
"""What the base's weights were."""

TIES = "ties"
"""Sites whose weight other layers share, and what becomes of it."""

FEATURES = frozenset({PARTS, TIES, BASE_DIGESTS})

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
    parts = [PARTS] if any(s.site.part is not None for s in sites) else []
    required = [*parts, *([TIES] if any(s.site.tie is not None for s in sites) else [])]
    return {
        "version": VERSION,
        "language": language.VERSION,
        "features": {"required": required, "optional": [BASE_DIGESTS] if base else []},
        "adapter": adapter,
        "seed": seed,
        "form": form,
        "peft": peft,
        "sites": [_site(site, base.get(site.path)) for site in sites],
        "tensors": [
            {"file": row.key(form), "native": row.native, "adapted": row.adapted}
            for row in mapping.rows
        ],
    }


def _site(site: PlannedSite, base: Digest | None) -> dict[str, object]:
    return {
        "path": site.site.owner,
        **({} if site.site.part is None else {"part": asdict(site.site.part)}),
        **({} if site.site.tie is None else {"tie": site.site.tie}),
        "kind": site.form.kind.name,
        "out": site.form.sizes.fan_out,
        "in": site.form.sizes.fan_in,
        "method": site.form.method.name,
        "arguments": dict(site.form.arguments),
        **({} if base is None else {"base": asdict(base)}),
    }


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
        seen: dict[str, list[Part | None]] = {}
        for entry in cast("list[object]", self._typed("sites", list)):
            try:
                one = self._assignment(entry, resolved)
            except SurgeryError as error:
                report.extend(error.diagnostics)
                continue
            there = seen.setdefault(one.path, [])
            if any(overlap(one.part, part) for part in there):
                report.error(
                    "E514", f"{self.path}: `{one.path}` stands twice", hint="leave one of them out"
                )
            there.append(one.part)
            made.append(one)
        report.stop()
        return tuple(made)

    def _assignment(self, stated: object, resolved: Resolved) -> Assignment:
        entry = cast("dict[str, object]", stated if isinstance(stated, dict) else {})
        wanted = {"path": str, "method": str, "arguments": dict}
        if not all(isinstance(entry.get(n), kind) for n, kind in wanted.items()):
            self._refuse(f"a site is not described by {', '.join(wanted)}")
        path, name = str(entry["path"]), str(entry["method"])
        method = resolved.library.method(name)
        if method is None:
            near = get_close_matches(name, resolved.library.names(), 1)
            hint = f"did you mean `{near[0]}`?" if near else ""
            refuse("E514", f"{self.path}: `{path}` has the unknown method `{name}`", hint=hint)
        given = cast("dict[str, object]", entry["arguments"])
        part = self._part(entry.get("part"))
        arguments, tie = self._arguments(method, given), self._tie(entry.get("tie"))
        return Assignment(path, method, arguments, method.span, part, tie)

    def _tie(self, stated: object) -> ast.Tie | None:
        if stated is not None and stated not in get_args(ast.Tie):
            self._refuse(f"{stated!r} does not say what becomes of a shared weight")
        return cast("ast.Tie | None", stated)

    def _part(self, stated: object) -> Part | None:
        if stated is None:
            return None
        entry = cast("dict[str, object]", stated if isinstance(stated, dict) else {})
        name, *rows = (entry.get(n) for n in ("name", "start", "stop", "whole"))
        if not (isinstance(name, str) and _IDENTIFIER.fullmatch(name)) or not all(
            type(row) is int for row in rows
        ):
            self._refuse(f"{stated!r} is no part of a layer")
        start, stop, whole = cast("list[int]", rows)
        return Part(name, start, stop, whole)

    def _arguments(self, method: ast.Method, given: Mapping[str, object]) -> Arguments:
        names = [a.name for a in method.arguments]
        if sorted(given) != sorted(names):
            self._refuse(f"{method.name} has the arguments {names}, and here are {list(given)}")
        return tuple(
            (a.name, typed(given[a.name], a.type, a.name, a.span)) for a in method.arguments
        )
