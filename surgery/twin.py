"""A twin of a model: other modules over the same data, to be adapted in the model's stead.

A flag such as `requires_grad` lies on the parameter object and not on its data. So a twin has
parameters of its own, each over the storage of the original's; ties stay ties. What adapters the
model has already are copied whole: training a twin writes no tensor of the original.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from surgery.errors import refuse
from surgery.model.holder import Holder, every_module, modules_of, parameters_of
from surgery.model.storage import address


def twin(model: nn.Module) -> nn.Module:
    """The same model again: other modules, the same data in every parameter and buffer.

    Whatever else the modules hold is copied as `copy.deepcopy` does it. Gradients are not taken
    over. Raises StateError (E415) for a model that cannot be copied so.
    """
    memo: dict[int, object] = {id(tensor): other for tensor, other in _shared(model)}
    try:
        made = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AssertionError) as error:
        refuse("E415", f"the model has no twin, since it cannot be copied: {error}", hint=_IN_PLACE)
    _check(model, made)
    return made


_IN_PLACE = "compile with inplace=True, or make the second model yourself"


def _shared(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor that lies on a module, with the one that the twin is to have for it."""
    seen: set[int] = set()
    for module in every_module(model):
        for tensor in _tensors(module):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor, alike(tensor)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of a module, and the tensors in plain attributes of it."""
    yield from (p for p in parameters_of(module).values() if p is not None and not is_lazy(p))
    buffers = cast("dict[str, Tensor | None]", vars(module)["_buffers"])
    for value in (*buffers.values(), *vars(module).values()):
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value) and not isinstance(value, type):
            state: dict[str, object] = getattr(value, "__dict__", {})
            yield from (one for one in state.values() if isinstance(one, Tensor))


def alike(tensor: Tensor) -> Tensor:
    """Another parameter over the same data; a tensor that is none is the twin's as it is."""
    if not isinstance(tensor, nn.Parameter):
        return tensor
    made = tensor.detach()
    if type(made) is Tensor and type(tensor) is not nn.Parameter:  # a subclass of parameters
        made = made.as_subclass(type(tensor)).requires_grad_(tensor.requires_grad)
    else:
        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
    own = vars(tensor)
    # What says how a weight is packed may be changed in place, with the parameter that it is of.
    vars(made).update({n: v if _is_shared(v) else copy.copy(v) for n, v in own.items()})
    return made


def _is_shared(value: object) -> bool:
    """Whether twins have it in common."""
    return isinstance(value, Tensor | nn.Module)


def _check(model: nn.Module, made: nn.Module) -> None:
    """A module that copies itself in its own way may not have kept to what was agreed."""
    for (path, module), (_, other) in zip(modules_of(model), modules_of(made), strict=True):
        if isinstance(module, Holder):
            continue
        for name, parameter in parameters_of(module).items():
            if parameter is not None and not _same_data(parameter, parameters_of(other)[name]):
                full = f"{path}.{name}" if path else name
                message = f"the model has no twin: a copy of it has other data in `{full}`"
                refuse("E415", message, hint=_IN_PLACE)


def _same_data(one: nn.Parameter, other: nn.Parameter | None) -> bool:
    if is_lazy(one) or one.is_meta or one.numel() == 0:
        return True
    return other is not None and one is not other and address(one) == address(other)
