"""The handle of an adapted model: several adapters, which is live, merged, refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx, nn

import surgery
from surgery.errors import StateError, SurgeryError
from surgery.model.holder import modules_of

untyped = cast(Any, torch)  # for calls whose stubs are not fully typed


class Model(nn.Module):
    """Three layers, with dropout and a batch norm that is kept in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 11, bias=False)
        self.norm = nn.BatchNorm1d(11)
        self.third = nn.Linear(11, 3)
        self.dropout = nn.Dropout(0.5)
        self.first.bias.requires_grad_(False)
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        """[n, 5] to [n, 3]."""
        return self.third(self.dropout(self.norm(torch.tanh(self.second(self.first(x))))))


TWO = """
adapter math { match /first|second/ apply lora(r=2) }
adapter code { match /second|third/ apply bone(r=3) match first apply vera(r=3) }
"""


def built() -> Model:
    untyped.manual_seed(9)
    return Model().eval()


def x() -> Tensor:
    return torch.randn(13, 5, generator=torch.Generator().manual_seed(3))


def nudge(compiled: surgery.Compiled) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in compiled.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def refused(code: str, call: Callable[[], object]) -> StateError:
    with pytest.raises(StateError) as caught:
        call()
    assert [d.code for d in caught.value.diagnostics] == [code]
    return caught.value


# -------------------------------------------------------------------------------- several adapters


def test_the_first_adapter_is_live() -> None:
    compiled = surgery.compile(TWO, built())
    assert compiled.adapters == ("math", "code")
    assert compiled.live == "math"


def test_each_adapter_computes_what_it_would_alone() -> None:
    model = built()
    base = model(x())
    compiled = surgery.compile(TWO, model)
    nudge(compiled)
    outputs: dict[str | None, Tensor] = {}
    for name in ("math", "code", None, "math"):
        compiled.activate(name)
        assert compiled.live == name
        output = model(x())
        assert torch.equal(outputs.setdefault(name, output), output)
    assert torch.equal(outputs[None], base)
    for name in compiled.adapters:
        alone = built()
        single = surgery.compile(TWO, alone)
        alone.load_state_dict(model.state_dict())
        single.activate(name)
        assert torch.equal(alone(x()), outputs[name])


def test_activate_does_not_change_what_is_trained() -> None:
    model = built()
    compiled = surgery.compile(TWO, model)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    assert any(before.values())
    for name in (None, "code", "math"):
        compiled.activate(name)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_only_the_live_adapter_has_gradients() -> None:
    model = built()
    compiled = surgery.compile(TWO, model)
    nudge(compiled)
    compiled.activate("code")
    untyped.autograd.backward(model(x()).sum())
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient
    assert all(".code." in f".{n}" for n in with_gradient)


