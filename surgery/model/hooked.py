"""Modules that something else has hooked: class swaps and adapters that stay right under hooks.

An integration hooks a module by setting attributes on the instance. Nothing here imports it: what
it set is enough to see, and the code that knows it is imported by name when it is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MethodType
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import nn

from surgery.model.holder import cover_of

if TYPE_CHECKING:
    from surgery.model.storage import Storage

INTEGRATIONS: Mapping[str, str] = {"_hf_hook": "surgery.integrations.accelerate"}
"""The attribute an integration leaves on an instance, and the module that knows what it means."""

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


def integration_of(module: nn.Module) -> Integration | None:
    """The integration that has hooked this module or an ancestor that covers it, if any."""
    if cover_of(module) is not None:
        return _integration("_hf_hook")
    return next((_integration(mark) for mark in INTEGRATIONS if mark in vars(module)), None)


def _integration(mark: str) -> Integration:
    # Integrations stand above this stage and stay unimported until a model is hooked by one.
    return cast(Integration, importlib.import_module(INTEGRATIONS[mark]))


def _integrations(model: nn.Module) -> list[Integration]:
    modules = list(model.modules())
    return [_integration(mark) for mark in INTEGRATIONS if any(mark in vars(m) for m in modules)]


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

    For an offloaded site this is its hook's device, though its weight rests on meta.
    """
    integration = integration_of(module)
    found = None if integration is None else integration.execution_device(module)
    return cast(nn.Linear, module).weight.device if found is None else found


def adopt(model: nn.Module) -> None:
    """Keep every adapter of a hooked model out of the hooks' reach; nothing on any other model.

    To be called on the root after adapters were added and before their tensors are needed, and
    again after the model was offloaded with hooks that place whole submodules. Idempotent.
    """
    for integration in _integrations(model):
        integration.adopt(model)


def release(model: nn.Module) -> None:
    """Undo `adopt`, on the root, after the last adapter was taken out."""
    for integration in _integrations(model):
        integration.release(model)
