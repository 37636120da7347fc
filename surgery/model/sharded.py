"""Parameters of which each process has a part: how they are read whole, and written.

`fully_shard` makes a DTensor of each parameter of the modules that it manages, and lets them have
whole tensors while they run. What is needed of either is taken by its attributes, so nothing of
`torch.distributed` is imported. To read a whole parameter is a collective: every process of its
mesh must do so, in the same order.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, NoReturn, Protocol, cast

import torch
from torch import Tensor, nn

from surgery.errors import refuse
from surgery.model.holder import every_module, modules_of, parameters_of
from surgery.model.stacked import own_class
from surgery.model.stored import Kept, Storage

MANAGED = "_is_fsdp_managed_module"
"""What `fully_shard` leaves on each module whose parameters it manages, for Dynamo to see."""


class Mesh(Protocol):
    """What is used of a `DeviceMesh`: the processes that a parameter is spread over."""

    ndim: int

    def get_group(self, mesh_dim: int) -> Any:
        """The process group along a dimension."""
        ...

    def get_coordinate(self) -> list[int] | None:
        """Where this process is; None outside."""
        ...


def is_managed(module: nn.Module) -> bool:
    """Whether the parameters that a module owns are managed by something that shards them."""
    return MANAGED in vars(module)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has no more than a part of a tensor, and knows of the others."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, without gradient; a collective where it is sharded."""
    tensor = tensor.detach()
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def fill(parameter: Tensor, value: Tensor) -> None:
    """Write a whole value into a parameter; of a sharded one, this process's part.

    Every process must have the same value; nothing is sent. The parameter stays the same object.
    """
    with torch.no_grad():
        if not is_sharded(parameter):
            parameter.copy_(value)
            return
        from torch.distributed.tensor import distribute_tensor

        spread: Any = parameter
        value = value.to(spread.device, parameter.dtype)
        places = {"placements": spread.placements, "src_data_rank": None}
        parameter.copy_(distribute_tensor(value, spread.device_mesh, **places))


def put_apart(model: nn.Module) -> None:
    """Let every parameter be sharded that its module has whole since it ran last."""
    for module in every_module(model):
        if own_class(type(module)) is not type(module):
            cast(Any, module).reshard()


def mesh_of(model: nn.Module) -> Mesh | None:
    """The processes that a model is spread over, by the first of its sharded parameters."""
    return next((cast(Any, p).device_mesh for p in _every(model) if is_sharded(p)), None)


def _every(model: nn.Module) -> Iterator[nn.Parameter]:
    for _, module in modules_of(model):
        yield from (p for p in parameters_of(module).values() if p is not None)


# --------------------------------------------------------------------------- the storage row


def _applies(module: nn.Module, name: str) -> bool:
    parameter = parameters_of(module).get(name)
    return parameter is not None and is_sharded(parameter)


def _fetch(module: nn.Module, name: str) -> Tensor | None:
    parameter = parameters_of(module).get(name)
    return None if parameter is None else whole(parameter)


def _keep(module: nn.Module, name: str) -> Kept:
    return Kept(parameters_of(module).get(name))


def _install(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    del module, tensor
    _refuse(name)


def _put_back(module: nn.Module, name: str, kept: Kept) -> None:
    del module, kept
    _refuse(name)


def _refuse(name: str) -> NoReturn:
    message = f"`{name}` is sharded, and what shards it would go on with the one that it knows"
    refuse("E461", message, hint="change weights before fully_shard, or in one process")


def _identity(module: nn.Module, name: str) -> Hashable:
    return id(parameters_of(module).get(name))


STORAGE = Storage(
    name="sharded",
    applies=_applies,
    fetch=_fetch,
    keep=_keep,
    install=_install,
    put_back=_put_back,
    identity=_identity,
)


def adopt(model: nn.Module) -> None:
    """Nothing: what is managed was there when it was sharded, and nothing is added later."""
    del model


def release(model: nn.Module) -> None:
    """Nothing."""
    del model


def execution_device(module: nn.Module) -> torch.device | None:
    """None: where its parameters are."""
    del module
