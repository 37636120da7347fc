"""Parameters that are matrices by themselves: how they lie, what is added to what they give.

A row of `ROWS` knows the parameters of some owners. What no row knows is taken as [out, in], and
only where a spec names it: a table of positions, or a token, is no weight matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from surgery.model.holder import parameters_of
from surgery.model.layers import MATRIX, TRANSPOSED_MATRIX, LayerKind, base_class, qualified_name
from surgery.model.parts import Part

Roles = Callable[[Any, int], Mapping[str, Part]]
"""The rows of each role, from what the owner knows of itself and the number of rows."""


@dataclass(frozen=True, slots=True)
class Bare:
    """A parameter of some owners.

    bias: the name of the parameter that is added to what it gives, present or not; "" if that is
        not known. roles: where it is several at once.
    """

    kind: LayerKind
    bias: str
    roles: Roles | None = None


def _thirds(owner: Any, rows: int) -> Mapping[str, Part]:
    del owner
    third = rows // 3
    names = ("query", "key", "value")
    return {n: Part.run(n, i * third, (i + 1) * third, rows) for i, n in enumerate(names)}


def _gate_and_up(owner: Any, rows: int) -> Mapping[str, Part]:
    """One after the other, or by turns, as the owner says."""
    names = ("gate", "up")
    if owner.is_concatenated:
        half = rows // 2
        return {n: Part.run(n, i * half, (i + 1) * half, rows) for i, n in enumerate(names)}
    return {n: Part(n, i, i + 1, rows, 2) for i, n in enumerate(names)}


_EXPERTS: Mapping[str, Roles | None] = {
    "gate_up_proj": _gate_and_up,
    "gate_proj": None,
    "up_proj": None,
    "down_proj": None,
}
"""The parameters of transformers' experts, each a batch of matrices."""

_EXPERTS_SAY = ("is_transposed", "is_concatenated", "has_bias")
"""By these attributes an owner of such parameters tells how they lie."""

_OWNERS: Mapping[tuple[str, str], Bare] = {
    ("torch.nn.modules.activation.MultiheadAttention", "in_proj_weight"): Bare(
        MATRIX, "in_proj_bias", _thirds
    ),
}

LISTED: Mapping[str, str] = {
    "torch.nn.modules.rnn.RNNBase": "it reads its weights from a list of its own",
}
"""Owners whose parameters cannot be reached by their value, and why."""


def bare(module: nn.Module, name: str, cls: type[nn.Module]) -> Bare | None:
    """What is known of a module's own parameter; None for what a spec must name to have it.

    cls: the module's class, or that which it had before it became part of a graph.
    """
    row = next((r for c in _names(cls) if (r := _OWNERS.get((c, name))) is not None), None)
    own = vars(module)
    if row is not None or name not in _EXPERTS or not all(fact in own for fact in _EXPERTS_SAY):
        return row
    kind = TRANSPOSED_MATRIX if own["is_transposed"] else MATRIX
    return Bare(kind, f"{name}_bias", _EXPERTS[name])


def unknown(module: nn.Module, name: str) -> Bare:
    """A parameter of which nothing is known: [out, in]; a `weight` has its `bias` beside it.

    An owner may say that its batches of matrices lie the other way.
    """
    own = parameters_of(module)
    beside = name == "weight" and own.get("bias") is not None
    parameter = own.get(name)
    batch = parameter is not None and parameter.dim() == 3
    turned = batch and vars(module).get("is_transposed") is True
    return Bare(TRANSPOSED_MATRIX if turned else MATRIX, "bias" if beside else "")


def beside(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The tensors of a module that are no sites by themselves, and what each is, {} its class."""
    yield from ((name, _PARAMETER) for name in parameters_of(module))
    buffers: Mapping[str, object] = vars(module)["_buffers"]
    for name, value in (*buffers.items(), *vars(module).items()):
        if isinstance(value, Tensor):
            yield name, _TENSOR


_PARAMETER = "a parameter of a {}, and no matrix; `train` takes it"
_TENSOR = "a tensor of a {}, and no parameter; make it an nn.Parameter, before any export"


def out_of_reach(module: nn.Module) -> str:
    """Why a module's own parameters cannot be adapted, or ""."""
    return next((LISTED[name] for name in _names(base_class(module)) if name in LISTED), "")


def _names(cls: type[nn.Module]) -> list[str]:
    return [qualified_name(above) for above in cls.__mro__]
