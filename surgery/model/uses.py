"""How a whole graph uses the parameters of its model: which layer each use is, and with what.

A row of `_OPERATIONS` is a function that is a layer when one of its arguments is a parameter. What
no row knows is a use all the same: it reads the parameter's value.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from surgery.model.holder import parameters_of
from surgery.model.layers import KINDS, Geometry, LayerKind, Sizes, qualified_name

Named = tuple[str, str]
"""A module's path, and the name of one of its parameters."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What a use is, if a row knows it: two uses that are equal are one kind of site.

    kind: the name of a row of `KINDS`. bias: the parameter that it adds; None for none.
    """

    kind: str
    geometry: Geometry | None
    groups: int
    bias: Named | None


@dataclass(frozen=True, slots=True)
class Use:
    """One node that reads a parameter.

    read: the `get_attr` node; node: what computes with it, past a transposition. reader: the first
        on the way from one to the other.
    layer: what that is; None where only the parameter's value is known to matter.
    slot: which argument of `node` is x, where there is a layer.
    writes: whether the node changes the parameter.
    """

    read: fx.Node
    reader: fx.Node
    node: fx.Node
    layer: Layer | None
    slot: int | str | None = None
    writes: bool = False

    @property
    def input(self) -> fx.Node:
        """What is x now: a node may have been replaced since."""
        arguments: Any = self.node.args if isinstance(self.slot, int) else self.node.kwargs
        return cast(fx.Node, arguments[self.slot])


Uses = Mapping[Named, Sequence[Use]]

GRAPHS = "_surgery_graphs"
"""Where an adapted model keeps the graphs that it has without adapters."""


@dataclass(frozen=True, slots=True)
class Graphs:
    """The graph that came, and the one without adapters in which each module reads its own."""

    original: fx.Graph
    settled: fx.Graph


def base_graph(model: fx.GraphModule) -> fx.Graph:
    """The graph of a model without its adapters."""
    graphs: Graphs | None = vars(model).get(GRAPHS)
    return model.graph if graphs is None else graphs.settled


def uses_of(model: fx.GraphModule, graph: fx.Graph) -> Uses:
    """Every use of every parameter in a graph, in its order.

    A parameter with several names is used by the one that belongs to the module that a node was
    traced from, as far as the graph says from which.
    """
    found: dict[Named, list[Use]] = {}
    names = _Names(model)
    for read in graph.nodes:
        name = names.parameter(read)
        if name is not None:
            for use in _uses(_Way(read, None, read, False), names):
                found.setdefault(names.within(name, use.node), []).append(use)
    return found


class _Names:
    """Which parameter a node reads."""

    def __init__(self, model: fx.GraphModule) -> None:
        self.modules = dict(cast("Iterator[tuple[str, nn.Module]]", model.named_modules()))

    def parameter(self, node: object) -> Named | None:
        """The parameter that a `get_attr` node reads, if it is one."""
        if not (isinstance(node, fx.Node) and node.op == "get_attr"):
            return None
        owner, _, name = str(node.target).rpartition(".")
        return (owner, name) if self.held((owner, name)) is not None else None

    def held(self, name: Named) -> nn.Parameter | None:
        """The parameter itself."""
        module = self.modules.get(name[0])
        return None if module is None else parameters_of(module).get(name[1])

    def within(self, name: Named, node: fx.Node) -> Named:
        """The same parameter by the name that it has in the module that a node belongs to."""
        path = traced_from(node)
        if path is None or path == name[0]:
            return name
        here = self.held((path, name[1]))
        return (path, name[1]) if here is not None and here is self.held(name) else name


def stack_of(node: fx.Node) -> Iterator[tuple[str, type | str]]:
    """The modules that a node was traced from, outermost first: path and class, or its name."""
    stack = cast("dict[str, tuple[str, type | str]]", node.meta.get("nn_module_stack") or {})
    for path, cls in stack.values():
        yield path.partition("@")[0], cls  # a module that is called again is counted behind an @


def traced_from(node: fx.Node) -> str | None:
    """The path of the module that a node was traced from, or None."""
    return next((path for path, _ in reversed([*stack_of(node)])), None)


@dataclass(frozen=True, slots=True)
class _Way:
    """What a parameter has come to: a value that is it, or its transpose if `flipped`."""

    read: fx.Node
    reader: fx.Node | None
    value: fx.Node
    flipped: bool


def _uses(way: _Way, names: _Names) -> Iterator[Use]:
    for node in way.value.users:
        reader = way.reader or node
        if _transposes(node, way.value):
            yield from _uses(_Way(way.read, reader, node, not way.flipped), names)
        else:
            yield _use(way, reader, node, names)


def _use(way: _Way, reader: fx.Node, node: fx.Node, names: _Names) -> Use:
    row = _operations().get(cast(Any, node.target)) if node.op == "call_function" else None
    arguments = None if row is None else row.arguments(node)
    if row is None or arguments is None or arguments.get(row.weight) is not way.value:
        return Use(way.read, reader, node, None, writes=_writes(node, way.value))
    x, bias = arguments.get(row.input), arguments.get(row.bias)
    added = names.parameter(bias)
    known = isinstance(x, fx.Node) and x is not way.value and (bias is None or added is not None)
    weight = cast(Tensor, names.held(cast(Named, names.parameter(way.read))))
    layer = row.layer(arguments, weight, way.flipped) if known else None
    if layer is None:
        return Use(way.read, reader, node, None)
    own = None if added is None else names.within(added, node)
    slot = row.input if row.input in node.kwargs else row.names.index(row.input)
    return Use(way.read, reader, node, replace(layer, bias=own), slot)


def _writes(node: fx.Node, value: fx.Node) -> bool:
    """Whether a node changes a value in place, or gives one over the same data that is changed."""
    if not node.args or node.args[0] is not value:
        return False
    name = _called(node)
    if name.endswith("_") and not name.endswith("__"):
        return True
    return name in _OVER_THE_SAME and any(_writes(user, node) for user in node.users)


_OVER_THE_SAME = {
    *("alias", "detach", "expand", "narrow", "permute", "reshape", "select", "slice"),
    *("squeeze", "t", "transpose", "unsqueeze", "view"),
}
"""The functions whose results are over the same data, by name."""


# ------------------------------------------------------------------------------- operations

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class _Operation:
    """A function that is a layer.

    names: of its arguments, in order. weight, input, bias: which of them are what; "" for none.
    kind: of the layer, for a weight as it comes; flipped: for one that was transposed before.
    fixed: the values that other arguments must have, where they are given.
    """

    names: tuple[str, ...]
    kind: str
    flipped: str = ""
    weight: str = "weight"
    input: str = "input"
    bias: str = "bias"
    fixed: tuple[tuple[str, object], ...] = ()

    def arguments(self, node: fx.Node) -> Mapping[str, object] | None:
        """A node's arguments by name; None where they are not what they must be."""
        if len(node.args) > len(self.names):
            return None
        given = {**dict(zip(self.names, node.args, strict=False)), **node.kwargs}
        wrong = any(given.get(name, value) != value for name, value in self.fixed)
        return None if wrong else given

    def layer(self, arguments: Mapping[str, object], weight: Tensor, flipped: bool) -> Layer | None:
        """What a node is; None for a layer that no kind stands for."""
        kind = self.flipped if flipped else self.kind
        axes = weight.dim() - 2
        if not kind or weight.dim() != (2 if kind in _FLAT else axes + 2):
            return None
        if kind in _FLAT:
            return Layer(kind, None, 1, None)
        if axes not in (1, 2, 3):
            return None
        geometry = _geometry(arguments, tuple(weight.shape[2:]))
        return Layer(f"{kind}{axes}d", geometry, cast(int, arguments.get("groups", 1)), None)


