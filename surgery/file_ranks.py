"""Processes that merge one checkpoint together, each some of its files: what `torchrun` starts."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch.distributed

from surgery.errors import Diagnostic, SurgeryError, error_of

# Its functions are not fully typed.
_untyped: Any = torch.distributed


@dataclass(slots=True)
class Ranks:
    """This process among all. Alone it is 0 of 1."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that begins and finishes what they make."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Generator[None]:
        """A step that all of them take: it ends in each when it has ended in all.

        What is refused in one is refused in all.
        """
        error: BaseException | None = None
        try:
            yield
        except BaseException as found:
            error = found
        said: list[_Said] = [None] * self.world
        if self.world > 1:
            _untyped.all_gather_object(said, _told(error))
        if error is not None:
            raise error
        failed = next((what for what in said if what is not None), None)
        if isinstance(failed, str):
            raise RuntimeError(f"another rank failed: {failed}")
        if failed is not None:
            raise error_of(failed)

    def share(self, sizes: Sequence[tuple[str, int]]) -> list[str]:
        """The names that are this process's, of names and bytes: all have about as many bytes."""
        loads = [0] * self.world
        mine: list[str] = []
        for name, size in sorted(sizes, key=lambda one: (-one[1], one[0])):
            least = loads.index(min(loads))
            loads[least] += size
            if least == self.rank:
                mine.append(name)
        return mine


_Said = list[Diagnostic] | str | None


def _told(error: BaseException | None) -> _Said:
    """What the others are told of an error."""
    if isinstance(error, SurgeryError):
        return list(error.diagnostics)
    return None if error is None else f"{type(error).__name__}: {error}"


@contextmanager
def joined() -> Generator[Ranks]:
    """This process among those that `torchrun` started with it."""
    world = int(os.environ.get("WORLD_SIZE", "1") or 1)
    if world < 2:
        yield Ranks()
        return
    own = not cast(bool, _untyped.is_initialized())
    if own:
        _untyped.init_process_group("gloo")
    try:
        yield Ranks(_untyped.get_rank(), _untyped.get_world_size())
    finally:
        if own:
            _untyped.destroy_process_group()
