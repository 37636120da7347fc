"""How weights lie in memory: the one place that reads and writes them.

A storage is a row; the first that applies to a module serves it. A new value is always a new
tensor: what a module held is never written into, so that it can be given back as the same object.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from surgery.model.holder import parameters_of
from surgery.model.hooked import integration_of
from surgery.model.layers import LayerKind
from surgery.model.stored import Kept, Storage

ParameterName = Literal["weight", "bias"]


# ------------------------------------------------------------------------- plain parameters


def register(module: nn.Module, name: str, tensor: Tensor | None, flag: bool) -> None:
    """Hold a new parameter under a name that the module has; `flag` is its `requires_grad`."""
    parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=flag)
    module.register_parameter(name, parameter)


def requires_grad(module: nn.Module, name: str) -> bool:
    """The flag of a parameter, or of the weight where the parameter is absent."""
    own = parameters_of(module)
    parameter = own.get(name)
    parameter = own.get("weight") if parameter is None else parameter
    return parameter is not None and parameter.requires_grad


def _is_plain(module: nn.Module) -> bool:
    weight = parameters_of(module).get("weight")
    return type(weight) is nn.Parameter


def _is_meta(module: nn.Module) -> bool:
    weight = parameters_of(module).get("weight")
    return type(weight) is nn.Parameter and weight.is_meta


def _fetch_plain(module: nn.Module, name: str) -> Tensor | None:
    parameter = parameters_of(module).get(name)
    return None if parameter is None else parameter.detach()


def _fetch_nothing(module: nn.Module, name: str) -> None:
    del module, name


def _keep_plain(module: nn.Module, name: str) -> Kept:
    return Kept(parameters_of(module).get(name))


def _install_plain(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    if tensor is not None:
        tensor = _laid_out_like(tensor.detach(), parameters_of(module).get(name))
    register(module, name, tensor, requires_grad(module, name))


def _laid_out_like(tensor: Tensor, old: Tensor | None) -> Tensor:
    """The tensor in the memory order of the one it replaces, so that the same kernels run."""
    if old is None or old.is_meta:
        return tensor.contiguous()
    if old.shape != tensor.shape or old.stride() == tensor.stride():
        return tensor.to(old.device)
    return torch.empty_like(old, dtype=tensor.dtype).copy_(tensor)


def _put_back_plain(module: nn.Module, name: str, kept: Kept) -> None:
    now = parameters_of(module).get(name)
    if kept.parameter is None or kept.elsewhere is None:
        _follow(kept.parameter, now if now is not None else parameters_of(module).get("weight"))
        module.register_parameter(name, kept.parameter)
        return
    value = kept.elsewhere.tensor()
    device = value.device if now is None else now.device
    register(module, name, value.to(device), kept.parameter.requires_grad)


def _follow(parameter: nn.Parameter | None, now: nn.Parameter | None) -> None:
    """Move a kept object to where the module was moved meanwhile; it stays the same object."""
    if parameter is None or now is None or now.is_meta or parameter.is_meta:
        return
    if parameter.device != now.device or parameter.dtype != now.dtype:
        parameter.data = parameter.data.to(now.device, now.dtype)


def _identity_plain(module: nn.Module, name: str) -> Hashable:
    parameter = parameters_of(module)[name]
    if type(parameter) is not nn.Parameter or parameter.is_meta or parameter.numel() == 0:
        return id(parameter)
    return address(parameter)


def address(tensor: Tensor) -> Hashable:
    """Where a tensor's data begins; equal for two tensors over the same data."""
    return tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset()


PLAIN = Storage(
    name="plain",
    applies=_is_plain,
    fetch=_fetch_plain,
    keep=_keep_plain,
    install=_install_plain,
    put_back=_put_back_plain,
    identity=_identity_plain,
)

META = Storage(
    name="meta",
    applies=_is_meta,
    fetch=_fetch_nothing,
    keep=_keep_plain,
    install=_install_plain,
    put_back=_put_back_plain,
    identity=_identity_plain,
)


