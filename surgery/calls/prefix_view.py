"""A cache, and n tokens before it that it does not have: what a model with a prefix is handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from surgery.errors import refuse

Pair = tuple[Tensor, Tensor]
Layer = Callable[[int], Pair]
"""For a batch of so many samples, K [batch, kv_heads, n, key_dim] and V [batch, kv_heads, n, …]."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """What stands before a text in each layer.

    tokens: n, of the longest where samples have their own. layers: what gives K and V, by the
    layer's index. counts: for each sample of a routed batch, how many of the n, the last ones, are
    its own; what stands before those is not read.
    """

    tokens: int
    layers: Mapping[int, Layer]
    counts: tuple[int, ...] | None = None

    @property
    def uneven(self) -> bool:
        """Whether some samples have fewer tokens than others."""
        return self.counts is not None and any(one != self.tokens for one in self.counts)

    def front(self, batch: int, device: torch.device) -> Tensor:
        """Which of the tokens each sample reads: [batch, n], bool."""
        if self.counts is None:
            return torch.ones(batch, self.tokens, dtype=torch.bool, device=device)
        if len(self.counts) != batch:
            refuse_batch(len(self.counts), batch)
        own = torch.tensor(self.counts, device=device)
        return torch.arange(self.tokens, device=device) >= self.tokens - own[:, None]

    def shift(self, device: torch.device) -> int | Tensor:
        """How far the text's positions are moved: n, or [batch, 1] where that differs."""
        if not self.uneven:
            return self.tokens
        return torch.tensor(self.counts, device=device)[:, None]


NOTHING = Prefix(0, {})


class View:
    """A cache with a prefix before it; together with transformers' `Cache`, a cache itself.

    inner: the cache behind. keeps: whether it is filled. read: the layers that read their prefix.
    always: whether masks are of the prefix even where a window has left it.
    """

    def __init__(self, inner: Any, prefix: Prefix, keeps: bool) -> None:
        """Of a cache, which is not changed until the model does it."""
        self.inner, self.prefix, self.keeps = inner, prefix, keeps
        self.read: set[int] = set()
        self.always = False
        # what a cache's own methods look at
        self.layers: Any = inner.layers
        self.layer_class_to_replicate: Any = inner.layer_class_to_replicate
        self.offloading: Any = inner.offloading

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *rest: Any, **more: Any) -> Pair:
        """What a layer attends to: [batch, kv_heads, n + tokens, …] each."""
        begins = self._begins(keys.shape[-2], layer_idx)
        if self.keeps:
            keys, values = self.inner.update(keys, values, layer_idx, *rest, **more)
        return self.joined(keys, values, layer_idx) if begins else (keys, values)

    def joined(self, keys: Tensor, values: Tensor, layer: int) -> Pair:
        """A layer's prefix before its keys and values."""
        if not self.prefix.tokens:
            return keys, values
        if layer not in self.prefix.layers:
            _refuse_bare(layer)
        own_keys, own_values = self.prefix.layers[layer](keys.shape[0])
        self.read.add(layer)
        n = self.prefix.tokens
        return _before(own_keys, keys, n, layer, "K"), _before(own_values, values, n, layer, "V")

    def _begins(self, tokens: int, layer: int) -> bool:
        """Whether a layer has the text from its beginning on: else the window has left it."""
        if self.always or not self.inner.get_mask_sizes(tokens, layer)[1]:
            return True
        self.read.add(layer)  # which it did as long as it could see it
        return False

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """How many keys a layer will have, and which is the first."""
        length, offset = self.inner.get_mask_sizes(query_length, layer_idx)
        n = self.prefix.tokens
        return (length, offset + n) if offset else (length + n, 0)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """How many tokens stand before the next: an int, or a tensor of a static cache."""
        return self.inner.get_seq_length(layer_idx) + self.prefix.tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """How many tokens there can be; -1 for any number."""
        most = self.inner.get_max_length(layer_idx)
        return most if most < 0 else most + self.prefix.tokens


