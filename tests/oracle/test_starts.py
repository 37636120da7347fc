"""Beginnings that read W and change what it is: peft's folders attach, and ours load in peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from small_models import TOKENS, bert, gpt2, llama
from torch import Tensor, nn

import surgery

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning"),
]

# Libraries whose types are not complete.
hf: Any = peft
untyped: Any = torch

ROWS = torch.randn(5, 11, generator=torch.Generator().manual_seed(4))


def linear() -> nn.Module:
    untyped.manual_seed(0)
    return nn.Sequential(nn.Linear(11, 23), nn.Tanh(), nn.Linear(23, 7)).eval()


def output(model: nn.Module) -> Tensor:
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if isinstance(inner, nn.Sequential):
        return cast(Tensor, model(ROWS))
    return cast(Tensor, model(TOKENS).last_hidden_state)


@dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    init: str
    targets: tuple[str, ...]
    config: dict[str, Any]
    call: str

    def peft_config(self) -> peft.LoraConfig:
        beginning = cast(Any, self.init)
        given = {"target_modules": [*self.targets], "fan_in_fan_out": self.model is gpt2}
        return peft.LoraConfig(init_lora_weights=beginning, **given, **self.config)

    def spec(self) -> str:
        return f"match {' | '.join(self.targets)} apply {self.call}"


ATTENTION = ("q_proj", "v_proj")
CASES = (
    Case(
        "pissa",
        linear,
        "pissa",
        ("0", "2"),
        {"r": 3, "lora_alpha": 7},
        "pissa(r=3, alpha=7)",
    ),
    Case(
        "pissa on a transformer",
        llama,
        "pissa",
        (*ATTENTION, "down_proj"),
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "lora_dropout": 0.3,
            "rank_pattern": {"layers.1.self_attn.v_proj": 2},
        },
        "pissa(r=4, alpha=6, rslora=true, dropout=0.3)",
    ),
    Case(
        "pissa on Conv1D",
        gpt2,
        "pissa",
        ("c_attn", "c_proj"),
        {"r": 3},
        "pissa(r=3, alpha=8)",
    ),
    Case(
        "olora",
        linear,
        "olora",
        ("0", "2"),
        {"r": 3, "lora_alpha": 7},
        "olora(r=3, alpha=7)",
    ),
    Case(
        "olora on a transformer",
        bert,
        "olora",
        ("query", "output.dense"),
        {"r": 5, "lora_alpha": 4},
        "olora(r=5, alpha=4)",
    ),
    Case(
        "gaussian",
        llama,
        "gaussian",
        ATTENTION,
        {"r": 3, "lora_alpha": 5},
        'lora(r=3, alpha=5, init_weights="gaussian")',
    ),
    Case("mica", linear, "mica", ("0", "2"), {"r": 3, "lora_alpha": 7}, "mica(r=3, alpha=7)"),
    Case(
        "mica on a transformer",
        llama,
        "mica",
        (*ATTENTION, "down_proj"),
        {"r": 3, "use_rslora": True, "lora_dropout": 0.2},
        "mica(r=3, alpha=8, rslora=true, dropout=0.2)",
    ),
    Case("mica on Conv1D", gpt2, "mica", ("c_attn", "wte"), {"r": 3}, "mica(r=3, alpha=8)"),
)


def name_of(case: Case) -> str:
    return case.name


def moved(model: nn.Module) -> None:
    """Parameters away from where they begin, so that the adapter does something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))


def started_by_peft(case: Case) -> nn.Module:
    return cast(nn.Module, hf.get_peft_model(case.model(), case.peft_config())).eval()


def saved_by_peft(case: Case, directory: Path) -> nn.Module:
    model = started_by_peft(case)
    moved(model)
    cast(Any, model).save_pretrained(str(directory))
    return model


every_case = pytest.mark.parametrize("case", CASES, ids=name_of)


