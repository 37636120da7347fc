"""What a config of peft's says besides its targets: layers, exclusions, modules and biases trained.

Read from peft 0.21: `layers_to_transform` counts by the first number of a path that has two names
before it, or by the number behind a name of `layers_pattern`; modules to save are found by the end
of a text, and nothing in them is adapted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from torch import nn

from surgery.errors import refuse
from surgery.integrations.targets import Chosen, all_of, ending, matching, named, targets_of
from surgery.language import syntax as ast
from surgery.mapping.fields import ConfigFile
from surgery.mapping.forms import Anything, OneOf, default_of, fields_of, form_of, same, shown
from surgery.model.holder import parameters_of
from surgery.model.inventory import Inventory, joined, survey

_ADDED = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The modules that peft saves besides for a task, if the model has them."""

Takes = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Layers:
    """Some indices, of what a name contains, or of the outermost list where there is none."""

    indices: tuple[int, ...]
    names: tuple[str, ...]

    def index(self, path: str) -> int | None:
        """The index that a path has in one of them."""
        parts = path.split(".")
        for name in self.names:
            for here, after in pairwise(parts[:-1]):
                if here == name and after.isdigit():
                    return int(after)
        if self.names:
            return None
        return next((int(p) for p in parts[2:-1] if p.isdigit()), None)

    def clauses(self, there: Collection[int] | None, names: Collection[str]) -> tuple[str, str]:
        """`in …` and a condition; of the indices those that there are, if that is known."""
        indices = [i for i in self.indices if there is None or i in there]
        if self.names:
            one = _ranged(indices)
            return " | ".join(f"{name}[{one}]" for name in names), ""
        return "", f"({' or '.join(f'layer == {i}' for i in indices)})"


def _ranged(indices: Sequence[int]) -> str:
    first, last = min(indices, default=0), max(indices, default=0)
    if len(indices) > 1 and [*indices] == [*range(first, last + 1)]:
        return f"{first}:{last + 1}"
    return ", ".join(map(str, indices))


@dataclass(frozen=True, slots=True)
class Clauses:
    """All that a config says besides its targets.

    but: what is excluded. saved: the modules that are trained as they are; added: of these, which
    only the task asks for.
    """

    config: ConfigFile
    layers: Layers | None
    but: tuple[Chosen, ...]
    saved: tuple[str, ...]
    added: tuple[str, ...]
    inventory: Inventory | None

    def takes(self, path: str) -> bool:
        """Whether a module that is a target stays one."""
        return self._in_layers(path) and not any(c.takes(path) for c in self._excluded())

    def _in_layers(self, path: str) -> bool:
        return self.layers is None or self.layers.index(path) in self.layers.indices

    def _excluded(self) -> Iterator[Chosen]:
        yield from self.but
        for name in (*self.saved, *self.added):
            yield named(name)
            yield Chosen(f"{named(name).selector}.**", lambda path, n=name: _inside(n, path))

    def around(self, where: str, but: str, targets: Takes) -> str:
        """The clauses between a selector and `apply`, for what would take some paths."""
        scope, layer = "", ""
        if self.layers is not None:
            paths = [p for p in self._paths() if targets(p)]
            there = {i for p in paths if (i := self.layers.index(p)) is not None}
            names = [n for n in self.layers.names if not paths or any(_inside(n, p) for p in paths)]
            scope, layer = self.layers.clauses(there if self.inventory else None, names)
        left_out = [c.selector for c in self._excluded() if self._removes(c, targets)]
        condition = " and ".join(filter(None, (where, layer)))
        excepted = " | ".join(dict.fromkeys(filter(None, (but, *left_out))))
        parts = {"in": scope, "where": condition, "except": excepted}
        return " ".join(f"{word} {text}" for word, text in parts.items() if text)

    def _paths(self) -> list[str]:
        return [] if self.inventory is None else [e.path for e in self.inventory.entries]

    def _removes(self, chosen: Chosen, targets: Takes) -> bool:
        if self.inventory is None:
            return chosen in self.but
        return any(targets(p) and self._in_layers(p) and chosen.takes(p) for p in self._paths())

    def selects(self, chosen: Chosen) -> bool:
        """Whether the model has a module of those chosen, with parameters."""
        return any(chosen.takes(path) and self.takes(path) for path in self._owners())

    def tie(self, paths: Iterable[str]) -> str:
        """`untie` where one of some paths shares its weight."""
        if self.inventory is None:
            return ""
        return "untie" * any(joined(path, "weight") in self.inventory.ties for path in paths)

    # ------------------------------------------------------------------------------- trained

    def trained(self, biases: str, chosen: Sequence[Chosen], sites: Sequence[str]) -> Iterator[str]:
        """The statements for biases and whole modules.

        biases: the field that says whose are trained, "" for none. chosen: the targets.
        sites: the paths of the sites, where the model is known.
        """
        stated = self.config.get(biases) if biases else None
        saved = [*self._saved()]
        if stated == "all":
            yield from self._all_biases()
        elif stated not in (None, "none", False):
            yield from self._own_biases(chosen, sites)
        yield from saved

    def _all_biases(self) -> Iterator[str]:
        names = [*self._parameters()]
        inside = [ending(n).selector for n in self.saved if self.inventory is None] + [
            named(m).selector
            for name in (*self.saved, *self.added)
            for m in self._modules(name)
            if any("bias" in p and _inside(m, p) for p in names)
        ]
        but = f" except {' | '.join(inside)}" if inside else ""
        if self.inventory is None:
            yield f"optional train /.*bias.*/{but}"
        elif any("bias" in name for name in names):
            yield f"train /.*bias.*/{but}"

    def _own_biases(self, chosen: Sequence[Chosen], sites: Sequence[str]) -> Iterator[str]:
        if self.inventory is None:
            names = [f"{c.tail}.bias" if c.tail else f"({c.selector}).bias" for c in chosen]
            if not all(c.tail for c in chosen):
                hint = "give the model; its biases are then named one by one"
                refuse("E515", "which biases are trained is not said by names", hint=hint)
            around = self.around("", "", lambda path: True)
            yield f"optional train {' | '.join(names)} {around}"
            return
        there = {*self._parameters()}
        mine = {name for path in sites if (name := joined(path, "bias")) in there}
        short = sorted({_last(name) for name in mine})
        alike = {name for name in there if any(name == s or name.endswith(f".{s}") for s in short)}
        if mine:
            yield f"train {' | '.join(short if alike == mine else sorted(mine))}"

    def _parameters(self) -> Iterator[str]:
        for entry in self.inventory.entries if self.inventory is not None else ():
            for name, parameter in parameters_of(entry.module).items():
                if parameter is not None:
                    yield joined(entry.path, name)

    def _saved(self) -> Iterator[str]:
        if self.inventory is None:
            yield from (f"save {ending(name).selector}" for name in self.saved)
            yield from (f"optional save {ending(name).selector}" for name in self.added)
            return
        ties = self.inventory.ties
        for name in dict.fromkeys((*self.saved, *self.added)):
            modules = self._modules(name)
            shared = any(any(_inside(m, tied) for m in modules) for tied in ties)
            if modules:
                exact = {p for p in self._owners() if named(name).takes(p)} == {*modules}
                selector = named(name).selector if exact else ending(name).selector
                yield f"save {selector}{' untie' * shared}"
            elif name in self.saved:
                yield f"# modules_to_save: the model has no module that ends with {shown(name)}"

    def _modules(self, name: str) -> list[str]:
        return [path for path in self._owners() if path.endswith(name)]

    def _owners(self) -> list[str]:
        """The modules that have parameters, by themselves or in what is in them."""
        names = [*self._parameters()]
        return [p for p in self._paths() if p and any(n.startswith(f"{p}.") for n in names)]


