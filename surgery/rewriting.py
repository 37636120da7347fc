"""The one graph of a model, with its sites' graphs in it: what mounting is where a graph runs.

A site is inlined at every node that uses it. Where a node reads a parameter in a way that no layer
kind knows, it reads the adapted value. Nothing here changes a model; the graph that comes in stays
as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, cast

from torch import fx, nn

from surgery.described import Describer
from surgery.lower import Lowerings, by_mode, lower, lower_values
from surgery.model.holder import ADAPTERS
from surgery.model.uses import Named, Use, uses_of
from surgery.nodes import Lowering
from surgery.values import raw

Modules = Sequence[tuple[nn.Module, Lowerings]]
"""Every module with sites, and what its graphs are looked up by."""


def settled(model: fx.GraphModule) -> fx.Graph:
    """The model's graph, in which each module reads its parameters by their names in it.

    An exported program reads a tied parameter by one of its names, whoever uses it. It is the graph
    itself where nothing is to be done.
    """
    if not [*_strays(model, model.graph)]:
        return model.graph
    graph = _copied(model.graph)
    for name, use in [*_strays(model, graph)]:
        with graph.inserting_after(use.read):
            read = graph.get_attr(_joined(*name))
        read.meta = copy.copy(use.read.meta)
        use.reader.replace_input_with(use.read, read)
    return graph


def _copied(graph: fx.Graph) -> fx.Graph:
    """A graph of the same nodes, which takes and gives what the other does."""
    made = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        nodes[node] = made.node_copy(node, nodes.__getitem__)
    made.set_codegen(vars(graph)["_codegen"])  # which knows how an exported program is called
    return made


def _strays(model: fx.GraphModule, graph: fx.Graph) -> Iterator[tuple[Named, Use]]:
    """The uses of parameters that are read by a name in another module."""
    for name, uses in uses_of(model, graph).items():
        for use in uses:
            if use.read.target != _joined(*name):
                yield name, use


# ------------------------------------------------------------------------------- rewriting


def rewritten(
    model: fx.GraphModule, graph: fx.Graph, modules: Modules
) -> tuple[fx.Graph, list[tuple[nn.Module, Lowerings]]]:
    """The graph with the sites in it, and what is to be mounted on modules that it calls as one.

    Every use of a site is rewritten. The adapters' parameters must be in place.
    """
    made = _copied(graph)
    inliner = _Inliner(model, made)
    left = [(module, rest) for module, keys in modules if (rest := inliner.inline(module, keys))]
    made.eliminate_dead_code(_stays)
    return made, left


def _stays(node: fx.Node) -> bool:
    """Only what reads an attribute in vain goes; what a user's graph does in vain is not ours."""
    return node.op != "get_attr"


