"""Training with transformers' Trainer: checkpoints hold the adapters, and not the base.

`Trainer` is transformers' own with three of its steps replaced: what a checkpoint holds, how one
is loaded to go on from, and how the best one is. `AdapterTraining` is what does it, for any other
class of trainers. `AdapterCheckpoints` is a callback for where the trainer's class is fixed.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import TrainerCallback

from surgery.artifact import FILES
from surgery.distributed import unwrapped
from surgery.errors import refuse
from surgery.integrations.training import (
    check_trained,
    load_adapters,
    save_adapters,
    saved_adapters,
    split_by_rate,
)
from surgery.runtime import Compiled
from surgery.state import state_of
from surgery.store import read_json, save_tensors
from surgery.trainable import trainable

# transformers leaves its trainers' methods open, so what they take is `Any` here.

_ARGUMENTS = "training_args.bin"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


class AdapterTraining:
    """What a trainer of adapters does otherwise; to be named before a trainer's class.

    `class Mine(AdapterTraining, SomeTrainer)` trains adapted models so that checkpoints hold the
    adapters alone, and models without adapters as `SomeTrainer` does.
    """

    model: Any
    args: Any
    state: Any
    optimizer: Any
    data_collator: Any
    processing_class: Any

    def __init__(
        self, model: nn.Module | Compiled | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """As the trainer's class takes it; `model` may be a handle."""
        model = model.model if isinstance(model, Compiled) else model
        with _known_as_adapted(model):
            cast(Any, super()).__init__(model, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer, over what is trained, each at its own learning rate.

        Raises what `check_trained` does.
        """
        model, given = self._adapted(), self.optimizer is not None
        if model is None:
            return cast(Any, super()).create_optimizer(*args, **kwargs)
        self._refuse_sharding()
        check_trained(model)
        _let_gradients_in(model, self.args)
        made = cast(Any, super()).create_optimizer(*args, **kwargs)
        if not given:
            split_by_rate(made, model, self.args.learning_rate)
        return made

    def _refuse_sharding(self) -> None:
        """E572 where the trainer shards the model, and then saves all of it in a way of its own."""
        ways = {"is_fsdp_enabled": "FSDP", "is_deepspeed_enabled": "DeepSpeed"}
        for name in (way for attribute, way in ways.items() if getattr(self, attribute, False)):
            hint = "train in processes that have the model whole, or in a loop of your own"
            message = f"{name} in a trainer saves the base with every checkpoint"
            refuse("E572", message, hint=f"{hint}, with fully_shard and save_adapters")

    def _adapted(self) -> nn.Module | None:
        """The model, if it has adapters."""
        model = None if self.model is None else unwrapped(self.model)
        return None if model is None or state_of(model) is None else model

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write what training changes, and what a trainer writes beside the weights."""
        model = self._adapted()
        if model is None:
            cast(Any, super())._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        save_adapters(model, folder)
        processing = self.processing_class
        if processing is None:
            processing = getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(str(folder))
        torch.save(self.args, folder / _ARGUMENTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The adapters of a checkpoint, or what a plain trainer wrote of the whole model."""
        self._load(resume_from_checkpoint, "_load_from_checkpoint", resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """The adapters of the best checkpoint."""
        self._load(self.state.best_model_checkpoint, "_load_best_model")

    def _load(self, folder: str, otherwise: str, *args: Any) -> None:
        model = self._adapted()
        if model is None or (_is_whole(Path(folder)) and not saved_adapters(folder)):
            getattr(cast(Any, super()), otherwise)(*args)
        else:
            load_adapters(model, folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push what a checkpoint holds: the trainer's class knows only some of the files."""
        if self._adapted() is not None:
            for one in saved_adapters(checkpoint_folder).values():
                target = Path(self.args.output_dir, one.relative_to(checkpoint_folder))
                target.mkdir(parents=True, exist_ok=True)
                for name in (n for n in FILES if (one / n).is_file()):
                    shutil.copy(one / name, target / name)
        cast(Any, super())._push_from_checkpoint(checkpoint_folder)


@contextmanager
def _known_as_adapted(model: nn.Module | None) -> Generator[None]:
    """Quantised models are trained by transformers only where this says that they have adapters."""
    own = {} if model is None or state_of(model) is None else vars(model)
    before = {name: own[name] for name in (_ADAPTED,) if name in own}
    own[_ADAPTED] = True
    try:
        yield
    finally:
        del own[_ADAPTED]
        own.update(before)


_ADAPTED = "_hf_peft_config_loaded"


def _let_gradients_in(model: Any, args: Any) -> None:
    """A reentrant checkpoint has gradients where its input has: transformers sees to tokens."""
    options = cast("dict[str, object]", args.activation_checkpointing_kwargs or {})
    if not (args.activation_checkpointing and options.get("use_reentrant", False)):
        return
    if hasattr(model, "enable_input_require_grads") and not getattr(model, _INPUT_HOOKS, ()):
        model.enable_input_require_grads()


_INPUT_HOOKS = "_require_grads_hooks"


def _is_whole(folder: Path) -> bool:
    """Whether a plain trainer wrote a whole model there."""
    return any((folder / name).is_file() for name in (_WEIGHTS, _INDEX))


class Trainer(AdapterTraining, transformers.Trainer):
    """transformers' Trainer, for adapted models as for others."""


# --------------------------------------------------------------------------------- callback


class AdapterCheckpoints(TrainerCallback):
    """Lets the checkpoints of a plain trainer hold what is trained, and not the base.

    The trainer writes the whole model; of that the base is taken out again, and the adapters'
    folders come beside it. What is left goes on as any checkpoint of the trainer's.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at what is trained, as `check_trained` does."""
        del args, state, control
        check_trained(unwrapped(kwargs["model"]))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Replace what was saved."""
        del control
        model = unwrapped(kwargs["model"])
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if args.should_save and folder.is_dir():
            save_adapters(model, folder)
            _take_out_base(model, folder)


def _take_out_base(model: nn.Module, folder: Path) -> None:
    """Leave of a saved model what is trained, under the names that it has there."""
    compiled, shards = Compiled(model), set[str]()
    if (folder / _INDEX).is_file():
        weights = cast("dict[str, str]", read_json(folder / _INDEX)["weight_map"])
        shards = {*weights.values(), _INDEX}
    kept = {n: t for name in trainable(model) for n, t in compiled.parameters(name).items()}
    save_tensors(folder / _WEIGHTS, kept)
    for name in shards - {_WEIGHTS}:
        (folder / name).unlink(missing_ok=True)


__all__ = ["AdapterCheckpoints", "AdapterTraining", "Trainer"]
