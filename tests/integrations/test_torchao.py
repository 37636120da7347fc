"""Plain layers whose weight torchao keeps as codes of 8 bits are sites as any."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import quantised as laws
import torch
from quantised import X, close, dense
from support import moved
from torch import Tensor, nn

import surgery
from surgery.errors import SelectionError, StateError

untyped: Any = torch


@pytest.fixture(scope="module", autouse=True)
def _there() -> None:
    library()


def library() -> Any:
    """It is installed for those who ask for it, and takes seconds to import."""
    return pytest.importorskip("torchao.quantization")


def alone(config: str = "Int8WeightOnlyConfig", **options: Any) -> laws.Alone:
    untyped.manual_seed(0)
    model = laws.Alone(nn.Linear(laws.FAN_IN, laws.FAN_OUT))
    library().quantize_(model, getattr(library(), config)(**options))
    return model.train()


def same(one: nn.Module, other: Tensor) -> bool:
    """Whether a layer has these very codes and scales."""
    own, its = cast(Any, one.weight), cast(Any, other)
    return torch.equal(own.qdata, its.qdata) and torch.equal(own.scale, its.scale)


def adapted(model: nn.Module, call: str = "dora(r=3)") -> surgery.Compiled:
    compiled = surgery.compile(laws.SPEC.format(call), model, seed=1)
    moved(compiled)
    return compiled


@pytest.mark.parametrize("method", laws.METHODS)
def test_every_method_trains_and_merges(method: str, tmp_path: Path) -> None:
    compiled, beside = laws.pair(alone, method, tmp_path)
    laws.trains_like_the_plain_one(compiled, beside)
    compiled.model.train(method not in laws.DRAWN)
    laws.merges_and_says_what_is_lost(compiled, beside)


@pytest.mark.parametrize("blocks", ["PerRow", "PerGroup"])
def test_blocks_stay_as_they_are(blocks: str) -> None:
    size = (32,) if blocks == "PerGroup" else ()
    model = alone(granularity=getattr(library(), blocks)(*size))
    held = cast(Any, model.layer.weight)
    compiled = adapted(model)
    live = model(X).detach()
    close(model(X).detach(), live)
    compiled.inverse.merge(quantized="requantize")
    again = cast(Any, model.layer.weight)
    assert again is not held
    assert (again.block_size, again.scale.shape) == (held.block_size, held.scale.shape)
    assert 1e-4 < (model(X).detach() - live).abs().max() / live.abs().max() < 0.1
    compiled.inverse.unload()
    assert model.layer.weight is held


def test_what_is_merged_apart_stays_quantised() -> None:
    model = alone()
    held = model.layer.weight
    compiled = adapted(model)
    live = model(X).detach()
    compiled.inverse.merge(quantized="separate")
    assert model.layer.weight is held
    assert torch.equal(model(X), live)
    compiled.inverse.unload()
    assert model.layer.weight is held


def test_a_merge_is_told_what_becomes_of_it() -> None:
    model = alone()
    compiled = adapted(model)
    for how, undo, code in ((None, "exact", "E424"), ("requantize", "algebraic", "E425")):
        with pytest.raises(StateError) as caught:
            compiled.inverse.merge(quantized=cast(Any, how), undo=cast(Any, undo))
        assert [d.code for d in caught.value.diagnostics] == [code]


def test_an_adapter_goes_to_the_dense_model_and_back(tmp_path: Path) -> None:
    model = alone()
    plain = dense(model)
    compiled = adapted(model)
    expected = model(X)
    compiled.save(tmp_path / "packed")
    attached = surgery.attach(tmp_path / "packed", plain)
    close(plain(X), expected)
    attached.save(tmp_path / "plain")
    other = alone()
    surgery.attach(tmp_path / "plain", other)
    assert torch.equal(other(X), expected)


def test_copies_and_twins_run() -> None:
    model = alone()
    compiled = adapted(model)
    expected = model(X).detach()
    close(copy.deepcopy(model)(X).detach(), expected)
    base = alone()
    held = base.layer.weight
    twin: Any = surgery.compile(laws.SPEC.format("dora(r=3)"), base, seed=1, inplace=False).model
    assert base.layer.weight is held
    assert twin.layer.weight.qdata.data_ptr() == cast(Any, held).qdata.data_ptr()
    close(twin(X).detach(), base(X).detach())
    compiled.inverse.merge(quantized="dequantize")
    other = copy.deepcopy(model)
    surgery.of(other).inverse.unmerge()
    close(other(X).detach(), expected)
    assert same(other.layer, cast(Tensor, held))


def test_samples_are_routed_and_frozen() -> None:
    model = alone()
    base = model(X).detach()
    compiled = adapted(model)
    live = model(X).detach()
    with compiled.route(["default", None]):
        found = model(X).detach()
    close(found[0], live[0])
    close(found[1], base[1])
    model.eval()
    with compiled.frozen(), torch.no_grad():
        close(model(X), live)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_have_the_dtype_of_the_inputs(dtype: torch.dtype) -> None:
    model = alone().to(dtype)
    x = X.to(dtype)
    own = model(x)
    compiled = adapted(model, 'ia3(side="in") then lora(r=3)')
    assert model(x).dtype == own.dtype == dtype
    assert all(p.dtype == torch.float32 for p in compiled.parameters().values())
    compiled.inverse.unload()
    assert torch.equal(model(x), own)


def test_rows_are_a_site() -> None:
    model = alone()
    plain = dense(model)
    spec = "match layer[16:48] | layer[48:96] apply dora(r=2)"
    pair = [surgery.compile(spec, m, seed=1) for m in (model, plain)]
    for compiled in pair:
        moved(compiled)
    close(model(X), plain(X))


def test_one_graph_is_compiled() -> None:
    model = alone()
    adapted(model)
    expected = model(X)
    untyped._dynamo.reset()
    compiled: Callable[[Tensor], Tensor] = untyped.compile(model, fullgraph=True, backend="eager")
    close(compiled(X), expected)


def test_a_plan_knows_how_the_weight_lies() -> None:
    model = alone()
    plan = surgery.plan("match layer where dtype == int8 apply lora(r=2)", model)
    (site,) = plan.sites
    assert (site.site.sizes.fan_in, site.site.sizes.fan_out) == (laws.FAN_IN, laws.FAN_OUT)
    assert isinstance(site.site.module, nn.Linear)
    assert plan.base_count == laws.FAN_IN * laws.FAN_OUT + laws.FAN_OUT
    assert plan.base_bytes < 2 * plan.base_count
    assert adapted(model).status().base_bytes == plan.base_bytes


@pytest.mark.parametrize(
    ("config", "spec", "reason"),
    [
        ("Int8DynamicActivationInt8WeightConfig", "match layer apply lora(r=2)", "inputs"),
        ("Int8WeightOnlyConfig", "train layer.weight", "reached by nothing but"),
    ],
)
def test_what_cannot_be_a_site_is_refused(config: str, spec: str, reason: str) -> None:
    with pytest.raises(SelectionError, match=reason) as caught:
        surgery.plan(spec, alone(config))
    assert [d.code for d in caught.value.diagnostics] == ["E209"]