_FLAT = frozenset({"linear", "transposed_linear", "embedding"})


def _geometry(arguments: Mapping[str, object], kernel: tuple[int, ...]) -> Geometry:
    axes = len(kernel)
    padding = arguments.get("padding", 0)
    return Geometry(
        kernel=kernel,
        stride=_every(arguments.get("stride", 1), axes),
        padding=padding if isinstance(padding, str) else _every(padding, axes),
        dilation=_every(arguments.get("dilation", 1), axes),
        mode="zeros",
        pad=(),
    )


def _every(value: object, axes: int) -> tuple[int, ...]:
    """A number for each axis; one that is given stands for all."""
    given = tuple(cast("Sequence[int]", value)) if isinstance(value, list | tuple) else (value,)
    return cast("tuple[int, ...]", given * axes if len(given) == 1 else given)


_LINEAR = _Operation(("input", "weight", "bias"), "linear", "transposed_linear")
_PRODUCT = _Operation(("input", "other"), "transposed_linear", "linear", weight="other", bias="")
_ADDED = _Operation(
    ("input", "mat1", "mat2", "beta", "alpha"),
    "transposed_linear",
    "linear",
    weight="mat2",
    input="mat1",
    bias="input",
    fixed=(("beta", 1), ("alpha", 1)),
)
_LOOKUP = _Operation(("weight", "input"), "embedding", bias="")
_CONVOLUTION = _Operation(
    ("input", "weight", "bias", "stride", "padding", "dilation", "groups"), "conv"
)
_ANY_CONVOLUTION = _Operation(
    (*_CONVOLUTION.names[:-1], "transposed", "output_padding", "groups"),
    "conv",
    fixed=(("transposed", False),),
)


