"""Putting an adapter on a live model, and taking it off: the only place that changes a module.

A site's class becomes a cached subclass of its own, whose `forward` is the code of its site graph;
the adapter's parameters live in a child of the site. Nothing else of the module changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from threading import local
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from surgery.lower import Lowerings, by_mode, lower, lower_values
from surgery.model.holder import (
    ADAPTERS,
    SHARED,
    Holder,
    children_of,
    holder_of,
    link_name,
    parameters_of,
    under_adapters,
)
from surgery.model.hooked import storage_of_kind, swap_class
from surgery.model.layers import base_class
from surgery.nodes import UNPACKED
from surgery.values import raw

# Classes are kept per base class, so that Dynamo sees one type for all sites that are alike.
_MOUNTED: WeakKeyDictionary[type[nn.Module], dict[Lowerings, type[nn.Module]]] = WeakKeyDictionary()


def mounted_class(base: type[nn.Module], key: Lowerings) -> type[nn.Module]:
    """The subclass of `base` that runs a site graph; the same one for the same graph."""
    classes = _MOUNTED.setdefault(base, {})
    if key not in classes:
        classes[key] = _make_class(base, key)
    return classes[key]


def _make_class(base: type[nn.Module], key: Lowerings) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: object) -> tuple[object, ...]:
        del protocol
        return _rebuild, (base, key), self.__getstate__()

    members = {
        **_members(base, key),
        "surgery_base": base,
        "surgery_key": key,
        "__reduce_ex__": reduce,
        # device maps and wrapping policies look classes up by name
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), members)


def _members(base: type[nn.Module], key: Lowerings) -> Mapping[str, object]:
    called, computed = by_mode(key)
    if not computed:
        return _call(base, called)
    forward = _call(base, called) if called else {"forward": remembering(cast(Any, base.forward))}
    return {**_values(computed), **forward}


def _call(base: type[nn.Module], key: Lowerings) -> Mapping[str, object]:
    """A forward that is a graph, which calls the base's own as `base`."""
    forward = cast(Any, base.forward)

    def call_base(self: nn.Module, x: Tensor) -> Tensor:
        return forward(self, x)

    return {"forward": lower(key).run, "base": call_base, **_unpacked(key)}


def _unpacked(key: Lowerings) -> Mapping[str, object]:
    """What the weight stands for, where it lies packed."""
    row = storage_of_kind(key[0].form.kind)
    if row is None or row.packing is None:
        return {}
    return {UNPACKED: property(row.packing.weight)}


def _values(key: Lowerings) -> Mapping[str, object]:
    """Parameters that are graphs, so that the base's own forward, or its owner's, reads them."""
    graphs = lower_values(key)
    computed = {
        name: property(remembered(name, _guarded(name, g.run))) for name, g in graphs.items()
    }
    own = {name for k in key for name in (k.form.at.parameter, k.form.at.bias)}
    return {**computed, **{raw(name): property(_own(name)) for name in own}}


def _own(name: str) -> Callable[[nn.Module], Tensor | None]:
    def read(self: nn.Module) -> Tensor | None:
        return parameters_of(self).get(name)

    return read


def _guarded(name: str, run: Callable[..., Tensor]) -> Callable[[nn.Module], Tensor]:
    """The same, with an error that no module takes for an attribute that it should look up.

    What has no data is not computed: a hook that is about to bring it asks for its dtype and shape.
    """

    def read(self: nn.Module) -> Tensor:
        own = parameters_of(self).get(name)
        if own is not None and own.is_meta:
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


def _rebuild(base: type[nn.Module], key: Lowerings) -> nn.Module:
    cls = mounted_class(base, key)
    return cls.__new__(cls)


def mount(module: nn.Module, key: Lowerings) -> None:
    """Let a module run a site graph; its parameters must be in place."""
    swap_class(module, mounted_class(base_class(module), key))


