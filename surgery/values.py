"""The graph of a parameter that adapters change: what a module reached by its value reads.

Several sites may be parts of one parameter: matrices of a batch, rows of a matrix. What no site is
stays the parameter's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, reduce
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, fx

from surgery.coding import code_of
from surgery.model.parts import ENTRIES, ROWS, Part, run_of
from surgery.model.storage import Which, name_of
from surgery.nodes import Layer, Lowering, Lowerings, at_site


def raw(name: str) -> str:
    """Under which name a module has its own parameter, where the adapters' is read instead."""
    return f"surgery_{name}"


def build(keys: Lowerings, which: Which, copies: Mapping[str, Lowerings] | None = None) -> fx.Graph:
    """The graph of a parameter, of which all the sites are parts, in order.

    copies: of the module's parameters, those that an adapter has its own of.
    """
    graph = fx.Graph()
    at = keys[0].form.at
    others = {name: key for name, key in (copies or {}).items() if name != at.parameter}
    layer = _Owner(graph, (at.parameter, at.bias), others)
    whole = [key for key in keys if key.form.at.index is None]
    value = _joined(whole, which, layer, lambda: _own(keys[0], which, layer))
    single = [key for key in keys if key.form.at.index is not None]
    if single:
        value = _each_put_in(single, which, layer, value)
    graph.output(value.node)
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    graph.lint()
    return graph


class _Owner(Layer):
    """A module as nodes, with its own parameters, and with an adapter's where there are copies."""

    def __init__(
        self, graph: fx.Graph, names: Iterable[str], copies: Mapping[str, Lowerings]
    ) -> None:
        super().__init__(graph, None, {name: raw(name) for name in names})
        self.copies = copies
        self.made: dict[str, Any] = {}

    def attribute(self, path: str) -> Any:
        """A node that reads an attribute."""
        keys = self.copies.get(path)
        if keys is None:
            return super().attribute(path)
        if path not in self.made:
            own = _Owner(self.graph, (path,), {})
            self.made[path] = _joined(keys, "weight", own, lambda: own.attribute(path))
        return self.made[path]


def _own(key: Lowering, which: Which, layer: Layer) -> Any:
    """A parameter as it is stored; an absent bias is zero."""
    form = key.form
    if which == "weight" or form.has_bias:
        return layer.attribute(name_of(form.at, which))
    matrix = form.kind.to_matrix(layer.attribute(form.at.parameter))
    return layer.function(torch.zeros_like, matrix.select(-1, 0))


def _joined(keys: Sequence[Lowering], which: Which, layer: Layer, own: Callable[[], Any]) -> Any:
    """The parameter, or one matrix of it, as it is stored, with what the sites make of its rows."""
    if not keys:
        return own()
    if keys[0].form.at.picked:
        return reduce(lambda value, key: _put_in_rows(key, value, layer), keys, own())
    copy = _copy(keys[0])
    if copy:
        return _narrowed(keys[0], layer.attribute(keys[0].path(copy)), layer)
    kind = keys[0].form.kind
    found = [(key.form.part, _value(key, which, layer)) for key in keys]
    if which == "bias":
        return assembled(found, own, ENTRIES, layer)
    value = assembled(found, lambda: kind.to_matrix(own()), ROWS, layer)
    return kind.from_matrix(value, own().shape)


def _put_in_rows(key: Lowering, whole: Any, layer: Layer) -> Any:
    """A parameter as it lies in which some rows are those of a site."""
    form = key.form
    copy = _copy(key)
    value = layer.attribute(key.path(copy)) if copy else _matrix(key, "weight", layer)
    assert form.shape is not None  # it lies as it is
    rows = form.kind.from_matrix(_narrowed(key, value, layer), form.shape)
    return layer.function(with_rows, whole, rows, form.at.picked)


def with_rows(tensor: Tensor, rows: Tensor, picked: tuple[int, ...]) -> Tensor:
    """A tensor [n, ...] in its own strides, with `rows` [len(picked), ...] for `picked` entries."""
    run, made = run_of(picked), tensor.clone()
    if run is None:
        return made.index_copy_(0, torch.tensor(picked, device=tensor.device), rows)
    made[slice(*run)] = rows
    return made


