"""Folders that Hugging Face peft wrote, read without it: the formats say what they mean.

The sites are those that the tensors name, but for empty ones, which add nothing, and those that the
config names, where tensors are what all share; the method and its arguments come from the config,
and whatever in it is not understood is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import NoReturn, cast

import torch
from torch import Tensor, nn

from surgery.arguments import Link
from surgery.artifact import CONFIG, TENSORS, Loaded, taken
from surgery.check import DEFAULT_ADAPTER, Arguments, unstated
from surgery.errors import Diagnostic, Report, Source, Span, refuse
from surgery.integrations.clauses import targeted
from surgery.integrations.peft_modules import (
    FIELD,
    copied_modules,
    marked_keys,
    of_copies,
    plain_keys,
    saved_modules,
    trained_biases,
    understood,
)
from surgery.integrations.peft_sites import Named, named_sites
from surgery.integrations.peft_tokens import of_rows, rows_alone, trained_rows
from surgery.language import syntax as ast
from surgery.language.library import Library
from surgery.mapping import StateDictMapping, mapping_of
from surgery.mapping.fields import ConfigFile, ConfigReader, unknown_fields
from surgery.mapping.forms import Biases, constant, form_of, same, shown
from surgery.mapping.forms import Value as ValueForm
from surgery.mapping.pieces import measured_in, named_in
from surgery.mapping.seats import multiplied, seats_of
from surgery.mapping.spelling import dialect_of, rows_of
from surgery.model.holder import ADAPTERS
from surgery.plan import Assignment, plan_assignments
from surgery.planned import Plan
from surgery.remade import with_remade
from surgery.store import TensorFile, read_json, read_tensors, read_text

NAME = "peft"
_BASE_LAYER = ".base_layer."

# Fields that every config of peft has, and that bear on neither sites nor mathematics here: the
# tensors themselves say where the adapter stands, and the layer says how its weight lies.
INFORMATIVE = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "peft_version",
    "revision",
    "task_type",
)


def read_peft(directory: Path, model: nn.Module) -> Loaded:
    """The adapter of a peft folder, checked against the model.

    Raises ArtifactError: E511 and E512 for files, E515 for a config field that changes what the
    adapter computes in a way no method here has, E516 for a kind of adapter or a site that is not
    known, E518 for tensors that are missing, too many or of another shape; PlanError.
    """
    path = directory / CONFIG
    source = Source(str(path), read_text(path))
    config = ConfigFile(read_json(path), Span(source, 0, 1))
    file = _tensors(directory)
    library = Library.standard()
    file, tables = trained_rows(config, file, model)
    if of_copies(config) or of_rows(config):
        return _read_copies(config, file, model, tables)
    base = _base_keys(file, model)
    copies = saved_modules(config, base, model) | tables
    passed = {k for k, shape in file.shapes.items() if not prod(shape)} | set(_doubled(file, base))
    adapter = [k for k in file.shapes if k not in base and k not in passed]
    chosen = _choose(library, config, adapter, model)
    span = config.span("peft_type")
    _check_apart(chosen.sites, copies, config)
    copies |= _biases(chosen, config, base, model)
    base = {key: name for key, name in base.items() if name not in copies}
    assignments = (
        *(Assignment(s.path, (Link(chosen.method, a),), span, s.at) for s, a in chosen.sites),
        *copies.values(),
    )
    resolved = unstated(DEFAULT_ADAPTER, config.source)
    plan = plan_assignments(resolved, model, assignments, DEFAULT_ADAPTER)
    _check_meaning(chosen.fmt, plan)
    _check_base(file, model, base)
    mapping = mapping_of(plan, formats=lambda method: (chosen.fmt,))
    known = {*base, *passed, *_beside_nothing(chosen.fmt, passed), *_repeats(file, mapping, plan)}
    tensors = taken(mapping, file, NAME, known)
    _check_numbers(mapping, tensors)
    tensors = with_remade(plan, mapping, file, tensors, NAME)
    return Loaded(resolved, assignments, tensors, DEFAULT_ADAPTER)


def _beside_nothing(fmt: ast.Format, empty: Iterable[str]) -> Iterator[str]:
    """The keys of the numbers that stand beside the rows of empty tensors."""
    for row in fmt.tensors:
        for name, beside in measured_in(row.key):
            yield from (key.replace(name, beside, 1) for key in empty if name in key)


def _read_copies(
    config: ConfigFile,
    file: TensorFile,
    model: nn.Module,
    tables: dict[str, Assignment],
) -> Loaded:
    """An adapter that is copies of whole modules and nothing else. Raises as `read_peft` does.

    tables: those that are made of rows.
    """
    file = plain_keys(file)
    base = _base_keys(file, model)
    if of_rows(config):
        copies = rows_alone(config, tables, INFORMATIVE)
    else:
        copies = copied_modules(config, base, model, INFORMATIVE)
    rest = {key: name for key, name in base.items() if name not in copies}
    _check_base(file, model, rest)
    resolved, assignments = unstated(DEFAULT_ADAPTER, config.source), tuple(copies.values())
    plan = plan_assignments(resolved, model, assignments, DEFAULT_ADAPTER)
    mapping = mapping_of(plan)
    tensors = taken(mapping, marked_keys(mapping, file), NAME, rest)
    _check_numbers(mapping, tensors)
    return Loaded(resolved, assignments, tensors, DEFAULT_ADAPTER)


def _biases(
    chosen: _Candidate, config: ConfigFile, base: Mapping[str, str], model: nn.Module
) -> dict[str, Assignment]:
    """The biases that the config says were trained, by their names in the base."""
    for item in chosen.fmt.fields:
        if isinstance(form_of(item), Biases):
            paths = {site.path for site, _ in chosen.sites}
            return trained_biases(config, item.name, paths, base, model)
    return {}


def _doubled(file: TensorFile, base: Mapping[str, str]) -> Iterator[str]:
    """The keys that copies of whole modules have once more, where all biases were asked for."""
    for key in file.shapes.keys() - base.keys():
        for mark in (f".{FIELD}.", ".original_module."):
            path, _, name = key.rpartition(mark)
            # The name of the adapter may stand between the two.
            if path and not base.keys().isdisjoint((f"{path}.{name}", _without_first(path, name))):
                yield key


def _without_first(path: str, name: str) -> str:
    return f"{path}.{name.partition('.')[2]}"


def _check_numbers(mapping: StateDictMapping, tensors: Mapping[str, Tensor]) -> None:
    """E518 for every tensor that has something else than numbers."""
    report = Report()
    for row in mapping.rows:
        tensor = tensors.get(row.adapted)
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            message = (
                f"`{row.key(NAME)}` has {count} of {tensor.numel()} values that are no numbers"
            )
            report.error("E518", message, hint="its training diverged; take an earlier checkpoint")
    report.stop()


def _check_apart(
    sites: Sequence[tuple[Named, Arguments]], copies: Mapping[str, Assignment], config: ConfigFile
) -> None:
    """E516 for a layer that has an adapter and is replaced as a whole as well."""
    report, paths = Report(), {site.path for site, _ in sites}
    for copy in copies.values():
        if copy.path in paths and copy.at.parameter == "weight":
            message = f"`{copy.path}` has an adapter, and is one of the modules to save as well"
            hint = "take it out of one of the two"
            report.error("E516", message, config.span(FIELD), hint=hint)
    report.stop()


def _tensors(directory: Path) -> TensorFile:
    pickled = directory / "adapter_model.bin"
    if not (directory / TENSORS).is_file() and pickled.is_file():
        refuse(
            "E512",
            f"{pickled} is a pickle, which can run code when read",
            hint="save it again with safe_serialization=True",
        )
    return read_tensors(directory / TENSORS)


def _check_meaning(fmt: ast.Format, plan: Plan) -> None:
    """E516 for every site at which peft's tensors mean something else than the method's."""
    report = Report()
    seats = seats_of(plan.sites, dialect_of(NAME))
    for site, seat in zip(plan.sites, seats, strict=True):
        rows = {} if site.site.at.tensor else rows_of(fmt, site.form, seat.joint is not None)
        if isinstance(rows, str):
            sizes = site.form.sizes
            report.error(
                "E516",
                f"peft's {fmt.method} on `{site.path}` ({site.form.kind.name}, {sizes.groups} "
                f"group(s)) is another equation than {fmt.method}'s",
                site.span,
                hint="save without `formats=`, and the folder is read here as it is",
            )
    report.stop()


# ------------------------------------------------------------------------------ base tensors


def _base_keys(file: TensorFile, model: nn.Module) -> dict[str, str]:
    """The keys of the base's own tensors, which peft saves beside embeddings: key to name."""
    own = {n for n in model.state_dict(keep_vars=True) if ADAPTERS not in n.split(".")}
    names = {key: _base_name(key) for key in file.shapes}
    return {key: name for key, name in names.items() if name in own}


