"""What is known of nodes that come into a graph: where they come from, and what they give.

An exported program says of every node what it gives, as a tensor without data. A node that is put
beside others is given the same, so that passes over the graph find what they expect.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

_ORIGIN = ("nn_module_stack", "stack_trace")


class Describer:
    """Describes new nodes in the place of another."""

    def __init__(self, model: nn.Module) -> None:
        """For nodes that read the attributes of a model."""
        self._model = model
        self._known: dict[Hashable, list[Any]] = {}

    def describe(
        self, nodes: Sequence[fx.Node], site: fx.Graph, place: fx.Node, x: fx.Node | None
    ) -> None:
        """Let nodes, copies of a site's graph for an input, say what they give, if `place` does.

        Copies of one graph for inputs of one shape give the same, and are computed once.
        """
        for node in nodes:
            for name in _ORIGIN:
                if name in place.meta:
                    node.meta[name] = place.meta[name]
        mode = getattr(place.meta.get("val"), "fake_mode", None)
        if mode is None:
            return
        key = (id(site), len(nodes), None if x is None else _form(x.meta.get("val")))
        if key not in self._known:
            self._known[key] = self._values(nodes, mode)
        for node, value in zip(nodes, self._known[key], strict=True):
            if isinstance(value, Tensor):
                node.meta.setdefault("val", value)

    def _values(self, nodes: Sequence[fx.Node], mode: Any) -> list[Any]:
        """What nodes give, in their order; None where that cannot be said."""
        found: dict[fx.Node, Any] = {}
        for node in nodes:
            try:
                found[node] = (
                    node.meta["val"] if "val" in node.meta else self._of(node, found, mode)
                )
            except Exception:  # whatever a kernel without data raises
                found[node] = None
        return [*found.values()]

    def _of(self, node: fx.Node, found: dict[fx.Node, Any], mode: Any) -> Any:
        if node.op == "get_attr":
            return self._read(str(node.target), mode)

        def of(argument: fx.Node) -> Any:
            if argument in found:
                return found[argument]
            known = "val" in argument.meta
            return argument.meta["val"] if known else self._read(str(argument.target), mode)

        args, kwargs = cast(Any, map_arg((node.args, node.kwargs), of))
        with cast(AbstractContextManager[object], mode), torch.no_grad():
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return cast(Any, node.target)(*args, **kwargs)

    def _read(self, target: str, mode: Any) -> Any:
        value: Any = self._model
        for step in target.split("."):
            value = getattr(value, step)
        return mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value


def _form(value: object) -> Hashable:
    """All that matters of an input."""
    if not isinstance(value, Tensor):
        return None
    return str(tuple(value.shape)), str(value.stride()), value.dtype, value.device
