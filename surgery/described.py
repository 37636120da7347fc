"""What is known of nodes that come into a graph: where they come from, and what they give.

An exported program says of every node what it gives, as a tensor without data. A node that is put
beside others is given the same, so that passes over the graph find what they expect.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

_ORIGIN = ("nn_module_stack", "stack_trace")


class Describer:
    """Describes new nodes in the place of another, in their order."""

    def __init__(self, model: nn.Module) -> None:
        """For nodes that read the attributes of a model."""
        self._model = model
        self._values: dict[fx.Node, Any] = {}

    def describe(self, node: fx.Node, place: fx.Node) -> None:
        """Let a node say what it gives, if the node in whose place it stands does."""
        for name in _ORIGIN:
            if name in place.meta:
                node.meta[name] = place.meta[name]
        mode = _mode_of(place)
        if mode is None or "val" in node.meta:
            return
        try:
            value = self._value(node, mode)
        except Exception:  # whatever a kernel without data raises; the node then says nothing
            return
        self._values[node] = value
        if isinstance(value, Tensor):
            node.meta["val"] = value

    def _value(self, node: fx.Node, mode: Any) -> Any:
        if node.op == "get_attr":
            return self._read(str(node.target), mode)
        args, kwargs = cast(Any, map_arg((node.args, node.kwargs), self._of))
        with cast(AbstractContextManager[object], mode), torch.no_grad():
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return cast(Any, node.target)(*args, **kwargs)

    def _read(self, target: str, mode: Any) -> Any:
        value: Any = self._model
        for step in target.split("."):
            value = getattr(value, step)
        return mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value

    def _of(self, node: fx.Node) -> Any:
        return self._values[node] if node in self._values else node.meta["val"]


def _mode_of(node: fx.Node) -> Any:
    """The mode in which tensors without data compute, where a node gives one."""
    return getattr(node.meta.get("val"), "fake_mode", None)
