"""Key-value prefixes: what every layer's attention reads before the text that a model is given.

For this one call, the model is handed a view of its cache, which says that it holds n tokens more
and gives their keys and values before its own. The prefix is in no cache: a cache has the text
alone, before the call and after. So whatever is done to it between calls, such as reordering it for
beams, cropping, repeating or copying it, needs to know nothing; a cache of a fixed size needs no
more room; one that is not empty says by itself where the text goes on; and without any cache, as in
training, the view is still there, with nothing behind it, so that what a checkpoint computes again
is the same. The model's own masks and positions come from the view, whatever its attention is.
The price is that n keys and values are made and put before the cache's at every step, and that
attention weights, where they are asked for, have n columns more.

Windows count the distance to the prefix as they count others: it goes out of sight as a text would
that stood there. Padding on the left, which then stands in between, counts for nothing.

A wrapped attention function would need no cache parameter, but masks of its own for each kind of
attention, and positions that the model counts elsewhere. An encoder that hands a cache to its
attention (BERT) is served by the view; one that has none (ViT, DistilBERT) is refused.

Prefix tuning: https://arxiv.org/abs/2101.00190; in encoders: https://arxiv.org/abs/2110.07602;
a text's own keys and values, trained on: https://arxiv.org/abs/2506.06266.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from surgery.calls.prefix_masks import extend, is_encoder, names_of
from surgery.calls.prefix_view import (
    NOTHING,
    Layer,
    Pair,
    Prefix,
    Seen,
    refuse_batch,
    seen_by,
    transformers_caches,
    views,
)
from surgery.errors import refuse

untyped: Any = torch  # whose types are not complete

# Which layers keep keys and values of every token alone; "dummy" ones keep nothing, or read what an
# earlier layer keeps, and with it the prefix of that layer.
_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention", "dummy"})

# transformers names them so.
_CACHE, _KEEPS = "past_key_values", "_can_checkpoint_with_cache"


# --------------------------------------------------------------------------------- the call


def prefixed(
    module: nn.Module,
    forward: Callable[..., Any],
    prefix: Prefix,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cross: Prefix = NOTHING,
) -> Any:
    """The output of the module that reads the cache (see `reader`), with a prefix in every layer.

    forward: its own, of which the first argument is the module. cross: what stands before the
    encoder's states in the cross-attention. The output is as long as it was, and its cache is the
    caller's, or a new one, of the text alone. Positions of the text start at n, as in peft.
    Raises StateError (E475) for layers that keep something else, (E476) for tensors that do not
    fit, (E477) if a layer has not read its prefix, (E478) for masks or positions that cannot be
    extended.
    """
    call = {**_bound(forward, args), **kwargs}
    nothing = not prefix.tokens and not cross.tokens
    if nothing or (call.get("input_ids") is None and call.get("inputs_embeds") is None):
        return forward(module, **call)
    again = _recomputed(module) if module.training else ()
    known, keeps = _kept(module, call, bool(again))
    if not keeps and not is_encoder(cast(Any, module).config):
        call["use_cache"] = not again  # without it, some models hand no cache on
    seen = seen_by(known, prefix, cross, keeps)
    if cross.tokens and seen.cross is None:  # by a cache that is of one text
        _refuse_unread(module, sorted(cross.layers))
    extend(module, forward, call, prefix, cross, seen)
    given = call.get(_CACHE)
    call[_CACHE] = seen.cache
    output = _run(module, forward, call, seen, again) if again else forward(module, **call)
    _check_read(module, seen)
    return _returned(output, seen.cache, known if keeps else given)


def _run(
    module: nn.Module,
    forward: Callable[..., Any],
    call: Mapping[str, Any],
    seen: Seen,
    again: Iterable[nn.Module],
) -> Any:
    """The same of layers that are run again; some models drop the cache, and masks do not fit."""
    with _keeping(again):
        try:
            return forward(module, **call)
        except RuntimeError:
            _check_read(module, seen)
            raise


def _bound(forward: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """Arguments by their names, without the module."""
    return dict(zip(names_of(forward)[1:], args, strict=False)) if args else {}


def _kept(module: nn.Module, call: Mapping[str, Any], again: bool) -> tuple[Any, bool]:
    """The cache behind the view, and whether it is filled, or only says what layers there are."""
    given, config = call.get(_CACHE), cast(Any, module).config
    if given is not None:
        if again:
            _refuse_kept(module)
        return given, True
    made = _new_cache(config, call.get("encoder_hidden_states") is not None)
    use = call.get("use_cache")
    use = getattr(config, "use_cache", False) if use is None else use
    return made, bool(use) and not again and not is_encoder(config)


def _new_cache(config: Any, cross: bool) -> Any:
    """What the model would make itself."""
    caches: Any = transformers_caches()
    own = caches.DynamicCache(config=config)
    if not cross and not getattr(config, "is_encoder_decoder", False):
        return own
    return caches.EncoderDecoderCache(own, caches.DynamicCache(config=config))


def _returned(output: Any, view: Any, kept: Any) -> Any:
    """An output in which the view is the cache itself again."""
    if isinstance(output, tuple):
        every = (kept if one is view else one for one in cast("tuple[Any, ...]", output))
        return tuple(one for one in every if one is not None)
    if isinstance(output, Mapping) and cast(Any, output).get(_CACHE) is view:
        every = cast("Mapping[str, Any]", output)
        return type(cast(Any, output))(**{**every, _CACHE: kept})
    return cast(Any, output)


# ------------------------------------------------------------------------------- checkpoints


def _recomputed(module: nn.Module) -> tuple[nn.Module, ...]:
    """The layers that keep no activations, and compute them again in the backward pass."""
    every = (m for m in module.modules() if m.training)
    return tuple(m for m in every if getattr(m, "gradient_checkpointing", False))


@contextmanager
def _keeping(layers: Iterable[nn.Module]) -> Generator[None]:
    """Let layers hand on the cache that they are given, which transformers drops at a checkpoint.

    It does so since a layer that is run twice would fill a cache twice; the view fills none.
    """
    changed = [m for m in layers if hasattr(m, _KEEPS) and _KEEPS not in vars(m)]
    for layer in changed:
        vars(layer)[_KEEPS] = True
    try:
        yield
    finally:
        for layer in changed:
            vars(layer).pop(_KEEPS, None)


def _check_read(module: nn.Module, seen: Seen) -> None:
    """E477, if a layer that has a prefix did not read it. Layers that are left out need not."""
    if module.training and getattr(cast(Any, module).config, "layerdrop", 0):
        return
    for view in (seen.own, seen.cross):
        unread = [] if view is None else sorted(view.prefix.layers.keys() - view.read)
        if unread:
            _refuse_unread(module, unread)


# ------------------------------------------------------------------------- samples of their own


def routed(parts: Sequence[Prefix | None]) -> Prefix:
    """The prefix of a batch in which each sample has its own or none, one part a sample.

    Shorter ones stand on the right, beside the text, so that each sample gets what it gets alone.
    Raises StateError (E476) if their layers are not the same.
    """
    own = {id(one): one for one in parts if one is not None and one.tokens}
    if not own:
        return NOTHING
    layers = next(iter(own.values())).layers.keys()
    if any(one.layers.keys() != layers for one in own.values()):
        refuse(
            "E476",
            "prefixes of one batch are of different layers",
            hint="route adapters with the same layers, or run them one after the other",
        )
    tokens = max(one.tokens for one in own.values())
    rows = {key: [i for i, one in enumerate(parts) if id(one) == key] for key in own}
    counts = tuple(0 if one is None else one.tokens for one in parts)
    groups = [(own[key], rows[key]) for key in own]
    made = {layer: _rows(groups, layer, tokens, len(parts)) for layer in layers}
    return Prefix(tokens, made, counts)


def _rows(
    groups: Sequence[tuple[Prefix, Sequence[int]]], layer: int, tokens: int, samples: int
) -> Layer:
    """One layer's K and V of a batch, of which each group has some rows."""

    def made(batch: int) -> Pair:
        if batch != samples:
            refuse_batch(samples, batch)
        parts = [(one.layers[layer](len(rows)), tokens - one.tokens) for one, rows in groups]
        index = [row for _, rows in groups for row in rows]
        keys, values = ([(pair[side], k) for pair, k in parts] for side in (0, 1))
        return _placed(keys, index, batch), _placed(values, index, batch)

    return made


