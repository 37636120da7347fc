"""Whole modules that an adapter of peft's has copies of: `modules_to_save`, and tuned norms.

Read from peft 0.21, `utils/other.py`: a name stands for every module whose path ends with it, as a
text does, and the file has the state of each under the names that the base has for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from typing import cast

from torch import nn

from surgery.arguments import Link
from surgery.errors import Report
from surgery.language.library import trained
from surgery.mapping.fields import ConfigFile, unknown_values
from surgery.mapping.spelling import dialect_of
from surgery.model.inventory import Inventory, joined, survey
from surgery.model.parts import ParameterSlice
from surgery.model.scopes import Region
from surgery.model.tensors import tensors
from surgery.plan import Assignment
from surgery.store import TensorFile

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


# Adapters that are copies of whole modules and nothing else, by their kind, and what stands in
# their keys between the path of a module and the name of its parameter.
OF_COPIES = {"LN_TUNING": "ln_tuning_layers"}
_KNOWN = ("peft_type", "target_modules", FIELD)


def of_copies(config: ConfigFile) -> bool:
    """Whether a config is of an adapter that is copies of whole modules and nothing else."""
    return config.values.get("peft_type") in OF_COPIES


def plain_keys(config: ConfigFile, file: TensorFile) -> TensorFile:
    """The file of such an adapter with its copies under the keys that the base has for them."""
    mark = f".{OF_COPIES[str(config.values['peft_type'])]}."
    return file.renamed({key: key.replace(mark, ".") for key in file.shapes if mark in key})


def copied_modules(
    config: ConfigFile, there: Mapping[str, str], model: nn.Module, informative: Collection[str]
) -> dict[str, Assignment]:
    """The copies of such an adapter by their names in the base.

    there: as in `saved_modules`. Raises ArtifactError: E515 for a field of the config that is not
    known, E516 where there is no copy, E518 for a parameter that the file lacks of a module of
    which it has others.
    """
    report, names = Report(), set(there.values())
    known = {*informative, *_KNOWN}
    report.extend(unknown_values(config, known, str(config.values["peft_type"])))
    every = dict(_copies(lambda path: True, survey(model), config))
    owners = {every[full].path for full in every.keys() & names}
    if not owners:
        message = "no tensor of the folder is a copy of one of the model's"
        report.error("E516", message, config.source, hint="it was made for another model")
    for full, copy in every.items():
        if copy.path in owners and full not in names:
            hint = "the folder is not whole: it has other parameters of the same module"
            report.error("E518", f"the tensors lack a copy of `{full}`", hint=hint)
    report.stop()
    return {full: copy for full, copy in every.items() if full in names}


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
        some = dict(_copies(partial(_ends, name), inventory, config))
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


def _ends(name: str, path: str) -> bool:
    return f"{dialect_of('peft').site}{path}".endswith(name)


def _copies(
    taken: Callable[[str], bool], inventory: Inventory, config: ConfigFile
) -> Iterator[tuple[str, Assignment]]:
    link = Link(trained(), ())
    for index, _, one in tensors(inventory, (Region(0),), "save"):
        if any(map(taken, one.paths)):
            entry = inventory.entries[index]
            full = joined(entry.path, one.at.parameter)
            tie = "untie" if full in inventory.ties else None
            at = ParameterSlice(one.at.parameter, bias="", tensor=True)
            yield full, Assignment(entry.path, (link,), config.span(FIELD), at, tie)
