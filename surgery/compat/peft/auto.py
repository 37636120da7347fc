"""An adapter's folder as a whole model: the base that it names, and the adapter on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, cast

from torch import nn

from surgery.artifact import CONFIG
from surgery.compat.peft.adding import found_folder
from surgery.compat.peft.config import PeftConfig
from surgery.compat.peft.folders import hub_options
from surgery.compat.peft.model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from surgery.errors import refuse
from surgery.integrations.pretrained import AUTO
from surgery.mapping.forms import shown

_TOKENIZER = "tokenizer_config.json"
_OF_ADAPTER = ("subfolder", "autocast_adapter_dtype", "low_cpu_mem_usage")


class AutoPeftModel:
    """The base that a folder names, in the class that its config names, with the adapter on it."""

    around: ClassVar[type[PeftModel]] = PeftModel

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> PeftModel:
        """The model of an adapter's folder, or of one on the hub.

        revision: of the adapter; its config has that of the base. options: of the hub, and for the
        base's own `from_pretrained`. Embeddings get the size of a tokenizer that lies in the
        folder. Raises ArtifactError: E504, E511, E512 for the folder, E564 where it does not say
        which base; and as `PeftModel.from_pretrained`.
        """
        mine = {"revision": revision, **hub_options(options)}
        mine |= {n: options.pop(n) for n in _OF_ADAPTER if n in options}
        autocast = bool(mine.pop("autocast_adapter_dtype", True))
        folder = found_folder(pretrained_model_name_or_path, mine)
        found = PeftConfig.from_pretrained(folder) if config is None else config
        base = cls._base(found, folder, {**options, "revision": found.revision})
        made = cls.around.from_pretrained(
            base, folder, adapter_name, is_trainable, config, autocast_adapter_dtype=autocast
        )
        return made

    @classmethod
    def _base(cls, config: PeftConfig, folder: Path, options: dict[str, Any]) -> nn.Module:
        """The base, with embeddings for the tokenizer."""
        import transformers

        hf: Any = transformers  # whose types are not complete
        named = cast("str | None", config.base_model_name_or_path)
        if not named:
            hint = "write it into its config, or use PeftModel.from_pretrained with the model"
            refuse("E564", f"{folder / CONFIG} has no `base_model_name_or_path`", hint=hint)
        given = {name: value for name, value in options.items() if value is not None}
        built = AUTO.get(str(cls.around.task)) or _class_named(config, folder)
        model = getattr(hf, built).from_pretrained(named, **given)
        if (folder / _TOKENIZER).is_file():
            tokenizer = hf.AutoTokenizer.from_pretrained(folder)
            model.resize_token_embeddings(len(tokenizer))
        return cast(nn.Module, model)


def _class_named(config: PeftConfig, folder: Path) -> str:
    """The class of transformers that a config names, or that its task has."""
    own = AUTO.get(str(config.task_type))
    said = cast("dict[str, str]", config.auto_mapping or {})
    library = said.get("parent_library", "").partition(".")[0]
    if own is not None:
        return own
    if library != "transformers" or "base_model_class" not in said:
        hint = "use PeftModel.from_pretrained with a model of yours, or the class of its task"
        text = f"{folder / CONFIG} says of its base {shown(said or None)}, which is no class here"
        refuse("E564", text, hint=hint)
    return said["base_model_class"]


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For models that continue a text."""

    around = PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For models that turn a text into another."""

    around = PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For models that classify texts."""

    around = PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For models that classify tokens."""

    around = PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For models that find answers."""

    around = PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For models of features."""

    around = PeftModelForFeatureExtraction
