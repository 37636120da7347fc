"""What a model's config says of weights that several layers share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

from torch import nn

from surgery.model.holder import every_module

_FLAG = "tie_word_embeddings"
"""By this a loader ties the head to the embedding again, whatever the file has."""


def untie(model: nn.Module) -> tuple[object, ...]:
    """Let the configs of a model no longer say that its weights are tied; gives those that did."""
    said = tuple(_saying(model))
    for config in said:
        setattr(config, _FLAG, False)
    return said


def tie_again(configs: Iterable[object]) -> None:
    """Take back what `untie` did."""
    for config in configs:
        setattr(config, _FLAG, True)


def _saying(model: nn.Module) -> Iterator[object]:
    seen: set[int] = set()
    for module in every_module(model):
        config: object = vars(module).get("config")
        nested = cast("dict[str, object]", getattr(config, "__dict__", {}))
        for one in (config, *nested.values()):
            if id(one) not in seen and getattr(one, _FLAG, None) is True:
                seen.add(id(one))
                yield one