# ----------------------------------------------------------------------------- the interface


def _rows(module: nn.Module) -> Iterator[Storage]:
    integration = integration_of(module)
    if integration is not None:
        yield integration.STORAGE
    yield META
    yield PLAIN


def storage_of(module: nn.Module) -> Storage | None:
    """The row that knows how this module's weight lies, or None."""
    return next((row for row in _rows(module) if row.applies(module)), None)


def unreadable(module: nn.Module) -> str:
    """Why the weight can be neither read nor replaced, or ""; looks at no data."""
    weight = parameters_of(module).get("weight")
    if weight is None:
        return "its weight is no parameter of its own; a parametrization computes it"
    if is_lazy(weight):
        return "its weight has no shape before the first call"
    if weight.dtype.itemsize < 2 or not (weight.is_floating_point() or weight.is_complex()):
        return f"its weight is stored as {weight.dtype}, and what it stands for is not known"
    if storage_of(module) is None:
        return f"its weight is a {type(weight).__name__}, which no storage row reads"
    return ""


def _storage(module: nn.Module) -> Storage:
    row = storage_of(module)
    assert row is not None, unreadable(module)  # a site is never made of an unreadable module
    return row


def read(module: nn.Module, kind: LayerKind) -> Tensor | None:
    """A site's weight as a matrix [out, in] in its stored dtype, or None: *not yet*, on meta.

    It may be a view of the live weight; it is not to be written into.
    """
    stored = _storage(module).fetch(module, "weight")
    return None if stored is None else kind.to_matrix(stored)


def read_bias(module: nn.Module) -> Tensor | None:
    """A site's bias [out] in its stored dtype; None if it has none, or not yet (`read` tells)."""
    return _storage(module).fetch(module, "bias")


def takes_bias(module: nn.Module) -> bool:
    """Whether the module's forward would add a bias, present or not."""
    return "bias" in parameters_of(module)


def write(module: nn.Module, kind: LayerKind, matrix: Tensor) -> None:
    """Replace a site's weight by a matrix [out, in]; the old tensor stays as it is."""
    weight = parameters_of(module)["weight"]
    assert weight is not None
    replace(module, "weight", kind.from_matrix(matrix, tuple(weight.shape)))


def write_parameter(module: nn.Module, name: ParameterName, tensor: Tensor | None) -> None:
    """Replace a parameter in its stored layout; None takes a bias away."""
    replace(module, name, tensor)


def detach_parameter(module: nn.Module, name: ParameterName) -> Kept:
    """What the module holds under a name, for `put_back`; the module is not changed."""
    return _storage(module).keep(module, name)


def replace(module: nn.Module, name: ParameterName, tensor: Tensor | None) -> None:
    """Hold a new parameter over `tensor` [stored layout], with the old one's dtype, flag and order.

    An offloaded module goes on holding a meta parameter, and its next call uses the new tensor.
    A bias may come where there was none, if `takes_bias`, and go again by `put_back`.
    """
    assert name == "weight" or takes_bias(module), "this layer never adds a bias"
    # Another dtype would make `put_back` believe that the module was cast, and cast what was kept.
    old = parameters_of(module).get(name)
    assert tensor is None or old is None or tensor.dtype == old.dtype, (tensor.dtype, old)
    _storage(module).install(module, name, tensor)


def put_back(module: nn.Module, name: ParameterName, kept: Kept) -> None:
    """Hold again what `detach_parameter` gave: the same object, in the same place.

    If the module was moved or cast meanwhile, the object follows; if it was offloaded, or hooks
    were removed, the kept value goes to where the module now keeps its weights.
    """
    _storage(module).put_back(module, name, kept)


def identity(module: nn.Module, name: str) -> Hashable:
    """A key that is equal for two parameters that share their data."""
    return (storage_of(module) or PLAIN).identity(module, name)
