"""A config of peft's as a spec: the same sites with the same arguments, for a person to read.

With a model the two are compared site by site, and what the readable spec cannot say is listed by
paths; what changes the mathematics in a way that no method has is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from torch import nn

from surgery.algebra.scalars import Scalars, literal
from surgery.arguments import Link, without_told
from surgery.artifact import CONFIG
from surgery.check import Arguments, resolve
from surgery.errors import Diagnostic, Report, Source, Span, SurgeryError, refuse
from surgery.integrations.clauses import Clauses, clauses_of, described
from surgery.integrations.imported_copies import ASKED, of_modules, of_tables
from surgery.integrations.peft import INFORMATIVE, kind_of, refuse_kind
from surgery.integrations.peft_modules import of_copies
from surgery.integrations.peft_tokens import of_rows
from surgery.integrations.table_clauses import row_statements
from surgery.integrations.targets import (
    Chosen,
    all_of,
    by_pattern,
    ending,
    holds,
    matching,
    named,
    taken_where_absent,
    targets_of,
)
from surgery.language import syntax as ast
from surgery.language.formatting import formatted
from surgery.language.library import Library
from surgery.language.parse import parse
from surgery.mapping.fields import ConfigFile, ConfigReader, begun_otherwise, unknown_fields
from surgery.mapping.forms import (
    Biases,
    BySite,
    KeptBySite,
    Sites,
    fields_of,
    form_of,
    same,
)
from surgery.mapping.seats import Joint, joint_of, multiplied
from surgery.model.holder import parameters_of
from surgery.model.inventory import Inventory, joined, survey
from surgery.plan import plan
from surgery.store import read_json, read_text

NAME = "peft"
_AT = "site"  # a path that stands for all sites of a part


def import_config(path: str | Path, model: nn.Module | None = None) -> str:
    """The spec that does what a config of peft's does, with comments on what it leaves out.

    path: of an `adapter_config.json`, or of the folder that has it. model: what the config is for;
    it may lie on meta. With it, names that select nothing are left out and said, what the config
    leaves to the type of the model is written out, and the spec is compared with the config at each
    site. Raises ArtifactError: E511 and E512 for the file, E515 for a field that changes the
    mathematics as no method here does, E516 for a kind of adapter or modules that are not known;
    PlanError where its method does not fit the model.
    """
    return spec_of(read_config(Path(path)), model)


def spec_of(config: ConfigFile, model: nn.Module | None = None, *, begins: bool = False) -> str:
    """The same of a config that was read. Raises as `import_config` does.

    begins: the adapter is to begin as the config says, so of several methods that have its
    equation the one with that beginning is taken.
    """
    if of_copies(config):
        return formatted("\n".join(of_modules(config, model)))
    if of_rows(config):
        return formatted("\n".join(of_tables(config, model)))
    reading = reading_of(config, model is None, begins=begins)
    whole = _Import(reading, clauses_of(config, model), model)
    return formatted(
        "\n".join([*described(config, reading.fmt, INFORMATIVE, model), *whole.lines()])
    )


def read_config(path: Path) -> ConfigFile:
    """A config with its text. Raises ArtifactError (E511, E512)."""
    path = path / CONFIG if path.is_dir() else path
    return ConfigFile(read_json(path), Span(Source(str(path), read_text(path)), 0, 1))


# ---------------------------------------------------------------------------------- the method


@dataclass(frozen=True, slots=True)
class Reading:
    """A config as one format reads it, with the fields that are about sites sorted out."""

    config: ConfigFile
    fmt: ast.Format
    method: ast.Method
    sorts: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    biases: str = ""
    kept: Mapping[str, str] = field(default_factory=dict[str, str])

    def left(self, path: str) -> dict[str, object]:
        """What fields that say what is left of each site say of one, as they say it of `_AT`."""
        found: dict[str, object] = {}
        for name, key in self.kept.items():
            stated = self.config.get(name)
            table = cast("dict[str, object]", stated) if isinstance(stated, Mapping) else {}
            ends = (f"{path}.{key}", f"{path}.{key}.")
            mine = [v for k, v in table.items() if k == ends[0] or k.startswith(ends[1])]
            marks: list[object] = [cast(object, v) for v in mine if isinstance(v, list)]
            found[name] = {f"{_AT}.{key}": v for v in marks[:1]}
        return found

    def nothing_left(self, path: str) -> bool:
        """Whether training took a whole site away."""
        tables = cast("list[dict[str, list[object]]]", [*self.left(path).values()])
        return any(marks and not any(marks) for table in tables for marks in table.values())

    def arguments(self, given: Mapping[str, object], kind: str) -> Arguments:
        """The arguments where fields about sites say this. Raises ArtifactError (E515)."""
        values = {**self.config.values, **given}
        for name in (self.biases,) if self.biases else ():
            values[name] = "none"
        found = ConfigReader(self.fmt, self.method, replace_values(self.config, values))
        read = found.read(_AT, kind)
        report = Report()
        report.extend(read.problems)
        report.stop()
        return read.arguments

    @property
    def others(self) -> tuple[str, ...]:
        """The fields that name another beginning than the method's own."""
        arguments = dict(self.arguments(self.neutral, "linear"))
        return tuple(begun_otherwise(self.fmt, self.config, arguments, INFORMATIVE))

    @property
    def neutral(self) -> dict[str, object]:
        """What the fields about sites say of one that is in none of them."""
        tables = (*self.patterns, *self.kept)
        return {**{n: [] for n in self.sorts}, **{n: {} for n in tables}}


