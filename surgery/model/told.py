"""What a model says of itself: its input embeddings, its output head, its normalisations.

Each function gives paths of modules; none if the model does not say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from surgery.model.inventory import Inventory, joined

_NORM = re.compile(r"Norm([123]d)?$")


def embeddings(inventory: Inventory) -> frozenset[str]:
    """What `get_input_embeddings()` gives, and the embeddings that share its weight.

    An encoder and a decoder often have an embedding each, tied to the one that the model names.
    """
    named = _below(_answers("get_input_embeddings", inventory), inventory)
    pool = [inventory.entries[i] for i in inventory.pool]
    known = {e.path for e in pool if isinstance(e.module, nn.Embedding)}
    tied = {
        other.removesuffix(".weight")
        for p in named
        for other in inventory.ties.get(joined(p, "weight"), ())
    }
    return named | (tied & known)


def heads(inventory: Inventory) -> frozenset[str]:
    """What `get_output_embeddings()` gives."""
    return _below(_answers("get_output_embeddings", inventory), inventory)


def norms(inventory: Inventory) -> frozenset[str]:
    """The modules whose class is called a norm, such as `LayerNorm`, `LlamaRMSNorm`."""
    return frozenset(e.path for e in inventory.entries if _NORM.search(e.cls.__name__))


def _answers(question: str, inventory: Inventory) -> Iterator[nn.Module]:
    """What the outermost modules that know an answer give; those inside them are not asked."""
    at = 0
    while at < len(inventory.entries):
        entry = inventory.entries[at]
        answer = _asked(entry.module, question)
        if answer is None:
            at += 1
        else:
            yield answer
            at = entry.end


def _asked(module: nn.Module, question: str) -> nn.Module | None:
    method = getattr(module, question, None)
    if not callable(method):
        return None
    try:
        answer = method()
    except Exception:  # whatever the method of a model that has none does
        return None
    return answer if isinstance(answer, nn.Module) else None


def _below(modules: Iterator[nn.Module], inventory: Inventory) -> frozenset[str]:
    """The candidates that some modules are, or hold, by all their paths."""
    wanted = {id(module) for module in modules}
    entries = inventory.entries
    tops = (i for i, entry in enumerate(entries) if wanted and id(entry.module) in wanted)
    return frozenset(entries[i].path for top in tops for i in inventory.below(top))
