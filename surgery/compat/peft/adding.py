"""An adapter that comes to a model: a new one by its config, or one of a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from surgery.adapters import check_name
from surgery.artifact import CONFIG
from surgery.compat.peft.config import PeftConfig
from surgery.compat.peft.folders import folder_of
from surgery.compat.peft.putting import configs_of, load_on, put_on, refuse_option, set_trained
from surgery.compat.peft.tuner import BaseTuner
from surgery.state import state_of


def add(model: nn.Module, config: PeftConfig, name: str, *, autocast: bool = True) -> None:
    """Put a new adapter on a model, and let it be live."""
    first = state_of(model) is None
    put_on(model, config, name, autocast=autocast)
    configs_of(model)[name] = config
    if not first:
        BaseTuner(model).set_adapter(name, inference_mode=bool(config.inference_mode))


def load(
    model: nn.Module, folder: Path, name: str, trained: bool, *, autocast: bool = True
) -> None:
    """Put a saved adapter on a model; it is live if it is the first."""
    check_name(name)
    has_config = (folder / CONFIG).is_file()
    config = PeftConfig.from_pretrained(folder) if has_config else PeftConfig()
    load_on(model, folder, name, autocast=autocast)
    set_trained(model, (name,), trained)
    config.inference_mode = not trained
    configs_of(model)[name] = config


def found_folder(reference: str | Path, options: dict[str, Any]) -> Path:
    """The folder of an adapter. Raises ArtifactError: E504, E561 for options."""
    check_options(options, _HARMLESS)
    return folder_of(reference, options.get("subfolder"), options)


_HARMLESS = (
    "cache_dir",
    "ephemeral_gpu_offload",
    "force_download",
    "local_files_only",
    "low_cpu_mem_usage",
    "revision",
    "subfolder",
    "token",
    "torch_device",
    "use_safetensors",
    "user_agent",
)


def check_options(options: Mapping[str, Any], passed: Sequence[str]) -> None:
    """E561 for options of a call that would change something."""
    for name, value in options.items():
        if name not in passed and value not in (None, False, {}):
            refuse_option(name, value, "leave it out")
