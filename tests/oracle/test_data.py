"""Beginnings that read data, and the schedule that takes values away: as peft computes them."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.loraga import preprocess_loraga
from small_models import gpt2, llama
from support import bits
from torch import Tensor, nn

import surgery

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva' but:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization used:UserWarning"),
]

# Libraries whose types are not complete.
hf: Any = peft
untyped: Any = torch

ROWS = torch.randn(1, 53, 11, generator=torch.Generator().manual_seed(4)) * torch.arange(1, 12)
WANTED = torch.randn(1, 53, 7, generator=torch.Generator().manual_seed(6))
BATCH = {"input_ids": (torch.arange(8) * 5 % 13)[None]}


def linear() -> nn.Module:
    untyped.manual_seed(0)
    return nn.Sequential(nn.Linear(11, 23), nn.Tanh(), nn.Linear(23, 7)).eval()


MODELS: Mapping[str, tuple[Callable[[], nn.Module], tuple[str, ...], Any]] = {
    "linear": (linear, ("0", "2"), ROWS),
    "llama": (llama, ("q_proj", "v_proj", "down_proj"), BATCH),
    "gpt2": (gpt2, ("c_attn", "mlp.c_proj"), BATCH),
}
every_model = pytest.mark.parametrize("name", MODELS)


def called(model: nn.Module, batch: Any) -> Tensor:
    run: Any = model
    return run(batch) if isinstance(batch, Tensor) else run(**batch).last_hidden_state


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Of any output one number, with a gradient of every size."""
    output = called(model, batch)
    return (output * torch.linspace(-1, 2, output.numel()).view_as(output)).sin().sum()


def output(model: nn.Module, name: str) -> Tensor:
    return called(model, MODELS[name][2]).detach()


def config(name: str, **given: Any) -> Any:
    targets = {"target_modules": [*MODELS[name][1]], "fan_in_fan_out": name == "gpt2"}
    return hf.LoraConfig(**{"r": 4, "lora_alpha": 6, **targets, **given})


def spec(name: str, call: str) -> str:
    return f"match {' | '.join(MODELS[name][1])} apply {call}"


def theirs_at(model: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    """A and B of peft's site."""
    named = dict(model.named_parameters())
    a, b = (named[f"base_model.model.{path}.lora_{n}.default.weight"] for n in "AB")
    return a.detach(), b.detach()


def preprocess_corda(*given: Any, **named: Any) -> None:
    """peft's own, which imports a package that it does not ask for, for its dataclasses."""
    stand_in: Any = ModuleType("attr")
    stand_in.dataclass = dataclasses.dataclass
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "attr", stand_in)
        module: Any = importlib.import_module("peft.tuners.lora.corda")
    module.preprocess_corda(*given, **named)


def corda(name: str, method: str) -> nn.Module:
    make, _, batch = MODELS[name]
    model = make()
    given = config(
        name, init_lora_weights="corda", corda_config=CordaConfig(corda_method=cast(Any, method))
    )
    preprocess_corda(model, given, run_model=lambda: called(model, batch))
    return cast(nn.Module, hf.get_peft_model(model, given)).eval()


@every_model
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_a_part_of_w_that_its_inputs_use(name: str, method: str) -> None:
    expected = corda(name, method)
    call = f'corda(r=4, alpha=6, corda_method="{method}")'
    compiled = surgery.compile(spec(name, call), MODELS[name][0](), data=[MODELS[name][2]])
    check_products(compiled, expected, 6 / 4)


def check_products(compiled: surgery.Compiled, theirs: nn.Module, scale: float) -> None:
    """What s B A begins as, and that the model begins as the base."""
    mine = compiled.parameters()
    for site in compiled.plan.sites:
        a, b = theirs_at(theirs, site.path)
        product = mine[site.adapted("B")] @ mine[site.adapted("A")]
        torch.testing.assert_close(scale * product, scale * b @ a, atol=2e-5, rtol=1e-3)