def _placed(parts: Sequence[tuple[Tensor, int]], index: Sequence[int], batch: int) -> Tensor:
    """Rows [rows, heads, tokens, dim] with so many empty tokens before them, where they belong."""
    whole = torch.cat([pad(part, (0, 0, missing, 0)) for part, missing in parts])
    empty = whole.new_zeros(batch, *whole.shape[1:])
    return empty.index_copy(0, torch.tensor(index, device=whole.device), whole)


# ------------------------------------------------------------------------------- what a model is


def reader(model: nn.Module) -> nn.Module:
    """The module of a model that reads its cache and makes its masks: where prefixes are at home.

    That is the stack of layers: `LlamaModel` in a `LlamaForCausalLM`, the decoder of T5.
    """
    get = getattr(model, "get_decoder", None)
    return model if get is None else get()


def objection(module: nn.Module) -> str:
    """Why a module can have no prefix; nothing if it can. It is not run for that."""
    name = type(module).__name__
    if _CACHE not in names_of(cast(Any, type(module)).forward) or not hasattr(module, "config"):
        return f"{name} takes no cache of keys and values"
    known: Any = transformers_caches()
    kinds, _ = known.get_layer_types_and_kwargs(cast(Any, module).config)
    others = sorted(set(kinds) - _ATTENTION)
    return f"{name} has layers that keep something else: {', '.join(others)}" if others else ""


