"""Putting an adapter on a live model, and taking it off: the only place that changes a module.

A site's class becomes a cached subclass of its own, whose `forward` is the code of its site graph;
the adapter's parameters live in a child of the site. Nothing else of the module changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from surgery.lower import RAW, Lowerings, lower, lower_values
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
from surgery.model.hooked import swap_class
from surgery.model.layers import base_class

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
        **(_values(key) if key[0].form.mode == "value" else _call(base, key)),
        "surgery_base": base,
        "surgery_key": key,
        "__reduce_ex__": reduce,
        # device maps and wrapping policies look classes up by name
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), members)


def _call(base: type[nn.Module], key: Lowerings) -> Mapping[str, object]:
    """A forward that is a graph, which calls the base's own as `base`."""
    forward = cast(Any, base.forward)

    def call_base(self: nn.Module, x: Tensor) -> Tensor:
        return forward(self, x)

    return {"forward": lower(key).run, "base": call_base}


def _values(key: Lowerings) -> Mapping[str, object]:
    """Parameters that are graphs, so that the base's own forward, or its owner's, reads them."""
    computed = {name: property(_guarded(g.run)) for name, g in lower_values(key).items()}
    return {**computed, **{raw: property(_raw(name)) for name, raw in RAW.items()}}


def _raw(name: str) -> Callable[[nn.Module], Tensor | None]:
    def read(self: nn.Module) -> Tensor | None:
        return parameters_of(self)[name]

    return read


def _guarded(run: Callable[..., Tensor]) -> Callable[[nn.Module], Tensor]:
    """The same, with an error that no module takes for an attribute that it should look up."""

    def read(self: nn.Module) -> Tensor:
        try:
            return run(self)
        except AttributeError as error:
            raise RuntimeError(f"a parameter of an adapter is missing: {error}") from error

    return read


def _rebuild(base: type[nn.Module], key: Lowerings) -> nn.Module:
    cls = mounted_class(base, key)
    return cls.__new__(cls)


def mount(module: nn.Module, key: Lowerings) -> None:
    """Let a module run a site graph; its parameters must be in place."""
    swap_class(module, mounted_class(base_class(module), key))


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
            holder.add_module(name, child)
        holder = child
    return cast(Holder, holder)


def link_follower(follower: nn.Module, adapter: str, holder: Holder) -> None:
    """Let a layer that shares an adapted weight reach the adapter, without owning it."""
    vars(follower)[link_name(adapter)] = holder


def unlink_follower(follower: nn.Module, adapter: str) -> None:
    """Take back what `link_follower` did, if it was done."""
    vars(follower).pop(link_name(adapter), None)


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
