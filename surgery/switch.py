"""What is live on a model: its default for all threads, and what one thread chose instead.

A mounted module asks its model's switch at every call. A thread's own choice lies in a
thread-local object, which `torch.compile` reads without a break, as it does not a `ContextVar`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import local
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from surgery.live import NONE, Live


class Routed:
    """What is live for each sample of a batch, as texts of `Live`, in order.

    origin: the same before each sample was repeated.
    """

    __slots__ = ("_indices", "_within", "groups", "origin", "samples")

    def __init__(self, samples: tuple[str, ...], origin: Routed | None = None) -> None:
        """One text a sample."""
        self.samples, self.origin = samples, origin or self
        every = dict.fromkeys(samples)
        places = ((text, [i for i, s in enumerate(samples) if s == text]) for text in every)
        self.groups = tuple((text, tuple(own)) for text, own in places)
        self._within: dict[frozenset[str], Routed] = {}
        self._indices: dict[torch.device, tuple[tuple[Tensor, ...], Tensor]] = {}

    def repeated(self, times: int) -> Routed:
        """For a batch in which each sample stands so many times, one after the other."""
        every = self.origin.samples
        return Routed(tuple(s for s in every for _ in range(times)), self.origin)

    def within(self, known: Collection[str]) -> Routed:
        """The same where some of it is the base, of which nothing is known."""
        key = frozenset(known)
        if key not in self._within:
            kept = tuple(s if s in key else NONE for s in self.samples)
            self._within[key] = self if kept == self.samples else Routed(kept, self.origin)
        return self._within[key]

    def split(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The samples [batch, …] of each group."""
        for (text, _), index in zip(self.groups, self._on(x.device)[0], strict=True):
            yield text, x.index_select(0, index)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """What was made of the groups, sample by sample again."""
        whole = torch.cat([*parts])
        return whole.index_select(0, self._on(whole.device)[1])

    def _on(self, device: torch.device) -> tuple[tuple[Tensor, ...], Tensor]:
        """The places of each group, and where each sample is once they are put in a row."""
        if device not in self._indices:
            order = [place for _, places in self.groups for place in places]
            back = sorted(range(len(order)), key=order.__getitem__)
            made = (torch.tensor(places, device=device) for _, places in self.groups)
            self._indices[device] = tuple(made), torch.tensor(back, device=device)
        return self._indices[device]


Choice = str | Routed
"""The text of what is live for a whole batch, or what is live for each sample."""


class _Here(local):
    """What one thread chose on one model."""

    def __init__(self) -> None:
        self.choice: Choice | None = None  # not on the class: Dynamo guards what lies here


class Switch:
    """What is live on one model. A copy of the model has a switch of its own.

    live: the text of what is live for every thread that chose nothing else. prepared: by its text,
    all that the model's modules can run now.
    """

    def __init__(self, live: str = NONE) -> None:
        """With a default, of which nothing is prepared."""
        self.live = live
        self.prepared: dict[str, Live] = {}
        self._here = _Here()
        _EVERY.add(self)

    @property
    def choice(self) -> Choice:
        """What is live in this thread."""
        here = self._here.choice
        return self.live if here is None else here

    @property
    def own(self) -> Choice | None:
        """What this thread chose itself, if it did."""
        return self._here.choice

    @contextmanager
    def chosen(self, choice: Choice | None) -> Generator[None]:
        """Let something else be live in this thread; None for the default."""
        before = self._here.choice
        self._here.choice = choice
        try:
            yield
        finally:
            self._here.choice = before

    def __reduce__(self) -> tuple[Callable[..., Switch], tuple[object, ...]]:
        """What a thread chose stays with the model that it chose it on."""
        return _copied, (self.live, self.prepared)


def _copied(live: str, prepared: dict[str, Live]) -> Switch:
    made = Switch(live)
    made.prepared = prepared
    return made


_EVERY: WeakSet[Switch] = WeakSet()

Choices = tuple[tuple[Switch, Choice], ...]


def current() -> Choices:
    """What is live in this thread on every model, to be repeated elsewhere or later."""
    return tuple((switch, switch.choice) for switch in [*_EVERY])


@contextmanager
def repeated(choices: Choices) -> Generator[None]:
    """Let what was live somewhere be live in this thread, whatever the defaults are now."""
    with ExitStack() as stack:
        for switch, choice in choices:
            stack.enter_context(switch.chosen(choice))
        yield


def repeating(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function that whenever it runs, and wherever, has live what is live in this thread now.

    For `torch.utils.checkpoint.checkpoint(surgery.repeating(layer), x)`: what is computed again in
    a backward pass then runs the adapters of its forward.
    """
    choices = current()

    def again(*args: Any, **kwargs: Any) -> Any:
        with repeated(choices):
            return run(*args, **kwargs)

    return again
