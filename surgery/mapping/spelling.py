"""How a format spells a tensor: its key, and the layout it has there."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from surgery.algebra.scalars import Scalars
from surgery.check import Arguments
from surgery.errors import refuse
from surgery.language import syntax as ast
from surgery.mapping.pieces import counted_in, numbered
from surgery.model.layers import Geometry, Sizes
from surgery.model.parts import WHOLE
from surgery.planned import SiteClass

_AXIS = re.compile(r"[A-Za-z_]\w*")
_IN_KEY = re.compile(r"\{(\w+)\}")  # an argument in a key

# What layouts and conditions call the axes of a kernel; one of fewer axes has the last of them.
_KERNEL_AXES = ("depth", "height", "width")


Formats = Callable[[str], tuple[ast.Format, ...]]
"""The format statements of a method, by its name."""


@dataclass(frozen=True, slots=True)
class TableRows:
    """How trained rows of tables are called.

    kind, field: the value of `peft_type` of adapters that are such rows and nothing else, and what
        says which. inside: what stands in keys behind the path of a table where there is more.
    tensor: what the rows are called in keys.
    """

    kind: str
    field: str
    inside: str
    tensor: str


@dataclass(frozen=True, slots=True)
class Dialect:
    """What is common to all that a format says, whatever the method.

    site, root: what the keys of a site, and those of shared parameters, begin with.
    around: what an adapted module is called in the module that stands around it; "" where none
        does, and parameters that are matrices by themselves have no place.
    copies: the value of `peft_type` of adapters that are copies of whole modules and nothing else,
        and what stands in their keys between the path of a module and the name of its parameter.
    rows: how trained rows of tables are called, if there are any.
    """

    site: str = ""
    root: str = ""
    around: str = ""
    copies: tuple[str, str] | None = None
    rows: TableRows | None = None


# A format that is not listed begins its keys with nothing.
DIALECTS: Mapping[str, Dialect] = {
    "peft": Dialect(
        "base_model.model.",
        "base_model.",
        "base_layer",
        ("LN_TUNING", "ln_tuning_layers"),
        TableRows("TRAINABLE_TOKENS", "token_indices", "token_adapter", "trainable_tokens_delta"),
    )
}


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


def facts(sizes: Sizes, geometry: Geometry | None, batch: int | None = None) -> dict[str, object]:
    """What the condition of a tensor row may ask of a site, besides the method's arguments.

    batch: the number of matrices of a batch, whose fact is 0 where there is none.
    """
    common = {**sizes.names, "matrices": batch or 0}
    if geometry is None:
        return {**common, "groups": 1, "kernel": 1, "dilation": 1, "padding_mode": "zeros"}
    return {
        **common,
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
        arguments = dict(self.arguments)
        counts = {n: arguments[n] for n in counted_in(row.key)}
        known = {**counts, **self.facts}
        sizes = tuple((n, v) for n, v in known.items() if n in axes and type(v) is int)
        key = _IN_KEY.sub(lambda found: str(arguments[found.group(1)]), row.key)
        key = numbered(key, {**self.facts, **arguments})
        return Spelling(fmt.name, prefix + key, row.layout or "", sizes)


def place_of(form: SiteClass) -> Place:
    """The place that a class of sites is."""
    known = {**facts(form.sizes, form.geometry, form.batch), "has_bias": form.has_bias}
    return Place(form.kind.name, known, form.arguments)


def _takes(fmt: ast.Format, form: SiteClass, joint: bool) -> bool:
    """Whether a format has a place for such a part of a layer, reached as it is."""
    if form.at == WHOLE and form.mode == "call":
        return True
    whole = form.at.index is None and form.at.part is None
    return bool(dialect_of(fmt.name).around) and whole and (form.kind.bare or joint)


def rows_of(fmt: ast.Format, form: SiteClass, joint: bool = False) -> dict[str, ast.Tensor] | str:
    """The row of every parameter of a class of sites; the name of one that has none.

    What is drawn again by its seed needs no row. No format has a place for what is rows of a layer,
    or is a layer whose weight alone is reached.

    joint: whether a format names the sites together with others, as one module.

    Raises DefinitionError (E124) for a layout that does not take the parameter's shape.
    """
    place, rows = place_of(form), dict[str, ast.Tensor]()
    if not _takes(fmt, form, joint):
        return form.parameters[0].name if form.parameters else ""
    for parameter in form.parameters:
        row = place.row(fmt, parameter.name)
        if row is None and not parameter.redrawn:
            return parameter.name
        if row is None:
            continue
        _check_layout(place.spelling(fmt, row, "", shared=False), form, row)
        rows[row.name] = row
    return rows


def _check_layout(spelling: Spelling, form: SiteClass, row: ast.Tensor) -> None:
    from einops import EinopsError

    try:
        spelling.file_shape(form.stored[row.name])
    except EinopsError as error:
        reason = str(error).strip().splitlines()[-1]
        shape = list(form.stored[row.name])
        refuse(
            "E124",
            f"`{row.layout}` does not take {row.name} {shape}: {reason}",
            row.span,
            hint="a layout names each axis of the method's tensor, then of the file's",
        )


def chosen_format(
    formats: tuple[ast.Format, ...], form: SiteClass, joint: bool = False
) -> tuple[ast.Format, dict[str, ast.Tensor]] | None:
    """The first format that has a tensor for every parameter of a class of sites."""
    for fmt in formats:
        rows = rows_of(fmt, form, joint)
        if not isinstance(rows, str):
            return fmt, rows
    return None
