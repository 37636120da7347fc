"""Adapters' folders read for a checkpoint: their sites on its tensors, and all of their tensors.

Nothing is mounted, and no data of the base is read but where an adapter's own tensors are made of
it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from tempfile import gettempdir
from typing import cast
from weakref import finalize

import torch
from torch import Tensor, nn

from surgery.artifact import CONFIG, MAPPING, SPEC, TENSORS, Loaded, check_tensors, load_artifact
from surgery.checkpoint import Checkpoint
from surgery.checksums import bytes_of
from surgery.conversion import shared_again, tensors_at
from surgery.disk import read_at, write_at
from surgery.errors import Report
from surgery.file_places import nameless
from surgery.integrations.peft import NAME, kind_of
from surgery.language.library import Library
from surgery.live import Live, added, scaled, single
from surgery.mapping.forms import same
from surgery.mapping.pieces import named_in
from surgery.mapping.spelling import dialect_of
from surgery.mixture import live_sites, owned_parameters
from surgery.model.holder import parameters_of
from surgery.model.layers import KINDS
from surgery.plan import plan_assignments
from surgery.planned import Plan, PlannedSite
from surgery.skeleton import (
    ANY,
    Kinds,
    Need,
    Prefix,
    Shapes,
    Skeleton,
    built,
    prefix_of,
    table_like,
)
from surgery.store import read_json, read_tensors

_LAYERS = frozenset(kind.name for kind in KINDS)


@dataclass(frozen=True, slots=True)
class Wanted:
    """An adapter's folder, how much of it is merged, and what it is called in what is made."""

    folder: Path
    factor: float = 1.0
    name: str = ""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on a checkpoint.

    sites: as the skeleton has them, under the name that it has among others. stated: the same as
    the folder names them. base: digests of weights, by the paths that the folder has for them.
    """

    wanted: Wanted
    loaded: Loaded
    plan: Plan
    stated: Plan


@dataclass(frozen=True, slots=True)
class Adapted:
    """Several adapters on one checkpoint, and the sites of their mix.

    twins: tensors that the checkpoint has as often as layers share them, with the others. unties:
    whether an adapter changes one of the layers that share a weight, and leaves the others.
    """

    checkpoint: Checkpoint
    skeleton: Skeleton
    adapters: tuple[Adapter, ...]
    sites: tuple[PlannedSite, ...]
    twins: Mapping[str, tuple[str, ...]]
    unties: bool
    _own: Mapping[tuple[str, str], tuple[Adapter, PlannedSite]] = field(repr=False)

    def tensor(self, site: PlannedSite, parameter: str | None = None) -> str | None:
        """The checkpoint's name of a site's weight, or of another parameter of its module."""
        name = site.site.at.parameter if parameter is None else parameter
        return self.skeleton.tensor(site.site.module, name)

    def names(self, site: PlannedSite, parameter: str) -> tuple[str, ...]:
        """The tensors that a parameter of a site's module is: one, none, or each that is tied."""
        name = self.tensor(site, parameter)
        if name is None:
            return ()
        return (name, *self.twins.get(name, ())) if site.site.at.parameter == parameter else (name,)

    def parameters(self, site: PlannedSite) -> dict[str, Tensor]:
        """The adapters' tensors at a site by the names that it has for them, shared ones cut."""
        every: dict[str, dict[str, Tensor]] = {}
        found: dict[str, Tensor] = {}
        for name, source, p in owned_parameters(site):
            if source.adapter not in every:
                every[source.adapter] = self._tensors(*self._own[source.adapter, source.path])
            found[name] = every[source.adapter][p.name]
        return found

    def made_of_base(self, site: PlannedSite) -> tuple[str, ...]:
        """The names of those tensors that no folder has, for they are made of the base."""
        every = ((n, s, p) for n, s, p in owned_parameters(site) if not p.shared)
        return tuple(n for n, s, p in every if self._lacks(*self._own[s.adapter, s.path], p.name))

    def _lacks(self, adapter: Adapter, stated: PlannedSite, name: str) -> bool:
        return stated.adapted(name) not in adapter.loaded.tensors

    def _tensors(self, adapter: Adapter, stated: PlannedSite) -> dict[str, Tensor]:
        loaded = adapter.loaded
        own = [p.name for p in stated.form.parameters if not p.shared]
        if not any(self._lacks(adapter, stated, name) for name in own):
            return tensors_at(stated, adapter.stated, loaded)
        # What begins with the base's own weight is made again where that is, for a moment.
        with self._weights(stated):
            return tensors_at(stated, adapter.stated, loaded)

    @contextmanager
    def _weights(self, site: PlannedSite) -> Generator[None]:
        module, own = site.site.module, parameters_of(site.site.module)
        before = dict(own)
        for name in (site.site.at.parameter, site.site.at.bias):
            known = self.skeleton.tensor(module, name)
            if known is not None:
                data = self.checkpoint.read(known).clone()
                own[name] = nn.Parameter(data, requires_grad=False)
        try:
            yield
        finally:
            own.update(before)