def _base_name(key: str) -> str:
    """The name that a key would be in the base; "" if it can be none."""
    prefix = dialect_of(NAME).site
    return key.removeprefix(prefix).replace(_BASE_LAYER, ".") if key.startswith(prefix) else ""


def _check_base(file: TensorFile, model: nn.Module, keys: Mapping[str, str]) -> None:
    """E518 for every tensor of the base that is not the model's own."""
    report = Report()
    own = model.state_dict(keep_vars=True)
    for key, name in keys.items():
        if not _equal(file, key, cast(Tensor, own[name])):
            report.error(
                "E518",
                f"`{key}` is another `{name}` than the model's",
                hint="attach the adapter to the base that it was trained on",
            )
    report.stop()


def _repeats(file: TensorFile, mapping: StateDictMapping, plan: Plan) -> Iterator[str]:
    """The keys under which sites have once more what they share (E518 where it is another)."""
    report, dialect = Report(), dialect_of(NAME)
    shared = [key for row in mapping.rows if not row.site and (key := row.key(NAME)) in file.shapes]
    for key in filter(None, shared):
        name = key.removeprefix(dialect.root)
        for again in (f"{dialect.site}{site.path}.{name}" for site in plan.sites):
            if again not in file.shapes:
                continue
            if not torch.equal(file[again], file[key]):
                hint = "all sites share one, and peft writes it again for each"
                report.error("E518", f"`{again}` is another than `{key}`", hint=hint)
            yield again
    report.stop()


