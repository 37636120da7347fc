"""A merge is exact: rounded once, undone to the bit, in any order, and edits are seen."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import bits, moved
from torch import Tensor, nn

import surgery
from surgery import merging
from surgery.errors import StateError
from surgery.merge_report import MergeReport

pytestmark = pytest.mark.usefixtures("corrected")
untyped = cast(Any, torch)

METHODS = (
    "lora(r=5)",
    "dora(r=5)",
    "miss(r=5)",
    "bone(r=5)",
    "vera(r=5)",
    "ia3()",
    "loha(r=3)",
    "oft(block_size=5)",
    "hra(r=4)",
    "hira(r=3)",
    "delora(r=3)",
    "glora(r=3)",
)
LAYERS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "linear": (nn.Linear, (35, 55)),
    "embedding": (nn.Embedding, (55, 35)),
    "conv1d": (nn.Conv1d, (5, 55, 7)),
    "conv2d": (nn.Conv2d, (5, 15, 1)),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def made(layer: str, dtype: torch.dtype, seed: int) -> nn.Module:
    kind, sizes = LAYERS[layer]
    untyped.manual_seed(seed)
    return nn.Sequential(kind(*sizes)).to(dtype)


def trained(compiled: surgery.Compiled, by: float, seed: int) -> None:
    """Move each parameter of all adapters; by how much is a factor of what is moved at most."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in compiled.adapters:
        for _, value in sorted(compiled.parameters(adapter).items()):
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                value.data.add_((by * noise).to(value.dtype))


@settings(max_examples=30)
@given(
    method=st.sampled_from(METHODS),
    layer=st.sampled_from(sorted(LAYERS)),
    dtype=st.sampled_from(DTYPES),
    by=st.sampled_from([1e-3, 1e-1, 1.0]),
    seed=st.integers(0, 99),
    block=st.sampled_from([64, 2**19]),
)
def test_merge_then_unmerge_is_the_base_to_the_bit(
    method: str, layer: str, dtype: torch.dtype, by: float, seed: int, block: int
) -> None:
    model = made(layer, dtype, seed)
    before = bits(model)
    compiled = surgery.compile(f"match * apply {method}", model)
    trained(compiled, by, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "BLOCK", block)
        for _ in range(2):
            compiled.inverse.merge(allow_nonfinite=True)
            compiled.inverse.unmerge()
    compiled.inverse.unload()
    assert bits(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_ten_rounds_change_nothing(method: str) -> None:
    model = made("linear", torch.bfloat16, 3)
    before = bits(model)
    compiled = surgery.compile(f"match * apply {method}", model)
    for turn in range(10):
        trained(compiled, 0.1, turn)
        compiled.inverse.merge(round="stochastic" if turn % 2 else "nearest", seed=turn)
        compiled.inverse.unmerge()
    compiled.inverse.unload()
    assert bits(model) == before


TARGETS = (
    ("lora(r=16)", 1e-2, 0.01),
    ("lora(r=16)", 1e-1, 0.05),
    ("dora(r=16)", 1e-2, 0.01),
    ("dora(r=16)", 1e-1, 0.05),
    ("miss(r=16)", 1e-2, 0.01),
    ("miss(r=16)", 1e-1, 0.05),
    ("oft(block_size=32)", 1e-1, 0.12),
    ("oft(block_size=32)", 0.3, 0.12),
    ("hra(r=8)", 1e-1, 0.12),
    ("boft(block_size=4)", 1e-1, 0.12),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "change", "share"), TARGETS)
def test_the_way_back_takes_few_bytes(
    method: str, change: float, share: float, dtype: torch.dtype
) -> None:
    """Of normally distributed weights of 1024 × 1024, at a change of a share of them."""
    untyped.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    nn.init.normal_(weight_of(model), std=0.02)
    model.to(dtype)
    before = bits(model)
    compiled = surgery.compile(f"match * apply {method}", model)
    report = merged_by(compiled, change)
    (site,) = report.sites
    assert site.way == "corrections"
    assert report.bytes == 2 * 1024 * 1024
    assert 0 < report.kept < share * report.bytes
    compiled.inverse.unload()
    assert bits(model) == before


def weight_of(model: nn.Module) -> Tensor:
    return cast(nn.Linear, cast(nn.Sequential, model)[0]).weight


