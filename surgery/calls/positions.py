"""Which tokens of a call an activation's equation is for: `at first(5)`, `after("…")`, ….

A site sees hidden states alone. What their tokens are, which of them are padding, and what a cache
holds of the text already, is said where the model is called: `placed` stands around that call, and
`places` answers within it, in the same thread, for every site.

Places are counted in a text without its padding, so they are the same for padding on either side,
for a batch of texts of any lengths, and for a text that is read piece by piece. A *piece* is what
one call of the model brings; the *prompt* is the first piece, the one that finds no cache or an
empty one. What follows it by single tokens is generated.

* `first(n)`, and a place from the start: of the whole text, generated tokens included.
* `last(n)`, and a place from the end (-1 is the last): of the prompt. No generated token is one of
  them; a text of which a second piece brings several tokens has no known end, and is refused.
  Where a text is generated without a cache, each call is given all of it, as its prompt.
* `after(ids)`: from the start of the last time that the ids stand in the text, in the tokens that
  a call brings; in all that is generated then. Nowhere, where they do not stand. What is generated
  is not looked through. A later piece with such ids, after tokens were generated, begins anew.

The last is told from the tokens of earlier pieces, which are kept with the cache itself, on it, for
as long as it lives, and in its copies. Beams of a search share them with the text they come from.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from threading import local
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from surgery.algebra.places import Places
from surgery.calls.pieces import (
    NEVER,
    Piece,
    cache_in,
    is_cache,
    is_known,
    keep,
    last,
    pieces_in,
    since,
    start_of,
    straddles,
)
from surgery.errors import refuse


def places(spec: Places, x: Tensor) -> Tensor:
    """Which of the tokens of x [batch, tokens, hidden] are meant: [batch, tokens], of bool.

    Of hidden states whose tokens stand one after the other, [batch·tokens, hidden], as of those in
    rows. No padding is meant.

    Raises StateError: E482 outside of a model's call, E483 where the call does not tell, E484 where
    earlier calls would.
    """
    call = _HERE.call
    if call is None:
        refuse(
            "E482",
            "which tokens an adapter is for is not known outside of its model's call",
            hint="call the model that the adapter is on, and not a module of it",
        )
    mask = call.places(spec, x)
    return mask if x.dim() != _FLAT else mask.flatten()


def placed(
    module: nn.Module,
    forward: Callable[..., Any],
    names: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What a model's own forward gives, within which `places` knows the tokens of the call.

    names: of the arguments that may be given by place, from `names_of`.
    """
    call = _Call(dict(zip(names, args, strict=False)) | kwargs, _HERE.call)
    before = _HERE.call
    _HERE.call = call
    try:
        result = forward(module, *args, **kwargs)
    finally:
        _HERE.call = before
    call.keep_in(result)
    return result


@lru_cache(maxsize=1024)
def names_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the arguments that a forward takes by their place, without the module."""
    by_place = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = inspect.signature(forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in by_place)[1:]


def stacks_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """The modules of a model whose calls say which tokens there are: itself, in most models.

    Of an encoder and a decoder, which read texts of their own, both.
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return (model,)
    halves = (getattr(model, f"get_{half}")() for half in ("encoder", "decoder"))
    return tuple(cast("tuple[nn.Module, ...]", tuple(halves)))


# ------------------------------------------------------------------- what is computed again


def current() -> object:
    """The call that is under way in this thread, to be gone back to; see `repeated`."""
    return _HERE.call


@contextmanager
def repeated(call: object) -> Generator[None]:
    """Let a call of `current` be under way in this thread.

    What a checkpoint computes again in a backward pass has the tokens of its forward so.
    """
    before = _HERE.call
    _HERE.call = cast("_Call | None", call)
    try:
        yield
    finally:
        _HERE.call = before


@contextmanager
def rows_of(index: Tensor) -> Generator[None]:
    """Let hidden states be those of some rows of the batch [rows], in that order."""
    before = _HERE.rows
    _HERE.rows = index
    try:
        yield
    finally:
        _HERE.rows = before