class _Inliner:
    """Puts site graphs into one graph."""

    def __init__(self, model: fx.GraphModule, graph: fx.Graph) -> None:
        self.graph = graph
        self.paths: dict[int, list[str]] = {}
        for path, module in _modules(model):
            self.paths.setdefault(id(module), []).append(path)
        named = model.named_parameters()
        self.names: Mapping[int, str] = {id(parameter): name for name, parameter in named}
        self.raw: set[fx.Node] = set()  # what reads a parameter to make its value of it
        self.describer = Describer(model)
        self.uses = uses_of(model, graph)
        self.calls = _calls(model, graph)
        self.inside = _inside(self.calls)

    def inline(self, module: nn.Module, keys: Lowerings) -> Lowerings:
        """Rewrite all that the graph shows of a module; gives the keys of what it does not show."""
        if id(module) in self.inside:
            return keys
        called, computed = by_mode(keys)
        for parameter, group in groupby(called, key=_parameter):
            self._call(module, parameter, tuple(group))
        if id(module) in self.calls:
            return computed
        for name, found in lower_values(computed).items() if computed else ():
            self._value(module, name, found.graph, computed)
        return ()

    def _call(self, module: nn.Module, parameter: str, keys: Lowerings) -> None:
        """Inline a site wherever it is called, or its parameter is what a layer is made of."""
        site = lower(keys)
        for node in self.calls.get(id(module), (None, ()))[1]:
            x = node.args[0] if node.args else node.kwargs[keys[0].form.kind.argument]
            self._replace(node, cast(fx.Node, x), module, site.graph)
        for use in self._uses(module, parameter):
            assert use.slot is not None  # else it is reached by its value
            self._replace(use.node, use.input, module, site.graph)

    def _replace(self, node: fx.Node, x: fx.Node, module: nn.Module, site: fx.Graph) -> None:
        """Let a site's graph stand where a node stood."""

        def base(value: fx.Node) -> fx.Node:
            return _like(self.graph, node, {x: value})

        with self.graph.inserting_before(node):
            y = self._copied(site, module, {}, node, x, base)
        y.meta = copy.copy(node.meta)
        node.replace_all_uses_with(y)
        self.graph.erase_node(node)

    def _value(self, module: nn.Module, name: str, value: fx.Graph, keys: Lowerings) -> None:
        """Let all that reads a parameter, other adapters included, read what is made of it."""
        targets = {_joined(path, name) for path in self.paths[id(module)]}
        every = self.graph.find_nodes(op="get_attr")
        reads = [node for node in every if node.target in targets and node not in self.raw]
        if not reads:
            return
        first = reads[0]
        own = {raw(n): n for key in keys for n in (key.form.at.parameter, key.form.at.bias)}
        with self.graph.inserting_before(first):
            made = self._copied(value, module, own, first, None, _never)
        made.meta = copy.copy(first.meta)
        for read in reads:
            read.replace_all_uses_with(made)
            self.graph.erase_node(read)

    def _uses(self, module: nn.Module, parameter: str) -> list[Use]:
        paths = self.paths[id(module)]
        return [use for path in paths for use in self.uses.get((path, parameter), ())]

    def _copied(
        self,
        site: fx.Graph,
        module: nn.Module,
        own: Mapping[str, str],
        place: fx.Node,
        x: fx.Node | None,
        base: Callable[[fx.Node], fx.Node],
    ) -> fx.Node:
        """Copies of a site graph's nodes where the graph inserts; gives that of its output."""
        made: dict[fx.Node, Any] = {}
        for node in site.nodes:
            match node.op:
                case "placeholder":
                    made[node] = x
                    continue
                case "get_attr":
                    target = str(node.target)
                    made[node] = self._attribute(module, own.get(target, target))
                    self.raw |= {made[node]} if target in own else set()
                case "call_module":
                    made[node] = base(made[cast(fx.Node, node.args[0])])
                case "output":
                    new = [made[n] for n in made if n.op != "placeholder"]
                    self.describer.describe(new, site, place, x)
                    return made[cast(fx.Node, node.args[0])]
                case _:
                    made[node] = self.graph.node_copy(node, made.__getitem__)
        raise AssertionError("a site graph has an output")

    def _attribute(self, module: nn.Module, name: str) -> fx.Node:
        """A node that reads an attribute of a module, by the name that it has in the model."""
        path = self.paths[id(module)][0]
        if name == "training":
            # The flag is read from a module, since a graph reads modules, parameters and buffers.
            there = self.graph.get_attr(path or ADAPTERS)
            return self.graph.call_function(getattr, (there, name))
        if "." not in name:  # the module's own, though another may share it
            return self.graph.get_attr(_joined(path, name))
        value: object = module
        for step in name.split("."):
            value = getattr(value, step)
        return self.graph.get_attr(self.names.get(id(value), _joined(path, name)))


def _never(value: fx.Node) -> fx.Node:
    raise AssertionError(f"a value calls no layer, as {value} would")


def _parameter(key: Lowering) -> str:
    return key.form.at.parameter


def _like(graph: fx.Graph, node: fx.Node, changed: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """A copy of a node of the same graph, with some arguments changed."""
    return graph.node_copy(node, lambda argument: changed.get(argument, argument))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return cast("Iterator[tuple[str, nn.Module]]", model.named_modules(remove_duplicate=False))


# -------------------------------------------------------------------------- what is called


Calls = Mapping[int, tuple[nn.Module, Sequence[fx.Node]]]
"""By the identity of a module, the module and the nodes that call it."""


def _calls(model: fx.GraphModule, graph: fx.Graph) -> Calls:
    found: dict[int, tuple[nn.Module, list[fx.Node]]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            found.setdefault(id(module), (module, []))[1].append(node)
    return found


def _inside(calls: Calls) -> set[int]:
    """The identities of the modules that only a module that is called as one can reach."""
    found: set[int] = set()
    for module, _ in calls.values():
        found |= {id(below) for below in module.modules() if below is not module}
    return found - calls.keys()
