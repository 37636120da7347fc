"""How weights lie in memory: the one place that reads and writes them.

A storage is a row; the first that applies to a module serves it. A new value is always a new
tensor: what a module held is never written into, so that it can be given back as the same object.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from surgery.model.holder import parameters_of
from surgery.model.hooked import integration_of, packing_of
from surgery.model.layers import LayerKind
from surgery.model.parts import ENTRIES, ROWS, WHOLE, ParameterSlice
from surgery.model.sharded import is_sharded
from surgery.model.stored import Kept, Storage

Which = Literal["weight", "bias"]
"""Of the two parameters that a site is made of."""


# ------------------------------------------------------------------------- plain parameters


def register(module: nn.Module, name: str, tensor: Tensor | None, flag: bool) -> None:
    """Hold a new parameter under a name that the module has; `flag` is its `requires_grad`."""
    parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=flag)
    module.register_parameter(name, parameter)


def follow_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Let a layer's bias be in the dtype that its weight came to have."""
    bias = parameters_of(module).get("bias")
    if bias is not None and bias.dtype != dtype:
        register(module, "bias", bias.detach().to(dtype), bias.requires_grad)


def requires_grad(module: nn.Module, name: str) -> bool:
    """The flag of a parameter, or where it is absent of one that the module has."""
    parameter = parameters_of(module).get(name)
    parameter = _some_parameter(module) if parameter is None else parameter
    return parameter is not None and parameter.requires_grad


def _some_parameter(module: nn.Module) -> nn.Parameter | None:
    return next((p for p in parameters_of(module).values() if p is not None), None)


def _is_plain(module: nn.Module, name: str) -> bool:
    return type(parameters_of(module).get(name)) is nn.Parameter


def _is_meta(module: nn.Module, name: str) -> bool:
    parameter = parameters_of(module).get(name)
    return type(parameter) is nn.Parameter and parameter.is_meta


def _fetch_plain(module: nn.Module, name: str) -> Tensor | None:
    parameter = parameters_of(module).get(name)
    return None if parameter is None else parameter.detach()


def _fetch_nothing(module: nn.Module, name: str) -> None:
    del module, name


def _keep_plain(module: nn.Module, name: str) -> Kept:
    return Kept(parameters_of(module).get(name))