def adapted(
    checkpoint: Checkpoint, wanted: Sequence[Wanted], config: Mapping[str, object]
) -> Adapted:
    """The sites that some adapters have on a checkpoint, and what they are together.

    config: of the checkpoint's model, as plain data. Raises ArtifactError: E545 where a checkpoint
    does not have what an adapter is on, and as attaching does for a folder that is not whole or
    that does not fit; PlanError (E309) for adapters that cannot be live together.
    """
    shapes: Shapes = {
        name: (dtype, entry.shape)
        for name, entry in checkpoint.tensors.items()
        if (dtype := entry.torch_dtype) is not None
    }
    needs = [_needs(one.folder) for one in wanted]
    ties = [_ties(some, shapes, one.folder) for one, some in zip(wanted, needs, strict=True)]
    prefixes = [
        prefix_of([n for n in some if n.path not in tie.tied], checkpoint.tensors, str(one.folder))
        for one, some, tie in zip(wanted, needs, ties, strict=True)
    ]
    tied = {
        prefix(path): name
        for prefix, tie in zip(prefixes, ties, strict=True)
        for path, name in tie.tied.items()
    }
    skeleton = built(shapes, _kinds(prefixes, needs), config, tied)
    pairs = zip(wanted, prefixes, strict=True)
    adapters = tuple(_adapter(one, skeleton.seen_by(prefix)) for one, prefix in pairs)
    own = {
        (site.adapter, site.path): (adapter, stated)
        for adapter in adapters
        for site, stated in zip(adapter.plan.sites, adapter.stated.sites, strict=True)
    }
    live = reduce(added, (scaled(a.wanted.factor, single(a.wanted.name)) for a in adapters), Live())
    sites = live_sites(live, {a.wanted.name: a.plan for a in adapters})
    twins = {name: others for tie in ties for name, others in tie.twins.items()}
    unties = any(tie.unties for tie in ties)
    return Adapted(checkpoint, skeleton, adapters, sites, twins, unties, own)


def _kinds(prefixes: Sequence[Prefix], needs: Sequence[Sequence[Need]]) -> dict[str, Kinds]:
    """By paths in the checkpoint, the kinds that all adapters let a layer be."""
    kinds: dict[str, Kinds] = {}
    for prefix, some in zip(prefixes, needs, strict=True):
        for need in some:
            path = prefix(need.path)
            before = kinds.get(path, ANY)
            both = before & need.kinds if before and need.kinds else before or need.kinds
            kinds[path] = both or need.kinds
    return kinds


class Spooled(Mapping[str, Tensor]):
    """Tensors on disk, of which each is read when it is asked for: an adapter may be large, too."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Write them to a file that has no name."""
        self._file = nameless(Path(gettempdir()))
        finalize(self, os.close, self._file)
        self._places: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
        at = 0
        for name, tensor in tensors.items():
            plain = tensor.detach().cpu().contiguous()
            write_at(self._file, bytes_of(plain), at)
            self._places[name] = (plain.dtype, tuple(plain.shape), at)
            at += plain.numel() * plain.element_size()

    def __getitem__(self, name: str) -> Tensor:
        """One of them, read anew."""
        dtype, shape, at = self._places[name]
        found = torch.empty(shape, dtype=dtype)
        read_at(self._file, bytes_of(found), at, Path("(a file without a name)"))
        return found

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._places)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._places)


def _adapter(wanted: Wanted, model: nn.Module) -> Adapter:
    loaded = load_artifact(wanted.folder, model)
    stated = plan_assignments(loaded.resolved, model, loaded.assignments, loaded.adapter)
    check_tensors(stated, loaded)
    every = {**loaded.tensors, **shared_again(stated, loaded)}
    loaded = replace(loaded, tensors=Spooled(every))
    statements = dict(loaded.resolved.adapters).get(loaded.adapter, ())
    resolved = replace(loaded.resolved, adapters=((wanted.name, statements),))
    plan = plan_assignments(resolved, model, loaded.assignments, wanted.name)
    return Adapter(wanted, loaded, plan, stated)


# --------------------------------------------------------------------------------------- names


_NOT_IN_NAMES = re.compile(r"\W+")


def named(wanted: Iterable[Wanted]) -> tuple[Wanted, ...]:
    """The same with a name for each, made of its folder's; no two are the same."""
    taken: set[str] = set()
    found: list[Wanted] = []
    for one in wanted:
        plain = _NOT_IN_NAMES.sub("_", one.folder.resolve().name).strip("_") or "adapter"
        plain = plain if plain[0].isalpha() else f"adapter_{plain}"
        numbers = (plain if i == 1 else f"{plain}_{i}" for i in range(1, len(taken) + 2))
        name = next(n for n in numbers if n not in taken)
        taken.add(name)
        found.append(replace(one, name=name))
    return tuple(found)


# --------------------------------------------------------------------------------------- needs


@dataclass(frozen=True, slots=True)
class _Stated(Need):
    """A need with what a folder says of a weight that layers share. shape: of that weight."""

    tie: str = ""
    shape: tuple[int, ...] = ()