def mount_all(model: nn.Module, modules: Sequence[tuple[nn.Module, Lowerings]]) -> None:
    """Let a model run the graphs of some of its modules; in its own graph, where it is one."""
    if isinstance(model, fx.GraphModule):
        from surgery.whole import run_with

        modules = run_with(model, modules)
    for module, keys in modules:
        mount(module, keys)


def dismount_all(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Undo `mount_all` for all that is mounted; adapters stay in place."""
    for module in modules:
        dismount(module)
    if isinstance(model, fx.GraphModule):
        from surgery.whole import run_base

        run_base(model)


def give_back(model: nn.Module, keep: bool = False) -> None:
    """Let a model that has no adapter any more be what it was; `keep` what was merged."""
    if isinstance(model, fx.GraphModule):
        from surgery.whole import give_back

        give_back(model, keep)


def dismount(module: nn.Module) -> None:
    """Let a module run its own forward again; its adapters stay in place."""
    base = base_class(module)
    if type(module) is not base:
        swap_class(module, base)


def is_mounted(module: nn.Module) -> bool:
    """Whether the module runs a site graph."""
    return base_class(module) is not type(module)


# ------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True)
class Tensors:
    """The parameters of one adapter at one site: name to tensor, and which are trained."""

    values: Mapping[str, Tensor]
    trained: frozenset[str]


def add_holder(module: nn.Module, *names: str) -> Holder:
    """The holder of an adapter's parameters, `<module>.surgery.<name>…`; made if need be."""
    holder = holder_of(module)
    if holder is None:
        holder = Holder()
        holder.training = module.training
        module.add_module(ADAPTERS, holder)
    return holder_at(holder, *names)


def add_parameters(holder: Holder, tensors: Tensors) -> None:
    """Let a holder keep some parameters."""
    for name, value in tensors.values.items():
        holder.register_parameter(name, nn.Parameter(value, requires_grad=name in tensors.trained))


def holder_at(holder: nn.Module, *names: str) -> Holder:
    """The holder below a holder, made if need be."""
    for name in names:
        child = children_of(holder).get(name)
        if child is None:
            child = Holder()
            child.training = holder.training
            holder.add_module(name, child)
        holder = child
    return cast(Holder, holder)


def link_follower(follower: nn.Module, holders: Sequence[str], holder: Holder) -> None:
    """Let a layer that shares an adapted weight reach the adapter, without owning it.

    holders: the names of the holder from the site's module on.
    """
    vars(follower)[link_name(*holders)] = holder


def unlink_follower(follower: nn.Module, holders: Sequence[str]) -> None:
    """Take back what `link_follower` did, if it was done."""
    vars(follower).pop(link_name(*holders), None)


def link_shared(child: Holder, bank: Holder) -> None:
    """Let a site reach the parameters it shares, without owning them a second time.

    The bank is a child of the root alone: as a plain attribute it is in no state dict twice, and
    copies and pickles keep it one object.
    """
    vars(child)[SHARED] = bank


def remove_parameters(module: nn.Module, adapter: str) -> None:
    """Take an adapter's parameters out, and the holder too once it is empty."""
    holder = holder_of(module)
    if holder is None:
        return
    children_of(holder).pop(adapter, None)
    if not children_of(holder):
        children_of(module).pop(ADAPTERS, None)


def parameter_of(module: nn.Module, holders: Sequence[str], name: str) -> nn.Parameter:
    """One parameter of an adapter at a site. KeyError if it has none of that name."""
    at: nn.Module | None = holder_of(module)
    for holder in holders:
        at = None if at is None else children_of(at)[holder]
    if at is None:
        raise KeyError(name)
    return cast("dict[str, nn.Parameter]", vars(at)["_parameters"])[name]


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters by name; tied ones under each name."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if not under_adapters(name)}


def set_requires_grad(model: nn.Module, flags: Mapping[str, bool]) -> None:
    """Set the flags of the base's parameters, by name."""
    for name, parameter in base_parameters(model).items():
        if name in flags:
            parameter.requires_grad_(flags[name])