# ------------------------------------------------------------------------------------- a call


class _Call:
    """A call of a model: its arguments, and what was asked of it so far.

    size: batch and tokens, where its arguments tell. past: the columns that its cache has.
    """

    __slots__ = ("cache", "given", "ids", "made", "past", "pieces", "size")

    def __init__(self, given: Mapping[str, Any], outer: _Call | None) -> None:
        """With arguments by their names; what a model calls in turn may know less than it does."""
        self.given = given
        self.size = _size(given)
        ids = given.get("input_ids")
        if ids is None and outer is not None and outer.size == self.size:
            ids = outer.ids
        self.ids: Tensor | None = ids
        cache = given.get("past_key_values")
        self.cache = cache if is_cache(cache) else None
        self.past = self._columns_before()
        self.pieces = pieces_in(self.cache, self.past)
        self.made: dict[object, Tensor] = {}

    def _columns_before(self) -> int | Tensor:
        """How much of the text a cache has; a tensor for a token that follows a known text."""
        if self.cache is None:
            return 0
        past: int | Tensor = self.cache.get_seq_length()
        if isinstance(past, int):
            return past
        single = self.size is not None and self.size[1] == 1
        # What a static cache has counts on in place, as soon as its first layer has run.
        return past.clone() if single and is_known(self.cache) else int(past)

    @property
    def begins(self) -> bool:
        """Whether this is the first piece of its text."""
        return isinstance(self.past, int) and self.past == 0

    def keep_in(self, result: object) -> None:
        """Let the cache know what was brought, for the calls that follow with it."""
        cache = self.cache if self.cache is not None else cache_in(result)
        if cache is None or self.size is None or not isinstance(self.past, int):
            return
        if not self.begins and self.size[1] == 1:
            return
        if not self._objection(self.size[0], self.size[1]):
            keep(cache, (*self.pieces, Piece(self.past, self.ids, self._real(*self.size))))

    # ------------------------------------------------------------------------------ its places

    def places(self, spec: Places, x: Tensor) -> Tensor:
        """[batch, tokens] of hidden states, whose own tokens they are checked to be."""
        batch, tokens = self._size_of(x)
        key = spec, batch, tokens
        if key not in self.made:
            meant = self._after if spec.kind == "after" else self._counted
            self.made[key] = meant(spec, batch, tokens) & self._real(batch, tokens)
        mask = self.made[key]
        rows = _HERE.rows
        if rows is not None:
            mask = mask.index_select(0, rows)
        return mask if x.dim() == _FLAT else mask[:, -x.shape[1] :]

    def _size_of(self, x: Tensor) -> tuple[int, int]:
        """The size of the call, of which x has all tokens, or the last ones that logits are of."""
        if self.given.get("cache_params") is not None:
            _refuse_call("keeps what it read in a state that does not say how much that is")
        if x is self.given.get("encoder_hidden_states"):
            _refuse_call("reads an encoder's states, of which the module makes keys and values")
        if self.size is None:
            if x.dim() != _ROWS or _HERE.rows is not None:
                _refuse_call(f"gives no tokens, and a module hidden states {list(x.shape)}")
            return x.shape[0], x.shape[1]
        batch, tokens = self.size
        here = batch if _HERE.rows is None else len(_HERE.rows)
        kept = self.given.get("logits_to_keep")
        last = min(kept, tokens) if isinstance(kept, int) and kept else tokens
        fits = (here * tokens,), (here, tokens), (here, last)
        if x.dim() not in (_FLAT, _ROWS) or tuple(x.shape[:-1]) not in fits:
            _refuse_call(f"is of {batch} x {tokens} tokens, and a module's {list(x.shape)}")
        return self.size

    def _columns(self, like: Tensor, tokens: int) -> Tensor:
        """Where the tokens are in the text with its padding, [tokens]."""
        past = self.past.to(like.device) if isinstance(self.past, Tensor) else self.past
        return torch.arange(tokens, device=like.device) + past

    def _mask(self) -> object:
        mask = self.given.get("attention_mask")
        if isinstance(mask, Mapping):
            return cast("Mapping[str, object]", mask).get("full_attention", _UNKNOWN)
        return mask

    def _objection(self, batch: int, tokens: int) -> str:
        """Why the call's mask does not say which tokens are padding; empty where it does."""
        mask = self._mask()
        if mask is None:
            return ""
        if isinstance(mask, Tensor) and mask.dim() == _FLAT:
            if isinstance(self.past, Tensor) or mask.shape == (batch, self.past + tokens):
                return ""
            text = f"{batch} x {self.past + tokens}"
            return f"has a mask {list(mask.shape)} for a text of {text} tokens"
        by_queries = isinstance(mask, Tensor) and mask.dim() == _BY_QUERIES
        full = isinstance(self.given.get("attention_mask"), Mapping)
        slides = not full and any(getattr(self.cache, "is_sliding", ()))
        if by_queries and not slides and getattr(self.cache, "is_compileable", False):
            return ""
        return "has a mask that does not say which tokens are padding"

    def _text(self, batch: int, tokens: int) -> Tensor | None:
        """Which columns of the text, from its first on, are real; None if all are."""
        objection, mask = self._objection(batch, tokens), self._mask()
        if objection:
            _refuse_call(objection)
        if not isinstance(mask, Tensor):
            return None
        if mask.dim() == _FLAT:
            return mask != 0
        # What `generate` makes for a static cache: the last token attends to all that is real.
        row = mask[:, 0, -1]
        return (row if row.dtype == torch.bool else row == 0).expand(batch, -1)

    def _real(self, batch: int, tokens: int) -> Tensor:
        """Which of the tokens are real, [batch, tokens]."""
        key = "real", batch, tokens
        if key not in self.made:
            text = self._text(batch, tokens)
            if text is None:
                self.made[key] = torch.ones(batch, tokens, dtype=torch.bool, device=self._device())
            else:
                self.made[key] = text.index_select(1, self._columns(text, tokens))
        return self.made[key]

    def _device(self) -> torch.device | None:
        every = (self.given.get(name) for name in _TOKENS)
        found = [value for value in every if isinstance(value, Tensor)]
        found = found or [value for value in self.given.values() if isinstance(value, Tensor)]
        return found[0].device if found else None

    def _counted(self, spec: Places, batch: int, tokens: int) -> Tensor:
        """The tokens that are meant by where they stand, among them perhaps padding."""
        number = self._number(batch, tokens)
        if spec.kind == "first":
            return number < spec.numbers[0]
        if spec.kind == "last":
            return self._from_end(batch, tokens) < spec.numbers[0]
        meant = torch.zeros_like(number, dtype=torch.bool)
        for place in spec.numbers:
            if place < 0:
                meant = meant | (self._from_end(batch, tokens) == -1 - place)
            else:
                meant = meant | (number == place)
        return meant

    def _number(self, batch: int, tokens: int) -> Tensor:
        """How many real tokens of its text stand before each, [batch, tokens]."""
        text = self._text(batch, tokens)
        if text is not None:
            return (text.cumsum(1) - 1).index_select(1, self._columns(text, tokens))
        return since(self._starts(batch, tokens)) + self.past

    def _from_end(self, batch: int, tokens: int) -> Tensor:
        """How many real tokens of the prompt stand after each, [batch, tokens]."""
        if not self.begins:
            if tokens > 1:
                _refuse_call(
                    "adds several tokens to a text, of which the end is asked for",
                    "let one call read the whole prompt, or count from its start",
                )
            return torch.full((batch, 1), NEVER, device=self._device())
        if self._text(batch, tokens) is not None:
            real = self._real(batch, tokens)
            return real.sum(1, keepdim=True) - real.cumsum(1)
        ends = self._starts(batch, tokens).roll(-1, 1)  # a start follows each end, and the last
        return since(ends.flip(1)).flip(1)

    def _starts(self, batch: int, tokens: int) -> Tensor:
        """Which tokens begin a text, [batch, tokens]: the first, and where positions begin anew.

        Texts that are packed in one row have their own positions, and nothing else that says so.
        """
        starts = torch.zeros(batch, tokens, dtype=torch.bool, device=self._device())
        starts[:, 0] = True
        positions = self.given.get("position_ids")
        if self.begins and isinstance(positions, Tensor) and positions.dim() == _FLAT:
            starts[:, 1:] = positions.diff(dim=1) != 1
        return starts

    # -------------------------------------------------------------------------- after some ids

    def _after(self, spec: Places, batch: int, tokens: int) -> Tensor:
        """The tokens from the start of the last occurrence on, among them perhaps padding."""
        columns = self._columns(self._real(batch, tokens), tokens)
        if not self.begins and tokens == 1:
            return columns >= self._earlier(spec, batch)
        if self.ids is None:
            _refuse_call("has no ids of its tokens, of which some are asked for")
        texts = torch.zeros_like(self.ids)
        if self._text(batch, tokens) is None:
            texts = self._starts(batch, tokens).cumsum(1) - 1
        began = last(self.ids, self._real(batch, tokens), texts, spec.numbers)
        found = began >= 0
        if self.begins:
            return found & (columns >= began)
        earlier = self._earlier(spec, batch, found[:, :1])
        return columns >= torch.where(found, began + self.past, earlier)

    def _earlier(self, spec: Places, batch: int, found: Tensor | None = None) -> Tensor:
        """From which column on the pieces before it have their successors meant, [batch, 1].

        found: the rows [batch, 1] whose ids stand in this piece, which then go before.
        """
        like = self._real(batch, 1 if self.size is None else self.size[1])
        start = start_of(self.pieces, spec.numbers, like)
        if start is None:
            if found is None:
                _refuse_history()
            _forbid(~found, _refuse_history)
            return torch.full_like(found, NEVER, dtype=torch.long)
        before, now = self.pieces[-1], self.ids
        if found is None or now is None or before.ids is None or before.stop != self.past:
            return start  # tokens were generated since
        again = straddles(before.ids, now, spec.numbers) | (found & (start < NEVER))[:, 0]
        _forbid(again, _refuse_pieces)
        return start


