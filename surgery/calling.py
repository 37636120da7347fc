"""Sites that are calls: what goes into a module, or comes out of it, changed by an equation.

The call itself is the module's own, made once, whatever it takes beside its hidden states: masks,
positions, caches. Of what it gives, all but the hidden states stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn, cast

from torch import Tensor, fx, nn

from surgery.algebra.around import entered, left
from surgery.calls.positions import rows_of
from surgery.coding import SiteGraph, code_of
from surgery.errors import refuse
from surgery.nodes import Layer, Lowering, at_site, chosen_at
from surgery.routing import refuse_batch
from surgery.switch import Routed

# ------------------------------------------------------------------------------------ graphs

ENTERED, LEFT = "entered", "left"
"""The graphs of a call: `entered(module, x)` and `left(module, x0, x, y)`, all [..., hidden]."""


@lru_cache(maxsize=1024)
def lower_call(key: Lowering) -> Mapping[str, SiteGraph]:
    """The graphs of what is put around a call. Raises `Unlowerable` where there is none."""
    graphs = {ENTERED: _entered(key), LEFT: _left(key)}
    return {name: code_of(graph) for name, graph in graphs.items() if graph is not None}


def _entered(key: Lowering) -> fx.Graph | None:
    layer = Layer(fx.Graph(), "x")
    interpreter, _ = at_site(key, layer)
    x: Any = layer.input
    made = entered(interpreter, key.form.derived.equations, x)
    if made is not None and key.form.places:
        made = chosen_at(key.form, cast(Any, made).to(x.dtype), x, layer)
    return None if made is None else _finished(layer.graph, made, layer.input)


def _left(key: Lowering) -> fx.Graph | None:
    layer = Layer(fx.Graph(), "x0")
    x, y = layer.argument("x"), layer.argument("y")
    interpreter, _ = at_site(key, layer)
    made = left(interpreter, key.form.derived, cast(Tensor, layer.input), x, y)
    if made is not None and key.form.places:
        made = chosen_at(key.form, cast(Any, made).to(y.dtype), y, layer)
    return None if made is None else _finished(layer.graph, made, y)


def _finished(graph: fx.Graph, made: Any, like: Any) -> fx.Graph:
    """A graph that gives what was made in the dtype of what it is put in the place of."""
    graph.output(made.to(like.dtype).node)
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    graph.lint()
    return graph


# ------------------------------------------------------------------------------------- a call

Change = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Around:
    """What is put around a module's call while something is live; None for nothing.

    width: of the hidden states. reads: whether what is given is made of what came as well.
    """

    entered: Change | None
    left: Change | None
    width: int
    reads: bool


def around(key: Lowering, code: Callable[[SiteGraph], Change]) -> Around:
    """What a site puts around a call, by code of its graphs."""
    graphs = lower_call(key)
    made = {name: code(graph) for name, graph in graphs.items()}
    reads = LEFT in graphs and any(
        node.users for node in graphs[LEFT].graph.nodes if str(node.target) in ("x0", "x")
    )
    return Around(made.get(ENTERED), made.get(LEFT), key.form.sizes.fan_out, reads)


def changed(
    module: nn.Module,
    path: str,
    known: Mapping[str, Around],
    choice: str | Routed,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A module's call with what is live around it; of a routed batch, each sample with its own.

    Raises StateError: E485 where the hidden states are not as wide as the adapter's, E486 where
    there are none, E436 for a routed call whose hidden states are no batch of the samples.
    """
    live = _live(known, choice)
    if not live:
        return forward(module, *args, **kwargs)
    entering = any(one.entered is not None for one in live.values())
    place, came = None, None
    if entering or any(one.reads for one in live.values()):
        place, came = _input(args, kwargs, path)
    x = came
    if entering and came is not None:
        x = _made(module, path, live, choice, "entered", (came,))
        args, kwargs = _with_input(args, kwargs, place, x)
    given = forward(module, *args, **kwargs)
    if all(one.left is None for one in live.values()):
        return given
    y = _output(given, path)
    inputs = (y, y) if came is None or x is None else (came, x)  # which no equation reads then
    return _with_output(given, _made(module, path, live, choice, "left", (*inputs, y)))


