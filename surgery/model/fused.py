"""Where a model keeps several roles in one matrix: which rows of it are whose.

A row of `FUSED` is a layer of a class of owners whose forward splits the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, cast

from torch import nn

from surgery.model.inventory import Inventory
from surgery.model.layers import base_class, qualified_name
from surgery.model.parts import Part

_MODELS = "transformers.models"

Lengths = Callable[[Any], Mapping[str, int]]
"""The number of rows of each role, in order, from what the owner knows of itself."""


@dataclass(frozen=True, slots=True)
class Fused:
    """A child of some classes of owners that is several roles at once."""

    child: str
    lengths: Lengths
    owners: tuple[str, ...]


def _by_heads(owner: Any) -> Mapping[str, int]:
    """Query, key, value, the latter two with heads of their own number."""
    config = owner.config
    queries = int(config.num_attention_heads * owner.head_dim)
    keys = int(config.num_key_value_heads * owner.head_dim)
    return {"query": queries, "key": keys, "value": keys}


def _by_embedding(owner: Any) -> Mapping[str, int]:
    """Query, key and value of one size; in cross attention the query has a layer of its own."""
    names = ("key", "value") if owner.is_cross_attention else ("query", "key", "value")
    return dict.fromkeys(names, int(owner.split_size))


def _of_fused(child: str, names: tuple[str, ...]) -> Lengths:
    """Equal shares of the child's own rows."""

    def lengths(owner: Any) -> Mapping[str, int]:
        return dict.fromkeys(names, int(getattr(owner, child).out_features) // len(names))

    return lengths


def _owners(*names: str) -> tuple[str, ...]:
    """`phi3.Phi3MLP` is the class of that name in the model's own module."""
    split = (name.split(".") for name in names)
    return tuple(f"{_MODELS}.{model}.modeling_{model}.{cls}" for model, cls in split)


FUSED: tuple[Fused, ...] = (
    Fused(
        "c_attn",
        _by_embedding,
        _owners(
            "gpt2.GPT2Attention",
            "imagegpt.ImageGPTAttention",
            "decision_transformer.DecisionTransformerGPT2Attention",
        ),
    ),
    Fused("qkv_proj", _by_heads, _owners("phi3.Phi3Attention")),
    Fused(
        "gate_up_proj",
        _of_fused("gate_up_proj", ("gate", "up")),
        _owners("phi3.Phi3MLP", "glm.GlmMLP", "glm4.Glm4MLP"),
    ),
)

_BY_OWNER = {(owner, row.child): row for row in FUSED for owner in row.owners}


def part_of(role: str, index: int, inventory: Inventory) -> Part | None:
    """The rows of a candidate that play a role which it shares with others; None if there are none.

    What a mounted owner was is looked through.
    """
    return parts_of(index, inventory).get(role)


def parts_of(index: int, inventory: Inventory) -> Mapping[str, Part]:
    """The parts of a candidate by their roles; empty where it is one thing."""
    entry = inventory.entries[index]
    if entry.parent < 0 or entry.kind is None:
        return {}
    owner = inventory.entries[entry.parent].module
    classes = map(qualified_name, base_class(owner).__mro__)
    row = next((r for c in classes if (r := _BY_OWNER.get((c, entry.name)))), None)
    return {} if row is None else _split(row, owner, entry.kind.sizes(entry.module).fan_out)


def _split(row: Fused, owner: nn.Module, whole: int) -> Mapping[str, Part]:
    lengths = row.lengths(cast(Any, owner))
    cuts = pairwise(accumulate(lengths.values(), initial=0))
    parts = {name: Part(name, a, b, whole) for name, (a, b) in zip(lengths, cuts, strict=True)}
    # An owner that was changed since its class was written is not split where it does not fit.
    return parts if sum(lengths.values()) == whole else {}