def replace_values(config: ConfigFile, values: Mapping[str, object]) -> ConfigFile:
    """The same text with other values."""
    return ConfigFile(values, config.source)


def reading_of(config: ConfigFile, no_model: bool, *, begins: bool = False) -> Reading:
    """The format that has the least against a config, and of these the one that says most of it.

    begins: as for `spec_of`. Raises ArtifactError as `import_config` does.
    """
    library, kind = Library.standard(), config.get("peft_type")
    known = [f for f in library.all_formats() if f.name == NAME]
    mine = [f for f in known if same(kind_of(f), kind)]
    if not mine:
        refuse_kind(config, known)
    tried = [_tried(_sorted(config, f, library), no_model) for f in mine]
    order = [(bool(p), begins and not p and len(r.others), u, len(p), -n) for p, u, n, r in tried]
    problems, *_, best = tried[order.index(min(order))]
    report = Report()
    report.extend(problems)
    report.stop()
    return best


def _sorted(config: ConfigFile, fmt: ast.Format, library: Library) -> Reading:
    method = library.method(fmt.method)
    assert method is not None  # the library names it
    forms = {item.name: form_of(item) for item in fields_of(fmt)}
    sorts = [n for n, f in forms.items() if isinstance(f, Sites) and f.condition is not None]
    patterns = [n for n, f in forms.items() if isinstance(f, BySite)]
    biases = next((n for n, f in forms.items() if isinstance(f, Biases)), "")
    kept = {n: f.key for n, f in forms.items() if isinstance(f, KeptBySite)}
    return Reading(config, fmt, method, tuple(sorts), tuple(patterns), biases, kept)


def _tried(reading: Reading, no_model: bool) -> tuple[list[Diagnostic], int, int, Reading]:
    """What is against a reading, how many fields it does not know, how many arguments are named."""
    known = (*INFORMATIVE, *ASKED)
    found = [*unknown_fields(reading.fmt, reading.config, known)]
    unknown = len(found)
    for name in reading.kept if no_model else ():
        if reading.config.get(name):
            message = f"`{name}` says what training left of each site, by its path"
            span, hint = reading.config.span(name), "give the model, or attach the folder"
            found.append(Diagnostic("E515", message, span, hint=hint))
    values = {**reading.config.values, **reading.neutral}
    values |= {reading.biases: "none"} if reading.biases else {}
    reader = ConfigReader(reading.fmt, reading.method, replace_values(reading.config, values))
    read = reader.read(_AT, "linear")
    return [*found, *read.problems], unknown, len(read.bound), reading


# ------------------------------------------------------------------------------------- parts


@dataclass(frozen=True, slots=True)
class Part:
    """Some sites that have the same arguments.

    among: what they are besides, with whether they are that. given: what fields about sites say.
    """

    chosen: Chosen
    among: tuple[tuple[Chosen, bool], ...] = ()
    given: Mapping[str, object] = field(default_factory=dict[str, object])
    kind: str = "linear"

    def takes(self, path: str) -> bool:
        """Whether a path is one of them."""
        return self.chosen.takes(path) and all(c.takes(path) is yes for c, yes in self.among)

    @property
    def selector(self) -> str:
        """The selector of all of this."""
        also = [c.selector if yes else f"not {c.selector}" for c, yes in self.among]
        return " & ".join([self.chosen.selector, *also])


def _split(part: Part, name: str, groups: Sequence[tuple[Chosen, object]]) -> Iterator[Part]:
    """A part by the first group that has a site, and what is then said; the rest at last."""
    before: list[tuple[Chosen, bool]] = []
    for group, said in groups:
        relation = holds(part.chosen, group)
        if relation == "never":
            continue
        among = (*part.among, *before)
        if relation == "always":
            yield replace(part, among=among, given={**part.given, name: said})
            return
        yield replace(part, among=(*among, (group, True)), given={**part.given, name: said})
        before.append((group, False))
    yield replace(part, among=(*part.among, *before))


