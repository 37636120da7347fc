"""Layers whose weights bitsandbytes has packed are sites as any: what holds of their forward.

Each model stands beside a dense one with the very weights that the packed ones stand for.
"""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import quantised as laws
import safetensors.torch
import torch
from support import bits, moved
from torch import Tensor, nn

import surgery
from surgery.errors import ArtifactError, SelectionError, StateError
from surgery.model import storage
from surgery.model.holder import under_adapters
from surgery.model.layers import kind_of
from surgery.quantized_files import entries_of, quantiser

packed: Any = pytest.importorskip("bitsandbytes")
untyped: Any = torch
files: Any = safetensors.torch
Make = Callable[..., nn.Module]

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class Block(nn.Module):
    """Two layers that may be packed, and a third that never is."""

    def __init__(self, layer: Make = nn.Linear) -> None:
        super().__init__()
        self.up = layer(96, 160)
        self.down = layer(160, 96)
        self.norm = nn.LayerNorm(96)

    def forward(self, x: Tensor) -> Tensor:
        """[..., 96] to the same."""
        return self.norm(x + self.down(torch.tanh(self.up(x))))


def four(quant_type: str, nested: bool) -> Make:
    def layer(fan_in: int, fan_out: int) -> nn.Module:
        return packed.nn.Linear4bit(
            fan_in, fan_out, quant_type=quant_type, compress_statistics=nested
        )

    return layer


def eight(fan_in: int, fan_out: int) -> nn.Module:
    return packed.nn.Linear8bitLt(fan_in, fan_out, has_fp16_weights=False)


FORMATS: dict[str, Make] = {
    "nf4": four("nf4", False),
    "nf4 nested": four("nf4", True),
    "fp4": four("fp4", False),
    "fp4 nested": four("fp4", True),
    "int8": eight,
}
METHODS = (
    "lora(r=3, alpha=5)",
    "dora(r=3)",
    "ia3()",
    'ia3(side="in")',
    "oft(block_size=4)",
    "hra(r=4)",
)
EVERY = pytest.mark.parametrize("name", FORMATS)
X = torch.randn((2, 5, 96), generator=torch.Generator().manual_seed(3))


def quantised(name: str) -> Any:
    """Packed, and in training mode, in which the inputs of 8 bits are not rounded as well."""
    untyped.manual_seed(0)
    return Block(FORMATS[name]).to("cpu").train()


def weight(module: nn.Module) -> Tensor:
    kind = kind_of(module)
    assert kind is not None
    found = storage.read(module, kind)
    assert found is not None
    return found


def dense(model: Any) -> Any:
    """The plain model with the weights that the packed ones stand for."""
    made = Block()
    made.norm.load_state_dict(model.norm.state_dict())
    for name in ("up", "down"):
        layer, own = getattr(made, name), getattr(model, name)
        with torch.no_grad():
            layer.weight.copy_(weight(own))
            layer.bias.copy_(own.bias)
    return made


def adapted(model: nn.Module, method: str, **options: Any) -> surgery.Compiled:
    compiled = surgery.compile(f"match up | down apply {method}", model, seed=1, **options)
    moved(compiled)
    return compiled


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    named = model.named_parameters()
    return {n: p for n, p in named if under_adapters(n) and p.requires_grad}


def outputs_and_gradients(compiled: surgery.Compiled) -> tuple[Tensor, dict[str, Tensor]]:
    compiled.model.zero_grad()
    y = compiled.model(X)
    y.square().sum().backward()
    gradients = {n: p.grad for n, p in trained(compiled.model).items()}
    assert gradients
    return y.detach(), {n: cast(Tensor, g) for n, g in gradients.items()}


def close(found: Tensor, expected: Tensor, most: float = 1e-5) -> None:
    """To a hundred-thousandth of the largest."""
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= most * expected.abs().max()


def objects(model: nn.Module) -> dict[str, tuple[int, type[object]]]:
    return {n: (id(p), type(p)) for n, p in model.named_parameters()}


