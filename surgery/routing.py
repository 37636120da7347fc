"""One batch, many adapters: a module's forward on groups of samples, each with what it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

from torch import Tensor, nn

from surgery.calls.positions import rows_of
from surgery.errors import refuse
from surgery.switch import Routed, Switch


class Known(Protocol):
    """What a mounted module runs, as far as it matters here."""

    @property
    def switch(self) -> Switch:
        """Of the model."""
        ...

    @property
    def forwards(self) -> Mapping[str, Callable[..., Any]]:
        """By the text of what is live."""
        ...

    @property
    def path(self) -> str:
        """Of the module."""
        ...


def routed(
    module: nn.Module,
    known: Known,
    choice: Routed,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The module's output [batch, …] for an input [batch, …] whose samples have their own adapters.

    Samples whose choices run the same here are one group. Raises StateError (E436) for an input
    that is no batch of the samples.
    """
    here = choice.within(known.forwards)
    name, x = (None, args[0]) if args else next(iter(kwargs.items()))
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] != len(here.samples):
        refuse_batch(known.path, x, len(here.samples))
    if len(here.groups) == 1:
        with known.switch.chosen(here.samples[0]):
            return forward(module, *args, **kwargs)
    parts: list[Tensor] = []
    for (text, part), rows in zip(here.split(x), here.rows(x.device), strict=True):
        with known.switch.chosen(text), rows_of(rows):
            if name is None:
                parts.append(forward(module, part, *args[1:], **kwargs))
            else:
                parts.append(forward(module, **{**kwargs, name: part}))
    return here.joined(parts)


def refuse_batch(path: str, x: object, samples: int) -> NoReturn:
    """E436, for an input of a routed module that is no batch of the samples."""
    found = f"a tensor of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
    refuse(
        "E436",
        f"`{path}` is called with {found}, which is no batch of the {samples} samples routed",
        hint="name one adapter a sample, in the order of the batch; where a model flattens or "
        "dispatches its samples, route only adapters that leave such layers alone",
    )


def refuse_value(path: str, name: str) -> NoReturn:
    """E436, for a parameter that is read by itself while a batch is routed."""
    refuse(
        "E436",
        f"`{name}` of `{path}` is read outside of its layer, for all samples at once",
        hint="leave such layers out of adapters that are routed",
    )