class _Here(local):
    """The innermost call of this thread, and the rows of it that a module has."""

    call: _Call | None = None
    rows: Tensor | None = None


_HERE = _Here()

_FLAT, _ROWS, _BY_QUERIES = 2, 3, 4
"""The axes of hidden states of tokens in a row, and of such in a batch; of a mask by queries."""

_TOKENS = ("input_ids", "inputs_embeds")
_UNKNOWN = object()


def _size(given: Mapping[str, Any]) -> tuple[int, int] | None:
    """Batch and tokens of a call, where its arguments tell."""
    known = (given.get(name) for name in _TOKENS)
    tokens = next((value for value in known if isinstance(value, Tensor)), None)
    return None if tokens is None else (tokens.shape[0], tokens.shape[1])


# ----------------------------------------------------------------------------------- refusals


def _refuse_call(what: str, hint: str = "") -> NoReturn:
    refuse(
        "E483",
        f"this call does not tell which tokens an adapter is for: it {what}",
        hint=hint or "give the tokens' ids, and a mask [batch, tokens] of those that are real",
    )


def _refuse_history() -> NoReturn:
    refuse(
        "E484",
        "this call goes on with a text of which an adapter does not know the beginning",
        hint="let the adapter be on the model, live or not, from the first call of a text on",
    )


def _refuse_pieces() -> NoReturn:
    refuse(
        "E484",
        "the ids that an adapter comes after stand in two pieces of a prompt",
        hint="let one call read the whole prompt: without `prefill_chunk_size`",
    )


def _forbid(bad: Tensor, otherwise: Callable[[], NoReturn]) -> None:
    """Refuse a call for what its tokens are; a graph, which cannot ask, checks them as it runs."""
    if torch.compiler.is_compiling():
        check: Any = torch.ops.aten._assert_async.msg
        check((~bad).all(), "an adapter's places are told by tokens of earlier calls")
    elif bool(bad.any()):
        otherwise()
