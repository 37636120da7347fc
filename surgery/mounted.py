"""What a mounted module is: a cached subclass of its own class, and a table of what it runs.

Its `forward` looks up, by what is live, the code of a site graph, so that a switch changes no
module. Parameters that are graphs, which the base's own forward reads, are looked up the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from threading import local
from typing import Any, NoReturn, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from surgery.calling import Around, changed
from surgery.calling import around as put_around
from surgery.calls.positions import names_of, placed
from surgery.coding import SiteGraph
from surgery.errors import refuse
from surgery.folding import folded
from surgery.lower import Lowerings, around, by_mode, lower, lower_values
from surgery.model.holder import parameters_of
from surgery.model.hooked import storage_of_kind
from surgery.model.layers import LayerKind
from surgery.model.sharded import is_managed, is_sharded
from surgery.nodes import UNPACKED
from surgery.routing import refuse_value, routed
from surgery.switch import Routed, Switch
from surgery.values import raw

RUNS = "_surgery_runs"
"""The attribute of a mounted module that is what it runs."""

Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Form:
    """What a mounted class has beyond its base: what any of its adapters needs.

    called: whether some run in place of the forward. computed: the parameters that are computed.
    own: the parameters of which one has the base's own beside the computed. packed: the kind of
    layer whose weight lies packed, if it does. around: whether some are put around the call.
    placed: whether the call tells what its tokens are.
    """

    called: bool = False
    computed: frozenset[str] = frozenset()
    own: frozenset[str] = frozenset()
    packed: LayerKind | None = None
    around: bool = False
    placed: bool = False

    def __or__(self, other: Form) -> Form:
        """What has all of both."""
        return Form(
            self.called or other.called,
            self.computed | other.computed,
            self.own | other.own,
            self.packed or other.packed,
            self.around or other.around,
            self.placed or other.placed,
        )


def form_of(keys: Lowerings) -> Form:
    """What a class needs to run some sites."""
    called, computed = by_mode(keys)
    own = frozenset(n for k in computed for n in (k.form.at.parameter, k.form.at.bias))
    kind = called[0].form.kind if called else None
    packed = kind if kind is not None and storage_of_kind(kind) is not None else None
    beside = around(keys) is not None
    return Form(bool(called), frozenset(lower_values(computed)), own, packed, beside)


class Runs:
    """What a module runs: for each text of what is live, its forward and its parameters.

    keys: what these are looked up by, and made of again in copies and pickles. form: what a class
    needs to run all of it, and all that was dropped since: what comes and goes changes no class.
    """

    __slots__ = ("around", "bank", "base", "form", "forwards", "keys", "path", "switch", "values")

    def __init__(self, switch: Switch, base: type[nn.Module], path: str) -> None:
        """Nothing yet, at a module of a class."""
        self.switch, self.base, self.path = switch, base, path
        self.bank: Any = None  # of the module, where one is declared
        self.form = Form()
        self.keys: dict[str, Lowerings] = {}
        self.forwards: dict[str, Forward] = {}
        self.values: dict[str, dict[str, Callable[[nn.Module], Tensor]]] = {}
        self.around: dict[str, Around] = {}

    def add(self, live: str, keys: Lowerings) -> None:
        """What runs while something is live."""
        self.widen(form_of(keys))
        self.keys[live] = keys
        self._run(live, lambda graph: graph.run)

    def widen(self, form: Form) -> None:
        """Let a class have some more."""
        self.form |= form
        for name in form.computed:
            self.values.setdefault(name, {})

    def _run(self, live: str, code: Callable[[SiteGraph], Callable[..., Any]]) -> None:
        """Let code of a module's graphs run while something is live."""
        called, computed = by_mode(self.keys[live])
        base: Forward = cast(Any, self.base.forward)
        if called or computed:
            self.forwards[live] = code(lower(called)) if called else remembering(base)
        for name, graph in lower_values(computed).items():
            value = remembered(name, _guarded(name, code(graph)))
            self.values[name][live] = value
        whole = around(self.keys[live])
        if whole is not None:
            self.around[live] = put_around(whole, code)

    def freeze(self, module: nn.Module, lives: Iterable[str] | None = None) -> None:
        """Compute what depends on parameters alone, as they are now, once for all calls.

        lives: while what is live; None for all.
        """
        for live in self.keys if lives is None else lives:
            self._run(live, lambda graph: folded(graph, module, refuse_gradients))

    def thaw(self) -> None:
        """Undo `freeze`."""
        for live in self.keys:
            self._run(live, lambda graph: graph.run)

    def drop(self, live: str) -> None:
        """Forget what runs while something is live."""
        for known in (self.keys, self.forwards, self.around, *self.values.values()):
            known.pop(live, None)

    def __reduce__(self) -> tuple[Callable[..., Runs], tuple[object, ...]]:
        """As what it is made of."""
        return _runs, (self.switch, self.base, self.path, dict(self.keys), self.form)


def _runs(
    switch: Switch, base: type[nn.Module], path: str, keys: dict[str, Lowerings], form: Form
) -> Runs:
    made = Runs(switch, base, path)
    made.widen(form)
    for live, own in keys.items():
        made.add(live, own)
    return made


def runs_of(module: nn.Module) -> Runs | None:
    """What a mounted module runs; None for any other."""
    return vars(module).get(RUNS)


# ---------------------------------------------------------------------------------- the class

# Classes are kept per base class, so that Dynamo sees one type for all sites that are alike.
_MOUNTED: WeakKeyDictionary[type[nn.Module], dict[Form, type[nn.Module]]] = WeakKeyDictionary()


