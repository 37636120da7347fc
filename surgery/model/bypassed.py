"""Layers whose weight their owner reads itself: it may never call them, or only on some path.

Whether it does is seen in the code of its methods: a chain of attributes from `self` to a weight or
a bias, of which more is taken than its dtype, device or shape. What is read through a variable or
a list is not seen.
"""

from __future__ import annotations

import dis
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from inspect import unwrap
from itertools import pairwise
from types import CodeType, FunctionType
from typing import Any

from torch import fx, nn

from surgery.model.layers import base_class, qualified_name

Chain = tuple[str, ...]
"""The names from a module to one of its layers."""

_OWN = frozenset({"weight", "bias"})

# What is asked of a weight without reading its data.
_ABOUT = frozenset(
    {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "is_meta", "requires_grad"}
)
_ASKING = frozenset({"isinstance", "hasattr", "type"})

# Methods that run when a model is made, loaded or changed, and in no forward.
_ASIDE = re.compile(
    r"__init__|_{0,2}(init|reset|tie|resize|load|prune|copy|convert|fuse)|"
    r"extra_repr|__setstate__|_apply"
)

_READS = {"LOAD_ATTR", "LOAD_METHOD"}


def _slowly(owner: Any) -> bool:
    return owner.pretraining_tp > 1 and owner.slow_but_exact


_BLOOM = "transformers.models.bloom.modeling_bloom"

UNLESS: Mapping[tuple[str, str], Callable[[Any], bool]] = {
    (f"{_BLOOM}.BloomAttention", "dense"): _slowly,
    (f"{_BLOOM}.BloomMLP", "dense_4h_to_h"): _slowly,
}
"""Owners whose settings say whether they read a weight: class, layer, and the question."""


def read_by(owner: nn.Module, chain: Chain) -> bool:
    """Whether a module may read the weight of a layer below it without calling the layer.

    What a graph reads is seen in the graph.
    """
    if isinstance(owner, fx.GraphModule):
        return False
    cls = base_class(owner)
    if chain not in reads(cls):
        return False
    asked = UNLESS.get((qualified_name(cls), chain[-1]))
    return asked is None or asked(owner)


@lru_cache(maxsize=2048)
def reads(cls: type[nn.Module]) -> frozenset[Chain]:
    """The layers whose weight or bias the methods of a class read by themselves."""
    members: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base not in (object, nn.Module):
            members |= vars(base)
    return frozenset(
        chain
        for name, member in members.items()
        if not _ASIDE.match(name)
        for code in _codes(member)
        for chain in _chains(code)
    )


def _codes(member: Any) -> Iterator[CodeType]:
    """The code of a method, of what it wraps, and of the functions inside it."""
    if isinstance(member, property):
        member = member.fget
    found = unwrap(member) if callable(member) else None
    pending = [found.__code__] if isinstance(found, FunctionType) else []
    while pending:
        code = pending.pop()
        yield code
        pending += [const for const in code.co_consts if isinstance(const, CodeType)]


def _chains(code: CodeType) -> Iterator[Chain]:
    if _OWN.isdisjoint(code.co_names):
        return
    steps = [*dis.get_instructions(code)]
    for start, (before, step) in enumerate(pairwise(steps)):
        if step.argval != "self" or not step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
            continue
        names: list[str] = []
        at = start + 2
        while at < len(steps) and steps[at].opname in _READS:
            names.append(str(steps[at].argval))
            at += 1
        if before.argval not in _ASKING and not _asks(steps[at : at + 2]):
            yield from _read(names)


def _asks(after: list[dis.Instruction]) -> bool:
    """Whether what follows is no more than a comparison with None."""
    if after and "NONE" in after[0].opname:
        return True
    return [step.opname for step in after] == ["LOAD_CONST", "IS_OP"] and after[0].argval is None


def _read(names: list[str]) -> Iterator[Chain]:
    """The layer in a chain of names whose weight is read, if there is one."""
    for place, name in enumerate(names):
        if name in _OWN:
            if place and not _ABOUT & {*names[place + 1 : place + 2]}:
                yield tuple(names[:place])
            return
