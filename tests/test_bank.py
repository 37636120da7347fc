"""Adapters in stacked tensors: one compiled graph for every choice, and which adapters have one."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import language_model
from support import moved
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import surgery
from surgery.errors import SurgeryError
from surgery.families import Family, family_of, filled, values_of
from surgery.site_class import SiteClass

untyped: Any = torch

TOKENS = (torch.arange(12) * 7 % 61).view(4, 3)
LOW, HIGH = "q_proj | up_proj", "v_proj | q_proj"
TEN = {
    "a": ("lora(r=3)", LOW),
    "b": ("dora(r=2)", LOW),
    "c": ("oft(block_size=4)", HIGH),
    "d": ("ia3()", HIGH),
    "e": ("bone(r=4)", LOW),
    "f": ("lora(r=5, alpha=2)", HIGH),
    "g": ("dora(r=3, alpha=7)", "q_proj"),
    "h": ("oft(block_size=4)", LOW),
    "i": ("ia3()", LOW),
    "j": ("bone(r=4)", "v_proj"),
}
OTHERS = {
    "a": ("lora(r=7, alpha=3)", HIGH),
    "f": ("lora(r=1)", LOW),
    "g": ("dora(r=8)", "q_proj"),
    "d": ("ia3()", LOW),
}


def llama() -> nn.Module:
    return language_model(num_hidden_layers=1)


def built(adapters: dict[str, tuple[str, str]], model: nn.Module) -> surgery.Compiled:
    for name, (call, where) in adapters.items():
        moved(surgery.compile(f"adapter {name} {{ match {where} apply {call} }}", model), name)
    return surgery.of(model)


def logits(compiled: surgery.Compiled) -> Tensor:
    with torch.no_grad():
        return cast(Any, compiled.model)(TOKENS).logits


def alone(compiled: surgery.Compiled, live: str | None) -> Tensor:
    with compiled.using(live):
        return logits(compiled)


def refused(code: str, call: Callable[[], object]) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        call()
    assert code in {d.code for d in caught.value.diagnostics}
    return caught.value


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------ one graph for all


def test_a_hundred_random_changes_compile_nothing(tmp_path: Path) -> None:
    compiled = built(TEN, llama())
    other = built(OTHERS, llama())
    for name in OTHERS:
        other.save(tmp_path / name, name)
    bank = compiled.reserve(8, terms=2, batch=6)
    assert bank.left == {}
    compiled.activate(None)
    counter = CompileCounter()
    untyped._dynamo.reset()
    run: Any = untyped.compile(compiled.model, backend=counter, fullgraph=True)

    def check() -> None:
        with torch.no_grad():
            assert close(run(TOKENS).logits, logits(compiled))

    check()
    with torch.no_grad():
        assert torch.equal(run(TOKENS).logits, alone(compiled, None))
    choose = random.Random(0)
    names: list[str | None] = [*TEN, None]
    for step in range(100):
        one, two = choose.choice(names), choose.choice(names)
        match step % 5:
            case 0:
                compiled.activate(one)
                check()
            case 1:
                with compiled.using(f"{choose.random():.3f} * {one or 'none'}"):
                    check()
            case 2:
                with compiled.route([choose.choice(names) for _ in range(4)]):
                    check()
            case 3:
                with compiled.using(f"{one or 'none'} - 0.5 * {two or 'none'}"):
                    check()
            case _:
                name = choose.choice(sorted(OTHERS))
                compiled.hotswap(name, tmp_path / name)
                with compiled.using(name), torch.no_grad():
                    assert close(run(TOKENS).logits, alone(other, name))
    assert counter.frame_count == 1
    compiled.activate(None)
    compiled.delete("b")
    compiled.rename("e", "epsilon")
    with compiled.using("epsilon"):
        check()
    built({"k": ("lora(r=2)", LOW)}, compiled.model)
    with compiled.using("k"):
        check()
    assert counter.frame_count == 1


def test_what_is_stacked_is_the_adapter_itself(tmp_path: Path) -> None:
    compiled = built(TEN, llama())
    wanted = {name: alone(compiled, name) for name in TEN}
    held = {key: id(tensor) for key, tensor in compiled.model.named_parameters()}
    compiled.reserve(8)
    assert {key: id(tensor) for key, tensor in compiled.model.named_parameters()} == held
    for name in TEN:
        assert torch.equal(alone(compiled, name), wanted[name])
        compiled.save(tmp_path / name, name)
        assert torch.equal(alone(surgery.attach(tmp_path / name, llama()), name), wanted[name])
    compiled.activate("b")
    compiled.inverse.merge()
    assert close(logits(compiled), wanted["b"])
    compiled.inverse.unmerge()
    assert torch.equal(logits(compiled), wanted["b"])
    own = [p for key, p in compiled.model.named_parameters() if ".surgery.b." in key]
    optimizer: Any = torch.optim.SGD(own, lr=0.1)
    untyped.autograd.backward(cast(Any, compiled.model)(TOKENS).logits.square().sum())
    optimizer.step()  # in place, so the stacks have what was trained
    untyped._dynamo.reset()
    run: Any = untyped.compile(compiled.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert not close(logits(compiled), wanted["b"])
        assert close(run(TOKENS).logits, logits(compiled))
    compiled.inverse.unload()
    assert not [key for key in compiled.model.state_dict() if ".surgery." in key]


def test_what_has_no_place_runs_by_its_text(tmp_path: Path) -> None:
    untyped.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(12, 20)), torch.randn(2, 3, 12)
    calls = {"a": "lora(r=9)", "v": "vera(r=3)", "b": "dora(r=2)"}
    for name, call in calls.items():
        moved(surgery.compile(f"adapter {name} {{ match * apply {call} }}", net), name)
    compiled = surgery.of(net)
    bank = compiled.reserve(8, adapters=2)
    assert set(bank.left) == {"v"}
    assert "shares" in str(bank)
    surgery.compile("adapter d { match * apply ia3() }", net)
    assert "numbers are taken" in bank.left["d"]
    untyped._dynamo.reset()
    run: Any = untyped.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        for live in ("v", "b", "d", "a", "a + b"):
            with compiled.using(live):
                assert close(run(x), net(x))
    other = surgery.compile("match * apply bone(r=4)", nn.Sequential(nn.Linear(12, 20)))
    other.save(tmp_path / "bone")
    assert "no place" in str(refused("E439", lambda: compiled.hotswap("b", tmp_path / "bone")))
    refused("E445", lambda: compiled.reserve(0))
    with compiled.using("b"):
        refused("E445", lambda: compiled.reserve(8))


def test_nothing_is_left_of_what_came_and_went(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8))
    surgery.compile("adapter a { match 0 apply lora(r=2) }", net)
    compiled = surgery.compile("adapter b { match 1 apply lora(r=2) }", net)
    compiled.reserve(4)

    def fail(*_: object) -> None:
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr("surgery.reserving.link", fail)  # when all else has been done
        with pytest.raises(RuntimeError, match="no"):
            surgery.compile("adapter c { match * apply ia3() }", net)
    assert compiled.adapters == ("a", "b")
    refused("E411", lambda: compiled.activate("c"))
    compiled.delete("b")
    compiled.inverse.unload()
    assert all(type(layer) is nn.Linear for layer in net)
    assert not any("surgery" in name for layer in net for name in vars(layer))


def test_a_bank_refuses_what_is_no_batch() -> None:
    net = nn.Sequential(nn.Linear(12, 20))
    compiled = surgery.compile("match * apply lora(r=2)", net)
    compiled.reserve(4, batch=3)
    untyped._dynamo.reset()
    for shape in ((2, 12), (4, 5, 12)):
        run: Any = untyped.compile(net, backend="eager")
        with torch.no_grad(), pytest.raises(Exception, match="E444"):
            run(torch.ones(shape))


# ------------------------------------------------------------------------------------ families


def form_of(call: str) -> SiteClass:
    spec = f"match * apply {call}"
    return surgery.plan(spec, nn.Sequential(nn.Linear(24, 20))).sites[0].form


RANKED = ["lora", "dora", "loha", "hra", "delora", "pissa", "kasa", "mica"]


@pytest.mark.parametrize("method", RANKED)
@settings(max_examples=6)
@given(r=st.integers(1, 11), other=st.integers(1, 11))
def test_ranks_of_one_method_are_one_family(method: str, r: int, other: int) -> None:
    if method == "hra":
        r, other = 2 * r, 2 * other
    family = family_of(form_of(f"{method}(r={r})"), 22)
    assert isinstance(family, Family)
    assert values_of(family, form_of(f"{method}(r={other})")) is not None
    large = family.form.shapes
    for name, shape in form_of(f"{method}(r={other})").shapes.items():
        full = filled(torch.ones(shape), large[name])
        assert tuple(full.shape) == large[name]
        assert full.sum() == torch.ones(shape).sum()


@settings(max_examples=25)
@given(alpha=st.integers(1, 64), r=st.integers(1, 16), root=st.booleans())
def test_the_numbers_of_a_member_are_its_own(alpha: int, r: int, root: bool) -> None:
    family = family_of(form_of("lora(r=4)"), 16)
    assert isinstance(family, Family)
    flag = "true" if root else "false"
    values = values_of(family, form_of(f"lora(r={r}, alpha={alpha}, rslora={flag})"))
    assert values is not None
    (value,) = values.values()
    assert value == pytest.approx(alpha / (r**0.5 if root else r))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("lora(r=4)", "dora(r=4)"),
        ("lora(r=4)", "lora(r=17)"),
        ("lora(r=4)", "lora(r=4, bias=true)"),
        ("bone(r=4)", "bone(r=5)"),  # other columns, not other zeros
        ("oft(block_size=4)", "oft(block_size=6)"),
        ("ia3()", 'ia3(side="in")'),
    ],
)
def test_what_computes_otherwise_is_no_member(one: str, other: str) -> None:
    family = family_of(form_of(one), 16)
    assert isinstance(family, Family)
    assert values_of(family, form_of(one)) is not None
    assert values_of(family, form_of(other)) is None


@pytest.mark.parametrize("call", ["vera(r=3)", "fourierft(n_frequency=5)"])
def test_why_there_is_no_family_is_said(call: str) -> None:
    assert isinstance(family_of(form_of(call), 16), str)


def test_a_model_that_was_moved_is_seen_before_it_runs_what_it_was() -> None:
    net = nn.Sequential(nn.Linear(12, 20))
    compiled = surgery.compile("match * apply lora(r=2)", net)
    compiled.reserve(4, batch=3)
    net.double()

    def used() -> None:
        with compiled.using("default"):
            pass

    for choose in (used, lambda: compiled.activate("default"), lambda: compiled.activate(None)):
        with pytest.raises(SurgeryError) as caught:
            choose()
        assert [d.code for d in caught.value.diagnostics] == ["E449"]
    compiled.reserve(4, batch=3)
    used()
    net.float()
    compiled.inverse.unload()  # for which nothing needs to be chosen
