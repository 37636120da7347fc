"""A twin shares the data of the model it was made of, and nothing that happens to it is seen there.

The laws are for every way in: compile and attach, on plain, tied, adapted and hooked models.
"""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support import Held
from torch import Tensor, nn

import surgery
from surgery.errors import StateError
from surgery.merged import Undo
from surgery.model.holder import base_parameters, modules_of
from surgery.model.storage import address
from surgery.mount import is_mounted
from surgery.twin import twin

untyped = cast(Any, torch)  # for calls whose stubs are not fully typed

SPEC = "match first | second apply lora(r=2)  match third apply dora(r=2)"
SHARED = "match first | third apply vera(r=3)"


class Model(nn.Module):
    """Three layers; the last two share their weight with others, one way or another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 11, bias=False)
        self.norm = nn.BatchNorm1d(11)
        self.third = nn.Linear(11, 3)
        self.words = nn.Embedding(13, 5)
        self.head = nn.Linear(5, 13, bias=False)
        self.head.weight = self.words.weight
        self.mask = torch.ones(5)  # a plain attribute
        self.owner = [self]  # a circle
        self.first.bias.requires_grad_(False)
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        """[n, 5] to [n, 3]."""
        return self.third(self.norm(torch.tanh(self.second(self.first(x * self.mask)))))


def built() -> Model:
    untyped.manual_seed(9)
    return Model().eval()


def x() -> Tensor:
    return torch.randn(17, 5, generator=torch.Generator().manual_seed(3))


class Snapshot:
    """All that could have been changed of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.bits = {n: t.clone() for n, t in model.state_dict().items()}
        self.objects = {n: Held(p) for n, p in model.named_parameters(remove_duplicate=False)}
        self.flags = {n: p.requires_grad for n, p in model.named_parameters()}
        self.classes = [(path, type(m), tuple(vars(m))) for path, m in modules_of(model)]
        self.grads = {n: p.grad for n, p in model.named_parameters()}

    def holds(self) -> None:
        now = self.model.state_dict()
        assert now.keys() == self.bits.keys()
        assert all(torch.equal(now[n], self.bits[n]) for n in now)
        after = Snapshot(self.model)
        assert after.objects == self.objects
        assert after.flags == self.flags
        assert after.classes == self.classes
        assert all(after.grads[n] is self.grads[n] for n in self.grads)


def train(model: nn.Module, steps: int = 3) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        untyped.autograd.backward(model(x()).square().sum())
        cast(Any, optimizer).step()  # its stub is not fully typed


@pytest.mark.parametrize("undo", ["exact", "algebraic"])
@pytest.mark.parametrize("spec", [SPEC, SHARED])
def test_everything_may_happen_to_a_twin(spec: str, undo: Undo) -> None:
    model = built()
    before, base = Snapshot(model), model(x())
    compiled = surgery.compile(spec, model, inplace=False)
    adapted = compiled.model
    assert adapted is not model
    before.holds()
    train(adapted)
    trained = adapted(x())
    assert not torch.allclose(trained, base)
    compiled.inverse.merge(undo=undo)
    before.holds()
    assert torch.allclose(adapted(x()), trained, atol=1e-5)
    compiled.inverse.unmerge()
    before.holds()
    compiled.inverse.merge()
    compiled.inverse.unload()
    before.holds()
    assert torch.allclose(adapted(x()), base, atol=0 if undo == "exact" else 1e-5)
    assert {n: p.requires_grad for n, p in adapted.named_parameters()} == before.flags


def test_a_twin_has_its_own_modules_over_the_same_data() -> None:
    model = built()
    adapted = surgery.compile(SPEC, model, inplace=False).model
    assert isinstance(adapted, Model)
    ours, theirs = base_parameters(model), base_parameters(adapted)
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter is not theirs[name]
        assert address(parameter) == address(theirs[name])
        assert not theirs[name].requires_grad
    buffers = dict(adapted.named_buffers())
    assert all(address(b) == address(buffers[n]) for n, b in model.named_buffers())
    assert adapted.mask.data_ptr() == model.mask.data_ptr()
    assert not {id(m) for m in model.modules()} & {id(m) for m in adapted.modules()}
    assert adapted.owner[0] is adapted
    assert not any(is_mounted(m) for m in model.modules())
    assert is_mounted(adapted.first)


def test_a_twin_sees_what_is_written_into_the_base() -> None:
    model = built()
    compiled = surgery.compile(SPEC, model, inplace=False)
    with torch.no_grad():
        model.first.weight.mul_(1.5)
    assert torch.equal(compiled.model(x()), model(x()))  # adapters begin as nothing


def test_ties_are_ties_in_the_twin() -> None:
    model = built()
    adapted = surgery.compile(SPEC, model, inplace=False).model
    assert isinstance(adapted, Model)
    assert adapted.head.weight is adapted.words.weight
    with pytest.raises(surgery.SurgeryError, match="E207"):
        surgery.compile("match head apply lora(r=2)", model, inplace=False)


