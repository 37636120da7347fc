"""The handle of an adapted model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from surgery import lower
from surgery.adapters import delete, rename
from surgery.choices import route, using
from surgery.distributed import on_first, put_together, settle
from surgery.errors import refuse
from surgery.freezing import freeze, frozen, thaw
from surgery.inverse import Inverse
from surgery.plan import Plan
from surgery.state import State, require_state
from surgery.switching import chosen, live_of, make_live
from surgery.tensors import begin_pending, tensors_of
from surgery.trainable import set_trainable, trainable

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from surgery.artifact import SaveReport
    from surgery.bank import Bank
    from surgery.composition import Composition
    from surgery.mapping import StateDictMapping
    from surgery.recipe import Sign
    from surgery.status import Status

# Names and files are a fifth of all code, and are imported when they are first asked for.


@dataclass(frozen=True, slots=True)
class Compiled:
    """An adapted model's handle. Its state lies on the model, so any two handles agree."""

    model: nn.Module

    @property
    def plan(self) -> Plan:
        """What was done: the plans of all adapters as one."""
        return joined(adapter.plan for adapter in self._state.adapters.values())

    @property
    def mapping(self) -> StateDictMapping:
        """Every tensor's name in the base, in the adapted model and in files; a bijection."""
        from surgery.mapping import mapping_of

        return mapping_of(self.plan, self.model)

    @property
    def inverse(self) -> Inverse:
        """Unload, merge and unmerge."""
        return Inverse(self.model)

    @property
    def graphs(self) -> Mapping[str, fx.Graph]:
        """The graph of every site of what is live, by the site's path.

        Sites that are rows of one layer have one graph. Where a layer is reached by its weight,
        the graph is the weight's, or the bias's where only that changes.
        """
        state = self._state
        live = state.sites
        modules = lower.by_module(live, state.plans)
        made = {
            (id(module), name): next(iter(lower.graphs(tuple(own)).values()), None)
            for module, keys in modules
            for name, own in groupby(keys, key=lambda key: key.form.at.parameter)
        }
        graphs = {s.path: made[id(s.site.module), s.site.at.parameter] for s in live}
        return {path: found.graph for path, found in graphs.items() if found is not None}

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters on the model, in the order in which they came."""
        return tuple(self._state.adapters)

    @property
    def live(self) -> str | None:
        """What the forward runs, such as `0.7*a + 0.3*b`; None for the base alone."""
        live = self._state.live
        return str(live) if live else None

    @property
    def merged(self) -> bool:
        """Whether what is live is in the weights."""
        return self._state.is_merged

    def activate(self, expression: str | None) -> None:
        """Let the forward run an adapter, a mix such as `0.7*a + 0.3*b`, `a then b`, or the base.

        expression: as behind `activate` in a spec; None for the base alone. What is trained does
        not change. Raises, with nothing changed: SpecSyntaxError; DefinitionError (E132) for what
        is no mix; StateError: E411 for an unknown adapter, E402 while one is merged, E449 where a
        bank is for the model as it was; PlanError for adapters that cannot be live together (E309),
        or cannot run so (E305).
        """
        state = self._state
        live = live_of(expression, state)
        if state.is_merged:
            refuse("E402", f"`{state.live}` is merged", hint="unmerge() first")
        if state.switch.bank is not None:
            state.switch.bank.check()
        make_live(self.model, state, live)

    def using(self, expression: str | None) -> AbstractContextManager[None]:
        """Let an adapter, a mix or the base be live for the calling thread, until the `with` ends.

        expression: as for `activate`, whose default other threads go on with. A backward pass
        that computes a forward again must repeat this choice, see `surgery.repeating`. Raises as
        `activate` does, and E433 for a model that is one graph.
        """
        return using(self.model, self._state, expression)

    def route(self, samples: Sequence[str | None]) -> AbstractContextManager[None]:
        """Let each sample of a batch have its own adapters for the calling thread.

        samples: for each sample what is live, as for `activate`; None for the base. All forwards
        within the `with` take batches of these samples; `generate` expands them with its beams.
        Samples of one choice run as a group. Raises as `using` does; StateError: E434 for no
        samples, E435 for sites at which samples cannot be told apart, and in a forward E436 where
        a site is called with no batch of these samples.
        """
        return route(self.model, self._state, samples)

    def delete(self, adapter: str) -> None:
        """Take an adapter off the model; the others stay as they are.

        Raises StateError: E411 if there is none of that name, E442 while it is live, E402 while it
        is merged. A thread that chose it is told so by its next forward (E437).
        """
        delete(self.model, self._state, adapter)

    def rename(self, old: str, new: str) -> None:
        """Let an adapter have another name, live or not; its parameters stay the same objects.

        Raises StateError: E411 if there is none of that name, E412 if there is one of the new,
        E443 for what is no name, E402 while it is merged.
        """
        rename(self.model, self._state, old, new)

    def hotswap(
        self, adapter: str, source: str | Path | Mapping[str, Tensor], *, force: bool = False
    ) -> None:
        """Give an adapter other weights in place, while the model is in use; nothing is compiled.

        source: a folder, ours or peft's, of an adapter that computes the same at the same sites,
        or tensors by their names in the model; with a bank of `reserve` other ranks and sites as
        well. What `freeze` computed is computed again. force: take a folder that was made on
        another base than this model.
        Raises, with nothing changed: ArtifactError for a folder that is not whole, and E522 for one
        of another base; StateError: E411
        if there is no such adapter, E402 while it is merged, E438 for tensors that are missing, too
        many or of other shapes, E439 for a folder of another kind of adapter.
        """
        from surgery.swapping import hotswap

        hotswap(self.model, self._state, adapter, source, force)

    def reserve(
        self, max_rank: int, *, adapters: int = 16, batch: int = 32, terms: int = 1
    ) -> Bank:
        """Declare a bank: below `torch.compile`, what is live is a tensor that the graph reads.

        Switching, routing, scaling and hotswapping compile nothing any more, among adapters of
        different ranks, sites and methods; several methods are all computed, and one is taken.
        It is for inference: a forward that records gradients runs what is live by its text, as
        does one that is not compiled. What `Bank.left` names is not stacked, with the reason. A
        model that is moved or cast is reserved anew.

        max_rank: the largest rank of an adapter. adapters: how many there may be at a time; batch:
        samples in a batch; terms: adapters in a sum. Raises StateError: E445 for less than one of
        any, or within a choice; E402 while merged; and in a forward E444 where a layer is called
        with no batch of so many samples.
        """
        from surgery.reserving import reserve

        return reserve(self.model, self._state, max_rank, adapters, batch, terms)

    def compose(
        self,
        expression: str,
        *,
        name: str,
        how: str = "cat",
        rank: int | None = None,
        to: str | None = None,
        density: float | None = None,
        sign: Sign = "total",
        seed: int = 0,
    ) -> Composition:
        """Put the adapter that an expression such as `0.7*a + 0.3*b` is beside those it is of.

        It is not live until it is activated. how, rank, to, density, sign, seed: see `recipe.How`.
        Raises, with the model as it was, ArtifactError: E580 where it cannot be composed so, E582
        for an option, E583 for parameters that do not fit together, E584 where the base's weights
        are needed; PlanError (E309); DefinitionError for the expression; StateError: E402 while one
        is merged, E411 for an unknown adapter, E412 and E443 for a name.
        """
        from surgery.deriving import compose_on
        from surgery.recipe import How

        options = How(how, rank, to, density, sign, seed)
        return compose_on(self.model, expression, name, options)

    @property
    def compositions(self) -> Mapping[str, Composition]:
        """What each adapter that was made of others was made of, and how near, when it was made."""
        every = self._state.adapters.items()
        return {n: one.composition for n, one in every if one.composition is not None}

    def freeze(self) -> None:
        """Compute what depends on parameters alone once, until `thaw`: a rotation, a norm, W'.

        It does not see parameters that change: `hotswap` computes it again, an optimizer does
        not, so training is refused (E441), and so is a forward that records gradients (E440).
        Raises StateError (E441) for a model in training mode.
        """
        freeze(self.model, self._state)

    def thaw(self) -> None:
        """Undo `freeze`."""
        thaw(self.model, self._state)

    def frozen(self) -> AbstractContextManager[None]:
        """`freeze` until the end of a `with`."""
        return frozen(self.model, self._state)

    @property
    def trainable(self) -> tuple[str, ...]:
        """The adapters of which some parameter is trained, live or not."""
        return trainable(self.model)

    def train_only(self, *adapters: str) -> None:
        """Let the parameters of these adapters be trained, and those of no other.

        What is live does not change. Raises StateError (E411) for an unknown adapter.
        """
        set_trainable(self.model, adapters)

    def groups(
        self,
        lr: float,
        adapter: str | Iterable[str] | None = None,
        *,
        weight_decay: float | Callable[[str, Tensor], float] | None = None,
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, by what the methods and the spec say of `lr`.

        lr: of what nothing is said of; a multiple such as `16x` is one of it. Each group has
        `name`, `params` and `lr`. Raises StateError: E411 for an unknown adapter, E450 where
        nothing is trainable, E452 for no learning rate.
        """
        from surgery.grouping import groups

        return groups(self.model, lr, adapter, weight_decay=weight_decay)

    def status(self) -> Status:
        """The adapters, what is live, trained and merged, and what is inconsistent."""
        from surgery.status import status

        return status(self.model)

    def __str__(self) -> str:
        """`status`, as a table."""
        return str(self.status())

    def materialize(self) -> None:
        """Begin the parameters that waited on meta for their base's weights to arrive."""
        state = self._state
        for adapter in state.adapters.values():
            begin_pending(self.model, adapter)

    def export(
        self, args: tuple[object, ...] | None = None, kwargs: Mapping[str, object] | None = None
    ) -> ExportedProgram:
        """The model as an exported program, as it is now: with what is live, or merged.

        args, kwargs: example inputs; by default those of the program that it came from, whose sizes
        may vary as they might there. Raises StateError (E419) where there are none.
        """
        from surgery.programs import exported

        return exported(self.model, args, kwargs)

    def parameters(self, adapter: str | None = None) -> dict[str, Tensor]:
        """The tensors of an adapter (the live one by default) by their names in the model.

        Raises StateError: E411 for an unknown adapter, E416 where several are live.
        """
        state = self._state
        return tensors_of(self.model, chosen(state, adapter))

    def save(
        self,
        directory: str | Path,
        adapter: str | None = None,
        *,
        config: Mapping[str, object] | None = None,
    ) -> SaveReport:
        """Write an adapter (the live one by default) to a folder, all of it or nothing.

        The folder is a peft folder where one peft config says the same; the report says if not.

        config: fields of peft's config, such as its `peft_type`, by which one of several
        formats of a method is chosen; by default it is the first. Raises ArtifactError if it cannot
        be written, and E524 where no format has such fields; StateError: E411 for an
        unknown adapter, E416 where several are live, E462 where this process cannot have all of it.
        A sharded model is saved by all its processes, of which the first writes.
        """
        from surgery.artifact import save_adapter
        from surgery.digests import base_digests

        state = self._state
        saved = chosen(state, adapter)
        settle(self.model, saved)
        tensors = put_together(saved, tensors_of(self.model, saved))
        base = base_digests(self.model, saved.sites)
        return on_first(
            self.model,
            lambda: save_adapter(
                Path(directory),
                saved.plan,
                saved.name,
                tensors,
                saved.seed,
                base,
                model=self.model,
                config=config,
            ),
        )

    @property
    def _state(self) -> State:
        return require_state(self.model)


def joined(plans: Iterator[Plan]) -> Plan:
    """Several plans for one model as one; the same plan counts once."""
    first, *rest = {id(p): p for p in plans}.values()
    for plan in rest:
        first = replace(
            first,
            sites=(*first.sites, *plan.sites),
            shared=(*first.shared, *plan.shared),
            diagnostics=(*first.diagnostics, *plan.diagnostics),
        )
    return first