def _install_plain(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    if tensor is not None:
        tensor = laid_out_like(tensor.detach(), parameters_of(module).get(name))
    register(module, name, tensor, requires_grad(module, name))


def laid_out_like(tensor: Tensor, old: Tensor | None) -> Tensor:
    """The tensor in the memory order of the one it replaces, so that the same kernels run."""
    if old is None or old.is_meta:
        return tensor.contiguous()
    if old.shape != tensor.shape or old.stride() == tensor.stride():
        return tensor.to(old.device)
    return torch.empty_like(old, dtype=tensor.dtype).copy_(tensor)


def _put_back_plain(module: nn.Module, name: str, kept: Kept) -> None:
    now = parameters_of(module).get(name)
    if kept.parameter is None or kept.elsewhere is None:
        _follow(kept.parameter, now if now is not None else _some_parameter(module))
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
    inner = inner_tensors(tensor)
    if inner:
        return tuple(map(address, inner))
    return tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset()


def inner_tensors(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors that one of a class of its own keeps its data in; none where it has its own.

    None of a sharded one either, whose data is not all here.
    """
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or is_sharded(tensor):
        return ()
    return tuple(getattr(tensor, name) for name in flatten()[0])


def bytes_of(tensor: Tensor) -> int:
    """What a parameter takes in memory, without what lies beside it."""
    return sum(t.numel() * t.element_size() for t in inner_tensors(tensor) or (tensor,))


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
    packing = packing_of(module)
    if packing is not None:
        yield packing
    yield META
    yield PLAIN


def storage_of(module: nn.Module, name: str = "weight") -> Storage | None:
    """The row that knows how a parameter of this module lies, or None."""
    return next((row for row in _rows(module) if row.applies(module, name)), None)


def unreadable(module: nn.Module, name: str = "weight") -> str:
    """Why a parameter can be neither read nor replaced, or ""; looks at no data."""
    weight = parameters_of(module).get(name)
    if weight is None:
        return "its weight is no parameter of its own; a parametrization computes it"
    if is_lazy(weight):
        return "its weight has no shape before the first call"
    if packing_of(module, name) is not None:
        return ""
    if weight.dtype.itemsize < 2 or not (weight.is_floating_point() or weight.is_complex()):
        return f"its weight is stored as {weight.dtype}, and what it stands for is not known"
    if storage_of(module, name) is None:
        return f"its weight is a {type(weight).__name__}, which no storage row reads"
    return ""


def seen(module: nn.Module, name: str) -> Tensor | None:
    """A parameter, for its shape and dtype: where it is packed, one on meta that it stands for."""
    row = packing_of(module, name)
    if row is None or row.packing is None:
        return parameters_of(module).get(name)
    return torch.empty(row.packing.size(module), dtype=row.packing.dtype, device="meta")


def counted(modules: Iterable[nn.Module]) -> tuple[int, int]:
    """The elements of all parameters that modules own, of which packed ones have more, and bytes.

    Tied ones count once, lazy ones not.
    """
    found: dict[int, tuple[int, int]] = {}
    for module in modules:
        for name, p in parameters_of(module).items():
            if p is not None and not is_lazy(p) and id(p) not in found:
                what = seen(module, name)
                assert what is not None
                found[id(p)] = what.numel(), bytes_of(p)
    return sum(n for n, _ in found.values()), sum(b for _, b in found.values())


def _storage(module: nn.Module, at: ParameterSlice) -> Storage:
    row = storage_of(module, at.parameter)
    assert row is not None, unreadable(module, at.parameter)  # no site is made of such a parameter
    return row


def name_of(at: ParameterSlice, which: Which) -> str:
    """What a site's weight or bias is called on its module."""
    return at.parameter if which == "weight" else at.bias


def matrix_of(kind: LayerKind, at: ParameterSlice, stored: Tensor) -> Tensor:
    """What a site is of a parameter in its stored layout: [out, in], or a batch of such."""
    return at.rows(kind.to_matrix(at.one(stored)), ROWS)


def bias_of(at: ParameterSlice, stored: Tensor) -> Tensor:
    """What a site's bias is of a parameter: [out], or a batch of such."""
    return at.rows(at.one(stored), ENTRIES)


def read(module: nn.Module, kind: LayerKind, at: ParameterSlice = WHOLE) -> Tensor | None:
    """A site's weight as a matrix in its stored dtype, or None: *not yet*, on meta.

    [out, in], or [batch, out, in]. It may be a view of the live weight; it is not to be written
    into.
    """
    stored = _storage(module, at).fetch(module, at.parameter)
    return None if stored is None else matrix_of(kind, at, stored)


def read_bias(module: nn.Module, at: ParameterSlice = WHOLE) -> Tensor | None:
    """A site's bias in its stored dtype; None if it has none, or not yet (`read` tells).

    [out], or [batch, out].
    """
    stored = _storage(module, at).fetch(module, at.bias)
    return None if stored is None else bias_of(at, stored)


def takes_bias(module: nn.Module, at: ParameterSlice = WHOLE) -> bool:
    """Whether the module's forward would add a bias, present or not."""
    return at.bias in parameters_of(module)


def write(module: nn.Module, kind: LayerKind, at: ParameterSlice, matrix: Tensor) -> None:
    """Replace a site's weight by a matrix like `read` gives; the old tensor stays as it is.

    What the parameter holds besides stays as it was.
    """
    old = seen(module, at.parameter)
    assert old is not None
    whole = old if at.whole else _stored(module, at)  # of a whole one the shape is all that counts
    replace(module, at, "weight", with_matrix(whole, kind, at, matrix))


def with_matrix(whole: Tensor, kind: LayerKind, at: ParameterSlice, matrix: Tensor) -> Tensor:
    """A parameter in its stored layout with another matrix where a site is in it; a new tensor."""
    if at.part is not None:
        rows, matrix = matrix, _copied(kind.to_matrix(at.one(whole)))
        at.part.write(matrix, rows, ROWS)
    stored = kind.from_matrix(matrix, tuple(at.one(whole).shape))
    if at.index is None and not at.picked:
        return stored
    made = whole.detach().clone()
    at.put(made, stored)
    return made


def stored(module: nn.Module, at: ParameterSlice) -> Tensor | None:
    """The whole parameter that a site is part of, as it lies; None: *not yet*, on meta."""
    return _storage(module, at).fetch(module, at.parameter)


def _stored(module: nn.Module, at: ParameterSlice) -> Tensor:
    whole = stored(module, at)
    assert whole is not None  # on meta nothing is written
    return whole


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def write_bias(module: nn.Module, kind: LayerKind, at: ParameterSlice, bias: Tensor) -> None:
    """Replace a site's bias by one like `read_bias` gives; what there was none of is zero."""
    if at.part is not None or at.index is not None:
        whole = _storage(module, at).fetch(module, at.bias)
        if whole is None:
            whole = bias.new_zeros(kind.to_matrix(_stored(module, at)).shape[:-1])
        made = _copied(whole)
        if at.part is None:
            at.one(made).copy_(bias)
        else:
            at.part.write(at.one(made), bias, ENTRIES)
        bias = made
    replace(module, at, "bias", bias)


def detach_parameter(module: nn.Module, at: ParameterSlice, which: Which) -> Kept:
    """What the module holds of a site, for `put_back`; the module is not changed."""
    return _storage(module, at).keep(module, name_of(at, which))


def replace(module: nn.Module, at: ParameterSlice, which: Which, tensor: Tensor) -> None:
    """Hold a new parameter over `tensor` [stored layout], with the old one's dtype, flag and order.

    An offloaded module goes on holding a meta parameter, and its next call uses the new tensor.
    A bias may come where there was none, if `takes_bias`, and go again by `put_back`.
    """
    name = name_of(at, which)
    assert which == "weight" or takes_bias(module, at), "this layer never adds a bias"
    # Another dtype would make `put_back` believe that the module was cast, and cast what was kept.
    old = seen(module, name)
    assert old is None or tensor.dtype == old.dtype, (tensor.dtype, old)
    _storage(module, at).install(module, name, tensor)


def put_back(module: nn.Module, at: ParameterSlice, which: Which, kept: Kept) -> None:
    """Hold again what `detach_parameter` gave: the same object, in the same place.

    If the module was moved or cast meanwhile, the object follows; if it was offloaded, or hooks
    were removed, the kept value goes to where the module now keeps its weights.
    """
    row = _storage(module, at) if kept.by is None else kept.by
    row.put_back(module, name_of(at, which), kept)


def identity(module: nn.Module, name: str) -> Hashable:
    """A key that is equal for two parameters that share their data."""
    return (storage_of(module, name) or PLAIN).identity(module, name)
