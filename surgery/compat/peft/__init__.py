"""Hugging Face peft's calls: `import surgery.compat.peft as peft`, and a script goes on as it is.

A config becomes a spec by the way of an `adapter_config.json`, and a call becomes one of the
runtime's; peft itself is not imported. What of a config or a call is not followed is refused
(E561), and never passed over. Random beginnings are drawn from streams of this package's own, so
they have peft's laws and not its numbers.
"""

from __future__ import annotations

from surgery.compat.peft.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from surgery.compat.peft.config import PeftConfig, get_peft_config
from surgery.compat.peft.configs import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    AdaLoraConfig,
    AdamssConfig,
    BdLoraConfig,
    BeftConfig,
    BOFTConfig,
    BoneConfig,
    C3AConfig,
    DeftConfig,
    DeloraConfig,
    EvaConfig,
    FourierFTConfig,
    FrodConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    KasaConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    LoraRuntimeConfig,
    MissConfig,
    OFTConfig,
    OSFConfig,
    PeanutConfig,
    PsoftConfig,
    PveraConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    SupertuningConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
)
from surgery.compat.peft.kinds import PeftType, TaskType
from surgery.compat.peft.model import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftMixedModel,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
    inject_adapter_in_model,
)
from surgery.compat.peft.states import (
    get_layer_status,
    get_model_status,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from surgery.compat.peft.training import prepare_model_for_kbit_training
from surgery.errors import refuse

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "AdaLoraConfig",
    "AdamssConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BOFTConfig",
    "BdLoraConfig",
    "BeftConfig",
    "BoneConfig",
    "C3AConfig",
    "DeftConfig",
    "DeloraConfig",
    "EvaConfig",
    "FourierFTConfig",
    "FrodConfig",
    "GloraConfig",
    "GraloraConfig",
    "HRAConfig",
    "HiraConfig",
    "IA3Config",
    "KasaConfig",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "LoraRuntimeConfig",
    "MissConfig",
    "OFTConfig",
    "OSFConfig",
    "PeanutConfig",
    "PeftConfig",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PsoftConfig",
    "PveraConfig",
    "RandLoraConfig",
    "RoadConfig",
    "ShiraConfig",
    "SupertuningConfig",
    "TaskType",
    "TinyLoraConfig",
    "TrainableTokensConfig",
    "UniLoraConfig",
    "VBLoRAConfig",
    "VeraConfig",
    "WaveFTConfig",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]

_INPUT = "it adds to the input, and not to weights"
_CACHES = "it adds to attention's caches, and not to weights"
_DATA = "`surgery.compile(spec, model, data=batches)` begins an adapter by data"
_CONVERT = "`surgery.convert(folder, output, model, to=METHOD)` does that"

_ABSENT = {
    "AdaptionPromptConfig": _CACHES,
    "ArrowConfig": "its adapters are mixed by a network of their own",
    "CPTConfig": _INPUT,
    "CartridgeConfig": _CACHES,
    "CordaConfig": _DATA,
    "LilyConfig": "its adapters are shared in a way that no method here has",
    "LoftQConfig": _DATA,
    "LoraGAConfig": _DATA,
    "MontecloraConfig": "its weights are drawn anew for each output",
    "MultitaskPromptTuningConfig": _INPUT,
    "NoMatchingPeftModuleError": "what is wrong is a `surgery.SurgeryError`",
    "PeftError": "what is wrong is a `surgery.SurgeryError`",
    "PolyConfig": "its tasks are an input of their own",
    "PrefixTuningConfig": _CACHES,
    "PromptEncoderConfig": _INPUT,
    "PromptTuningConfig": _INPUT,
    "ShadowConfig": "it is a second model beside the first",
    "VeloraConfig": "it changes how activations are stored, and no equation",
    "XLoraConfig": "its adapters are mixed by a network of their own",
    "convert_to_lora": _CONVERT,
    "get_eva_state_dict": _DATA,
    "initialize_lora_eva_weights": _DATA,
    "preprocess_loraga": _DATA,
    "replace_lora_weights_loftq": _DATA,
    "save_as_lora": _CONVERT,
}


def __getattr__(name: str) -> object:
    """Names of peft's that are not here. Raises ArtifactError (E565) with the reason."""
    if name in _ABSENT:
        hint = "there are the methods of `PEFT_TYPE_TO_CONFIG_MAPPING`"
        refuse("E565", f"peft's `{name}` is not here: {_ABSENT[name]}", hint=hint)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
