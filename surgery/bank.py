"""A bank: adapters of a model in stacked tensors, so that a compiled graph reads which one is live.

Below `torch.compile` a text that says what is live is a constant of the graph, and another text
another graph. With a bank the choice is a tensor: for each row of a batch the number of an adapter
and a factor. A site computes, for each family of adapters that it has, the output of each row with
that row's parameters, and takes it where the row's adapter is of that family there. What is no sum
of adapters times numbers runs by its text, as without a bank; so does a forward that records
gradients, and one that is not compiled: the parameters there are parts of the very stacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, fx, nn

from surgery.coding import code_of
from surgery.errors import refuse
from surgery.families import Family, filled, values_of
from surgery.live import Live
from surgery.model.holder import ADAPTERS
from surgery.nodes import Layer, Lowering, at_site
from surgery.switch import Choice, Lanes, Routed

_NAME = "bank"


# -------------------------------------------------------------------------------- a family's code


@lru_cache(maxsize=512)
def code_for(family: Family) -> Callable[..., Tensor]:
    """`run(module, x, *parameters, *numbers)`: the output of one sample with one member."""
    graph = fx.Graph()
    key = Lowering(family.form, _NAME)
    layer = _Given(graph, family)
    interpreter, port = at_site(key, layer)
    y: Any = interpreter.run(family.form.derived, cast(Tensor, layer.input))
    if port.output is not None:
        y = y.to(port.output.dtype)
    elif port.mixed:
        y = port.like(y)
    graph.output(cast(Any, family.form.kind.features_back(y)).node)
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    graph.lint()
    return code_of(graph).run


class _Given(Layer):
    """A module as nodes, whose adapter's parameters are given to it."""

    def __init__(self, graph: fx.Graph, family: Family) -> None:
        super().__init__(graph, family.form.kind.argument)
        self.given = {
            p.name: self.tracer.proxy(graph.placeholder(f"given_{p.name}"))
            for p in family.form.parameters
        }

    def attribute(self, path: str) -> Any:
        """A node that reads an attribute."""
        if path.startswith(f"{ADAPTERS}.{_NAME}."):
            return self.given[path.rpartition(".")[2]]
        return super().attribute(path)


# ------------------------------------------------------------------------------------ at a module


