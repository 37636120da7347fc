"""Against peft itself: one vector dealt to all sites, and the places of the largest elements."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from small_models import TOKENS, gpt2, llama
from support import bits
from torch import Tensor, nn

import surgery
from surgery.store import read_tensors, save_tensors

# Libraries whose types are not complete.
hf: Any = peft
untyped: Any = torch

TARGETS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int]] = {
    "names": (llama, {"target_modules": ["v_proj", "down_proj", "q_proj"]}, 6),
    "a regex": (llama, {"target_modules": r".*\.mlp\.(up|down)_proj"}, 4),
    "some layers": (
        llama,
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        1,
    ),
    "all but those saved": (
        llama,
        {"target_modules": "all-linear", "modules_to_save": ["q_proj"]},
        16,
    ),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}, 4),
}


def output(model: nn.Module) -> Tensor:
    return cast(Tensor, model(TOKENS).last_hidden_state)


def saved(model: nn.Module, directory: Path, **options: Any) -> Tensor:
    untyped.manual_seed(3)
    config = hf.UniLoraConfig(**{"r": 3, "theta_d_length": 101, **options})
    adapted = hf.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape)
    adapted.save_pretrained(str(directory))
    return output(adapted)


def close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", TARGETS)
def test_the_sites_are_those_that_the_config_names(name: str, tmp_path: Path) -> None:
    make, options, count = TARGETS[name]
    before = output(make())
    expected = saved(make(), tmp_path / "theirs", **options)
    ours = surgery.attach(tmp_path / "theirs", make())
    assert (expected - before).abs().max() > 1e-3
    close(output(ours.model), expected)
    assert len(ours.plan.sites) == count
    assert ours.save(tmp_path / "ours").peft == ""
    theirs = hf.PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval()
    close(output(theirs), expected)
    ours.inverse.merge()
    close(output(ours.model), expected)
    ours.inverse.unload()
    assert torch.equal(output(ours.model), before)


def test_statements_in_another_order_are_dealt_the_same(tmp_path: Path) -> None:
    spec = "match v_proj apply unilora(r=2) match q_proj apply unilora(r=2)"
    compiled = surgery.compile(spec, llama())
    expected = output(compiled.model)
    assert compiled.save(tmp_path).peft == ""
    assert [*read_tensors(tmp_path / "adapter_model.safetensors").shapes] == [
        "base_model.unilora_theta_d"
    ]
    theirs = hf.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    close(output(theirs), expected)
    assert (expected - output(llama())).abs().max() > 0


def test_two_groups_of_arguments_are_no_folder_of_pefts(tmp_path: Path) -> None:
    spec = "match v_proj apply unilora(r=2) match q_proj apply unilora(r=3)"
    compiled = surgery.compile(spec, llama())
    assert "`r` is one for all sites" in compiled.save(tmp_path).peft
    assert torch.equal(output(surgery.attach(tmp_path, llama()).model), output(compiled.model))


def test_without_numpy_it_is_said_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    before = bits(model)
    plain = surgery.compile("match q_proj apply lora(r=2)", llama())
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(surgery.SurgeryError, match="E525"):
        surgery.compile("match q_proj apply unilora(r=2, proj_seed=77)", model)
    assert bits(model) == before
    plain.save(tmp_path / "plain")  # which needs none
    assert surgery.attach(tmp_path / "plain", llama()).adapters == ("default",)


def test_a_config_is_imported_without_what_is_told(tmp_path: Path) -> None:
    compiled = surgery.compile("match /[qv]_proj/ apply unilora(r=2, proj_seed=5)", llama())
    compiled.save(tmp_path)
    spec = surgery.import_config(tmp_path, llama())
    assert "apply unilora(r=2, proj_seed=5)" in spec
    again = surgery.plan(spec, llama())
    assert [s.form.arguments for s in again.sites] == [
        s.form.arguments for s in compiled.plan.sites
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"save_indices": True, "target_modules": ["q_proj"]}, "`save_indices` is true"),
        ({"target_modules": ["nowhere"]}, "no tensor of the folder is one of unilora"),
    ],
)
def test_what_is_not_known_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    saved(llama(), tmp_path, **{**options, "target_modules": ["q_proj"]})
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "target_modules": options["target_modules"]}))
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.attach(tmp_path, llama())
    assert said in str(caught.value)


# ------------------------------------------------------------------------- the largest elements


def sparse(directory: Path, **options: Any) -> Tensor:
    untyped.manual_seed(3)
    config = hf.SupertuningConfig(target_modules=["q_proj", "down_proj"], **options)
    adapted = hf.get_peft_model(llama(), config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape)
    adapted.save_pretrained(str(directory))
    return output(adapted)


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9, 0.93, 0.99])
def test_there_are_as_many_places_as_peft_has_and_they_are_the_same(
    sparsity: float, tmp_path: Path
) -> None:
    sparse(tmp_path, sparsity=sparsity)
    file = read_tensors(tmp_path / "adapter_model.safetensors")
    spec = f"match /q_proj|down_proj/ apply supertuning(sparsity={sparsity})"
    compiled = surgery.compile(spec, llama())
    assert torch.equal(output(compiled.model), output(llama()))
    found = {n: t for n, t in compiled.parameters().items() if n.endswith("places")}
    assert len(found) == 4
    for name, places in found.items():
        path = name.removesuffix(".surgery.default.places")
        assert places.dtype == torch.int32
        assert torch.equal(places, file[f"base_model.model.{path}.supertuning_indices"])


@pytest.mark.filterwarnings("ignore:save_precomputed_indices=False:UserWarning")
def test_places_that_no_file_has_are_found_in_the_base(tmp_path: Path) -> None:
    expected = sparse(tmp_path / "a", sparsity=0.9, save_precomputed_indices=False)
    ours = surgery.attach(tmp_path / "a", llama())
    close(output(ours.model), expected)
    assert ours.save(tmp_path / "b").peft == ""
    file = read_tensors(tmp_path / "b" / "adapter_model.safetensors")
    assert any(key.endswith("supertuning_indices") for key in file.shapes)
    close(output(hf.PeftModel.from_pretrained(llama(), str(tmp_path / "b")).eval()), expected)


@pytest.mark.parametrize("place", [-1, 144])
def test_places_outside_of_the_weight_are_refused(place: int, tmp_path: Path) -> None:
    sparse(tmp_path, sparsity=0.9)
    path = tmp_path / "adapter_model.safetensors"
    file = read_tensors(path)
    tensors = {key: file[key].clone() for key in file.shapes}
    tensors["base_model.model.layers.1.self_attn.q_proj.supertuning_indices"][3] = place
    save_tensors(path, tensors)
    with pytest.raises(surgery.SurgeryError, match=r"places` has places outside of 144"):
        surgery.attach(tmp_path, llama())


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("train P[3] = largest(W, 3); W' = W", "E111", "are not trained"),
        ("W' = W + scatter(rownorm(W), largest(W, out), out, in)", "E136", "in a beginning"),
        ("frozen P[3] = largest(b, 3); W' = W", "E108", "needs 2 axes"),
    ],
)
def test_what_is_largest_stands_in_a_frozen_beginning(body: str, code: str, said: str) -> None:
    found = surgery.check(f"method m() on matrix {{ {body} }} match q_proj apply m()")
    assert [d.code for d in found][:1] == [code]
    assert said in found[0].message


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(surgery.SurgeryError, match="not a whole size"):
        surgery.plan("match q_proj apply supertuning(sparsity=0.999)", llama())
