"""One spec does the same to a model of modules, to its trace, and to the program made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx, nn

import surgery
from surgery.errors import StateError
from surgery.plan import Plan

Make = Callable[[], Any]
AsGraph = Callable[[str], Any]
Train = Callable[[nn.Module], None]

FORMS = ("traced", "program", "graph of a program")
SPECS = (
    "match * apply lora(r=2, alpha=3)",
    "match head | blocks.* apply dora(r=3)",
    "match * in layers apply ia3() match head apply bone(r=4)",
    "match blocks.* apply oft(block_size=4) match tall apply lora(r=2)",
    "match square | tall apply dora(r=2)",
    "match * where type == Conv2d apply vera(r=3)",
    "match * in layers[3] apply dora(r=1) match blocks.* where layer == 1 apply lora(r=2)",
    "match * in layers[-2:] apply lora(r=2)",
    """
    adapter a { match head | square apply lora(r=2) }
    adapter b { match head | blocks.0 apply ia3() }
    activate 0.5*a + 2*b
    """,
)


def paths(plan: Plan) -> list[str]:
    return sorted(site.path for site in plan.sites)


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("spec", SPECS)
def test_a_graph_computes_what_modules_compute(
    spec: str, form: str, make_net: Make, as_graph: AsGraph, image: Tensor, train: Train
) -> None:
    net, graph = make_net(), as_graph(form)
    base = net(image)
    modules, whole = surgery.compile(spec, net), surgery.compile(spec, graph)
    assert paths(modules.plan) == paths(whole.plan)
    train(net)
    train(whole.model)
    wanted = net(image)
    assert not torch.allclose(wanted, base)
    close(whole.model(image), wanted)
    for compiled in (modules, whole):
        compiled.inverse.merge()
    close(whole.model(image), net(image))
    whole.inverse.unmerge()
    close(whole.model(image), wanted)
    whole.inverse.unload()
    assert torch.equal(whole.model(image), base)


@pytest.mark.parametrize("form", FORMS)
def test_a_kernel_of_a_function_is_a_convolution(
    form: str, as_graph: AsGraph, image: Tensor, train: Train
) -> None:
    compiled = surgery.compile("match kernel | tall apply dora(r=2)", as_graph(form))
    kernel, tall = (site.form for site in compiled.plan.sites)
    assert (kernel.kind.name, kernel.mode, kernel.sizes.groups) == ("conv2d", "call", 2)
    assert (tall.kind.name, tall.mode, tall.has_bias) == ("linear", "call", True)
    base = compiled.model(image)
    train(compiled.model)
    wanted = compiled.model(image)
    assert not torch.allclose(wanted, base)
    compiled.inverse.merge()
    close(compiled.model(image), wanted)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_every_parameter(
    form: str, as_graph: AsGraph, image: Tensor, train: Train
) -> None:
    spec = "match kernel | square | tall | first | head | layers.* | blocks.* apply lora(r=2)"
    model = surgery.compile(spec, as_graph(form)).model
    train(model)
    model(image).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 9
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained)


@pytest.mark.parametrize("form", FORMS)
def test_verify_takes_any_form(form: str, as_graph: AsGraph, image: Tensor) -> None:
    spec = "match head | tall apply lora(r=2) match kernel | layers.0 apply ia3()"
    seen = surgery.verify(spec, as_graph(form), lambda model: model(image))
    assert seen.passed
    assert seen.effect > 0


def test_a_model_is_traced_if_asked_for(make_net: Make, image: Tensor, train: Train) -> None:
    net = make_net()
    before = {name: (p, p.requires_grad) for name, p in net.named_parameters()}
    compiled = surgery.compile("match kernel | head apply lora(r=2)", net, mode="graph")
    assert isinstance(compiled.model, fx.GraphModule)
    assert paths(compiled.plan) == ["head", "kernel"]
    assert paths(surgery.plan("match kernel apply ia3()", net, mode="graph")) == ["kernel"]
    train(compiled.model)
    base = net(image)
    assert not torch.allclose(compiled.model(image), base)
    compiled.inverse.merge()
    assert torch.equal(net(image), base)
    assert all(p is before[n][0] for n, p in net.named_parameters())
    assert all(p.requires_grad is before[n][1] for n, p in net.named_parameters())
    shared = dict(compiled.inverse.unload().named_parameters())
    assert all(shared[n].data_ptr() == p.data_ptr() for n, p in net.named_parameters())


def test_what_cannot_be_traced_is_refused() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) if x.sum() > 0 else x

    with pytest.raises(StateError, match="E417"):
        surgery.compile("match up apply lora(r=1)", Either(), mode="graph")


@pytest.mark.parametrize("form", FORMS)
def test_a_graph_has_no_modules_to_adapt(form: str, as_graph: AsGraph) -> None:
    with pytest.raises(StateError, match="E420"):
        surgery.compile("match head apply lora(r=1)", as_graph(form), mode="module")


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_adapter_goes_on_any_form(
    form: str, make_net: Make, as_graph: AsGraph, image: Tensor, train: Train, tmp_path: Any
) -> None:
    spec = "match square | head | layers.* apply dora(r=2)"
    compiled = surgery.compile(spec, make_net())
    train(compiled.model)
    compiled.save(tmp_path)
    attached = surgery.attach(tmp_path, as_graph(form))
    close(attached.model(image), compiled.model(image))
    attached.save(tmp_path)
    again = surgery.attach(tmp_path, make_net())
    assert torch.equal(again.model(image), compiled.model(image))


@pytest.mark.parametrize("form", FORMS)
def test_dropout_follows_the_mode_of_the_model(form: str, as_graph: AsGraph, image: Tensor) -> None:
    spec = "match tall | head apply lora(r=4, dropout=0.5)"
    model = surgery.compile(spec, as_graph(form)).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.fill_(1.0)
    for training in (False, True):
        for module in model.modules():  # not `train`, which torch's graph of a program refuses
            module.training = training and not isinstance(module, nn.Dropout)
        assert torch.equal(model(image), model(image)) is not training


def test_a_program_is_in_evaluation_and_can_be_trained(as_graph: AsGraph) -> None:
    model = surgery.compile("match head apply lora(r=2)", as_graph("program")).model
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.train().modules())


@pytest.mark.parametrize("form", FORMS)
def test_what_is_trained_as_it_is_goes_with_adapters_on_any_form(
    form: str, make_net: Make, as_graph: AsGraph, image: Tensor, train: Train
) -> None:
    spec = """
    train head.bias train tall save blocks.1
    match head | blocks.0 apply dora(r=2)
    """
    outputs: list[Tensor] = []
    for model in (make_net(), as_graph(form)):
        compiled = surgery.compile(spec, model)
        train(compiled.model)
        outputs.append(compiled.model(image))
        compiled.inverse.merge()
        close(compiled.model(image), outputs[-1])
        compiled.inverse.unload()
    close(*outputs)


@pytest.mark.parametrize("form", FORMS)
def test_the_graph_of_a_site_is_that_of_its_class(form: str, as_graph: AsGraph) -> None:
    spec = "match kernel | tall | square apply lora(r=2)"
    compiled = surgery.compile(spec, as_graph(form))
    assert compiled.graphs.keys() == {"kernel", "tall", "square"}
    sizes = {path: [n.op for n in graph.nodes] for path, graph in compiled.graphs.items()}
    assert all(ops.count("call_module") == 1 for ops in sizes.values())


def test_new_nodes_say_what_they_give(as_graph: AsGraph) -> None:
    spec = """
    match kernel | head apply dora(r=2) match square apply lora(r=2)
    match blocks.* apply lora(r=2, dropout=0.1)
    """
    model = surgery.compile(spec, as_graph("program")).model
    graph = cast(fx.GraphModule, model).graph
    called = [n for n in graph.nodes if n.op in ("call_function", "call_method")]
    silent = {n for n in called if "val" not in n.meta} - {n for n in called if n.target is getattr}
    assert len(called) > 50
    assert not silent
    graph.lint()
