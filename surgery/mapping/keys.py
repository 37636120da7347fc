"""The names of every tensor as a bijection: base, adapted model, native file, other formats."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any, cast

from torch import Tensor, nn

from surgery.errors import ArtifactError, Report, refuse
from surgery.mapping.pieces import joined, pieces_of, sizes_of
from surgery.mapping.seats import Seat, seats_of
from surgery.mapping.spelling import DIALECTS, Formats, Spelling, chosen_format, place_of
from surgery.model.holder import SHARED, parameters_of, shared_name, under_adapters
from surgery.planned import Plan, PlannedSite, SharedParameter, SiteClass

ADAPTED, NATIVE = "adapted", "native"


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of an adapter under each of its names.

    site: the dotted path; "" for the root, and for a shared parameter.
    shape: in the method's layout, in elements; that of the adapted model and of native files.
    copy: whether it is a copy of a tensor of the base, which has its key in files.
    redrawn: whether a file may lack it, for its seed says what it is.
    """

    adapter: str
    site: str
    name: str
    adapted: str
    native: str
    shape: tuple[int, ...]
    spellings: tuple[Spelling, ...] = ()
    copy: bool = False
    redrawn: bool = False

    def key(self, form: str) -> str | None:
        """Its key in a form: `adapted`, `native` or a format; None where that has none."""
        match form:
            case "adapted":
                return self.adapted
            case "native":
                return self.native
            case _:
                spelling = self.spelling(form)
                return None if spelling is None else spelling.key

    def spelling(self, form: str) -> Spelling | None:
        """How a format spells it."""
        return next((s for s in self.spellings if s.format == form), None)

    def file_shape(self, form: str) -> tuple[int, ...]:
        """Its shape in a form, in elements."""
        spelling = self.spelling(form)
        return self.shape if spelling is None else spelling.file_shape(self.shape)

    def converted(self, tensor: Tensor, source: str, to: str) -> Tensor:
        """The tensor, from the layout of one form to that of another."""
        was, becomes = self.spelling(source), self.spelling(to)
        if was is not None:
            tensor = was.read(tensor)
        return tensor if becomes is None else becomes.written(tensor)


