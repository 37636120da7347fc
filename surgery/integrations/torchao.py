"""Weights that torchao keeps as codes of 8 bits: what they stand for, and back.

Read from torchao 0.18, `quantization/quantize_/workflows/int8/int8_tensor.py`. The layer is a plain
one, and its weight a tensor of a class of its own, whose `qdata` [out, in] are the codes and whose
`scale` is one a row, one a group of a row, or one. It is told by the class of the weight.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery.model.holder import parameters_of
from surgery.model.hooked import imported
from surgery.model.layers import packed_weight
from surgery.model.storage import PLAIN, address, follow_dtype, register, requires_grad
from surgery.model.stored import Kept, Packing, Storage


def _own(module: nn.Module) -> Any:
    """The weight, as what it is."""
    return parameters_of(module)["weight"]


def codes(matrix: Tensor, like: Any) -> Tensor:
    """A matrix [out, in] in codes, in blocks as those of another weight."""
    library: Any = imported("torchao.quantization")
    whole_rows = like.block_size[-1] == like.shape[-1]
    blocks = library.PerGroup(like.block_size[-1])
    if whole_rows:
        blocks = library.PerRow() if like.block_size[0] == 1 else library.PerTensor()
    cls = cast(Any, type(like))
    made = cls.from_hp(matrix.float(), blocks, reduce_range=like.reduce_range)
    return cls(
        made.qdata,
        made.scale,
        made.block_size,
        like.dtype,
        zero_point=made.zero_point,
        reduce_range=like.reduce_range,
    )


# --------------------------------------------------------------------------- the storage row


class _Codes:
    """What a weight stands for, for who keeps it."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight

    def tensor(self) -> Tensor:
        """The weight [out, in] in float32."""
        return _dense(self.weight)


def _dense(weight: Any) -> Tensor:
    return weight.detach().dequantize(torch.float32)


def _applies(module: nn.Module, name: str) -> bool:
    return name == "weight" and packed_weight(module) is not None


def _fetch(module: nn.Module, name: str) -> Tensor | None:
    own = parameters_of(module).get(name)
    if name != "weight" or own is None:
        return PLAIN.fetch(module, name)
    return None if own.is_meta else _dense(own)


def _keep(module: nn.Module, name: str) -> Kept:
    parameter = parameters_of(module).get(name)
    if name != "weight" or parameter is None:
        return PLAIN.keep(module, name)
    return Kept(parameter, _Codes(parameter), by=STORAGE)


def _install(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Hold another weight, in codes as the one before."""
    if name != "weight" or tensor is None:
        PLAIN.install(module, name, tensor)
        return
    old = _own(module)
    register(module, name, codes(tensor.detach().to(old.device), old), old.requires_grad)


def _put_back(module: nn.Module, name: str, kept: Kept) -> None:
    # Not in another dtype: a cast of the model leaves codes and scales as they are.
    now, parameter = parameters_of(module).get(name), kept.parameter
    if now is not None and parameter is not None and now.device != parameter.device:
        register(module, name, parameter.detach().to(now.device), parameter.requires_grad)
        return
    module.register_parameter(name, parameter)


def _identity(module: nn.Module, name: str) -> Hashable:
    own = parameters_of(module)[name]
    return id(own) if own is None or own.is_meta else address(own)


# ------------------------------------------------------------------------------ what it is for


def _name(module: nn.Module) -> str:
    del module
    return "int8"


def _weight(module: nn.Module) -> Tensor:
    return _dense(_own(module))


def _size(module: nn.Module) -> tuple[int, int]:
    layer = cast(nn.Linear, module)
    return layer.out_features, layer.in_features


def _computes(module: nn.Module) -> None:
    del module


def _unpack(module: nn.Module, matrix: Tensor) -> None:
    register(module, "weight", matrix.detach(), requires_grad(module, "weight"))
    follow_dtype(module, matrix.dtype)


STORAGE = Storage(
    name="torchao",
    applies=_applies,
    fetch=_fetch,
    keep=_keep,
    install=_install,
    put_back=_put_back,
    identity=_identity,
    packing=Packing(torch.float32, _name, _weight, _size, _computes, _unpack),
)
