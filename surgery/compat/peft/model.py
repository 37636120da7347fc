"""The wrapper around an adapted model, and the calls that make one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from surgery.compat.peft.adding import add, check_options, found_folder, load
from surgery.compat.peft.config import PeftConfig
from surgery.compat.peft.kinds import TaskType
from surgery.compat.peft.putting import configs_of, known, refuse_option
from surgery.compat.peft.saving import save
from surgery.compat.peft.states import LoadResult, inner_of
from surgery.compat.peft.status import LayerStatus, ModelStatus, counts, layer_status, model_status
from surgery.compat.peft.tuner import BaseTuner
from surgery.distributed import WRAPPED
from surgery.model.layers import base_class
from surgery.state import require_state


class PeftModel(nn.Module):
    """A model with adapters, as peft wraps one; what it has not itself is the model's.

    The adapters are on the model within, `get_base_model()`, whose class stays what it was.
    """

    task: ClassVar[TaskType | None] = None
    base_model: BaseTuner

    # By which transformers knows that what is trained of a quantised model are adapters.
    _hf_peft_config_loaded = True

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Put a new adapter on a model, and wrap it. Raises as `get_peft_model` does."""
        del low_cpu_mem_usage
        inner = inner_of(model)
        add(inner, peft_config, adapter_name, autocast=autocast_adapter_dtype)
        super().__init__()
        self._around(inner)

    def _around(self, inner: nn.Module) -> None:
        """Let the wrapper be one around a model that has its adapters."""
        self.base_model = BaseTuner(inner)
        vars(self)[WRAPPED] = inner
        self.training = inner.training
        itself: Any = self
        itself.__class__ = signed(_plain_class(type(self)), base_class(inner))
        if _checkpoints(inner):
            # What reentrant checkpointing needs where the base is frozen.
            getattr(inner, "enable_input_require_grads", _nothing)()

    @classmethod
    def around(cls, model: nn.Module) -> PeftModel:
        """The wrapper of a model that has its adapters already."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._around(model)
        return made

    def __getattr__(self, name: str) -> Any:
        """What the model within has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """As the wrapper's own class and the model's, of which its own is made."""
        del protocol
        own = _plain_class(type(self))
        return _rebuilt, (own, base_class(self.get_base_model())), self.__getstate__()

    # -------------------------------------------------------------------------------- running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward. `adapter_names`: an adapter for each sample, or `__base__`."""
        run = self.base_model.plain if self.task is None else self.base_model
        return run(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`; `adapter_names` as for a forward."""
        return self.base_model.generate(*args, **kwargs)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Let the base alone be live in this thread until the `with` ends."""
        return self.base_model.disabled()

    # ------------------------------------------------------------------------------ what it has

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configs by the names of the adapters."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that are live, or that would be if they were enabled."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the one that is, or the names of all."""
        return self.base_model.active_adapter

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the first that is live."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def modules_to_save(self) -> set[str] | None:
        """The modules that some adapter has copies of."""
        named = (config.to_dict().get("modules_to_save") for config in self.peft_config.values())
        return {name for names in named for name in names or ()} or None

    def get_base_model(self) -> nn.Module:
        """The model within, with its adapters."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers are trained, and how many there are."""
        return counts(self)

    def print_trainable_parameters(self) -> None:
        """Print how many numbers are trained."""
        trained, total = counts(self)
        share = 100 * trained / total
        print(
            f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share:.4f}"
        )

    # ------------------------------------------------------------------------------- adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Put another adapter beside those that are there; it is not live yet, nor trained."""
        del low_cpu_mem_usage
        self.base_model.add_adapter(adapter_name, peft_config, autocast_adapter_dtype)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        **options: Any,
    ) -> LoadResult:
        """Put a saved adapter beside those that are there, or into the one of this name.

        It is not live yet. options: `subfolder`, and those of the hub; others are refused (E561)
        where they would change something. Raises as `surgery.attach` and `Compiled.hotswap` do.
        """
        folder = found_folder(model_id, options)
        inner = self.get_base_model()
        if adapter_name in require_state(inner).adapters:
            self.base_model.compiled.hotswap(adapter_name, folder)
        else:
            load(inner, folder, adapter_name, is_trainable, autocast=autocast_adapter_dtype)
        if not is_trainable:
            self.eval()
        return LoadResult([], [])

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Let one adapter be live, and trained, and no other. Raises StateError (E402, E411)."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Let adapters be trained, or not, whichever are live. Raises StateError (E411)."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off; if it is live the first of the others is."""
        self.base_model.delete_adapter(adapter_name)

    def get_layer_status(self) -> list[LayerStatus]:
        """Every site with its adapters."""
        return layer_status(self.get_base_model())

    def get_model_status(self) -> ModelStatus:
        """The adapters of the whole model."""
        return model_status(self.get_base_model())

    # ---------------------------------------------------------------------------------- files

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        **options: Any,
    ) -> None:
        """Write adapters to a folder as peft does: `default` there, others in one of their name.

        Raises ArtifactError (E561 for options that are not followed), and as `Compiled.save`.
        """
        if not safe_serialization:
            refuse_option("safe_serialization", False, "a pickle can run code when it is read")
        if save_embedding_layers is True:
            refuse_option("save_embedding_layers", True, "name them in `modules_to_save`")
        check_options(options, ())
        inner = self.get_base_model()
        names = require_state(inner).adapters if selected_adapters is None else selected_adapters
        if is_main_process:
            save(inner, Path(save_directory), known(inner, names))

    def push_to_hub(self, repo_id: str, adapter_name: str | None = None, **options: Any) -> str:
        """Send an adapter, by default the one that is live, with its card; gives its address.

        options: commit_message, create_pr, private, revision, token. Raises ArtifactError (E561 for
        others), and as `surgery.integrations.models.push_to_hub`.
        """
        from surgery.integrations.models import push_to_hub

        check_options({n: v for n, v in options.items() if n not in _PUSHED}, ())
        return push_to_hub(self.get_base_model(), repo_id, adapter_name, **options).url

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        **options: Any,
    ) -> PeftModel:
        """Put a saved adapter on a model, and wrap it in the class of its task.

        config: whose `task_type` is taken; what the adapter is, its folder says. options: as for
        `load_adapter`. Raises as `surgery.attach` does; the model is left as it was.
        """
        folder = found_folder(model_id, options)
        inner = inner_of(model)
        load(inner, folder, adapter_name, is_trainable, autocast=autocast_adapter_dtype)
        inner_config = configs_of(inner)[adapter_name]
        state = require_state(inner)
        if len(state.adapters) > 1:
            BaseTuner(inner).set_adapter(adapter_name, inference_mode=not is_trainable)
        made = _class_for(inner_config if config is None else config, cls).around(inner)
        return made if is_trainable else made.eval()


class PeftModelForSequenceClassification(PeftModel):
    """Around a model that classifies texts."""

    task = TaskType.SEQ_CLS


class PeftModelForSeq2SeqLM(PeftModel):
    """Around a model that turns a text into another."""

    task = TaskType.SEQ_2_SEQ_LM


class PeftModelForCausalLM(PeftModel):
    """Around a model that continues a text."""

    task = TaskType.CAUSAL_LM


class PeftModelForTokenClassification(PeftModel):
    """Around a model that classifies tokens."""

    task = TaskType.TOKEN_CLS


class PeftModelForQuestionAnswering(PeftModel):
    """Around a model that finds answers."""

    task = TaskType.QUESTION_ANS


class PeftModelForFeatureExtraction(PeftModel):
    """Around a model of features."""

    task = TaskType.FEATURE_EXTRACTION


class PeftMixedModel(PeftModel):
    """Around a model whose adapters are of several methods, as any may be here."""

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let adapters be live, the sum of several, and trained, and no others."""
        self.base_model.set_adapter(adapter_name, inference_mode)


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: Mapping[TaskType, type[PeftModel]] = {
    cls.task: cls
    for cls in (
        PeftModelForSequenceClassification,
        PeftModelForSeq2SeqLM,
        PeftModelForCausalLM,
        PeftModelForTokenClassification,
        PeftModelForQuestionAnswering,
        PeftModelForFeatureExtraction,
    )
    if cls.task is not None
}
"""The class of each task."""


def _class_for(config: PeftConfig, default: type[PeftModel] = PeftModel) -> type[PeftModel]:
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, default)


# ------------------------------------------------------------------------------------ making


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put a new adapter on a model as a config says, and wrap it in the class of its task.

    The base is frozen, and is what it was where the adapter is disabled. mixed: whether adapters
    may be of several methods, which they may in any case. revision: of the base, kept in the
    config. low_cpu_mem_usage: has no effect. Raises ArtifactError: E515 and E516 for the config,
    E561 for what of it cannot be followed; StateError (E412, E443) for the name; PlanError. The
    model is left as it was.
    """
    inner = inner_of(model)
    if peft_config.base_model_name_or_path is None:
        peft_config.base_model_name_or_path = _name_of(inner)
    if revision is not None:
        peft_config.revision = revision
    cls = PeftMixedModel if mixed else _class_for(peft_config)
    return cls(
        inner,
        peft_config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put a new adapter on a model, without a wrapper; it is live. Raises as `get_peft_model`."""
    del low_cpu_mem_usage
    if state_dict is not None:
        hint = "say the modules in `target_modules`, or surgery.attach() a folder"
        refuse_option("state_dict", f"{len(state_dict)} tensors", hint)
    add(inner_of(model), peft_config, adapter_name)
    return model


def _name_of(model: nn.Module) -> str | None:
    named = getattr(model, "name_or_path", None) or getattr(
        getattr(model, "config", None), "_name_or_path", None
    )
    return named if isinstance(named, str) and named else None


def _checkpoints(model: nn.Module) -> bool:
    """Whether a model of transformers computes activations again; of old and new versions."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    known = next((name for name in names if hasattr(type(model), name)), None)
    return known is not None and bool(getattr(model, known))


def _nothing() -> None:
    """In place of what a model has not."""


# --------------------------------------------------------------------------------- signatures

_PUSHED = ("commit_message", "create_pr", "private", "revision", "token", "api")
_BASE = "_surgery_wraps"


@lru_cache(maxsize=256)
def signed(cls: type[PeftModel], base: type[nn.Module]) -> type[PeftModel]:
    """A wrapper's class whose forward has the signature of a model's, which trainers look at."""

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(self, *args, **kwargs)

    given: Callable[..., Any] = cast(Any, base).forward
    own: Any = forward
    own.__signature__ = inspect.signature(given)
    members = {
        "forward": forward,
        _BASE: cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (cls,), members)


def _plain_class(cls: type[PeftModel]) -> type[PeftModel]:
    return cast("type[PeftModel]", getattr(cls, _BASE, cls))


def _rebuilt(cls: type[PeftModel], base: type[nn.Module]) -> PeftModel:
    made = signed(cls, base)
    return made.__new__(made)
