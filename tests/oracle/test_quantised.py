"""Adapters that peft trained on quantised bases (QLoRA), beside ours on the very same layers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.model.holder import under_adapters

packed: Any = pytest.importorskip("bitsandbytes")

# Libraries whose types are not complete.
hf: Any = peft
untyped: Any = torch

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
    pytest.mark.filterwarnings("ignore:Merge lora module to 8-bit linear:UserWarning"),
    pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but:UserWarning"),
]
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

X = torch.randn((3, 7, 96), generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    def __init__(self, layer: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.q_proj = layer(96, 160)
        self.v_proj = layer(160, 96)

    def forward(self, x: Tensor) -> Tensor:
        """[..., 96] to the same."""
        return x + self.v_proj(torch.tanh(self.q_proj(x)))


def four(fan_in: int, fan_out: int) -> nn.Module:
    return packed.nn.Linear4bit(fan_in, fan_out, quant_type="nf4", compress_statistics=True)


def eight(fan_in: int, fan_out: int) -> nn.Module:
    return packed.nn.Linear8bitLt(fan_in, fan_out, has_fp16_weights=False)


def base(bits: int) -> Any:
    """As transformers marks what it has loaded in few bits."""
    untyped.manual_seed(0)
    model: Any = Block(four if bits == 4 else eight).to("cpu").train()
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


def config(**options: Any) -> Any:
    return hf.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], **options)


def trained(bits: int, folder: Path, **options: Any) -> Any:
    """peft's model with an adapter that does something, and a folder that it saved."""
    model = hf.get_peft_model(base(bits), config(**options))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(folder)
    return model


def close(found: Tensor, expected: Tensor, most: float = 1e-5) -> None:
    assert (found - expected).abs().max() <= most * expected.abs().max()


OPTIONS: tuple[dict[str, Any], ...] = ({}, {"use_dora": True}, {"use_rslora": True})


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_folder_of_pefts_has_the_same_forward(
    bits: int, options: dict[str, Any], tmp_path: Path
) -> None:
    theirs = trained(bits, tmp_path / "theirs", **options)
    ours = base(bits)
    compiled = surgery.attach(tmp_path / "theirs", ours)
    expected = theirs(X).detach()
    close(ours(X), expected)
    assert (expected - base(bits)(X)).abs().max() > 0.1
    compiled.save(tmp_path / "ours")
    again = hf.PeftModel.from_pretrained(base(bits), tmp_path / "ours").train()
    close(again(X).detach(), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_bias_is_merged_with_its_factor(bits: int, tmp_path: Path) -> None:
    """peft scales the trained bias in its forward, and not in its merge of quantised layers."""
    theirs = trained(bits, tmp_path, lora_bias=True, bias="none")
    ours = base(bits)
    compiled = surgery.attach(tmp_path, ours)
    live = ours(X).detach()
    close(live, theirs(X).detach())

    theirs.merge_adapter()
    bias = theirs.base_model.model.q_proj.base_layer.bias.detach()
    added = theirs.base_model.model.q_proj.lora_B["default"].bias.detach()
    before = ours.q_proj.bias.detach().clone()
    close(bias, before + added)  # though the forward adds 5 / 3 of it

    compiled.inverse.merge(quantized="dequantize")
    close(ours.q_proj.bias.detach(), before + 5 / 3 * added)
    close(ours(X).detach(), live)
    compiled.inverse.unload()
    assert torch.equal(ours.q_proj.bias, before)


def test_base_stays_what_it_is_while_adapters_train() -> None:
    ours = base(4)
    before = copy.deepcopy(ours.state_dict())
    compiled = surgery.compile("match q_proj | v_proj apply lora(r=3)", ours, seed=1)
    adapters = [p for name, p in ours.named_parameters() if under_adapters(name)]
    assert len(adapters) == 4
    optimizer: Any = torch.optim.AdamW(adapters, lr=1e-2)
    losses: list[float] = []
    for _ in range(4):
        loss = (ours(X) - X.roll(1, 0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    compiled.inverse.unload()
    after = ours.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
