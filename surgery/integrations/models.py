"""Adapted models of transformers by the calls that people know of them.

`enable` puts the verbs for adapters on a model; the others read, write and send what is adapted.
"""

from surgery.integrations.hub import Pushed, card, push_to_hub
from surgery.integrations.pretrained import SavedBase, from_pretrained, save_base, save_pretrained
from surgery.integrations.verbs import enable

__all__ = [
    "Pushed",
    "SavedBase",
    "card",
    "enable",
    "from_pretrained",
    "push_to_hub",
    "save_base",
    "save_pretrained",
]
