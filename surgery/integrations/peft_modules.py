"""`modules_to_save` of a peft config: whole modules that an adapter has copies of.

Read from peft 0.21, `utils/other.py`: a name stands for every module whose path ends with it, as a
text does, and the file has the state of each under the names that the base has for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import cast

from torch import nn

from surgery.arguments import Link
from surgery.errors import Report
from surgery.language.library import trained
from surgery.mapping.fields import ConfigFile
from surgery.mapping.spelling import dialect_of
from surgery.model.inventory import Inventory, joined, survey
from surgery.model.parts import ParameterSlice
from surgery.model.scopes import Region
from surgery.model.tensors import tensors
from surgery.plan import Assignment

FIELD = "modules_to_save"


def understood(config: ConfigFile) -> tuple[str, ...]:
    """The field, if it says what it can say."""
    return () if _names(config) is None else (FIELD,)


def _names(config: ConfigFile) -> list[str] | None:
    stated = config.values.get(FIELD)
    if stated is None:
        return []
    names = cast("list[object]", stated) if isinstance(stated, list) else [None]
    return cast("list[str]", names) if all(isinstance(n, str) and n for n in names) else None


def saved_modules(
    config: ConfigFile, there: Mapping[str, str], model: nn.Module
) -> dict[str, Assignment]:
    """The copies by their names in the base.

    there: the keys of the file that are names of the base, with these names. Raises ArtifactError:
    E516 for a name that no module has, E518 for a parameter of such a module that the file lacks.
    """
    report = Report()
    found: dict[str, Assignment] = {}
    inventory = survey(model)
    for name in _names(config) or ():
        some = dict(_copies(name, inventory, config))
        if not some:
            near = get_close_matches(name, [e.path for e in inventory.entries], 1)
            hint = f"did you mean `{near[0]}`?" if near else "it was made for another model"
            message = f"the model has no module `{name}` with parameters"
            report.error("E516", message, config.span(FIELD), hint=hint)
        for full in sorted(some.keys() - set(there.values())):
            hint = f"the folder is not whole: `{FIELD}` names its module"
            report.error("E518", f"the tensors lack a copy of `{full}`", hint=hint)
        found |= some
    report.stop()
    return found


def _copies(
    name: str, inventory: Inventory, config: ConfigFile
) -> Iterator[tuple[str, Assignment]]:
    link, prefix = Link(trained(), ()), dialect_of("peft").site
    for index, _, one in tensors(inventory, (Region(0),), "save"):
        if any(f"{prefix}{path}".endswith(name) for path in one.paths):
            entry = inventory.entries[index]
            full = joined(entry.path, one.at.parameter)
            tie = "untie" if full in inventory.ties else None
            at = ParameterSlice(one.at.parameter, bias="", tensor=True)
            yield full, Assignment(entry.path, (link,), config.span(FIELD), at, tie)
