"""Weights that bitsandbytes quantised, in files: what one's entries stand for, and back.

Read from bitsandbytes 0.50. Scales of 4 bits may have one offset for all of them, so a weight is
taken whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from bitsandbytes import functional
from torch import Tensor

from surgery.integrations.bitsandbytes import codes4, codes8, dense4, dense8
from surgery.quantized_files import STATE

_F: Any = functional


def dequantised(name: str, entries: Mapping[str, Tensor]) -> Tensor:
    """What a weight stands for [out, in], in float32. entries: its own and those beside it.

    Raises ValueError where they are not what such a weight has.
    """
    try:
        scales = _scales8(name, entries)
        if scales is not None:
            return dense8(entries[name], scales)
        return dense4(entries[name], _state(name, entries))
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the entries of {name} are of no quantised weight: {error}") from error


def requantised(name: str, entries: Mapping[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
    """The entries of another weight [out, in], with the names, dtypes and shapes of the old ones.

    entries: the old ones, which say how it is quantised.
    """
    if _scales8(name, entries) is not None:
        codes, scales = codes8(matrix)
        owner = name.removesuffix("weight")
        return {**entries, name: codes, f"{owner}SCB": scales}
    old = entries[name]
    codes, state = codes4(matrix, _state(name, entries), old.dtype)
    told = state.as_dict(packed=True)
    key = f"{STATE}{state.quant_type}"
    told[key] = _as_long(told[key], entries[f"{name}.{key}"])
    return {name: codes.reshape(old.shape), **{f"{name}.{n}": t for n, t in told.items()}}


def _as_long(text: Tensor, old: Tensor) -> Tensor:
    """The bytes of a JSON object in as many as there were, so that headers stay what they are.

    Nine digits tell every float32.
    """
    told = cast("list[int]", cast(Any, text).tolist())
    values: dict[str, object] = json.loads(bytes(told))
    offset = values.get("nested_offset")
    if isinstance(offset, float):
        values["nested_offset"] = float(f"{offset:.9g}")
    written = json.dumps(values, separators=(",", ":")).encode().ljust(old.numel())
    return torch.tensor([*written], dtype=torch.uint8)


def _scales8(name: str, entries: Mapping[str, Tensor]) -> Tensor | None:
    return entries.get(f"{name.removesuffix('weight')}SCB")


def _state(name: str, entries: Mapping[str, Tensor]) -> Any:
    own = {n.removeprefix(f"{name}."): t for n, t in entries.items() if n != name}
    return _F.QuantState.from_dict(own, device=torch.device("cpu"))
