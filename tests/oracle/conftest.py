"""What all comparisons with peft share: what peft says on the way and nobody asked."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
SAID = (
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Could not find a config file:UserWarning",
    "ignore:Setting `save_embedding_layers`:UserWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here goes on where peft says one of these; its own marks come after them."""
    for item in items:
        if HERE in item.path.parents:
            for text in SAID:
                item.add_marker(pytest.mark.filterwarnings(text), append=False)
