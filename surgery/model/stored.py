"""What a weight storage is: a row of functions, and what it keeps of a parameter it replaces."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class Elsewhere(Protocol):
    """Where an offloaded tensor is kept, or how one was packed, as one integration knows it."""

    def tensor(self) -> Tensor:
        """The tensor, loaded if need be."""
        ...


@dataclass(frozen=True, slots=True)
class Kept:
    """What a module held under a name, to be given back as it was.

    parameter: the very object, None where there was none; on meta if it was offloaded.
    elsewhere: for an offloaded parameter, where its data is; for a packed one, what it stands for.
    by: the row that gives it back, where that may be another than the module has meanwhile.
    """

    parameter: nn.Parameter | None
    elsewhere: Elsewhere | None = None
    by: Storage | None = None

    def tensor(self) -> Tensor | None:
        """The value kept, in its stored layout; not to be written into."""
        if self.parameter is None or self.elsewhere is not None:
            return None if self.elsewhere is None else self.elsewhere.tensor()
        return self.parameter.detach()


@dataclass(frozen=True, slots=True)
class Storage:
    """One row. All functions but `applies` may rely on it for the parameter, or one beside it.

    applies: whether this row knows how a parameter of that name lies.
    fetch: the stored tensor, or None if it has no data yet or is absent.
    keep: what is held under a name.
    install: hold another tensor (None: no parameter) under a name, flags and order unchanged.
    put_back: undo any number of `install`s.
    identity: equal for two parameters that share their data.
    packing: where a parameter is not what it stands for; see there.
    """

    name: str
    applies: Callable[[nn.Module, str], bool]
    fetch: Callable[[nn.Module, str], Tensor | None]
    keep: Callable[[nn.Module, str], Kept]
    install: Callable[[nn.Module, str, Tensor | None], None]
    put_back: Callable[[nn.Module, str, Kept], None]
    identity: Callable[[nn.Module, str], Hashable]
    packing: Packing | None = None


@dataclass(frozen=True, slots=True)
class Packing:
    """What is known of weights in few bits, which their layers unpack at each call.

    dtype: of what a weight is read as. name: what its format is called.
    weight: what it stands for [out, in], as the layer's own forward computes it; for graphs too.
    size: the shape of that; looks at no data.
    computes: the dtype in which the layer computes; None where it is that of its input.
    unpack: let the module be the plain layer that it stands for, with a weight [out, in].
    """

    dtype: torch.dtype
    name: Callable[[nn.Module], str]
    weight: Callable[[nn.Module], Tensor]
    size: Callable[[nn.Module], tuple[int, int]]
    computes: Callable[[nn.Module], torch.dtype | None]
    unpack: Callable[[nn.Module, Tensor], None]
