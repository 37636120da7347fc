"""Classes that others swap in on top of a module's own: seen through, and kept when it changes.

`torch.distributed.fsdp.fully_shard` lets a module have a subclass of its class and of `FSDPModule`,
which overrides no forward. Whatever changes the class of such a module changes the one below.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

from torch import nn

ON_TOP = frozenset({"FSDPModule"})
"""The classes that are mixed in, by name; torch's own, wherever in it they are defined."""


def _is_mixed_in(cls: type) -> bool:
    return cls.__name__ in ON_TOP and cls.__module__.startswith("torch.distributed.")


@lru_cache(maxsize=1024)
def own_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class below what others put on top of it; itself where nothing is on it."""
    last = 0
    for place, one in enumerate(cls.__mro__):
        if _is_mixed_in(one):
            last = place + 1
    return cast("type[nn.Module]", cls.__mro__[last])


@lru_cache(maxsize=1024)
def restacked(top: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` with all on top of it that `top` has on top of its own class; the same one each time.

    The same one, so that Dynamo sees one type for all modules that are alike.
    """
    below = own_class(top)
    if below is top:
        return cls
    bases = tuple(cls if base is below else base for base in top.__bases__)
    known = next((made for made in cls.__subclasses__() if made.__bases__ == bases), None)
    if known is not None:
        return known
    name = top.__name__.removesuffix(below.__name__) + cls.__name__
    own = {n: v for n, v in vars(top).items() if n not in ("__dict__", "__weakref__")}
    made: Any = type(name, bases, own)
    return made
