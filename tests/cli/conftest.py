"""A small BERT in a folder, as the hub would give it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import transformers

LAYERS = 2


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config and weights: 2 layers of 12 features, sizes unlike each other."""
    library = cast(Any, transformers)
    config = library.BertConfig(
        hidden_size=12,
        intermediate_size=20,
        num_attention_heads=3,
        num_hidden_layers=LAYERS,
        vocab_size=31,
        max_position_embeddings=17,
    )
    folder = tmp_path_factory.mktemp("models") / "bert"
    library.BertModel(config).save_pretrained(folder)
    return folder