def test_several_twins_live_side_by_side() -> None:
    model = built()
    before = Snapshot(model)
    one, two = (surgery.compile(SPEC, model, seed=s, inplace=False) for s in (1, 2))
    train(one.model)
    assert torch.equal(two.model(x()), model(x()))
    alone = surgery.compile(SPEC, built(), seed=1)
    train(alone.model)
    assert torch.equal(one.model(x()), alone.model(x()))
    before.holds()


def test_a_twin_of_an_adapted_model_has_adapters_of_its_own() -> None:
    model = built()
    first = surgery.compile(f"adapter a {{ {SHARED} }}", model)
    train(model)
    before, output = Snapshot(model), model(x())
    second = surgery.compile("adapter b { match second apply lora(r=2) }", model, inplace=False)
    assert first.adapters == ("a",)
    assert second.adapters == ("a", "b")
    assert torch.equal(second.model(x()), output)
    train(second.model)
    second.activate("b")
    train(second.model)
    second.inverse.merge()
    before.holds()
    second.inverse.unload()
    before.holds()
    assert torch.equal(model(x()), output)


def test_attach_leaves_the_model_alone_as_well(tmp_path: Path) -> None:
    saved = surgery.compile(SPEC, built(), inplace=False)
    train(saved.model)
    saved.save(tmp_path / "out")
    model = built()
    before = Snapshot(model)
    attached = surgery.attach(tmp_path / "out", model, inplace=False)
    assert torch.equal(attached.model(x()), saved.model(x()))
    attached.inverse.merge()
    before.holds()
    assert surgery.of(attached.model).merged


def test_hooks_go_with_the_twin_and_stay_on_the_model() -> None:
    model, seen = built(), list[nn.Module]()

    def hook(module: nn.Module, inputs: object, output: object) -> None:
        seen.append(module)

    handle = model.first.register_forward_hook(hook)
    before = Snapshot(model)
    adapted = surgery.compile(SPEC, model, inplace=False).model
    assert isinstance(adapted, Model)
    adapted(x())
    assert seen == [adapted.first]
    handle.remove()
    adapted(x())
    model(x())
    assert seen == [adapted.first, adapted.first]
    before.holds()


def test_a_twin_can_be_pickled_copied_and_saved() -> None:
    model = built()
    compiled = surgery.compile(SPEC, model, inplace=False)
    train(compiled.model)
    output = compiled.model(x())
    for again in (
        pickle.loads(pickle.dumps(compiled.model)),
        copy.deepcopy(compiled.model),
    ):
        assert torch.equal(again(x()), output)
        assert surgery.of(again).adapters == ("default",)
    file = io.BytesIO()
    torch.save(compiled.model.state_dict(), file)
    file.seek(0)
    read = torch.load(file)
    assert {n for n in read if ".surgery." not in n} == model.state_dict().keys()


def test_a_twin_may_be_moved_and_cast() -> None:
    model = built()
    before = Snapshot(model)
    compiled = surgery.compile(SPEC, model, inplace=False)
    compiled.model.double()
    assert compiled.model(x().double()).dtype == torch.float64
    before.holds()


def test_a_twin_on_meta_may_begin_later() -> None:
    with torch.device("meta"):
        model = Model()
    compiled = surgery.compile(SPEC, model, inplace=False)
    real = built().state_dict()
    compiled.model.load_state_dict(real, strict=False, assign=True)
    assert all(p.is_meta for p in model.parameters())


def test_a_failed_compile_makes_nothing() -> None:
    model = built()
    before = Snapshot(model)
    with pytest.raises(surgery.SurgeryError):
        surgery.compile("match frist apply lora(r=2)", model, inplace=False)
    before.holds()


class Own(nn.Parameter):
    """A parameter of a class of its own."""


def test_lazy_and_own_parameters() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    own = Own(torch.ones(7), requires_grad=False)
    vars(own)["note"] = "kept"
    model[0].bias = own
    model.append(nn.LazyLinear(2))
    bias = cast("list[nn.Linear]", twin(model))[0].bias
    assert type(bias) is Own
    assert vars(bias)["note"] == "kept"
    assert bias.data_ptr() == own.data_ptr()


class _Stubborn(nn.Linear):
    """Copies itself in its own way."""

    def __deepcopy__(self, memo: dict[int, object]) -> _Stubborn:
        return _Stubborn(self.in_features, self.out_features)


def test_what_cannot_be_copied_is_refused() -> None:
    for module in (_Stubborn(5, 7), nn.Linear(5, 7)):
        model = nn.Sequential(module)
        if type(module) is nn.Linear:
            vars(module)["cached"] = [module.weight * 2]  # no leaf, and in a list
        with pytest.raises(StateError) as caught:
            surgery.compile("match 0 apply lora(r=2)", model, inplace=False)
        (found,) = caught.value.diagnostics
        assert found.code == "E415"
        assert found.hint