@every_case
def test_what_peft_saves_attaches(case: Case, tmp_path: Path) -> None:
    expected = output(saved_by_peft(case, tmp_path))
    base = case.model()
    weights = {n: t.clone() for n, t in base.state_dict().items()}
    ours = surgery.attach(tmp_path, base)
    assert (expected - output(case.model())).abs().max() > 1e-3
    torch.testing.assert_close(output(ours.model), expected, atol=1e-5, rtol=1e-4)
    ours.inverse.merge()
    torch.testing.assert_close(output(ours.model), expected, atol=1e-5, rtol=1e-4)
    ours.inverse.unload()
    assert all(torch.equal(t, weights[n]) for n, t in base.state_dict().items())


@every_case
def test_what_we_save_peft_loads_and_we_attach_again(case: Case, tmp_path: Path) -> None:
    compiled = surgery.compile(case.spec(), case.model())
    moved(compiled.model)
    expected = output(compiled.model)
    assert (expected - output(case.model())).abs().max() > 1e-3
    assert compiled.save(tmp_path).peft == ""
    theirs = hf.PeftModel.from_pretrained(case.model(), str(tmp_path)).eval()
    torch.testing.assert_close(output(theirs), expected, atol=1e-5, rtol=1e-4)
    ours = surgery.attach(tmp_path, case.model())
    assert torch.equal(output(ours.model), expected)


@every_case
def test_it_begins_as_the_base_and_with_the_change_that_peft_begins_with(case: Case) -> None:
    compiled = surgery.compile(case.spec(), case.model())
    base = output(case.model())
    torch.testing.assert_close(output(compiled.model), base, atol=1e-6, rtol=1e-5)
    if case.init in ("gaussian", "mica") or "rank_pattern" in case.config:
        return
    theirs = {n: p.double() for n, p in started_by_peft(case).named_parameters()}
    for site in compiled.plan.sites:
        at = f"base_model.model.{site.path}."
        a, b = (theirs[f"{at}lora_{n}.default.weight"] for n in "AB")
        mine = compiled.parameters()
        product = mine[site.adapted("B")].double() @ mine[site.adapted("A")].double()
        # Of each factor the signs are free, and theirs are of a factorisation in float32.
        torch.testing.assert_close(product, b @ a, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["pissa", "olora on a transformer"])
def test_what_is_kept_of_the_start_is_in_our_form_and_in_no_file_of_pefts(
    name: str, tmp_path: Path
) -> None:
    case = next(c for c in CASES if c.name == name)
    compiled = surgery.compile(case.spec(), case.model())
    kept = {n for n in compiled.parameters() if n.endswith("_0")}
    assert len(kept) == 2 * len(compiled.plan.sites)
    assert not any(p.requires_grad for n, p in compiled.model.named_parameters() if n in kept)
    compiled.save(tmp_path)
    written = json.loads((tmp_path / "mapping.json").read_text())["tensors"]
    assert not kept & {row["adapted"] for row in written}
    native = compiled.mapping.rename(compiled.parameters(), to="native")
    assert len(native) == len(compiled.parameters())


REFUSED: dict[str, dict[str, object]] = {
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "corda": {"init_lora_weights": "corda"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_file_tells_is_refused(name: str, tmp_path: Path) -> None:
    saved_by_peft(CASES[0], tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **REFUSED[name]}))
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.attach(tmp_path, linear())
    (found,) = [d for d in caught.value.diagnostics if "init_lora_weights" in d.message]
    assert found.code == "E515"
    assert "changes the base by what no file has" in found.message


@pytest.mark.parametrize("init", ["orthogonal", False])
def test_beginnings_that_only_draw_are_plain(init: str | bool, tmp_path: Path) -> None:
    config: dict[str, Any] = {"r": 4, "lora_alpha": 6}
    case = Case("", linear, cast(str, init), ("0", "2"), config, "")
    expected = output(saved_by_peft(case, tmp_path))
    ours = surgery.attach(tmp_path, linear())
    torch.testing.assert_close(output(ours.model), expected, atol=1e-5, rtol=1e-4)


def test_on_an_embedding_only_one_beginning_is_pefts() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(7, 5)})
    compiled = surgery.compile("match table apply pissa(r=2)", model)
    (row, *_) = compiled.mapping.rows
    assert row.name == "A"
    report = surgery.plan("match table apply pissa(r=2)", model)
    assert report.sites[0].form.derived.merge_class == "algebraic"