def merged_by(compiled: surgery.Compiled, change: float) -> MergeReport:
    """Train an adapter until its weight differs from the base by such a share, and merge it."""
    start = {n: p.detach().clone() for n, p in compiled.parameters().items()}
    generator = torch.Generator().manual_seed(7)
    way = {n: torch.randn(p.shape, generator=generator) for n, p in sorted(start.items())}
    total = float(weight_of(compiled.model).detach().double().square().sum()) ** 0.5
    step = 1e-3
    for _ in range(4):
        for name, value in compiled.parameters().items():
            value.data.copy_(start[name] + step * way[name])
        report = compiled.inverse.merge()
        found = report.sites[0].rounding.squared_change ** 0.5 / total
        if abs(found / change - 1) < 0.05:
            return report
        compiled.inverse.unmerge()
        step *= change / found
    return compiled.inverse.merge()


# ------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_merged_is_the_exact_weight_rounded_once(method: str, dtype: torch.dtype) -> None:
    model = made("linear", dtype, 5)
    exact = copy.deepcopy(model).double()
    compiled = surgery.compile(f"match * apply {method}", model)
    reference = surgery.compile(f"match * apply {method}", exact, dtype=torch.float32)
    trained(compiled, 0.1, 5)
    for name, value in compiled.parameters().items():
        reference.parameters()[name].data.copy_(value)
    report = compiled.inverse.merge()
    reference.inverse.merge()
    wanted, found = weight_of(exact).detach(), weight_of(model).detach()
    error = (found.double() - wanted).abs()
    for way in (-torch.inf, torch.inf):  # no other number of the dtype is nearer
        other = torch.nextafter(found, torch.full_like(found, way))
        assert bool((error <= (other.double() - wanted).abs()).all())
    assert report.sites[0].rounding.error == pytest.approx(float(error.max()), rel=1e-6)


def test_by_chance_the_mean_is_exact() -> None:
    model = made("linear", torch.bfloat16, 5)
    compiled = surgery.compile("match * apply lora(r=5)", model)
    trained(compiled, 0.1, 5)
    exact = surgery.compile("match * apply lora(r=5)", copied_base(model), dtype=torch.float32)
    trained(exact, 0.1, 5)
    exact.inverse.merge()
    total = torch.zeros(55, 35, dtype=torch.float64)
    for seed in range(50):
        compiled.inverse.merge(round="stochastic", seed=seed)
        total += weight_of(model).detach().double()
        compiled.inverse.unmerge()
    wanted = weight_of(exact.model).detach()
    unit = torch.finfo(torch.bfloat16).eps * wanted.abs()
    assert bool(((total / 50 - wanted).abs() <= 0.45 * unit).all())


