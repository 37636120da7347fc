"""Layers whose weights bitsandbytes has packed into 4 or 8 bits: what they stand for, and back.

Read from bitsandbytes 0.50, `nn/modules.py`, `functional.py` and `autograd/_functions.py`.
`Linear4bit` keeps codes of two weights a byte, [n, 1], and their scales in `weight.quant_state`;
`Linear8bitLt` keeps codes [out, in] and a scale a row, which its first call moves from the weight
to `module.state`. Sizes are the module's own, since those of the codes say nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol, cast

import bitsandbytes
import torch
from bitsandbytes import functional
from torch import Tensor, nn

from surgery.model.holder import parameters_of
from surgery.model.hooked import swap_class
from surgery.model.layers import base_class
from surgery.model.storage import address, follow_dtype, register, requires_grad
from surgery.model.stored import Kept, Packing, Storage

_bits: Any = bitsandbytes
_F: Any = functional
_operators: Any = torch.ops
_dequantize_4bit = _operators.bitsandbytes.dequantize_4bit.default

LEVELS = 127
"""The largest code of 8 bits."""


class _Format(Protocol):
    """What differs between weights of 4 and of 8 bits."""

    def name(self, module: Any) -> str:
        """What `where` calls it."""
        ...

    def weight(self, module: Any) -> Tensor:
        """What the weight stands for [out, in], in float32, as the layer's own forward has it."""
        ...

    def packed(self, module: Any, matrix: Tensor) -> nn.Parameter:
        """Another weight of the same format, made of a matrix [out, in]."""
        ...

    def states(self, module: Any) -> Mapping[str, object]:
        """What belongs to the weight and does not lie on it."""
        ...

    def hold(self, module: Any, weight: nn.Parameter, states: Mapping[str, object]) -> None:
        """Let the module have a weight, with what belongs to it."""
        ...


# ------------------------------------------------------------------------------------ 4 bits