def _needs(folder: Path) -> tuple[_Stated, ...]:
    """What a folder has sites on, as far as its files say by themselves.

    Raises ArtifactError (E517) for no adapter's folder; what else is wrong is found as it is read.
    """
    if (folder / MAPPING).is_file() and (folder / SPEC).is_file():
        return tuple(_of_manifest(read_json(folder / MAPPING)))
    if (folder / CONFIG).is_file() and (folder / TENSORS).is_file():
        keys = tuple(read_tensors(folder / TENSORS).shapes)
        return tuple(_of_keys(keys, read_json(folder / CONFIG)))
    return ()  # for which there is a word when it is read


def _of_manifest(data: Mapping[str, object]) -> Iterator[_Stated]:
    entries = data.get("sites")
    for entry in cast("list[object]", entries) if isinstance(entries, list) else ():
        stated = cast("dict[str, object]", entry if isinstance(entry, dict) else {})
        path, kind = stated.get("path"), stated.get("kind")
        parameter, tie = stated.get("parameter", "weight"), stated.get("tie", "")
        if isinstance(path, str) and isinstance(parameter, str) and isinstance(kind, str):
            sides = stated.get("out"), stated.get("in")
            turned = kind in ("embedding", "transposed_linear")
            shape = cast("tuple[int, ...]", sides[::-1] if turned else sides)
            kinds = ANY if stated.get("tensor") is True else frozenset({kind})
            yield _Stated(path, parameter, kinds, str(tie or ""), shape)


def _of_keys(keys: Sequence[str], config: Mapping[str, object]) -> Iterator[_Stated]:
    """The sites that peft's keys name, and which kinds of layers have all the keys of a site."""
    dialect, library = dialect_of(NAME), Library.standard()
    formats = [
        fmt
        for name in library.names()
        for fmt in library.formats(name)
        if fmt.name == NAME and same(kind_of(fmt), config.get("peft_type"))
    ]
    rows = [(e, frozenset(t.kinds)) for f in formats for t in f.tensors for e in named_in(t.key)]
    every: dict[str, Kinds] = {}
    for key in keys:
        path, kinds = _site(key.removeprefix(dialect.site), rows)
        if not key.startswith(dialect.site) or path is None:
            continue
        path = ".".join(name for name in path.split(".") if name != dialect.around)
        before = every.get(path, ANY)
        every[path] = before & kinds if before and kinds else before or kinds
    turned = config.get("fan_in_fan_out")
    for path, kinds in every.items():
        yield _Stated(path, "", _laid(kinds, turned))


def _site(name: str, rows: Sequence[tuple[str, Kinds]]) -> tuple[str | None, Kinds]:
    """The path before the longest of some endings, and the kinds of layers that have this one."""
    fitting = [(ending, kinds) for ending, kinds in rows if f".{name}".endswith(f".{ending}")]
    if not fitting:
        return None, ANY
    longest = max((ending for ending, _ in fitting), key=len)
    every = [kinds for ending, kinds in fitting if ending == longest]
    kinds = frozenset[str]().union(*every) if all(every) else ANY
    return f".{name}".removesuffix(f".{longest}")[1:], kinds


def _laid(kinds: Kinds, turned: object) -> Kinds:
    """Without the kinds of layers that lie otherwise than a config says."""
    if type(turned) is not bool:
        return kinds
    left = (kinds or _LAYERS) - {"linear" if turned else "transposed_linear"}
    return left or kinds


# ---------------------------------------------------------------------------------------- ties


@dataclass(frozen=True, slots=True)
class _Ties:
    """What a folder says of weights that layers share.

    tied: paths of layers, with the tensor that the checkpoint has for them under another's name.
    """

    tied: Mapping[str, str]
    twins: Mapping[str, tuple[str, ...]]
    unties: bool


def _ties(needs: Sequence[_Stated], shapes: Shapes, folder: Path) -> _Ties:
    tied: dict[str, str] = {}
    twins: dict[str, tuple[str, ...]] = {}
    report, unties = Report(), False
    for need in needs:
        if not need.tie or need.parameter != "weight":
            continue
        alike = table_like(shapes, need.shape)
        own = next((n for n in alike if f".{n}".endswith(f".{need.path}.weight")), None)
        if need.tie == "untie":
            unties = True
            if len(alike) < 2:
                _report_untied(need.path, alike, folder, report)
        elif own is not None:
            twins[own] = tuple(name for name in alike if name != own)
        if own is None and len(alike) == 1:
            tied[need.path] = alike[0]
    report.stop()
    return _Ties(tied, twins, unties)


def _report_untied(path: str, alike: Sequence[str], folder: Path, report: Report) -> None:
    named = ", ".join(f"`{name}`" for name in alike) or "none"
    report.error(
        "E546",
        f"{folder} changes `{path}` and not the layer that shares its weight, and the checkpoint "
        f"has one tensor for both ({named})",
        hint="save the model with `tie_word_embeddings` false first, so that each has its own",
    )


__all__ = ["Adapted", "Adapter", "Prefix", "Wanted", "adapted", "named"]
