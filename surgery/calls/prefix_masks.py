"""Masks and positions of a text that stands behind a prefix."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from surgery.calls.prefix_view import Prefix, Seen, View, transformers_caches
from surgery.errors import refuse

# Models whose positions are distances between tokens alone, or are counted in the mask: samples
# with prefixes of unequal length need no other positions.
_COUNTED = frozenset({"bloom", "mpt", "mt5", "opt", "t5", "umt5"})

# transformers names them so.
_MASK, _CROSS_MASK, _POSITIONS = "attention_mask", "encoder_attention_mask", "position_ids"


def extend(
    module: nn.Module,
    forward: Callable[..., Any],
    call: dict[str, Any],
    prefix: Prefix,
    cross: Prefix,
    seen: Seen,
) -> None:
    """Let a call's masks and positions be of the prefix too."""
    ids = call.get("input_ids")
    x: Tensor = call["inputs_embeds"] if ids is None else ids
    if prefix.tokens:
        _check_whole(call, seen.own)
        call[_MASK] = _mask(call.get(_MASK), prefix, x, seen.own, module)
        positions = _positions(module, forward, call.get(_POSITIONS), prefix, x, seen.own)
        if positions is not None:
            call[_POSITIONS] = positions
    states: Tensor | None = call.get("encoder_hidden_states")
    if cross.tokens and states is not None:
        mask: Tensor | None = call.get(_CROSS_MASK)
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=x.device)
        front = cross.front(x.shape[0], mask.device)
        call[_CROSS_MASK] = _beside(mask, front[:, None, None] if mask.dim() == 4 else front)


def _mask(mask: Any, prefix: Prefix, x: Tensor, view: View, module: Any) -> Any:
    """A mask as it was given, with n columns more."""
    config = module.config
    if mask is None:
        # A model that is causal makes its own from the view; one that is not asks the mask.
        if not prefix.uneven and not is_encoder(config):
            return None
        past = int(view.inner.get_seq_length())
        mask = torch.ones(x.shape[0], past + x.shape[1], dtype=torch.bool, device=x.device)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        if not _is_apart(mask, prefix, x, view, config):
            return _beside(mask, prefix.front(x.shape[0], mask.device))
        mask = _made(mask, x, view, module)
    view.always = True
    if isinstance(mask, Mapping):
        every = cast("Mapping[str, Any]", mask)
        return {kind: _whole(one, kind, prefix, x, view, config) for kind, one in every.items()}
    return _whole(mask, _kind(config), prefix, x, view, config)


def _is_apart(mask: Tensor, prefix: Prefix, x: Tensor, view: View, config: Any) -> bool:
    """Whether padding between a prefix and a text may count as a distance, as in a window it does.

    It does not for a model's own masks of all layers that see everything.
    """
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    windows = [size for size in sizes if size]
    past = view.get_seq_length(_layer(view, "sliding_attention"))
    if not windows or past + x.shape[1] <= min(windows):
        return False
    return torch.compiler.is_compiling() or not bool(mask[:, 0].all())


def _made(mask: Tensor, x: Tensor, view: View, module: Any) -> Any:
    """The masks of the text alone that the library makes, for each kind of layers."""
    from transformers import masking_utils

    untyped: Any = masking_utils
    shape = torch.empty(*x.shape[:2], 0, dtype=module.dtype, device=x.device)
    return untyped.create_masks_for_generate(
        config=module.config,
        inputs_embeds=shape,
        attention_mask=mask,
        past_key_values=view.inner,
    )


def _kind(config: Any) -> str:
    """What a single mask is of, where layers have masks of several kinds."""
    kinds, _ = transformers_caches().get_layer_types_and_kwargs(config)
    own = set(kinds) - {"dummy"}
    return own.pop() if len(own) == 1 else "full_attention"