def _groups(reading: Reading, name: str, model: nn.Module | None) -> list[tuple[Chosen, object]]:
    """What a field about sites has: some of them, and what it then says of `_AT`."""
    config = reading.config
    stated, span = config.get(name), config.span(name)
    if name in reading.patterns:
        table = cast("dict[str, object]", stated) if isinstance(stated, Mapping) else {}
        return [(by_pattern(p, span), {f"^(?:{_AT})$": value}) for p, value in table.items()]
    some = taken_where_absent(config, name, model) if stated is None else stated
    if isinstance(some, str):
        return [(matching(some, span), [_AT])]
    return [(one, [_AT]) for one in all_of(map(str, cast("list[object]", some)), ending)]


class _Import:
    """One config on its way to a spec."""

    def __init__(self, reading: Reading, clauses: Clauses, model: nn.Module | None) -> None:
        self.reading = reading
        self.config = reading.config
        self.clauses = clauses
        self.model = model
        self.parts = [*self._parts()]
        self.joints: set[str] = set()
        self.wanted = None if model is None else self._wanted(model)

    # -------------------------------------------------------------------------------- targets

    def _parts(self) -> Iterator[Part]:
        parts = [Part(chosen) for chosen in targets_of(self.config, self.model)]
        for name in cast("list[object]", self.config.get("target_parameters") or []):
            parts.append(Part(named(str(name)), kind="matrix"))
        for name in (*self.reading.sorts, *self.reading.patterns):
            groups = _groups(self.reading, name, self.model)
            parts = [one for part in parts for one in _split(part, name, groups)]
        yield from parts

    def _arguments(self, part: Part, kind: str | None = None, path: str = "") -> Arguments:
        given = {**self.reading.neutral, **part.given, **self.reading.left(path)}
        return self.reading.arguments(given, kind or part.kind)

    # ---------------------------------------------------------------------------- comparison

    def _wanted(self, model: nn.Module) -> dict[str, Arguments]:
        """The arguments of every site that the config is for, by its path (E516 for no site)."""
        report, found = Report(), dict[str, Arguments]()
        inventory = survey(model)
        for index, entry in enumerate(inventory.entries):
            part = self._part_of(entry.path, "linear")
            if part is None or entry.first != index or not self.clauses.takes(entry.path):
                continue
            joint = joint_of(entry.module)
            if joint is not None:
                found |= self._joint(entry.path, joint, self._arguments(part, joint.kind))
            elif entry.kind is None:
                message = f"`{entry.path}` is a {type(entry.module).__name__}"
                hint = "the config names it, and no method is put on a layer of this kind"
                report.error("E516", message, self.config.span("target_modules"), hint=hint)
            elif not self.reading.nothing_left(entry.path):
                found[entry.path] = self._arguments(part, entry.kind.name, entry.path)
        found |= self._parameters(inventory)
        report.stop()
        if not found:
            message = "the config names no module of the model"
            hint = "it is for another model"
            refuse("E516", message, self.config.span("target_modules"), hint=hint)
        return found

    def _joint(self, path: str, joint: Joint, said: Arguments) -> dict[str, Arguments]:
        """The sites of modules that the config names as one."""
        self.joints.add(path)
        times = multiplied(said, joint.times)
        return {joined(path, joint.parameter): said, joined(path, joint.child): times}

    def _parameters(self, inventory: Inventory) -> dict[str, Arguments]:
        """The sites that the config names as parameters."""
        names = (joined(e.path, n) for e in inventory.entries for n in parameters_of(e.module))
        parts = ((path, self._part_of(path, "matrix")) for path in dict.fromkeys(names))
        return {path.removesuffix(".weight"): self._arguments(part) for path, part in parts if part}

    def _part_of(self, path: str, kind: str) -> Part | None:
        return next((p for p in self.parts if p.kind == kind and p.takes(path)), None)

    def _agrees(self, text: str, *, last: bool = False) -> bool:
        """Whether a spec selects what is wanted; what is wrong with the last one is raised."""
        assert self.model is not None  # asked only with a model
        try:
            made = plan(resolve(parse(text), Library.standard()), self.model)
        except SurgeryError:
            if last:
                raise
            return False
        links = {s.path: s.form.links[0] for s in made.sites if not s.site.at.tensor}
        wanted = {p: Link(self.reading.method, a) for p, a in (self.wanted or {}).items()}
        got = {path: without_told(link) for path, link in links.items()}
        return got == {path: without_told(link) for path, link in wanted.items()}

    # ------------------------------------------------------------------------------------ text

    def lines(self) -> Iterator[str]:
        """The statements, and before them what is to be said."""
        yield from self._nowhere()
        matches = [*self._matches()]
        if self.wanted is not None and not self._agrees("\n".join(matches)):
            matches = [*self._by_path()]
            yield "# By paths, since no selector says the same on this model:"
            if not self._agrees("\n".join(matches), last=True):
                hint = "write a spec by hand, and compare with `surgery plan --diff`"
                span = self.config.span("target_modules")
                refuse("E516", "the sites of the config cannot all be selected", span, hint=hint)
        yield from matches
        heads = [*dict.fromkeys(p.chosen for p in self.parts if p.kind == "linear")]
        yield from self.clauses.trained(self.reading.biases, heads, [*(self.wanted or ())])
        yield from row_statements(self.reading.config, self.model)

    def _nowhere(self) -> Iterator[str]:
        """What is said of names of the config that the model has not."""
        if self.wanted is None:
            return
        found = {id(p.chosen) for p in self.parts if any(self._paths(p))}
        lacking = {p.chosen.selector for p in self.parts if id(p.chosen) not in found}
        if lacking:
            yield f"# The model has nothing of {', '.join(sorted(lacking))}, and peft says nothing."

    def _matches(self) -> Iterator[str]:
        for (arguments, optional), parts in self._alike().items():
            chosen = [
                p.selector if len(parts) == 1 or not p.among else f"({p.selector})" for p in parts
            ]
            yield self._statement(" | ".join(chosen), parts, arguments, optional)

    def _alike(self) -> dict[tuple[Arguments, bool], list[Part]]:
        """The parts that there are, by their arguments; without a model, parts of parts by need."""
        found: dict[tuple[Arguments, bool], list[Part]] = {}
        for part in self.parts:
            paths = None if self.wanted is None else [*self._paths(part)]
            if paths == []:
                continue
            optional = self.wanted is None and bool(part.among or part.chosen.where)
            kind = None if not paths else self._kind_at(paths[0])
            found.setdefault((self._arguments(part, kind), optional), []).append(part)
        return found

    def _paths(self, part: Part) -> Iterator[str]:
        assert self.wanted is not None  # asked only with a model
        for path in self.wanted:
            above = path.rpartition(".")[0]
            path_or_owner = above if above in self.joints else path
            tried = (path_or_owner,) if part.kind == "linear" else (path, f"{path}.weight")
            if any(self._part_of(p, part.kind) is part for p in tried):
                yield path

    def _kind_at(self, path: str) -> str | None:
        assert self.model is not None  # asked only with a model
        entry = next((e for e in survey(self.model).entries if e.path == path), None)
        return None if entry is None or entry.kind is None else entry.kind.name

    def _statement(
        self, selector: str, parts: Sequence[Part], arguments: Arguments, optional: bool
    ) -> str:
        where = next((p.chosen.where for p in parts if p.chosen.where), "")
        but = next((p.chosen.but for p in parts if p.chosen.but), "")
        paths = [] if self.wanted is None else [path for p in parts for path in self._paths(p)]
        tie = self.clauses.tie(paths)
        words = (
            "optional" if optional else "",
            f"match {selector}",
            self.clauses.around(where, but, lambda path: any(p.takes(path) for p in parts)),
            f"apply {self._call(arguments)}",
            tie,
            f"expect {len(paths)}" if paths else "",
        )
        return " ".join(filter(None, words))

    def _call(self, arguments: Arguments) -> str:
        """The method with what is not its default."""
        method, known, given = self.reading.method, dict[str, object](), list[str]()
        values = dict(arguments)
        for a in method.arguments:
            default = None if a.default is None else Scalars(known)(a.default)
            known[a.name] = values[a.name]
            if a.default is None or default != values[a.name]:
                given.append(f"{a.name}={literal(values[a.name])}")
        return f"{method.name}({', '.join(given)})"

    def _by_path(self) -> Iterator[str]:
        assert self.wanted is not None  # asked only with a model
        alike: dict[Arguments, list[str]] = {}
        for path, arguments in self.wanted.items():
            alike.setdefault(arguments, []).append(path)
        for arguments, paths in alike.items():
            chosen = " | ".join(named(path).selector for path in paths)
            tie = self.clauses.tie(paths)
            yield f"match {chosen} apply {self._call(arguments)} {tie} expect {len(paths)}"
