"""What an adapted graph is besides what it computes: its copies, its code, the way back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx, nn

import surgery
from surgery.errors import SurgeryError

# torch's own, when it copies how a program is called.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

Make = Callable[[], Any]
AsGraph = Callable[[str], Any]
Train = Callable[[nn.Module], None]

SPEC = "match kernel | square | head | layers.* apply lora(r=2)"
FORMS = ("traced", "graph of a program")


@pytest.mark.parametrize("form", FORMS)
def test_unload_gives_back_the_very_graph_class_and_code(
    form: str, as_graph: AsGraph, image: Tensor, train: Train
) -> None:
    model = as_graph(form)
    graph, code, cls, base = model.graph, model.code, model.__class__, model(image)
    tensors = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    compiled = surgery.compile(SPEC, model)
    assert isinstance(model, fx.GraphModule)
    assert "surgery" in model.code
    train(model)
    compiled.inverse.merge()
    assert "surgery" not in model.code
    compiled.inverse.unload()
    assert model.graph is graph
    assert (model.code, type(model)) == (code, cls)
    assert torch.equal(model(image), base)
    assert {name: (p, p.requires_grad) for name, p in model.named_parameters()} == tensors
    assert [n for n in vars(model) if "surgery" in n] == []


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_has_all_adapters_and_a_life_of_its_own(
    form: str, as_graph: AsGraph, image: Tensor, train: Train
) -> None:
    model = as_graph(form)
    base = model(image)
    compiled = surgery.compile(f"{SPEC} adapter b {{ match square apply dora(r=3) }}", model)
    train(model)
    wanted = model(image)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(image), wanted)
    other = surgery.of(copied)
    other.activate("b")
    assert not torch.equal(copied(image), wanted)
    other.activate("default")
    other.inverse.merge()
    torch.testing.assert_close(copied(image), wanted)
    assert torch.equal(other.inverse.unload()(image), base)
    assert torch.equal(model(image), wanted)
    assert compiled.adapters == ("default", "b")


def test_a_pickle_has_all_adapters(as_graph: AsGraph, image: Tensor, train: Train) -> None:
    model = as_graph("traced")
    base = model(image)
    surgery.compile(f"{SPEC} adapter b {{ match square apply dora(r=3) }}", model)
    train(model)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(image), model(image))
    handle = surgery.of(again)
    handle.activate("b")
    handle.activate(None)
    assert torch.equal(again(image), base)
    assert torch.equal(handle.inverse.unload()(image), base)


@pytest.mark.parametrize("form", FORMS)
def test_a_twin_leaves_the_graph_alone(
    form: str, as_graph: AsGraph, image: Tensor, train: Train
) -> None:
    model = as_graph(form)
    code, base = model.code, model(image)
    twin = surgery.compile(SPEC, model, inplace=False).model
    train(twin)
    surgery.of(twin).inverse.merge()
    assert not torch.allclose(twin(image), base)
    assert model.code == code
    assert torch.equal(model(image), base)
    shared = dict(model.named_parameters())
    assert twin.get_parameter("tall").data_ptr() == shared["tall"].data_ptr()


@pytest.mark.parametrize("form", FORMS)
def test_what_fails_leaves_the_graph_as_it_was(
    form: str, as_graph: AsGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = as_graph(form)
    before: tuple[object, ...] = (model.graph, model.code, model.__class__)

    def fail(_: nn.Module, modules: Sequence[object], *rest: object) -> None:
        del rest
        if modules:
            raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr("surgery.mount.mount_all", fail)
        with pytest.raises(RuntimeError, match="no"):
            surgery.compile(SPEC, model)
    assert (model.graph, model.code, model.__class__) == before
    with pytest.raises(SurgeryError, match="E201"):
        surgery.compile("match nothing apply lora(r=2)", model)
    assert (model.graph, model.code, model.__class__) == before


def test_a_second_adapter_is_planned_on_the_graph_without_the_first(
    make_net: Make, as_graph: AsGraph, image: Tensor, train: Train
) -> None:
    net, model = make_net(), as_graph("traced")
    for one in (net, model):
        surgery.compile("match head | square apply dora(r=2)", one)
        added = surgery.compile("adapter b { match head | blocks.* apply lora(r=3) }", one)
        assert [s.form.mode for s in added.plan.sites if s.adapter == "b"] == ["call"] * 3
        train(one)
    for live in ("b", "default - 2*b", "default then b"):
        outputs: list[Tensor] = []
        for one in (net, model):
            surgery.of(one).activate(live)
            outputs.append(one(image))
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)


def test_the_code_of_an_adapted_graph_runs_under_the_compiler(
    as_graph: AsGraph, image: Tensor, train: Train
) -> None:
    model = surgery.compile(SPEC, as_graph("traced")).model
    train(model)
    captured: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, _: object) -> Callable[..., Any]:
        captured.append(graph)
        return graph.forward

    compiled = cast(Any, torch).compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(image), model(image))
    assert len(captured) == 1