def copied_base(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    surgery.of(twin).inverse.unload()
    return twin.double()


def test_what_rounds_more_than_is_accepted_is_refused() -> None:
    model = made("linear", torch.bfloat16, 5)
    compiled = surgery.compile("match * apply lora(r=5)", model)
    trained(compiled, 0.1, 5)
    before = bits(model)
    with pytest.raises(StateError, match="E431"):
        compiled.inverse.merge(max_rel_err=1e-6)
    assert bits(model) == before
    assert not compiled.merged
    compiled.inverse.merge(max_rel_err=1e-2)


def test_what_leaves_the_range_is_refused_unless_wanted() -> None:
    model = made("linear", torch.float16, 5)
    compiled = surgery.compile("match * apply lora(r=5)", model)
    trained(compiled, 1e3, 5)
    before = bits(model)
    with pytest.raises(StateError, match="E430") as caught:
        compiled.inverse.merge()
    assert "beyond the range" in str(caught.value)
    assert bits(model) == before
    report = compiled.inverse.merge(allow_nonfinite=True)
    assert report.sites[0].rounding.overflowed > 0
    compiled.inverse.unmerge()
    assert bits(model) == before


# ---------------------------------------------------------------------------------------- order


def several(*methods: str) -> tuple[nn.Module, surgery.Compiled]:
    model = made("linear", torch.bfloat16, 5)
    for name, method in zip("abc", methods, strict=False):
        surgery.compile(f"adapter {name} {{ match * apply {method} }}", model)
    compiled = surgery.of(model)
    trained(compiled, 0.1, 5)
    return model, compiled


@settings(max_examples=12)
@given(
    there=st.permutations("abc"),
    back=st.permutations("abc"),
    methods=st.permutations(["lora(r=5)", "oft(block_size=5)", "ia3()", "hira(r=3)"]),
)
def test_merged_in_any_order_and_unmerged_in_any_other(
    there: list[str], back: list[str], methods: list[str]
) -> None:
    model, compiled = several(*methods[:3])
    base = bits(model)
    compiled.activate("a + b + c")
    compiled.inverse.merge()
    whole = weight_of(model).detach().clone()
    compiled.inverse.unmerge()
    compiled.activate(None)
    for name in there:
        compiled.inverse.merge(name)
    assert torch.equal(weight_of(model), whole)
    for place, name in enumerate(back):
        compiled.inverse.unmerge(name)
        assert compiled.merged == (place < 2)
    assert bits(model) == base


def test_an_adapter_is_merged_once() -> None:
    model, compiled = several("lora(r=5)", "dora(r=5)")
    compiled.inverse.merge("a")
    before = bits(model)
    for again in (None, "a"):
        with pytest.raises(StateError, match="E402"):
            compiled.inverse.merge(again)
    compiled.inverse.merge("b")
    assert compiled.live == "a + b"
    with pytest.raises(StateError, match="E402"):
        compiled.inverse.merge("a")
    compiled.inverse.unmerge("b")
    assert bits(model) == before
    with pytest.raises(StateError, match="E406"):
        compiled.inverse.unmerge("b")


def test_what_another_was_made_on_is_not_taken_out_alone() -> None:
    model, compiled = several("lora(r=5)", "oft(block_size=5)")
    base = bits(model)
    compiled.activate("a then b")
    compiled.inverse.merge()
    merged = bits(model)
    with pytest.raises(StateError, match="E432"):
        compiled.inverse.unmerge("a")
    assert bits(model) == merged
    compiled.inverse.unmerge("b")
    assert compiled.live == "a"
    compiled.inverse.unmerge("a")
    assert bits(model) == base


def test_what_cannot_be_merged_beside_leaves_what_is_merged() -> None:
    model, compiled = several("lora(r=5)", "lora(r=3)")
    compiled.inverse.merge("a")
    with torch.no_grad():
        compiled.parameters("b")["0.surgery.b.B"].fill_(torch.inf)
    before = bits(model)
    with pytest.raises(StateError, match="E430"):
        compiled.inverse.merge("b")
    assert bits(model) == before
    assert compiled.live == "a"
    assert compiled.merged


# ---------------------------------------------------------------------------------------- edits


@pytest.mark.parametrize("method", ["lora(r=5)", "oft(block_size=5)", "hira(r=3)"])
def test_a_weight_that_was_changed_is_not_taken_for_the_merged_one(method: str) -> None:
    model = made("linear", torch.bfloat16, 5)
    compiled = surgery.compile(f"match * apply {method}", model)
    moved(compiled)
    compiled.inverse.merge()
    with torch.no_grad():
        weight_of(model)[3, 5] += 1
    before = bits(model)
    for undo in (compiled.inverse.unmerge, compiled.inverse.unload):
        with pytest.raises(StateError, match="E428"):
            undo()
    assert bits(model) == before
    assert compiled.merged
    compiled.inverse.unload(keep_merge=True)


def test_an_adapter_that_was_changed_does_not_lead_back() -> None:
    model = made("linear", torch.bfloat16, 5)
    base = bits(model)
    compiled = surgery.compile("match * apply lora(r=5)", model)
    moved(compiled)
    compiled.inverse.merge()
    kept = {n: p.detach().clone() for n, p in compiled.parameters().items()}
    merged = bits(model)
    moved(compiled)
    with pytest.raises(StateError, match="E429") as caught:
        compiled.inverse.unmerge()
    assert "parameters" in str(caught.value)
    assert compiled.merged
    for name, value in compiled.parameters().items():
        value.data.copy_(kept[name])
    assert bits(model) == merged
    compiled.inverse.unload()
    assert bits(model) == base


def test_a_merge_holds_no_second_copy() -> None:
    model = made("linear", torch.bfloat16, 5)
    before = cast(nn.Parameter, weight_of(model))
    compiled = surgery.compile("match * apply lora(r=5)", model)
    moved(compiled)
    compiled.inverse.merge()
    state = vars(model)["_surgery_state"].merged["0"]
    assert state.weight is None
    assert state.released.parameter() is before
    compiled.inverse.unmerge()
    assert weight_of(model) is before
    del before
    compiled.inverse.merge()
    assert vars(model)["_surgery_state"].merged["0"].released.parameter() is None


def test_the_bits_of_products_on_the_way_back_are_part_of_what_is_kept() -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    assert [merging.bits_of(dtype) for dtype in dtypes] == [24, 34, 34, 54]
