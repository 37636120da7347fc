"""Folders of peft's converted: to the bit there and back, and as a product that peft loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from small_models import ARCHITECTURES, fresh
from torch import Tensor, nn

import surgery
from surgery.artifact import TENSORS
from surgery.store import read_tensors

hf: Any = peft


def targets(name: str) -> list[str]:
    one = ARCHITECTURES[name]
    return [one.query, one.down]


CONFIGS: dict[str, Callable[[list[str], bool], Any]] = {
    "lora": lambda t, turned: hf.LoraConfig(
        target_modules=t, r=3, lora_alpha=5, rank_pattern={t[0]: 2}, fan_in_fan_out=turned
    ),
    "pissa": lambda t, turned: hf.LoraConfig(
        target_modules=t, r=2, lora_alpha=4, init_lora_weights="pissa", fan_in_fan_out=turned
    ),
    "dora": lambda t, turned: hf.LoraConfig(
        target_modules=t, r=3, use_dora=True, fan_in_fan_out=turned
    ),
    "vera": lambda t, turned: hf.VeraConfig(target_modules=t, r=5, fan_in_fan_out=turned),
    "miss": lambda t, turned: hf.MissConfig(target_modules=t, r=4),
    "hra": lambda t, turned: hf.HRAConfig(target_modules=t, r=4),
}
PAIRS = [
    (method, name)
    for method in CONFIGS
    for name in ("llama", "gpt2")
    if name != "gpt2" or method not in ("miss", "hra")  # which peft puts on linear layers alone
]


def made(method: str, name: str, folder: Path) -> Tensor:
    """A folder that peft saved away from the beginning, and what the model then gives."""
    config = CONFIGS[method](targets(name), ARCHITECTURES[name].transposed)
    model = hf.get_peft_model(fresh(name), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return output(name, model)


def output(name: str, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return ARCHITECTURES[name].output(model.eval())


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_no_tensor_of_peft_changes_by_a_bit(method: str, name: str, tmp_path: Path) -> None:
    before = made(method, name, tmp_path / "a")
    model = fresh(name)
    surgery.convert(tmp_path / "a", tmp_path / "b", model, to="native")
    surgery.convert(tmp_path / "b", tmp_path / "c", model, to="peft")
    theirs, ours = read_tensors(tmp_path / "a" / TENSORS), read_tensors(tmp_path / "c" / TENSORS)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    surgery.attach(tmp_path / "b", model)
    assert close(output(name, model), before)


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_peft_loads_the_product(method: str, name: str, tmp_path: Path) -> None:
    before = made(method, name, tmp_path / "a")
    whole = method == "dora"  # a gain has a product of full rank alone
    rank = 36 if whole else None
    done = surgery.convert(tmp_path / "a", tmp_path / "b", fresh(name), to="lora", rank=rank)
    assert done.exact is not whole
    again = hf.PeftModel.from_pretrained(fresh(name), tmp_path / "b")
    assert close(output(name, again), before)
