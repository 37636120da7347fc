"""Where sites stand in a format that puts a module of its own around each that it adapts.

Such a module has the tensors of one site, and the adapted one as a child: so the keys of all that
is below have the child's name in them, and one that has several sites stands in as many modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from surgery.arguments import Arguments
from surgery.mapping.spelling import Dialect
from surgery.model.holder import ADAPTERS, children_of, parameters_of
from surgery.model.layers import base_class, qualified_name
from surgery.planned import PlannedSite

Times = tuple[tuple[str, int], ...]
"""Arguments by name, each with a factor."""


@dataclass(frozen=True, slots=True)
class Joint:
    """Modules that a format names as one: a parameter of their own, and the weight of a child.

    kind: as what kind of layer its configs see both. times: of the child's arguments those that are
        a multiple of what its configs say, and which.
    """

    parameter: str
    child: str
    kind: str
    times: Times = ()


# peft adds the change of the output projection twice, in its forward and in its merge.
JOINTS: Mapping[str, Joint] = {
    "torch.nn.modules.activation.MultiheadAttention": Joint(
        "in_proj_weight", "out_proj", "attention", (("alpha", 2),)
    ),
}


def multiplied(arguments: Arguments, times: Times) -> Arguments:
    """Arguments of which some are so many times what a config says."""
    factors = dict(times)
    return tuple((n, cast(float, v) * factors[n] if n in factors else v) for n, v in arguments)


def divided(arguments: Arguments, times: Times) -> Arguments:
    """What a config says of arguments of which some are so many times that."""
    factors = dict(times)
    return tuple((n, cast(float, v) / factors[n] if n in factors else v) for n, v in arguments)


def joint_of(module: nn.Module | None) -> Joint | None:
    """The row that holds for a module, if one does."""
    above = () if module is None else base_class(module).__mro__
    return next((r for c in above if (r := JOINTS.get(qualified_name(c))) is not None), None)


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a site stands in a format, and what its configs call it.

    module: the path of the module that has the tensors, of the added ones as well.
    named: the path by which configs name the site. kind: as what kind of layer they see it.
    parameter: whether it is named as a parameter, and not by its module.
    joint: the path of the modules that are named as one, if it is one of their sites. times: of
        its arguments those that are a multiple of what configs say.
    tensor: what trained rows of a table are called there; "" where they have no place.
    """

    module: str
    named: str
    kind: str
    parameter: bool = False
    joint: str | None = None
    times: Times = ()
    tensor: str = ""


def seats_of(sites: Sequence[PlannedSite], dialect: Dialect) -> tuple[Seat, ...]:
    """The seat of each site of one adapter."""
    rows = _Rows(sites, dialect)
    return tuple(map(rows.seat, sites))


class _Rows:
    """The modules that are adapted, with what stands around each."""

    def __init__(self, sites: Sequence[PlannedSite], dialect: Dialect) -> None:
        self.dialect = dialect
        self.around: dict[str, list[str]] = {}
        self.joints: dict[str, Joint] = {}
        self.marked = dialect.copies[1] if dialect.copies and copies_alone(sites) else ""
        modules: dict[str, nn.Module] = {}
        self.tables = [site.site.owner for site in sites if site.site.at.picked]
        self.inside = dialect.rows is not None and len(self.tables) < len(sites)
        for site in sites:
            if not site.site.at.tensor and site.site.at.whole:
                modules[site.site.owner] = site.site.module
                self.around.setdefault(site.site.owner, []).append(site.site.at.parameter)
        for path, names in self.around.items():
            joint = joint_of(modules[path])
            if joint is not None and joint.parameter in names:
                self.joints[path] = joint
            if len(names) > 1:
                order = list(parameters_of(modules[path]))
                names.sort(key=order.index)
        self.outer = frozenset(p for p, module in modules.items() if _has_children(module))

    def seat(self, site: PlannedSite) -> Seat:
        owner, at = site.site.owner, site.site.at
        if at.tensor:
            return self._of_copy(owner, site)
        names = self.around.get(owner, [])
        # The last of a module's parameters stands outermost, and its keys have no added name.
        depth = len(names) - 1 - names.index(at.parameter) if at.whole else 0
        module = self._module(owner, depth)
        parent, _, child = owner.rpartition(".")
        joint = self.joints.get(owner)
        if joint is not None and joint.parameter == at.parameter:
            return Seat(module, owner, joint.kind, joint=owner)
        joint = self.joints.get(parent)
        if joint is not None and joint.child == child:
            return Seat(module, parent, joint.kind, joint=parent, times=joint.times)
        own = at.parameter != "weight" or site.form.kind.bare
        named = _joined(owner, at.parameter) if own else owner
        return Seat(module, named, site.form.kind.name, parameter=own)

    def _of_copy(self, owner: str, site: PlannedSite) -> Seat:
        module = self._module(owner, len(self.around.get(owner, ())))
        rows = self.dialect.rows
        if site.site.at.picked:
            alone = self.tables.count(owner) == 1 and site.site.at.parameter == "weight"
            module = _joined(module, rows.inside) if rows is not None and self.inside else module
            tensor = rows.tensor if rows is not None and alone else ""
            return Seat(module, site.path, site.form.kind.name, parameter=True, tensor=tensor)
        module = _joined(module, self.marked) if self.marked else module
        return Seat(module, site.path, site.form.kind.name, parameter=True)

    def _module(self, path: str, depth: int) -> str:
        """A path with the names of what is added around it and around what it is in."""
        added = [self.dialect.around]
        if not self.outer:
            return ".".join([*filter(None, [path]), *added * depth])
        walked = added * self._count("") if path else []
        before: list[str] = []
        for name in path.split(".") if path else ():
            before.append(name)
            inside = len(before) <= path.count(".")
            walked += [name, *added * (self._count(".".join(before)) if inside else 0)]
        return ".".join([*walked, *added * depth])

    def _count(self, path: str) -> int:
        """How many modules are added around one that has children."""
        return len(self.around[path]) if path in self.outer else 0


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def copies_alone(sites: Sequence[PlannedSite]) -> bool:
    """Whether an adapter is copies of all parameters of some modules, which have no children."""
    owned: dict[str, set[str]] = {}
    for site in sites:
        if not site.site.at.tensor or site.site.at.picked or site.site.tie == "share":
            return False
        owned.setdefault(site.site.owner, set()).add(site.site.at.parameter)
    modules = {site.site.owner: site.site.module for site in sites}
    return all(
        owned[path] == set(_present(module)) and not _has_children(module)
        for path, module in modules.items()
    )


def _present(module: nn.Module) -> Iterator[str]:
    return (name for name, p in parameters_of(module).items() if p is not None)


def _has_children(module: nn.Module) -> bool:
    return not children_of(module).keys() <= {ADAPTERS}