@dataclass(frozen=True)
class StateDictMapping:
    """Every tensor's name in the adapted model, in native files and in other formats.

    rows: the adapters' tensors. base: the base's keys, which are the same everywhere. An adapter's
    name is part of adapted names alone, so file forms hold one adapter at a time.
    Raises PlanError (E320) at construction if two tensors would have one name.
    """

    rows: tuple[Row, ...]
    base: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse names that are not distinct."""
        report = Report()
        forms = {s.format for row in self.rows for s in row.spellings}
        for adapter in self.adapters or ("",):
            for form in (ADAPTED, NATIVE, *sorted(forms)):
                rows = [row for row in self.rows if row.adapter == adapter]
                keys = [key for row in rows if (key := row.key(form)) is not None]
                stand_in = {row.key(form) for row in rows if row.copy}
                base = (key for key in self.base if key not in stand_in)
                _check_distinct([*base, *keys], form, report)
        report.stop()

    @cached_property
    def adapters(self) -> tuple[str, ...]:
        """The adapters, in the order of their rows."""
        return tuple(dict.fromkeys(row.adapter for row in self.rows))

    def of_adapter(self, adapter: str) -> StateDictMapping:
        """The mapping of one adapter alone."""
        return StateDictMapping(tuple(r for r in self.rows if r.adapter == adapter), self.base)

    def index(self, form: str, adapter: str | None = None) -> dict[str, Row]:
        """The rows of an adapter (None for the first) by their keys in a form."""
        chosen = adapter or next(iter(self.adapters), "")
        mine = ((row.key(form), row) for row in self.rows if row.adapter == chosen)
        return {key: row for key, row in mine if key is not None}

    def rename(
        self,
        state_dict: Mapping[str, Tensor],
        source: str = ADAPTED,
        to: str = "peft",
        adapter: str | None = None,
    ) -> dict[str, Tensor]:
        """A state dict under the keys and in the layouts of another form.

        source, to: `adapted`, `native`, or the name of a format. adapter: None for the first; the
        tensors of others are left out, since no file form has room for a name. What is not an
        adapter's keeps its key. Raises ArtifactError (E518) for an adapter's tensor that has no
        place in the mapping, or no key in `to`.
        """
        report, renamed = Report(), dict[str, Tensor]()
        index = self.index(source, adapter)
        others = {row.key(source) for row in self.rows} - index.keys()
        if source == ADAPTED:  # a copy stands for the base's own, under its key
            others |= {row.key(to) for row in index.values() if row.copy}
        numbered = {key: row for key, row in index.items() if pieces_of(key) is not None}
        tensors = joined(state_dict, {k: row.file_shape(source) for k, row in numbered.items()})
        for key, tensor in tensors.items():
            row = index.get(key)
            if row is None:
                if key not in others and _kept(key, source, index, report):
                    renamed[key] = tensor
                continue
            target = row.key(to)
            if target is None and row.redrawn:
                continue
            if target is None:
                hint = f"{to} has no spelling of this method; leave `{key}` out"
                report.error("E518", f"`{key}` has no key in {to}", hint=hint)
                continue
            renamed |= self._pieces(row, target, row.converted(tensor, source, to), tensors, source)
        report.stop()
        return renamed

    def obstacle(self, tensors: Mapping[str, Tensor], to: str) -> str:
        """Why another form has no place for the values of tensors, by adapted names; "" if it has.

        A plan does not show it, for it is of the values alone.
        """
        names = {row.adapted for row in self.rows if pieces_of(row.key(to) or "") is not None}
        if not names & tensors.keys():
            return ""
        try:
            self.rename(tensors, ADAPTED, to)
        except ArtifactError as error:
            return error.diagnostics[0].message
        return ""

    def _pieces(
        self, row: Row, key: str, tensor: Tensor, tensors: Mapping[str, Tensor], source: str
    ) -> dict[str, Tensor]:
        """A tensor by its key, or its pieces by theirs."""
        pieces = pieces_of(key)
        if pieces is None:
            return {key: tensor}
        beside = (r for r in self.rows if (r.adapter, r.site) == (row.adapter, row.site))
        by = next((r.key(source) for r in beside if r.name == pieces.by), None)
        if pieces.by and by not in tensors:
            hint = "rename the adapter's tensors all at once, from the adapted or the native form"
            refuse("E518", f"`{key}` is cut by {pieces.by}, which is not there", hint=hint)
        return pieces.cut(tensor, sizes_of(tensors[by]) if pieces.by and by is not None else ())

    def to_json(self) -> str:
        """The mapping as JSON text; `from_json` reads it back."""
        return json.dumps({"rows": [asdict(r) for r in self.rows], "base": self.base})

    @staticmethod
    def from_json(text: str) -> StateDictMapping:
        """The mapping that `to_json` wrote. Raises ArtifactError (E514) for anything else."""
        try:
            data = cast(dict[str, Any], json.loads(text))
            rows = tuple(map(_row_from, data["rows"]))
            return StateDictMapping(rows, tuple(map(str, data["base"])))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{type(error).__name__} {error}"
            hint = "it is the text of a mapping.json that `save` wrote"
            refuse("E514", f"this is not a mapping: {reason}", hint=hint)


def _kept(key: str, source: str, index: Mapping[str, Row], report: Report) -> bool:
    """Whether a key that is no row's is the base's own; if not, it is reported."""
    if source != ADAPTED or not under_adapters(key):
        return True
    near = get_close_matches(key, index, 1)
    hint = f"the nearest is `{near[0]}`" if near else ""
    report.error("E518", f"the mapping has no tensor `{key}`", hint=hint)
    return False


_ANOTHER_NAME = "give the parameter another name in its method"
_ANOTHER_KEY = "give one of them another key in the method's `format`"


def _check_distinct(keys: list[str], form: str, report: Report) -> None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            report.error(
                "E320",
                f"two tensors would be `{key}` in {form} form",
                hint=_ANOTHER_NAME if form in (ADAPTED, NATIVE) else _ANOTHER_KEY,
            )
        seen.add(key)


def _row_from(data: dict[str, Any]) -> Row:
    spellings = (
        Spelling(
            str(s["format"]),
            str(s["key"]),
            str(s["layout"]),
            tuple((str(n), int(v)) for n, v in s["sizes"]),
        )
        for s in data["spellings"]
    )
    text = (str(data[n]) for n in ("adapter", "site", "name", "adapted", "native"))
    shape, copy = tuple(map(int, data["shape"])), data.get("copy", False) is True
    redrawn = data.get("redrawn", False) is True
    return Row(*text, shape=shape, spellings=tuple(spellings), copy=copy, redrawn=redrawn)


# --------------------------------------------------------------------------------- from a plan


def mapping_of(
    plan: Plan, model: nn.Module | None = None, formats: Formats | None = None
) -> StateDictMapping:
    """The mapping of every tensor of a plan; with the model, its base's keys as well.

    formats: the format statements to spell by, for each method; None for all that the library has,
    the first of each name that fits.
    """
    known = formats or plan.resolved.library.formats
    base: Iterable[str] = () if model is None else model.state_dict(keep_vars=True)
    kept = tuple(k for k in base if not under_adapters(k))
    spellings: _Known = {}
    rows = [
        row
        for adapter in plan.adapters
        for site, seats in _seated([s for s in plan.sites if s.adapter == adapter])
        for row in _site_rows(site, seats, known, spellings)
    ]
    return StateDictMapping((*rows, *_shared_rows(plan, known)), kept)


_Known = dict[tuple[int, bool], dict[str, tuple[Spelling, ...]]]
"""The spellings of classes of sites, and whether the format names these with others."""


def _seated(sites: Sequence[PlannedSite]) -> Iterator[tuple[PlannedSite, dict[str, Seat]]]:
    """Each site of an adapter with its seat in every format that has seats."""
    names = [name for name, dialect in DIALECTS.items() if dialect.around]
    rows = [seats_of(sites, DIALECTS[name]) for name in names]
    for site, *seats in zip(sites, *rows, strict=True):
        yield site, dict(zip(names, seats, strict=True))


def _site_rows(
    site: PlannedSite, seats: Mapping[str, Seat], formats: Formats, every: _Known
) -> Iterator[Row]:
    form, joint = site.form, any(seat.joint is not None for seat in seats.values())
    known = every.get((id(form), joint))
    if known is None:
        known = every[id(form), joint] = dict(_spellings(formats, form, "{}", joint))
    natives = _native_names(site)
    prefix = f"{site.path}." if site.path else ""
    for p in form.parameters:
        if p.shared:
            continue
        copy = p.name in form.lying and form.at.whole
        spellings = (_at(s, seats, site.path) for s in known.get(p.name, ()))
        if form.at.picked:
            spellings = (
                _at(Spelling(n, f"{DIALECTS[n].site}{{}}.{seat.tensor}"), seats, site.site.owner)
                for n, seat in seats.items()
                if seat.tensor
            )
        if copy:
            parameter = site.site.at.parameter
            spellings = (
                _at(Spelling(n, f"{d.site}{{}}.{parameter}"), seats, site.site.owner)
                for n, d in DIALECTS.items()
            )
        yield Row(
            site.adapter,
            site.path,
            p.name,
            site.adapted(p.name),
            site.path if copy else prefix + natives[p.name],
            form.stored[p.name],
            tuple(spellings),
            copy,
            p.redrawn,
        )


def _at(spelling: Spelling, seats: Mapping[str, Seat], path: str) -> Spelling:
    seat = seats.get(spelling.format)
    module = path if seat is None else seat.module
    key = spelling.key.replace("{}.", f"{module}." if module else "", 1)
    return Spelling(spelling.format, key, spelling.layout, spelling.sizes)


def _spellings(
    known: Formats, form: SiteClass, path: str, joint: bool = False
) -> Iterator[tuple[str, tuple[Spelling, ...]]]:
    """For each parameter of a class of sites, how every format spells it at a path."""
    # No format has a place for methods that follow each other.
    formats = known(form.method.name) if len(form.links) == 1 else ()
    found: dict[str, list[Spelling]] = {}
    for name in dict.fromkeys(f.name for f in formats):
        chosen = chosen_format(tuple(f for f in formats if f.name == name), form, joint)
        if chosen is None:
            continue
        for p in form.parameters:
            if p.name in chosen[1]:  # else it is drawn again
                spelling = place_of(form).spelling(chosen[0], chosen[1][p.name], path, p.shared)
                found.setdefault(p.name, []).append(spelling)
    yield from ((name, tuple(spellings)) for name, spellings in found.items())


def _native_names(site: PlannedSite) -> dict[str, str]:
    """A parameter's name in a file is its own, with a `_` where the site has that name itself."""
    module = site.site.module
    buffers = cast("dict[str, object]", vars(module)["_buffers"])
    taken = {*parameters_of(module), *buffers}
    names = [p.name for p in site.form.parameters]
    natives: dict[str, str] = {}
    for name in names:
        native = name
        while native in taken or (native != name and native in names):
            native += "_"
        natives[name] = native
    return natives


def _shared_rows(plan: Plan, formats: Formats) -> Iterator[Row]:
    taken: set[tuple[str, str, str]] = set()
    for shared in plan.shared:
        group, name = plan.groups[shared.key], shared.parameter.name
        # A format has one place for a key, so only the first group that would have it does.
        spellings = tuple(
            s
            for s in _shared_spellings(plan, shared, formats)
            if (shared.adapter, s.format, s.key) not in taken
        )
        taken |= {(shared.adapter, s.format, s.key) for s in spellings}
        yield Row(
            shared.adapter,
            "",
            name,
            shared_name(shared.adapter, group, name),
            f"{SHARED}.{group}.{name}",
            shared.shape,
            spellings,
            redrawn=shared.parameter.redrawn,
        )


def _shared_spellings(
    plan: Plan, shared: SharedParameter, formats: Formats
) -> tuple[Spelling, ...]:
    for site in plan.sites:
        owners = {site.form.bank(site.adapter, p) for p in site.form.parameters if p.shared}
        if len(site.form.links) == 1 and shared.key in owners:
            return dict(_spellings(formats, site.form, site.path)).get(shared.parameter.name, ())
    return ()
