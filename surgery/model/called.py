"""Calls as sites: any module whose call takes hidden states, or gives them.

Nothing is known of what such a module computes. All that an adapter needs is how wide the hidden
states are; where it runs, another width is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from surgery.model.candidates import Candidate
from surgery.model.holder import parameters_of
from surgery.model.inventory import Entry, Inventory, Site, joined
from surgery.model.layers import MATRIX, Sizes, base_class
from surgery.model.parts import ParameterSlice
from surgery.model.scopes import Region
from surgery.model.storage import seen


@dataclass(frozen=True, slots=True)
class Width(Sizes):
    """The sizes of a site that is no matrix: all of them are the width of its hidden states."""

    @property
    def names(self) -> Mapping[str, int]:
        """The one size by the name it has in an equation."""
        return {"hidden": self.fan_out}


CALL = replace(MATRIX, name="call", bare=False)
"""The call of any module, of which nothing is known but how wide its hidden states are."""

AT_CALL = ParameterSlice("", bias="", kind=CALL.name)
"""What a call is of its module."""


def calls(inventory: Inventory, regions: Sequence[Region]) -> list[tuple[int, Region, Candidate]]:
    """The modules in some regions that have a forward, each with the first region it is in.

    One matrix of a batch, or the rows of a head, has no call of its own.
    """
    found: dict[int, Region] = {}
    for region in regions:
        if region.matrix is None and region.head is None:
            for index in range(region.entry, inventory.entries[region.entry].end):
                found.setdefault(index, region)
    return [
        (index, region, Candidate(AT_CALL, inventory.entries[index].path, CALL))
        for index, region in sorted(found.items(), key=lambda row: row[0])
        if _has_forward(inventory.entries[index])
    ]


POOLS: Mapping[
    str, Callable[[Inventory, Sequence[Region]], list[tuple[int, Region, Candidate]]]
] = {CALL.name: calls}
"""By the kind of site, what a selector may take that is nothing which a parameter holds."""


def _has_forward(entry: Entry) -> bool:
    """Whether a module is more than a container, which nothing calls."""
    forward = cast("Callable[..., object]", base_class(entry.module).forward)
    return bool(entry.path) and forward is not _NO_FORWARD


_NO_FORWARD = cast("Callable[..., object]", nn.Module.forward)


# ------------------------------------------------------------------------------- their sites


def objection(index: int, inventory: Inventory) -> str:
    """Why a module's call cannot be a site, or ""."""
    entry = inventory.entries[index]
    if entry.traced is not None:
        return "the model is one graph, in which no module is called"
    if width_of(index, inventory) is None:
        return "nothing says how wide its hidden states are"
    return "" if _like(index, inventory) is not None else "nothing in it has parameters"


def call_site(index: int, layer: int | None, container: str | None, inventory: Inventory) -> Site:
    """The site of a module's call, against which there is no objection."""
    entry, width = inventory.entries[index], width_of(index, inventory)
    like = _like(index, inventory)
    assert width is not None
    assert like is not None
    return Site(
        path=joined(entry.path, *AT_CALL.names),
        module=entry.module,
        kind=CALL,
        sizes=Width(width, width, width),
        geometry=None,
        dtype=like.dtype,
        device=like.device,
        has_bias=False,
        layer=layer,
        container=container,
        at=AT_CALL,
        mode="around",
    )


def width_of(index: int, inventory: Inventory) -> int | None:
    """How wide the hidden states are that a module gives; None where nothing says so.

    By what its own layer is, else by the configuration that it has or is under, else by the last
    matrix or vector of weights in it.
    """
    entry = inventory.entries[index]
    if entry.kind is not None and not entry.own_forward:
        return _own_width(entry)
    own = _own_width(entry)
    if own is not None:
        return own
    below = [i for i in range(index + 1, entry.end)]
    told = _configured(index, inventory)
    widths = [w for w in (_own_width(inventory.entries[i]) for i in below) if w is not None]
    if told is not None and (told in widths or not widths):
        return told
    return widths[-1] if widths else None


def _own_width(entry: Entry) -> int | None:
    """Of what a layer gives, or a norm."""
    if entry.kind is not None and not entry.own_forward:
        last = entry.kind.feature_axis == -1
        return entry.kind.sizes(entry.module).fan_out if last else None
    weight = parameters_of(entry.module).get("weight")
    return weight.shape[0] if weight is not None and weight.dim() == 1 else None


_WIDTHS = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")
"""What configurations call the width of hidden states; transformers and timm have these names."""


def _configured(index: int, inventory: Inventory) -> int | None:
    while index >= 0:
        entry = inventory.entries[index]
        config = vars(entry.module).get("config")
        found = (getattr(config, name, None) for name in _WIDTHS)
        width = next((w for w in found if type(w) is int and w > 0), None)
        if width is not None:
            return width
        index = entry.parent
    return None


def _like(index: int, inventory: Inventory) -> Tensor | None:
    """A parameter of the dtype and on the device that the module computes with."""
    within = inventory.entries[index : inventory.entries[index].end]
    return next((value for one in within for value in _floating(one.module)), None)


def _floating(module: nn.Module) -> Iterator[Tensor]:
    for name in parameters_of(module):
        value = seen(module, name)
        if value is not None and value.dtype in _COMPUTED:
            yield value


_COMPUTED = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