@dataclass(slots=True)
class Stack:
    """The members of a family at one module.

    tensors: [members, …] of each parameter, then [members] of each number. member: [adapters + 1],
    for an adapter's number its place in them, -1 for none; the last is that of no adapter.
    """

    family: Family
    run: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    member: Tensor
    taken: dict[str, int] = field(default_factory=dict[str, int])

    def put(
        self, adapter: str, number: int, values: Mapping[str, Tensor], numbers: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Take a member in, in place; gives its parameters as parts of the stacks."""
        free = (place for place in range(len(self.tensors[0])) if place not in self.taken.values())
        place = self.taken.get(adapter, next(free, -1))
        self.taken[adapter] = place
        parts: dict[str, Tensor] = {}
        names = (*self.family.parameters, *(name for name, _ in self.family.numbers))
        for name, stack in zip(names, self.tensors, strict=True):
            if name in numbers:
                stack[place] = numbers[name]
                continue
            stack[place] = filled(values[name].detach(), tuple(stack.shape[1:])).to(stack.dtype)
            own = tuple(slice(0, size) for size in values[name].shape)
            parts[name] = stack[place][own]
        self.member[number] = place
        return parts

    def drop(self, adapter: str, number: int) -> None:
        """Let a member go."""
        self.taken.pop(adapter, None)
        self.member[number] = -1


def stack_of(family: Family, adapters: int, device: torch.device) -> Stack:
    """A stack with room for so many members."""
    form = family.form
    shapes = [form.shapes[name] for name in family.parameters] + [()] * len(family.numbers)
    tensors = tuple(torch.zeros((adapters, *s), dtype=form.dtype, device=device) for s in shapes)
    member = torch.full((adapters + 1,), -1, dtype=torch.long, device=device)
    return Stack(family, code_for(family), tensors, member)


@dataclass(slots=True)
class ModuleBank:
    """The stacks of a module, one a family."""

    path: str
    stacks: list[Stack] = field(default_factory=list[Stack])

    def run(
        self, module: nn.Module, base: Callable[..., Any], lanes: Lanes, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The output [batch, …] for an input [batch, …] whose rows are those of the lanes."""
        (x,) = (*args, *kwargs.values())
        rows, known = x.shape[0], lanes.index.shape[1]
        if rows > known or (x.dim() < 3 and x.is_floating_point()):
            _refuse_rows(self.path, x, known)
        plain = base(module, x)
        total = plain
        for lane in range(lanes.index.shape[0]):
            index, factor = lanes.index[lane, :rows], lanes.factor[lane, :rows]
            for stack in self.stacks:
                place = stack.member[index]
                own = [tensor.index_select(0, place.clamp(min=0)) for tensor in stack.tensors]
                y = torch.vmap(partial(stack.run, module))(x, *own)
                shape = (rows, *(1 for _ in range(y.dim() - 1)))
                here, by = (place >= 0).view(shape), factor.view(shape).to(y.dtype)
                if lanes.index.shape[0] == 1:  # exact where the factor is 1
                    total = torch.where(here, torch.lerp(plain, y, by), total)
                else:
                    total = total + torch.where(here, by * (y - plain), torch.zeros_like(plain))
        return total


def _refuse_rows(path: str, x: Tensor, known: int) -> None:
    refuse(
        "E444",
        f"`{path}` is called with a tensor of shape {list(x.shape)}, and a bank has one choice for "
        f"each of up to {known} samples",
        hint="reserve(…, batch=…) for larger batches; where a model flattens its samples, leave "
        "such layers out of adapters of a bank",
    )


# -------------------------------------------------------------------------------------- the model


@dataclass(slots=True)
class Bank:
    """What was declared for a model, and the stacks of its modules.

    rank: up to which members are filled up. adapters, batch, terms: how many there may be, of
    samples in a batch, and of adapters in a sum. numbers: of the adapters. left: why an adapter is
    in no stack, and runs by its text. seen: of each a parameter, and what it is of a stack.
    """

    rank: int
    adapters: int
    batch: int
    terms: int
    device: torch.device
    modules: dict[int, ModuleBank] = field(default_factory=dict[int, ModuleBank])
    numbers: dict[str, int] = field(default_factory=dict[str, int])
    left: dict[str, str] = field(default_factory=dict[str, str])
    known: dict[str, Lanes] = field(default_factory=dict[str, Lanes])
    given: int = 0
    seen: dict[str, tuple[ref[Tensor], Tensor]] = field(
        default_factory=dict[str, "tuple[ref[Tensor], Tensor]"]
    )

    def number_for(self, adapter: str) -> int | None:
        """The number of an adapter, a free one if it has none; None if all are taken.

        One that was given lately is the last to be given again: a thread may still have chosen it.
        """
        if adapter in self.numbers:
            return self.numbers[adapter]
        after = (n % self.adapters for n in range(self.given, self.given + self.adapters))
        found = next((n for n in after if n not in self.numbers.values()), None)
        self.given = self.given if found is None else found + 1
        return found

    def check(self) -> None:
        """E449 where the parameters of a member are parts of the stacks no longer."""
        for own, part in self.seen.values():
            parameter = own()
            if parameter is not None and parameter.data_ptr() != part.data_ptr():
                refuse(
                    "E449",
                    "the model was moved or cast since a bank was reserved for it",
                    hint="reserve(…) again, and compile the model anew",
                )

    def lanes(self, choice: Choice, lives: Mapping[str, Live]) -> Lanes:
        """A choice as tensors [terms, batch]; `fits` is False where it is none of a bank's."""
        if isinstance(choice, Routed):
            return self._lanes(choice.samples, lives)
        known = self.known.get(choice)
        if known is None:
            known = self.known[choice] = self._lanes((choice,) * self.batch, lives)
        return known

    def _lanes(self, samples: tuple[str, ...], lives: Mapping[str, Live]) -> Lanes:
        index = torch.full((self.terms, self.batch), self.adapters, dtype=torch.long)
        factor, fits = torch.ones((self.terms, self.batch)), len(samples) <= self.batch
        for text in dict.fromkeys(samples):
            live = lives.get(text)  # none for what is gone, which runs by its text, and is refused
            terms = None if live is None else self._terms(live)
            fits = fits and terms is not None
            rows = [row for row, sample in enumerate(samples[: self.batch]) if sample == text]
            for lane, (by, number) in enumerate(terms or ()):
                index[lane, rows], factor[lane, rows] = number, by
        return Lanes(index.to(self.device), factor.to(self.device), fits)

    def at(self, module: object) -> ModuleBank | None:
        """The stacks of a module."""
        return self.modules.get(id(module))

    def _terms(self, live: Live) -> list[tuple[float, int]] | None:
        names = [(factor, what) for factor, what in live.terms]
        if len(names) > self.terms or not all(what in self.numbers for _, what in names):
            return None
        return [(factor, self.numbers[cast(str, what)]) for factor, what in names]

    def member_stack(
        self, module: nn.Module, form: Any
    ) -> tuple[Stack, Mapping[str, float]] | None:
        """The stack of a module that a class of sites belongs to, with its numbers there."""
        for stack in self.stacks(module):
            numbers = values_of(stack.family, form)
            if numbers is not None:
                return stack, numbers
        return None

    def stacks(self, module: nn.Module) -> Iterable[Stack]:
        """Of a module."""
        found = self.modules.get(id(module))
        return () if found is None else found.stacks

    def every(self) -> Iterator[Stack]:
        """Of all modules."""
        for module in self.modules.values():
            yield from module.stacks

    def forget(self, adapter: str) -> None:
        """Let an adapter's place be free."""
        self.known.clear()
        number = self.numbers.pop(adapter, None)
        self.left.pop(adapter, None)
        self.seen.pop(adapter, None)
        if number is not None:
            for stack in self.every():
                stack.drop(adapter, number)

    def let_go(self, texts: Iterable[str]) -> None:
        """Forget choices that are no longer prepared."""
        for text in texts:
            self.known.pop(text, None)

    def rename(self, old: str, new: str) -> None:
        """Let an adapter have another name."""
        self.known.clear()
        for known in (self.numbers, self.left, self.seen, *(stack.taken for stack in self.every())):
            if old in known:
                cast("dict[str, object]", known)[new] = cast("dict[str, object]", known).pop(old)

    def __str__(self) -> str:
        """What is in the bank, and what is not."""
        lines = [f"{len(self.numbers)} of {self.adapters} adapters, up to rank {self.rank}"]
        lines += [f"`{name}` runs by its text: {why}" for name, why in self.left.items()]
        return "\n".join(lines)
