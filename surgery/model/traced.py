"""A whole graph as a tree of modules: what it was traced from, as far as it still says so.

An exported program has its parameters in containers without a class, and no module for what has no
parameters. The tree has them all again: lists are lists, so that an index counts what it counted
before, and a class is known by its name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import cast

from torch import Tensor, fx, nn

from surgery.model.holder import ADAPTERS, children_of, parameters_of
from surgery.model.layers import LayerKind, base_class, weight_kind_of
from surgery.model.uses import (
    Layer,
    Named,
    Use,
    base_graph,
    kind_at,
    kind_of_class,
    stack_of,
    uses_of,
)

_TRANSPOSED = frozenset({"transposed_linear", "embedding"})
"""The kinds of which a parameter without a module is not: it is W as it lies, here as anywhere."""

_PATH = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True, slots=True)
class Used:
    """What a graph says of a parameter.

    kind: the layer that it is the weight of. bias: the name of the parameter that is added; "" if
        there is none. by_value: whether some use of it is not that layer's.
    """

    kind: LayerKind
    bias: str
    by_value: bool


class Outline:
    """The tree of modules that a graph was traced from, and what it says of each."""

    def __init__(self, model: fx.GraphModule) -> None:
        """Read a graph once; nothing is changed."""
        self._model = model
        self._graph = base_graph(model)
        self._real = dict(_modules(model))
        self._classes = _classes(self._graph)
        self._names = _names([*self._real, *self._classes])
        self._uses = uses_of(model, self._graph)

    def children(self, path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """The children of what has a path, in order; what left no parameters is an empty module."""
        real = children_of(module)
        every = self._names.get(path, ())
        names = [name for name, child in real.items() if child is not None and name != ADAPTERS]
        names += [name for name in every if name not in real]
        if self.listed(path, module):
            present = {int(name) for name in names}
            names = [str(i) for i in range(max(present) + 1)]
        found = ((name, real.get(name)) for name in names)
        return [(name, nn.Module() if child is None else child) for name, child in found]

    def listed(self, path: str, module: nn.Module) -> bool:
        """Whether the children of what has a path are numbered ones of a list."""
        if isinstance(module, nn.ModuleList | nn.Sequential):
            return True
        own = [name for name in children_of(module) if name != ADAPTERS]
        names = {*own, *self._names.get(path, ())}
        return _plain(module) and bool(names) and all(name.isdecimal() for name in names)

    def class_of(self, path: str, module: nn.Module) -> type[nn.Module] | None:
        """The class of what is a mere container now; one of that name alone unless torch has it."""
        said = self._classes.get(path)
        return _class(said) if said is not None and _plain(module) else None

    def used(self, path: str, module: nn.Module) -> dict[str, Used]:
        """What the graph says of the parameters of a module, by name."""
        found = ((name, self._used(path, module, name)) for name in parameters_of(module))
        return {name: used for name, used in found if used is not None}

    def _used(self, path: str, module: nn.Module, name: str) -> Used | None:
        uses = self._uses.get((path, name), ())
        if id(module) in self._called:
            known = weight_kind_of(module) if name == "weight" else None
            read = uses or self._uses.get((path, "bias"))
            return Used(known, "bias", True) if known is not None and read else None
        layers = dict.fromkeys(use.layer for use in uses)
        layer = next((one for one in layers if one is not None), None)
        if layer is None and name == "weight":
            layer = kind_of_class(self._classes.get(path))
        if layer is None or (name != "weight" and layer.kind in _TRANSPOSED):
            return None
        weight = cast(Tensor, parameters_of(module)[name])
        kind = kind_at(layer, weight, any(use.writes for use in uses))
        bias = self._bias(layer, path, module, name, uses)
        if bias is None and name == "weight":
            return Used(kind, "bias", by_value=True)
        return Used(kind, bias or "", by_value=set(layers) != {layer} or bias is None)

    def _bias(
        self, layer: Layer, path: str, module: nn.Module, name: str, uses: Sequence[Use]
    ) -> str | None:
        """The parameter that a layer adds; None if it is another module's, or not for it alone."""
        beside = "bias" if name == "weight" else ""
        if layer.bias is None:
            return None if parameters_of(module).get(beside) is not None else ""
        owner, bias = layer.bias
        if owner != path or (beside and bias != beside):
            return None
        nodes = {use.node for use in uses}
        alone = all(use.node in nodes for use in self._uses[layer.bias])
        return bias if alone else None

    @cached_property
    def _called(self) -> set[int]:
        """The identities of the modules that the graph calls, and of those inside them."""
        found: set[int] = set()
        for node in self._graph.nodes:
            if node.op == "call_module":
                called = self._model.get_submodule(str(node.target))
                found |= {id(module) for module in called.modules()}
        return found


# ------------------------------------------------------------------------------ what is there


def _plain(module: nn.Module) -> bool:
    """Whether a module has no class that says anything."""
    return base_class(module) is nn.Module or isinstance(module, fx.GraphModule)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return cast("Iterator[tuple[str, nn.Module]]", model.named_modules(remove_duplicate=False))


def _classes(graph: fx.Graph) -> dict[str, type | str]:
    """The classes of the modules that nodes were traced from, by path."""
    every = (found for node in graph.nodes for found in stack_of(node))
    return {path: cls for path, cls in every if path and _PATH.fullmatch(path)}


def _names(paths: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    """The names of children by the path of what they are in."""
    found: dict[str, dict[str, None]] = {}
    for path in paths:
        while path:
            above, _, name = path.rpartition(".")
            found.setdefault(above, {})[name] = None
            path = above
    return {
        path: tuple(name for name in names if name != ADAPTERS) for path, names in found.items()
    }


@cache
def _class(said: type | str) -> type[nn.Module]:
    """A class, or one of the same name that nothing is ever made of."""
    if isinstance(said, type):
        return said if issubclass(said, nn.Module) else nn.Module
    module, _, name = said.rpartition(".")
    if module.startswith("torch.nn."):  # which is imported, and whose bases are of interest
        found = vars(sys.modules[module]).get(name) if module in sys.modules else None
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    return type(name, (nn.Module,), {"__module__": module, "__qualname__": name})


__all__ = ["Named", "Outline", "Used"]
