"""Specs in, plans out: what is printed for a small Llama, to the letter.

`SURGERY_GOLDEN=write pytest tests/golden` writes the plans anew; look at the difference.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import surgery

PLANS = Path(__file__).parent / "plans"


def llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=88,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    with torch.device("meta"):
        return cast(nn.Module, LlamaForCausalLM(config))


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.peft")), ids=lambda p: p.stem)
def test_the_plan_is_as_written(path: Path) -> None:
    shown = str(surgery.plan(path, llama())).replace(f"{path}:", f"{path.name}:") + "\n"
    wanted = path.with_suffix(".txt")
    if os.environ.get("SURGERY_GOLDEN") == "write":
        wanted.write_text(shown, encoding="utf-8")
    assert shown == wanted.read_text(encoding="utf-8")
