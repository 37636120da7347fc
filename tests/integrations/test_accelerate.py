"""Adapters on offloaded models: same values and gradients as without offloading."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from blocks import IN, MIDDLE, OUT, Model
from torch import Tensor, nn

from surgery.integrations import accelerate as integration
from surgery.model import hooked, storage
from surgery.model.holder import ADAPTERS, Holder, modules_of, parameters_of
from surgery.model.layers import LayerKind, kind_of
from surgery.model.parts import WHOLE

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")

RANK, BATCH = 3, 2


class Mounted(nn.Linear):
    """A stand-in for a mounted class: plain attribute reads, as generated code does."""

    surgery_base = nn.Linear

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base, and two factors."""
        del kwargs
        x = cast(Tensor, args[0])
        adapter = self.get_submodule("surgery.default")
        first, second = cast(Tensor, adapter.A), cast(Tensor, adapter.B)
        return nn.Linear.forward(self, x) + x @ first.t() @ second.t()


def sites_of(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def adapt(model: nn.Module) -> None:
    """What mounting does: adopt, then the tensors in holders, then the class."""
    hooked.adopt(model)
    generator = torch.Generator().manual_seed(3)
    for site in sites_of(model):
        device = hooked.execution_device(site)
        holder, child = Holder(), Holder()
        holder.add_module("default", child)
        site.add_module(ADAPTERS, holder)
        for name, shape in (("A", (RANK, site.in_features)), ("B", (site.out_features, RANK))):
            value = torch.randn(shape, generator=generator).to(device)
            child.register_parameter(name, nn.Parameter(value))
        hooked.swap_class(site, Mounted)


def unload(model: nn.Module) -> None:
    for site in sites_of(model):
        hooked.swap_class(site, nn.Linear)
        delattr(site, ADAPTERS)
    hooked.release(model)


def fresh() -> Model:
    model, generator = Model(bias=False), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def batch() -> Tensor:
    return torch.randn(BATCH, IN, generator=torch.Generator().manual_seed(1))


def adapters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if f".{ADAPTERS}." in n}


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the gradients of all adapter parameters."""
    for parameter in adapters_of(model).values():
        parameter.grad = None
    output = model(batch())
    output.square().sum().backward()
    gradients = {n: p.grad for n, p in adapters_of(model).items()}
    assert gradients
    return output.detach(), {n: g.clone() for n, g in gradients.items() if g is not None}


def assert_as_without_hooks(model: nn.Module) -> None:
    plain = fresh()
    adapt(plain)
    expected, expected_gradients = run(plain)
    for _ in range(2):  # the second call finds what the first left behind
        output, gradients = run(model)
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=0)
    assert all(not p.is_meta for p in adapters_of(model).values())


Offload = Callable[[nn.Module, Path], object]


def offload_to_cpu(model: nn.Module, folder: Path) -> object:
    del folder
    return accelerate.cpu_offload(model, torch.device("cpu"))


def offload_to_disk(model: nn.Module, folder: Path) -> object:
    return accelerate.disk_offload(model, folder, torch.device("cpu"))


def dispatch(model: nn.Module, folder: Path) -> object:
    places = {"layers.0": "cpu", "layers.1": "disk", "head": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


def dispatch_with_state(model: nn.Module, folder: Path) -> object:
    # As with a GPU: what is on the CPU is offloaded from a state dict, the rest from disk.
    state = {n: p for n, p in model.state_dict().items() if n.startswith("layers.0")}
    places = {"layers.0": "disk", "layers.1": "disk", "head": "cpu"}
    return accelerate.dispatch_model(
        model, places, main_device="cpu", state_dict=state, offload_dir=folder, force_hooks=True
    )


def offload_whole_blocks(model: nn.Module, folder: Path) -> object:
    del folder
    return accelerate.cpu_offload(model, torch.device("cpu"), preload_module_classes=["Block"])


def offload_each_site_whole(model: nn.Module, folder: Path) -> object:
    del folder
    for site in sites_of(model):
        hook = hooks.AlignDevicesHook(torch.device("cpu"), offload=True, place_submodules=True)
        hooks.add_hook_to_module(site, hooks.SequentialHook(hook))
    return model


OFFLOADS: list[Offload] = [
    offload_to_cpu,
    offload_to_disk,
    dispatch,
    dispatch_with_state,
    offload_whole_blocks,
    offload_each_site_whole,
]
BY_SITE = OFFLOADS[:4]


@pytest.mark.parametrize("offload", OFFLOADS)
def test_adapters_added_to_an_offloaded_model(offload: Offload, tmp_path: Path) -> None:
    model = fresh()
    offload(model, tmp_path)
    adapt(model)
    assert_as_without_hooks(model)


@pytest.mark.parametrize("offload", BY_SITE)
def test_offloading_an_adapted_model_keeps_the_parameter_objects(
    offload: Offload, tmp_path: Path
) -> None:
    model = fresh()
    adapt(model)
    before = {n: id(p) for n, p in adapters_of(model).items()}
    offload(model, tmp_path)
    assert_as_without_hooks(model)
    assert {n: id(p) for n, p in adapters_of(model).items()} == before
    hooks.remove_hook_from_submodules(model)
    assert_as_without_hooks(model)
    assert {n: id(p) for n, p in adapters_of(model).items()} == before


@pytest.mark.parametrize("offload", [offload_whole_blocks, offload_each_site_whole])
def test_adopt_after_hooks_that_place_submodules(offload: Offload, tmp_path: Path) -> None:
    model = fresh()
    adapt(model)
    offload(model, tmp_path)
    hooked.adopt(model)
    assert_as_without_hooks(model)
    hooks.remove_hook_from_submodules(model)
    assert_as_without_hooks(model)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_hooks_removed_after_adapting_then_unloaded(offload: Offload, tmp_path: Path) -> None:
    model, expected = fresh(), fresh()(batch())
    offload(model, tmp_path)
    adapt(model)
    hooks.remove_hook_from_submodules(model)
    assert_as_without_hooks(model)
    unload(model)
    torch.testing.assert_close(model(batch()), expected, rtol=0, atol=0)
    assert all("forward" not in vars(site) for site in sites_of(model))
    assert not [m for m in model.modules() if hooked.COVER in vars(m)]
    adapt(model)
    assert_as_without_hooks(model)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_unloaded_under_hooks_then_removed(offload: Offload, tmp_path: Path) -> None:
    model, expected = fresh(), fresh()(batch())
    offload(model, tmp_path)
    adapt(model)
    unload(model)
    for _ in range(2):
        torch.testing.assert_close(model(batch()), expected, rtol=0, atol=0)
    hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(model(batch()), expected, rtol=0, atol=0)
    assert {type(site) for site in sites_of(model)} == {nn.Linear}
    assert not [m for m in model.modules() if hooked.COVER in vars(m)]


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_copy_of_an_adapted_offloaded_model_is_its_own(offload: Offload, tmp_path: Path) -> None:
    model = fresh()
    offload(model, tmp_path)
    adapt(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in adapters_of(model).values():
            parameter.zero_()
    assert_as_without_hooks(twin)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_read_replace_and_put_back_under_hooks(offload: Offload, tmp_path: Path) -> None:
    plain, model = fresh(), fresh()
    offload(model, tmp_path)
    adapt(plain)
    adapt(model)
    before = {n: list(parameters_of(m)) for n, m in modules_of(model)}
    expected = plain(batch())
    linear = cast(LayerKind, kind_of(nn.Linear(2, 3)))
    held: list[tuple[nn.Linear, storage.Kept, storage.Kept]] = []
    for site, twin in zip(sites_of(model), sites_of(plain), strict=True):
        matrix, wanted = storage.read(site, linear), storage.read(twin, linear)
        assert matrix is not None
        assert wanted is not None
        torch.testing.assert_close(matrix, wanted, rtol=0, atol=0)
        held.append(
            (
                site,
                storage.detach_parameter(site, WHOLE, "weight"),
                storage.detach_parameter(site, WHOLE, "bias"),
            )
        )
        value, bias = 2 * matrix, torch.ones(site.out_features)
        copied = matrix.clone()
        storage.write(site, linear, WHOLE, value)
        storage.replace(site, WHOLE, "bias", bias)
        storage.write(twin, linear, WHOLE, value.clone())
        storage.replace(twin, WHOLE, "bias", bias.clone())
        assert parameters_of(site)["weight"] is not None
        torch.testing.assert_close(matrix, copied, rtol=0, atol=0)
        assert torch.equal(cast(Tensor, storage.read_bias(site)), bias)
    for _ in range(2):
        torch.testing.assert_close(model(batch()), plain(batch()), rtol=0, atol=0)
    for site, weight, bias in held:
        storage.put_back(site, WHOLE, "weight", weight)
        storage.put_back(site, WHOLE, "bias", bias)
    for _ in range(2):
        torch.testing.assert_close(model(batch()), expected, rtol=0, atol=0)
    assert {n: list(parameters_of(m)) for n, m in modules_of(model)} == before
    hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(model(batch()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_merged_weight_survives_removal_of_the_hooks_and_comes_back(
    offload: Offload, tmp_path: Path
) -> None:
    model = fresh()
    offload(model, tmp_path)
    adapt(model)
    expected, site = model(batch()), sites_of(model)[1]  # a block's, without a bias
    assert site.bias is None
    linear = cast(LayerKind, kind_of(nn.Linear(2, 3)))
    kept = (
        storage.detach_parameter(site, WHOLE, "weight"),
        storage.detach_parameter(site, WHOLE, "bias"),
    )
    original = cast(Tensor, kept[0].tensor()).clone()
    storage.write(site, linear, WHOLE, -original)
    storage.replace(site, WHOLE, "bias", torch.ones(site.out_features))
    merged = model(batch())
    hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(model(batch()), merged, rtol=0, atol=0)
    assert torch.equal(site.weight, -original)
    storage.put_back(site, WHOLE, "weight", kept[0])
    storage.put_back(site, WHOLE, "bias", kept[1])
    assert torch.equal(site.weight, original)
    assert site.bias is None
    torch.testing.assert_close(model(batch()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("offload", BY_SITE)
def test_a_plain_weight_kept_before_offloading_comes_back_after(
    offload: Offload, tmp_path: Path
) -> None:
    model = fresh()
    expected, site = model(batch()), sites_of(model)[0]
    linear = cast(LayerKind, kind_of(site))
    kept = storage.detach_parameter(site, WHOLE, "weight")
    storage.write(site, linear, WHOLE, torch.zeros(MIDDLE, IN))
    offload(model, tmp_path)
    storage.put_back(site, WHOLE, "weight", kept)
    for _ in range(2):
        torch.testing.assert_close(model(batch()), expected, rtol=0, atol=0)


def test_ties_are_seen_through_offloading() -> None:
    model = fresh()
    first, second = sites_of(model)[0], sites_of(model)[2]
    second.weight = first.weight
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert first.weight is not second.weight
    assert storage.identity(first, "weight") == storage.identity(second, "weight")
    other = sites_of(model)[1]
    assert storage.identity(first, "weight") != storage.identity(other, "weight")


def test_hooks_that_only_align_leave_the_storage_plain() -> None:
    site = nn.Linear(IN, OUT)
    hooks.add_hook_to_module(site, hooks.AlignDevicesHook(torch.device("cpu")))
    assert storage.storage_of(site) is storage.PLAIN
    assert hooked.execution_device(site) == torch.device("cpu")


def test_the_wrapper_names_the_new_forward() -> None:
    site = nn.Linear(IN, OUT)
    hooks.add_hook_to_module(site, hooks.AlignDevicesHook(torch.device("cpu")))
    hooked.swap_class(site, Mounted)
    wrapped = vars(site)["forward"].__wrapped__
    assert wrapped.__func__ is Mounted.forward
    assert not hooked.replaced_forward(site)
    assert list(integration.hooks_of(nn.Linear(2, 3))) == []