# ------------------------------------------------------------------------------------ forward


@EVERY
@pytest.mark.parametrize("method", METHODS)
def test_the_forward_and_the_gradients_are_those_of_the_dense_model(name: str, method: str) -> None:
    model = quantised(name)
    plain = dense(model)
    base, before, kept = model(X).detach(), bits(model), objects(model)
    compiled, beside = adapted(model, method), adapted(plain, method)
    assert isinstance(model.up, packed.nn.Linear4bit | packed.nn.Linear8bitLt)
    for (found, mine), (expected, its) in [
        (outputs_and_gradients(compiled), outputs_and_gradients(beside))
    ]:
        close(found, expected)
        assert mine.keys() == its.keys()
        for parameter, gradient in mine.items():
            close(gradient, its[parameter], 1e-4)
    compiled.inverse.unload()
    assert objects(model) == kept
    assert bits(model) == before
    assert torch.equal(model(X), base)


def alone(name: str) -> laws.Alone:
    untyped.manual_seed(0)
    return laws.Alone(FORMATS[name](laws.FAN_IN, laws.FAN_OUT)).to("cpu").train()


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("method", laws.METHODS)
def test_every_method_trains_and_merges(name: str, method: str, tmp_path: Path) -> None:
    compiled, beside = laws.pair(lambda: alone(name), method, tmp_path)
    laws.trains_like_the_plain_one(compiled, beside)
    drawn = method in laws.DRAWN
    compiled.model.train(not drawn)  # evaluated, 8 bits round inputs to 8 bits too
    laws.merges_and_says_what_is_lost(compiled, beside, 2e-2 if drawn else 1e-5)


@EVERY
def test_sizes_are_the_modules_own(name: str) -> None:
    model = quantised(name)
    plan = surgery.plan("match up | down apply lora(r=2)", model)
    assert [(s.site.sizes.fan_in, s.site.sizes.fan_out) for s in plan.sites] == [
        (96, 160),
        (160, 96),
    ]
    assert plan.base_count == sum(p.numel() for p in dense(model).parameters())
    assert plan.base_bytes < 4 * plan.base_count
    told = surgery.compile("match up | down apply lora(r=2)", model).status()
    assert (told.base, told.base_bytes) == (plan.base_count, plan.base_bytes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EVERY
def test_outputs_have_the_dtype_of_the_inputs(name: str, dtype: torch.dtype) -> None:
    model = quantised(name)
    x = X.to(dtype)
    own = model.up(x)
    assert own.dtype == dtype
    compiled = surgery.compile('match up apply ia3(side="in") then lora(r=3)', model)
    assert torch.equal(model.up(x), own)
    assert all(p.dtype == torch.float32 for p in compiled.parameters().values())
    moved(compiled)
    assert model.up(x).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.up(x).dtype
        compiled.inverse.unload()
        assert model.up(x).dtype == found


@EVERY
def test_rows_of_a_packed_matrix_are_a_site(name: str) -> None:
    model = quantised(name)
    plain = dense(model)
    spec = "match up[16:48] | up[48:96] apply dora(r=2)"
    pair = [surgery.compile(spec, m, seed=1) for m in (model, plain)]
    for compiled in pair:
        moved(compiled)
    close(model(X), plain(X))


def test_a_weight_that_a_processor_laid_out_anew_is_read() -> None:
    functional: Any = packed.functional
    for name in ("nf4", "nf4 nested"):
        layer: Any = FORMATS[name](128, 96).to("cpu")
        before, own = weight(layer), layer.weight
        data, state = functional._convert_weight_packed_for_cpu(own.data, own.quant_state)
        own.data = data
        close(weight(layer), before, 2**-8)  # of the scales bfloat16 keeps 8 bits
        assert state is own.quant_state
        assert state.packing_format_for_cpu
        assert torch.equal(own.data, data)


def test_8_bits_are_read_before_and_after_the_first_call() -> None:
    model = quantised("int8")
    before = weight(model.up)
    assert model.up.state.CB is None
    model(X)
    assert model.up.weight.CB is None
    assert torch.equal(weight(model.up), before)


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>:DeprecationWarning")
@pytest.mark.parametrize("name", ["nf4", "fp4 nested"])
@pytest.mark.parametrize("method", ["lora(r=3)", "dora(r=3)"])
def test_one_graph_is_compiled(name: str, method: str) -> None:
    model = quantised(name)
    adapted(model, method)
    expected = model(X)
    untyped._dynamo.reset()
    compiled: Any = untyped.compile(model, fullgraph=True, backend="eager")
    close(compiled(X), expected)


@EVERY
def test_copies_and_pickles_run(name: str) -> None:
    model = quantised(name)
    compiled = adapted(model, "dora(r=3)")
    expected = model(X)
    close(copy.deepcopy(model)(X), expected)
    close(pickle.loads(pickle.dumps(model))(X), expected)
    other = quantised(name)
    surgery.compile("match up | down apply dora(r=3)", other, seed=1)
    other.load_state_dict(model.state_dict(), strict=False)
    assert compiled.parameters().keys() == surgery.of(other).parameters().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_bias_beside_a_packed_weight_is_trained(name: str, dtype: torch.dtype) -> None:
    model = quantised(name)
    before = model.up.bias
    compiled = surgery.compile("match up apply lora(r=2) train up.bias", model, seed=1)
    moved(compiled)
    y = model.up(X.to(dtype))
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert len(trained(model)) == 3
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained(model).values())
    compiled.inverse.unload()
    assert model.up.bias is before


