"""The pieces of a site graph: a module, a site of it and an equation's tensors, as nodes.

Here the interpreter meets `torch.fx`; `lower` puts the pieces together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.fx.proxy import GraphAppendingTracer

from surgery.algebra.expr import Expr
from surgery.algebra.interpret import Domain, Interpreter, Unlowerable
from surgery.algebra.places import PlaceKind, Places
from surgery.calls.positions import places
from surgery.mixture import owner_of
from surgery.model.holder import ADAPTERS, SHARED, link_name
from surgery.model.layers import InputForm
from surgery.model.parts import ENTRIES, ROWS, Part
from surgery.model.storage import Which, bias_of, matrix_of, name_of
from surgery.planned import SiteClass


@dataclass(frozen=True)
class Lowering:
    """What a site's nodes depend on: its class, the adapter's name, the shared parameters.

    banks: for each shared parameter, where it is below `SHARED`, and its stored shape.
    follows: whether the module is another one, which shares the site's weight.
    narrow: the parameters whose dtype is narrower than that of others.
    """

    form: SiteClass
    adapter: str
    banks: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
    follows: bool = False
    narrow: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, object]) -> Lowering:
        """Itself, since it is immutable and shared by all sites that are alike."""
        return self

    def path(self, name: str) -> str:
        """Where a parameter is, from the site's module on."""
        own, adapter = owner_of(name)
        adapter = adapter or self.adapter
        names = self.form.at.names
        start = (link_name(adapter, *names),) if self.follows else (ADAPTERS, adapter, *names)
        bank = next((path for other, path, _ in self.banks if other == name), None)
        below = (own,) if bank is None else (SHARED, bank)
        return ".".join((*start, *below))


UNPACKED = "surgery_unpacked"
"""The attribute of a mounted module that is its weight in float32, where it lies packed."""

Lowerings = tuple[Lowering, ...]
"""What the graph of a module depends on: each of its sites, in the order of their rows."""


def cast_like(x: Tensor, other: Tensor) -> Tensor:
    """X in the dtype of another; as it is under autocast, which casts where it must.

    The dtype is read when it runs: the model may have been cast since it was adapted.
    """
    if torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(other.dtype)


