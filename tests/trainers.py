"""Short runs of transformers' Trainer, and what they show."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, cast

import transformers
from torch import Tensor
from transformers import TrainingArguments

import surgery
from surgery.integrations.trainer import Trainer

gc.freeze()  # each run collects garbage, for which it would look through all that was imported


def arguments(folder: Path, **given: Any) -> Any:
    """A run of six steps, with a checkpoint in the middle."""
    return cast(Any, TrainingArguments)(
        **{
            "output_dir": str(folder),
            "max_steps": 6,
            "save_steps": 3,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
            **given,
        }
    )


def trainer(
    model: Any, rows: list[dict[str, Tensor]], folder: Path, kind: Any = Trainer, **given: Any
) -> Any:
    """A trainer that says nothing; ours takes a handle too."""
    if kind is transformers.Trainer and isinstance(model, surgery.Compiled):
        model = model.model
    callbacks = given.pop("callbacks", [])
    made = kind(
        model,
        arguments(folder, **given),
        train_dataset=rows,
        eval_dataset=rows[:4],
        callbacks=callbacks,
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def curve(trained: Any) -> list[float]:
    """The loss of each step."""
    return [row["loss"] for row in trained.state.log_history if "loss" in row]
