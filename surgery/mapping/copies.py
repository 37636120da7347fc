"""What a config says of an adapter's copies: whole modules by name, and biases by an option."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from torch import nn

from surgery.model.holder import modules_of, parameters_of
from surgery.model.inventory import Inventory, survey
from surgery.planned import PlannedSite

NO_BIASES, ALL_BIASES = "none", "all"

BIAS = "bias"


@dataclass(frozen=True, slots=True)
class Copied:
    """The copies of an adapter: the paths of whole modules, and what is said of biases.

    biases: `none`, `all` of the model, or the name that stands for those of adapted layers.
    """

    modules: tuple[str, ...] = ()
    biases: str = NO_BIASES


def copied(
    sites: Sequence[PlannedSite], model: nn.Module | None, own_biases: str | None
) -> Copied | str:
    """How a config can say which copies there are; the reason why it cannot.

    own_biases: what stands for the biases of adapted layers; None if no biases can be named.
    """
    copies = {s.path: s for s in sites if s.site.at.tensor and not s.site.at.picked}
    if not copies:
        return Copied()
    some = next(iter(copies))
    if model is None:
        return f"which modules are copied as a whole is seen in the model alone, such as `{some}`'s"
    inventory = survey(model)
    adapted = {site.site.owner for site in sites if not site.site.at.tensor}
    every = frozenset(_biases(inventory))
    biases = every if every <= copies.keys() and own_biases is not None else frozenset[str]()
    modules, covered = _modules(copies.keys(), biases, inventory)
    rest = copies.keys() - covered - biases
    own = {f"{path}.{BIAS}" if path else BIAS for path in adapted} & every
    if own_biases is not None and rest and rest == own - covered:
        biases, rest = frozenset(own), set[str]()
        named = own_biases
    else:
        named = ALL_BIASES if biases and not biases <= covered else NO_BIASES
    if rest:
        return f"it names no single parameters to be trained, such as `{min(rest)}`"
    return _clash(modules, inventory) or Copied(modules, named)


def _biases(inventory: Inventory) -> Iterator[str]:
    for entry in inventory.entries:
        if parameters_of(entry.module).get(BIAS) is not None:
            yield f"{entry.path}.{BIAS}" if entry.path else BIAS


def _modules(
    copies: Set[str], biases: Set[str], inventory: Inventory
) -> tuple[tuple[str, ...], set[str]]:
    """The outermost modules of which all is copied, and not biases alone; what they cover."""
    entries, found, covered = inventory.entries, list[str](), set[str]()
    index = 0
    while index < len(entries):
        entry = entries[index]
        own = {name for e in entries[index : entry.end] for name in _parameters(e.path, e.module)}
        if entry.path and own and own <= copies and not own <= biases:
            found.append(entry.path)
            covered |= own
            index = entry.end
        else:
            index += 1
    return tuple(found), covered


def _parameters(path: str, module: nn.Module) -> Iterator[str]:
    names = (name for name, p in parameters_of(module).items() if p is not None)
    yield from (f"{path}.{name}" if path else name for name in names)


def _clash(modules: Sequence[str], inventory: Inventory) -> str:
    """Why some names would mean more than their own modules, for they are taken as endings."""
    for name in modules:
        for entry in inventory.entries:
            if entry.path != name and entry.path.endswith(name) and entry.path not in modules:
                return (
                    f"it names a module to be copied by the end of its path, and `{name}` is the "
                    f"end of `{entry.path}` too"
                )
    return ""


# ------------------------------------------------------------------------- what the base is


@dataclass(frozen=True, slots=True)
class Task:
    """What models of some classes are for.

    heads: the ends of the paths of modules that are copied whenever a config has this task.
    """

    name: str
    heads: tuple[str, ...] = ()


TASKS: Mapping[str, Task] = {
    "ForCausalLM": Task("CAUSAL_LM"),
    "LMHeadModel": Task("CAUSAL_LM"),
    "ForConditionalGeneration": Task("SEQ_2_SEQ_LM"),
    "ForSequenceClassification": Task("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": Task("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": Task("QUESTION_ANS", ("qa_outputs",)),
}
"""By the end of the name of a model's class."""


def heads_of(task: object) -> frozenset[str]:
    """The heads that a config names by its task alone, whether or not the model has them."""
    return frozenset(head for one in TASKS.values() if one.name == task for head in one.heads)


def about(model: nn.Module, modules: Sequence[str]) -> dict[str, object]:
    """The fields that say what the base is, as far as it is known; `modules` are copied whole."""
    from surgery.model.layers import base_class

    config = getattr(model, "config", None)
    name, cls = getattr(config, "_name_or_path", ""), base_class(model).__name__
    found: dict[str, object] = {"base_model_name_or_path": name} if name else {}
    task = next((t for end, t in TASKS.items() if cls.endswith(end)), None)
    if task is None or getattr(model, "main_input_name", "") != "input_ids":
        return found
    encoder = getattr(config, "is_encoder_decoder", False)
    paths = [path for path, _ in modules_of(model)]
    heads = [p for p in paths if p.endswith(task.heads)] if task.heads else []
    fits = encoder if task.name.startswith("SEQ_2") else not encoder or bool(task.heads)
    if fits and set(heads) <= set(modules):
        found["task_type"] = task.name
    return found