class _Value(fx.Proxy):
    """A value in the graph.

    Whatever is called with one is a function: a method of it never comes this way. `fx.Proxy` would
    ask torch, which makes a table of all that can be overridden for the answer.
    """

    @classmethod
    def __torch_function__(
        cls,
        orig_method: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> fx.Proxy:
        del types
        found: list[fx.Proxy] = []
        map_aggregate(cast(Any, (args, kwargs)), lambda a: _noted(a, found))
        return found[0].tracer.create_proxy("call_function", orig_method, args or (), kwargs or {})


def _noted(value: Any, found: list[fx.Proxy]) -> Any:
    if isinstance(value, fx.Proxy):
        found.append(value)
    return value


class _Tracer(GraphAppendingTracer):
    """Appends to a graph, in values of the class above."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)


class Layer:
    """A module as nodes of a graph: its input, its attributes, its own forward."""

    def __init__(
        self, graph: fx.Graph, argument: str | None, renamed: Mapping[str, str] | None = None
    ) -> None:
        """Nodes of a graph: `argument` is its input, if any; `renamed` names of attributes."""
        self.graph = graph
        self.tracer = _Tracer(graph)
        self.input = None if argument is None else self.tracer.proxy(graph.placeholder(argument))
        self.renamed = renamed or {}
        self._output: Any = None

    def argument(self, name: str) -> Any:
        """One more input."""
        return self.tracer.proxy(self.graph.placeholder(name))

    def attribute(self, path: str) -> Any:
        """A node that reads an attribute."""
        return self.tracer.proxy(self.graph.get_attr(self.renamed.get(path, path)))

    def function(self, target: Callable[..., Any], *args: Any) -> Any:
        """A node that calls a function which proxies do not see by themselves."""
        return self.tracer.create_proxy("call_function", target, args, {})

    def base(self, x: Any) -> Any:
        """The module's own forward."""
        return self.tracer.create_proxy("call_module", "base", (x,), {})

    @property
    def output(self) -> Any:
        """The module's own output for its input as it came, of which several sites are parts."""
        if self._output is None:
            self._output = self.base(self.input)
        return self._output


class GraphPort:
    """What a site offers, as nodes of a graph."""

    def __init__(self, layer: Layer, form: SiteClass) -> None:
        """A site of a class at a module."""
        self.form_class = form
        self.form: InputForm = form.kind.input
        self.groups = form.sizes.groups
        self.packed = bool(form.kind.packed)
        self.mixed = self.packed or form.dtype != form.base_dtype
        self.layer = layer
        self.attribute, self.function = layer.attribute, layer.function
        self.output: Any = None
        self.anchor: Callable[[], Any] = lambda: None  # some tensor of the parameters' dtype
        self._cast: dict[Any, Any] = {}

    def base(self, x: Any, changed: bool) -> Any:
        """The site's own layer."""
        kind, part = self.form_class.kind, self.form_class.part
        if changed and self.mixed and self.form != "indices":
            x = self.like(x)
        if part is None:
            given = x is self.layer.input  # and not what is left of it after drop(p)
            self.output = self.layer.output if given else self.layer.base(x)
            return kind.features_last(self.output)
        if not changed:
            self.output = self.layer.output
            return part.of(kind.features_last(self.output), ENTRIES)
        self.output = self._rows(x, part)
        return self.output

    def _rows(self, x: Any, part: Part) -> Any:
        """Some rows of the layer's matrix, and of its bias, on an input that is not its own."""
        form = self.form_class
        matrix = part.of(form.kind.to_matrix(self._like(x, "weight")), ROWS)
        y = form.kind.apply(matrix, x, form.sizes, form.geometry, True)
        return y + part.of(self._like(x, "bias"), ENTRIES) if form.has_bias else y

    def _like(self, x: Any, which: Which) -> Any:
        own = self.own(which)
        return own.to(x.dtype) if self.packed else own

    def own(self, which: Which) -> Any:
        """The layer's own weight or bias, as it is stored; where it is packed, what that is."""
        packed = self.packed and which == "weight"
        return self.attribute(UNPACKED if packed else name_of(self.form_class.at, which))

    def like(self, y: Any) -> Any:
        """A value in the dtype of the layer's own output, whatever autocast does to others."""
        if self.packed:
            return y.to(cast(Any, self.layer.input).dtype)
        return self.function(cast_like, y, self.own("weight"))

    def apply(self, matrix: Any, x: Any, whole: bool) -> Any:
        """A whole matrix on the input."""
        form = self.form_class
        if self.form != "indices":
            x = self.features(x)
        return form.kind.apply(matrix, x, form.sizes, form.geometry, whole)

    def features(self, x: Any) -> Any:
        """The input in the dtype of the parameters."""
        if not self.mixed:
            return x
        if x not in self._cast:
            self._cast[x] = self.function(cast_like, x, self.anchor())
        return self._cast[x]

    def widen(self, y: Any) -> Any:
        """The layer's output in the dtype of the parameters."""
        return self.function(cast_like, y, self.anchor()) if self.mixed else y

    def scale_channels(self, x: Any, factors: Any) -> Any:
        """Patches times a factor a channel."""
        form = self.form_class
        assert form.kind.scale is not None
        return form.kind.scale(self.features(x), factors, form.sizes, form.geometry)

    def training(self) -> Any:
        """Whether the site is in training mode, read when it runs."""
        return self.attribute("training")


class _Leaves:
    """The tensors an equation reads, as nodes, each read once."""

    def __init__(self, key: Lowering, port: GraphPort) -> None:
        self.key = key
        self.port = port
        self.banks = {name: shape for name, _, shape in key.banks}
        self.read: dict[Expr, Any] = {}
        self.parameters: dict[str, Any] = {}

    def __call__(self, expr: Expr) -> Tensor:
        if expr not in self.read:
            self.read[expr] = self._leaf(expr)
        return self.read[expr]

    def anchor(self) -> Tensor:
        """Some tensor of the dtype and device of the parameters."""
        of_dtype = (p.name for p in self.key.form.parameters if not p.whole)
        names = [name for name in of_dtype if name not in self.key.narrow]
        if not names:
            return self._own("weight")
        return self._parameter(next((n for n in names if n not in self.banks), names[0]))

    def _leaf(self, expr: Expr) -> Any:
        match expr.op:
            case "parameter":
                return self._parameter(expr.text("name"))
            case "weight":
                return matrix_of(self.key.form.kind, self.key.form.at, self._own("weight"))
            case _:
                return bias_of(self.key.form.at, self._own("bias"))

    def _own(self, which: Which) -> Any:
        tensor, form = self.port.own(which), self.key.form
        if not self.port.mixed:
            return tensor
        return tensor.to(cast(Any, self.anchor()).dtype if form.parameters else form.dtype)

    def _parameter(self, name: str) -> Any:
        if name not in self.parameters:
            self.parameters[name] = self._read(name)
        return self.parameters[name]

    def _read(self, name: str) -> Any:
        form = self.key.form
        tensor, shape = (
            form.matrix(name, self.port.attribute(self.key.path(name))),
            form.shapes[name],
        )
        for axis, stored in enumerate(self.banks.get(name, shape)):
            if shape[axis] != stored:
                tensor = tensor.narrow(axis, 0, shape[axis])
        return tensor.to(cast(Any, self.anchor()).dtype) if name in self.key.narrow else tensor


def at_places(form: SiteClass, y: Any, port: GraphPort) -> Any:
    """What is given where an equation is for some of the tokens, features last.

    Raises `Unlowerable` where what passes is no tokens.
    """
    if form.kind.input == "patches":
        raise Unlowerable("x is read in patches here, which are no tokens of a text")
    own = form.kind.features_last(port.layer.output)
    return chosen_at(form, y, own if form.part is None else form.part.of(own, ENTRIES), port.layer)


def chosen_at(form: SiteClass, y: Any, own: Any, layer: Layer) -> Any:
    """Where an equation is for, what it gives; elsewhere a site's own."""
    every = tuple((one.kind, one.numbers) for one in form.places)
    return layer.function(mixed_at, y, own, every)


def mixed_at(
    y: Tensor, own: Tensor, every: tuple[tuple[PlaceKind, tuple[int, ...]], ...]
) -> Tensor:
    """Y [batch, tokens, hidden] at some places, and a site's own elsewhere."""
    mask, *others = (places(Places(kind, numbers), own) for kind, numbers in every)
    for other in others:
        mask = mask | other
    return torch.where(mask.unsqueeze(-1), y, own)


def at_site(key: Lowering, layer: Layer) -> tuple[Interpreter, GraphPort]:
    """The interpreter of a site's equation in a graph, and the site."""
    form = key.form
    port = GraphPort(layer, form)
    leaves = _Leaves(key, port)
    port.anchor = leaves.anchor
    return Interpreter(Domain(form.names, leaves, leaves.anchor), port, form.has_bias), port
