"""Which adapters of a model are meant, and letting its forward run them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

from surgery import lower, mount
from surgery.errors import error_of, refuse
from surgery.language.parse import parse_live
from surgery.live import Live, read_live, single, unknown_adapter
from surgery.mixture import live_sites
from surgery.state import Adapter, State, state_of


def live_of(expression: str | None, state: State) -> Live:
    """What a caller wants to be live; the name of an adapter is one, whatever it is otherwise.

    Raises SpecSyntaxError, DefinitionError (E132), StateError (E411).
    """
    if expression is None:
        return Live()
    if expression in state.adapters:
        return single(expression)
    return read_live(parse_live(expression), tuple(state.adapters), {}, "E411")


def make_live(model: nn.Module, state: State, live: Live) -> None:
    """Let the forward run something else. Raises PlanError (E305, E309), with nothing changed."""
    before, after = _modules(state, state.live), _modules(state, live)
    mount.dismount_all(model, (module for module, _ in before))
    state.live = live
    mount.mount_all(model, after)


@contextmanager
def base_alone(model: nn.Module) -> Generator[None]:
    """Let the forward run the base, whatever is live; it is live again afterwards."""
    state = state_of(model)
    if state is None or not state.live:
        yield
        return
    live = state.live
    make_live(model, state, Live())
    try:
        yield
    finally:
        make_live(model, state, live)


def _modules(state: State, live: Live) -> list[tuple[nn.Module, lower.Lowerings]]:
    """The modules that something live runs at. Raises PlanError where it cannot."""
    sites = live_sites(live, state.plans)
    if live.only is None:  # an adapter alone was seen to run when it came
        lower.check_sites(sites, state.plans)
    return lower.by_module(sites, state.plans)


def chosen(state: State, name: str | None) -> Adapter:
    """An adapter by name, else the one that is live, else the first.

    Raises StateError: E411 for an unknown adapter, E416 where several are live and none is named.
    """
    if name is not None:
        if name not in state.adapters:
            raise error_of([unknown_adapter(name, tuple(state.adapters), code="E411")])
        return state.adapters[name]
    first, *others = state.live.adapters or [*state.adapters][:1]
    if others:
        names = ", ".join(f"`{name}`" for name in (first, *others))
        refuse("E416", f"{names} are live", hint="name the adapter that is meant")
    return state.adapters[first]
