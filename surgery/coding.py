"""A graph → straight-line code: its source, and the function compiled from it."""

from __future__ import annotations

import linecache
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx


@dataclass(frozen=True)
class SiteGraph:
    """The graph of a module with its sites, its source, and the function compiled from it.

    run: `run(module, input)`, the forward of a mounted module; for a parameter, `run(module)`.
    """

    graph: fx.Graph
    source: str
    run: Callable[..., Tensor]


def code_of(graph: fx.Graph) -> SiteGraph:
    """A graph with the function that it is."""
    code = graph.python_code("self")
    return SiteGraph(graph, code.src, _compiled(code.src, code.globals))


_COUNTER = iter(range(10**9))


def _compiled(source: str, names: Mapping[str, Any]) -> Callable[..., Tensor]:
    """The function `forward` of some source, whose lines a traceback can show."""
    filename = f"<surgery site {next(_COUNTER)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    scope: dict[str, Any] = dict(names)
    # The source is written by torch.fx from a graph that was built here from an equation; no text
    # of a spec or an artifact is part of it.
    exec(compile(source, filename, "exec"), scope)
    made = cast(Callable[..., Tensor], scope["forward"])
    weakref.finalize(made, linecache.cache.pop, filename, None).atexit = False
    return made
