"""Parameter groups: what is trained stands in one of them, at the learning rate it was told."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.artifact import MAPPING, SPEC
from surgery.errors import ArtifactError, StateError
from surgery.language.formatting import formatted
from surgery.rating import written
from surgery.trainable import set_trainable

untyped: Any = torch

LR = 0.5  # a power of two, so that multiples are exact


class Net(nn.Module):
    """Layers of distinct primes, an embedding, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(7, 5), "k": nn.Linear(5, 7, bias=False)})
            for _ in range(3)
        )
        self.norm = nn.LayerNorm(7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x: Any = self.embed(tokens)
        for layer in self.layers:
            made: Any = layer
            x = x + made["k"](torch.tanh(made["q"](x)))
        return self.norm(x)


TOKENS = torch.tensor([[3, 5, 1], [2, 0, 11]])


def net() -> Net:
    untyped.manual_seed(0)
    return Net()


def rates(model: nn.Module, found: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The learning rate of each parameter by its name in the model; each stands in one group."""
    names = {id(p): n for n, p in model.named_parameters()}
    each = [(names[id(p)], group["lr"]) for group in found for p in group["params"]]
    assert len(dict(each)) == len(each)
    return dict(each)


def ended(found: Mapping[str, float]) -> dict[str, float]:
    """The same by the ends of the names, of which equal ones have one rate."""
    short = {(n.rpartition(".")[2], lr) for n, lr in found.items()}
    assert len(short) == len(dict(short))
    return dict(short)


METHOD = """
method fast(r: int = 2, times: float = 4) on matrix {
  train A[r, in] ~ normal(std = 0.1), lr = 1e-3
  train B[out, r] = 0, lr = (times)x
  train s[out] = 1
  W' = W + s * rows(B @ A)
}
"""

SPECS = {
    "match q apply lora(r=2)": {"A": LR, "B": LR},
    "match q apply lora(r=2) lr B = 16x": {"A": LR, "B": 16 * LR},
    "match q apply lora(r=2) lr = 2x, B = 16x": {"A": 2 * LR, "B": 32 * LR},
    "match q apply lora(r=2) lr = 0.25, B = 16x": {"A": 0.25, "B": 4.0},
    "match q apply lora(r=2) lr A = 0.125": {"A": 0.125, "B": LR},
    f"{METHOD} match q apply fast()": {"A": 1e-3, "B": 4 * LR, "s": LR},
    f"{METHOD} match q apply fast(times=0.5) lr = 2x": {"A": 1e-3, "B": LR, "s": 2 * LR},
    f"{METHOD} match q apply fast() lr A = 2x, B = 8x": {"A": 2 * LR, "B": 8 * LR, "s": LR},
    "train bias in layers[*] lr = 2x": {"T": 2 * LR},
    "save norm lr = 0.25": {"T": 0.25},
    "param k: float = 8 let most = 2 * k match q apply lora(r=2) lr B = (most)x": {
        "A": LR,
        "B": 16 * LR,
    },
    "match k apply vera(r=3) lr d = 2x": {"d": 2 * LR, "g": LR},
    "match q apply ia3() lr = 2x then lora(r=2) lr B = 4x": {
        "l": 2 * LR,
        "A_2": LR,
        "B_2": 4 * LR,
    },
}


@pytest.mark.parametrize("spec", SPECS)
def test_every_parameter_learns_at_its_rate(spec: str) -> None:
    model = net()
    compiled = surgery.compile(spec, model)
    found = surgery.groups(compiled, LR)
    assert ended(rates(model, found)) == SPECS[spec]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert rates(model, found).keys() == trained
    assert len({group["lr"] for group in found}) == len(found)
    assert len({group["name"] for group in found}) == len(found)
    assert all(f"lr={group['lr']!r}" == group["name"] for group in found)


@pytest.mark.parametrize("spec", [*SPECS][2::2])
def test_a_saved_adapter_keeps_its_rates(spec: str, tmp_path: Path) -> None:
    model = net()
    compiled = surgery.compile(spec, model)
    compiled.save(tmp_path)
    other = net()
    again = surgery.attach(tmp_path, other)
    assert rates(other, surgery.groups(again, LR)) == rates(model, surgery.groups(compiled, LR))
    text = (tmp_path / SPEC).read_text(encoding="utf-8")
    assert surgery.check(text) == ()
    fresh = net()
    surgery.compile(text, fresh)
    assert rates(fresh, surgery.groups(fresh, LR)) == rates(model, surgery.groups(compiled, LR))
    assert surgery.check(formatted(text)) == ()


def test_what_a_folder_of_sites_alone_says_is_kept(tmp_path: Path) -> None:
    """An attached adapter has no statements of its own; saved again it gets one a site."""
    first, second = tmp_path / "first", tmp_path / "second"
    surgery.compile("match q apply lora(r=2) lr = 2x, B = 16x", net()).save(first)
    (first / SPEC).write_text("# none\nlet nothing = 1\n", encoding="utf-8")
    surgery.attach(first, net()).save(second)
    assert "lr = 2x, B = 16x" in (second / SPEC).read_text(encoding="utf-8")
    model = net()
    surgery.attach(second, model)
    assert ended(rates(model, surgery.groups(model, LR))) == {"A": 2 * LR, "B": 32 * LR}


@pytest.mark.parametrize(
    "damage",
    [
        {"link": 1, "parameter": "", "value": 2.0, "times": True},
        {"link": 0, "parameter": "", "value": -2.0, "times": True},
        {"link": 0, "parameter": "", "value": "2", "times": True},
        {"link": 0, "parameter": 3, "value": 2.0, "times": True},
        {"link": 0, "parameter": "", "value": 2.0},
        "2x",
    ],
)
def test_rates_of_a_folder_are_not_believed(damage: object, tmp_path: Path) -> None:
    surgery.compile("match q apply lora(r=2) lr = 2x", net()).save(tmp_path)
    path = tmp_path / MAPPING
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["features"]["optional"] == ["base-digests", "learning-rates"]
    assert data["sites"][0]["lr"] == [{"link": 0, "parameter": "", "value": 2.0, "times": True}]
    data["sites"][0]["lr"] = [damage]
    path.write_text(json.dumps(data), encoding="utf-8")
    model = net()
    with pytest.raises(ArtifactError, match="no learning rates"):
        surgery.attach(tmp_path, model)
    assert not any("surgery" in name for name in model.state_dict())


def test_the_plan_says_them() -> None:
    plan = surgery.plan("match q apply lora(r=2) lr = 2x, B = 16x", net())
    assert "lr = 2x, B = 16x" in str(plan)
    other = surgery.plan("match q apply lora(r=2) lr = 2x, B = 8x", net())
    assert plan.diff(other)
    assert not plan.diff(surgery.plan("match q apply lora(r=2) lr = 2x, B = 16x", net()))


def test_an_explanation_says_those_of_the_method() -> None:
    told = surgery.explain("fast", {"times": 8}, spec=METHOD)
    each: dict[object, object] = {p["name"]: p["lr"] for p in told.parameters}
    assert each == {"A": "0.001", "B": "8x", "s": None}
    assert "trained, lr 8x" in str(told)


def test_layers_may_learn_at_rates_of_their_own() -> None:
    model = net()
    spec = "match q in layers[*] apply lora(r=2) lr = (0.5 ** (2 - layer))x"
    found = rates(model, surgery.groups(surgery.compile(spec, model), LR))
    each = {n.split(".")[1]: lr for n, lr in found.items()}
    assert each == {"0": LR / 4, "1": LR / 2, "2": LR}
    assert len({id(site.form) for site in surgery.of(model).plan.sites}) == 1


def test_what_all_sites_share_is_in_one_group() -> None:
    model = net()
    surgery.compile("match q apply vblora(r=2, num_vectors=3, vector_length=1, topk=2)", model)
    found = surgery.groups(model, LR)
    assert {n for n in rates(model, found) if ".shared." in n}


# ----------------------------------------------------------------------------- several adapters

TWO = """
adapter a { match q apply lora(r=2) lr B = 4x }
adapter b { match k apply lora(r=2) lr = 4x }
"""


def of_adapter(model: nn.Module, *names: str) -> set[str]:
    compiled = surgery.of(model)
    return {n for name in names for n in compiled.parameters(name)}


@pytest.mark.parametrize("names", [("a",), ("b",), ("a", "b"), ("b", "a")])
def test_of_the_adapters_that_are_asked_for(names: tuple[str, ...]) -> None:
    model = net()
    surgery.compile(TWO, model)
    found = surgery.groups(model, LR, names)
    assert rates(model, found).keys() == of_adapter(model, *names)
    assert len(found) == (1 if names == ("b",) else 2)  # one a rate, whoever it is of
    if len(names) == 1:
        assert rates(model, surgery.groups(model, LR, names[0])) == rates(model, found)


def test_what_is_frozen_is_in_none() -> None:
    model = net()
    surgery.compile(TWO, model)
    set_trainable(model, ["b"])
    assert rates(model, surgery.groups(model, LR)).keys() == of_adapter(model, "b")
    assert rates(model, surgery.groups(model, LR, ["a", "b"])).keys() == of_adapter(model, "b")
    with pytest.raises(StateError, match="nothing of `a` requires gradients") as caught:
        surgery.groups(model, LR, "a")
    (found,) = caught.value.diagnostics
    assert found.code == "E450"
    assert "train_only('a')" in found.hint


def test_methods_that_train_nothing_are_named_as_such() -> None:
    spec = "method still() on matrix { frozen s[out] = 2; W' = s * rows(W) } match q apply still()"
    model = net()
    surgery.compile(spec, model)
    with pytest.raises(StateError, match="would be trained") as caught:
        surgery.groups(model, LR)
    assert "train nothing" in caught.value.diagnostics[0].hint


@pytest.mark.parametrize("lr", [0, -1.0, float("nan"), float("inf"), True, "fast", None])
def test_what_is_no_learning_rate(lr: Any) -> None:
    model = net()
    surgery.compile(TWO, model)
    with pytest.raises(StateError) as caught:
        surgery.groups(model, lr)
    assert caught.value.diagnostics[0].code == "E452"


def test_names_that_there_are_not_are_all_said() -> None:
    model = net()
    surgery.compile(TWO, model)
    with pytest.raises(StateError) as caught:
        surgery.groups(model, LR, ["a", "d", "e"])
    assert [found.code for found in caught.value.diagnostics] == ["E411", "E411"]
    with pytest.raises(StateError, match="no adapter"):
        surgery.groups(net(), LR)


# -------------------------------------------------------------------------------- weight decay


def test_a_weight_decay_is_of_all_or_of_each() -> None:
    model = net()
    surgery.compile("match q apply lora(r=2) lr B = 16x train norm", model)
    plain = surgery.groups(model, LR)
    assert all("weight_decay" not in group for group in plain)
    (first, second) = surgery.groups(model, LR, weight_decay=0.25)
    assert (first["weight_decay"], second["weight_decay"]) == (0.25, 0.25)
    each = surgery.groups(model, LR, weight_decay=lambda name, p: 0.25 if p.ndim > 1 else 0.0)
    assert [(g["lr"], g["weight_decay"]) for g in each] == [(LR, 0.25), (16 * LR, 0.25), (LR, 0)]
    assert len({group["name"] for group in each}) == 3
    for wrong in (-1.0, float("nan"), "none"):
        untyped_wrong: Any = wrong
        with pytest.raises(StateError) as caught:
            surgery.groups(model, LR, weight_decay=untyped_wrong)
        assert caught.value.diagnostics[0].code == "E452"


# ------------------------------------------------------------------------------- in an optimizer


def test_a_step_moves_each_parameter_by_its_rate() -> None:
    """One of gradient descent: p - lr * gradient, in which the rate is all that there is."""
    model = net()
    surgery.compile("match q apply lora(r=2) lr = 2x, B = 16x", model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer: Any = torch.optim.SGD(surgery.groups(model, 0.125))
    model(TOKENS).square().sum().backward()
    optimizer.step()
    told = {"A": 0.25, "B": 4.0}
    for name, p in model.named_parameters():
        if p.grad is None:
            assert torch.equal(p, before[name])
            continue
        wanted = before[name] - told[name.rpartition(".")[2]] * p.grad
        assert torch.equal(p, wanted)


@settings(max_examples=20)
@given(st.floats(2**-20, 2**20), st.floats(2**-20, 2**20), st.floats(2**-20, 2**20))
def test_multiples_are_of_the_rate_that_is_given(lr: float, all_of: float, one: float) -> None:
    model = nn.Sequential(nn.Linear(3, 5))
    surgery.compile(f"match * apply lora(r=2) lr = {all_of!r}x, B = ({one!r})x", model)
    found = ended(rates(model, surgery.groups(model, lr)))
    assert found == {"A": all_of * lr, "B": one * (all_of * lr)}
    (site,) = surgery.of(model).plan.sites
    again = surgery.plan(f"match 0 apply lora(r=2){written(site.rates, 0)}", model)
    assert again.sites[0].rates == site.rates


def test_lora_plus_has_the_rates_of_peft() -> None:
    """Of arXiv 2402.12354, as peft's optimizer has them: B at so many times the rate of A."""
    peft: Any = pytest.importorskip("peft")
    optimizers: Any = pytest.importorskip("peft.optimizers")
    base = net()
    config = peft.LoraConfig(r=2, target_modules=["q", "k"])
    theirs = peft.get_peft_model(deepcopy(base), config)
    optimizer = optimizers.create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=16, loraplus_weight_decay=0.25
    )
    wanted = {
        n.replace("base_model.model.", "").replace(".default.weight", ""): (g["lr"], decay)
        for g in optimizer.param_groups
        for decay in (g["weight_decay"],)
        for n, p in theirs.named_parameters()
        if any(p is q for q in g["params"])
    }
    surgery.compile("match /q|k/ apply lora(r=2, alpha=8) lr B = 16x", base)
    names = {id(p): n for n, p in base.named_parameters()}
    ours = {
        names[id(p)].replace(".surgery.default.", ".lora_"): (g["lr"], g["weight_decay"])
        for g in surgery.groups(base, LR, weight_decay=0.25)
        for p in g["params"]
    }
    assert ours == wanted
    assert len(ours) == 12