def _live(known: Mapping[str, Around], choice: str | Routed) -> dict[str, Around]:
    """What is put around the call by what is live, by its text."""
    texts = (choice,) if isinstance(choice, str) else choice.samples
    return {text: known[text] for text in texts if text in known}


def _made(
    module: nn.Module,
    path: str,
    live: Mapping[str, Around],
    choice: str | Routed,
    name: str,
    tensors: tuple[Tensor, ...],
) -> Tensor:
    """What stands in the place of the last of some tensors [batch, …, hidden]."""
    for tensor in tensors:
        _check_width(tensor, live, path)
    if isinstance(choice, str):
        run = cast("Change | None", getattr(live[choice], name))
        return tensors[-1] if run is None else run(module, *tensors)
    here = choice.within(live)
    if any(len(tensor) != len(here.samples) for tensor in tensors):
        refuse_batch(path, tensors[-1], len(here.samples))
    parts: list[Tensor] = []
    columns = [[part for _, part in here.split(tensor)] for tensor in tensors]
    rows = here.rows(tensors[-1].device)
    for (text, _), index, *group in zip(here.groups, rows, *columns, strict=True):
        run = cast("Change | None", getattr(live[text], name)) if text in live else None
        with rows_of(index):
            parts.append(group[-1] if run is None else run(module, *group))
    return here.joined(parts)


def _check_width(tensor: Tensor, live: Mapping[str, Around], path: str) -> None:
    for one in live.values():
        if tensor.shape[-1] != one.width:
            refuse(
                "E485",
                f"the hidden states of `{path}` are {tensor.shape[-1]} wide, and its adapter was "
                f"made for {one.width}",
                hint="put it on a module whose input and output are as wide as the model's hidden "
                "states, or on the layer of which the width is known",
            )


# ------------------------------------------------------------------------------ hidden states

_HIDDEN = ("last_hidden_state", "hidden_states", "x", "input", "inputs_embeds")
"""What modules call their hidden states, where they have names for what they take or give."""

Place = int | str | None


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any], path: str) -> tuple[Place, Tensor]:
    """The hidden states that a call takes, and where: its first argument that is some."""
    named = (name for name in _HIDDEN if name in kwargs)
    places: list[tuple[Place, object]] = [*enumerate(args), *((n, kwargs[n]) for n in named)]
    for place, value in places:
        if isinstance(value, Tensor) and value.is_floating_point():
            return place, value
    _refuse_none(path, "takes")


def _with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], place: Place, x: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(place, int):
        return (*args[:place], x, *args[place + 1 :]), kwargs
    return args, {**kwargs, cast(str, place): x}


def _output(given: Any, path: str) -> Tensor:
    """The hidden states that a call gives: all of it, its first, or those of a name."""
    found = given
    if isinstance(given, Mapping):
        own = cast("Mapping[str, Any]", given)
        found = next((own[name] for name in _HIDDEN if name in own), None)
    elif isinstance(given, tuple | list):
        found = next(iter(cast("tuple[Any, ...]", given)), None)
    if isinstance(found, Tensor) and found.is_floating_point():
        return found
    _refuse_none(path, "gives")


def _with_output(output: object, y: Tensor) -> Any:
    """The same with other hidden states."""
    given = cast(Any, output)
    if isinstance(output, Tensor):
        return y
    if isinstance(output, Mapping):
        own = cast("Mapping[str, Any]", output)
        name = next(name for name in _HIDDEN if name in own)
        return type(given)(**{**own, name: y})
    others = given[1:]
    if hasattr(given, "_replace"):  # a named tuple
        return given._replace(**{given._fields[0]: y})
    return type(given)((y, *others))


def _refuse_none(path: str, does: str) -> NoReturn:
    refuse(
        "E486",
        f"`{path}` {does} no hidden states that an equation could change",
        hint="put it on a module that is called with a tensor of numbers and gives one, or gives "
        "it first",
    )