def check(module: nn.Module) -> None:
    """Raise StateError (E475) for a module that can have no prefix; make what calls need once."""
    why = objection(module)
    if why:
        refuse("E475", why, hint="a prefix is keys and values, which only attention reads")
    views()


def sizes(model: nn.Module) -> tuple[tuple[int, int, int] | None, ...]:
    """For each layer, how many kv_heads, and how long a key and a value is; None as in `stored`.

    One token is run to see it; in most models, that needs no data. It is what the cache has: where
    that is compressed (DeepSeek), a prefix is too.
    Raises StateError (E475) as `check`.
    """
    module = reader(model)
    check(module)
    device: torch.device = cast(Any, module).device
    devices = [] if device.type in ("cpu", "meta") else [device]
    # A mask of all axes is taken as it is; of another, the values are looked at.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    own = mask if device.type == "meta" else mask[0, 0]
    with untyped.random.fork_rng(devices):  # which dropout would draw from
        every = _filled(module, torch.zeros(1, 1, dtype=torch.long, device=device), own)
    return tuple(k and (k[0].shape[1], k[0].shape[3], k[1].shape[3]) for k in every)


def stored(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
) -> tuple[Pair | None, ...]:
    """What a model keeps of a text [1, tokens]: K and V [1, kv_heads, n, head_dim] of each layer.

    As a prefix of n tokens it is what the text itself was; keys have their positions. n is the
    number of tokens that the mask does not leave out. None for a layer that keeps nothing of its
    own. Layers with a window give all tokens.
    Raises StateError (E475) as `check`, (E479) for another number of texts, or none.
    """
    module = reader(model)
    check(module)
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:
        _refuse_texts(input_ids)
    if cast(Any, module).config.is_encoder_decoder:
        _refuse_decoder(module)
    ids = input_ids if attention_mask is None else input_ids[attention_mask.bool()][None]
    if not ids.shape[1]:
        _refuse_texts(ids)
    return _filled(module, ids, torch.ones_like(ids))


@torch.no_grad()
def _filled(module: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Pair | None, ...]:
    """What each layer keeps of some tokens, without a window."""
    kept: Any = transformers_caches().DynamicCache()
    cast(Any, module)(input_ids=ids, attention_mask=mask, past_key_values=kept, use_cache=True)
    count: int = cast(Any, module).config.get_text_config(decoder=True).num_hidden_layers
    every = {i: (layer.keys, layer.values) for i, layer in enumerate(kept.layers)}
    return tuple(every[i] if i in every and every[i][0] is not None else None for i in range(count))


# ------------------------------------------------------------------------------------ refusals


def _refuse_kept(module: nn.Module) -> NoReturn:
    refuse(
        "E477",
        f"{type(module).__name__} is given a cache, and its layers are run again for gradients",
        hint="call eval() to generate; in training, leave past_key_values out",
    )


def _refuse_unread(module: nn.Module, layers: Sequence[int]) -> NoReturn:
    refuse(
        "E477",
        f"layers {', '.join(map(str, layers))} of {type(module).__name__} read no prefix",
        hint="the model dropped the cache, as some do with gradient checkpointing: turn that off; "
        "layers that share another's keys and values have no prefix of their own",
    )


def _refuse_texts(ids: Tensor) -> NoReturn:
    refuse(
        "E479",
        f"a prefix is made of one text, and there are tokens {list(ids.shape)}",
        hint="input_ids [1, tokens], of which the mask leaves at least one",
    )


def _refuse_decoder(module: nn.Module) -> NoReturn:
    refuse(
        "E479",
        f"what {type(module).__name__} keeps is not of one text: it reads an encoder's too",
        hint="take the text from a model that has a decoder alone",
    )
