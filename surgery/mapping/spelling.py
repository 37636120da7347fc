"""How a format spells a tensor: its key, and the layout it has there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from surgery.algebra.scalars import Scalars
from surgery.check import Arguments
from surgery.errors import refuse
from surgery.language import syntax as ast
from surgery.model.layers import Geometry, Sizes
from surgery.model.parts import WHOLE
from surgery.planned import SiteClass

_AXIS = re.compile(r"[A-Za-z_]\w*")

# What layouts and conditions call the axes of a kernel; one of fewer axes has the last of them.
_KERNEL_AXES = ("depth", "height", "width")


@dataclass(frozen=True, slots=True)
class Dialect:
    """What all keys of a format begin with: those of a site, and those of shared parameters."""

    site: str = ""
    root: str = ""


# A format that is not listed begins its keys with nothing.
DIALECTS: Mapping[str, Dialect] = {"peft": Dialect("base_model.model.", "base_model.")}


def dialect_of(name: str) -> Dialect:
    """What the keys of a format begin with."""
    return DIALECTS.get(name, Dialect())


@dataclass(frozen=True, slots=True)
class Spelling:
    """One tensor in one format.

    layout: an einops pattern from the method's shape to the file's, or "" where they are the same.
    sizes: the lengths, in elements, of those of its axes that the pattern alone does not tell.
    """

    format: str
    key: str
    layout: str = ""
    sizes: tuple[tuple[str, int], ...] = ()

    def written(self, tensor: Tensor) -> Tensor:
        """The method's tensor in the file's layout; a view where it can be.

        Raises einops.EinopsError if the tensor is not of the method's shape.
        """
        return _rearranged(tensor, self.layout, dict(self.sizes))

    def read(self, tensor: Tensor) -> Tensor:
        """The file's tensor in the method's layout; a view where it can be.

        Raises einops.EinopsError if the tensor is not of the file's shape.
        """
        before, _, after = self.layout.partition("->")
        back = f"{after.strip()} -> {before.strip()}" if self.layout else ""
        return _rearranged(tensor, back, dict(self.sizes))

    def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file, of a tensor that has `shape` (in elements) in the method."""
        return tuple(self.written(torch.empty(shape, device="meta")).shape)


def _rearranged(tensor: Tensor, layout: str, sizes: dict[str, int]) -> Tensor:
    if not layout:
        return tensor
    from einops import rearrange

    return rearrange(tensor, layout, **sizes)


def facts(sizes: Sizes, geometry: Geometry | None) -> dict[str, object]:
    """What the condition of a tensor row may ask of a site, besides the method's arguments."""
    if geometry is None:
        return {**sizes.names, "groups": 1, "kernel": 1, "dilation": 1, "padding_mode": "zeros"}
    return {
        **sizes.names,
        **dict(zip(_KERNEL_AXES[-geometry.rank :], geometry.kernel, strict=True)),
        "groups": sizes.groups,
        "kernel": prod(geometry.kernel),
        "dilation": max(geometry.dilation),
        "padding_mode": geometry.mode,
    }


@dataclass(frozen=True)
class Place:
    """What decides which tensor row of a format holds: a kind of layer, its facts, arguments."""

    kind: str
    facts: Mapping[str, object]
    arguments: Arguments

    def row(self, fmt: ast.Format, name: str) -> ast.Tensor | None:
        """The first row of a parameter that holds here; a row for this kind goes before all others.

        Raises DefinitionError where a condition asks for what there is not.
        """
        rows = [t for t in fmt.tensors if t.name == name]
        mine = [t for t in rows if self.kind in t.kinds] or [t for t in rows if not t.kinds]
        return next((t for t in mine if self._holds(t)), None)

    def _holds(self, row: ast.Tensor) -> bool:
        names = {**self.facts, **dict(self.arguments)}
        return row.condition is None or Scalars(names).holds(row.condition)

    def spelling(self, fmt: ast.Format, row: ast.Tensor, path: str, shared: bool) -> Spelling:
        """A row's spelling at a site; a shared parameter's is the root's."""
        dialect = dialect_of(fmt.name)
        prefix = dialect.root if shared else dialect.site + (f"{path}." if path else "")
        axes = set(_AXIS.findall(row.layout or ""))
        sizes = tuple((n, v) for n, v in self.facts.items() if n in axes and isinstance(v, int))
        return Spelling(fmt.name, prefix + row.key, row.layout or "", sizes)


def place_of(form: SiteClass) -> Place:
    """The place that a class of sites is."""
    return Place(form.kind.name, facts(form.sizes, form.geometry), form.arguments)


def rows_of(fmt: ast.Format, form: SiteClass) -> dict[str, ast.Tensor] | str:
    """The row of every parameter of a class of sites; the name of one that has none.

    What is drawn again by its seed needs no row. No format has a place for what is rows of a layer,
    or is reached by its weight.

    Raises DefinitionError (E124) for a layout that does not take the parameter's shape.
    """
    place, rows = place_of(form), dict[str, ast.Tensor]()
    for parameter in form.parameters:
        row = place.row(fmt, parameter.name)
        if form.at != WHOLE or form.mode == "value" or (row is None and not parameter.redrawn):
            return parameter.name
        if row is None:
            continue
        _check_layout(place.spelling(fmt, row, "", shared=False), form, row)
        rows[row.name] = row
    return rows


def _check_layout(spelling: Spelling, form: SiteClass, row: ast.Tensor) -> None:
    from einops import EinopsError

    try:
        spelling.file_shape(form.shapes[row.name])
    except EinopsError as error:
        reason = str(error).strip().splitlines()[-1]
        shape = list(form.shapes[row.name])
        refuse(
            "E124",
            f"`{row.layout}` does not take {row.name} {shape}: {reason}",
            row.span,
            hint="a layout names each axis of the method's tensor, then of the file's",
        )


def chosen_format(
    formats: tuple[ast.Format, ...], form: SiteClass
) -> tuple[ast.Format, dict[str, ast.Tensor]] | None:
    """The first format that has a tensor for every parameter of a class of sites."""
    for fmt in formats:
        rows = rows_of(fmt, form)
        if not isinstance(rows, str):
            return fmt, rows
    return None