def unpacked_for_processor(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """The codes and scales of 4 bits as they are kept in files.

    Where a processor multiplies bfloat16 by itself, a call in evaluation mode lays them out
    otherwise, and rounds the scales to bfloat16 for good.
    """
    if not getattr(state, "packing_format_for_cpu", False):
        return data, state
    state = copy(state)
    scales = state.absmax.T.reshape(-1).float()
    # Scales that were codes themselves would be made codes again, and rounded once more.
    state.original_nested = False
    data, state = _F._convert_weight_packed_for_cpu_inverse(data, state)
    state.absmax, state.nested = scales, False
    return data, state


def dense4(data: Tensor, state: Any) -> Tensor:
    """What codes of 4 bits stand for, in float32. state: a `QuantState`."""
    data, state = unpacked_for_processor(data, state)
    scales = state.absmax
    if state.nested:
        scales = _F.dequantize_blockwise(scales, state.state2) + state.offset
    kind, shape = state.quant_type, state.shape
    return _dequantize_4bit(data, scales.float(), state.blocksize, kind, shape, torch.float32)


def codes4(matrix: Tensor, like: Any, storage: torch.dtype = torch.uint8) -> tuple[Tensor, Any]:
    """The codes and the `QuantState` of a matrix, made as another state was."""
    codes, state = _F.quantize_4bit(
        matrix.float().contiguous(),
        blocksize=like.blocksize,
        compress_statistics=like.nested or getattr(like, "original_nested", False),
        quant_type=like.quant_type,
        quant_storage=storage,
    )
    state.dtype = getattr(like, "original_dtype", like.dtype)
    return codes, state


class _Four:
    """Weights of 4 bits."""

    def name(self, module: Any) -> str:
        return module.weight.quant_type

    def _state(self, module: Any) -> Any:
        # What shards weights makes plain parameters of them, and the module has the scales too.
        state = getattr(module.weight, "quant_state", None)
        return module.quant_state if state is None else state

    def weight(self, module: Any) -> Tensor:
        return dense4(module.weight.data, self._state(module))

    def packed(self, module: Any, matrix: Tensor) -> nn.Parameter:
        old = module.weight
        codes, state = codes4(matrix, self._state(module), module.quant_storage)
        return _bits.nn.Params4bit(
            codes,
            requires_grad=False,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=module.quant_storage,
            module=getattr(old, "module", None),
            bnb_quantized=True,
        )

    def states(self, module: Any) -> Mapping[str, object]:
        return {"quant_state": module.quant_state}

    def hold(self, module: Any, weight: nn.Parameter, states: Mapping[str, object]) -> None:
        module.register_parameter("weight", weight)
        module.quant_state = states.get("quant_state", getattr(weight, "quant_state", None))


# ------------------------------------------------------------------------------------ 8 bits


def dense8(codes: Tensor, scales: Tensor) -> Tensor:
    """What codes of 8 bits [out, in] stand for, in float32. scales: [out]."""
    return codes.to(torch.float32) * (scales.float() * (1.0 / LEVELS)).unsqueeze(1)


def codes8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of a matrix [out, in], and their scales [out].

    As the library makes them of a matrix in float16; others are not rounded to that before.
    """
    scales = matrix.abs().amax(dim=1)
    steps = torch.where(scales > 0, LEVELS / scales, torch.zeros_like(scales))
    return (matrix * steps.unsqueeze(1)).round().to(torch.int8), scales.float()


_ON_WEIGHT, _ON_STATE = ("CB", "SCB"), ("CB", "SCB", "SB", "idx")


class _Eight:
    """Weights of 8 bits."""

    def name(self, module: Any) -> str:
        del module
        return "int8"

    def weight(self, module: Any) -> Tensor:
        scales = getattr(module.weight, "SCB", None)
        return dense8(module.weight.data, module.state.SCB if scales is None else scales)

    def packed(self, module: Any, matrix: Tensor) -> nn.Parameter:
        del module
        codes, scales = codes8(matrix)
        return _bits.nn.Int8Params(
            codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales
        )

    def states(self, module: Any) -> Mapping[str, object]:
        own = {f"weight.{name}": getattr(module.weight, name) for name in _ON_WEIGHT}
        return {**own, **{f"state.{name}": getattr(module.state, name) for name in _ON_STATE}}

    def hold(self, module: Any, weight: nn.Parameter, states: Mapping[str, object]) -> None:
        module.register_parameter("weight", weight)
        module.state.reset_grads()
        for name in _ON_WEIGHT:
            setattr(weight, name, states.get(f"weight.{name}", getattr(weight, name)))
        for name in _ON_STATE:
            setattr(module.state, name, states.get(f"state.{name}"))


_FORMATS: Mapping[type[nn.Module], _Format] = {
    _bits.nn.Linear4bit: _Four(),
    _bits.nn.Linear8bitLt: _Eight(),
}
"""By the class that every layer of the format is of."""


def _format(cls: type[nn.Module]) -> _Format | None:
    return next((_FORMATS[c] for c in cls.__mro__ if c in _FORMATS), None)


def _of(module: nn.Module) -> _Format:
    found = _format(type(module))  # whatever was put on top of the class
    assert found is not None  # what was unpacked is packed no more
    return found


# --------------------------------------------------------------------------- the storage row


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed weight as it was: the class of its module, and all that belongs to it.

    cls: mounted or not. bias: the module's, which the plain layer may need in another dtype.
    """

    cls: type[nn.Module]
    weight: nn.Parameter
    states: Mapping[str, object]
    bias: nn.Parameter | None

    def __reduce__(self) -> tuple[object, ...]:
        """The module's own class: a mounted one has no name, and is mounted again."""
        base = getattr(self.cls, "surgery_base", self.cls)
        return Packed, (base, self.weight, self.states, self.bias)

    def tensor(self) -> Tensor:
        """What the weight stands for [out, in], in float32."""
        own = _format(self.cls)
        assert own is not None
        like: Any = _Alone()
        like.weight, like.state = self.weight, _Alone()
        for name, value in self.states.items():
            at, _, last = name.rpartition(".")
            setattr(getattr(like, at) if at == "state" else like, last, value)
        return own.weight(like)


class _Alone:
    """Attributes that stand for those of a module."""


def _applies(module: nn.Module, name: str) -> bool:
    return name == "weight" and _format(base_class(module)) is not None


def _fetch(module: nn.Module, name: str) -> Tensor | None:
    parameter = parameters_of(module).get(name)
    if parameter is None or parameter.is_meta:
        return None
    return _weight(module) if name == "weight" else parameter.detach()


def _keep(module: nn.Module, name: str) -> Kept:
    parameter = parameters_of(module).get(name)
    if name != "weight" or parameter is None:
        return Kept(parameter, by=STORAGE)
    bias = parameters_of(module).get("bias")
    packed = Packed(type(module), parameter, _of(module).states(module), bias)
    return Kept(parameter, packed, by=STORAGE)


def _install(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Hold another weight, packed as the one before."""
    if name != "weight":
        register(module, name, tensor, requires_grad(module, name))
        return
    assert tensor is not None
    old, own = parameters_of(module)[name], _of(module)
    assert old is not None
    own.hold(module, own.packed(module, tensor.detach().to(old.device)), {})


def _put_back(module: nn.Module, name: str, kept: Kept) -> None:
    # Not in another dtype: what packed layers hold is cast by their own calls, and by no one else.
    now = next((p.device for p in parameters_of(module).values() if p is not None), None)
    packed = kept.elsewhere
    if not isinstance(packed, Packed):
        module.register_parameter(name, _on(kept.parameter, now))
        return
    if _format(base_class(module)) is None:
        swap_class(module, packed.cls)
        module.register_parameter("bias", _on(packed.bias, now))
    own = _of(module)
    if now is None or packed.weight.device == now:
        own.hold(module, packed.weight, packed.states)
        return
    states = {n: v.to(now) if isinstance(v, Tensor) else v for n, v in packed.states.items()}
    own.hold(module, cast(nn.Parameter, packed.weight.to(now)), states)


def _on(parameter: nn.Parameter | None, device: torch.device | None) -> nn.Parameter | None:
    """A parameter where a module was moved to meanwhile; the same object."""
    if parameter is not None and device is not None and parameter.device != device:
        parameter.data = parameter.data.to(device)
    return parameter


def _identity(module: nn.Module, name: str) -> Hashable:
    parameter = parameters_of(module)[name]
    if parameter is None or parameter.is_meta or parameter.numel() == 0:
        return id(parameter)
    return address(parameter)


# ------------------------------------------------------------------------------ what it is for


def _name(module: nn.Module) -> str:
    return _of(module).name(module)


def _weight(module: nn.Module) -> Tensor:
    return _of(module).weight(module)


def _size(module: nn.Module) -> tuple[int, int]:
    layer = cast(nn.Linear, module)
    return layer.out_features, layer.in_features


def _computes(module: nn.Module) -> torch.dtype | None:
    return vars(module).get("compute_dtype")


def _unpack(module: nn.Module, matrix: Tensor) -> None:
    swap_class(module, nn.Linear)
    module.register_parameter("weight", nn.Parameter(matrix.detach(), requires_grad=False))
    follow_dtype(module, matrix.dtype)


STORAGE = Storage(
    name="bitsandbytes",
    applies=_applies,
    fetch=_fetch,
    keep=_keep,
    install=_install,
    put_back=_put_back,
    identity=_identity,
    packing=Packing(torch.float32, _name, _weight, _size, _computes, _unpack),
)
