"""Weights that accelerate's hooks keep elsewhere, and adapters beside such weights.

Read from accelerate 1.15, `hooks.py`. `AlignDevicesHook(offload=True)` leaves meta parameters on
the module, loads their data from `weights_map` for each call, and takes it away again. With
`place_submodules` it does so for everything below, the children's hooks being absent. Hooks are
taken by their attributes, so nothing of accelerate is imported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from surgery.model.holder import (
    ADAPTERS,
    Holder,
    children_of,
    modules_of,
    parameters_of,
)
from surgery.model.hooked import COVER
from surgery.model.storage import address, register, requires_grad
from surgery.model.stored import Kept, Storage

Device = torch.device | str | int


class Hook(Protocol):
    """What is used of an `AlignDevicesHook`."""

    execution_device: Device | None
    offload: bool
    place_submodules: bool
    weights_map: Mapping[str, Tensor]
    original_devices: dict[str, torch.device]
    tied_params_names: set[str]


def hooks_of(module: nn.Module) -> Iterator[Hook]:
    """The device-aligning hooks on a module itself, those in a sequence of hooks included."""
    hook: object = vars(module).get("_hf_hook")
    for one in cast("tuple[object, ...]", getattr(hook, "hooks", (hook,))):
        if hasattr(one, "weights_map") and hasattr(one, "execution_device"):
            yield cast(Hook, one)


def _covering(module: nn.Module) -> tuple[Hook, str] | None:
    """The hook of an ancestor that offloads a module, and the module's prefix in its map."""
    return cast("tuple[Hook, str] | None", vars(module).get(COVER))


def execution_device(module: nn.Module) -> torch.device | None:
    """Where the hooks run a module, or None if they leave it where it is."""
    hooks = [*hooks_of(module)]
    covering = _covering(module)
    if covering is not None:
        hooks.append(covering[0])
    devices = (hook.execution_device for hook in hooks)
    return next((torch.device(device) for device in devices if device is not None), None)


# --------------------------------------------------------------------------- the weights map


class _Map(Protocol):
    """What is used of an `OffloadedWeightsLoader`; a plain dictionary has none of it."""

    state_dict: dict[str, Tensor]
    index: Mapping[str, Mapping[str, object]]
    all_keys: list[str]


@dataclass(frozen=True, slots=True)
class Slot:
    """One key of a weights map: memory first, then, where the map has an index, files."""

    base: Mapping[str, Tensor]
    key: str

    @property
    def _loader(self) -> _Map | None:
        return cast(_Map, self.base) if hasattr(self.base, "state_dict") else None

    @property
    def _memory(self) -> dict[str, Tensor]:
        loader = self._loader
        return cast("dict[str, Tensor]", self.base) if loader is None else loader.state_dict

    @property
    def filed(self) -> Mapping[str, object] | None:
        """The file entry of this key, if a file holds it."""
        return None if self._loader is None else self._loader.index.get(self.key)

    def held(self) -> Tensor | None:
        """The tensor in memory, if there is one."""
        return self._memory.get(self.key)

    def hold(self, tensor: Tensor) -> None:
        """Answer with this tensor from now on; files are not written."""
        self._memory[self.key] = tensor
        if self._loader is not None and self.key not in self._loader.all_keys:
            self._loader.all_keys.append(self.key)

    def drop(self) -> None:
        """Forget the tensor in memory; a file's answers again."""
        self._memory.pop(self.key, None)
        if self._loader is not None and self.filed is None and self.key in self._loader.all_keys:
            self._loader.all_keys.remove(self.key)

    def from_file(self) -> Tensor:
        """The tensor that the file holds, whatever is in memory."""
        files = copy.copy(self.base)
        cast(_Map, files).state_dict = {}
        return files[self.key]


class _Prefixed(Protocol):
    """What is used of a `PrefixedDataset`: a view of a map that adds a prefix to each key."""

    dataset: Mapping[str, Tensor]
    prefix: str


def _slot(weights_map: Mapping[str, Tensor], key: str) -> Slot:
    while hasattr(weights_map, "prefix"):
        view = cast(_Prefixed, weights_map)
        weights_map, key = view.dataset, f"{view.prefix}{key}"
    return Slot(weights_map, key)


# --------------------------------------------------------------------------- the storage row


@dataclass(frozen=True, slots=True)
class Offloaded:
    """What a weights map held under a key; `value` is None where a file holds it."""

    slot: Slot
    value: Tensor | None

    def tensor(self) -> Tensor:
        """The tensor, loaded from its file if need be."""
        return self.slot.from_file() if self.value is None else self.value


def _offloading(module: nn.Module) -> tuple[Hook, str] | None:
    """The hook that keeps this module's weights elsewhere, and the module's prefix in its map."""
    own = next((hook for hook in hooks_of(module) if hook.offload), None)
    return _covering(module) if own is None else (own, "")


def _slot_of(module: nn.Module, name: str) -> Slot:
    found = _offloading(module)
    assert found is not None
    hook, prefix = found
    return _slot(hook.weights_map, f"{prefix}{name}")


def _applies(module: nn.Module, name: str) -> bool:
    # At rest only: during a call the data is on the module, and it is an ordinary one.
    weight = parameters_of(module).get(name)
    if type(weight) is not nn.Parameter or not weight.is_meta or _offloading(module) is None:
        return False
    slot = _slot_of(module, name)
    return slot.held() is not None or slot.filed is not None


def _fetch(module: nn.Module, name: str) -> Tensor | None:
    parameter = parameters_of(module).get(name)
    if parameter is None:
        return None
    slot = _slot_of(module, name)
    # The hook casts to the parameter's dtype on loading; what it would load is the weight.
    return slot.base[slot.key].detach().to(parameter.dtype)


