"""What the path of a site says of it: what it is in its layer, and which layer that is."""

from __future__ import annotations

from collections.abc import Mapping

_LAYERS = "layers"

_OWN: Mapping[tuple[str, ...], str] = {("attention", "output", "dense"): "attention_output"}
"""Ends of paths with a name of their own, as that of two names is another's in the same layer."""


def ending(path: str) -> str:
    """The last two names of a path as one, `self_attn_q_proj`; the last alone behind a number.

    Alike sites of all layers have one ending, and others another: the `output.dense` of an
    attention is `attention_output`.
    """
    names = tuple(path.split("."))
    if names[-3:] in _OWN:
        return _OWN[names[-3:]]
    alone = names[-2:-1] and names[-2].isdigit()
    return "_".join(names[-1:] if alone else names[-2:])


def layer_number(path: str, otherwise: int) -> int:
    """The number behind `layers` in a path, else the first in it, else another."""
    names = path.split(".")
    after = names[names.index(_LAYERS) + 1 :] if _LAYERS in names else []
    numbers = [name for name in (*after[:1], *names) if name.isdigit()]
    return int(numbers[0]) if numbers else otherwise