def without_dropout(model: nn.Module) -> nn.Module:
    """peft computes gradients in training mode; ours see the model as it is evaluated."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def lora_ga(name: str, **given: Any) -> nn.Module:
    make, _, batch = MODELS[name]
    model = without_dropout(make())
    chosen = config(name, r=2, init_lora_weights="lora_ga", lora_ga_config=hf.LoraGAConfig(**given))
    preprocess_loraga(model, chosen, lambda: cast(Any, loss(model, batch)).backward())
    return cast(nn.Module, hf.get_peft_model(model, chosen)).eval()


@every_model
@pytest.mark.parametrize(
    ("direction", "scale"), [("ArB2r", "stable"), ("A2rBr", "gd_scale"), ("ArBr", "unit")]
)
def test_singular_vectors_of_the_gradient(name: str, direction: str, scale: str) -> None:
    untyped.manual_seed(3)
    expected = lora_ga(name, direction=direction, scale=scale)
    call = f'lora_ga(r=2, alpha=6, direction="{direction}", scale="{scale}")'
    model, batch = MODELS[name][0](), MODELS[name][2]
    compiled = surgery.compile(spec(name, call), model, data=[batch], loss=loss)
    base = output(MODELS[name][0](), name)
    torch.testing.assert_close(output(compiled.model, name), base, atol=2e-4, rtol=1e-4)
    for site in compiled.plan.sites:
        for tensor, theirs in zip("AB", theirs_at(expected, site.path), strict=True):
            mine = compiled.parameters()[site.adapted(tensor)]
            if (name, scale, tensor) == ("gpt2", "stable", "B"):  # peft takes in for out there
                mine = mine * (site.form.sizes.fan_in / site.form.sizes.fan_out) ** 0.25
            # Each pair of singular vectors has a sign that is free.
            torch.testing.assert_close(mine.abs(), theirs.abs(), atol=2e-5, rtol=1e-3)


def eva(name: str, **given: Any) -> nn.Module:
    make, _, batch = MODELS[name]
    chosen = config(name, init_lora_weights="eva", eva_config=hf.EvaConfig(**given))
    model = cast(nn.Module, hf.get_peft_model(make(), chosen))
    no_tokens = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    hf.initialize_lora_eva_weights(
        model,
        [batch],
        forward_fn=called,
        show_progress_bar=False,
        **(no_tokens if isinstance(batch, Tensor) else {}),
    )
    return model.eval()


@every_model
@pytest.mark.parametrize(
    "given",
    [{}, {"rho": 1.0, "whiten": True}, {"rho": 1.5, "adjust_scaling_factors": False}],
    ids=str,
)
def test_directions_in_which_inputs_vary_and_as_many_as_explain_most(
    name: str, given: dict[str, Any], tmp_path: Path
) -> None:
    make, _, batch = MODELS[name]
    theirs: Any = eva(name, **given)
    options = "".join(f", {n}={json.dumps(v)}" for n, v in given.items())
    compiled = surgery.compile(spec(name, f"eva(r=4, alpha=6{options})"), make(), data=[batch])
    check_directions(compiled, theirs, name)
    check_both_ways(compiled, theirs, name, tmp_path)


def check_directions(compiled: surgery.Compiled, theirs: nn.Module, name: str) -> None:
    mine = compiled.parameters()
    modules: dict[str, nn.Module] = dict(cast(Any, theirs).named_modules())
    adapted = {name for name, module in modules.items() if hasattr(module, "lora_A")}
    assert {f"base_model.model.{s.path}" for s in compiled.plan.sites} == adapted
    # What does not vary at all has no direction of its own: a token fewer than there are.
    fewest = 7 if name != "linear" else 53
    for site in compiled.plan.sites:
        a, _ = theirs_at(theirs, site.path)
        assert site.form.shapes["A"] == tuple(a.shape)
        found, wanted = mine[site.adapted("A")][:fewest], a[:fewest]
        if dict(site.form.arguments)["whiten"]:  # peft counts the batch till it settles, so often:
            counted = (found.square().sum(1) / wanted.square().sum(1)) ** 2
            times = torch.round(counted)
            torch.testing.assert_close(counted, times, atol=0.05, rtol=0.01)
            wanted = wanted * times[:, None] ** 0.25
        torch.testing.assert_close(found, wanted, atol=3e-3, rtol=1e-2)
    torch.testing.assert_close(
        output(compiled.model, name), output(MODELS[name][0](), name), atol=0, rtol=0
    )


def perturbed(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))


def check_both_ways(compiled: surgery.Compiled, theirs: Any, name: str, directory: Path) -> None:
    """What either saves the other loads, with the same output, merged as well."""
    make = MODELS[name][0]
    for model in (compiled.model, theirs):
        perturbed(model)
    theirs.save_pretrained(str(directory / "theirs"))
    ours = surgery.attach(directory / "theirs", make())
    expected = output(theirs, name)
    torch.testing.assert_close(output(ours.model, name), expected, atol=1e-5, rtol=1e-4)
    ours.inverse.merge()
    torch.testing.assert_close(output(ours.model, name), expected, atol=1e-5, rtol=1e-4)
    ours.inverse.unload()
    assert bits(ours.model) == bits(make())
    assert compiled.save(directory / "ours").peft == ""
    loaded = hf.PeftModel.from_pretrained(make(), str(directory / "ours")).eval()
    expected = output(compiled.model, name)
    torch.testing.assert_close(output(loaded, name), expected, atol=1e-5, rtol=1e-4)
    again = surgery.attach(directory / "ours", make())
    assert torch.equal(output(again.model, name), expected)


@every_model
@pytest.mark.parametrize(
    "call", ["ortholora(r=4, alpha=6)", 'dora(r=4, alpha=6, init_weights="eva")']
)
def test_beginnings_that_are_plain_in_a_folder(name: str, call: str, tmp_path: Path) -> None:
    make, _, batch = MODELS[name]
    given: dict[str, Any] = {"init_lora_weights": "orthogonal"}
    if call.startswith("dora"):
        given = {"use_dora": True, "init_lora_weights": "gaussian"}
    theirs: Any = hf.get_peft_model(make(), config(name, **given)).eval()
    compiled = surgery.compile(spec(name, call), make(), data=[batch])
    base = output(make(), name)
    torch.testing.assert_close(output(compiled.model, name), base, atol=1e-5, rtol=1e-5)
    check_both_ways(compiled, theirs, name, tmp_path)


@pytest.mark.parametrize("call", ["corda(r=2)", "lora_ga(r=2)", "loftq(r=2)"])
def test_what_peft_cannot_load_again_is_not_written_for_it(call: str, tmp_path: Path) -> None:
    compiled = surgery.compile(spec("linear", call), linear(), data=[ROWS], loss=loss)
    perturbed(compiled.model)
    report = compiled.save(tmp_path)
    assert "peft does not know" in report.peft
    again = surgery.attach(tmp_path, linear())
    assert torch.equal(output(again.model, "linear"), output(compiled.model, "linear"))


BEGUN: Mapping[str, str] = {
    "corda": "corda(r=3, alpha=5)",
    "lora_ga": "lora_ga(r=2, alpha=5, rslora=true)",
    "pissa": "pissa(r=3, alpha=5)",
    "olora": "olora(r=3, rslora=true)",
}


@every_model
@pytest.mark.parametrize("call", BEGUN.values(), ids=BEGUN)
def test_as_a_product_beside_the_true_base_peft_loads_it(
    call: str, name: str, tmp_path: Path
) -> None:
    make, _, batch = MODELS[name]
    compiled = surgery.compile(spec(name, call), make(), data=[batch], loss=loss)
    perturbed(compiled.model)
    expected = output(compiled.model, name)
    compiled.save(tmp_path / "own")
    made = surgery.convert(tmp_path / "own", tmp_path / "plain", make(), to="lora")
    assert made.exact
    assert made.saved.peft == ""
    ranks = {site.path: site.form.shapes["A"][0] for site in compiled.plan.sites}
    assert {site.path: site.rank for site in made.sites} == {p: 2 * r for p, r in ranks.items()}
    loaded = hf.PeftModel.from_pretrained(make(), str(tmp_path / "plain")).eval()
    torch.testing.assert_close(output(loaded, name), expected, atol=1e-5, rtol=1e-4)


def test_what_rounding_took_from_every_element_is_no_product_of_few_columns(
    tmp_path: Path,
) -> None:
    compiled = surgery.compile(spec("linear", "loftq(r=2)"), linear())
    perturbed(compiled.model)
    compiled.save(tmp_path / "own")
    with pytest.raises(surgery.SurgeryError, match="adds no product of few columns"):
        surgery.convert(tmp_path / "own", tmp_path / "plain", linear(), to="lora")
    surgery.convert(tmp_path / "own", tmp_path / "whole", linear(), to="lora", rank=11)
    loaded = hf.PeftModel.from_pretrained(linear(), str(tmp_path / "whole")).eval()
    expected = output(compiled.model, "linear")
    torch.testing.assert_close(output(loaded, "linear"), expected, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------ the schedule

SCHEDULE: dict[str, Any] = {
    "target_r": 2,
    "tinit": 2,
    "tfinal": 3,
    "deltaT": 2,
    "beta1": 0.7,
    "beta2": 0.8,
    "total_step": 12,
    "orth_reg_weight": 0.3,
}


@pytest.mark.parametrize("name", ["linear", "llama"])
def test_the_budget_shrinks_as_pefts_does(name: str, tmp_path: Path) -> None:
    make, targets, batch = MODELS[name]
    chosen = hf.AdaLoraConfig(init_r=5, lora_alpha=6, target_modules=[*targets], **SCHEDULE)
    theirs = hf.get_peft_model(make(), chosen).eval()
    theirs.save_pretrained(str(tmp_path / "begun"))
    compiled = surgery.attach(tmp_path / "begun", make())
    allocation = surgery.allocate(compiled, **SCHEDULE)
    trained = [p for p in compiled.model.parameters() if p.requires_grad]
    optimizers: list[Any] = [
        torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], 0.02),
        torch.optim.SGD(trained, 0.02),
    ]
    for step in range(1, 13):
        regular = orthogonality(theirs)
        torch.testing.assert_close(allocation.loss(), regular, atol=1e-6, rtol=1e-5)
        total = loss(theirs, batch) + regular
        ours = loss(compiled.model, batch) + allocation.loss()
        torch.testing.assert_close(ours, total, atol=1e-4, rtol=1e-4)
        for optimizer, value in zip(optimizers, (total, ours), strict=True):
            cast(Any, value).backward()
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
        allocation.step(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        same_vectors(compiled, theirs)
    patterns = theirs.peft_config["default"].rank_pattern
    found: dict[str, list[bool]] = {
        f"{path}.lora_E.default": cast(Any, m).tolist() for path, m in allocation.masks.items()
    }
    assert found == {k.removeprefix("model."): v for k, v in patterns.items()}
    assert 0 < sum(map(sum, found.values())) == 2 * len(found)
    check_saved(compiled, allocation, theirs, name, tmp_path)


def orthogonality(model: Any) -> Tensor:
    """The term that peft adds to the loss that a model gives by itself."""
    tuner = model.base_model
    tuner.model.forward = lambda: SimpleNamespace(loss=torch.zeros(()))
    try:
        return tuner.forward().loss
    finally:
        del tuner.model.forward


def same_vectors(compiled: surgery.Compiled, theirs: nn.Module) -> None:
    named, mine = dict(theirs.named_parameters()), compiled.parameters()
    for site in compiled.plan.sites:
        vector = named[f"base_model.model.{site.path}.lora_E.default"].detach().flatten()
        found = mine[site.adapted("E")]
        assert torch.equal(found == 0, vector == 0)
        torch.testing.assert_close(found, vector, atol=1e-5, rtol=1e-3)


def check_saved(
    compiled: surgery.Compiled, allocation: Any, theirs: nn.Module, name: str, directory: Path
) -> None:
    """What is saved is pruned, by them and by us, and is the same model."""
    make = MODELS[name][0]
    expected = output(theirs, name)
    torch.testing.assert_close(output(compiled.model, name), expected, atol=1e-5, rtol=1e-4)
    saved = allocation.save(directory / "ours")
    assert saved.peft == ""
    again = surgery.attach(directory / "ours", make())
    torch.testing.assert_close(output(again.model, name), expected, atol=1e-5, rtol=1e-4)
    lengths = [site.form.shapes["E"][0] for site in again.plan.sites]
    assert sum(lengths) == 2 * len(allocation.masks)
    loaded = hf.PeftModel.from_pretrained(make(), str(directory / "ours")).eval()
    torch.testing.assert_close(output(loaded, name), expected, atol=1e-5, rtol=1e-4)
    cast(Any, theirs).save_pretrained(str(directory / "theirs"))
    other = surgery.attach(directory / "theirs", make())
    torch.testing.assert_close(output(other.model, name), expected, atol=1e-5, rtol=1e-4)
