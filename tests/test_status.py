"""Live, trained and merged: each is stated, none moves another, and what does not agree is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import surgery
from surgery.errors import StateError
from surgery.model.holder import parameters_of
from surgery.placement import check_placed
from surgery.state import require_state
from surgery.status import Status, status
from surgery.trainable import set_trainable, trainable

untyped: Any = torch


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(7, 5)
        self.k = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.k(torch.tanh(self.q(x)))


SPEC = """
adapter a { match q apply lora(r=2) }
adapter b { match k apply vera(r=11)  train q.bias }
adapter c { match /q|k/ apply bone(r=1) }
"""


def made(spec: str = SPEC) -> surgery.Compiled:
    untyped.manual_seed(0)
    return surgery.compile(spec, Net().eval())


def codes(told: Status) -> list[str]:
    return [found.code for found in told.findings]


def holder(compiled: surgery.Compiled, path: str) -> Any:
    return compiled.model.get_submodule(path)


# -------------------------------------------------------------------------------- what is stated


def test_the_numbers_are_those_of_the_plan_and_of_the_tensors() -> None:
    compiled = made()
    told = status(compiled.model)
    assert [one.name for one in told.adapters] == [*compiled.adapters]
    for one in told.adapters:
        tensors = compiled.parameters(one.name).values()
        assert one.total == sum(t.numel() for t in tensors)
        assert one.bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert sum(one.trained for one in told.adapters) == compiled.plan.trainable == told.learning
    assert sum(one.total for one in told.adapters) == compiled.plan.total
    assert (told.base, told.base_bytes) == (compiled.plan.base_count, compiled.plan.base_bytes)
    a, b, c = told.adapters
    assert (a.methods, b.methods, c.methods) == (("lora",), ("vera", "trained"), ("bone",))
    assert (a.sites, b.sites, c.sites) == (1, 2, 2)
    assert a.trained == a.total == 2 * 7 + 5 * 2
    assert b.total > b.trained == 11 + 3 + 5
    assert {one.dtypes for one in told.adapters} == {("float32",)}
    assert {one.devices for one in told.adapters} == {("cpu",)}


def test_the_table_has_what_is_stated() -> None:
    compiled = made()
    compiled.activate("0.5*a + b")
    set_trainable(compiled.model, ["a", "c"])
    text = str(status(compiled.model))
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert "live trained" in rows["a"]
    assert "live frozen" in rows["b"]
    assert "trained" in rows["c"]
    assert "live" not in rows["c"]
    assert "live: 0.5*a + b; evaluation mode" in text
    assert "trained: a, c; " in text
    compiled.inverse.merge()
    assert "live merged frozen" in str(status(compiled.model))
    assert "live: 0.5*a + b, merged into the weights" in str(status(compiled.model))
    compiled.inverse.unmerge()
    compiled.activate(None)
    assert "live: none, the base alone" in str(status(compiled.model))


def test_it_is_plain_data() -> None:
    compiled = made()
    compiled.model.train()
    data: Any = status(compiled.model).as_json()
    assert json.loads(json.dumps(data)) == data
    assert data["live"] == "a"
    assert [one["name"] for one in data["adapters"]] == ["a", "b", "c"]
    assert data["adapters"][1]["methods"] == ["vera", "trained"]
    assert [one["code"] for one in data["findings"]] == ["E455", "E455"]


def test_tied_weights_of_the_base_count_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(13, 7), "head": nn.Linear(7, 13, bias=False)})
    whole: Any = model
    whole["head"].weight = whole["embed"].weight
    compiled = surgery.compile("match head apply lora(r=2) share", model)
    assert status(compiled.model).base == 13 * 7


def test_a_model_without_adapters_has_no_status() -> None:
    calls: list[Callable[[nn.Module], object]] = [
        status,
        trainable,
        lambda model: set_trainable(model, []),
    ]
    for call in calls:
        with pytest.raises(StateError) as caught:
            call(Net())
        assert caught.value.diagnostics[0].code == "E401"


# -------------------------------------------------------------------------- three separate states

ADAPTERS = ("a", "b", "c")
MOVES = st.one_of(
    st.tuples(st.just("live"), st.sampled_from([None, *ADAPTERS, "a + c", "0.5*a - b"])),
    st.tuples(st.just("train"), st.lists(st.sampled_from(ADAPTERS), unique=True)),
    st.tuples(st.just("merge"), st.none()),
    st.tuples(st.just("mode"), st.booleans()),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(MOVES, max_size=6))
def test_none_of_the_states_moves_another(moves: list[tuple[str, Any]]) -> None:
    compiled = made()
    live, trained, merged = "a", [*ADAPTERS], False
    for move, value in moves:
        match move:
            case "live" if not merged:
                compiled.activate(value)
                live = value
            case "train":
                set_trainable(compiled.model, value)
                trained = [name for name in ADAPTERS if name in value]
            case "merge" if live is not None:
                (compiled.inverse.unmerge if merged else compiled.inverse.merge)()
                merged = not merged
            case "mode":
                compiled.model.train(value)
            case _:
                continue
        told = status(compiled.model)
        assert (told.live, told.merged, [*told.trainable]) == (live, merged, trained)
        assert trainable(compiled.model) == told.trainable
        assert told.training == compiled.model.training
        every = {n for name in trained for n in compiled.parameters(name)}
        flags = {n for n, p in compiled.model.named_parameters() if p.requires_grad}
        assert flags <= every
        assert {one.name for one in told.adapters if one.learning} == {*trained}
        assert {one.name for one in told.adapters if one.learning == one.trained} >= {*trained}
        assert not told.findings or told.training


def test_a_frozen_adapter_gets_no_gradient_and_a_trained_one_does() -> None:
    compiled = made()
    compiled.activate("a + c")
    set_trainable(compiled.model, ["c"])
    compiled.model(torch.ones(2, 7)).sum().backward()
    with_gradients = {n for n, p in compiled.model.named_parameters() if p.grad is not None}
    assert with_gradients == {n for n in compiled.parameters("c")}


def test_what_no_method_trains_stays_frozen() -> None:
    compiled = made()
    set_trainable(compiled.model, ["b"])
    told = status(compiled.model)
    assert told.learning == told.adapters[1].trained < told.adapters[1].total
    assert told.findings == ()


def test_names_that_there_are_not_change_nothing() -> None:
    compiled = made()
    set_trainable(compiled.model, ["b"])
    with pytest.raises(StateError) as caught:
        set_trainable(compiled.model, ["a", "d", "e"])
    assert [found.code for found in caught.value.diagnostics] == ["E411", "E411"]
    assert trainable(compiled.model) == ("b",)


def test_what_a_thread_chose_is_said_beside_the_default() -> None:
    compiled = made()
    set_trainable(compiled.model, ["b", "c"])
    compiled.model.train()
    assert codes(status(compiled.model)) == ["E454", "E455", "E455"]
    with compiled.using("b + c"):
        told = status(compiled.model)
        assert (told.live, told.here) == ("a", "b + c")
        assert codes(told) == ["E454"]
        assert "live in this thread: b + c" in str(told)
    with compiled.route(["c", None, "c"]):
        told = status(compiled.model)
        assert told.here == "c ×2, none ×1"
        assert codes(told) == ["E454", "E455"]
    assert status(compiled.model).here is None


def test_frozen_for_inference_is_another_word() -> None:
    compiled = made()
    assert not status(compiled.model).frozen
    with compiled.frozen():
        told = status(compiled.model)
        assert told.frozen
        assert told.trainable == ADAPTERS
        assert "frozen for inference" in str(told)


# ------------------------------------------------------------------------------ what does not agree


def _half(compiled: surgery.Compiled) -> None:
    values = holder(compiled, "q.surgery.a")
    values.A.data = values.A.data.half()


def _base(compiled: surgery.Compiled) -> None:
    whole: Any = compiled.model
    whole.k.bias.requires_grad_(True)


def _some(compiled: surgery.Compiled) -> None:
    holder(compiled, "q.surgery.a").B.requires_grad_(False)


def _fixed(compiled: surgery.Compiled) -> None:
    for name, p in compiled.model.named_parameters():
        if ".shared." in name:
            p.requires_grad_(True)


def _live_and_frozen(compiled: surgery.Compiled) -> None:
    set_trainable(compiled.model, [])
    compiled.model.train()


def _trained_and_not_live(compiled: surgery.Compiled) -> None:
    set_trainable(compiled.model, ["c"])
    compiled.activate(None)
    compiled.model.train()


def _trained_and_merged(compiled: surgery.Compiled) -> None:
    set_trainable(compiled.model, ["a"])
    compiled.inverse.merge()
    compiled.model.train()


FAULTS = {
    "E453": _half,
    "E454": _live_and_frozen,
    "E455": _trained_and_not_live,
    "E456": _base,
    "E458": _some,
    "E459": _trained_and_merged,
}


@pytest.mark.parametrize("code", FAULTS)
def test_what_does_not_agree_is_said_and_refused_where_that_is_asked(code: str) -> None:
    compiled = made()
    assert status(compiled.model).findings == ()
    status(compiled.model).check()
    FAULTS[code](compiled)
    told = status(compiled.model)
    assert codes(told) == [code]
    (found,) = told.findings
    assert found.severity == "warning"
    assert found.hint
    assert str(found) in str(told)
    with pytest.raises(StateError, match=found.message.partition("`")[0] or "`"):
        told.check()


def test_several_findings_are_all_said() -> None:
    compiled = made()
    for fault in (_half, _base, _some, _fixed):
        fault(compiled)
    assert sorted(codes(status(compiled.model))) == ["E453", "E456", "E458", "E458"]


def test_train_only_mends_what_is_frozen_in_part() -> None:
    compiled = made()
    _some(compiled)
    set_trainable(compiled.model, ADAPTERS)
    assert status(compiled.model).findings == ()


def test_a_model_that_was_cast_agrees() -> None:
    compiled = made()
    compiled.model.double()
    told = status(compiled.model)
    assert told.findings == ()
    assert {one.dtypes for one in told.adapters} == {("float64",)}


def test_a_base_of_two_dtypes_has_adapters_of_two() -> None:
    model = Net()
    model.k.double()
    compiled = surgery.compile("match /q|k/ apply lora(r=2)", model)
    told = status(compiled.model)
    assert told.adapters[0].dtypes == ("float32", "float64")
    assert told.findings == ()


# ---------------------------------------------------------------------------------------- devices


def elsewhere(compiled: surgery.Compiled, *paths: str) -> None:
    """Let what is below some holders be on a device that this machine need not have."""
    with FakeTensorMode():
        for path in paths:
            own = parameters_of(compiled.model.get_submodule(path))
            for name, p in own.items():
                assert p is not None
                moved = torch.empty(p.shape, device="cuda")
                own[name] = nn.Parameter(moved, requires_grad=p.requires_grad)


def test_an_adapter_on_another_device_is_found_where_it_is_made_live() -> None:
    compiled = made()
    elsewhere(compiled, "q.surgery.c", "k.surgery.c")
    told = status(compiled.model)
    assert codes(told) == ["E451"]
    assert "`c` is on cuda:0 at `q` and 1 more, which runs on cpu" in told.findings[0].message
    assert "model.to('cpu')" in told.findings[0].hint
    assert told.adapters[2].devices == ("cuda:0",)
    state = require_state(compiled.model)
    check_placed(compiled.model, state.sites, state.plans)  # what is live is where it runs
    with pytest.raises(StateError) as caught:
        check_placed(compiled.model, state.adapters["c"].sites, state.plans)
    assert [found.code for found in caught.value.diagnostics] == ["E451"]


def test_what_sites_share_is_on_one_device() -> None:
    """The first site's, which is not where all of them run."""
    compiled = made("match /q|k/ apply vera(r=3)")
    elsewhere(compiled, "surgery.default.shared.vera")
    (found,) = status(compiled.model).findings
    assert found.message.startswith("what the sites of `default` share is on cuda:0 at `q` and 1")
    assert "on one device" in found.hint


def test_a_mix_is_looked_at_adapter_by_adapter() -> None:
    compiled = made()
    compiled.activate("a + c")
    elsewhere(compiled, "q.surgery.a", "k.surgery.c")
    state = require_state(compiled.model)
    with pytest.raises(StateError) as caught:
        check_placed(compiled.model, state.sites, state.plans)
    messages = [found.message for found in caught.value.diagnostics]
    assert [message.split()[0] for message in messages] == ["`a`", "`c`"]


def test_what_waits_for_its_base_is_said_once_the_base_is_there() -> None:
    with torch.device("meta"):
        model = Net()
    compiled = surgery.compile(SPEC, model)
    compiled.model.eval()
    assert status(compiled.model).findings == ()
    state = require_state(compiled.model)
    check_placed(compiled.model, state.sites, state.plans)
    compiled.model.to_empty(device="cpu")
    assert codes(status(compiled.model)) == ["E451", "E451", "E451"]
    compiled.materialize()
    assert status(compiled.model).findings == ()
