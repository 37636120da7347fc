"""Every tensor's names: in the adapted model, in files, and in the formats of others."""

from surgery.mapping.config import ForeignConfig, Reason, foreign_config, peft_config
from surgery.mapping.keys import Row, StateDictMapping, mapping_of
from surgery.mapping.spelling import Spelling

__all__ = [
    "ForeignConfig",
    "Reason",
    "Row",
    "Spelling",
    "StateDictMapping",
    "foreign_config",
    "mapping_of",
    "peft_config",
]
