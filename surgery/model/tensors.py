"""Parameters as they lie, of any number of axes: what `train` and `save` may take of a model.

A parameter answers by its own path and by those of the modules that it is in, up to the scope. To
`save` it answers by its modules alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

from torch import nn

from surgery.algebra.mentions import nodes
from surgery.errors import Report
from surgery.language import syntax as ast
from surgery.model.candidates import Candidate
from surgery.model.holder import parameters_of
from surgery.model.inventory import Entry, Inventory, joined
from surgery.model.layers import TENSOR, base_class
from surgery.model.parts import ParameterSlice
from surgery.model.roles import Tails, compiled
from surgery.model.scopes import Region


def tensors(
    inventory: Inventory, regions: Sequence[Region], verb: ast.Verb
) -> list[tuple[int, Region, Candidate]]:
    """The parameters in some regions, in order, each with its entry and the first region it is in.

    One matrix of a batch, or the rows of a head, is no parameter: such a region has none.
    """
    found: dict[int, Region] = {}
    for region in regions:
        if region.matrix is None and region.head is None:
            for index in range(region.entry, inventory.entries[region.entry].end):
                found.setdefault(index, region)
    return [
        (index, region, one)
        for index, region in sorted(found.items(), key=lambda row: row[0])
        for one in _owned(index, region, inventory, verb)
    ]


def _owned(index: int, region: Region, inventory: Inventory, verb: ast.Verb) -> Iterator[Candidate]:
    entry = inventory.entries[index]
    modules = tuple(_modules(index, region, inventory))
    for name, parameter in parameters_of(entry.module).items():
        if parameter is not None:
            path = joined(entry.path, name)
            by = modules if verb == "save" else (path, *modules)
            at = ParameterSlice(name, bias="", tensor=True)
            yield Candidate(at, path, TENSOR, shy=not by, by=by)


def _modules(index: int, region: Region, inventory: Inventory) -> Iterator[str]:
    """The paths of an entry and of what it is in, up to the region's own, the innermost first."""
    while index >= region.entry:
        entry = inventory.entries[index]
        if entry.path:
            yield entry.path
        index = entry.parent


def modules_meant(
    selector: ast.Selector, taken: Iterable[Candidate], inventory: Inventory
) -> frozenset[str]:
    """The modules that a selector names, of which some parameters were taken; the outermost."""
    some = (n for n in nodes(selector) if isinstance(n, ast.Regex | ast.Glob | ast.Role))
    every = [compiled(node, inventory, Report()) for node in some]
    patterns = [pattern for pattern in every if pattern is not None]
    found: set[str] = set()
    for one in taken:
        named = [p for p in one.paths if any(pattern.matches_tail(p) for pattern in patterns)]
        found.add((named or [*one.paths])[-1 if named else 0])
    return frozenset(found)


# --------------------------------------------------------------------------- selecting nothing


def noun(names: Iterable[str], paths: Iterable[str], verb: ast.Verb) -> str:
    """What has some names: parameters or modules. `paths` are those of all parameters."""
    endings = tuple(f".{name}" for name in names)
    own = verb == "train" and any(f".{path}".endswith(endings) for path in paths)
    return "parameter" if own else "module"


def elsewhere(pattern: Tails, inventory: Inventory, verb: ast.Verb, text: str) -> str:
    """What a pattern would take outside of a scope, or takes that can be none of it; or ""."""
    for entry in inventory.entries:
        said = _said_of_own(pattern, entry, verb, text)
        if not said and entry.path and pattern.matches_tail(entry.path):
            said = _said_of_module(entry, inventory, text)
        if said:
            return said
    return ""


def _said_of_own(pattern: Tails, entry: Entry, verb: ast.Verb, text: str) -> str:
    for name, parameter in parameters_of(entry.module).items():
        path = joined(entry.path, name)
        if not pattern.matches_tail(path):
            continue
        if parameter is None:
            return f"`{path}` is absent: this {_named(entry)} has none"
        if verb == "save":
            return f"`{path}` is a parameter, and `save` takes modules; `train` takes it"
        return f"`{path}` is outside {text}, or only a part of it is inside"
    for name in _buffers(entry.module):
        if pattern.matches_tail(joined(entry.path, name)):
            return f"`{joined(entry.path, name)}` is a buffer, and only parameters are trained"
    return ""


def _said_of_module(entry: Entry, inventory: Inventory, text: str) -> str:
    below = inventory.entries[inventory.entries.index(entry) : entry.end]
    if any(p is not None for e in below for p in parameters_of(e.module).values()):
        return f"`{entry.path}` is outside {text}"
    return f"`{entry.path}` is a {_named(entry)}, which has no parameters"


def _named(entry: Entry) -> str:
    return base_class(entry.module).__name__


def _buffers(module: nn.Module) -> Mapping[str, object]:
    return cast("Mapping[str, object]", vars(module)["_buffers"])


def buffers_beside(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's own buffers that are saved with it; no copy is made of them."""
    kept = cast("set[str]", vars(module)["_non_persistent_buffers_set"])
    return tuple(n for n, b in _buffers(module).items() if b is not None and n not in kept)
