"""Adapters as the folders that peft writes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

from torch import nn

import surgery
from surgery.artifact import CONFIG
from surgery.compat.peft.putting import configs_of
from surgery.compat.peft.states import chosen_by
from surgery.state import require_state
from surgery.store import json_writer, read_json, write_atomic

DEFAULT = "default"


def save(model: nn.Module, directory: Path, names: Iterable[str]) -> None:
    """Write adapters: `default` to a folder, each other to one of its name within.

    Their configs are those that they were made by. What peft has no form for is written all the
    same, and said by a warning. Raises as `Compiled.save` does.
    """
    for name in names:
        _save(model, directory if name == DEFAULT else directory / name, name)


def _save(model: nn.Module, folder: Path, name: str) -> None:
    config = configs_of(model).get(name)
    plan = require_state(model).adapters[name].plan
    methods = any(not s.site.at.tensor for s in plan.sites)
    fields = chosen_by(config) if config is not None and config.kind and methods else {}
    saved = surgery.of(model).save(folder, name, config=fields or None)
    if saved.peft:
        message = f"peft cannot read the folder of `{name}`, which is read here: {saved.peft}"
        warnings.warn(message, stacklevel=4)
    elif config is not None and config.kind:
        written = read_json(folder / CONFIG)
        # What says more is the config that the adapter was made by, as in peft.
        values = {**written, **config.plain(), "inference_mode": True}
        write_atomic(folder / CONFIG, json_writer(values))
