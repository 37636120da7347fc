"""What is done to a quantised model before it is trained."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_WHOLE = ("gptq", "aqlm", "eetq", "hqq", "torchao")  # quantised, and not to be cast
_LOADED = ("is_loaded_in_8bit", "is_loaded_in_4bit", "hqq_quantized")


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, object] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a model, let what is not quantised be float32, and let its layers be checkpointed.

    Checkpointing is for quantised models alone, as in peft. auto_clear_cache: give memory that is
    free after the casts back to the device.
    """
    untyped: Any = model
    method = str(getattr(untyped, "quantization_method", None))
    quantised = method in _WHOLE or any(getattr(untyped, name, False) for name in _LOADED)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        halves = parameter.dtype in (torch.float16, torch.bfloat16)
        if halves and method not in _WHOLE and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.to(torch.float32)
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if quantised and use_gradient_checkpointing:
        _checkpoint(untyped, dict(gradient_checkpointing_kwargs or {}))
    return model


def _checkpoint(model: Any, options: dict[str, object]) -> None:
    if options.get("use_reentrant", True):
        model.enable_input_require_grads()
    enable = model.gradient_checkpointing_enable
    known = "gradient_checkpointing_kwargs" in inspect.signature(enable).parameters
    enable(**({"gradient_checkpointing_kwargs": options} if known else {}))