@cache
def _operations() -> Mapping[Callable[..., object], _Operation]:
    """The rows by function, of torch and of an exported program."""
    aten: Any = torch.ops.aten
    lookup = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    rows: dict[Callable[..., object], _Operation] = {
        F.linear: _LINEAR,
        aten.linear.default: _LINEAR,
        torch.addmm: _ADDED,
        aten.addmm.default: _ADDED,
        F.embedding: replace(
            _LOOKUP, names=("input", "weight", *lookup), fixed=(("max_norm", None),)
        ),
        aten.embedding.default: replace(
            _LOOKUP, names=("weight", "input", "padding_idx", *lookup[3:])
        ),
        aten.convolution.default: _ANY_CONVOLUTION,
    }
    infix = cast(Any, operator).matmul
    for product in (infix, torch.matmul, torch.mm, aten.matmul.default, aten.mm.default):
        rows[product] = _PRODUCT
    for axes in (1, 2, 3):
        packet = getattr(aten, f"conv{axes}d")
        every = (getattr(torch, f"conv{axes}d"), packet.default, packet.padding)
        rows |= dict.fromkeys(every, _CONVOLUTION)
    return rows


# ------------------------------------------------------------------------------ transposition


def _transposes(node: fx.Node, value: fx.Node) -> bool:
    """Whether a node gives the transpose of a matrix."""
    name = _called(node)
    axes = _axes(node.args[1:])
    if not node.args or node.args[0] is not value or node.kwargs:
        return False
    match name:
        case "t" | "numpy_T":
            return not node.args[1:]
        case "getattr":
            return node.args[1] in ("T", "mT")
        case "transpose":
            return axes in ((0, 1), (1, 0), (-1, -2), (-2, -1))
        case "permute":
            return axes in ((1, 0), (-1, -2))
        case _:
            return False


def _axes(arguments: tuple[object, ...]) -> tuple[object, ...]:
    """Some axes, given one by one or as a list."""
    if len(arguments) == 1 and isinstance(arguments[0], list | tuple):
        return tuple(cast("Sequence[object]", arguments[0]))
    return arguments


def _called(node: fx.Node) -> str:
    """The name of what a node calls, of a method and of a function alike."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    schema = getattr(node.target, "_schema", None)
    return schema.name.partition("::")[2] if schema else getattr(node.target, "__name__", "")


# ------------------------------------------------------------------------------ layer kinds

_ROWS = {kind.name: kind for kind in KINDS}


def kind_of_class(said: type | str | None) -> Layer | None:
    """The layer that a class is by its name, where that says it all: it has no geometry."""
    name = said if said is None or isinstance(said, str) else qualified_name(said)
    found = next((kind.name for kind in KINDS if kind.qualified == name), None)
    return Layer(found, None, 1, None) if found in _FLAT else None


@dataclass(frozen=True, slots=True)
class _Always:
    """Says the same of every module; equal to another that says so too, and can be pickled."""

    value: object

    def __call__(self, module: nn.Module) -> Any:
        """What it says."""
        del module
        return self.value


def kind_at(layer: Layer, weight: Tensor, writes: bool) -> LayerKind:
    """The layer kind of a parameter that a graph uses so; its sizes are read off the parameter."""
    row = _ROWS[layer.kind]
    fan_out, fan_in = row.to_matrix(weight.detach()).shape
    channels = fan_in if layer.geometry is None else weight.shape[1]
    objection = "the graph writes into it, so W is not a constant" if writes else ""
    return replace(
        row,
        sizes=_Always(Sizes(fan_in, fan_out, channels, layer.groups)),
        geometry=_Always(layer.geometry),
        objection=_Always(objection),
    )


__all__ = [
    "GRAPHS",
    "Graphs",
    "Layer",
    "Named",
    "Use",
    "Uses",
    "base_graph",
    "kind_at",
    "kind_of_class",
    "stack_of",
    "traced_from",
    "uses_of",
]