def test_a_second_compile_extends_the_handle() -> None:
    model = built()
    base = {n: t.clone() for n, t in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    first = surgery.compile("match first apply lora(r=2)", model)
    nudge(first)
    output = model(x())
    second = surgery.compile("adapter other { match * apply ia3() }", model)
    assert first.adapters == second.adapters == ("default", "other")
    assert first.live == "default"
    assert torch.equal(model(x()), output)
    assert len(first.plan.sites) == 4
    second.activate("other")
    nudge(second)
    second.inverse.unload()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    after = model.state_dict()
    assert after.keys() == base.keys()
    assert all(torch.equal(after[n], base[n]) for n in base)


def test_each_adapter_is_saved_by_its_name(tmp_path: Path) -> None:
    model = built()
    compiled = surgery.compile(TWO, model)
    nudge(compiled)
    for name in compiled.adapters:
        compiled.activate(name)
        output = model(x())
        compiled.activate(None)
        compiled.save(tmp_path / name, name)
        other = built()
        attached = surgery.attach(tmp_path / name, other)
        assert attached.adapters == (name,)
        assert torch.equal(other(x()), output)


def test_two_folders_attach_beside_each_other(tmp_path: Path) -> None:
    model = built()
    compiled = surgery.compile(TWO, model)
    nudge(compiled)
    outputs: dict[str, Tensor] = {}
    for name in compiled.adapters:
        compiled.activate(name)
        outputs[name] = model(x())
        compiled.save(tmp_path / name, name)
    both = built()
    for name in compiled.adapters:
        surgery.attach(tmp_path / name, both)
    for name, output in outputs.items():
        surgery.of(both).activate(name)
        assert torch.equal(both(x()), output)


@pytest.mark.parametrize(
    ("text", "live"),
    [
        ("", "math"),
        ("activate code", "code"),
        ("activate 0.5*math - code", "0.5*math - code"),
        ("activate code then math", "code then math"),
        ("activate none", None),
    ],
)
def test_a_spec_says_what_is_live(text: str, live: str | None) -> None:
    model, same = built(), built()
    compiled = surgery.compile(f"{TWO} {text}", model)
    other = surgery.compile(TWO, same)
    nudge(compiled)
    same.load_state_dict(model.state_dict())
    other.activate(live)
    assert compiled.live == other.live == live
    assert torch.equal(model(x()), same(x()))
    told = f"live after compilation: {live or 'none'}"
    assert (told in str(compiled.plan)) is bool(text)


def test_a_second_spec_changes_what_is_live_if_it_says_so() -> None:
    model = built()
    compiled = surgery.compile(TWO, model)
    surgery.compile("adapter more { match third apply ia3() }", model)
    assert compiled.live == "math"
    surgery.compile("adapter most { match third apply ia3() } activate 2*most", model)
    assert compiled.live == "2*most"
    compiled.activate("math + most then more")
    assert compiled.live == "(math + most) then more"


def test_what_cannot_be_live_changes_nothing() -> None:
    model = built()
    compiled = surgery.compile(TWO, model)
    nudge(compiled)
    compiled.activate("math + code")
    output = model(x())
    for text, code in {
        "": "E003",
        "math +": "E003",
        "math then": "E003",
        "match first apply ia3()": "E003",
        "math match first apply ia3()": "E003",
        "2*mth": "E411",
        "w*math": "E411",
        "math*code": "E132",
        "2": "E132",
        "math/0": "E105",
    }.items():
        with pytest.raises(SurgeryError) as caught:
            compiled.activate(text)
        assert [d.code for d in caught.value.diagnostics] == [code], text
        assert all(d.hint or d.label for d in caught.value.diagnostics)
    assert compiled.live == "math + code"
    assert torch.equal(model(x()), output)


def test_one_adapter_is_saved_and_must_be_named_where_several_are_live(tmp_path: Path) -> None:
    compiled = surgery.compile(TWO, built())
    compiled.activate("code + 2*math")
    said = str(refused("E416", lambda: compiled.save(tmp_path / "a")))
    assert "`code`, `math` are live" in said
    refused("E416", compiled.parameters)
    refused("E411", lambda: compiled.save(tmp_path / "a", "mth"))
    refused("E411", lambda: compiled.parameters("mth"))
    assert not (tmp_path / "a").exists()
    compiled.save(tmp_path / "a", "math")
    assert "activate" not in (tmp_path / "a" / "adapter.peft").read_text()
    compiled.activate("-2*code")
    assert compiled.parameters().keys() == compiled.parameters("code").keys()


def test_a_mix_is_verified() -> None:
    spec = f"{TWO} activate 0.5*math + code"
    seen = surgery.verify(spec, built(), lambda m: cast(Tensor, m(x())))
    assert seen.passed
    assert seen.mergeable
    assert seen.start < 1e-6 < seen.effect
    seen = surgery.verify(f"{TWO} activate none", built(), lambda m: cast(Tensor, m(x())))
    assert seen.passed
    assert not seen.mergeable


def test_merging_takes_the_live_adapter() -> None:
    model = built()
    compiled = surgery.compile(TWO, model)
    nudge(compiled)
    for name in compiled.adapters:
        compiled.activate(name)
        output = model(x())
        compiled.inverse.merge()
        assert torch.allclose(model(x()), output, atol=1e-5)
        refused("E402", lambda: compiled.activate("math"))
        refused("E402", lambda: surgery.compile("adapter more { match first apply ia3() }", model))
        refused("E402", compiled.inverse.merge)
        compiled.inverse.unmerge()
        assert torch.equal(model(x()), output)


# -------------------------------------------------------------------------------------- refusals


def test_calls_that_make_no_sense_are_refused() -> None:
    model = built()
    refused("E401", lambda: surgery.of(model))
    compiled = surgery.compile(TWO, model)
    assert "math, code" in str(refused("E411", lambda: compiled.activate("maths")))
    refused("E406", compiled.inverse.unmerge)
    refused("E409", lambda: compiled.inverse.unload(keep_merge=True))
    refused("E412", lambda: surgery.compile("adapter math { match third apply ia3() }", model))
    compiled.activate(None)
    refused("E410", compiled.inverse.merge)
    compiled.inverse.unload()
    for call in (compiled.inverse.unload, compiled.inverse.merge, lambda: compiled.plan):
        refused("E401", call)


def test_a_model_on_meta_cannot_merge() -> None:
    model = built().to("meta")
    compiled = surgery.compile("match * apply lora(r=2)", model)
    with pytest.raises(StateError) as caught:
        compiled.inverse.merge()
    assert {d.code for d in caught.value.diagnostics} == {"E404"}
    assert len(caught.value.diagnostics) == 3
    with pytest.raises(SurgeryError):
        compiled.save("/nonexistent/never")


# -------------------------------------------------------------------------------------- the handle


def test_graphs_are_those_of_the_live_adapter() -> None:
    compiled = surgery.compile(TWO, built())
    assert sorted(compiled.graphs) == ["first", "second"]
    graph = compiled.graphs["second"]
    assert isinstance(graph, fx.Graph)
    assert [n.target for n in graph.nodes if n.op == "call_module"] == ["base"]
    compiled.activate(None)
    assert dict(compiled.graphs) == {}


def test_the_mapping_renames_state_dicts_both_ways() -> None:
    model = built()
    compiled = surgery.compile("match * apply lora(r=2)", model)
    mapping = compiled.mapping
    tensors = compiled.parameters()
    renamed = mapping.rename(tensors, "adapted", "peft")
    assert all(n.startswith("base_model.model.") for n in renamed)
    back = mapping.rename(renamed, "peft", "adapted")
    assert all(torch.equal(back[n], tensors[n]) for n in tensors)


def test_planning_touches_nothing() -> None:
    model = built()
    before = [(n, type(m), sorted(vars(m))) for n, m in modules_of(model)]
    plan = surgery.plan(TWO, model)
    assert [(n, type(m), sorted(vars(m))) for n, m in modules_of(model)] == before
    assert plan.adapters == ("math", "code")
    assert str(plan) == str(surgery.plan(TWO, model))
    assert plan.as_json() == surgery.compile(TWO, model).plan.as_json()


def test_params_are_set_by_the_caller() -> None:
    text = "param rank: int = 2\nlet double = 2 * rank\nmatch * apply lora(r=rank, alpha=double)"
    sites = surgery.plan(text, built(), values={"rank": 3}).sites
    assert {(dict(s.form.arguments)["r"], dict(s.form.arguments)["alpha"]) for s in sites} == {
        (3, 6.0)
    }


def test_arguments_may_depend_on_the_layer() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(5, 7) for _ in range(4)])})
    spec = "match * in layers[*] apply lora(r = 1 + layer if layer < 2 else 2 * out)"
    ranks = [dict(s.form.arguments)["r"] for s in surgery.plan(spec, model).sites]
    assert ranks == [1, 2, 14, 14]


