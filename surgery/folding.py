"""What a site's code makes of parameters alone, computed once: a rotation, a norm, all of W'.

A graph is cut in two. One half reads parameters and gives every value that the other half needs of
them; the other half takes these values and the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from surgery.coding import SiteGraph, code_of

_FLAG = "training"  # what a module does, and no parameter
_CALLS = ("call_function", "call_method")


@dataclass(frozen=True)
class Halves:
    """A graph in two.

    made: `made(module)` gives the values that depend on parameters alone, in order. rest:
    `rest(module, *inputs, *values)` gives what the whole gives.
    """

    made: Callable[[nn.Module], tuple[Any, ...]]
    rest: Callable[..., Any]


@lru_cache(maxsize=1024)
def halves(whole: SiteGraph) -> Halves | None:
    """A graph cut in two; None where nothing but parameters as they are would be in the first."""
    fixed = _fixed(whole.graph)
    cut = [n for n in whole.graph.nodes if n in fixed and n.op != "get_attr" and _leaves(n, fixed)]
    if not cut:
        return None
    made, rest = code_of(_first(whole.graph, cut)), code_of(_second(whole.graph, cut))
    return Halves(cast("Callable[[nn.Module], tuple[Any, ...]]", made.run), rest.run)


def _fixed(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that parameters alone decide."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            found |= set() if str(node.target) == _FLAG else {node}
        elif node.op in _CALLS and set(node.all_input_nodes) <= found:
            # What is drawn at random is so in training alone, so it depends on the flag.
            found |= {node} if node.all_input_nodes else set()
    return found


def _leaves(node: fx.Node, fixed: set[fx.Node]) -> bool:
    """Whether a value is used by what an input decides too, or is the result."""
    return any(user not in fixed for user in node.users)


def _first(graph: fx.Graph, cut: list[fx.Node]) -> fx.Graph:
    made = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", *_CALLS) and _known(node, nodes):
            nodes[node] = made.node_copy(node, nodes.__getitem__)
    made.output(tuple(nodes[node] for node in cut))
    made.eliminate_dead_code()
    return made


def _known(node: fx.Node, nodes: dict[fx.Node, fx.Node]) -> bool:
    return all(needed in nodes for needed in node.all_input_nodes)


def _second(graph: fx.Graph, cut: list[fx.Node]) -> fx.Graph:
    rest = fx.Graph()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    nodes = {node: rest.node_copy(node) for node in inputs}
    nodes |= {node: rest.placeholder(f"made_{index}") for index, node in enumerate(cut)}
    for node in graph.nodes:
        if node not in nodes and node.op != "output":
            nodes[node] = rest.node_copy(node, nodes.__getitem__)
        elif node.op == "output":
            rest.output(nodes[cast(fx.Node, node.args[0])])
    rest.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    return rest


# ---------------------------------------------------------------------------------- at a module


def folded(whole: SiteGraph, module: nn.Module, refuse: Callable[[], None]) -> Callable[..., Any]:
    """The code of a graph at one module, with what its parameters decide as they are now.

    refuse: called where a forward records gradients, which would not reach the parameters.
    """
    found, values = halves(whole), ()
    if found is not None:
        with torch.no_grad():
            values = found.made(module)
    code = whole.run if found is None else found.rest
    trained = any(tensor.requires_grad for tensor in _read(whole.graph, module))

    def run(self: nn.Module, *inputs: Any) -> Any:
        if trained and torch.is_grad_enabled():
            refuse()
        return code(self, *inputs, *values)

    return run


def _read(graph: fx.Graph, module: nn.Module) -> Iterator[Tensor]:
    """The tensors that a graph reads of a module."""
    for target in {str(node.target) for node in graph.nodes if node.op == "get_attr"}:
        value: object = attrgetter(target)(module)
        if isinstance(value, Tensor):
            yield value
