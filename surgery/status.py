"""How a model stands: its adapters, what is live, trained and merged, and what does not agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import nn

from surgery.errors import Diagnostic, StateError
from surgery.mixture import sources_of
from surgery.model.holder import base_parameters, every_module
from surgery.model.hooked import execution_device
from surgery.model.storage import bytes_of, counted
from surgery.placement import misplaced
from surgery.report import aligned, shown_bytes
from surgery.state import Adapter, State, require_state
from surgery.trainable import Owned, owned


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """One adapter as it is on the model.

    methods: of its sites, each once. sites: how many there are. trained, total: the numbers that
    its methods train, and all. learning: how many of the trained require gradients. bytes: of all.
    live, merged: whether it is among what the forward runs, and whether that is in the weights.
    beside: where it is, at how many of its sites it runs all the same.
    dtypes, devices: of its parameters, each once, in order. made_of: of one that was made of others
    what they were, how, and how near, as it was then; "" for any other.
    """

    name: str
    methods: tuple[str, ...]
    sites: int
    trained: int
    total: int
    learning: int
    bytes: int
    live: bool
    merged: bool
    dtypes: tuple[str, ...]
    devices: tuple[str, ...]
    made_of: str = ""
    beside: int = 0


@dataclass(frozen=True, slots=True)
class Status:
    """A model as it stands. `str` is a table; `as_json` plain data.

    live: as `activate` has it, None for the base alone. here: what the calling thread chose instead
    by `using`, or by `route` with the number of samples; None if nothing. merged: whether what is
    live is in the weights. beside: at how many sites of it something runs all the same.
    frozen: whether what depends on parameters alone was computed once, for inference. training:
    whether the model is in training mode. base, base_bytes: the numbers of the base's parameters,
    tied ones counted once, and their memory. findings: warnings, of what does not agree.
    """

    adapters: tuple[AdapterStatus, ...]
    live: str | None
    here: str | None
    merged: bool
    frozen: bool
    training: bool
    base: int
    base_bytes: int
    findings: tuple[Diagnostic, ...]
    beside: int = 0

    @property
    def trainable(self) -> tuple[str, ...]:
        """The adapters of which something requires gradients."""
        return tuple(one.name for one in self.adapters if one.learning)

    @property
    def learning(self) -> int:
        """How many numbers of all adapters require gradients."""
        return sum(one.learning for one in self.adapters)

    def check(self) -> None:
        """Refuse what does not agree. Raises StateError with all findings, if there are any."""
        if self.findings:
            raise StateError(self.findings)

    def __str__(self) -> str:
        """The table: a row an adapter, the states, the totals, what does not agree."""
        return "\n".join(_lines(self))

    def as_json(self) -> dict[str, object]:
        """The status as plain data."""
        adapters = [{n: _listed(v) for n, v in asdict(one).items()} for one in self.adapters]
        findings = [one.as_json() for one in self.findings]
        return {**asdict(self), "adapters": adapters, "findings": findings}


def _listed(value: object) -> object:
    return [*cast("tuple[object, ...]", value)] if isinstance(value, tuple) else value


def status(model: nn.Module) -> Status:
    """How an adapted model stands. Nothing is computed or changed.

    Raises StateError (E401) for a model without adapters.
    """
    state = require_state(model)
    every = {name: [*owned(model, adapter)] for name, adapter in state.adapters.items()}
    base, base_bytes = counted(every_module(model))
    return Status(
        tuple(_adapter(state, adapter, every[adapter.name]) for adapter in state.adapters.values()),
        str(state.live) if state.live else None,
        _here(state),
        state.is_merged,
        state.switch.frozen,
        model.training,
        base,
        base_bytes,
        tuple(_findings(model, state, every)),
        len(state.beside),
    )


def _here(state: State) -> str | None:
    own = state.switch.own
    if own is None or isinstance(own, str):
        return own
    return ", ".join(f"{text} ×{len(places)}" for text, places in own.groups)


def _running(state: State) -> set[str]:
    """The adapters that the model runs: by its default, or by the choice of the calling thread."""
    own = state.switch.own
    prepared = state.switch.prepared  # of which an adapter may be gone that was chosen
    chosen = () if own is None else (own,) if isinstance(own, str) else own.samples
    lives = (state.live, *(prepared[text] for text in dict.fromkeys(chosen) if text in prepared))
    return {name for live in lives for name in live.adapters}


def _adapter(state: State, adapter: Adapter, every: Sequence[Owned]) -> AdapterStatus:
    sites = [*adapter.sites]
    live = adapter.name in state.live.adapters
    return AdapterStatus(
        adapter.name,
        tuple(dict.fromkeys(site.form.named for site in sites)),
        len(sites),
        _count(one for one in every if one.parameter.trained),
        _count(every),
        _count(one for one in every if one.parameter.trained and one.value.requires_grad),
        sum(bytes_of(one.value) for one in every),
        live,
        live and state.is_merged,
        _each(every, lambda one: str(one.dtype).removeprefix("torch.")),
        _each(every, lambda one: str(one.device)),
        "" if adapter.composition is None else adapter.composition.summary,
        len(_beside(state, adapter.name)),
    )


def _beside(state: State, adapter: str) -> set[str]:
    """The paths at which an adapter runs while others of what is live are in the weights."""
    sites = (one for site in state.beside for one in sources_of(site))
    return {one.path for one in sites if one.adapter == adapter}


def _count(every: Iterable[Owned]) -> int:
    return sum(one.value.numel() for one in every)


def _each(every: Iterable[Owned], of: Callable[[torch.Tensor], str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(of(one.value) for one in every))


# ------------------------------------------------------------------------------ what does not agree


def _findings(
    model: nn.Module, state: State, every: dict[str, list[Owned]]
) -> Iterator[Diagnostic]:
    sites = [site for adapter in state.adapters.values() for site in adapter.sites]
    yield from (_warning(d.code, d.message, d.hint) for d in misplaced(model, sites, state.plans))
    for name, some in every.items():
        yield from _waiting(name, some)
        yield from _cast(name, some)
        yield from _parted(name, some)
        if model.training:
            yield from _untrained(state, name, some)
    yield from _base(model)
    yield from _merges(state)


def _warning(code: str, message: str, hint: str) -> Diagnostic:
    return Diagnostic(code, message, hint=hint, severity="warning")


def _waiting(name: str, every: Sequence[Owned]) -> Iterator[Diagnostic]:
    """E451 for parameters that have no data though the base has."""
    modules = [one.site.site.module for one in every if one.value.is_meta]
    if any(execution_device(module).type != "meta" for module in modules):
        message = f"`{name}` has parameters on meta, and the base has its weights"
        yield _warning("E451", message, "compiled.materialize() begins them")


def _cast(name: str, every: Sequence[Owned]) -> Iterator[Diagnostic]:
    """E453 for parameters of two dtypes which had one when they were planned."""
    found: dict[torch.dtype, dict[torch.dtype, str]] = {}
    for one in every:
        now = found.setdefault(one.site.form.dtype_of(one.parameter), {})
        now.setdefault(one.value.dtype, one.name)
    for now in found.values():
        if len(now) > 1:
            listed = ", ".join(f"`{n}` {str(d).removeprefix('torch.')}" for d, n in now.items())
            message = f"the parameters of `{name}` have several dtypes: {listed}"
            yield _warning("E453", message, "cast the whole model, as in model.float()")


def _parted(name: str, every: Sequence[Owned]) -> Iterator[Diagnostic]:
    """E458 for an adapter of which some is frozen, or what no method trains is not."""
    frozen = [one for one in every if one.parameter.trained and not one.value.requires_grad]
    learning = [one for one in every if one.value.requires_grad]
    fixed = [one for one in learning if not one.parameter.trained]
    hint = f"compiled.train_only({name!r}) trains what the methods of `{name}` train, and no more"
    if fixed:
        message = f"`{fixed[0].name}` requires gradients, and its method does not train it"
        yield _warning("E458", f"{message}{_more(fixed)}", hint)
    if frozen and len(learning) > len(fixed):
        message = f"`{name}` is trained but for `{frozen[0].name}`{_more(frozen)}"
        yield _warning("E458", f"{message}, which is frozen", hint)


def _more(some: Sized) -> str:
    return f" and {len(some) - 1} more" * (len(some) > 1)


def _untrained(state: State, name: str, every: Sequence[Owned]) -> Iterator[Diagnostic]:
    """E454, E455, E459 for what a training step would not change, or not by gradients."""
    able = any(one.parameter.trained for one in every)
    learns = any(one.parameter.trained and one.value.requires_grad for one in every)
    live = name in _running(state)
    if live and able and not learns:
        message = f"`{name}` is live and frozen, and the model is in training mode"
        yield _warning("E454", message, f"compiled.train_only({name!r}), or model.eval()")
    if learns and not live:
        message = f"`{name}` is trained and not live: no gradient reaches it"
        yield _warning("E455", message, f"compiled.activate({name!r}), or train_only(…) others")
    beside = _beside(state, name)
    stuck = [one for one in every if one.parameter.trained and one.value.requires_grad]
    stuck = [one for one in stuck if one.site.path not in beside]
    if stuck and live and state.is_merged:
        where = f" at `{stuck[0].site.path}`{_more({o.site.path for o in stuck})}" if beside else ""
        message = f"`{name}` is trained and merged{where}: no gradient reaches it"
        yield _warning("E459", message, "compiled.inverse.unmerge() before it is trained")


def _base(model: nn.Module) -> Iterator[Diagnostic]:
    """E456 for parameters of the base that require gradients: `train` makes copies of its own."""
    names = [name for name, p in base_parameters(model).items() if p.requires_grad]
    if names:
        message = f"`{names[0]}`{_more(names)} of the base requires gradients"
        hint = f"requires_grad_(False); `train {names[0]}` in a spec trains a copy of it"
        yield _warning("E456", message, hint)


def _merges(state: State) -> Iterator[Diagnostic]:
    """E457 where some sites of what is merged are in the weights, and quantised ones run."""
    apart, count = state.beside, len(state.sites)
    if apart and not state.options.partial:  # of which it was said
        message = (
            f"`{state.live}` is merged at {count - len(apart)} of {count} sites; "
            f"`{apart[0].path}`{_more(apart)} runs beside the weight"
        )
        yield _warning("E457", message, "merge(quantized='dequantize') merges quantised sites too")


# ------------------------------------------------------------------------------------ the table


def _lines(told: Status) -> Iterator[str]:
    header = ["adapter", "method", "sites", "trained", "total", "memory", "state", "dtype", "on"]
    yield from aligned([header, *map(_row, told.adapters)])
    yield ""
    merged = ", merged into the weights" if told.merged else ""
    if told.beside:
        merged += f", but for what runs at {told.beside} site{'s' * (told.beside > 1)}"
    frozen = ", frozen for inference" if told.frozen else ""
    mode = "training" if told.training else "evaluation"
    yield f"live: {told.live or 'none, the base alone'}{merged}{frozen}; {mode} mode"
    yield from [f"live in this thread: {told.here}"] * (told.here is not None)
    share = f", {told.learning / told.base:.3%} of the base" if told.base else ""
    named = ", ".join(told.trainable) or "nothing"
    yield f"trained: {named}; {told.learning:,} numbers require gradients{share}"
    memory = shown_bytes(sum(one.bytes for one in told.adapters))
    total = sum(one.total for one in told.adapters)
    yield f"adapters: {total:,} numbers, {memory}"
    yield f"base: {told.base:,} numbers, {shown_bytes(told.base_bytes)}"
    yield from (f"made: {one.made_of}" for one in told.adapters if one.made_of)
    yield from map(str, told.findings)


def _row(one: AdapterStatus) -> list[str]:
    states = [
        *(["live"] * one.live),
        *(
            [f"merged {one.sites - one.beside}/{one.sites}" if one.beside else "merged"]
            * one.merged
        ),
        "frozen" if not one.learning else "trained" if one.learning == one.trained else "partly",
    ]
    return [
        one.name,
        ", ".join(one.methods),
        f"{one.sites:,}",
        f"{one.trained:,}",
        f"{one.total:,}",
        shown_bytes(one.bytes),
        " ".join(states),
        ", ".join(one.dtypes),
        ", ".join(one.devices),
    ]
