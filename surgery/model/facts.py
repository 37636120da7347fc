"""What a `where` may ask of a candidate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

from torch import nn

from surgery.algebra.filters import FACTS, WORDS
from surgery.algebra.mentions import names as mentioned
from surgery.algebra.mentions import nodes
from surgery.language import syntax as ast
from surgery.model.candidates import Candidate
from surgery.model.hooked import packing_of
from surgery.model.inventory import Inventory, joined, sizes_of
from surgery.model.nearest import closest, listing
from surgery.model.scopes import Region
from surgery.model.storage import seen

Facts = Mapping[str, object]

Holds = Callable[[ast.Expression, Facts], "bool | None"]
"""Whether a `where` holds of some facts; None where it has reported why it cannot be said."""


class Classes(str):
    """The name of a module's class, equal to that of each class it derives from."""

    every: frozenset[str]

    def __eq__(self, other: object) -> bool:
        """Whether the other is the name of one of the classes."""
        return other in self.every

    def __ne__(self, other: object) -> bool:
        """Whether the other is the name of none of them."""
        return other not in self.every

    def __hash__(self) -> int:
        """Of the first name."""
        return str.__hash__(self)


def facts_of(index: int, region: Region, inventory: Inventory, one: Candidate) -> Facts:
    """The facts of a candidate by name; only those that it has.

    There is no `layer` outside of lists, no `in` and `out` of an unknown kind, and no `numel` and
    `dtype` of a weight that is computed from other parameters.
    """
    entry, at = inventory.entries[index], one.at
    weight = seen(entry.module, at.parameter)
    layer = entry.layer if region.layer is None else region.layer
    full = joined(inventory.entries[entry.first].path, at.parameter)
    facts: dict[str, object] = {
        "type": _classes(entry.cls),
        "name": one.path.rpartition(".")[2],
        "path": one.path,
        "tied": full in inventory.ties,
    }
    if layer is not None:
        facts["layer"] = layer
    if one.kind is not None and not at.tensor and not at.kind:
        sizes = sizes_of(one.kind, entry.module, at)
        facts |= {"in": sizes.fan_in, "out": sizes.fan_out}
    if weight is not None:
        size = weight.numel() if at.index is None else weight[at.index].numel()
        size = size // len(weight) * len(at.picked) if at.picked else size
        facts["numel"] = size if at.part is None else size // at.part.whole * at.part.length
        row = packing_of(entry.module, at.parameter)
        packed = None if row is None or row.packing is None else row.packing.name(entry.module)
        facts["dtype"] = packed or str(weight.dtype).removeprefix("torch.")
    return facts


@lru_cache(maxsize=256)
def _classes(cls: type[nn.Module]) -> Classes:
    made = Classes(cls.__name__)
    made.every = frozenset(c.__name__ for c in cls.__mro__)
    return made


# --------------------------------------------------------------------- what to say of a `where`


_MOST = 500
"""So many values are compared with a word at most."""


def values_asked(where: ast.Expression, facts: Sequence[Facts]) -> str:
    """What the names of a condition are at the sites, with counts."""
    asked = sorted(mentioned(where) & FACTS.keys())
    shown = [listing(_values(name, facts)) for name in asked]
    return "; ".join(
        f"`{name}` is {values}" if values else f"none has a `{name}`"
        for name, values in zip(asked, shown, strict=True)
    )


def nearest_word(where: ast.Expression, facts: Sequence[Facts]) -> str:
    """The nearest to a word that no site has, as a question; "" if nothing is near."""
    questions = (_question(n, facts) for n in nodes(where) if isinstance(n, ast.Binary))
    return next(filter(None, questions), "")


def _question(comparison: ast.Binary, facts: Sequence[Facts]) -> str:
    sides = (comparison.left, comparison.right)
    for side, other in (sides, sides[::-1]):
        if comparison.operator == "==" and isinstance(side, ast.Name) and side.id in WORDS:
            word, values = other.span.text.strip('"'), _values(side.id, facts)
            if word not in values and len(values) <= _MOST:
                return closest(word, values).question()
    return ""


def _values(name: str, facts: Iterable[Facts]) -> Counter[str]:
    return Counter(_shown(f[name]) for f in facts if name in f)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
