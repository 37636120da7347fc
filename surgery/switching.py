"""Which adapters of a model are meant, and letting its forward run them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext

from torch import fx, nn

from surgery import lower, mount
from surgery.errors import error_of, refuse
from surgery.language.parse import parse_live
from surgery.live import NONE, Live, read_live, single, unknown_adapter
from surgery.mixture import live_sites
from surgery.model.holder import every_module
from surgery.placement import check_placed
from surgery.plan import PlannedSite
from surgery.state import Adapter, State, state_of
from surgery.switch import Use

MIXTURES = 64
"""How many mixtures stay prepared beside those in use.

Each has code of its own, and, frozen, as much memory as the weights that it changes; preparing one
anew takes milliseconds a class of sites. What is scaled by a number for each request is new always.
"""


def live_of(expression: str | None, state: State) -> Live:
    """What a caller wants to be live; the name of an adapter is one, whatever it is otherwise.

    Raises SpecSyntaxError, DefinitionError (E132), StateError (E411).
    """
    if expression is None:
        return Live()
    if expression in state.adapters:
        return single(expression)
    known = state.switch.prepared.get(expression)
    if known is not None:
        return known
    return read_live(parse_live(expression), tuple(state.adapters), {}, "E411")


def make_live(model: nn.Module, state: State, live: Live) -> None:
    """Let every thread's forward run something else, but where a thread chose itself.

    What was prepared before is looked up: no module changes. Raises PlanError (E305, E309), with
    nothing changed.
    """
    use = prepare(model, state, live)
    state.live = live
    state.switch.default_to(str(live), use)


def prepare(model: nn.Module, state: State, live: Live) -> Use:
    """Let a model's modules have what they need for something to be live.

    They have it for as long as what is given is kept, and at least until `MIXTURES` others were
    used since. Raises PlanError (E305, E309), with nothing changed.
    """
    text, switch = str(live), state.switch
    use = switch.use(text)  # first, so that no other thread withdraws what is found here
    graph = isinstance(model, fx.GraphModule)
    if text in switch.prepared and not graph:
        return use
    with switch.changing:
        if text not in switch.prepared or graph:
            _prepare(model, state, live)
            _withdraw_old(model, state)
    return use


def _prepare(model: nn.Module, state: State, live: Live) -> None:
    text, graph = str(live), isinstance(model, fx.GraphModule)
    sites = live_sites(live, state.plans)
    if live.only is None:  # an adapter alone was seen to run when it came
        lower.check_sites(sites, state.plans)
    check_placed(model, sites, state.plans)
    if graph:  # which has one graph, for what is live
        withdraw(model, state, tuple(state.switch.prepared))
        mount.run_base(model)
    try:
        mount_sites(model, state, sites, text)
    except BaseException:
        withdraw(model, state, (text,))
        if graph and state.live != live:
            prepare(model, state, state.live)
        raise
    state.switch.prepared[text] = live


def mount_sites(model: nn.Module, state: State, sites: Sequence[PlannedSite], text: str) -> None:
    """Let some sites run while something is live of that text."""
    if not sites:
        return
    if any(site.form.places for site in sites):  # also after a merge, which took off all that was
        mount.place(model, state.switch)
    paths = {id(site.site.module): site.site.owner for site in sites}
    modules = lower.by_module(sites, state.plans)
    mount.mount_all(model, modules, text, state.switch, paths)


def withdraw(model: nn.Module, state: State, texts: Sequence[str]) -> None:
    """Undo `prepare`. A thread that still has it live is told so by each module that ran it."""
    if not texts:
        return
    with state.switch.changing:
        ways = [mount.drop if state.switch.in_use(t) else mount.forget for t in texts]
        for module in every_module(model):
            for text, undo in zip(texts, ways, strict=True):
                undo(module, text)
        for text in texts:
            if text != NONE:  # which any model can run
                state.switch.prepared.pop(text, None)


def _withdraw_old(model: nn.Module, state: State) -> None:
    """Withdraw what was used longest ago; no module's class changes, as others may run it."""
    gone = state.switch.let_go(MIXTURES)
    if not gone:
        return
    for module in every_module(model):
        for text in gone:
            mount.drop(module, text)


def withdraw_all(model: nn.Module, state: State) -> None:
    """Let every module run its own forward, whatever is live."""
    with state.switch.changing:
        for module in every_module(model):
            mount.dismount(module)
        mount.run_base(model)
        state.switch.prepared = {NONE: Live()}


@contextmanager
def base_alone(model: nn.Module) -> Generator[None]:
    """Let the forward run the base in this thread, whatever is live; it is live again afterwards.

    A model that is one graph runs the base for all threads.
    """
    state = state_of(model)
    if state is None or not isinstance(model, fx.GraphModule):
        with nullcontext() if state is None else state.switch.chosen(NONE):
            yield
        return
    live = state.live
    make_live(model, state, Live())
    try:
        yield
    finally:
        make_live(model, state, live)


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