class CrossView(View):
    """The same of a cross-attention, which is filled once and then read layer by layer."""

    def __init__(self, inner: Any, prefix: Prefix, keeps: bool) -> None:
        """Of a cache, which may be full."""
        super().__init__(inner, prefix, keeps)
        self.layers = _Layers(self)

    def _begins(self, tokens: int, layer: int) -> bool:
        return True


class _Layers:
    """The layers of a full cache, as a list."""

    def __init__(self, view: CrossView) -> None:
        self.view = view

    def __getitem__(self, index: int) -> _Full:
        return _Full(self.view, index)

    def __len__(self) -> int:
        return len(self.view.inner.layers)


class _Full:
    """What one layer keeps, after its prefix."""

    def __init__(self, view: CrossView, index: int) -> None:
        self._view, self._index = view, index
        self._layer = view.inner.layers[index]

    @property
    def keys(self) -> Tensor:
        """[batch, heads, n + tokens, key_dim]."""
        return self._view.joined(self._layer.keys, self._layer.values, self._index)[0]

    @property
    def values(self) -> Tensor:
        """[batch, heads, n + tokens, value_dim]."""
        return self._view.joined(self._layer.keys, self._layer.values, self._index)[1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class _Never(dict[int, bool]):
    """Which layers of a cross-attention are filled, where nothing is kept: none."""

    def __setitem__(self, layer: int, filled: bool) -> None:
        """Stay so: what a checkpoint computes again has to find it as it was."""


_CLASSES: dict[str, Any] = {}


def views() -> tuple[Any, Any]:
    """The views as caches of transformers: for self-attention, and for cross-attention.

    Both are made when first asked for, which has to be before a call is traced.
    """
    if not _CLASSES:
        base: Any = transformers_caches().Cache
        made = (type(f"Prefixed{view.__name__}", (view, base), {}) for view in (View, CrossView))
        _CLASSES.setdefault("both", tuple(made))  # two threads may come at once
    return _CLASSES["both"]


def transformers_caches() -> Any:
    """The library's module of caches, whose types are not complete."""
    import transformers.cache_utils

    return transformers.cache_utils


@dataclass(frozen=True, slots=True)
class Seen:
    """What a model is handed, and the views in it; none for a cross-attention that there is not."""

    cache: Any
    own: View
    cross: View | None = None


def seen_by(known: Any, prefix: Prefix, cross: Prefix, keeps: bool) -> Seen:
    """A cache, as the model sees it. Raises E475 for layers that keep something else."""
    view, cross_view = views()
    parts = _parts(known)
    if any(parts[0].is_linear):
        _refuse_recurrent()
    own = view(parts[0], prefix, keeps)
    if len(parts) == 1:
        return Seen(own, own)
    other = cross_view(parts[1], cross, keeps)
    pair = type(known)(own, other)
    pair.is_updated = known.is_updated if keeps else _Never()
    return Seen(pair, own, other)


def _parts(known: Any) -> tuple[Any, ...]:
    """A cache, or the two of which it is one."""
    if hasattr(known, "self_attention_cache"):
        return known.self_attention_cache, known.cross_attention_cache
    return (known,)


def _before(new: Tensor, old: Tensor, tokens: int, layer: int, name: str) -> Tensor:
    wanted = [old.shape[0], old.shape[1], tokens, old.shape[3]]
    if list(new.shape) != wanted:
        refuse(
            "E476",
            f"{name} of layer {layer} is {list(new.shape)}, where {wanted} is attended to",
            hint="[batch, kv_heads, tokens, head_dim], for a batch as large as the model's",
        )
    return torch.cat([new.to(old), old], -2)


def _refuse_recurrent() -> NoReturn:
    refuse(
        "E475",
        "some layers keep a recurrent state",
        hint="a prefix is keys and values, which only attention reads",
    )


def refuse_batch(samples: int, batch: int) -> NoReturn:
    """E476, for the prefixes of another batch."""
    refuse(
        "E476",
        f"prefixes of {samples} samples are asked for {batch}",
        hint="one prefix a sample, in the order of the batch",
    )


def _refuse_bare(layer: int) -> NoReturn:
    refuse(
        "E476",
        f"layer {layer} has no prefix, and other layers have one",
        hint="all layers have one mask: give every layer as many tokens",
    )