# ---------------------------------------------------------------------------------- selection


def mixed() -> Any:
    """One layer of 4 bits, one of 8."""
    model: Any = Block()
    model.up, model.down = FORMATS["nf4"](96, 160), eight(160, 96)
    return model.to("cpu").train()


@pytest.mark.parametrize(
    ("where", "paths"),
    [
        ("dtype == nf4", ["up"]),
        ("dtype == int8", ["down"]),
        ("type == Linear4bit", ["up"]),
        ("numel == 96 * 160", ["down", "up"]),
    ],
)
def test_a_condition_may_ask_how_a_weight_is_packed(where: str, paths: list[str]) -> None:
    plan = surgery.plan(f"match up | down where {where} apply lora(r=2)", mixed())
    assert sorted(site.path for site in plan.sites) == paths


def not_yet() -> nn.Module:
    return Block(FORMATS["nf4"])


def with_a_forward_of_its_own() -> nn.Module:
    class Other(packed.nn.Linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * packed.nn.Linear4bit.forward(self, x)

    model: Any = Block()
    model.up = Other(96, 160)
    return model.to("cpu")


@pytest.mark.parametrize(
    ("make", "spec", "reason"),
    [
        (not_yet, "match up apply lora(r=2)", "not quantised yet"),
        (mixed, "train up.weight", "reached by nothing but"),
        (with_a_forward_of_its_own, "match up apply lora(r=2)", "reached by nothing but"),
    ],
)
def test_what_cannot_be_a_site_is_refused(make: Make, spec: str, reason: str) -> None:
    with pytest.raises(SelectionError, match=reason) as caught:
        surgery.plan(spec, make())
    assert [d.code for d in caught.value.diagnostics] == ["E209"]


def test_a_gradient_of_a_packed_weight_is_not_observed() -> None:
    spec = "match up apply lora_ga(r=2)"
    model = quantised("nf4")
    with pytest.raises(StateError, match="quantised"):
        surgery.compile(spec, model, data=[(X,)])


def test_the_library_is_imported_only_for_its_layers() -> None:
    code = (
        "import sys, surgery, torch; m = torch.nn.Linear(3, 5);"
        "surgery.plan('match fc apply lora(r=1)', torch.nn.ModuleDict({'fc': m}));"
        "print('bitsandbytes' in sys.modules, 'surgery.integrations.bitsandbytes' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


# -------------------------------------------------------------------------------------- files


@EVERY
def test_an_adapter_goes_to_the_dense_model_and_back(name: str, tmp_path: Path) -> None:
    model = quantised(name)
    plain = dense(model)
    compiled = adapted(model, "dora(r=3)")
    expected = model(X)
    compiled.save(tmp_path / "packed")
    attached = surgery.attach(tmp_path / "packed", plain)
    close(plain(X), expected)
    attached.save(tmp_path / "plain")
    other = quantised(name)
    surgery.attach(tmp_path / "plain", other)
    assert torch.equal(other(X), expected)


def load(layer: Any, entries: dict[str, Tensor]) -> None:
    """As the library makes a layer of what files have."""
    own = {n.removeprefix("up."): t for n, t in entries.items()}
    codes = own.pop("weight")
    if "SCB" in own:
        layer.load_state_dict({"weight": codes, "SCB": own["SCB"], "bias": layer.bias})
    else:
        stats = {n.removeprefix("weight."): t for n, t in own.items()}
        layer.weight = packed.nn.Params4bit.from_prequantized(codes, stats, device="cpu")


@EVERY
def test_the_entries_of_a_file_are_read_and_made_again(name: str, tmp_path: Path) -> None:
    model = quantised(name)
    files.save_file(model.state_dict(), tmp_path / "model.safetensors")
    every = files.load_file(tmp_path / "model.safetensors")
    beside = entries_of("up.weight", every)
    own = {n: every[n] for n in ("up.weight", *beside)}
    assert {n for n in every if n.startswith("up.")} - own.keys() == {"up.bias"}
    found = quantiser().dequantised("up.weight", own)
    assert torch.equal(found, weight(model.up))
    assert entries_of("norm.weight", every) == ()

    again = quantiser().requantised("up.weight", own, found)
    assert {n: (t.dtype, t.shape) for n, t in again.items()} == {
        n: (t.dtype, t.shape) for n, t in own.items()
    }
    close(quantiser().dequantised("up.weight", again), found, 1e-3)
    twice = quantiser().requantised("up.weight", own, 2 * found)
    other = quantised(name)
    load(other.up, twice)
    close(weight(other.up), 2 * found, 1e-3)
    with pytest.raises(ValueError, match="of no quantised weight"):
        quantiser().dequantised(
            "up.weight", {n: t for n, t in own.items() if "absmax" not in n and "S" not in n}
        )


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "surgery.integrations.bitsandbytes_files", raising=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ArtifactError, match="bitsandbytes, which is not installed") as caught:
        quantiser()
    assert [d.code for d in caught.value.diagnostics] == ["E525"]


# ------------------------------------------------------------------------------------- merges

HOW = pytest.mark.parametrize("how", ["dequantize", "requantize", "separate"])


@EVERY
@HOW
@pytest.mark.parametrize("method", ["dora(r=3)", "oft(block_size=4)"])
def test_a_merge_is_undone_to_the_object(name: str, how: Any, method: str) -> None:
    model = quantised(name)
    model(X)
    before, kept, scales = bits(model), objects(model), model.up.weight.__dict__.copy()
    compiled = adapted(model, method)
    live = model(X).detach()
    compiled.inverse.merge(quantized=how)
    assert (type(model.up) is nn.Linear) is (how == "dequantize")
    if how == "requantize":
        assert 1e-3 < (model(X) - live).abs().max() / live.abs().max() < 0.5
    else:
        close(model(X).detach(), live)
    compiled.inverse.unmerge()
    assert torch.equal(model(X), live)
    compiled.inverse.unload()
    assert bits(model) == before
    assert objects(model) == kept
    assert all(model.up.weight.__dict__[n] is value for n, value in scales.items())


@EVERY
def test_what_is_quantised_again_is_reported(name: str) -> None:
    model = quantised(name)
    compiled = adapted(model, "lora(r=3)")
    exact = {n: weight(getattr(dense(model), n)) for n in ("up", "down")}
    plain = dense(model)
    beside = adapted(plain, "lora(r=3)")
    beside.inverse.merge()
    exact = {n: weight(getattr(plain, n)).detach() for n in ("up", "down")}
    report = compiled.inverse.merge(quantized="requantize")
    for site in report.sites:
        lost = (weight(getattr(model, site.path)) - exact[site.path]).abs().max()
        assert lost == pytest.approx(site.rounding.error, rel=1e-4)
    assert max(site.rounding.relative for site in report.sites) > 1e-3


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_merged_stays_a_plain_model(keep: bool) -> None:
    model = quantised("nf4").to(torch.bfloat16)
    x = X.to(torch.bfloat16)
    compiled = adapted(model, "lora(r=3)")
    live = model(x)
    compiled.inverse.merge(quantized="dequantize", undo="none")
    assert model.up.weight.dtype == model.norm.weight.dtype == torch.bfloat16
    close(model(x), live, 2**-5)
    if keep:
        compiled.inverse.unload(keep_merge=True)
        assert type(model.up) is nn.Linear
        assert "surgery" not in "".join(model.state_dict())


def test_rows_are_merged() -> None:
    for how in ("dequantize", "requantize", "separate"):
        model = quantised("nf4")
        before = bits(model)
        spec = "match up[16:48] | up[48:96] apply dora(r=2)"
        compiled = surgery.compile(spec, model, seed=1)
        moved(compiled)
        live = model(X).detach()
        compiled.inverse.merge(quantized=cast(Any, how))
        close(model(X).detach(), live, 0.5 if how == "requantize" else 1e-5)
        compiled.inverse.unload()
        assert bits(model) == before


def test_only_what_is_not_quantised_is_merged() -> None:
    model = mixed()
    model.down = nn.Linear(160, 96)
    compiled = adapted(model, "lora(r=3)")
    live, plain = model(X).detach(), type(model.down)
    compiled.inverse.merge(quantized="separate")
    assert type(model.down) is nn.Linear is not plain
    assert type(model.up) is not packed.nn.Linear4bit
    close(model(X).detach(), live)
    compiled.inverse.unmerge()
    assert torch.equal(model(X), live)


@pytest.mark.parametrize("how", ["dequantize", "requantize", "separate"])
def test_what_can_merge_is_merged_and_what_cannot_runs_on(how: Any) -> None:
    model = mixed()
    model.down = nn.Linear(160, 96)
    spec = "match * apply lora(r=3)\nmatch up apply bottleneck(r=2)"
    compiled = surgery.compile(spec, model)
    moved(compiled)
    live, before = model(X).detach(), bits(model)
    report = compiled.inverse.merge(quantized=how, partial=True)
    assert not any(site.path.endswith("call") for site in report.sites)
    assert compiled.status().beside == len(compiled.plan.sites) - len(report.sites)
    if how != "requantize":
        close(model(X).detach(), live)
    compiled.inverse.unmerge()
    assert bits(model) == before
    assert torch.equal(model(X), live)


@pytest.mark.parametrize(
    ("how", "code"),
    [("", "E424"), ("float", "E424"), ("dequantize", "E425"), ("requantize", "E425")],
)
def test_a_merge_is_told_what_becomes_of_quantised_weights(how: str, code: str) -> None:
    model = quantised("nf4")
    compiled = adapted(model, "lora(r=3)")
    live = model(X)
    with pytest.raises(StateError) as caught:
        compiled.inverse.merge(quantized=cast(Any, how or None), undo="algebraic")
    (found,) = caught.value.diagnostics
    assert found.code == code
    if code == "E424":
        assert all(word in found.hint for word in ("dequantize", "requantize", "separate"))
    assert torch.equal(model(X), live)


def test_a_copy_of_a_merged_model_is_unmerged() -> None:
    model = quantised("nf4 nested")
    compiled = adapted(model, "lora(r=3)")
    live = model(X).detach()
    compiled.inverse.merge(quantized="dequantize")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        surgery.of(other).inverse.unmerge()
        close(other(X).detach(), live)
