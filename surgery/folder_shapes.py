"""A model for saved adapters to fit on, made of what their folders say alone, without a base.

Ours state the sizes of their layers. Those of peft have tensors with such sizes: their formats are
tried on layers whose sizes are told by two numbers, and where these come out, the sizes stand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import cast

import torch
from torch import nn

from surgery.arguments import Link
from surgery.artifact import CONFIG, MAPPING, SPEC, TENSORS
from surgery.check import DEFAULT_ADAPTER, unstated
from surgery.errors import Report, Source, Span, SurgeryError
from surgery.folder_needs import Stated, needs_of
from surgery.integrations.peft import NAME, kind_of
from surgery.language import syntax as ast
from surgery.language.library import Library
from surgery.mapping import mapping_of
from surgery.mapping.fields import ConfigFile, ConfigReader
from surgery.mapping.forms import same
from surgery.plan import Assignment, plan_assignments
from surgery.skeleton import Kinds, built
from surgery.store import read_json, read_tensors, read_text

_TURNED = ("embedding", "transposed_linear")
"""The kinds of layers whose weights lie as [in, out]."""

_MATRICES: Kinds = frozenset({"linear", *_TURNED})

Sizes = tuple[int, int]
"""Of a layer: its outputs and its inputs."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer that a folder has a site on."""

    kind: str
    sizes: Sizes
    dtype: torch.dtype
    folder: Path

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its weight, as it lies."""
        return self.sizes[::-1] if self.kind in _TURNED else self.sizes


def bare_model(folders: Sequence[Path]) -> nn.Module:
    """Layers on meta for the sites of some folders, as far as these say what they are.

    Raises ArtifactError: E584 for sites of which a folder does not say the sizes, E581 where two
    folders say different ones.
    """
    report = Report()
    layers: dict[str, _Layer] = {}
    config: dict[str, object] = {}
    for folder in folders:
        try:
            found = dict(_layers(folder, report))
        except SurgeryError:
            continue  # what is wrong with it is said as it is read
        for path, layer in found.items():
            known = layers.setdefault(path, layer)
            if (known.kind, known.sizes) != (layer.kind, layer.sizes):
                sides = [
                    f"{' × '.join(map(str, one.sizes))} in {one.folder}" for one in (known, layer)
                ]
                message = f"`{path}` is {' and '.join(sides)}"
                report.error("E581", message, hint="compose adapters of one model")
        config |= _base_of(folder)
    report.stop()
    shapes = {f"{path}.weight": (one.dtype, one.shape) for path, one in layers.items()}
    kinds = {path: frozenset({one.kind}) for path, one in layers.items()}
    return built(shapes, kinds, config).model


def _base_of(folder: Path) -> dict[str, object]:
    path = folder / CONFIG
    name = read_json(path).get("base_model_name_or_path") if path.is_file() else None
    return {"_name_or_path": name} if isinstance(name, str) and name else {}


def _layers(folder: Path, report: Report) -> Iterator[tuple[str, _Layer]]:
    own = (folder / MAPPING).is_file() and (folder / SPEC).is_file()
    stated = dict(_stated(folder) if own else _of_peft(folder))
    for path in dict.fromkeys(need.path for need in needs_of(folder)):
        if path in stated:
            yield path, stated[path]
        else:
            message = f"{folder} does not say the sizes of `{path}`, which no plain layer is"
            report.error("E584", message, hint="give the model: base=MODEL, or --base")


# ------------------------------------------------------------------------------------------ ours


def _stated(folder: Path) -> Iterator[tuple[str, _Layer]]:
    """The layers of which a manifest says that all of the weight is a site."""
    entries = read_json(folder / MAPPING).get("sites")
    for entry in cast("list[object]", entries) if isinstance(entries, list) else ():
        one = cast("dict[str, object]", entry if isinstance(entry, dict) else {})
        path, kind, sizes = one.get("path"), one.get("kind"), (one.get("out"), one.get("in"))
        part = any(
            name in one for name in ("parameter", "index", "part", "tensor", "picked", "tie")
        )
        if isinstance(path, str) and path and kind in _MATRICES and not part and _whole(sizes):
            told = cast(Sizes, sizes)
            yield path, _Layer(str(kind), told, _dtype(one.get("base")), folder)


def _whole(sizes: tuple[object, object]) -> bool:
    return all(type(size) is int and size > 0 for size in sizes)


def _dtype(base: object) -> torch.dtype:
    """The dtype of a weight whose digest is stated; float32 where that is not."""
    name = cast("dict[str, object]", base).get("dtype") if isinstance(base, dict) else None
    found = getattr(torch, str(name), None)
    return found if isinstance(found, torch.dtype) else torch.float32


# ---------------------------------------------------------------------------------------- peft's


_IN, _OUT = 720720, 1441440
"""Sizes of layers that no tensor has otherwise, and that whatever a method has to be divides."""


def _of_peft(folder: Path) -> Iterator[tuple[str, _Layer]]:
    """The layers whose sizes are those of tensors, by the first format that says them of most."""
    file = read_tensors(folder / TENSORS)
    path = folder / CONFIG
    config = ConfigFile(read_json(path), Span(Source(str(path), read_text(path)), 0, 1))
    library = Library.standard()
    known = (f for name in library.names() for f in library.formats(name))
    formats = [f for f in known if f.name == NAME and same(kind_of(f), config.get("peft_type"))]
    needs = {need.path: need for need in needs_of(folder) if not need.parameter}
    found: dict[str, _Layer] = {}
    for fmt in formats:
        if found.keys() == needs.keys():
            break
        told = {
            at: _Layer(kind, sizes, torch.float32, folder)
            for at, kind, sizes in _told(fmt, config, needs, file.shapes)
        }
        found = told if len(told) > len(found) else found
    yield from found.items()


def _told(
    fmt: ast.Format,
    config: ConfigFile,
    needs: Mapping[str, Stated],
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[tuple[str, str, Sizes]]:
    """The layers that a format says the sizes of, with their kinds."""
    method = Library.standard().method(fmt.method)
    assert method is not None  # the library names it
    reader = ConfigReader(fmt, method, config, [*needs])
    known = ((path, _kind(need, shapes)) for path, need in needs.items())
    kinds = {path: kind for path, kind in known if kind}
    probes = {
        f"{path}.weight": (torch.float32, (_IN, _OUT) if kind in _TURNED else (_OUT, _IN))
        for path, kind in kinds.items()
    }
    model = built(probes, {path: frozenset({kind}) for path, kind in kinds.items()}, {}).model
    links = {path: Link(method, reader.read(path, kind).arguments) for path, kind in kinds.items()}
    told = _sizes(links, fmt, model, shapes)
    yield from ((path, kind, told[path]) for path, kind in kinds.items() if path in told)


def _kind(need: Stated, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What a layer is whose tensors are matrices; "" for what they leave open."""
    own = [shape for key, shape in shapes.items() if f".{need.path}." in key and prod(shape)]
    if any(len(shape) > 2 for shape in own):
        return ""
    possible = need.kinds & _MATRICES if need.kinds else {"linear"}
    return next((kind for kind in ("linear", *_TURNED) if kind in possible), "")


def _sizes(
    links: Mapping[str, Link],
    fmt: ast.Format,
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Sizes]:
    """The outputs and inputs of layers, where the tensors of a method tell both."""
    span = fmt.span
    assignments = [Assignment(path, (link,), span) for path, link in links.items()]
    try:
        resolved = unstated(DEFAULT_ADAPTER, span)
        plan = plan_assignments(resolved, model, assignments, DEFAULT_ADAPTER)
    except SurgeryError:
        return {}
    told: dict[str, dict[int, set[int]]] = {path: {_OUT: set(), _IN: set()} for path in links}
    for row in mapping_of(plan, formats=lambda method: (fmt,)).rows:
        stands, probed = shapes.get(row.key(NAME) or "", ()), row.file_shape(NAME)
        if row.site not in told or len(probed) != len(stands):
            continue
        for probe, actual in zip(probed, stands, strict=True):
            if probe in (_OUT, _IN):
                told[row.site][probe].add(actual)
    whole = {at: sizes for at, sizes in told.items() if all(len(s) == 1 for s in sizes.values())}
    return {at: (min(sizes[_OUT]), min(sizes[_IN])) for at, sizes in whole.items()}
