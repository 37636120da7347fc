"""How transformers names and joins a checkpoint's tensors as it loads them, as data.

The rules are its own, and so is what they do: its operations are run on tensors that number their
rows, and where each number ends up is where that row lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from surgery.checkpoint import Checkpoint
from surgery.errors import SurgeryError
from surgery.integrations.factories import said
from surgery.integrations.transformers import load_model
from surgery.joined import Joined, Names, Stretch

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Of tensors by their names, in elements."""

# transformers leaves these unpromised, so all of them is `Any` here.

Wanted = Callable[[str], bool]
"""Whether an adapter may have a site on a parameter."""


@dataclass(slots=True)
class _Group:
    """The tensors that one run of operations makes parameters of, by the pattern of each."""

    first: str
    rule: Any
    sources: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    @property
    def made(self) -> list[str]:
        patterns = cast("list[str]", self.rule.target_patterns)
        return [self.first.replace(patterns[0], pattern, 1) for pattern in patterns]


def names_of(checkpoint: Checkpoint, shapes: Shapes, wanted: Wanted) -> Names | None:
    """A model's parameters by a checkpoint's tensors; None where transformers has no such model.

    shapes: of the tensors, as the model has them. wanted: the parameters that operations are
    followed for.
    """
    if not (checkpoint.folder / "config.json").is_file():
        return None
    try:
        return _names(checkpoint, shapes, wanted)
    except (SurgeryError, ImportError, AttributeError, TypeError):
        return None  # of another transformers, whose rules are elsewhere, too


def _names(checkpoint: Checkpoint, shapes: Shapes, wanted: Wanted) -> Names:
    model: Any = load_model(str(checkpoint.folder), meta=True)
    own = cast("dict[str, Tensor]", model.state_dict())
    whole, groups = _sorted(shapes, model, own)
    found = {name: shapes[tensor] for name, tensor in whole.items()}
    joined: dict[str, Joined] = {}
    refused: dict[str, str] = {}
    for group in groups:
        made = [name for name in group.made if name in own]
        if not any(map(wanted, made)):
            continue
        try:
            quantised = [t for t, _ in group.sources if shapes[t][1] != checkpoint.entry(t).shape]
            if quantised:
                raise ValueError(f"`{quantised[0]}` is quantised")
            joined |= _followed(group, model, own, shapes)
        except Exception as error:  # an operation may refuse numbers, or a model without data
            refused |= dict.fromkeys(made, said(error))
    found |= {name: (one.dtype, one.shape) for name, one in joined.items()}
    return Names(whole, found, joined, refused)


def _sorted(
    shapes: Shapes, model: Any, own: Mapping[str, Tensor]
) -> tuple[dict[str, str], list[_Group]]:
    """What each tensor is: a parameter, or one of those that parameters are made of."""
    from transformers import conversion_mapping, core_model_loading

    core, mapping = cast(Any, core_model_loading), cast(Any, conversion_mapping)
    rules = cast("list[Any]", mapping.get_model_conversion_mapping(model))
    renamings = [rule for rule in rules if isinstance(rule, core.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, core.WeightConverter)]
    by_pattern = {p: rule for rule in converters for p in rule.source_patterns}
    prefix = model.base_model_prefix

    def renamed(name: str, some: Sequence[Any], others: Sequence[Any]) -> tuple[str, str | None]:
        return core.rename_source_key(name, some, others, prefix, own)

    whole: dict[str, str] = {}
    groups: dict[str, _Group] = {}
    for name in sorted(shapes, key=core.dot_natural_key):
        found, pattern = renamed(name, renamings, converters)
        if found not in own and name in own:
            found, pattern = renamed(name, [], [])
        if found not in own:
            continue
        if pattern is None:
            whole[found] = name
            continue
        group = groups.setdefault(found, _Group(found, by_pattern[pattern]))
        group.sources.append((name, pattern))
    return whole, [*groups.values()]


# ----------------------------------------------------------------------------------- following

_SEEN = 2  # numbers in place of a row, which show that it stays whole, and in its direction


def _followed(
    group: _Group, model: Any, own: Mapping[str, Tensor], shapes: Shapes
) -> dict[str, Joined]:
    """The parameters that operations make, by the rows of tensors. Raises what these raise.

    Raises ValueError where rows do not stay whole.
    """
    rule, at = deepcopy(group.rule), 0
    dtype, _ = shapes[group.sources[0][0]]
    begins: list[tuple[int, str]] = []
    widths: set[int] = set()
    for tensor, pattern in group.sources:
        own_dtype, shape = shapes[tensor]
        if own_dtype != dtype:
            raise ValueError("they are of several dtypes")
        rows, width = _rows(shape)
        begins.append((at, tensor))
        widths.add(width)
        rule.add_tensor(group.first, tensor, pattern, _numbers(at, shape))
        at += rows
    if len(widths) > 1:
        raise ValueError("their rows are of several lengths")
    made = rule.convert(group.first, model=model, config=model.config)
    found: dict[str, Joined] = {}
    for name, value in made.items():
        numbers = cast(Tensor, value[0] if isinstance(value, list) else value)
        shape = tuple(own[name].shape)
        order = _order(numbers, shape, widths)
        stretches = tuple(_stretches(order, begins))
        found[name] = Joined(name, dtype, shape, _rows(shape)[1], stretches)
    return found


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many, and the elements of each."""
    return (prod(shape), 1) if len(shape) < 2 else (prod(shape[:-1]), shape[-1])


def _numbers(first: int, shape: tuple[int, ...]) -> Tensor:
    rows, _ = _rows(shape)
    lefts = torch.arange(first, first + rows) * _SEEN
    if len(shape) < 2:
        return lefts.view(shape)
    return torch.stack([lefts, lefts + 1], -1).view(*shape[:-1], _SEEN)


def _order(numbers: Tensor, shape: tuple[int, ...], widths: set[int]) -> Tensor:
    """The rows' numbers in the order in which they make a parameter."""
    rows, width = _rows(shape)
    numbers = numbers if len(shape) > 1 else numbers.unsqueeze(-1)
    expected = shape[:-1] if len(shape) > 1 else shape
    lefts = numbers[..., 0]
    offsets = torch.arange(numbers.shape[-1])
    whole = bool((numbers == lefts.unsqueeze(-1) + offsets).all()) and not bool((lefts % 2).any())
    if tuple(lefts.shape) != expected or {width} != widths or not whole:
        raise ValueError("their rows are no rows of the parameter")
    found = lefts.flatten() // _SEEN
    if len({*_listed(found)}) != rows:
        raise ValueError("a row of theirs is several of the parameter")
    return found


def _stretches(order: Tensor, begins: list[tuple[int, str]]) -> Iterator[Stretch]:
    """Rows that stand together in a parameter and in a tensor."""
    starts = torch.tensor([start for start, _ in begins])
    owners = torch.bucketize(order, starts, right=True) - 1
    breaks = (order.diff() != 1) | (owners.diff() != 0)
    cuts = [0, *_listed(breaks.nonzero().flatten() + 1), order.numel()]
    for at, stop in pairwise(cuts):
        start, tensor = begins[int(owners[at])]
        yield Stretch(tensor, int(order[at]) - start, at, stop - at)


def _listed(numbers: Tensor) -> list[int]:
    return cast("list[int]", cast(Any, numbers).tolist())


__all__ = ["Names", "names_of"]
