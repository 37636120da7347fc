"""The same spec and seed begin the same way, whatever the order, the place or the occasion."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import surgery

untyped = cast(Any, torch)  # for calls whose stubs are not fully typed

STATEMENTS = (
    "match table apply lora(r=5)",
    "match first apply dora(r=3, dropout=0.1)",
    "match middle apply vera(r=5)",
    "match last apply bone(r=5)",
    "match image apply oft(block_size=6)",
    "match grouped apply lora(r=2, rslora=true)",
)
SPEC = "\n".join(STATEMENTS)

MakeNet = Callable[[torch.dtype], nn.Module]


def adapters(spec: str, model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    return surgery.compile(spec, model, seed=seed).parameters()


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_the_seed_decides(make_net: MakeNet) -> None:
    one, again = (adapters(SPEC, make_net(torch.float32), 7) for _ in range(2))
    other = adapters(SPEC, make_net(torch.float32), 8)
    assert same(one, again)
    drawn = {n for n in one if not torch.equal(one[n], other[n])}
    # What VeRA shares is drawn from its own key, and all else of it is constant.
    assert drawn == {n for n in one if n.endswith(".A") and "shared" not in n}


@settings(max_examples=10)
@given(order=st.permutations(STATEMENTS))
def test_the_order_of_statements_does_not_matter(order: list[str]) -> None:
    untyped.manual_seed(1)
    layers = {name: nn.Linear(6, 12) for name in ("table", "first", "middle", "last", "image")}
    model = nn.ModuleDict({**layers, "grouped": nn.Linear(12, 6)})
    twin = copy.deepcopy(model)
    assert same(adapters(SPEC, model), adapters("\n".join(order), twin))


def test_no_global_generator_is_touched(make_net: MakeNet) -> None:
    model = make_net(torch.float32)
    before, python = torch.get_rng_state(), random.getstate()
    compiled = surgery.compile(SPEC, model)
    compiled.inverse.merge()
    compiled.inverse.unmerge()
    compiled.inverse.unload()
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python


def test_what_is_selected_beside_does_not_matter(make_net: MakeNet) -> None:
    alone = adapters(STATEMENTS[0], make_net(torch.float32))
    together = adapters(SPEC, make_net(torch.float32))
    assert all(torch.equal(together[name], tensor) for name, tensor in alone.items())


def test_another_dtype_rounds_the_same_draw(make_net: MakeNet) -> None:
    narrow = adapters(STATEMENTS[0], make_net(torch.bfloat16))
    wide = adapters(STATEMENTS[0], make_net(torch.float64))
    for name, tensor in narrow.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.double(), wide[name])


def assigned(model: nn.Module, weights: dict[str, Tensor]) -> None:
    model.load_state_dict(weights, strict=False, assign=True)


def emptied_and_filled(model: nn.Module, weights: dict[str, Tensor]) -> None:
    model.to_empty(device="cpu")
    model.load_state_dict(weights, strict=False)


@pytest.mark.parametrize("load", [assigned, emptied_and_filled])
@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_model_on_meta_begins_as_a_real_one(
    statement: str, load: Callable[[nn.Module, dict[str, Tensor]], None], make_net: MakeNet
) -> None:
    real = make_net(torch.float32)
    later = copy.deepcopy(real).to("meta")
    wanted = adapters(statement, copy.deepcopy(real))
    compiled = surgery.compile(statement, later)
    assert all(t.is_meta for t in compiled.parameters().values())
    load(later, real.state_dict())
    compiled.materialize()
    assert same(compiled.parameters(), wanted)
    flags = {n: p.requires_grad for n, p in later.named_parameters() if "surgery" in n}
    assert all(flags[n] == (n.split(".")[-1] not in "AB" or "shared" not in n) for n in flags)
