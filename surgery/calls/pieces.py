"""A text that comes by pieces, a call each: what a cache knows of it, and where ids stand in it.

A cache of transformers keeps keys and values, and not the tokens that they are of. Those are kept
on it here, as an attribute, so that they live, and are copied, with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

NEVER = 2**40
"""A column that no text has."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one call brought: its tokens' ids and which are real, [batch, tokens], from a column.

    A column counts the tokens of a text with its padding, as a cache does.
    """

    start: int
    ids: Tensor | None
    real: Tensor

    @property
    def stop(self) -> int:
        """The column after its last."""
        return self.start + self.real.shape[1]

    def moved(self, move: Callable[[Tensor], Tensor]) -> Piece:
        """With other rows."""
        return Piece(self.start, None if self.ids is None else move(self.ids), move(self.real))

    def until(self, stop: int) -> Piece:
        """Without what was taken off the cache since."""
        kept = max(0, stop - self.start)
        ids = None if self.ids is None else self.ids[:, :kept]
        return Piece(self.start, ids, self.real[:, :kept])


_PIECES = "_surgery_pieces"
"""The attribute of a cache that is its pieces, in order. Single tokens that follow are left out."""


def is_cache(value: object) -> bool:
    """Whether something counts the tokens it has, as the caches of transformers do."""
    return hasattr(value, "get_seq_length")


def cache_in(result: object) -> object | None:
    """The cache that a model made itself, and gives."""
    if isinstance(result, tuple):
        return next((v for v in cast("tuple[object, ...]", result) if is_cache(v)), None)
    cache = getattr(result, "past_key_values", None)
    return cache if is_cache(cache) else None


def is_known(cache: object) -> bool:
    """Whether something is known of the text in a cache."""
    return bool(getattr(cache, _PIECES, ()))


def pieces_in(cache: object, stop: int | Tensor) -> tuple[Piece, ...]:
    """What is known of the first columns of a cache, which it still has.

    stop: a tensor where all of them are known to be there.
    """
    pieces: tuple[Piece, ...] = getattr(cache, _PIECES, ())
    if isinstance(stop, Tensor):
        return pieces
    return tuple(p if p.stop <= stop else p.until(stop) for p in pieces if p.start < stop)


def keep(cache: object, pieces: tuple[Piece, ...]) -> None:
    """Let a cache have some pieces, whose rows go where its own do."""
    setattr(cache, _PIECES, pieces)
    if torch.compiler.is_compiling():  # in a graph no cache is asked to move its rows
        return
    for name in _MOVES:
        if hasattr(type(cache), name):
            vars(cache).setdefault(name, _Moving(cache, name))


_MOVES: Mapping[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": lambda rows, index: rows.index_select(0, index.to(rows.device)),
    "batch_select_indices": lambda rows, index: rows[index],
    "batch_repeat_interleave": lambda rows, times: rows.repeat_interleave(times, 0),
}
"""What a cache may be asked to do with the rows of its batch, and what that does to others."""


class _Moving:
    """One of those, done to a cache and to its pieces.

    It is on the instance, and goes by the class, so that copies have it too.
    """

    __slots__ = ("_cache", "_name")

    def __init__(self, cache: object, name: str) -> None:
        """For one cache, which it does not keep alive."""
        self._cache, self._name = weakref.ref(cache), name

    def __getstate__(self) -> tuple[object, str]:
        """The cache as it is, so that a copy has the copy."""
        return self._cache(), self._name

    def __setstate__(self, state: tuple[object, str]) -> None:
        """Belong to a copy of the cache."""
        self._cache, self._name = weakref.ref(state[0]), state[1]

    def __call__(self, how: Any) -> Any:
        """The class's own method, and the same for the rows of each piece."""
        cache, move = self._cache(), _MOVES[self._name]
        assert cache is not None  # whoever calls this has it
        result = getattr(type(cache), self._name)(cache, how)
        known = cast("tuple[Piece, ...]", getattr(cache, _PIECES))
        setattr(cache, _PIECES, tuple(p.moved(lambda rows: move(rows, how)) for p in known))
        return result


# ------------------------------------------------------------------------------------ counting


def since(starts: Tensor) -> Tensor:
    """How far each column is from the last start, [batch, tokens]; the first column is one."""
    columns = torch.arange(starts.shape[1], device=starts.device)
    return columns - torch.where(starts, columns, 0).cummax(1).values


def last(ids: Tensor, real: Tensor, texts: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """The column at which some ids stand for the last time in the text of each token; -1 for none.

    ids, real, texts: [batch, tokens]; the number of each token's text, of several in a row.
    """
    columns = torch.arange(ids.shape[1], device=ids.device)
    starts = torch.where(_matches(ids, real, texts, wanted), columns, -1)
    return torch.full_like(starts, -1).scatter_reduce(1, texts, starts, "amax").gather(1, texts)


def start_of(pieces: Sequence[Piece], wanted: tuple[int, ...], like: Tensor) -> Tensor | None:
    """The column from which on what follows some pieces comes after some ids, [batch, 1].

    like: a tensor [batch, …]. None where that is not known of each row of the batch.
    """
    if not pieces:
        return None
    start = like.new_full((len(like), 1), NEVER, dtype=torch.long)
    for piece in pieces:
        if piece.ids is None or len(piece.ids) not in (1, len(like)):
            return None
        found = last(piece.ids, piece.real, torch.zeros_like(piece.ids), wanted)[:, :1]
        start = torch.where(found >= 0, found + piece.start, start)
    return start


def straddles(before: Tensor, now: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """Whether some ids stand across the end of one piece's ids and the beginning of the next's.

    before, now: [batch, tokens]. Gives [batch].
    """
    reach = len(wanted) - 1
    before = before[:, max(0, before.shape[1] - reach) :].expand(len(now), -1)
    both = torch.cat([before, now[:, :reach]], 1)
    same = torch.zeros_like(both)
    return _matches(both, same == 0, same, wanted).any(1)


def _matches(ids: Tensor, real: Tensor, texts: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """Where some ids begin to stand, in real tokens of one text, [batch, tokens]."""
    count = len(wanted)
    found = torch.zeros_like(real)
    if count > ids.shape[1]:
        return found
    here = (ids.unfold(1, count, 1) == ids.new_tensor(wanted)).all(-1)
    whole = texts.unfold(1, count, 1)
    here = here & real.unfold(1, count, 1).all(-1) & (whole[..., 0] == whole[..., -1])
    found[:, : here.shape[1]] = here
    return found
