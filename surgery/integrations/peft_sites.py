"""The sites that a folder of peft's names by its keys: where each lies, and what the config sees.

Read from peft 0.21: a module that it adapts is put into one of its own, as its `base_layer`. An
attention of torch's is adapted as a whole, and `target_parameters` are adapted one around the
other, in the order of the module's parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from typing import cast

from torch import nn

from surgery.errors import Report
from surgery.mapping.fields import ConfigFile
from surgery.mapping.seats import Joint, Times, joint_of
from surgery.model.candidates import candidates
from surgery.model.holder import parameters_of
from surgery.model.inventory import Entry, Inventory, joined, survey
from surgery.model.layers import KINDS, MATRIX
from surgery.model.parts import WHOLE, ParameterSlice

PARAMETERS = "target_parameters"


@dataclass(frozen=True, slots=True)
class Named:
    """A site that a folder names.

    path: of its module. named, kind: by which path, and as what kind of layer, the config sees it.
    times: of its arguments those that are a multiple of what the config says.
    """

    path: str
    named: str
    kind: str
    at: ParameterSlice = WHOLE
    times: Times = ()


def named_sites(
    paths: Set[str], around: str, config: ConfigFile, model: nn.Module, report: Report
) -> Iterator[Named]:
    """The sites of the modules at some paths, in module order; what is no site is reported (E516).

    around: what an adapted module is called in the module around it.
    """
    inventory = survey(model)
    entries = {entry.path: entry for entry in inventory.entries}
    modules = {path if path in entries else _without(around, path) for path in paths}
    for path in sorted(modules - entries.keys()):
        near = get_close_matches(path, entries, 1)
        hint = f"the nearest is `{near[0]}`" if near else "it was made for another model"
        report.error("E516", f"the model has no module `{path}`", hint=hint)
    for index, entry in enumerate(inventory.entries):
        if entry.path in modules and index == entry.first:
            yield from _of_module(index, modules, config, inventory, report)


def _without(around: str, path: str) -> str:
    return ".".join(name for name in path.split(".") if name != around)


def _of_module(
    index: int, modules: Set[str], config: ConfigFile, inventory: Inventory, report: Report
) -> Iterator[Named]:
    entry = inventory.entries[index]
    joint = joint_of(entry.module)
    parameters = _listed(entry, config)
    if joint is not None:
        yield from _parameters(index, [joint.parameter], inventory, report, joint)
    elif parameters:
        yield from _parameters(index, parameters, inventory, report)
    elif entry.kind is None:
        name = type(entry.module).__name__
        hint = f"known are {', '.join(kind.name for kind in KINDS)}"
        report.error("E516", f"`{entry.path}` is a {name}, which has no known kind", hint=hint)
    else:
        yield _of_weight(entry, modules, inventory)


def _of_weight(entry: Entry, modules: Set[str], inventory: Inventory) -> Named:
    """A layer; one whose weight is that of an attention is seen as a part of it."""
    assert entry.kind is not None  # which was asked before
    above = inventory.entries[entry.parent] if entry.parent >= 0 else None
    joint = joint_of(above.module) if above is not None and above.path in modules else None
    if above is None or joint is None or joint.child != entry.name:
        return Named(entry.path, entry.path, entry.kind.name)
    return Named(entry.path, above.path, joint.kind, times=joint.times)


def _listed(entry: Entry, config: ConfigFile) -> list[str]:
    """The parameters of a module that the config names, in their order."""
    stated = config.get(PARAMETERS)
    names = [str(n) for n in cast("list[object]", stated)] if isinstance(stated, list) else []
    return [
        name
        for name, parameter in parameters_of(entry.module).items()
        if parameter is not None and _ends(joined(entry.path, name), names)
    ]


def _ends(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _parameters(
    index: int,
    names: Sequence[str],
    inventory: Inventory,
    report: Report,
    joint: Joint | None = None,
) -> Iterator[Named]:
    """The matrices that some parameters of a module are (E516 for one that is none)."""
    entry = inventory.entries[index]
    found = {c.at.parameter: c for c in candidates(index, inventory) if c.at.whole}
    for name in names:
        one, path = found.get(name), joined(entry.path, name)
        if one is None or one.kind is None:
            message = f"`{path}` is no matrix, nor a batch of them"
            report.error("E516", message, hint="it was made for another model")
        elif one.at == WHOLE and one.kind.to_matrix is not MATRIX.to_matrix:
            message = f"`{path}` is named as a parameter, and does not lie as [out, in]"
            hint = f"name its module `{entry.path}` in `target_modules`, and train it again"
            report.error("E516", message, hint=hint)
        elif joint is not None:
            yield Named(entry.path, entry.path, joint.kind, one.at)
        else:
            yield Named(entry.path, path, one.kind.name, one.at)
