"""Every example is fine by itself, and does what its comments say to a model of its names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers

import surgery
from surgery.integrations.transformers import example_inputs
from surgery.resources import specs_dir

library = cast(Any, transformers)
FOLDER = specs_dir() / "examples"

LLAMA = ("Llama", {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 2})
BERT = ("Bert", {"hidden_size": 36, "intermediate_size": 60, "num_attention_heads": 3})
MIXTURE = (
    "Mixtral",
    {
        "hidden_size": 48,
        "intermediate_size": 32,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "num_local_experts": 3,
    },
)
RESNET = ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 12, 20, 28], "depths": [1, 1, 1, 1]})

# The model's family and sizes, values for params, and how many sites there are then.
CASES: Mapping[
    str, tuple[tuple[str, dict[str, Any]], dict[str, object], dict[str, object], int]
] = {
    "bert_attention": (BERT, {"num_hidden_layers": 2}, {"layers": 2}, 8),
    "bone_qv": (LLAMA, {"num_hidden_layers": 13}, {}, 24),
    "chain": (LLAMA, {"num_hidden_layers": 2}, {}, 8),
    "convnet": (RESNET, {}, {}, 11),
    "experts": (MIXTURE, {"num_hidden_layers": 2}, {}, 13),
    "own_method": (LLAMA, {"num_hidden_layers": 2}, {}, 4),
    "rank_by_layer": (LLAMA, {"num_hidden_layers": 4}, {"depth": 4, "rank": 3}, 20),
    "two_adapters": (LLAMA, {"num_hidden_layers": 2}, {}, 12),
}


def build(family: tuple[str, dict[str, Any]], more: dict[str, object]) -> torch.nn.Module:
    name, sizes = family
    cls = getattr(library, f"{name}Model")
    words = {} if name == "ResNet" else {"vocab_size": 31}
    return cls(cls.config_class(**sizes, **more, **words)).eval()


def test_there_is_a_case_for_every_example() -> None:
    assert sorted(CASES) == sorted(path.stem for path in FOLDER.glob("*.peft"))


@pytest.mark.parametrize("name", CASES)
def test_an_example_compiles_merges_and_unloads(name: str) -> None:
    family, more, values, count = CASES[name]
    model = build(family, more)
    path = FOLDER / f"{name}.peft"
    assert surgery.check(path) == ()
    assert len(surgery.plan(path, model, values=values).sites) == count
    seen = surgery.verify(path, model, lambda m: m(**example_inputs(m)), values=values)
    assert seen.passed
    assert seen.effect > 0


def test_the_ranks_of_the_upper_half_are_doubled() -> None:
    family, more, values, _ = CASES["rank_by_layer"]
    plan = surgery.plan(FOLDER / "rank_by_layer.peft", build(family, more), values=values)
    ranks = {s.site.layer: dict(s.form.arguments)["r"] for s in plan.sites if "q_proj" in s.path}
    assert ranks == {0: 3, 1: 3, 2: 6, 3: 6}


def test_another_count_than_expected_is_refused() -> None:
    path: Path = FOLDER / "bert_attention.peft"
    with pytest.raises(surgery.SurgeryError, match="E206"):
        surgery.plan(path, build(BERT, {"num_hidden_layers": 2}), values={"layers": 3})
