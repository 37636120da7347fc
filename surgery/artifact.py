"""A saved adapter: a folder that holds the tensors and the mathematics, and needs no code.

`adapter_model.safetensors` has the tensors, under peft's keys where one peft config expresses the
adapter (`adapter_config.json`) and under native keys where not; `adapter.peft` has every method
and format it uses; `mapping.json` has the sites as they were resolved, so that attaching selects
nothing again; `inverse.json` says how a merge can be taken back.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from math import prod
from pathlib import Path
from typing import Protocol, TypeVar, cast

from torch import Tensor, nn

from surgery.algebra.beginnings import PAIRS
from surgery.algebra.cost import numbers
from surgery.algebra.equations import Parameter, Random
from surgery.algebra.expr import Expr, render
from surgery.algebra.scalars import literal
from surgery.arguments import Link, without_told
from surgery.check import DEFAULT_ADAPTER, Resolved, resolve
from surgery.digests import Digest
from surgery.errors import Report, refuse
from surgery.language import syntax as ast
from surgery.language.library import Library
from surgery.language.parse import MAX_WORDS, parse_bytes
from surgery.manifest import VERSION, Manifest, manifest_data
from surgery.mapping import ForeignConfig, Reason, StateDictMapping, mapping_of, peft_config
from surgery.mapping.config import PEFT, saying
from surgery.mapping.keys import ADAPTED, NATIVE, Row
from surgery.mapping.pieces import pieces_of
from surgery.mapping.spelling import Formats
from surgery.model.holder import shared_name
from surgery.model.parts import WHOLE
from surgery.plan import Assignment, plan_assignments
from surgery.planned import Plan, PlannedSite, SiteClass
from surgery.rating import written
from surgery.remade import unlike_drawn, with_remade
from surgery.store import (
    TensorFile,
    Writer,
    json_writer,
    read_json,
    read_tensors,
    read_text,
    tensors_writer,
    text_writer,
    write_directory,
)

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
SPEC = "adapter.peft"
MAPPING = "mapping.json"
INVERSE = "inverse.json"

FILES = (TENSORS, CONFIG, SPEC, MAPPING, INVERSE)
"""All that a folder of an adapter is made of."""

_FOREIGN = "surgery.integrations.peft"
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_.]+")
_MOST_STATEMENTS = 200

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What was written. peft: "" if it is a peft folder too, else the reason why it is not."""

    files: tuple[Path, ...]
    peft: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a folder holds: an adapter's sites and methods, and its tensors by adapted names.

    base: digests of the weights that it was made on, by the paths of sites.
    """

    resolved: Resolved
    assignments: tuple[Assignment, ...]
    tensors: Mapping[str, Tensor]
    adapter: str
    seed: int = 0
    base: Mapping[str, Digest] = field(default_factory=dict[str, Digest])


# ------------------------------------------------------------------------------------- saving


def save_adapter(
    directory: Path,
    plan: Plan,
    adapter: str,
    tensors: Mapping[str, Tensor],
    seed: int,
    base: Mapping[str, Digest],
    *,
    peft: bool = True,
    model: nn.Module | None = None,
    config: Mapping[str, object] | None = None,
) -> SaveReport:
    """Write an adapter to a folder, all of it or nothing; what stood there before is replaced.

    tensors: by adapted names, as `mapping_of` has them. base: digests of the weights below it, by
    the paths of sites. peft: whether it is a peft folder where it can be. model: what the adapter
    is on, which says what the base is and which copies are whole modules. config: fields by which
    one of several formats of a method is chosen. Raises ArtifactError: E513 if it cannot be
    written, E518 for a tensor that is none of the adapter's, E524 where no format has such fields.
    """
    formats = plan.resolved.library.formats
    if config:
        formats = saying(formats, PEFT, config)
    foreign: ForeignConfig | Reason = Reason("it was not asked for")
    if peft:
        foreign = peft_config(plan, adapter, model, formats)
    mapping = mapping_of(plan, formats=formats).of_adapter(adapter)
    form = NATIVE if isinstance(foreign, Reason) else foreign.format.name
    reason = foreign.text if isinstance(foreign, Reason) else ""
    if not reason:
        reason = _not_drawn(plan, mapping, tensors, form, bool(config))
    if not reason and not config:
        reason = mapping.obstacle(tensors, form)
    if reason:
        foreign, form = Reason(reason), NATIVE
    sites = _sites(plan, adapter)
    files: dict[str, Writer] = {
        TENSORS: tensors_writer(mapping.rename(tensors, ADAPTED, form), {}),
        SPEC: text_writer(spec_text(plan, adapter, formats)),
        MAPPING: json_writer(
            manifest_data(sites, adapter, mapping, form=form, peft=reason, seed=seed, base=base)
        ),
        INVERSE: json_writer(inverse_data(plan, adapter)),
    }
    if isinstance(foreign, ForeignConfig):
        files[CONFIG] = json_writer(foreign.values)
    written = write_directory(directory, files, owned=FILES)
    return SaveReport(written, reason)


def _not_drawn(
    plan: Plan, mapping: StateDictMapping, tensors: Mapping[str, Tensor], form: str, asked: bool
) -> str:
    """Why what a form leaves out for its seed is needed, if it is (E518 where that was asked)."""
    name = unlike_drawn(plan, mapping, tensors, form)
    reason = f"`{name}` is not what its seed draws here, and {form} would not have it"
    if name and asked:
        refuse("E518", reason, hint="save it with its tensors, or in the native form")
    return reason if name else ""


def _sites(plan: Plan, adapter: str) -> list[PlannedSite]:
    return [s for s in plan.sites if s.adapter == adapter]


def spec_text(plan: Plan, adapter: str, formats: Formats | None = None) -> str:
    """A spec that carries the adapter's own mathematics: its methods, formats and statements.

    Params have the values they were compiled with. formats: as in `mapping_of`.
    """
    resolved = plan.resolved
    links = [link for s in _sites(plan, adapter) for link in s.form.links]
    methods = {link.method.name: link.method for link in links}
    parts = ["# The adapter's own methods and formats. Its sites stand in mapping.json."]
    parts += [m.span.text for m in methods.values()]
    parts += [f.span.text for name in methods for f in (formats or resolved.library.formats)(name)]
    statements = dict(resolved.adapters).get(adapter, ())
    if statements:
        parts += list(_names(resolved))
        parts += [s.span.text for s in statements]
    else:
        parts += _explicit(_sites(plan, adapter))
    return "\n\n".join(parts) + "\n"


def _names(resolved: Resolved) -> Iterator[str]:
    for statement in resolved.spec.statements:
        match statement:
            case ast.Param():
                value = literal(resolved.values[statement.name])
                yield f"param {statement.name}: {statement.type} = {value}"
            case ast.Let():
                yield statement.span.text
            case _:
                continue


def _plain(site: PlannedSite) -> bool:
    return site.site.at == WHOLE and _PLAIN_PATH.fullmatch(site.path) is not None


def _explicit(sites: list[PlannedSite]) -> list[str]:
    """One statement a site, where the adapter came without any; none if that would be too long."""
    if len(sites) > _MOST_STATEMENTS or not all(map(_plain, sites)):
        return []
    return [f"match {site.path} apply {' then '.join(_applied(site))}" for site in sites]


def _applied(site: PlannedSite) -> Iterator[str]:
    for index, link in enumerate(site.form.links):
        yield _written(link) + written(site.rates, index)


def _written(link: Link) -> str:
    given = ", ".join(f"{n} = {literal(v)}" for n, v in without_told(link))
    return f"{link.method.name}({given})"


def inverse_data(plan: Plan, adapter: str) -> dict[str, object]:
    """How a merge can be taken back, as plain data: a row a class of sites, an index a site."""
    classes: dict[int, int] = {}
    rows: list[dict[str, object]] = []
    sites: dict[str, int] = {}
    for site in _sites(plan, adapter):
        if id(site.form) not in classes:
            classes[id(site.form)] = len(rows)
            rows.append(_inverse_row(site.form))
        sites[site.path] = classes[id(site.form)]
    return {"version": VERSION, "classes": rows, "sites": sites}


def _inverse_row(form: SiteClass) -> dict[str, object]:
    derived = form.derived
    weight = derived.inverse.weight
    return {
        "method": form.named,
        "merge": derived.merge_class,
        "equation": form.equation,
        "inverse": None if weight is None else f"W = {render(weight)}",
        "witnesses": {name: render(expr) for name, expr in derived.inverse.witnesses},
        "reason": derived.reason,
    }


# ------------------------------------------------------------------------------------ loading


class _Foreign(Protocol):
    def read_peft(self, directory: Path, model: nn.Module) -> Loaded: ...


def load_artifact(directory: Path, model: nn.Module) -> Loaded:
    """What a folder holds, ours or peft's, checked against the model. Nothing of it is run.

    Raises ArtifactError with all that is wrong: E511 and E512 for files, E514 for a manifest that
    does not hold together, E516 and E517 for what is no adapter, E518 for tensors that are missing,
    too many or of another shape; DefinitionError and PlanError for methods that do not fit.
    """
    if (directory / MAPPING).is_file() and (directory / SPEC).is_file():
        return _load_own(directory, model)
    if (directory / CONFIG).is_file():
        # Stands above this stage, and is imported only for such a folder.
        return cast(_Foreign, importlib.import_module(_FOREIGN)).read_peft(directory, model)
    what = "is no folder" if not directory.is_dir() else f"has neither {SPEC} nor {CONFIG}"
    refuse("E517", f"{directory} {what}", hint="name a folder that was written by a save")


def _load_own(directory: Path, model: nn.Module) -> Loaded:
    manifest = Manifest(directory / MAPPING, read_json(directory / MAPPING))
    spec = _own_spec(directory / SPEC)
    resolved = resolve(spec, Library.standard())
    adapter = manifest.adapter
    statements = dict(resolved.adapters).get(DEFAULT_ADAPTER, ())
    resolved = replace(resolved, adapters=((adapter, statements),), live=None, derived=())
    assignments = manifest.assignments(resolved)
    plan = plan_assignments(resolved, model, assignments, adapter)
    mapping = mapping_of(plan)
    file = read_tensors(directory / TENSORS)
    tensors = with_remade(plan, mapping, file, taken(mapping, file, manifest.form), manifest.form)
    manifest.check_keys(mapping.index(manifest.form))
    base = manifest.base_digests(plan.sites)
    return Loaded(resolved, assignments, tensors, adapter, manifest.seed, base)


def _own_spec(path: Path) -> ast.Spec:
    """The spec of a folder, which uses no other file (E514)."""
    # It has the statements of a spec, and the methods and formats that these use besides.
    spec = parse_bytes(read_text(path).encode(), str(path), 4 * MAX_WORDS)
    report = Report()
    for statement in spec.statements:
        if isinstance(statement, ast.Use):
            report.error(
                "E514",
                f"{path} uses another file",
                statement.span,
                hint="a saved adapter has all that it uses in it; save it again",
            )
    report.stop()
    return spec


# ------------------------------------------------------------------------------------ tensors


def taken(
    mapping: StateDictMapping,
    file: TensorFile,
    form: str,
    passed: Iterable[str] = (),
) -> dict[str, Tensor]:
    """The tensors of a file by adapted names, in the method's layout.

    passed: keys that are not the adapter's, and are known to be harmless. Raises ArtifactError
    (E518) that lists every key that is missing, unknown or of another shape.
    """
    report = Report()
    rows = mapping.index(form)
    file = _joined(file, rows, form)
    found = file.shapes.keys() - set(passed)
    _report_keys(rows.keys() - found, found - rows.keys(), file, report)
    for key in sorted(rows.keys() & found):
        wanted = rows[key].file_shape(form)
        if file.shapes[key] != wanted:
            report.error(
                "E518",
                f"`{key}` has shape {list(file.shapes[key])}, and the equation needs "
                f"{list(wanted)}",
                hint="it was made with other arguments, or for a model of another size",
            )
    report.stop()
    return {row.adapted: row.converted(file[key], form, ADAPTED) for key, row in rows.items()}


def _joined(file: TensorFile, rows: Mapping[str, Row], form: str) -> TensorFile:
    """A file with those tensors joined that it has in pieces."""
    for key, row in rows.items():
        pieces = pieces_of(key)
        if pieces is not None and pieces.fit(file.shapes, shape := row.file_shape(form)):
            file = file.joined(pieces.keys, key, shape, partial(pieces.joined, shape))
    return file


def _report_keys(
    missing: Iterable[str], extra: Iterable[str], file: TensorFile, report: Report
) -> None:
    absent, surplus = sorted(missing), sorted(extra)
    for key in absent:
        near = get_close_matches(key, surplus, 1, 0.8)
        hint = f"`{near[0]}` stands there instead" if near else _OTHER_FOLDER
        report.error("E518", f"{file.path} lacks the tensor `{key}`", hint=hint)
    for key in surplus:
        near = get_close_matches(key, absent or file.shapes, 1, 0.8)
        hint = (
            f"the nearest that belongs there is `{near[0]}`" if near and absent else _OTHER_FOLDER
        )
        report.error("E518", f"{file.path} has `{key}`, which is no tensor of it", hint=hint)


_OTHER_FOLDER = "the folder's config and its tensors were not saved together; copy it again"


def check_tensors(plan: Plan, loaded: Loaded) -> None:
    """Whether a loaded adapter's tensors are those of a plan. Raises ArtifactError (E518)."""
    report = Report()
    rows = mapping_of(plan).index(ADAPTED, loaded.adapter)
    redrawn = {name for name, row in rows.items() if row.redrawn}
    for name in sorted((rows.keys() ^ loaded.tensors.keys()) - redrawn):
        what = "is missing" if name in rows else "is no tensor of the adapter"
        report.error("E518", f"`{name}` {what}", hint=_OTHER_FOLDER)
    for name in sorted(rows.keys() & loaded.tensors.keys()):
        shape, wanted = tuple(loaded.tensors[name].shape), rows[name].shape
        if shape != wanted:
            message = f"`{name}` has shape {list(shape)}, not {list(wanted)}"
            report.error("E518", message, hint=_OTHER_FOLDER)
    report.stop()
    _check_places(plan, loaded, report)
    report.stop()