def _equal(file: TensorFile, key: str, own: Tensor) -> bool:
    if file.shapes[key] != tuple(own.shape):
        return False
    return own.is_meta or torch.equal(file[key].to(own.dtype), own.detach().cpu())


# ---------------------------------------------------------------------------------- choosing


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One way to read a folder: a method with the arguments of each site, or what is against it.

    unknown: how many fields of the config the format does not know. bound: how many arguments the
    config names.
    """

    fmt: ast.Format
    method: ast.Method
    sites: tuple[tuple[Named, Arguments], ...]
    unknown: int
    bound: int
    problems: tuple[Diagnostic, ...]


def _choose(library: Library, config: ConfigFile, keys: list[str], model: nn.Module) -> _Candidate:
    """The method that the config means, of those that fit the one whose arguments it says most of.

    Raises ArtifactError with what is against the method that comes nearest.
    """
    known = [f for n in library.names() for f in library.formats(n) if f.name == NAME]
    kind = config.values.get("peft_type")
    formats = [f for f in known if same(kind_of(f), kind)]
    if not formats:
        refuse_kind(config, known)
    candidates = [_candidate(f, library, config, keys, model) for f in formats]
    best = min(candidates, key=_against)
    report = Report()
    report.extend(best.problems)
    report.stop()
    return best


def _against(one: _Candidate) -> tuple[bool, bool, int, int, int]:
    """How much there is against a candidate; of those that do not fit, first what it knows."""
    return bool(one.problems), not one.sites, one.unknown, len(one.problems), -one.bound


def refuse_kind(config: ConfigFile, known: Sequence[ast.Format]) -> NoReturn:
    """Refuse a kind of adapter that neither formats nor the dialect know (E516)."""
    dialect, kind = dialect_of(NAME), config.get("peft_type")
    own = (dialect.copies and dialect.copies[0], dialect.rows and dialect.rows.kind)
    kinds = sorted({*map(str, map(kind_of, known)), *filter(None, own)})
    near = get_close_matches(str(kind), kinds, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    hint += f"there are: {', '.join(kinds)}"
    refuse("E516", f"peft_type {shown(kind)} is not known", config.span("peft_type"), hint=hint)


def kind_of(fmt: ast.Format) -> object:
    """The constant by which a format knows its own configs."""
    for item in fmt.fields:
        form = form_of(item)
        if item.name == "peft_type" and isinstance(form, ValueForm):
            return constant(form.expression)
    return None


def _candidate(
    fmt: ast.Format, library: Library, config: ConfigFile, keys: list[str], model: nn.Module
) -> _Candidate:
    method = library.method(fmt.method)
    assert method is not None  # the library names it
    paths = {p for key in keys if (p := _path(fmt, key)) is not None} or _told(
        fmt, config, keys, model
    )
    report = Report()
    unknown = [*unknown_fields(fmt, config, (*INFORMATIVE, *understood(config)))]
    report.extend(unknown)
    if not paths:
        report.error(
            "E516",
            f"no tensor of the folder is one of {fmt.method}",
            config.source,
            hint=f"their keys have {', '.join(sorted({f'`{row.key}`' for row in fmt.tensors}))}",
        )
    sites: list[tuple[Named, Arguments]] = []
    bound = 0
    named = [*named_sites(paths, dialect_of(NAME).around, config, model, report)]
    reader = ConfigReader(fmt, method, config, [site.named for site in named])
    for site in named:
        found = reader.read(site.named, site.kind)
        report.extend(found.problems)
        sites.append((site, multiplied(found.arguments, site.times)))
        bound = max(bound, len(found.bound))
    return _Candidate(fmt, method, tuple(sites), len(unknown), bound, tuple(report.found))


def _told(fmt: ast.Format, config: ConfigFile, keys: list[str], model: nn.Module) -> frozenset[str]:
    """The sites that the config names, where all that is in the file is what they share."""
    root = dialect_of(fmt.name).root
    shared = any(key == f"{root}{row.key}" for row in fmt.tensors for key in keys)
    return targeted(config, model) if shared else frozenset()


def _path(fmt: ast.Format, key: str) -> str | None:
    """The site whose tensor a key is, or None if the format has no such tensor."""
    prefix = dialect_of(fmt.name).site
    if not key.startswith(prefix):
        return None
    name = f".{key.removeprefix(prefix)}"
    known = (f".{named}" for t in fmt.tensors for named in named_in(t.key))
    endings = [ending for ending in known if name.endswith(ending)]
    return name.removesuffix(max(endings, key=len))[1:] if endings else None
