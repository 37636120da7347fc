"""The child module that keeps an adapter's parameters.

A site's adapters live in `<site>.surgery.<adapter>.<name>`. Both levels are a `Holder`: a module
that is never called, so a hook that moves parameters in and out around a call would never fire on
it and would leave them without data. A holder therefore takes no such hook: it stays where the
computation runs, its parameters remain the objects that an optimizer knows, and gradients arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

ADAPTERS = "surgery"
"""The name of the child under which a site keeps its adapters; nothing below it is a site."""

SHARED = "shared"
"""The name under which the root keeps what sites share, and under which each site reaches it."""

_BEFORE = "_before_hook"


class Holder(nn.Module):
    """A module that only holds tensors and children; it computes nothing, takes no offloading.

    accelerate puts a hook on every module that owns tensors. It sets `_old_forward`, then moves
    the tensors away, then sets `_hf_hook` and `forward`. A holder notes its tensors at the first
    of these, takes the very same objects back at the second, and stores none of the three.
    """

    def __setattr__(self, name: str, value: Tensor | nn.Module | object) -> None:
        """Set an attribute, except what a hook would leave here."""
        match name:
            case "_old_forward":
                vars(self)[_BEFORE] = (dict(_slots(self, "_parameters")), _buffers(self))
            case "_hf_hook":
                self._take_back(getattr(value, "execution_device", None))
            case "forward":
                pass
            case _:
                super().__setattr__(name, cast(Tensor, value))

    def forward(self, *args: Any) -> Any:
        """What came, unchanged: an `nn.Sequential` calls every child that it has."""
        return args[0] if len(args) == 1 else args

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the tensors; what is on meta stays there until it is begun.

        Elsewhere it would be memory that nothing was written to (`to_empty`).
        """

        def moved(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            return tensor if tensor.is_meta and not made.is_meta else made

        applied = cast(Any, super())._apply(moved, recurse)  # its stub is not fully typed
        return cast(Self, applied)

    def _take_back(self, device: torch.device | str | int | None) -> None:
        """Hold the tensors again that were held before a hook came, on the hook's device."""
        if _BEFORE not in vars(self):
            return
        parameters, buffers = vars(self).pop(_BEFORE)
        for tensor in (*parameters.values(), *buffers.values()):
            if tensor is not None and device is not None and not tensor.is_meta:
                # `.data` keeps the object, and with it an optimizer's hold on it.
                tensor.data = tensor.data.to(device)
        _slots(self, "_parameters").update(parameters)
        _slots(self, "_buffers").update(buffers)


def _slots(module: nn.Module, name: str) -> dict[str, Tensor | None]:
    return cast("dict[str, Tensor | None]", vars(module)[name])


def _buffers(module: nn.Module) -> dict[str, Tensor | None]:
    return dict(_slots(module, "_buffers"))


def holder_of(module: nn.Module) -> Holder | None:
    """The child of a site that keeps its adapters, if it has one."""
    child = children_of(module).get(ADAPTERS)
    return child if isinstance(child, Holder) else None


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The children of a module by name, in order; the dictionary is the module's own."""
    return cast("dict[str, nn.Module | None]", vars(module)["_modules"])


def modules_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module and all below it by path, in order, each once; its own path is ""."""
    return cast("Iterator[tuple[str, nn.Module]]", module.named_modules())


def every_module(model: nn.Module) -> Iterator[nn.Module]:
    """The base's modules, each once, in no order that matters.

    Holders are left out, of which ten adapters have more than the base has modules. torch's own
    walk passes each module up through a generator a level.
    """
    seen: set[int] = set()
    stack = [model]
    while stack:
        module = stack.pop()
        if id(module) in seen or isinstance(module, Holder):
            continue
        seen.add(id(module))
        yield module
        stack.extend(child for child in children_of(module).values() if child is not None)


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters by name, in order; tied ones under each name."""
    found: dict[str, nn.Parameter] = {}
    stack = [("", model)]
    while stack:
        prefix, module = stack.pop()
        own = parameters_of(module).items()
        found |= {prefix + name: p for name, p in own if p is not None}
        children = reversed(children_of(module).items())
        stack += [
            (f"{prefix}{name}.", child)
            for name, child in children
            if child is not None and not isinstance(child, Holder)
        ]
    return found


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters a module itself owns, in order, `None` where one is registered as absent.

    The dictionary is the module's own.
    """
    return cast("dict[str, nn.Parameter | None]", vars(module)["_parameters"])


def parameter_name(path: str, holders: Sequence[str], name: str) -> str:
    """The name that an adapter's parameter has in the model, below a module and some holders."""
    return ".".join([*filter(None, [path]), ADAPTERS, *holders, name])


def shared_name(adapter: str, group: str, name: str) -> str:
    """The name that a shared parameter has in the model."""
    return f"{ADAPTERS}.{adapter}.{SHARED}.{group}.{name}"


def link_name(adapter: str, *names: str) -> str:
    """The attribute by which a layer that shares an adapted weight reaches the adapter.

    names: what the slice of the module is called, if it is not all of its weight.
    """
    return "_".join((ADAPTERS, "of", adapter, *names))


def under_adapters(name: str) -> bool:
    """Whether a parameter's name lies below an adapter's holder."""
    return f".{ADAPTERS}." in f".{name}"
