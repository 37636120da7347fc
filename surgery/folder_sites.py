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
from importlib.util import find_spec
from pathlib import Path
from tempfile import gettempdir
from weakref import finalize

import torch
from torch import Tensor, nn

from surgery.artifact import Loaded, check_tensors, load_artifact
from surgery.checkpoint import Checkpoint
from surgery.checksums import bytes_of
from surgery.conversion import shared_again, tensors_at
from surgery.disk import read_at, write_at
from surgery.errors import ArtifactError, Report, error_of
from surgery.file_places import nameless
from surgery.file_quantized import QuantisedWeight, quantised_in, seen, whole
from surgery.folder_needs import Stated, needs_of
from surgery.joined import Joined, Names
from surgery.live import Live, added, scaled, single
from surgery.loading import names_of
from surgery.mixture import live_sites, owned_parameters
from surgery.model.holder import parameters_of
from surgery.plan import plan_assignments
from surgery.planned import Plan, PlannedSite
from surgery.skeleton import (
    ANY,
    Config,
    Kinds,
    Need,
    Prefix,
    Shapes,
    Skeleton,
    built,
    prefix_of,
    table_like,
)


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
    model: the skeleton as the folder sees it.
    """

    wanted: Wanted
    loaded: Loaded
    plan: Plan
    stated: Plan
    model: nn.Module = field(repr=False)


@dataclass(frozen=True, slots=True)
class Adapted:
    """Several adapters on one checkpoint, and the sites of their mix.

    twins: tensors that the checkpoint has as often as layers share them, with the others. unties:
    whether an adapter changes one of the layers that share a weight, and leaves the others.
    quantised: the checkpoint's weights of few bits, by their names. joined: by names that the
    checkpoint does not have, parameters that are made of several of its tensors, or of part of one,
    as the model is loaded.
    """

    checkpoint: Checkpoint
    quantised: Mapping[str, QuantisedWeight]
    skeleton: Skeleton
    adapters: tuple[Adapter, ...]
    sites: tuple[PlannedSite, ...]
    twins: Mapping[str, tuple[str, ...]]
    unties: bool
    _own: Mapping[tuple[str, str], tuple[Adapter, PlannedSite]] = field(repr=False)
    joined: Mapping[str, Joined] = field(default_factory=dict[str, Joined])

    def tensor(self, site: PlannedSite, parameter: str | None = None) -> str | None:
        """The checkpoint's name of a site's weight, or of another parameter of its module."""
        name = site.site.at.parameter if parameter is None else parameter
        return self.skeleton.tensor(site.site.module, name)

    def is_quantised(self, site: PlannedSite) -> bool:
        """Whether a site is on a module whose weight is quantised."""
        return self.tensor(site, "weight") in self.quantised

    def read(self, name: str) -> Tensor:
        """A tensor of the checkpoint; of a quantised weight, what it stands for in float32."""
        if name in self.quantised:
            return whole(self.checkpoint, self.quantised[name])[1]
        if name in self.joined:
            return self.joined[name].read(self.checkpoint)
        return self.checkpoint.read(name)

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
                every[source.adapter] = self.tensors_at(*self._own[source.adapter, source.path])
            found[name] = every[source.adapter][p.name]
        return found

    def made_of_base(self, site: PlannedSite) -> tuple[str, ...]:
        """The names of those tensors that no folder has, for they are made of the base."""
        every = ((n, s, p) for n, s, p in owned_parameters(site) if not p.shared)
        return tuple(n for n, s, p in every if self._lacks(*self._own[s.adapter, s.path], p.name))

    def _lacks(self, adapter: Adapter, stated: PlannedSite, name: str) -> bool:
        return stated.adapted(name) not in adapter.loaded.tensors

    def tensors_at(self, adapter: Adapter, stated: PlannedSite) -> dict[str, Tensor]:
        """What an adapter has at a site as its folder names it, by the names of its parameters."""
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
                data = self.read(known).clone()
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
    quantised = quantised_in(checkpoint)
    shapes: Shapes = seen(checkpoint, quantised)
    needs = [needs_of(one.folder) for one in wanted]
    names = Names()
    try:
        ties, prefixes = _begun(wanted, needs, shapes, checkpoint.tensors)
    except ArtifactError as error:
        names = _loaded(checkpoint, needs, shapes, config, error)
        shapes = names.instead_of(shapes)
        ties, prefixes = _begun(wanted, needs, shapes, shapes)
    tied = {
        prefix(path): name
        for prefix, tie in zip(prefixes, ties, strict=True)
        for path, name in tie.tied.items()
    }
    linear = (n for n in shapes if names.whole.get(n, n) in quantised)
    layers = {name.rpartition(".")[0]: frozenset({"linear"}) for name in linear}
    kinds = {**_kinds(prefixes, needs), **layers}
    skeleton = built(shapes, kinds, config, tied, _widths(prefixes, needs)).renamed(names.whole)
    pairs = zip(wanted, prefixes, strict=True)
    adapters = tuple(_adapter(one, skeleton.seen_by(prefix)) for one, prefix in pairs)
    own = {
        (site.adapter, site.path): (adapter, stated)
        for adapter in adapters
        for site, stated in zip(adapter.plan.sites, adapter.stated.sites, strict=True)
    }
    live = reduce(added, (scaled(a.wanted.factor, single(a.wanted.name)) for a in adapters), Live())
    sites = live_sites(live, {a.wanted.name: a.plan for a in adapters})
    twins = {
        names.whole.get(name, name): tuple(names.whole.get(other, other) for other in others)
        for tie in ties
        for name, others in tie.twins.items()
    }
    unties = any(tie.unties for tie in ties)
    joined = names.joined
    return Adapted(checkpoint, quantised, skeleton, adapters, sites, twins, unties, own, joined)


def _begun(
    wanted: Sequence[Wanted],
    needs: Sequence[Sequence[Stated]],
    shapes: Shapes,
    names: Iterable[str],
) -> tuple[list[_Ties], list[Prefix]]:
    """Of each adapter the ties, and how its paths begin."""
    ties = [_ties(some, shapes, one.folder) for one, some in zip(wanted, needs, strict=True)]
    prefixes = [
        prefix_of([n for n in some if n.path not in tie.tied], names, str(one.folder))
        for one, some, tie in zip(wanted, needs, ties, strict=True)
    ]
    return ties, prefixes


_TAIL = 3  # names by which a module, or a parameter, may be one that an adapter is on


def _loaded(
    checkpoint: Checkpoint,
    needs: Iterable[Iterable[Need]],
    shapes: Shapes,
    config: Config,
    error: ArtifactError,
) -> Names:
    """What a checkpoint's model has once it is loaded. Raises the error where that is not known."""
    own = [need for some in needs for need in some]
    tails, owners = ({_tail(n) for need in own for n in need.names}, {_tail(n.path) for n in own})
    known = names_of(checkpoint, shapes, lambda name: _tail(name.rpartition(".")[0]) in owners)
    if known is None:
        if "model_type" not in config or find_spec("transformers") is not None:
            raise error
        more = "or install transformers, which may name the tensors otherwise as it loads them"
        raise error_of([replace(d, hint=f"{d.hint}; {more}") for d in error.diagnostics])
    report = Report()
    for name, why in known.refused.items():
        if _tail(name) in tails:
            message = f"`{name}` is made of other tensors as the model is loaded, and {why}"
            hint = "merge it into the loaded model, and save that with `save_pretrained`"
            report.error("E545", message, hint=hint)
    report.stop()
    return known


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-_TAIL:])


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


def _widths(prefixes: Sequence[Prefix], needs: Sequence[Sequence[Need]]) -> dict[str, int]:
    """By paths in the checkpoint, how wide the hidden states of modules are."""
    pairs = zip(prefixes, needs, strict=True)
    return {prefix(n.path): n.width for prefix, some in pairs for n in some if n.width}


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
    return Adapter(wanted, loaded, plan, stated, model)


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


# ---------------------------------------------------------------------------------------- ties


@dataclass(frozen=True, slots=True)
class _Ties:
    """What a folder says of weights that layers share.

    tied: paths of layers, with the tensor that the checkpoint has for them under another's name.
    """

    tied: Mapping[str, str]
    twins: Mapping[str, tuple[str, ...]]
    unties: bool


def _ties(needs: Sequence[Stated], shapes: Shapes, folder: Path) -> _Ties:
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
