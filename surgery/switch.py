"""What is live on a model: its default for all threads, and what one thread chose instead.

A mounted module asks its model's switch at every call. A thread's own choice lies in a
thread-local object, which `torch.compile` reads without a break, as it does not a `ContextVar`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from threading import Lock, RLock, local
from typing import Any, Protocol
from weakref import WeakSet, ref

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
        key = frozenset([text for text, _ in self.groups if text in known])
        if key not in self._within:
            kept = tuple(s if s in key else NONE for s in self.samples)
            self._within[key] = self if kept == self.samples else Routed(kept, self.origin)
        return self._within[key]

    def split(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The samples [batch, …] of each group."""
        for (text, _), index in zip(self.groups, self.rows(x.device), strict=True):
            yield text, x.index_select(0, index)

    def rows(self, device: torch.device) -> tuple[Tensor, ...]:
        """The places of the samples of each group, in order."""
        return self._on(device)[0]

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


class Lanes:
    """A choice as tensors, which a graph reads: for each row of a batch, adapters with factors.

    index: [terms, batch], numbers of adapters. factor: [terms, batch]. fits: whether the choice is
    one that these can say.
    """

    __slots__ = ("factor", "fits", "index")

    def __init__(self, index: Tensor, factor: Tensor, fits: bool = True) -> None:
        """Of a choice."""
        self.index, self.factor, self.fits = index, factor, fits

    def copied(self) -> Lanes:
        """The same in other tensors."""
        return Lanes(self.index.clone(), self.factor.clone(), self.fits)

    def take(self, other: Lanes) -> None:
        """Be another choice, in place, for all that hold it."""
        self.index.copy_(other.index)
        self.factor.copy_(other.factor)
        self.fits = other.fits


class Bank(Protocol):
    """What is declared for a model, so that a graph reads a choice; see `surgery.bank`."""

    def lanes(self, choice: Choice, lives: Mapping[str, Live]) -> Lanes:
        """A choice as tensors."""
        ...

    def at(self, module: object) -> Any:
        """What a module runs; None if it has none of it."""
        ...

    def check(self) -> None:
        """E449 where the parameters of the model are other ones than those that it has."""
        ...

    def forget(self, adapter: str) -> None:
        """Let an adapter's place be free."""
        ...

    def let_go(self, texts: Collection[str]) -> None:
        """Forget choices that are no longer prepared."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Let an adapter have another name."""
        ...


class Use:
    """That something is live somewhere: while there is this object, it stays prepared."""

    __slots__ = ("__weakref__",)


Uses = tuple[Use, ...]


class _Here(local):
    """What one thread chose on one model."""

    def __init__(self, lanes: Lanes | None = None) -> None:
        # Not on the class: Dynamo guards what lies here.
        self.choice: Choice | None = None
        self.lanes = lanes


class Switch:
    """What is live on one model. A copy of the model has a switch of its own, and no bank.

    live: the text of what is live for every thread that chose nothing else. prepared: by its text,
    all that the model's modules can run now. frozen: whether what depends on parameters alone was
    computed once. bank: what was declared, if anything. changing: held while modules are changed.
    """

    def __init__(self, live: str = NONE) -> None:
        """With a default, of which nothing is prepared."""
        self.live = live
        self.prepared: dict[str, Live] = {NONE: Live()}
        self.frozen = False
        self.bank: Bank | None = None
        self.changing = RLock()
        self._default: Lanes | None = None
        self._here = _Here()
        self._counting = RLock()
        self._uses: dict[str, ref[Use]] = {}  # the last is what was used last
        self._live_use = self.use(live)
        with _ADDING:
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

    @property
    def lanes(self) -> Any:
        """What is live in this thread, as tensors; None where no bank is declared."""
        return self._here.lanes

    def use(self, text: str) -> Use:
        """Something, prepared or about to be, is used: now, and while what is given is kept."""
        with self._counting:
            known = self._uses.pop(text, None)
            use = None if known is None else known()
            if known is None or use is None:
                use = Use()
                known = ref(use)
            self._uses[text] = known
        return use

    def in_use(self, text: str) -> bool:
        """Whether a thread, or what a backward pass repeats, has something live."""
        with self._counting:
            known = self._uses.get(text)
            return known is not None and known() is not None

    def held(self) -> tuple[Choice, Uses]:
        """What is live in this thread, and that it is used."""
        choice = self.choice
        texts = (choice,) if isinstance(choice, str) else dict.fromkeys(choice.samples)
        return choice, tuple(map(self.use, texts))

    def let_go(self, most: int) -> tuple[str, ...]:
        """The mixtures that were used longest ago, which are from now on not prepared.

        So many are left, and all that are in use. Adapters alone are no mixtures.
        """
        with self._counting:
            held = {text for text, use in self._uses.items() if use() is not None}
            uses = {t: use for t, use in self._uses.items() if t in held or t in self.prepared}
            mixtures = [t for t in uses if t in self.prepared and _is_mixture(self.prepared[t])]
            free = [text for text in mixtures if text not in held]
            gone = tuple(free[: max(0, len(mixtures) - most)])
            for text in gone:
                del uses[text], self.prepared[text]
            self._uses = uses
        if self.bank is not None:
            self.bank.let_go(gone)
        return gone

    def default_to(self, live: str, use: Use) -> None:
        """Let something that is prepared be live for every thread that chose nothing else."""
        self.use(self.live)  # a thread in the midst of a layer may still look it up
        self.live, self._live_use = live, use
        if self.bank is not None and self._default is not None:
            self._default.take(self.bank.lanes(live, self.prepared))

    def declare(self, bank: Bank | None) -> None:
        """Let choices be tensors as well, or no longer. What threads chose is forgotten."""
        self.bank = bank
        self._default = None if bank is None else bank.lanes(self.live, self.prepared).copied()
        self._here = _Here(self._default)

    def choose(self, choice: Choice | None) -> None:
        """Let something else be live in this thread; None for the default."""
        if choice is not None and self.bank is not None:
            self.bank.check()
        self._here.choice = choice
        if self.bank is not None:
            known = self._default
            self._here.lanes = known if choice is None else self.bank.lanes(choice, self.prepared)

    @contextmanager
    def chosen(self, choice: Choice | None, uses: Uses = ()) -> Generator[None]:
        """The same until the end of a `with`, for which `uses` are kept."""
        here = self._here
        before = here.choice, here.lanes
        self.choose(choice)
        try:
            yield
        finally:
            here.choice, here.lanes = before

    def __reduce__(self) -> tuple[Callable[..., Switch], tuple[object, ...]]:
        """What a thread chose stays with the model that it chose it on."""
        return _copied, (self.live, dict(self.prepared))


def _copied(live: str, prepared: dict[str, Live]) -> Switch:
    made = Switch(live)
    made.prepared = prepared
    for text in prepared:
        made.use(text)
    return made


def _is_mixture(live: Live) -> bool:
    return bool(live) and live.only is None


_EVERY: WeakSet[Switch] = WeakSet()
_ADDING = Lock()

Choices = tuple[tuple[Switch, Choice, Uses], ...]


def current() -> Choices:
    """What is live in this thread on every model, to be repeated elsewhere or later."""
    with _ADDING:
        return tuple((switch, *switch.held()) for switch in _EVERY)


@contextmanager
def repeated(choices: Choices) -> Generator[None]:
    """Let what was live somewhere be live in this thread, whatever the defaults are now."""
    with ExitStack() as stack:
        for switch, choice, uses in choices:
            stack.enter_context(switch.chosen(choice, uses))
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
