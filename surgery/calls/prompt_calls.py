"""The arguments of a call that has virtual tokens: of the first with a text, and of later ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from surgery.calls.virtual import (
    Prompt,
    check_length,
    refuse_argument,
    refuse_cache,
    refuse_mask,
    refuse_model,
    refuse_unequal,
    rolled,
    taken,
)

Given = dict[str, Any]
Forward = Callable[..., Any]

# transformers names them so.
IDS, EMBEDS, MASK, POSITIONS = "input_ids", "inputs_embeds", "attention_mask", "position_ids"
CACHE = "past_key_values"
_LABELS, _PLACES, _KEPT = "labels", ("start_positions", "end_positions"), "logits_to_keep"

# What an argument by token has for the virtual ones.
_FILLED: Mapping[str, int] = {
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "global_attention_mask": 0,
    "bbox": 0,
}
_KNOWN = frozenset({IDS, EMBEDS, MASK, POSITIONS, _LABELS, *_PLACES, *_FILLED})
# What a text has tokens for, each at its place.
_WITHIN = ("pixel_values", "pixel_values_videos", "input_features", "image_grid_thw")
# What transformers calls a cache of other models.
_CACHES = (CACHE, "cache_params", "state", "mems", "past_buckets_states")
# The loss of a head that reads one token.
_CLASSES = "ForSequenceClassification"


def parameters(method: Forward) -> tuple[str, ...]:
    """The names of a method's parameters after `self`."""
    return tuple(inspect.signature(method).parameters)[1:]


def named(method: Forward, args: tuple[Any, ...], kwargs: Given) -> Given:
    """What a method is called with, by name."""
    if not args:
        return dict(kwargs)
    return {**dict(zip(parameters(method), args, strict=False)), **kwargs}


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by their paths."""
    return cast("Iterator[tuple[str, nn.Module]]", model.named_modules())


def embedding_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What embeds a model's text. Raises StateError (E470) if it does not say."""
    get: Any = getattr(module, "get_input_embeddings", None)
    try:
        found = None if get is None else get()
    except (NotImplementedError, AttributeError):
        found = None
    if found is None:
        refuse_model(module, "it does not say which module embeds its text")
    return found


def text_of(module: nn.Module, given: Given) -> Tensor:
    """What a call is about: its embeddings, or else the numbers of its tokens."""
    for name in (EMBEDS, IDS):
        if isinstance(given.get(name), Tensor):
            return given[name]
    refuse_model(module, f"it is called with neither `{IDS}` nor `{EMBEDS}`")


def is_flat(mask: Any) -> TypeGuard[Tensor]:
    """Whether a mask says of tokens alone whether they are padding."""
    return isinstance(mask, Tensor) and mask.dim() == 2


# ---------------------------------------------------------------------------------- first calls


def first(
    module: nn.Module, forward: Forward, prompt: Prompt, given: Given, order: Tensor | None = None
) -> Given:
    """The arguments of a call in which the virtual tokens are put to its text, in an order.

    Raises StateError: E471 for what is not as long as the text, E473 where a model counts positions
    itself that prompts of unequal length move.
    """
    x = given.get(EMBEDS)
    x = embedding_of(module)(given[IDS]) if x is None else x
    given = {**given, EMBEDS: x}
    grown = {**_filled(module, prompt, given), EMBEDS: prompt.grow(x)}
    is_plain = prompt.counts is None and order is None
    if given.get(MASK) is not None or not is_plain:
        mask = _seen(given)
        check_length(MASK, mask.shape[1], x.shape[1], prompt.added)
        grown[MASK] = prompt.mask(mask)
    positions = given.get(POSITIONS)
    if positions is not None:
        check_length(POSITIONS, positions.shape[-1], x.shape[1], prompt.added)
    elif not is_plain:
        positions = _counted(module, forward, x.shape[1], x.device)
    if order is not None:
        grown = {name: taken(value, order) for name, value in grown.items()}
    if positions is not None:
        grown[POSITIONS] = _placed(prompt.positions(positions), order)
    return {**given, **_moved(prompt, given, order), IDS: None, **grown}


def _filled(module: nn.Module, prompt: Prompt, given: Given) -> Given:
    """The arguments by token whose virtual tokens have a number of their own."""
    x = given[EMBEDS]
    fills = {name: fill for name, fill in _FILLED.items() if given.get(name) is not None}
    if _is_by_token(module, given.get(_LABELS), x):
        fills[_LABELS] = -100
    for name in fills:
        check_length(name, given[name].shape[1], x.shape[1], prompt.added)
    return {name: prompt.fill(given[name], fill) for name, fill in fills.items()}


def _is_by_token(module: nn.Module, labels: Any, x: Tensor) -> bool:
    """Whether a call has a label for each token, not for each sample."""
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return False
    each = getattr(module, "loss_type", None) != _CLASSES
    return each and labels.dim() > 1 and labels.shape[:2] == x.shape[:2]


def _seen(given: Given) -> Tensor:
    """The mask of a call [batch, tokens], or one that hides nothing."""
    if given.get(MASK) is not None:
        return given[MASK]
    text: Tensor = given[IDS] if given.get(EMBEDS) is None else given[EMBEDS]
    return torch.ones(text.shape[:2], dtype=torch.long, device=text.device)


