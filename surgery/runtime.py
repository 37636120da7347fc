"""The handle of an adapted model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, fx, nn

from surgery import lower
from surgery.errors import refuse
from surgery.inverse import Inverse
from surgery.plan import Plan
from surgery.state import State, require_state
from surgery.switching import chosen, live_of, make_live
from surgery.tensors import begin_pending, tensors_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from surgery.artifact import SaveReport
    from surgery.mapping import StateDictMapping

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
        is no mix; StateError: E411 for an unknown adapter, E402 while one is merged; PlanError for
        adapters that cannot be live together (E309), or cannot run so (E305).
        """
        state = self._state
        live = live_of(expression, state)
        if state.is_merged:
            refuse("E402", f"`{state.live}` is merged", hint="unmerge() first")
        make_live(self.model, state, live)

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
        unknown adapter, E416 where several are live.
        """
        from surgery.artifact import save_adapter
        from surgery.digests import base_digests

        state = self._state
        saved = chosen(state, adapter)
        return save_adapter(
            Path(directory),
            saved.plan,
            saved.name,
            tensors_of(self.model, saved),
            saved.seed,
            base_digests(self.model, saved.sites),
            model=self.model,
            config=config,
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
