"""The config classes: one for every `peft_type` that the formats know, under peft's name for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from surgery.compat.peft.config import Nested, PeftConfig


class AdaLoraConfig(PeftConfig, kind="ADALORA"):
    """The fields of `ADALORA`, with peft's defaults."""


class AdamssConfig(PeftConfig, kind="ADAMSS"):
    """The fields of `ADAMSS`, with peft's defaults."""


class BeftConfig(PeftConfig, kind="BEFT"):
    """The fields of `BEFT`, with peft's defaults."""


class BOFTConfig(PeftConfig, kind="BOFT"):
    """The fields of `BOFT`, with peft's defaults."""


class BoneConfig(PeftConfig, kind="BONE"):
    """The fields of `BONE`, with peft's defaults."""


class C3AConfig(PeftConfig, kind="C3A"):
    """The fields of `C3A`, with peft's defaults."""


class DeftConfig(PeftConfig, kind="DEFT"):
    """The fields of `DEFT`, with peft's defaults."""


class DeloraConfig(PeftConfig, kind="DELORA"):
    """The fields of `DELORA`, with peft's defaults."""


class FourierFTConfig(PeftConfig, kind="FOURIERFT"):
    """The fields of `FOURIERFT`, with peft's defaults."""


class FrodConfig(PeftConfig, kind="FROD"):
    """The fields of `FROD`, with peft's defaults."""


class GloraConfig(PeftConfig, kind="GLORA"):
    """The fields of `GLORA`, with peft's defaults."""


class GraloraConfig(PeftConfig, kind="GRALORA"):
    """The fields of `GRALORA`, with peft's defaults."""


class HiraConfig(PeftConfig, kind="HIRA"):
    """The fields of `HIRA`, with peft's defaults."""


class HRAConfig(PeftConfig, kind="HRA"):
    """The fields of `HRA`, with peft's defaults."""


class IA3Config(PeftConfig, kind="IA3"):
    """The fields of `IA3`, with peft's defaults."""


class LNTuningConfig(PeftConfig, kind="LN_TUNING"):
    """The fields of `LN_TUNING`, with peft's defaults."""


class LoHaConfig(PeftConfig, kind="LOHA"):
    """The fields of `LOHA`, with peft's defaults."""


class LoKrConfig(PeftConfig, kind="LOKR"):
    """The fields of `LOKR`, with peft's defaults."""


class LoraConfig(PeftConfig, kind="LORA"):
    """The fields of `LORA`, with peft's defaults."""


class MissConfig(PeftConfig, kind="MISS"):
    """The fields of `MISS`, with peft's defaults."""


class OFTConfig(PeftConfig, kind="OFT"):
    """The fields of `OFT`, with peft's defaults."""


class OSFConfig(PeftConfig, kind="OSF"):
    """The fields of `OSF`, with peft's defaults."""


class PeanutConfig(PeftConfig, kind="PEANUT"):
    """The fields of `PEANUT`, with peft's defaults."""


class PsoftConfig(PeftConfig, kind="PSOFT"):
    """The fields of `PSOFT`, with peft's defaults."""


class PveraConfig(PeftConfig, kind="PVERA"):
    """The fields of `PVERA`, with peft's defaults."""


class RandLoraConfig(PeftConfig, kind="RANDLORA"):
    """The fields of `RANDLORA`, with peft's defaults."""


class RoadConfig(PeftConfig, kind="ROAD"):
    """The fields of `ROAD`, with peft's defaults."""


class ShiraConfig(PeftConfig, kind="SHIRA"):
    """The fields of `SHIRA`, with peft's defaults."""


class SupertuningConfig(PeftConfig, kind="SUPERTUNING"):
    """The fields of `SUPERTUNING`, with peft's defaults."""


class TinyLoraConfig(PeftConfig, kind="TINYLORA"):
    """The fields of `TINYLORA`, with peft's defaults."""


class TrainableTokensConfig(PeftConfig, kind="TRAINABLE_TOKENS"):
    """The fields of `TRAINABLE_TOKENS`, with peft's defaults."""


class UniLoraConfig(PeftConfig, kind="UNILORA"):
    """The fields of `UNILORA`, with peft's defaults."""


class VBLoRAConfig(PeftConfig, kind="VBLORA"):
    """The fields of `VBLORA`, with peft's defaults."""


class VeraConfig(PeftConfig, kind="VERA"):
    """The fields of `VERA`, with peft's defaults."""


class WaveFTConfig(PeftConfig, kind="WAVEFT"):
    """The fields of `WAVEFT`, with peft's defaults."""


class LoraRuntimeConfig(Nested):
    """A config within `LoraConfig`."""

    defaults: ClassVar[Mapping[str, object]] = {
        "ephemeral_gpu_offload": False,
    }


class EvaConfig(Nested):
    """A config within `LoraConfig`."""

    defaults: ClassVar[Mapping[str, object]] = {
        "rho": 2.0,
        "tau": 0.99,
        "use_label_mask": True,
        "label_mask_value": -100,
        "whiten": False,
        "adjust_scaling_factors": True,
    }


class KasaConfig(Nested):
    """A config within `LoraConfig`."""

    defaults: ClassVar[Mapping[str, object]] = {
        "beta": 0.0001,
        "gamma": 0.001,
    }


class BdLoraConfig(Nested):
    """A config within `LoraConfig`."""

    defaults: ClassVar[Mapping[str, object]] = {
        "target_modules_bd_a": None,
        "target_modules_bd_b": None,
        "nblocks": 1,
        "match_strict": True,
    }


PEFT_TYPE_TO_CONFIG_MAPPING: Mapping[str, type[PeftConfig]] = PeftConfig.kinds
"""The class of each `peft_type`."""
