"""Modules that something else has hooked: class swaps and adapters that stay right under hooks.

An integration hooks a module by setting attributes on the instance. Nothing here imports it: what
it set is enough to see, and the code that knows it is imported by name when it is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Protocol, cast

import torch
from torch import nn

from surgery.model.holder import every_module, parameters_of
from surgery.model.layers import LayerKind, weight_kind_of
from surgery.model.sharded import MANAGED
from surgery.model.stored import Storage

COVER = "_surgery_cover"
"""Where `adopt` notes the hook of an ancestor that offloads a module, and the module's prefix."""

INTEGRATIONS: Mapping[str, str] = {
    "_hf_hook": "surgery.integrations.accelerate",
    COVER: "surgery.integrations.accelerate",
    MANAGED: "surgery.model.sharded",
}
"""What marks an instance as hooked, and the module that knows what it means."""

_FORWARDS = ("_old_forward", "forward")


class Integration(Protocol):
    """What a module named in `INTEGRATIONS` offers."""

    STORAGE: Storage

    def adopt(self, model: nn.Module) -> None:
        """See `adopt` below."""
        ...

    def release(self, model: nn.Module) -> None:
        """See `release` below."""
        ...

    def execution_device(self, module: nn.Module) -> torch.device | None:
        """Where the hook runs the module, or None if it leaves it where it is."""
        ...


class _Packed(Protocol):
    """What a module named by a kind of layer offers."""

    STORAGE: Storage


def packing_of(module: nn.Module, name: str = "weight") -> Storage | None:
    """The row of a module whose parameter of that name is packed, if it is; imported for it."""
    kind = weight_kind_of(module)
    row = None if kind is None else storage_of_kind(kind)
    return row if row is not None and row.applies(module, name) else None


def storage_of_kind(kind: LayerKind) -> Storage | None:
    """The row of all layers of a kind, if it has one of its own."""
    if not kind.packed:
        return None
    return cast(_Packed, imported(kind.packed)).STORAGE


def imported(name: str) -> object:
    """A module of the package that another library is needed for, by its full name."""
    return importlib.import_module(name)


def integration_of(module: nn.Module) -> Integration | None:
    """The integration that has hooked this module or an ancestor that covers it, if any."""
    return next((_imported(INTEGRATIONS[mark]) for mark in _marks(module)), None)


def _imported(name: str) -> Integration:
    # Integrations stand above this stage and stay unimported until a model is hooked by one.
    return cast(Integration, importlib.import_module(name))


def _marks(module: nn.Module) -> list[str]:
    return [mark for mark in INTEGRATIONS if mark in vars(module)]


def _integrations(model: nn.Module) -> list[Integration]:
    names = {INTEGRATIONS[mark] for module in every_module(model) for mark in _marks(module)}
    return [_imported(name) for name in sorted(names)]


# ------------------------------------------------------------------------------ class swaps


def swap_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change a module's class, so that its next call runs `cls.forward`, hooked or not.

    A hook keeps the bound forward of the old class on the instance, which would hide the new one;
    it is bound anew. A hook removed earlier leaves a plain bound forward behind; it is deleted.
    The same call undoes itself with the classes the other way round.
    """
    before = type(module)
    module.__class__ = cls
    own = vars(module)
    for name in _FORWARDS:
        if _bound_to(own.get(name), module, before):
            own[name] = MethodType(cls.forward, module)
    wrapper = own.get("forward")
    if "_old_forward" not in own and _bound_to(wrapper, module, cls):
        del own["forward"]
    elif _bound_to(getattr(wrapper, "__wrapped__", None), module, before):
        vars(wrapper)["__wrapped__"] = own["_old_forward"]


def _bound_to(method: object, module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether `method` is `cls.forward` bound to this module."""
    owner = getattr(method, "__self__", None)
    return owner is module and getattr(method, "__func__", None) is cls.forward


def replaced_forward(module: nn.Module) -> bool:
    """Whether the instance has a forward of its own, so that a swapped class would never be called.

    What a known hook keeps is looked through.
    """
    own = vars(module)
    kept = own.get("_old_forward", own.get("forward"))
    return kept is not None and not _bound_to(kept, module, type(module))


# --------------------------------------------------------------------------------- adapters


def execution_device(module: nn.Module) -> torch.device:
    """Where a site's computation runs, hence where its adapters belong; meta if not known yet.

    For an offloaded site this is its hook's device, though its weight rests on meta. What has no
    parameters of its own runs where the first below it does that has some.
    """
    module = next(
        (one for one in every_module(module) if next(_own(one), None) is not None), module
    )
    integration = integration_of(module)
    found = None if integration is None else integration.execution_device(module)
    if found is not None:
        return found
    # Not as an attribute: that may be computed, from adapters on the very device that is asked for.
    return next(_own(module)).device


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in parameters_of(module).values() if p is not None)


def adopt(model: nn.Module) -> None:
    """Keep all adapters of a hooked model out of the hooks' reach; nothing on any other model.

    To be called on the root before `execution_device` or a weight is asked for, and again after
    an adapted model was offloaded with hooks that place whole submodules. Idempotent; it holds
    for adapters that come later.
    """
    for integration in _integrations(model):
        integration.adopt(model)


def release(model: nn.Module) -> None:
    """Undo `adopt` on the root, where no adapter is left."""
    for integration in _integrations(model):
        integration.release(model)
