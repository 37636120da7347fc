"""Where peft's convolutions are not its equations: one equation does for every convolution here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracle.test_faults import Make, far, seen, tried, whole
from support import moved
from torch import nn

import surgery

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
    pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT:UserWarning"),
]

# Libraries whose types are not complete.
hf: Any = peft
untyped: Any = torch


def flat(**options: Any) -> nn.Module:
    untyped.manual_seed(1)
    return nn.Sequential(nn.Conv2d(4, 6, 3, **options)).eval()


def narrow() -> nn.Module:
    untyped.manual_seed(2)
    return nn.Sequential(nn.Conv1d(4, 6, 3)).eval()


def copied(ours: surgery.Compiled, theirs: nn.Module, names: Mapping[str, str]) -> None:
    """Peft's tensors of the one layer, by the names that they have here."""
    held = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, own in names.items():
            (tensor,) = (t for key, t in held.items() if f".{own}.default" in key)
            here = ours.parameters()[f"0.surgery.default.{name}"]
            here.copy_(tensor.reshape(here.shape))


AB = {"A": "lora_A", "B": "lora_B"}
CONVOLUTIONS: dict[str, tuple[Make, Any, str, Mapping[str, str]]] = {
    "patches that overlap are summed": (
        flat,
        lambda: peft.OFTConfig(
            oft_block_size=6, use_cayley_neumann=False, target_modules=["0"], init_weights=False
        ),
        "oft(block_size=6, use_cayley_neumann=false)",
        {"v": "oft_R"},
    ),
    "what is padded is nought": (
        lambda: flat(padding=1, padding_mode="reflect"),
        lambda: peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False),
        "lora(r=3, alpha=8)",
        AB,
    ),
    "the places are next to each other": (
        lambda: flat(dilation=2),
        lambda: peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False),
        "lora(r=3, alpha=8)",
        AB,
    ),
    "the places of DoRA too": (
        lambda: flat(dilation=2),
        lambda: peft.LoraConfig(r=3, target_modules=["0"], use_dora=True, init_lora_weights=False),
        "dora(r=3, alpha=8)",
        {**AB, "m": "lora_magnitude_vector"},
    ),
    "the places of reflections": (
        lambda: flat(dilation=2),
        lambda: peft.HRAConfig(r=3, target_modules=["0"]),
        "hra(r=3)",
        {"u": "hra_u"},
    ),
    "the padding of a Hadamard product": (
        lambda: flat(padding=1, padding_mode="circular"),
        lambda: peft.LoHaConfig(r=3, target_modules=["0"], init_weights=False),
        "loha(r=3, alpha=8)",
        {"A1": "hada_w1_a", "B1": "hada_w1_b", "A2": "hada_w2_a", "B2": "hada_w2_b"},
    ),
}


@pytest.mark.parametrize("fault", CONVOLUTIONS)
def test_a_convolution_is_what_peft_would_merge(fault: str, tmp_path: Path) -> None:
    make, config, call, names = CONVOLUTIONS[fault]
    theirs = hf.get_peft_model(make(), config()).eval()
    theirs.save_pretrained(str(tmp_path))
    forward = tried(theirs)
    ours = surgery.compile(f"match * apply {call}", make())
    copied(ours, theirs, names)
    merged = seen(theirs.merge_and_unload())
    far(forward, merged)
    # A folder of such a layer says one thing and does another, and is not read.
    with pytest.raises(surgery.SurgeryError):
        surgery.attach(tmp_path, make())
    whole(ours, make(), merged)


@pytest.mark.parametrize(
    "call",
    [
        "lora(r=2)",
        "dora(r=2)",
        "ia3()",
        'ia3(side="in")',
        "oft(block_size=3)",
        "boft(block_size=3)",
        "hra(r=2)",
        "loha(r=2)",
        "lokr(r=2)",
        "hira(r=2)",
        "adalora(init_r=2)",
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2},
        {"dilation": (1, 2)},
        {"padding": (2, 1), "stride": (1, 3), "padding_mode": "reflect"},
    ],
    ids=["groups", "dilation", "padding"],
)
def test_every_convolution_is_one_equation(call: str, options: dict[str, Any]) -> None:
    ours = surgery.compile(f"match * apply {call}", flat(**options))
    moved(ours)
    far(seen(ours.model), seen(flat(**options)))
    whole(ours, flat(**options))


def test_a_grouped_convolution_is_not_pefts_of_all_channels(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    theirs = hf.get_peft_model(flat(groups=2), config)
    with pytest.raises(NotImplementedError):
        theirs.merge_and_unload()
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(surgery.SurgeryError, match="2 group"):
        surgery.attach(tmp_path, flat(groups=2))


def test_a_kernel_of_one_place_in_two_of_three_axes_merges(tmp_path: Path) -> None:
    def deep() -> nn.Module:
        untyped.manual_seed(3)
        return nn.Sequential(nn.Conv3d(4, 6, (1, 1, 3))).eval()

    config = peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
    theirs = hf.get_peft_model(deep(), config).eval()
    theirs.save_pretrained(str(tmp_path))
    forward = seen(theirs)
    with pytest.raises((RuntimeError, IndexError)):
        theirs.merge_and_unload()
    whole(surgery.attach(tmp_path, deep()), deep(), forward)


def test_a_factor_that_is_whole_is_one_of_a_kronecker_product(tmp_path: Path) -> None:
    """peft multiplies the kernel's axis with the wrong one, in its forward and its merge."""
    config = peft.LoKrConfig(r=8, target_modules=["0"], init_weights=False)
    hf.get_peft_model(narrow(), config).save_pretrained(str(tmp_path))
    with pytest.raises(surgery.SurgeryError):
        surgery.attach(tmp_path, narrow())
    ours = surgery.compile("match * apply lokr(r=8)", narrow())
    moved(ours)
    far(seen(ours.model), seen(narrow()))
    whole(ours, narrow())


def test_a_core_of_one_rank_is_a_kronecker_product_too() -> None:
    config = peft.LoKrConfig(r=1, use_effective_conv2d=True, target_modules=["0"])
    theirs = hf.get_peft_model(narrow(), config)
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        seen(theirs)
    ours = surgery.compile("match * apply lokr(r=1, use_effective_conv2d=true)", narrow())
    moved(ours)
    far(seen(ours.model), seen(narrow()))
    whole(ours, narrow())
