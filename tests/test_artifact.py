"""A saved adapter carries its own mathematics, and a folder that is not whole is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.artifact import CONFIG, INVERSE, MAPPING, SPEC, TENSORS
from surgery.errors import ArtifactError, PlanError, SurgeryError
from surgery.store import read_tensors, save_tensors

untyped: Any = torch


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(6, 8), "k": nn.Linear(8, 6, bias=False)})
            for _ in range(3)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = cast(Tensor, self.embed(tokens))
        for layer in cast("list[dict[str, nn.Module]]", self.layers):
            x = x + cast(Tensor, layer["k"](torch.tanh(layer["q"](x))))
        return x


TOKENS = torch.tensor([[3, 5, 1, 7, 2], [2, 0, 10, 4, 6]])


def net() -> Net:
    untyped.manual_seed(0)
    return Net().eval()


def moved(compiled: surgery.Compiled) -> surgery.Compiled:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in compiled.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return compiled


def saved(spec: str, folder: Path, **options: Any) -> tuple[surgery.Compiled, Tensor]:
    compiled = moved(surgery.compile(spec, net(), **options))
    compiled.save(folder)
    return compiled, compiled.model(TOKENS)


GATED = """
method gated(r: int = 2, strength: float = 1) on matrix {
  train U[r, in] ~ normal(std = 0.1)
  train g[out] = 0
  let   H = tanh(reduce(U, "r i -> i", "mean"))
  W' = W + strength * (g * rows(cols(W) * H))
}
"""

SPECS = (
    "match /q|k/ apply lora(r = 2 + layer, alpha = 3)",
    "match /q|k/ apply dora(r=2)",
    'match q apply ia3() match k apply ia3(side="in")',
    "match /q|k/ apply vera(r=5)",
    "match q apply vera(r=5) match k apply vera(r=3)",
    "match k apply oft(block_size=4)",
    "match /q|k/ apply bone(r=5)",
    "match /q|k/ apply bat(r=2)",
    'match /q|k/ apply miss(r=2, init_weights="bat")',
    "match embed apply lora(r=2) match q apply bone(r=3) match k apply dora(r=2)",
    f"{GATED} let twice = 2 * 0.5 match q in layers[-2:] apply gated(r=3, strength=twice)",
)


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_saved_attaches_and_computes_the_same(spec: str, tmp_path: Path) -> None:
    compiled, expected = saved(spec, tmp_path / "out")
    assert not torch.equal(expected, net()(TOKENS))
    attached = surgery.attach(tmp_path / "out", net())
    assert torch.equal(attached.model(TOKENS), expected)
    ours, theirs = compiled.parameters(), attached.parameters()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    again = attached.save(tmp_path / "again")
    for file in again.files:
        if file.name != TENSORS:
            assert file.read_text() == (tmp_path / "out" / file.name).read_text()


@pytest.mark.parametrize("spec", SPECS)
def test_the_spec_in_the_folder_compiles_again(spec: str, tmp_path: Path) -> None:
    compiled, _ = saved(spec, tmp_path / "out")
    again = surgery.compile(surgery.load(tmp_path / "out" / SPEC), net())
    sites = [(s.path, s.form.method.name, s.form.arguments) for s in compiled.plan.sites]
    assert [(s.path, s.form.method.name, s.form.arguments) for s in again.plan.sites] == sites


def test_params_are_kept_as_they_were_set(tmp_path: Path) -> None:
    spec = (
        'param rank: int = 2 param place: text = "out" param scale: float '
        "match q apply lora(r=rank, alpha=scale) match k apply ia3(side=place)"
    )
    values = {"rank": 3, "place": "in", "scale": 1e-5}
    saved(spec, tmp_path / "out", values=values)
    text = (tmp_path / "out" / SPEC).read_text()
    assert 'param rank: int = 3\n\nparam place: text = "in"\n\nparam scale: float = 1e-05' in text
    assert surgery.attach(tmp_path / "out", net()).plan.resolved.values == values


def test_an_adapter_keeps_its_name_and_no_key_has_it(tmp_path: Path) -> None:
    spec = "adapter code { match q apply lora(r=2) } adapter math { match k apply bone(r=3) }"
    compiled = moved(surgery.compile(spec, net()))
    for name in ("code", "math"):
        compiled.save(tmp_path / name, name)
        assert not any(name in key for key in read_tensors(tmp_path / name / TENSORS))
    model = net()
    surgery.attach(tmp_path / "math", model)
    handle = surgery.attach(tmp_path / "code", model)
    assert handle.adapters == ("math", "code")
    for name in ("code", "math"):
        compiled.activate(name)
        handle.activate(name)
        assert torch.equal(handle.model(TOKENS), compiled.model(TOKENS))


def test_a_peft_folder_has_a_config_and_another_has_the_reason(tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = surgery.compile("match q apply lora(r=2)", net()).save(out)
    assert report.peft == ""
    assert {f.name for f in report.files} == {TENSORS, CONFIG, SPEC, MAPPING, INVERSE}
    assert set(read_tensors(out / TENSORS)) >= {"base_model.model.layers.0.q.lora_A.weight"}
    spec = "match q apply lora(r=2) match k apply bone(r=2)"
    report = surgery.compile(spec, net()).save(out)
    assert "one method an adapter" in report.peft
    assert {f.name for f in out.iterdir()} == {TENSORS, SPEC, MAPPING, INVERSE}
    assert set(read_tensors(out / TENSORS)) >= {"layers.0.q.A", "layers.2.k.D"}


def test_the_inverse_is_told(tmp_path: Path) -> None:
    saved("match q apply dora(r=2) match k apply bone(r=2)", tmp_path)
    data = json.loads((tmp_path / INVERSE).read_text())
    by_method = {row["method"]: row for row in data["classes"]}
    assert by_method["dora"]["merge"] == "witness"
    assert list(by_method["dora"]["witnesses"]) == ["witness0"]
    assert by_method["bone"]["inverse"].startswith("W = W' - tile(")
    assert set(data["sites"]) == {f"layers.{i}.{n}" for i in range(3) for n in "qk"}


def test_a_failed_save_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("match q apply lora(r=2)", tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def full(text: str) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            path.write_text(text[:10])
            raise OSError(28, "No space left on device")

        return write

    monkeypatch.setattr("surgery.artifact.text_writer", full)
    with pytest.raises(ArtifactError, match=r"E513.*No space left"):
        surgery.compile("match q apply bone(r=2)", net()).save(tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


# ----------------------------------------------------------------------------- broken folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved("match /q|k/ apply lora(r=2)", tmp_path / "out")
    return tmp_path / "out"


def refusal(folder: Path, model: nn.Module | None = None) -> SurgeryError:
    model = model or net()
    names = [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    with pytest.raises(SurgeryError) as caught:
        surgery.attach(folder, model)
    assert [type(m) for m in model.modules()] == names
    assert list(model.state_dict()) == keys
    return caught.value


def codes(error: SurgeryError) -> set[str]:
    return {d.code for d in error.diagnostics}


def test_every_tensor_that_is_wrong_is_listed_with_the_nearest_right(folder: Path) -> None:
    tensors = dict(read_tensors(folder / TENSORS))
    prefix = "base_model.model.layers"
    tensors[f"{prefix}.0.q.lora_a.weight"] = tensors.pop(f"{prefix}.0.q.lora_A.weight")
    del tensors[f"{prefix}.1.k.lora_B.weight"]
    tensors["something.else"] = torch.ones(2)
    tensors[f"{prefix}.2.k.lora_A.weight"] = torch.ones(2, 9)
    save_tensors(folder / TENSORS, tensors)
    error = refusal(folder)
    text = str(error)
    assert codes(error) == {"E518"}
    assert len(error.diagnostics) == 5
    assert f"`{prefix}.0.q.lora_a.weight` stands there instead" in text
    assert f"belongs there is `{prefix}.0.q.lora_A.weight`" in text
    assert f"lacks the tensor `{prefix}.1.k.lora_B.weight`" in text
    assert "has `something.else`, which is no tensor of it" in text
    assert f"`{prefix}.2.k.lora_A.weight` has shape [2, 9], and the equation needs [2, 8]" in text


def test_another_model_is_refused(folder: Path) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(6, 8)})])

    error = refusal(folder, Other())
    assert isinstance(error, PlanError)
    assert len(error.diagnostics) == 5


@pytest.mark.parametrize("name", [TENSORS, MAPPING, SPEC])
def test_a_file_that_is_cut_off_is_refused(name: str, folder: Path) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    assert codes(refusal(folder)) <= {"E512", "E003", "E006"}


def test_a_folder_without_tensors_is_refused(folder: Path) -> None:
    (folder / TENSORS).unlink()
    assert codes(refusal(folder)) == {"E511"}


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    assert codes(refusal(tmp_path)) == {"E517"}
    assert "is no folder" in str(refusal(tmp_path / "nothing"))
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"PK")
    assert "is a pickle, which can run code" in str(refusal(tmp_path))


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_edit(lambda m: m.update(version=99)), "`version` is 99"),
        (_edit(lambda m: m.update(adapter='x"); import os; ("')), "which is no name"),
        (_edit(lambda m: m.update(adapter="surgery.default")), "which is no name"),
        (_edit(lambda m: m.update(seed="one")), "`seed` is missing"),
        (_edit(lambda m: m.pop("sites")), "`sites` is missing"),
        (_edit(lambda m: m.update(form="nothing")), "E518"),
        (_edit(lambda m: m["sites"].append(m["sites"][0])), "stands twice"),
        (_edit(lambda m: m["sites"].append(7)), "a site is not described"),
        (_edit(lambda m: m["sites"][0].update(method="lroa")), "did you mean `lora`?"),
        (_edit(lambda m: m["sites"][0]["arguments"].pop("r")), "lora has the arguments"),
        (_edit(lambda m: m["sites"][0]["arguments"].update(r="two")), "is an int"),
        (_edit(lambda m: m["sites"][0]["arguments"].update(r=10**9)), ""),
        (_edit(lambda m: m["sites"][0]["arguments"].update(r=-1)), "whole number from 1 on"),
        (_edit(lambda m: m["sites"][0].update(path="layers.0.p")), "nearest is `layers.0.q`"),
    ],
)
def test_a_manifest_is_not_believed(
    change: Callable[[dict[str, Any]], object], message: str, folder: Path
) -> None:
    manifest = json.loads((folder / MAPPING).read_text())
    change(manifest)
    (folder / MAPPING).write_text(json.dumps(manifest))
    assert message in str(refusal(folder))


def test_a_config_that_is_damaged_is_refused(folder: Path) -> None:
    (folder / MAPPING).unlink()
    attached = surgery.attach(folder, net())
    assert len(attached.plan.sites) == 6
    config = json.loads((folder / CONFIG).read_text())
    for field, value, message in (
        ("r", "two", "`r` is an int"),
        ("r", 3, "the equation needs [3, 6]"),
        ("peft_type", "LORE", "did you mean LORA?"),
        ("lora_alpha", None, "`lora_alpha` is a float"),
        ("use_mystery", 5, "`use_mystery` is 5, which `lora` knows nothing of"),
        ("lora_alpha", float("nan"), "NaN is no number"),
        ("rank_pattern", {"q": 1}, "the equation needs [1, 6]"),
        ("rank_pattern", {"(": 1}, "E007"),
        ("rank_pattern", {"(.*)*x": 1}, "E007"),
        ("rank_pattern", {"^q|k": 1}, "has an anchor beside |"),
        ("alpha_pattern", {"q": "high"}, "`alpha_pattern` is a float"),
    ):
        (folder / CONFIG).write_text(json.dumps({**config, field: value}))
        assert message in str(refusal(folder))
    shutil.rmtree(folder)