def _copy(key: Lowering) -> str:
    """The parameter that stands for the layer's own as it lies, if nothing is made of it."""
    merged = key.form.derived.merged
    name = merged.weight.text("name") if merged and merged.weight.op == "parameter" else ""
    return name if name in key.form.lying and name not in key.narrow else ""


def _each_put_in(keys: Sequence[Lowering], which: Which, layer: Layer, whole: Any) -> Any:
    """A batch in which some matrices are those of sites."""
    pieces: list[Any] = []
    at = 0
    for index, group in groupby(keys, key=lambda key: cast(int, key.form.at.index)):
        if index > at:
            pieces.append(whole.narrow(0, at, index - at))
        own = whole.select(0, index)
        pieces.append(_joined([*group], which, layer, lambda own=own: own).unsqueeze(0))
        at = index + 1
    pieces.append(whole.narrow(0, at, whole.shape[0] - at))
    return layer.function(torch.cat, pieces, 0)


def assembled(
    found: Sequence[tuple[Part | None, Any]], own: Callable[[], Any], axis: int, layer: Layer
) -> Any:
    """The values of parts in order, and between them what there is.

    axis: counts the rows, from the end on. A single value that is no part's is all there is.
    """
    if found[0][0] is None:
        return found[0][1]
    parts = [(part, value) for part, value in found if part is not None]
    for _, group in groupby(parts, key=lambda row: row[0].period):
        some, there = [*group], own
        own = partial(_interleaved, some, there, axis, layer)
    return own()


def _interleaved(
    found: Sequence[tuple[Part, Any]], own: Callable[[], Any], axis: int, layer: Layer
) -> Any:
    """The same for parts that come in turns of one period."""
    first = found[0][0]
    turns = (first.times, first.period)

    def split(value: Any, length: int) -> Any:
        return value if first.times == 1 else value.unflatten(axis, (first.times, length))

    there = split(own(), turns[1])
    pieces: list[Any] = []
    at = 0
    for part, value in found:
        if part.start > at:
            pieces.append(there.narrow(axis, at, part.start - at))
        pieces.append(split(value, part.stop - part.start))
        at = part.stop
    if at < first.period:
        pieces.append(there.narrow(axis, at, first.period - at))
    joined = layer.function(torch.cat, pieces, axis)
    return joined if first.times == 1 else joined.flatten(axis - 1, axis)


# ------------------------------------------------------------------------------------- a site


def _value(key: Lowering, which: Which, layer: Layer) -> Any:
    """What a site makes of its weight or bias, in the dtype of the layer's own."""
    value = _matrix(key, which, layer) if key.form.batch is None else _batch(key, which, layer)
    return _narrowed(key, value, layer)


def _narrowed(key: Lowering, value: Any, layer: Layer) -> Any:
    if key.form.dtype == key.form.base_dtype:
        return value
    return value.to(layer.attribute(key.form.at.parameter).dtype)


def _matrix(key: Lowering, which: Which, layer: Layer) -> Any:
    merged = key.form.derived.merged
    assert merged is not None  # else it is refused before
    interpreter, _ = at_site(key, layer)
    return interpreter.value(merged.weight if which == "weight" else merged.bias)


class _Arguments(Layer):
    """A matrix of a batch as nodes: each of its attributes is an input of the graph."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph, None)
        self.read: dict[str, Any] = {}

    def attribute(self, path: str) -> Any:
        """The input that stands for an attribute."""
        if path not in self.read:
            name = path.replace(".", "_")
            self.read[path] = self.tracer.proxy(self.graph.placeholder(name))
        return self.read[path]


def _batch(key: Lowering, which: Which, layer: Layer) -> Any:
    """The same for each matrix of a batch, whose graph is that of one of them."""
    graph = fx.Graph()
    one = _Arguments(graph)
    graph.output(_matrix(key, which, one).node)
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    shared = {key.path(name) for name, _, _ in key.banks}
    dims = tuple(None if path in shared else 0 for path in one.read)
    run = code_of(graph).run

    def each_matrix(*tensors: Tensor) -> Tensor:
        return torch.vmap(partial(run, None), dims)(*tensors)

    return layer.function(each_matrix, *map(layer.attribute, one.read))
