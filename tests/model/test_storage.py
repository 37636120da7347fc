"""Reading, replacing and giving back weights; class swaps; holders."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from surgery.model import hooked, storage
from surgery.model.holder import Holder, holder_of, parameters_of
from surgery.model.layers import LayerKind, kind_of
from surgery.model.parts import WHOLE


def kind(module: nn.Module) -> LayerKind:
    found = kind_of(module)
    assert found is not None
    return found


def modules() -> list[nn.Module]:
    return [
        nn.Linear(7, 5),
        nn.Linear(7, 5, bias=False),
        Conv1D(5, 7),
        nn.Embedding(7, 5),
        nn.Conv2d(6, 4, (2, 3), groups=2),
        nn.Conv2d(6, 4, (2, 3)).to(memory_format=torch.channels_last),  # pyright: ignore
    ]


CASES = pytest.mark.parametrize("index", range(6))


@CASES
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_write_is_read_and_the_old_object_comes_back(
    index: int, flag: bool, dtype: torch.dtype
) -> None:
    module = modules()[index].to(dtype).requires_grad_(flag)
    row, before = kind(module), dict(parameters_of(module))
    values = {n: p.detach().clone() for n, p in before.items() if p is not None}
    sizes = row.sizes(module)
    kept = storage.detach_parameter(module, WHOLE, "weight")
    for _ in range(2):
        matrix = torch.randn(sizes.fan_out, sizes.fan_in).to(dtype)
        storage.write(module, row, WHOLE, matrix)
        found = storage.read(module, row)
        assert found is not None
        assert torch.equal(found, matrix)
        assert found.dtype == dtype
    weight = cast(nn.Parameter, module.weight)
    assert isinstance(weight, nn.Parameter)
    assert weight.requires_grad is flag
    old = before["weight"]
    assert old is not None
    assert weight.shape == old.shape
    assert weight.stride() == old.stride()
    assert list(parameters_of(module)) == list(before)
    storage.put_back(module, WHOLE, "weight", kept)
    assert all(p is before[n] for n, p in parameters_of(module).items())
    assert list(parameters_of(module)) == list(before)
    assert all(torch.equal(cast(Tensor, before[n]), v) for n, v in values.items())


def test_a_bias_comes_and_goes() -> None:
    module = nn.Linear(7, 5, bias=False).requires_grad_(False)
    before = dict(parameters_of(module))
    assert storage.takes_bias(module)
    assert storage.read_bias(module) is None
    kept = storage.detach_parameter(module, WHOLE, "bias")
    assert kept.tensor() is None
    storage.replace(module, WHOLE, "bias", torch.arange(5.0))
    assert torch.equal(cast(Tensor, storage.read_bias(module)), torch.arange(5.0))
    assert not module.bias.requires_grad
    assert torch.equal(module(torch.zeros(7)), torch.arange(5.0))
    storage.put_back(module, WHOLE, "bias", kept)
    assert list(parameters_of(module).items()) == list(before.items())
    assert not storage.takes_bias(nn.Embedding(2, 3))


@CASES
def test_meta_is_not_yet(index: int) -> None:
    module = modules()[index].to("meta")
    assert storage.read(module, kind(module)) is None
    assert storage.read_bias(module) is None
    assert storage.unreadable(module) == ""
    assert hooked.execution_device(module) == torch.device("meta")


def test_a_kept_object_follows_a_module_that_moved() -> None:
    module = nn.Linear(7, 5)
    original, kept = module.weight, storage.detach_parameter(module, WHOLE, "weight")
    value = original.detach().clone()
    storage.write(module, kind(module), WHOLE, torch.zeros(5, 7))
    module.to(torch.float64)
    storage.put_back(module, WHOLE, "weight", kept)
    assert module.weight is original
    assert module.weight.dtype == torch.float64
    assert torch.equal(original, value.double())


def test_a_copy_keeps_what_was_kept() -> None:
    module = nn.Linear(7, 5)
    kept = storage.detach_parameter(module, WHOLE, "weight")
    value = module.weight.detach().clone()
    storage.write(module, kind(module), WHOLE, torch.zeros(5, 7))
    twin, twin_kept = copy.deepcopy((module, kept))
    assert pickle.loads(pickle.dumps(kept)).tensor().equal(value)
    storage.put_back(twin, WHOLE, "weight", twin_kept)
    assert torch.equal(twin.weight, value)
    assert twin.weight is not kept.parameter
    assert not module.weight.any()


@settings(deadline=None)
@given(st.integers(0, 5), st.booleans())
def test_replaced_weights_share_no_data(index: int, bias: bool) -> None:
    module = modules()[index]
    name = "bias" if bias and parameters_of(module).get("bias") is not None else "weight"
    old = cast(Tensor, parameters_of(module)[name])
    key = storage.identity(module, name)
    storage.replace(module, WHOLE, name, torch.zeros(old.shape))
    assert storage.identity(module, name) != key


class Unread(nn.Parameter):
    pass


def test_a_weight_that_no_row_reads_says_so() -> None:
    module = nn.Linear(2, 3)
    module.weight = Unread(torch.zeros(3, 2))
    assert "Unread" in storage.unreadable(module)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    assert "parametrization" in storage.unreadable(normed)


def test_a_lazy_weight_says_so() -> None:
    module = nn.Linear(2, 3)
    module.weight = nn.UninitializedParameter()
    assert "no shape" in storage.unreadable(module)


# ------------------------------------------------------------------------------ class swaps


class Doubled(nn.Linear):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


def test_a_swap_and_its_undoing_leave_nothing() -> None:
    module, x = nn.Linear(7, 5), torch.randn(2, 7)
    before, expected = dict(vars(module)), module(x)
    hooked.swap_class(module, Doubled)
    assert torch.equal(module(x), 2 * expected)
    hooked.swap_class(module, nn.Linear)
    assert torch.equal(module(x), expected)
    assert vars(module) == before


def test_a_foreign_forward_is_seen() -> None:
    module = nn.Linear(7, 5)
    assert not hooked.replaced_forward(module)
    vars(module)["forward"] = module.forward
    assert not hooked.replaced_forward(module)
    vars(module)["forward"] = nn.Linear(7, 5).forward
    assert hooked.replaced_forward(module)


# ----------------------------------------------------------------------------------- holders


def test_holders_are_ordinary_modules() -> None:
    site = nn.Linear(7, 5)
    assert holder_of(site) is None
    holder = Holder()
    holder.add_module("default", Holder())
    holder.get_submodule("default").register_parameter("A", nn.Parameter(torch.ones(3, 7)))
    site.add_module("surgery", holder)
    assert holder_of(site) is holder
    twin = pickle.loads(pickle.dumps(copy.deepcopy(site)))
    assert list(twin.state_dict()) == ["weight", "bias", "surgery.default.A"]
    twin.to(torch.float64)
    assert twin.get_parameter("surgery.default.A").dtype == torch.float64
    hooked.adopt(site)
    hooked.release(site)


def test_nothing_of_accelerate_is_imported_for_a_plain_model() -> None:
    code = (
        "import sys; from torch import nn; from surgery.model import hooked, storage;"
        "from surgery.model.parts import WHOLE;"
        "m = nn.Linear(2, 3); hooked.adopt(m); hooked.swap_class(m, nn.Linear);"
        "storage.detach_parameter(m, WHOLE, 'weight'); hooked.execution_device(m);"
        "assert not {'accelerate', 'surgery.integrations.accelerate'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
