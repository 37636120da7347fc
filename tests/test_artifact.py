"""A saved adapter carries its own mathematics, and a folder that is not whole is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
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


# ------------------------------------------------------------------- features and the language


def rewritten(folder: Path, **changes: Any) -> Path:
    manifest = json.loads((folder / MAPPING).read_text())
    (folder / MAPPING).write_text(json.dumps({**manifest, **changes}))
    return folder


def test_an_unknown_feature_is_refused_where_it_is_required(folder: Path) -> None:
    optional = {"required": [], "optional": ["base-digests", "poetry"]}
    assert len(surgery.attach(rewritten(folder, features=optional), net()).plan.sites) == 6
    required = {"required": ["poetry", "base-digests", "prose"], "optional": []}
    error = refusal(rewritten(folder, features=required))
    assert [d.code for d in error.diagnostics] == ["E521"] * 2
    assert "it needs `poetry`" in str(error)
    assert "newer version" in str(error)


def test_a_newer_language_is_refused(folder: Path) -> None:
    assert json.loads((folder / MAPPING).read_text())["language"] == 1
    error = refusal(rewritten(folder, language=2))
    assert codes(error) == {"E521"}
    assert "version 2 of the language" in str(error)


@pytest.mark.parametrize(
    "changes",
    [
        {"language": "1"},
        {"language": 0},
        {"language": True},
        {"features": []},
        {"features": {"required": "poetry"}},
        {"features": {"optional": [1]}},
        {"features": None},
        {"tensors": []},
        {"tensors": [7]},
        {"tensors": None},
    ],
)
def test_what_a_manifest_needs_is_well_formed(changes: dict[str, Any], folder: Path) -> None:
    assert codes(refusal(rewritten(folder, **changes))) == {"E514"}


def test_rows_of_a_layer_are_a_feature_that_a_reader_needs(tmp_path: Path) -> None:
    class Attention(nn.Module):
        """Three projections in one, as Phi-3 has them."""

        def __init__(self) -> None:
            super().__init__()
            untyped.manual_seed(0)
            library = cast(Any, transformers)
            config = library.Phi3Config(
                hidden_size=12,
                intermediate_size=20,
                num_attention_heads=3,
                num_key_value_heads=3,
                num_hidden_layers=1,
                vocab_size=31,
                pad_token_id=0,
            )
            self.net = library.Phi3Model(config)

    compiled = surgery.compile("match @query | @value apply lora(r=2)", Attention())
    compiled.save(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MAPPING).read_text())
    assert manifest["features"] == {"required": ["parts"], "optional": ["base-digests"]}
    query, value = (site["base"]["sha256"] for site in manifest["sites"])
    assert query != value
    other = Attention()
    with torch.no_grad():
        other.net.layers[0].self_attn.qkv_proj.weight[-1] += 1
    error = refusal(tmp_path / "out", other)
    assert "of 2 weights 1 differ" in str(error)
    with torch.no_grad():
        other.net.layers[0].self_attn.qkv_proj.weight[12:24] += 1  # the keys are no site
    assert str(refusal(tmp_path / "out", other)) == str(error)


def test_a_manifest_of_before_is_read(folder: Path) -> None:
    manifest = json.loads((folder / MAPPING).read_text())
    for name in ("language", "features"):
        del manifest[name]
    for site in manifest["sites"]:
        del site["base"]
    (folder / MAPPING).write_text(json.dumps(manifest))
    assert len(surgery.attach(folder, other_net()).plan.sites) == 6


def test_a_saved_spec_uses_no_file(folder: Path) -> None:
    text = (folder / SPEC).read_text()
    (folder / "more.peft").write_text("let n = 1")
    for path in ("more.peft", "../out/more.peft", "/etc/passwd"):
        (folder / SPEC).write_text(f'use "{path}"\n{text}')
        assert codes(refusal(folder)) == {"E514"}


def test_a_tensor_that_the_manifest_does_not_promise_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / MAPPING).read_text())
    manifest["tensors"][0]["file"] = "../elsewhere"
    (folder / MAPPING).write_text(json.dumps(manifest))
    assert codes(refusal(folder)) == {"E514"}


def test_the_name_of_an_adapter_is_no_part_of_its_files(tmp_path: Path) -> None:
    for name in ("code", "math"):
        spec = f"adapter {name} {{ match /q|k/ apply ia3() match embed apply vera(r=2) }}"
        moved(surgery.compile(spec, net())).save(tmp_path / name)
    one, two = ((tmp_path / n / TENSORS).read_bytes() for n in ("code", "math"))
    assert read_tensors(tmp_path / "code" / TENSORS).keys() == (
        read_tensors(tmp_path / "math" / TENSORS).keys()
    )
    assert len(one) == len(two)
    bases = [
        [s["base"] for s in json.loads((tmp_path / n / MAPPING).read_text())["sites"]]
        for n in ("code", "math")
    ]
    assert bases[0] == bases[1]


# ------------------------------------------------------------------------------- another base


def other_net() -> Net:
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def test_another_base_of_equal_shapes_is_refused_unless_forced(folder: Path) -> None:
    error = refusal(folder, other_net())
    assert codes(error) == {"E522"}
    assert "of 6 weights 6 differ, the first at `layers.0.q`" in str(error)
    assert "force=True" in str(error)
    model = other_net()
    assert len(surgery.attach(folder, model, force=True).plan.sites) == 6


def test_one_weight_that_differs_is_enough(folder: Path) -> None:
    model = net()
    with torch.no_grad():
        cast(Any, model.layers[1])["k"].weight[3, 2] += 1e-3
    assert "of 6 weights 1 differ, the first at `layers.1.k`" in str(refusal(folder, model))
    model = net()
    with torch.no_grad():
        model.embed.weight.zero_()  # it is no site of this adapter
    surgery.attach(folder, model)


def test_a_digest_is_over_dtype_shape_and_bytes(folder: Path) -> None:
    first = json.loads((folder / MAPPING).read_text())["sites"][0]
    weight = cast(Any, net().layers[0])["q"].weight.detach()
    whole = hashlib.sha256(b"float32 [8, 6] " + weight.numpy().tobytes()).hexdigest()
    assert first["base"] == {"dtype": "float32", "sha256": whole}


@pytest.mark.parametrize("out", [2, 3, 1000])
def test_a_large_weight_is_digested_by_some_of_its_rows(out: int) -> None:
    from surgery.digests import MOST, digest

    weight = torch.zeros(out, 2 * MOST // out + 1)
    before = digest(weight)
    assert digest(weight.clone()) == before
    for row in (0, out - 1):
        changed = weight.clone()
        changed[row, -1] = 1
        assert digest(changed) != before
    assert digest(torch.zeros(weight.shape[1], out)) != before
    assert digest(weight.bfloat16()) != before
    assert digest(weight.bfloat16(), torch.float32) == before
    assert digest(weight.T.contiguous().T) == before


def test_a_base_that_was_loaded_wider_or_narrower(tmp_path: Path) -> None:
    spec = "match /q|k/ apply lora(r=2)"
    surgery.compile(spec, net().bfloat16()).save(tmp_path / "narrow")
    surgery.attach(tmp_path / "narrow", net())
    surgery.attach(tmp_path / "narrow", net().double())
    surgery.compile(spec, net()).save(tmp_path / "wide")
    surgery.attach(tmp_path / "wide", net().double())
    error = refusal(tmp_path / "wide", net().bfloat16())
    assert codes(error) == {"E522"}
    assert "load the base in float32" in str(error)
    surgery.attach(tmp_path / "wide", net().bfloat16().float(), force=True)


@pytest.mark.parametrize(
    "base",
    [
        7,
        None,
        {},
        {"dtype": "float32"},
        {"dtype": "float32", "sha256": "abc"},
        {"dtype": "float32", "sha256": "g" * 64},
        {"dtype": "load", "sha256": "0" * 64},
        {"dtype": 4, "sha256": "0" * 64},
    ],
)
def test_a_damaged_digest_is_refused(base: object, folder: Path) -> None:
    manifest = json.loads((folder / MAPPING).read_text())
    manifest["sites"][2]["base"] = base
    (folder / MAPPING).write_text(json.dumps(manifest))
    error = refusal(folder)
    assert codes(error) == {"E514"}
    assert "is no digest of a weight" in str(error)


@pytest.mark.parametrize("dtype", ["float16", "int8", "complex64", "quint8"])
def test_a_digest_that_is_not_this_weights(dtype: str, folder: Path) -> None:
    manifest = json.loads((folder / MAPPING).read_text())
    manifest["sites"][2]["base"] = {"dtype": dtype, "sha256": "0" * 64}
    (folder / MAPPING).write_text(json.dumps(manifest))
    assert codes(refusal(folder)) == {"E522"}


def test_on_meta_there_is_nothing_to_digest_or_compare(folder: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Net()
    surgery.attach(folder, model).save(tmp_path / "again")
    manifest = json.loads((tmp_path / "again" / MAPPING).read_text())
    assert not any("base" in site for site in manifest["sites"])
    assert manifest["features"]["optional"] == []


def test_what_is_merged_is_not_taken_for_the_base(folder: Path, tmp_path: Path) -> None:
    spec = "match /q|k/ apply lora(r=2) match embed apply ia3()"
    compiled = moved(surgery.compile(spec, net()))
    compiled.save(tmp_path / "apart")
    apart = (tmp_path / "apart" / MAPPING).read_text()
    compiled.inverse.merge()
    compiled.save(tmp_path / "exact")
    assert (tmp_path / "exact" / MAPPING).read_text() == apart
    with pytest.raises(SurgeryError, match="E402"):
        surgery.attach(folder, compiled.model)
    compiled.inverse.unmerge()
    compiled.inverse.merge(undo="algebraic")
    compiled.save(tmp_path / "algebraic")
    assert "sha256" not in (tmp_path / "algebraic" / MAPPING).read_text()
    compiled.inverse.unload(keep_merge=True)
    assert codes(refusal(folder, compiled.model)) == {"E522"}
