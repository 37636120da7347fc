"""The layer kinds: what each is as a matrix, and how a matrix of its shape acts on its input.

A kind is a row of `KINDS`. Every weight is seen as `W[out, in]`, whatever its storage, and every
activation with its features last. All functions here work on tensors and on `torch.fx` proxies,
so they read sizes from the row's own data and never from a tensor's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from surgery.model.stacked import own_class


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a site as a matrix, in elements.

    `fan_in` is the length of a row of W; `channels` the input channels a group, which is `fan_in`
    for all but convolutions; a site with `groups` > 1 applies each group's rows to its own input.
    """

    fan_in: int
    fan_out: int
    channels: int
    groups: int = 1

    @property
    def names(self) -> Mapping[str, int]:
        """The sizes by the names they have in an equation."""
        return {"in": self.fan_in, "out": self.fan_out, "channels": self.channels}


@dataclass(frozen=True, slots=True)
class Geometry:
    """The constants of a convolution, an entry for each axis of its kernel.

    pad: what `F.pad` takes when the mode is not zeros.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    mode: str
    pad: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The number of axes that the kernel moves along."""
        return len(self.kernel)


InputForm = Literal["features", "patches", "indices"]

Mode = Literal["call", "value", "around"]
"""How an adapter reaches a layer: its call is rewritten, or the weight that its own code reads, or
the call is left as it is, and what goes in or comes out is changed."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """One row: a class of layers whose `forward` is known.

    name: how formats and plans call it.
    qualified: the class, as `module.Class`; a subclass counts if it has the same `forward`.
    argument: the name of the first argument of `forward`.
    input: what x is. `features` [..., in]; `patches`, which only a whole matrix can read;
        `indices` [...] of one-hot vectors.
    sizes, geometry: read off a module, without touching its weight's data.
    objection: why this module cannot be adapted, or "".
    to_matrix, from_matrix: between the stored layout and `[out, in]`; views where they can be.
    apply: a matrix `[k, in]` on the input; gives `[..., k]`, or `[..., groups, k]` if the site has
        groups and the matrix is not `whole` (its rows are not the site's own).
    scale: the input times a vector over `channels`; None where the input has no such axis.
    feature_axis: where the features stand in the output.
    methods: what makes up the class's forward; a subclass that replaces one is not of this kind.
    bare: whether it is a parameter by itself, of which no forward is known; it may then be a batch
        of matrices, and its sizes are those of the parameter.
    packed: the integration that knows what its weight stands for; "" where it lies as it is. The
        output of such a layer has the dtype of its input.
    """

    name: str
    qualified: str
    argument: str
    input: InputForm
    sizes: Callable[[nn.Module], Sizes]
    geometry: Callable[[nn.Module], Geometry | None]
    objection: Callable[[nn.Module], str]
    to_matrix: Callable[[Tensor], Tensor]
    from_matrix: Callable[[Tensor, tuple[int, ...]], Tensor]
    apply: Callable[[Tensor, Tensor, Sizes, Geometry | None, bool], Tensor]
    scale: Callable[[Tensor, Tensor, Sizes, Geometry | None], Tensor] | None
    feature_axis: int = -1
    methods: tuple[str, ...] = ("forward",)
    bare: bool = False
    packed: str = ""

    def features_last(self, output: Tensor) -> Tensor:
        """The site's output with its features on the last axis; a view."""
        return output if self.feature_axis == -1 else output.movedim(self.feature_axis, -1)

    def features_back(self, output: Tensor) -> Tensor:
        """The inverse of `features_last`; a view."""
        return output if self.feature_axis == -1 else output.movedim(-1, self.feature_axis)


# ------------------------------------------------------------------------------ dense layers


def _no_geometry(module: nn.Module) -> None:
    del module


def _no_objection(module: nn.Module) -> str:
    del module
    return ""


def _linear_sizes(module: nn.Module) -> Sizes:
    linear = cast(nn.Linear, module)
    return Sizes(linear.in_features, linear.out_features, linear.in_features)


def _transposed_sizes(module: nn.Module) -> Sizes:
    fan_in, fan_out = cast(Tensor, module.weight).shape
    return Sizes(fan_in, fan_out, fan_in)


def _stored(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    return matrix.reshape(shape)


def _stored_transposed(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    return matrix.transpose(-1, -2).reshape(shape)


def _as_is(weight: Tensor) -> Tensor:
    return weight


def _transposed(weight: Tensor) -> Tensor:
    return weight.transpose(-1, -2)


def _apply_features(
    matrix: Tensor, x: Tensor, sizes: Sizes, geometry: Geometry | None, whole: bool
) -> Tensor:
    del sizes, geometry, whole
    return F.linear(x, matrix)


def _scale_features(x: Tensor, vector: Tensor, sizes: Sizes, geometry: Geometry | None) -> Tensor:
    del sizes, geometry
    return x * vector


# -------------------------------------------------------------------------------- embeddings


def _embedding_sizes(module: nn.Module) -> Sizes:
    table = cast(nn.Embedding, module)
    return Sizes(table.num_embeddings, table.embedding_dim, table.num_embeddings)


def _embedding_objection(module: nn.Module) -> str:
    if cast(nn.Embedding, module).max_norm is None:
        return ""
    return "its max_norm rescales rows of the weight on every lookup, so W is not a constant"


def _apply_indices(
    matrix: Tensor, x: Tensor, sizes: Sizes, geometry: Geometry | None, whole: bool
) -> Tensor:
    del sizes, geometry, whole
    return F.embedding(x, matrix.t())


# ------------------------------------------------------------------------------ convolutions


_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
"""By the rank of the kernel."""


def _conv_sizes(module: nn.Module) -> Sizes:
    conv = cast(_Convolution, module)
    channels = conv.in_channels // conv.groups
    return Sizes(channels * prod(conv.kernel_size), conv.out_channels, channels, conv.groups)


def _conv_geometry(module: nn.Module) -> Geometry:
    conv = cast(_Convolution, module)
    padding = conv.padding if isinstance(conv.padding, str) else tuple(conv.padding)
    return Geometry(
        kernel=tuple(conv.kernel_size),
        stride=tuple(conv.stride),
        padding=padding,
        dilation=tuple(conv.dilation),
        mode=conv.padding_mode,
        pad=_pad_amounts(conv),
    )


def _pad_amounts(conv: _Convolution) -> tuple[int, ...]:
    """What `F.pad` takes, last axis first, for a padding mode that is not zeros."""
    if conv.padding_mode == "zeros":
        return ()
    amounts: list[int] = []
    for axis in reversed(range(len(conv.kernel_size))):
        if conv.padding == "same":
            total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            amounts += [total // 2, total - total // 2]
        elif isinstance(conv.padding, str):  # "valid"
            amounts += [0, 0]
        else:
            amounts += [conv.padding[axis]] * 2
    return tuple(amounts)


def _flat(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def _channel_axis(rank: int) -> int:
    """Where the channels of an input or output stand, batched or not."""
    return -rank - 1


def _apply_patches(
    matrix: Tensor, x: Tensor, sizes: Sizes, geometry: Geometry | None, whole: bool
) -> Tensor:
    assert geometry is not None
    rank, padding = geometry.rank, geometry.padding
    kernel = cast(Tensor, matrix.unflatten(1, (sizes.channels, *geometry.kernel)))
    split = sizes.groups > 1 and not whole
    if split:
        kernel = kernel.repeat(sizes.groups, 1, *(1,) * rank)
    if geometry.mode != "zeros":
        x = F.pad(x, geometry.pad, mode=geometry.mode)
        padding = (0,) * rank
    y = _CONVOLVE[rank](
        x, kernel, None, geometry.stride, cast(str, padding), geometry.dilation, sizes.groups
    ).movedim(_channel_axis(rank), -1)
    return cast(Tensor, y.unflatten(-1, (sizes.groups, -1))) if split else y


def _scale_channels(x: Tensor, vector: Tensor, sizes: Sizes, geometry: Geometry | None) -> Tensor:
    assert geometry is not None
    every_group = vector.repeat(sizes.groups) if sizes.groups > 1 else vector
    return x * cast(Tensor, every_group.unflatten(0, (-1, *(1,) * geometry.rank)))


def _convolution(rank: int) -> LayerKind:
    """The row of the convolution whose kernel has so many axes."""
    return LayerKind(
        name=f"conv{rank}d",
        qualified=f"torch.nn.modules.conv.Conv{rank}d",
        argument="input",
        input="patches",
        sizes=_conv_sizes,
        geometry=_conv_geometry,
        objection=_no_objection,
        to_matrix=_flat,
        from_matrix=_stored,
        apply=_apply_patches,
        scale=_scale_channels,
        feature_axis=_channel_axis(rank),
        methods=("forward", "_conv_forward"),
    )


KINDS: tuple[LayerKind, ...] = (
    LayerKind(
        name="linear",
        qualified="torch.nn.modules.linear.Linear",
        argument="input",
        input="features",
        sizes=_linear_sizes,
        geometry=_no_geometry,
        objection=_no_objection,
        to_matrix=_as_is,
        from_matrix=_stored,
        apply=_apply_features,
        scale=_scale_features,
    ),
    LayerKind(
        name="transposed_linear",
        qualified="transformers.pytorch_utils.Conv1D",
        argument="x",
        input="features",
        sizes=_transposed_sizes,
        geometry=_no_geometry,
        objection=_no_objection,
        to_matrix=_transposed,
        from_matrix=_stored_transposed,
        apply=_apply_features,
        scale=_scale_features,
    ),
    LayerKind(
        name="embedding",
        qualified="torch.nn.modules.sparse.Embedding",
        argument="input",
        input="indices",
        sizes=_embedding_sizes,
        geometry=_no_geometry,
        objection=_embedding_objection,
        to_matrix=_transposed,
        from_matrix=_stored_transposed,
        apply=_apply_indices,
        scale=None,
    ),
    *map(_convolution, _CONVOLVE),
)


def _packed_objection(module: nn.Module) -> str:
    """Until it is on a device, such a layer has a weight as any other, which its call refuses."""
    weight = cast(Tensor, module.weight)
    states = (getattr(weight, "quant_state", None), getattr(module, "quant_state", None))
    if weight.is_meta or weight.dtype.itemsize == 1 or any(state is not None for state in states):
        return ""
    return "its weight is not quantised yet"


PACKED: tuple[LayerKind, ...] = tuple(
    replace(
        KINDS[0],
        qualified=f"bitsandbytes.nn.modules.{name}",
        argument="x",
        objection=_packed_objection,
        packed="surgery.integrations.bitsandbytes",
    )
    for name in ("Linear4bit", "Linear8bitLt")
)
"""Layers that are like others, whose names they have, but for how their weight lies."""


def _codes_objection(module: nn.Module) -> str:
    told = getattr(module.weight, "act_quant_kwargs", None)
    return "" if told is None else "its inputs are quantised as well as its weight"


WEIGHTS: Mapping[str, LayerKind] = {
    "torchao.quantization.Int8Tensor": replace(
        KINDS[0], objection=_codes_objection, packed="surgery.integrations.torchao"
    )
}
"""Layers of a plain class that are packed, by the class of their weight."""


def _no_sizes(module: nn.Module) -> Sizes:
    """A bare parameter has its own."""
    del module
    return Sizes(0, 0, 0)


def _bare(name: str, like: LayerKind) -> LayerKind:
    """The row of parameters that lie as the weights of a layer."""
    return replace(like, name=name, qualified="", argument="input", sizes=_no_sizes, bare=True)


MATRIX = _bare("matrix", KINDS[0])
"""A parameter [out, in], or [batch, out, in]."""

TRANSPOSED_MATRIX = _bare("transposed_matrix", KINDS[1])
"""A parameter [in, out], or [batch, in, out]."""


def _column(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, 1)


TENSOR = replace(MATRIX, name="tensor", to_matrix=_column)
"""A parameter of any number of axes, as a matrix of one column."""


def qualified_name(cls: type) -> str:
    """`module.Class` of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def base_class(module: nn.Module) -> type[nn.Module]:
    """The module's own class, mounted or not, without what others put on top of it."""
    cls = own_class(type(module))
    return cast("type[nn.Module]", getattr(cls, "surgery_base", cls))


def kind_of(module: nn.Module) -> LayerKind | None:
    """The row that knows this module's forward, or None.

    A row holds for its own class and for any subclass that has replaced none of its `methods`;
    classes that were swapped in by mounting are looked through.
    """
    kind, same = _row_of(base_class(module))
    return (packed_weight(module) or kind) if same else None


def weight_kind_of(module: nn.Module) -> LayerKind | None:
    """The row that knows this module's weight, whatever its forward does with it, or None."""
    return packed_weight(module) or _row_of(base_class(module))[0]


def packed_weight(module: nn.Module) -> LayerKind | None:
    """The row of a plain layer whose weight is packed by the class of the weight, or None."""
    weight = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
    found = None if weight is None else WEIGHTS.get(qualified_name(type(weight)))
    own = None if found is None else _row_of(base_class(module))[0]
    return None if own is None or found is None or own.qualified != found.qualified else found


@lru_cache(maxsize=1024)
def _row_of(cls: type[nn.Module]) -> tuple[LayerKind | None, bool]:
    """The row of the nearest ancestor that has one, and whether all its methods are the row's."""
    for ancestor in cls.__mro__:
        kind = _BY_CLASS.get(qualified_name(ancestor))
        if kind is not None:
            return kind, all(_attribute(cls, m) is _attribute(ancestor, m) for m in kind.methods)
    return None, False


def _attribute(cls: type, name: str) -> object:
    return cast(object, getattr(cls, name, None))


def matrix_like(module: nn.Module) -> bool:
    """Whether a module owns a `weight` that could be seen as a matrix, known to a row or not."""
    weight = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
    # A lazy weight has no shape yet; that it cannot be adapted is said where it is selected.
    return isinstance(weight, torch.Tensor) and (is_lazy(weight) or weight.dim() >= 2)


_BY_CLASS = {kind.qualified: kind for kind in (*KINDS, *PACKED)}
