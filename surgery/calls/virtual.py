"""Virtual tokens, and what grows with a text when they are put beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from surgery.errors import refuse

Tokens = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The virtual tokens of a call.

    before, after: n and m, how many there are on each side of the text. tokens: what gives them
    for x [batch, tokens, hidden]: [batch or 1, n, hidden] and [batch or 1, m, hidden], or None for
    none. counts: [batch], for each sample of a routed batch, how many of the n, the last ones, are
    its own; the others are masked.
    """

    before: int
    after: int
    tokens: Tokens
    counts: Tensor | None = None

    @property
    def added(self) -> int:
        """How many tokens a call has more."""
        return self.before + self.after

    def own(self, device: torch.device) -> Tensor:
        """Whether each of the tokens before a text is the sample's own: [batch or 1, n]."""
        place = torch.arange(self.before, device=device)
        if self.counts is None:
            return torch.ones_like(place, dtype=torch.bool)[None]
        return place >= self.before - self.counts.to(device)[:, None]

    def grow(self, x: Tensor) -> Tensor:
        """[P | x | Q] for x [batch, tokens, hidden]."""
        before, after = self.tokens(x)
        return torch.cat([*_like(before, x), x, *_like(after, x)], 1)

    def fill(self, value: Tensor, fill: int) -> Tensor:
        """[batch, tokens, …] with something for each virtual token."""
        inner = [0] * (2 * value.dim() - 4)
        return pad(value, (*inner, self.before, self.after), value=fill)

    def mask(self, mask: Tensor, begun: int = 0) -> Tensor:
        """A mask [batch, tokens] in which a sample's own virtual tokens are seen.

        begun: of how many tokens the padding in front stays before the virtual ones.
        """
        own = self.own(mask.device).to(mask.dtype).expand(len(mask), -1)
        grown = pad(torch.cat([own, mask], 1), (0, self.after), value=1)
        if not begun:
            return grown
        return taken(grown, behind(mask[:, :begun], self.before, grown.shape[1]))

    def positions(self, text: Tensor) -> Tensor:
        """Positions of x' for those of the text [… batch, tokens], where the first is P's first."""
        own = self.own(text.device)
        before = text.amin(-1, keepdim=True) + (own.cumsum(-1) - 1).clamp(min=0)
        moved = text + own.sum(-1, keepdim=True)
        after = moved.amax(-1, keepdim=True) + 1 + torch.arange(self.after, device=text.device)
        after = after.expand(*moved.shape[:-1], -1)
        return torch.cat([before, moved, after], -1)

    def later(self, text: Tensor) -> Tensor:
        """Positions [… batch, tokens] of what comes after all that a cache has."""
        return text + self.own(text.device).sum(-1, keepdim=True) + self.after


def _like(tokens: Tensor | None, x: Tensor) -> tuple[Tensor, ...]:
    if tokens is None:
        return ()
    return (tokens.to(x).expand(len(x), -1, -1),)