def _last(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _inside(name: str, path: str) -> bool:
    """Whether a path lies in what a name, or some, stands for."""
    return f".{name}." in f".{path}"


def clauses_of(config: ConfigFile, model: nn.Module | None) -> Clauses:
    """What a config says besides its targets.

    Raises ArtifactError (E515) for a field of another form than peft gives it.
    """
    stated = config.get("exclude_modules") or ()
    if isinstance(stated, str):
        but = (matching(stated, config.span("exclude_modules")),)
    else:
        but = all_of(map(str, cast("list[object]", stated)))
    saved = tuple(map(str, cast("list[object]", config.get("modules_to_save") or [])))
    added = tuple(n for n in _ADDED.get(str(config.get("task_type")), ()) if n not in saved)
    inventory = None if model is None else survey(model)
    return Clauses(config, _layers(config), but, saved, added, inventory)


def targeted(config: ConfigFile, model: nn.Module) -> frozenset[str]:
    """The paths of the modules that a config puts its method on. Raises as what it calls does."""
    chosen, clauses = targets_of(config, model), clauses_of(config, model)
    paths = (entry.path for entry in survey(model).entries)
    return frozenset(p for p in paths if any(c.takes(p) for c in chosen) and clauses.takes(p))


def _layers(config: ConfigFile) -> Layers | None:
    stated: Any = config.get("layers_to_transform")
    # Beside a regex peft passes them over.
    if stated is None or stated == [] or isinstance(config.get("target_modules"), str):
        return None
    named_in: Any = config.get("layers_pattern") or []
    names = (named_in,) if isinstance(named_in, str) else tuple(map(str, named_in))
    if not all(name.isidentifier() for name in names):
        hint = "write the names of the lists of layers, one each"
        refuse("E515", "`layers_pattern` is a regex", config.span("layers_pattern"), hint=hint)
    try:
        indices = (stated,) if isinstance(stated, int) else tuple(sorted({int(i) for i in stated}))
    except (TypeError, ValueError):
        span, hint = config.span("layers_to_transform"), "it is a number, or a list of numbers"
        refuse("E515", f"`layers_to_transform` is {shown(stated)}", span, hint=hint)
    return Layers(cast("tuple[int, ...]", indices), names)


# ------------------------------------------------------------------------------------ comments


def described(
    config: ConfigFile,
    fmt: ast.Format | None,
    informative: Collection[str],
    model: nn.Module | None,
) -> Iterator[str]:
    """The comments above a spec: what it is made of, and each field that it leaves out."""
    whose = "" if model is None else f" for {type(model).__name__}"
    yield f"# What peft's {config.get('peft_type')} is{whose}, by its config."
    fields = () if fmt is None else fields_of(fmt)
    forms = {item.name: (item, form_of(item)) for item in fields}
    for name, value in config.values.items():
        if _off(value) or name in _SAID:
            continue
        item, form = forms.get(name, (None, None))
        if name in informative:
            yield f"# {name} = {shown(value)}: it says nothing of the adapter itself"
        elif isinstance(form, Anything):
            yield f"# {name} = {shown(value)}: it has no meaning here"
        elif isinstance(form, OneOf) and item is not None and not _usual(value, item, form):
            first = shown(form.values[0])
            yield f"# {name} = {shown(value)}: the same equation as with {first}, begun as there"
    if model is None:
        yield "# Not compared with a model: a name that selects nothing is an error there."
    yield ""


_SAID = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})


def _usual(value: object, item: ast.Field, form: OneOf) -> bool:
    return same(value, form.values[0]) or same(value, default_of(item))


def _off(value: object) -> bool:
    return value is None or value is False or value in ([], {}, "")