def _placed(positions: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return positions
    every = positions.expand(*positions.shape[:-2], len(order), -1)
    return taken(every, order, positions.dim() - 1)


def _moved(prompt: Prompt, given: Given, order: Tensor | None) -> Given:
    """The arguments that say where something stands in the text, said of [P | x | Q]."""
    moved: Given = {}
    for name in _PLACES:
        place: Tensor | None = given.get(name)
        if place is not None:
            moved[name] = _followed(place.clamp(min=0) + prompt.before, order)
    if isinstance(given.get(_KEPT), Tensor):
        moved[_KEPT] = given[_KEPT] + prompt.before
    return moved


def _followed(place: Tensor, order: Tensor | None) -> Tensor:
    """Where tokens at places [batch, …] of [P | x | Q] are in an order; none stays none."""
    if order is None:
        return place
    length, each = order.shape[1], place.view(len(place), -1)
    found = order.argsort(1).gather(1, each.clamp(max=length - 1))
    return torch.where(each < length, found, each).view(place.shape)


def check(module: nn.Module, prompt: Prompt, given: Given) -> None:
    """Refuse a call that cannot be said of [P | x | Q]: E470 to E473."""
    text = text_of(module, given)
    if text.dim() != (2 if given.get(EMBEDS) is None else 3):
        refuse_argument(IDS, f"has {text.dim()} dimensions, not [batch, tokens]")
    if given.get(MASK) is not None and not is_flat(given[MASK]):
        refuse_mask(MASK)
    for name, value in given.items():
        if name in _WITHIN and value is not None:
            refuse_argument(name, "stands within the text, at places that a model looks for")
        if name not in _KNOWN and _goes_by_token(name, value, text):
            refuse_argument(name, "is given by token, and nothing says what a virtual one has")
    if _packs(given):
        refuse_argument(POSITIONS, "says that several texts are packed in one")
    if prompt.counts is not None and len(prompt.counts) != len(text):
        refuse_unequal(f"{len(prompt.counts)} are known, for a batch of {len(text)}")


def _goes_by_token(name: str, value: Any, text: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dim() < 2:
        return False
    return value.shape[:2] == text.shape[:2] and not name.startswith(("decoder_", "encoder_"))


def _packs(given: Given) -> bool:
    """Whether positions begin anew within a text, which transformers looks for without a mask."""
    positions = given.get(POSITIONS)
    if positions is None or given.get(MASK) is not None or torch.compiler.is_compiling():
        return False
    return bool((positions.diff(dim=-1) != 1).any())


# ----------------------------------------------------------------------------------- positions


def _counted(
    module: nn.Module, forward: Forward, length: int, device: torch.device
) -> Tensor | None:
    """The positions [1, tokens] that a model gives to a text itself; None if it looks at none."""
    if POSITIONS in parameters(forward):
        return _start(module) + torch.arange(length, device=device)[None]
    for path, _ in modules_of(module):
        if "position" in path.rpartition(".")[2]:
            refuse_unequal(f"`{path}` of {type(module).__name__} counts positions by itself")
    return None


def _start(module: nn.Module) -> int:
    """The position of a first token: after that of padding, where that has one."""
    for path, child in modules_of(module):
        if isinstance(child, nn.Embedding) and "position" in path.rpartition(".")[2]:
            return 0 if child.padding_idx is None else child.padding_idx + 1
    return 0


# -------------------------------------------------------------------------------------- orders


def pools_last(module: nn.Module, forward: Forward) -> bool:
    """Whether a head reads the last token that is no padding, which `input_ids` alone say."""
    if getattr(module, "loss_type", None) != _CLASSES:
        return False
    return "pad_token_id" in inspect.unwrap(forward).__code__.co_names


def last_shift(module: nn.Module, given: Given) -> Tensor | None:
    """By how many places to move each text [batch], so that the token which a head reads is last.

    None where the head reads what is last.
    """
    config: Any = module.config
    padding = config.get_text_config().pad_token_id
    ids: Tensor | None = given.get(IDS)
    if padding is None or ids is None:
        return None
    last = (torch.arange(ids.shape[1], device=ids.device) * (ids != padding)).amax(-1)
    return ids.shape[1] - 1 - last


def up_to_last(given: Given, shift: Tensor) -> Given:
    """The arguments of a call in which what stands after that token is not seen, and not kept."""
    mask = _seen(given)
    length = mask.shape[1]
    seen = torch.arange(length, device=mask.device) < length - shift[:, None]
    return {**given, MASK: mask * seen, CACHE: None, "use_cache": False}


def stays_behind(module: nn.Module, forward: Forward, given: Given) -> bool:
    """Whether the padding in front of a text comes before its virtual tokens too.

    Then a window, or a position that a model counts itself, is that of the text without padding.
    Where a model takes positions and is given none, padding has them as well, wherever it stands.
    """
    if not is_flat(given.get(MASK)):
        return False
    told = given.get(POSITIONS) is not None or POSITIONS not in parameters(forward)
    if told and _windows(module) and not torch.compiler.is_compiling() and _is_hidden(given[MASK]):
        refuse_cache("the first chunk of a text is padding alone, which a window would count")
    return told and _is_causal(module, forward)


def _windows(module: nn.Module) -> bool:
    """Whether some layer looks back no further than so many tokens."""
    get: Any = getattr(getattr(module, "config", None), "get_text_config", None)
    return get is not None and getattr(get(), "sliding_window", None) is not None


def _is_hidden(mask: Tensor) -> bool:
    """Whether nothing of some text is seen."""
    return bool((mask == 0).all(1).any())


def shorter_first(
    module: nn.Module, forward: Forward, prompt: Prompt, given: Given
) -> Tensor | None:
    """The order in which no sample's first token is padding of a shorter prompt; None without any.

    Where a token sees those after it, a head may read the first.
    """
    if prompt.counts is None or _is_causal(module, forward):
        return None
    text = text_of(module, given)
    shift = (prompt.counts - prompt.before).to(text.device)
    return rolled(shift, text.shape[1] + prompt.added)


def _is_causal(module: nn.Module, forward: Forward) -> bool:
    """Whether a token sees none of those after it; where no attention says so, what writes does."""
    for child in module.modules():
        if hasattr(child, "is_causal"):
            return bool(child.is_causal)
    can_generate: Any = getattr(module, "can_generate", None)
    writes = can_generate is not None and can_generate()
    return writes or pools_last(module, forward) or _summary(module) == "last"


def _summary(module: nn.Module) -> object:
    """Which token a head of some models reads, as their configs say."""
    return getattr(getattr(module, "config", None), "summary_type", None)


# -------------------------------------------------------------------------------------- caches

_HELD = "_surgery_virtual"
"""The attribute of a cache that says how many virtual tokens it holds before and after a text, and
of how many first tokens of the text the padding in front comes before them."""


def cache_of(given: Given) -> Any:
    """The cache of a call; None if it has none. StateError (E474) for one that cannot be asked."""
    for name in _CACHES:
        cache = given.get(name)
        if cache is not None and not hasattr(cache, "get_seq_length"):
            refuse_cache(f"`{name}` does not say whether it has begun")
        if cache is not None:
            return cache
    return None


def length_of(cache: Any) -> int | None:
    """How many tokens a cache has, virtual ones too; None for one that has states alone."""
    try:
        return int(cache.get_seq_length())
    except ValueError:  # of a model without attention
        return None


def goes_on(cache: Any, mask: Any) -> bool:
    """Whether a cache has tokens already."""
    made = mask is not None and not is_flat(mask)
    if made and torch.compiler.is_compiling() and hasattr(cache, _HELD):
        return True  # a mask was made for it; how much a static cache has is no constant of a graph
    length = length_of(cache)
    return bool(cache.has_previous_state()) if length is None else length > 0


def remember(prompt: Prompt, begun: int, cache: Any, result: Any) -> None:
    """Let the cache of a first call say what it holds."""
    if cache is None:
        values: Any = [*cast(Any, result).values()] if isinstance(result, dict) else result
        every = cast("Sequence[Any]", values) if isinstance(values, list | tuple) else ()
        cache = next((value for value in every if hasattr(value, "get_seq_length")), None)
    if cache is not None:
        setattr(cache, _HELD, (prompt.before, prompt.after, begun))


def begun_with(prompt: Prompt, cache: Any) -> int:
    """Of how many first tokens the padding in front comes before the virtual ones in a cache.

    Raises StateError (E474) for a cache that does not hold these virtual tokens.
    """
    before, after, begun = cast("tuple[int, int, int]", getattr(cache, _HELD, (0, 0, 0)))
    if begun < 0:
        refuse_cache("texts with shorter prompts have padding after them")
    if (before, after) != (prompt.before, prompt.after):
        refuse_cache(f"it has {before + after} of them, where {prompt.added} are live")
    return begun


def later(module: nn.Module, forward: Forward, prompt: Prompt, given: Given) -> Given:
    """The arguments of a call that goes on: a mask and positions that count what the cache has.

    Raises StateError: E471 for a mask that is not as long as the whole text, E474 for a cache that
    does not hold the prompt.
    """
    cache, mask, positions = cache_of(given), given.get(MASK), given.get(POSITIONS)
    begun, text = begun_with(prompt, cache), text_of(module, given)
    changed: Given = {}
    needs = is_flat(mask) or (mask is None and prompt.counts is not None)
    has = length_of(cache) if needs else None
    if has is not None:
        past = has - prompt.added
        whole = text.new_ones(len(text), past + text.shape[1], dtype=torch.long)
        mask = whole if mask is None else mask
        check_length(MASK, mask.shape[1], whole.shape[1], prompt.added)
        changed[MASK] = prompt.mask(mask, begun)
        if positions is None and prompt.counts is not None:
            counted = _counted(module, forward, whole.shape[1], text.device)
            positions = None if counted is None else counted[:, past:]
    if positions is not None:
        changed[POSITIONS] = prompt.later(positions)
    return {**given, **changed}