def mounted_class(base: type[nn.Module], form: Form) -> type[nn.Module]:
    """The subclass of `base` that runs what is live; the same one for the same form."""
    classes = _MOUNTED.setdefault(base, {})
    if form not in classes:
        classes[form] = _make_class(base, form)
    return classes[form]


def _make_class(base: type[nn.Module], form: Form) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: object) -> tuple[object, ...]:
        del protocol
        return _rebuild, (base, form), self.__getstate__()

    members = {
        "forward": _forward(cast(Any, base.forward), form),
        **(_called(base, form) if form.called else {}),
        **{name: property(_value(name)) for name in form.computed},
        **{raw(name): property(_own(name)) for name in form.own},
        "surgery_base": base,
        "__reduce_ex__": reduce,
        # device maps and wrapping policies look classes up by name
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), members)


def _forward(base: Forward, form: Form) -> Forward:
    """The forward of a class: the call, with what is around it and what sites below ask of it."""
    forward = _call(base)
    if form.around:
        forward = _around(forward)
    if form.placed:
        forward = _placed(forward, names_of(base))
    return wraps(base)(forward)


def _around(call: Forward) -> Forward:
    """A call, and what is live around it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        runs = self._surgery_runs
        return changed(self, runs.path, runs.around, runs.switch.choice, call, args, kwargs)

    return forward


def _placed(call: Forward, names: tuple[str, ...]) -> Forward:
    """A call within which sites below know which tokens they are given."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return placed(self, call, names, args, kwargs)

    return forward


def _call(base: Forward) -> Forward:
    """The call itself, by what is live."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        runs = self._surgery_runs
        if runs.bank is not None and torch.compiler.is_compiling():
            lanes = runs.switch.lanes
            # What is sharded since has other parameters than those in the stacks.
            if lanes.fits and not torch.is_grad_enabled() and not is_managed(self):
                return runs.bank.run(self, base, lanes, *args, **kwargs)
        choice = runs.switch.choice
        if type(choice) is not str and runs.forwards:  # else what is below has the choice itself
            return routed(self, runs, choice, call, args, kwargs)
        run = runs.forwards.get(choice)
        if run is not None:
            return run(self, *args, **kwargs)
        if type(choice) is str and choice not in runs.switch.prepared:
            _refuse_gone(choice)
        return base(self, *args, **kwargs)

    return call


def _refuse_gone(choice: str) -> NoReturn:
    refuse(
        "E437",
        f"what this thread has live is no longer on the model: `{choice}`",
        hint="an adapter of it was deleted or renamed since; choose again",
    )


def refuse_gradients() -> NoReturn:
    """E440, for a forward that records gradients while the model is frozen."""
    refuse(
        "E440",
        "a forward records gradients while the model is frozen",
        hint="run it under torch.no_grad(), or thaw() before training",
    )


def _called(base: type[nn.Module], form: Form) -> Mapping[str, object]:
    """What the graphs of a class's sites read of it beside its parameters."""
    forward = cast(Any, base.forward)

    def call_base(self: nn.Module, x: Tensor) -> Tensor:
        return forward(self, x)

    row = None if form.packed is None else storage_of_kind(form.packed)
    if row is None or row.packing is None:
        return {"base": call_base}
    return {"base": call_base, UNPACKED: property(row.packing.weight)}


def _value(name: str) -> Callable[[nn.Module], Tensor | None]:
    """A parameter that is a graph where what is live changes it."""

    def get(self: nn.Module) -> Tensor | None:
        runs: Runs = vars(self)[RUNS]
        choice, values = runs.switch.choice, runs.values[name]
        if isinstance(choice, Routed) and not values.keys().isdisjoint(choice.samples):
            refuse_value(runs.path, name)
        run = values.get(cast(str, choice))
        return parameters_of(self).get(name) if run is None else run(self)

    return get


def _own(name: str) -> Callable[[nn.Module], Tensor | None]:
    def read(self: nn.Module) -> Tensor | None:
        return parameters_of(self).get(name)

    return read


def _guarded(name: str, run: Callable[..., Tensor]) -> Callable[[nn.Module], Tensor]:
    """The same, with an error that no module takes for an attribute that it should look up.

    What has no data, or a part of it, is not computed: a hook that is about to bring it asks for
    its dtype and shape, and what shards it takes what it finds for the parameter itself.
    """

    def read(self: nn.Module) -> Tensor:
        own = parameters_of(self).get(name)
        if own is not None and (own.is_meta or is_sharded(own)):
            return own
        try:
            return run(self)
        except AttributeError as error:
            raise RuntimeError(f"a parameter of an adapter is missing: {error}") from error

    return read


# A forward may read a parameter many times, each expert's matrix by itself, and W' is made once.

_REMEMBERED = local()


def remembering(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward within which each parameter that is a graph is computed once."""

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # which finds by itself what is computed twice
            return forward(self, *args, **kwargs)
        every = vars(_REMEMBERED)
        before = every.get(str(id(self)))
        every[str(id(self))] = {}
        try:
            return forward(self, *args, **kwargs)
        finally:
            if before is None:
                del every[str(id(self))]
            else:
                every[str(id(self))] = before

    return wraps(forward)(run)


def remembered(name: str, read: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], Tensor]:
    """A parameter that is a graph, computed once within the module's own forward."""

    def get(self: nn.Module) -> Tensor:
        known = None
        if not torch.compiler.is_compiling():
            known = cast("dict[object, Tensor] | None", vars(_REMEMBERED).get(str(id(self))))
        if known is None:
            return read(self)
        key = name, torch.is_grad_enabled()  # what was computed without gradients has none
        if key not in known:
            known[key] = read(self)
        return known[key]

    return get


def _rebuild(base: type[nn.Module], form: Form) -> nn.Module:
    cls = mounted_class(base, form)
    return cls.__new__(cls)
