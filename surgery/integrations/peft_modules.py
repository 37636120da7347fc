"""Whole modules that an adapter of peft's has copies of: `modules_to_save`, and tuned norms.

Read from peft 0.21, `utils/other.py`: a name stands for every module whose path ends with it, as a
text does, and the file has the state of each under the names that the base has for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Set
from difflib import get_close_matches
from functools import partial
from typing import cast

from torch import nn

from surgery.arguments import Link
from surgery.errors import Report
from surgery.language.library import trained
from surgery.mapping import StateDictMapping
from surgery.mapping.copies import ALL_BIASES, BIAS, NO_BIASES, heads_of
from surgery.mapping.fields import ConfigFile, unknown_values
from surgery.mapping.forms import shown
from surgery.mapping.spelling import dialect_of
from surgery.model.inventory import Inventory, joined, survey
from surgery.model.parts import ParameterSlice
from surgery.model.scopes import Region
from surgery.model.tensors import tensors
from surgery.plan import Assignment
from surgery.store import TensorFile

FIELD = "modules_to_save"


def understood(config: ConfigFile) -> tuple[str, ...]:
    """The fields that are read here, if they say what they can say."""
    return () if _names(config) is None else (FIELD,)


def _names(config: ConfigFile) -> list[str] | None:
    stated = config.values.get(FIELD)
    if stated is None:
        return []
    names = cast("list[object]", stated) if isinstance(stated, list) else [None]
    return cast("list[str]", names) if all(isinstance(n, str) and n for n in names) else None


_KNOWN = ("peft_type", "target_modules", FIELD)


def of_copies(config: ConfigFile) -> bool:
    """Whether a config is of an adapter that is copies of whole modules and nothing else."""
    copies = dialect_of("peft").copies
    return copies is not None and config.values.get("peft_type") == copies[0]


def plain_keys(file: TensorFile) -> TensorFile:
    """The file of such an adapter with its copies under the keys that the base has for them."""
    mark = _mark()
    return file.renamed({key: key.replace(mark, ".") for key in file.shapes if mark in key})


def marked_keys(mapping: StateDictMapping, file: TensorFile) -> TensorFile:
    """The same with its copies under the keys that such an adapter has for them."""
    keys = {key: key.replace(_mark(), ".") for row in mapping.rows if (key := row.key("peft"))}
    return file.renamed({base: key for key, base in keys.items() if base in file.shapes})


def _mark() -> str:
    """What stands in keys between the path of a copied module and the name of its parameter."""
    copies = dialect_of("peft").copies
    return "" if copies is None else f".{copies[1]}."


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
        if not some and name not in heads_of(config.get("task_type")):
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


def trained_biases(
    config: ConfigFile, field: str, paths: Set[str], there: Mapping[str, str], model: nn.Module
) -> dict[str, Assignment]:
    """The copies of biases that a field of the config asks for, by their names in the base.

    paths: of the modules that have adapters. there: as in `saved_modules`. Raises ArtifactError
    (E518) for a bias that the file lacks.
    """
    stated, report = config.get(field, NO_BIASES), Report()
    if stated == NO_BIASES:
        return {}
    every = dict(_copies(lambda path: True, survey(model), config, field))
    found = {
        full: copy
        for full, copy in every.items()
        if copy.at.parameter == BIAS and (stated == ALL_BIASES or copy.path in paths)
    }
    for full in sorted(found.keys() - set(there.values())):
        hint = f"the folder is not whole: `{field}` is {shown(stated)}"
        report.error("E518", f"the tensors lack a copy of `{full}`", config.span(field), hint=hint)
    report.stop()
    return found


def _ends(name: str, path: str) -> bool:
    return f"{dialect_of('peft').site}{path}".endswith(name)


def _copies(
    taken: Callable[[str], bool], inventory: Inventory, config: ConfigFile, field: str = FIELD
) -> Iterator[tuple[str, Assignment]]:
    link = Link(trained(), ())
    for index, _, one in tensors(inventory, (Region(0),), "save"):
        if any(map(taken, one.paths)):
            entry = inventory.entries[index]
            full = joined(entry.path, one.at.parameter)
            tie = "untie" if full in inventory.ties else None
            at = ParameterSlice(one.at.parameter, bias="", tensor=True)
            yield full, Assignment(entry.path, (link,), config.span(field), at, tie)
