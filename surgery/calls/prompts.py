"""Virtual tokens in a live model's call: what stands before or after the embedded text.

A call whose cache is empty reads x' = [P | x | Q] for the embeddings x of its text, with a mask,
labels and positions that are as long. A cache remembers that its first call put them there: later
calls have a longer mask and later positions, and are left alone otherwise. Nothing else is kept.

Prompt tuning: https://arxiv.org/abs/2104.08691; for vision: https://arxiv.org/abs/2203.12119.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.calls.prompt_calls import (
    CACHE,
    EMBEDS,
    IDS,
    MASK,
    Forward,
    Given,
    begun_with,
    cache_of,
    check,
    embedding_of,
    first,
    goes_on,
    is_flat,
    last_shift,
    later,
    modules_of,
    named,
    parameters,
    pools_last,
    remember,
    shorter_first,
    stays_behind,
    text_of,
    up_to_last,
)
from surgery.calls.virtual import (
    Prompt,
    behind,
    check_length,
    refuse_cache,
    refuse_model,
    refuse_unequal,
    restored,
    rolled,
)

Call = Callable[[nn.Module, Forward, Prompt, tuple[Any, ...], Given], Any]
"""What runs in place of a method of a module: (module, method, prompt, args, kwargs)."""

_PREPARE, _RESERVE = "prepare_inputs_for_generation", "_prepare_cache_for_generation"
# What an embedding of patches puts before them.
_LEADING = ("cls_token", "distillation_token", "register_tokens")

# ----------------------------------------------------------------------------- what is mounted


def calls_of(model: nn.Module) -> Mapping[str, Mapping[str, Call]]:
    """By the path of a module and the name of its method: what gives a model virtual tokens.

    Raises StateError (E470) for a model that has no place for them.
    """
    names = parameters(type(model).forward)
    if "decoder_input_ids" in names:
        path, encoder = _encoder(model)
        _check_embedded(encoder)
        return {"": {"forward": crossed}, path: {"forward": encoded}}
    if "pixel_values" in names and IDS not in names:
        return {_patches(model): {"forward": patched}}
    _check_embedded(model)
    generating: dict[str, Call] = {_PREPARE: prepared, _RESERVE: reserved}
    known = {name: call for name, call in generating.items() if hasattr(model, name)}
    return {"": {"forward": prompted, **known}}


def _encoder(model: nn.Module) -> tuple[str, nn.Module]:
    get: Any = getattr(model, "get_encoder", None)
    encoder = None if get is None else get()
    for path, module in modules_of(model):
        if path and module is encoder:
            return path, module
    refuse_model(model, "it does not say which of its modules is the encoder")


def _check_embedded(module: nn.Module) -> None:
    if EMBEDS not in parameters(type(module).forward):
        refuse_model(module, f"its forward takes no `{EMBEDS}`")
    embedding_of(module)


def _patches(model: nn.Module) -> str:
    found = [path for path, module in modules_of(model) if _leading(module)]
    if len(found) != 1:
        refuse_model(model, "it reads images, and no module gives their tokens with a class token")
    return found[0]


def _leading(module: nn.Module) -> int:
    own = dict(module.named_parameters(recurse=False))
    return sum(own[name].shape[1] for name in _LEADING if name in own)


# ------------------------------------------------------------------------------------ forward


def prompted(
    module: nn.Module, forward: Forward, prompt: Prompt, args: tuple[Any, ...], kwargs: Given
) -> Any:
    """The forward of a model that reads a text, with virtual tokens beside it.

    Its outputs by token are as long as [P | x | Q]. Raises StateError: E470 for a model that has no
    place for them, E471 and E472 for an argument that cannot grow with the text, E473 for prompts
    of unequal length where positions are fixed, E474 for a cache that lacks them.
    """
    given = named(forward, args, kwargs)
    if not prompt.added:
        return forward(module, **given)
    cache = cache_of(given)
    if cache is not None and goes_on(cache, given.get(MASK)):
        return forward(module, **later(module, forward, prompt, given))
    check(module, prompt, given)
    if pools_last(module, forward) and not prompt.after:
        shift = last_shift(module, given)
        if shift is not None:
            return _up_to_last(module, forward, prompt, given, shift)
    moved = shorter_first(module, forward, prompt, given)
    is_behind = stays_behind(module, forward, given)
    order = _behind(module, prompt, given) if is_behind else moved
    result = forward(module, **first(module, forward, prompt, given, order))
    begun = text_of(module, given).shape[1] if is_behind else 0
    remember(prompt, begun if moved is None else -1, cache, result)
    return result


def _up_to_last(
    module: nn.Module, forward: Forward, prompt: Prompt, given: Given, shift: Tensor
) -> Any:
    """The same for a head that reads the last token, which `shift` brings to the last place."""
    given = up_to_last(given, shift)
    order = rolled(shift, text_of(module, given).shape[1] + prompt.added)
    if stays_behind(module, forward, given):
        order = _behind(module, prompt, given).gather(1, order)
    return restored(forward(module, **first(module, forward, prompt, given, order)), order)


def _behind(module: nn.Module, prompt: Prompt, given: Given) -> Tensor:
    return behind(given[MASK], prompt.before, text_of(module, given).shape[1] + prompt.added)


def encoded(
    module: nn.Module, forward: Forward, prompt: Prompt, args: tuple[Any, ...], kwargs: Given
) -> Any:
    """The same for the encoder of an encoder–decoder, whose mask may have grown already."""
    given = named(forward, args, kwargs)
    if not prompt.added:
        return forward(module, **given)
    mask, length = given.get(MASK), text_of(module, given).shape[1]
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == length + prompt.added:
        given[MASK] = mask[:, prompt.before : prompt.before + length]
    check(module, prompt, given)
    return forward(module, **first(module, forward, prompt, given))


def crossed(
    module: nn.Module, forward: Forward, prompt: Prompt, args: tuple[Any, ...], kwargs: Given
) -> Any:
    """The forward of an encoder–decoder whose encoder has virtual tokens: its decoder sees them.

    Raises StateError (E471) for a mask that fits what was encoded neither with nor without them.
    """
    given = named(forward, args, kwargs)
    mask: Tensor | None = given.get(MASK)
    outputs = given.get("encoder_outputs")
    if mask is None and prompt.counts is None:
        return forward(module, **given)
    whole: Tensor = text_of(module, given) if outputs is None else outputs[0]
    length = whole.shape[1] - (0 if outputs is None else prompt.added)
    if mask is None:
        mask = torch.ones(len(whole), length, dtype=torch.long, device=whole.device)
    if outputs is not None and mask.shape[1] == whole.shape[1]:
        return forward(module, **given)
    check_length(MASK, mask.shape[1], length, prompt.added)
    return forward(module, **{**given, MASK: prompt.mask(mask)})


def patched(
    module: nn.Module, forward: Forward, prompt: Prompt, args: tuple[Any, ...], kwargs: Given
) -> Any:
    """The embedding of an image [batch, tokens, hidden], with virtual tokens among its own.

    Those before stand after the class token, which a head reads at its place. Raises StateError:
    E470 for an embedding that is no such tensor, E473 for prompts of unequal length.
    """
    x = forward(module, *args, **kwargs)
    if not isinstance(x, Tensor) or x.dim() != 3:
        refuse_model(module, "it does not give its tokens as one tensor")
    if prompt.counts is not None:
        refuse_unequal("nothing masks a token of an image")
    leading = _leading(module)
    return torch.cat([x[:, :leading], prompt.grow(x[:, leading:])], 1)


# --------------------------------------------------------------------------------- generation


def prepared(
    module: nn.Module, prepare: Forward, prompt: Prompt, args: tuple[Any, ...], kwargs: Given
) -> Given:
    """`prepare_inputs_for_generation`, which slices a text by what a cache has, and makes masks."""
    given = named(prepare, args, kwargs)
    cache, mask = given.get(CACHE), given.get(MASK)
    if not prompt.added or cache is None:
        return prepare(module, **given)
    if not int(cache.get_seq_length()):
        made = prepare(module, **given)
        # A mask of four dimensions is made for the text alone: the model makes its own from this.
        return {**made, MASK: mask} if is_flat(mask) and not is_flat(made.get(MASK)) else made
    begun = begun_with(prompt, cache)
    if given.get("is_first_iteration") and given.get("next_sequence_length") is not None:
        given["next_sequence_length"] += prompt.added
    if cache.is_compileable and is_flat(mask):
        given[MASK] = prompt.mask(mask, begun)
    return prepare(module, **given)


def reserved(
    module: nn.Module, reserve: Forward, prompt: Prompt, args: tuple[Any, ...], kwargs: Given
) -> Any:
    """`_prepare_cache_for_generation`: a cache of a fixed size has room for the virtual tokens.

    Raises StateError (E474) where tokens after a text would come to stand after what is written,
    or between its chunks.
    """
    given = named(reserve, args, kwargs)
    config: Any = given.get("generation_config")
    if prompt.after and (config.use_cache is False or config.prefill_chunk_size is not None):
        refuse_cache("those after a text go into it once, with the whole text")
    if "max_cache_length" in given:
        given["max_cache_length"] += prompt.added
    return reserve(module, **given)