def test_a_spec_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "spec.peft"
    path.write_text("match * apply lora(r=2)\n")
    for spec in (path, str(path), surgery.load(path), surgery.parse(path.read_text())):
        assert len(surgery.plan(spec, built()).sites) == 3


# ---------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize("training", [True, False])
def test_verify_leaves_no_trace(training: bool) -> None:
    model = built()
    model.dropout.train(training)
    modes = {n: m.training for n, m in modules_of(model)}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    base = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    seen = surgery.verify("match * apply dora(r=2)", model, lambda m: cast(Tensor, m(x())))
    assert seen.passed
    assert seen.sites == 3
    assert seen.start < 1e-6 < seen.effect
    assert {n: m.training for n, m in modules_of(model)} == modes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(torch.equal(t, base[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_verify_says_why_there_is_no_merge() -> None:
    method = "method bent() on matrix { train u[out] = 1 y' = y + tanh(u * y) }"
    seen = surgery.verify(f"{method}\nmatch * apply bent()", built(), lambda m: m(x()))
    assert seen.passed
    assert not seen.mergeable
    assert "tanh" in seen.reason


def test_verify_cleans_up_after_a_failing_model() -> None:
    model, calls = built(), iter(range(2))

    def run(m: nn.Module) -> Tensor:
        if next(calls, None) is None:
            raise ZeroDivisionError
        return m(x())

    with pytest.raises(ZeroDivisionError):
        surgery.verify("match * apply lora(r=2)", model, run)
    refused("E401", lambda: surgery.of(model))
    assert not any("surgery" in n for n in model.state_dict())


def test_verify_does_not_touch_adapters_that_are_there() -> None:
    model = built()
    compiled = surgery.compile("match * apply lora(r=2)", model)
    refused("E414", lambda: surgery.verify("match * apply ia3()", model, lambda m: m(x())))
    assert compiled.adapters == ("default",)