def prompt_of(grow: Callable[[Tensor], Tensor], before: int, after: int = 0) -> Prompt:
    """The prompt of a function that gives [P | x | Q] for x [batch, tokens, hidden]."""

    def tokens(x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        whole = grow(x)
        return whole[:, :before], whole[:, before + x.shape[1] :] if after else None

    return Prompt(before, after, tokens)


def batched(parts: Sequence[tuple[Prompt | None, Tensor]]) -> Prompt:
    """One prompt for a batch whose samples have their own, each part with its samples' places.

    Raises StateError (E473) if there are not as many tokens after every text.
    """
    owned = [_NONE if prompt is None else prompt for prompt, _ in parts]
    places = [place for _, place in parts]
    if len({prompt.after for prompt in owned}) > 1:
        refuse_unequal("those after a text are as many for each")
    most = max(prompt.before for prompt in owned)
    back = torch.cat(places).argsort()

    def tokens(x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        befores: list[Tensor] = []
        afters: list[Tensor] = []
        for prompt, place in zip(owned, places, strict=True):
            part = x.index_select(0, place.to(x.device))
            before, after = prompt.tokens(part)
            lead = part.new_zeros(len(part), most - prompt.before, part.shape[2])
            befores.append(torch.cat([lead, *_like(before, part)], 1))
            afters += _like(after, part)
        order = back.to(x.device)
        every = torch.cat(befores)[order]
        return every, torch.cat(afters)[order] if afters else None

    known = (
        place.new_full((len(place),), p.before) for p, place in zip(owned, places, strict=True)
    )
    counts = None if all(p.before == most for p in owned) else torch.cat([*known])[back]
    return Prompt(most, owned[0].after, tokens, counts)


_NONE = Prompt(0, 0, lambda _: (None, None))


# ------------------------------------------------------------------------------------- orders
#
# An order [batch, tokens] says for each place of a sample which token of [P | x | Q] comes there.


def taken(value: Tensor, order: Tensor, dim: int = 1) -> Tensor:
    """[… batch, … tokens, …] in an order. dim: that of the tokens."""
    index = order.view(*[1] * (dim - 1), *order.shape, *[1] * (value.dim() - dim - 1))
    return torch.take_along_dim(value, index, dim)


def rolled(shift: Tensor, length: int) -> Tensor:
    """The order in which each sample is moved to the right by its own shift [batch], and around."""
    return (torch.arange(length, device=shift.device) - shift[:, None]) % length


def behind(mask: Tensor, before: int, length: int) -> Tensor:
    """The order in which the padding in front of a text, masked so [batch, tokens], stays there."""
    padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)
    place = torch.arange(length, device=mask.device)
    is_virtual = (place >= padding) & (place < padding + before)
    text = torch.where(place < padding, place + before, place)
    return torch.where(is_virtual, place - padding, text)


def restored(result: Any, order: Tensor) -> Any:
    """A model's output, with hidden states and attentions in the order of [P | x | Q] again."""
    if not isinstance(result, dict):
        return result
    output, back = cast("dict[str, Any]", result), order.argsort(1)
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(taken(h, back) for h in output["hidden_states"])
    if output.get("attentions") is not None:
        output["attentions"] = tuple(_both_restored(a, back) for a in output["attentions"])
    return output


def _both_restored(attention: Tensor, back: Tensor) -> Tensor:
    """[batch, heads, tokens, tokens]: what reads, and what is read."""
    rows = taken(attention.transpose(1, 2), back)
    return taken(rows.transpose(1, 3), back).permute(0, 2, 3, 1)


# ------------------------------------------------------------------------------------ refusals


def refuse_model(module: object, reason: str) -> NoReturn:
    """E470, for what has no place for virtual tokens."""
    refuse(
        "E470",
        f"{type(module).__name__} takes no virtual tokens: {reason}",
        hint="they stand beside the embedded text of a language model or the patches of an image; "
        "select a module that has these",
    )


def check_length(name: str, found: int, length: int, added: int) -> None:
    """E471, for an argument by token that is not as long as the text."""
    if found != length:
        refuse(
            "E471",
            f"`{name}` is for {found} tokens; the text has {length}, beside {added} virtual ones",
            hint="give it for the text alone, with all that the cache has of it: virtual tokens "
            "are counted here",
        )


def refuse_mask(name: str) -> NoReturn:
    """E471, for a mask of pairs of tokens."""
    refuse(
        "E471",
        f"`{name}` says more than which tokens are padding, and cannot grow with virtual tokens",
        hint="give a mask [batch, tokens]",
    )


def refuse_argument(name: str, reason: str) -> NoReturn:
    """E472, for an argument that cannot be said of what has virtual tokens."""
    refuse(
        "E472",
        f"`{name}` {reason}, and cannot grow with virtual tokens",
        hint="leave it out, or let no virtual tokens be live in this call",
    )


def refuse_unequal(reason: str) -> NoReturn:
    """E473, for samples of a batch that cannot have prompts of unequal length."""
    refuse(
        "E473",
        f"samples of one batch have unequal numbers of virtual tokens: {reason}",
        hint="route samples whose prompts are of one length, or call the model once for each",
    )


def refuse_cache(reason: str) -> NoReturn:
    """E474, for a cache in which a text cannot go on."""
    refuse(
        "E474",
        f"the cache of a call cannot go on with virtual tokens: {reason}",
        hint="they enter a cache with its first tokens: begin with an empty one, and choose what "
        "is live between texts; where a model has no other, use_cache=False",
    )