def _keep(module: nn.Module, name: str) -> Kept:
    parameter = parameters_of(module).get(name)
    if parameter is None:
        return Kept(None)
    slot = _slot_of(module, name)
    return Kept(parameter, Offloaded(slot, slot.held()))


def _install(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    flag = requires_grad(module, name)
    if tensor is None:
        _forget(module, name)
        register(module, name, None, flag)
        return
    _hold(module, name, tensor.detach().to("cpu"))
    register(module, name, tensor.detach().to("meta"), flag)


def _hold(module: nn.Module, name: str, tensor: Tensor) -> None:
    found = _offloading(module)
    assert found is not None
    hook, prefix = found
    _slot(hook.weights_map, f"{prefix}{name}").hold(tensor)
    # Removing the hook brings back what is listed here; a new bias goes where its weight goes.
    beside = (f"{prefix}{other}" for other in parameters_of(module))
    home = next((hook.original_devices[n] for n in beside if n in hook.original_devices), None)
    if home is not None:
        hook.original_devices.setdefault(f"{prefix}{name}", home)


def _forget(module: nn.Module, name: str) -> None:
    found = _offloading(module)
    assert found is not None
    hook, prefix = found
    _slot(hook.weights_map, f"{prefix}{name}").drop()
    hook.original_devices.pop(f"{prefix}{name}", None)


def _put_back(module: nn.Module, name: str, kept: Kept) -> None:
    if kept.parameter is None:
        _install(module, name, None)
        return
    slot, home = _slot_of(module, name), kept.elsewhere
    if isinstance(home, Offloaded) and home.slot.base is slot.base:
        slot.drop() if home.value is None else slot.hold(home.value)
        module.register_parameter(name, kept.parameter)
        return
    value = kept.tensor()
    assert value is not None
    _hold(module, name, value.to("cpu"))
    register(module, name, value.to("meta"), kept.parameter.requires_grad)


def _identity(module: nn.Module, name: str) -> Hashable:
    if parameters_of(module).get(name) is None:
        return id(module), name
    slot = _slot_of(module, name)
    held = slot.held()
    if held is not None:
        return address(held)
    filed = slot.filed or {}
    if "safetensors_file" in filed:
        return filed["safetensors_file"], filed.get("weight_name", slot.key)
    return id(module), name


STORAGE = Storage(
    name="offloaded",
    applies=_applies,
    fetch=_fetch,
    keep=_keep,
    install=_install,
    put_back=_put_back,
    identity=_identity,
)


# --------------------------------------------------------------------------------- adapters

_METHODS = ("pre_forward", "post_forward", "detach_hook")


def adopt(model: nn.Module) -> None:
    """Keep adapters out of the hooks that place whole submodules, on every module below `model`.

    Such a hook would look for adapters in its weights map, and take them away between calls. It
    no longer sees them; adapters that it has taken already come back as new parameters, since
    the old objects are gone. The modules below it are told where their weights are.
    """
    for module in model.modules():
        vars(module).pop(COVER, None)
    for owner in model.modules():
        for hook in hooks_of(owner):
            if hook.offload and hook.place_submodules:
                _spare(owner, hook)
                _cover(owner, hook)


def release(model: nn.Module) -> None:
    """Give hooks below which no adapter is left their own methods back."""
    for owner in model.modules():
        if any(_sites(owner)):
            continue
        vars(owner).pop(COVER, None)
        for hook in hooks_of(owner):
            for name in _METHODS:
                vars(hook).pop(name, None)


def _sites(owner: nn.Module) -> Iterator[tuple[str, nn.Module, Holder]]:
    """The adapted modules at and below `owner`: path from it, the site, its holder."""
    for path, module in modules_of(owner):
        holder = children_of(module).get(ADAPTERS)
        if isinstance(holder, Holder):
            yield path, module, holder


def _spare(owner: nn.Module, hook: Hook) -> None:
    for path, _, holder in _sites(owner):
        _bring_back(hook, f"{path}.{ADAPTERS}." if path else f"{ADAPTERS}.", holder)
    for name in _METHODS:
        if name not in vars(hook):
            method = cast("Callable[..., object]", getattr(hook, name))
            vars(hook)[name] = partial(_without_adapters, method)


def _cover(owner: nn.Module, hook: Hook) -> None:
    for path, module in modules_of(owner):
        if path and not isinstance(module, Holder):
            vars(module)[COVER] = hook, f"{path}."


def _bring_back(hook: Hook, prefix: str, holder: Holder) -> None:
    """Give a holder the data that a hook took from it, and strike it from the hook's books."""
    for path, child in modules_of(holder):
        for name, parameter in list(parameters_of(child).items()):
            key = f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
            if hook.original_devices.pop(key, None) is None or parameter is None:
                continue
            hook.tied_params_names.discard(key)
            slot = _slot(hook.weights_map, key)
            value = slot.base[slot.key].to(hook.execution_device)
            slot.drop()
            register(child, name, value, parameter.requires_grad)


def _without_adapters(
    method: Callable[..., object], module: nn.Module, *args: object, **kwargs: object
) -> object:
    """Call a hook's method while the adapters are out of the module tree.

    Each entry stays in its place as None, so that the order of children does not change.
    """
    owners = [site for _, site, _ in _sites(module)]
    holders = [children_of(site)[ADAPTERS] for site in owners]
    for site in owners:
        children_of(site)[ADAPTERS] = None
    try:
        return method(module, *args, **kwargs)
    finally:
        for site, holder in zip(owners, holders, strict=True):
            children_of(site)[ADAPTERS] = holder
