"""What peft does on each kind of layer, as `specs/formats/peft_layers.toml` says it.

`SURGERY_GOLDEN=write` writes the file anew, by trying.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any, cast

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from surgery.language.library import Library
from surgery.mapping import Reason
from surgery.model.layers import KINDS
from surgery.resources import formats_dir
from surgery.supported import SIZES, of_peft
from surgery.supported import tried as on_layer

hf: Any = peft
IN, OUT = SIZES
PATH = formats_dir() / "peft_layers.toml"

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(IN, OUT), (5, IN)),
    "transposed_linear": (lambda: cast(Any, Conv1D)(OUT, IN), (5, IN)),
    "embedding": (lambda: nn.Embedding(IN, OUT), ()),
    "conv1d": (lambda: nn.Conv1d(IN, OUT, 3), (2, IN, 5)),
    "conv2d": (lambda: nn.Conv2d(IN, OUT, 3), (2, IN, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(IN, OUT, 3), (2, IN, 5, 4, 3)),
}


def config(method: str) -> dict[str, Any] | None:
    """What peft is told to do the same on a linear layer; None where it cannot be told."""
    try:
        found = on_layer(method, "linear").config
    except Exception:
        return None
    return None if isinstance(found, Reason) else {**found.values, "target_modules": ["0"]}


def tried(values: dict[str, Any], kind: str) -> str:
    """`yes`, `no`, or `other`, where peft's forward is not what it merges, or there is no merge."""
    make, shape = LAYERS[kind]
    cast(Any, torch).manual_seed(0)
    model = nn.Sequential(make()).eval()
    inputs = torch.randn(shape) if shape else torch.arange(7)
    given = {k: v for k, v in values.items() if k not in ("peft_type", "fan_in_fan_out")}
    if kind == "transposed_linear" and "fan_in_fan_out" in values:
        given["fan_in_fan_out"] = True
    try:
        cls = cast(Any, PEFT_TYPE_TO_CONFIG_MAPPING)[values["peft_type"]]
        adapted = hf.get_peft_model(model, cls(**given)).eval()
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
            before = cast(Tensor, adapted(inputs))
    except Exception:
        return "no"
    try:
        after = cast(Tensor, adapted.merge_and_unload()(inputs))
    except Exception:
        return "other"
    return "yes" if torch.allclose(before, after, rtol=1e-3, atol=1e-4) else "other"


def lines(known: tuple[str, ...]) -> Iterator[str]:
    yield "# What peft 0.21 does with each method on a layer of each kind: `yes`, `no`, or `other`,"
    yield "# where its forward is not its merge. Written by tests/oracle/test_layers_of_peft.py."
    for name in known:
        values = config(name)
        if values is None:
            continue
        yield f"\n[{name}]"
        yield from (f'{kind.name} = "{tried(values, kind.name)}"' for kind in KINDS)


def test_the_file_says_what_peft_does() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if os.environ.get("SURGERY_GOLDEN") == "write":
            text = "\n".join(lines(Library.standard().names())) + "\n"
            PATH.write_text(text, encoding="utf-8")
            pytest.skip("written")
        for name, kinds in of_peft().items():
            values = config(name)
            assert values is not None, name
            for kind, said in kinds.items():
                assert tried(values, kind) == said, (name, kind)
