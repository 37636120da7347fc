"""A model that is one graph: the graph that it runs, and the one that it had.

While a model has adapters, its class is one that copies and pickles it whole: torch's own copies
have what the graph reads, and leave out the adapters that are not live. When the last adapter goes,
class and graph are what they were.
"""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import fx, nn

from surgery.lower import Lowerings
from surgery.model.uses import GRAPHS, Graphs
from surgery.rewriting import Modules, rewritten, settled

_FORMER = "surgery_former"


def run_with(model: fx.GraphModule, modules: Modules) -> list[tuple[nn.Module, Lowerings]]:
    """Let the graph run its sites; gives what is to be mounted on modules that it calls as one."""
    graph, left = rewritten(model, _graphs(model).settled, modules)
    model.graph = graph
    return left


def run_base(model: fx.GraphModule) -> None:
    """Let the graph run without sites, whatever the weights are."""
    model.graph = _graphs(model).settled


def give_back(model: fx.GraphModule, keep: bool = False) -> None:
    """Let a model that has no adapter any more be what it was.

    keep: let each module go on reading its parameters by their own names, since they were merged.
    """
    graphs: Graphs | None = vars(model).pop(GRAPHS, None)
    if graphs is not None:
        model.__class__ = vars(type(model))[_FORMER]
        model.graph = graphs.settled if keep else graphs.original


def _graphs(model: fx.GraphModule) -> Graphs:
    """The graphs of a model, which are taken when the first adapter is mounted."""
    if GRAPHS not in vars(model):
        graphs = Graphs(model.graph, settled(model))
        model.__class__ = _carrying(type(model))
        vars(model)[GRAPHS] = graphs
    return vars(model)[GRAPHS]


# ---------------------------------------------------------------------- copies and pickles


def _carrying(former: type[fx.GraphModule]) -> type[fx.GraphModule]:
    """A class for one model, as torch makes one for each: its forward is the model's own code."""
    members = {
        _FORMER: former,
        "__deepcopy__": _copied,
        "__reduce_ex__": _reduced,
        "__setstate__": _restored,
        "__module__": former.__module__,
        "__qualname__": former.__qualname__,
        "__doc__": former.__doc__,
    }
    # Not below the former: what torch makes for a model calls what is below it for ever.
    return type(former.__name__, (_importable(former),), members)


def _copied(self: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
    made = _blank(*_kind(self))
    memo[id(self)] = made
    _restored(made, copy.deepcopy(vars(self), memo))
    return made


def _reduced(self: fx.GraphModule, protocol: object) -> tuple[object, ...]:
    del protocol
    return _blank, _kind(self), {**vars(self)}


def _restored(self: fx.GraphModule, state: dict[str, Any]) -> None:
    vars(self).update(state)
    self.graph = state["_graph"]  # the class is new, and has no code yet


def _kind(model: fx.GraphModule) -> tuple[type[fx.GraphModule], str]:
    """The class that can be imported, and the name of the model's own."""
    return _importable(type(model)), type(model).__name__


def _importable(cls: type[fx.GraphModule]) -> type[fx.GraphModule]:
    known = (above for above in cls.__mro__ if "<locals>" not in above.__qualname__)
    return cast("type[fx.GraphModule]", next(known))


def _blank(cls: type[fx.GraphModule], name: str) -> fx.GraphModule:
    made = cls.__new__(cls)
    type(made).__name__ = name
    made.__class__ = _carrying(type(made))
    return made