def _whole(mask: Any, kind: str, prefix: Prefix, x: Tensor, view: View, config: Any) -> Any:
    """A mask [batch, heads, queries, keys] of one kind of layers, with the prefix's columns.

    How far a token is from the prefix is counted from the first key that it sees: before that
    there is padding, or what the window has left, and the prefix with it.
    """
    if kind not in ("full_attention", "sliding_attention"):
        _refuse_mask(mask, kind)
    layer = _layer(view, kind)
    length, offset = view.inner.get_mask_sizes(x.shape[1], layer)
    places = torch.arange(x.shape[1], device=x.device) + view.inner.get_seq_length(layer)
    if mask is None:  # the library leaves out what is merely causal
        keys = torch.arange(length, device=x.device) + offset
        mask = (keys <= places[:, None])[None, None]
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        _refuse_mask(mask, kind)
    front = prefix.front(x.shape[0], mask.device)[:, None, None].expand(-1, -1, mask.shape[2], -1)
    if kind == "sliding_attention":
        visible = mask if mask.dtype == torch.bool else mask == 0
        first = visible.int().argmax(-1, keepdim=True) + offset
        back = torch.arange(prefix.tokens, 0, -1, device=x.device)
        front = front & (places[:, None] - first + back < config.sliding_window)
    return _beside(mask, front)


def _layer(view: View, kind: str) -> int:
    """The first layer of a kind; of a cache that makes its layers as it needs them, the first."""
    every = list(view.inner.is_sliding)
    sliding = kind == "sliding_attention"
    return every.index(sliding) if sliding in every else 0


def _beside(mask: Tensor, front: Tensor) -> Tensor:
    """Columns that say which are read [batch, …, n], before a mask of the same number of axes."""
    if mask.is_floating_point() and mask.dim() == 4:  # which is added to what it masks
        least = torch.finfo(mask.dtype).min
        front = torch.zeros_like(front, dtype=mask.dtype).masked_fill(~front, least)
    batch = max(mask.shape[0], front.shape[0])
    mask = mask.expand(batch, *mask.shape[1:])
    if mask.dim() == 4:
        front = front.expand(batch, *mask.shape[1:3], -1)
    return torch.cat([front.to(mask.dtype), mask], -1)


def _positions(
    module: nn.Module,
    forward: Callable[..., Any],
    given: Tensor | None,
    prefix: Prefix,
    x: Tensor,
    view: View,
) -> Tensor | None:
    """The text's positions behind the prefix; None where the model counts them right itself."""
    if given is not None:
        return given + prefix.shift(given.device)
    if not prefix.uneven or cast(Any, module).config.model_type in _COUNTED:
        return None
    counting = any(hasattr(m, "create_position_ids_from_input_ids") for m in module.modules())
    if counting or _POSITIONS not in names_of(forward):
        _refuse_positions(module)
    count = torch.arange(x.shape[1], device=x.device) + view.inner.get_seq_length()
    return count + prefix.shift(x.device)


def _check_whole(call: Mapping[str, Any], view: View) -> None:
    """E478, for several texts in one row, each of which would need a prefix."""
    positions: Tensor | None = call.get(_POSITIONS)
    packed = call.get("cu_seq_lens_q") is not None
    if call.get(_MASK) is None and not view.keeps and not torch.compiler.is_compiling():
        packed |= positions is not None and positions.dim() == 2 and _jumps(positions)
    if packed:
        refuse(
            "E478",
            "several texts are packed in one row, and each of them would need the prefix",
            hint="one text a row, padded, with an attention_mask",
        )


def _refuse_mask(mask: object, kind: str) -> NoReturn:
    found = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    refuse(
        "E478",
        f"a mask for {kind} ({found}) cannot be extended over a prefix",
        hint="give a mask [batch, tokens], of texts that are padded on the right",
    )


def _refuse_positions(module: nn.Module) -> NoReturn:
    refuse(
        "E478",
        f"{type(module).__name__} counts positions itself, the same for prefixes of all lengths",
        hint="route prefixes of one length, or give position_ids where the model takes them",
    )


def is_encoder(config: Any) -> bool:
    """Whether every token sees all others, those behind it too."""
    return getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder


@cache
def names_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a forward's parameters; the first is the module."""
    return tuple(inspect.signature(forward).parameters)


def _jumps(positions: Tensor) -> bool:
    return bool((positions.diff() != 1).any())
