"""Putting an adapter on a live model, and taking it off: the only place that changes a module.

A site's class becomes a cached subclass of its own, whose `forward` is the code of its site graph;
the adapter's parameters live in a child of the site. Nothing else of the module changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from surgery.lower import Lowering, lower
from surgery.model.holder import (
    ADAPTERS,
    SHARED,
    Holder,
    children_of,
    holder_of,
    under_adapters,
)
from surgery.model.hooked import swap_class

# Classes are kept per base class, so that Dynamo sees one type for all sites that are alike.
_MOUNTED: WeakKeyDictionary[type[nn.Module], dict[Lowering, type[nn.Module]]] = WeakKeyDictionary()


def mounted_class(base: type[nn.Module], key: Lowering) -> type[nn.Module]:
    """The subclass of `base` that runs a site graph; the same one for the same graph."""
    classes = _MOUNTED.setdefault(base, {})
    if key not in classes:
        classes[key] = _make_class(base, key)
    return classes[key]


def _make_class(base: type[nn.Module], key: Lowering) -> type[nn.Module]:
    forward = cast(Any, base.forward)

    def call_base(self: nn.Module, x: Tensor) -> Tensor:
        return forward(self, x)

    def reduce(self: nn.Module, protocol: object) -> tuple[object, ...]:
        del protocol
        return _rebuild, (base, key), self.__getstate__()

    members = {
        "forward": lower(key).run,
        "base": call_base,
        "surgery_base": base,
        "surgery_key": key,
        "__reduce_ex__": reduce,
        # device maps and wrapping policies look classes up by name
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), members)


def _rebuild(base: type[nn.Module], key: Lowering) -> nn.Module:
    cls = mounted_class(base, key)
    return cls.__new__(cls)


def mount(module: nn.Module, key: Lowering) -> None:
    """Let a module run a site graph; its parameters must be in place."""
    swap_class(module, mounted_class(base_class(module), key))


def dismount(module: nn.Module) -> None:
    """Let a module run its own forward again; its adapters stay in place."""
    base = base_class(module)
    if type(module) is not base:
        swap_class(module, base)


def base_class(module: nn.Module) -> type[nn.Module]:
    """The module's own class, mounted or not."""
    return cast("type[nn.Module]", getattr(type(module), "surgery_base", type(module)))


def is_mounted(module: nn.Module) -> bool:
    """Whether the module runs a site graph."""
    return base_class(module) is not type(module)


# ------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True)
class Tensors:
    """The parameters of one adapter at one site: name to tensor, and which are trained."""

    values: Mapping[str, Tensor]
    trained: frozenset[str]


def add_holder(module: nn.Module, adapter: str) -> Holder:
    """The holder of an adapter's parameters, `<module>.surgery.<adapter>`; made if need be."""
    holder = holder_of(module)
    if holder is None:
        holder = Holder()
        module.add_module(ADAPTERS, holder)
    return holder_at(holder, adapter)


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


def parameter_of(module: nn.Module, adapter: str, name: str) -> nn.Parameter:
    """One parameter of an adapter at a site. KeyError if it has none of that name."""
    holder = holder_of(module)
    if holder is None:
        raise KeyError(name)
    child = children_of(holder)[adapter]
    return cast("dict[str, nn.Parameter]", vars(child)["_parameters"])[name]


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters by name; tied ones under each name."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if not under_adapters(name)}


def set_requires_grad(model: nn.Module, flags: Mapping[str, bool]) -> None:
    """Set the flags of the base's parameters, by name."""
    for name, parameter in base_parameters(model).items():
        if name in flags:
            parameter.requires_grad_(flags[name])
