"""What a model knows of its own surgery; it lies on the model, so copies and pickles carry it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from surgery.errors import refuse
from surgery.live import Live
from surgery.merged import MergedSite, Options
from surgery.mixture import Plans, live_sites
from surgery.plan import Plan, PlannedSite
from surgery.switch import Switch

if TYPE_CHECKING:
    from surgery.composition import Composition

_ATTRIBUTE = "_surgery_state"


@dataclass(slots=True)
class Adapter:
    """One adapter on the model: the plan it came from, its seed, and the name it has there.

    composition: what it was made of, where that is other adapters.
    """

    name: str
    plan: Plan
    seed: int
    composition: Composition | None = None

    @property
    def sites(self) -> Iterator[PlannedSite]:
        """The sites of this adapter, in module order."""
        return (s for s in self.plan.sites if s.adapter == self.name)


@dataclass(slots=True)
class State:
    """Live, trained and merged are three separate states.

    adapters: by name, in the order in which they came.
    flags: `requires_grad` of every base parameter before the first surgery, by name.
    live: what the forward runs.
    merged: by path; empty unless `live` is merged.
    options: how it was merged.
    shares: whether its base tensors are another model's too, so that keeping them costs nothing.
    untied: the configs that said of the merged model that its weights are tied.
    switch: what its modules look up, the default among it.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict[str, Adapter])
    flags: dict[str, bool] = field(default_factory=dict[str, bool])
    live: Live = field(default_factory=Live)
    merged: dict[str, MergedSite] = field(default_factory=dict[str, MergedSite])
    is_merged: bool = False
    options: Options = field(default_factory=Options)
    shares: bool = False
    untied: tuple[object, ...] = ()
    switch: Switch = field(default_factory=Switch)

    @property
    def plans(self) -> Plans:
        """The plan of each adapter, by name."""
        return {name: adapter.plan for name, adapter in self.adapters.items()}

    @property
    def sites(self) -> tuple[PlannedSite, ...]:
        """The sites of what is live."""
        return live_sites(self.live, self.plans)

    @property
    def beside(self) -> tuple[PlannedSite, ...]:
        """Of what is merged, the sites that are in no weight, and go on running."""
        sites: tuple[PlannedSite, ...] = self.sites if self.is_merged else ()
        return tuple(site for site in sites if site.path not in self.merged)


def state_of(model: nn.Module) -> State | None:
    """The model's state, or None if it was never adapted."""
    return vars(model).get(_ATTRIBUTE)


def require_state(model: nn.Module) -> State:
    """The model's state. Raises StateError (E401) if it was never adapted, or was unloaded."""
    state = state_of(model)
    if state is None:
        refuse(
            "E401",
            "this model has no adapter",
            hint="surgery.compile(spec, model) or surgery.attach(folder, model) puts one on it",
        )
    return state


def keep_state(model: nn.Module, state: State) -> None:
    """Let the model carry its state."""
    vars(model)[_ATTRIBUTE] = state


def forget_state(model: nn.Module) -> None:
    """The model is as if it had never been adapted."""
    vars(model).pop(_ATTRIBUTE, None)