def _check_places(plan: Plan, loaded: Loaded, report: Report) -> None:
    """Whether places are in the matrices or vectors that they are of (E518)."""
    for site in plan.sites:
        for p in site.form.parameters:
            name = site.adapted(p.name)
            if p.shared:
                group = plan.groups[site.form.bank(site.adapter, p)]
                name = shared_name(site.adapter, group, p.declared_name)
            if not p.whole or name not in loaded.tensors:
                continue
            ends, places = _ends(site, p), loaded.tensors[name]
            if bool(((places < 0) | (places >= places.new_tensor(ends))).any()):
                whole = " × ".join(f"{end:g}" for (end,) in ends)
                message = f"`{name}` has places outside of {whole}"
                report.error("E518", message, hint=_OTHER_FOLDER)


def _ends(site: PlannedSite, p: Parameter) -> list[list[float]]:
    """What places are in: so many rows and columns of a matrix, or elements of a row."""
    match p.beginning:
        case Random(distribution, arguments):
            sizes = dict(arguments)
            return [[sizes[n]] for n in PAIRS.get(distribution, ("numbers",))]
        case Expr(args=(matrix,)):
            return [[prod(numbers(matrix, site.form.names))]]
        case _:
            raise AssertionError(p.begins)  # such beginnings alone are whole


__all__ = ["Loaded", "SaveReport", "check_tensors", "load_artifact", "save_adapter"]
