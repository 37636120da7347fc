"""The layer kinds: each row against its module's own forward."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from surgery.model.layers import LayerKind, kind_of

# torch says so once, of the module itself, where the two sides of "same" differ.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def kind(module: nn.Module) -> LayerKind:
    found = kind_of(module)
    assert found is not None
    return found


def weight_of(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight).detach()


def matrix_of(module: nn.Module) -> Tensor:
    return kind(module).to_matrix(weight_of(module))


def applied(module: nn.Module, matrix: Tensor, x: Tensor, whole: bool = True) -> Tensor:
    row = kind(module)
    return row.apply(matrix, x, row.sizes(module), row.geometry(module), whole)


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module.double()


@st.composite
def dense(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A dense layer or a table, with an input of it."""
    lead = draw(st.sampled_from([(), (2,), (3, 2)]))
    bias = draw(st.booleans())
    makers = {
        "linear": (lambda: nn.Linear(7, 5, bias=bias), torch.randn(*lead, 7).double()),
        "transposed_linear": (lambda: Conv1D(5, 7), torch.randn(*lead, 7).double()),
        "embedding": (lambda: nn.Embedding(11, 5, padding_idx=1), torch.randint(0, 11, lead)),
    }
    name = draw(st.sampled_from(sorted(makers)))
    make, x = makers[name]
    module = randomised(make())
    assert kind(module).name == name
    return module, x


PADS = ["zeros", "circular", "reflect", "replicate"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PLACES = (11, 13, 7)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution of uneven kernel, stride, dilation and padding, with an input of it."""
    rank = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 3]))
    channels, outputs = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 5]))
    steps = st.tuples(*[st.integers(1, 2)] * rank)
    kernel = draw(st.tuples(*(st.integers(1, most) for most in (3, 4, 2)[:rank])))
    dilation, stride = draw(steps), draw(steps)
    padding = draw(st.sampled_from(["same", "valid"]) | st.tuples(*[st.integers(0, 2)] * rank))
    assume(padding != "same" or max(stride) == 1)
    module = cast(Any, CONVOLUTIONS[rank - 1])(
        groups * channels,
        groups * outputs,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(PADS)),
    )
    assert kind(module).name == f"conv{rank}d"
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    return randomised(module), torch.randn(*batch, groups * channels, *PLACES[:rank]).double()


CASES = st.one_of(dense(), convolutions())


@settings(deadline=None)
@given(CASES)
def test_applying_the_matrix_is_the_forward(case: tuple[nn.Module, Tensor]) -> None:
    module, x = case
    row, y = kind(module), module(x)
    out = applied(module, matrix_of(module), x)
    bias = getattr(module, "bias", None)
    out = out if bias is None else out + cast(Tensor, bias)
    torch.testing.assert_close(out, row.features_last(y))
    torch.testing.assert_close(row.features_back(out), y)


@settings(deadline=None)
@given(CASES)
def test_a_matrix_has_the_sizes_and_goes_back(case: tuple[nn.Module, Tensor]) -> None:
    module, _ = case
    row, weight, sizes = kind(module), weight_of(module), kind(module).sizes(module)
    matrix = row.to_matrix(weight)
    assert tuple(matrix.shape) == (sizes.fan_out, sizes.fan_in)
    assert torch.equal(row.from_matrix(matrix, tuple(weight.shape)), weight)
    assert matrix.data_ptr() == weight.data_ptr()


@settings(deadline=None)
@given(convolutions())
def test_rows_that_are_not_the_sites_own_see_every_group(case: tuple[nn.Module, Tensor]) -> None:
    module, x = case
    row = kind(module)
    sizes, geometry = row.sizes(module), row.geometry(module)
    assert geometry is not None
    rows = torch.randn(3, sizes.fan_in).double()
    found = applied(module, rows, x, whole=False)
    axis = row.feature_axis
    parts = cast(Tensor, x.unflatten(axis, (sizes.groups, sizes.channels))).unbind(axis - 1)
    alone = type(sizes)(sizes.fan_in, 3, sizes.channels, 1)
    each = [row.apply(rows, part, alone, geometry, True) for part in parts]
    wanted = torch.stack(each, -2) if sizes.groups > 1 else each[0]
    torch.testing.assert_close(found, wanted)


@settings(deadline=None)
@given(CASES)
def test_scaling_the_input_is_scaling_the_columns(case: tuple[nn.Module, Tensor]) -> None:
    module, x = case
    row, sizes = kind(module), kind(module).sizes(module)
    if row.scale is None:
        assert row.input == "indices"
        return
    vector = torch.randn(sizes.channels).double()
    columns = vector.repeat_interleave(sizes.fan_in // sizes.channels)
    scaled = applied(module, matrix_of(module) * columns, x)
    torch.testing.assert_close(
        applied(module, matrix_of(module), row.scale(x, vector, sizes, row.geometry(module))),
        scaled,
    )


def test_sizes_need_no_data() -> None:
    with torch.device("meta"):
        for module in (nn.Linear(7, 5), Conv1D(5, 7), nn.Embedding(7, 5)):
            sizes = kind(module).sizes(module)
            assert (sizes.fan_in, sizes.fan_out) == (7, 5)
            assert dict(sizes.names) == {"in": 7, "out": 5, "channels": 7}


class Inherits(nn.Linear):
    pass


class Replaces(nn.Linear):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return -super().forward(*args, **kwargs)


class ReplacesWithin(nn.Conv2d):
    def _conv_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return -super()._conv_forward(*args, **kwargs)


class Causal(nn.Conv1d):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)[..., :-2]


class Mounted(Inherits):
    surgery_base = Inherits

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (Inherits(2, 3), "linear"),
        (Mounted(2, 3), "linear"),
        (Replaces(2, 3), None),
        (ReplacesWithin(2, 3, 1), None),
        (nn.LayerNorm(2), None),
        (nn.Conv1d(2, 3, 1), "conv1d"),
        (nn.Conv3d(2, 3, 1), "conv3d"),
        (Causal(2, 3, 1), None),
        (nn.ConvTranspose1d(2, 3, 1), None),
    ],
)
def test_a_row_holds_only_for_its_own_forward(module: nn.Module, name: str | None) -> None:
    found = kind_of(module)
    assert (found and found.name) == name
