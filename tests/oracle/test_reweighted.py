"""Against peft: weights multiplied, outputs turned, biases moved, ranks cut, norms as copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import safetensors.torch
import torch
from beside_peft import (
    Case,
    attaches,
    drops,
    every,
    fed,
    loads,
    moved,
    output,
    saved_by_peft,
)
from oracle.test_peft import ATTENTION, convnet, wavenet
from small_models import bert, gpt2, llama
from torch import Tensor, nn

import surgery
from surgery.store import read_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term:UserWarning"),
]

hf: Any = peft  # whose types are not complete
untyped: Any = torch
stored: Any = safetensors.torch


class Two(nn.Module):
    """Two layers, one of them without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 12)
        self.last = nn.Linear(12, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def two() -> nn.Module:
    untyped.manual_seed(4)
    return fed(Two(), 3, 7)


CASES = (
    Case(
        "hira",
        llama,
        lambda: peft.HiraConfig(
            r=3, hira_dropout=0.3, target_modules=ATTENTION, rank_pattern={"layers.1.*q_proj": 2}
        ),
        "match /q_proj|down_proj/ apply hira(r=2, dropout=0.2)",
    ),
    Case(
        "hira on small layers",
        two,
        lambda: peft.HiraConfig(r=3, target_modules=["first", "last"]),
        "match /first|last/ apply hira(r=4)",
    ),
    Case(
        "hira on Conv1D and embeddings",
        gpt2,
        lambda: peft.HiraConfig(r=3, target_modules=["c_attn", "wte"], fan_in_fan_out=True),
        "match /c_fc|wte/ apply hira(r=3)",
    ),
    Case(
        "hira on convolutions",
        convnet,
        lambda: peft.HiraConfig(r=3, target_modules=["stem", "point", "head"]),
        "match /stem|point|head/ apply hira(r=3)",
    ),
    Case(
        "hira on convolutions of one and three axes",
        wavenet,
        lambda: peft.HiraConfig(r=3, target_modules=["wave", "thin", "volume"]),
        "match /wave|thin|volume/ apply hira(r=3)",
    ),
    Case(
        "delora",
        llama,
        lambda: peft.DeloraConfig(
            r=3,
            delora_lambda=4,
            module_dropout=0.3,
            target_modules=[*ATTENTION, "up_proj"],
            rank_pattern={"up_proj": 5},
            lambda_pattern={"v_proj": 7},
        ),
        "match /q_proj|up_proj/ in layers[*] apply delora(r = 3 + layer, lambda = 2.5 + layer)",
    ),
    Case(
        "delora on small layers",
        two,
        lambda: peft.DeloraConfig(r=3, target_modules=["first", "last"]),
        "match /first|last/ apply delora(r=2)",
    ),
    Case(
        "road",
        llama,
        lambda: peft.RoadConfig(group_size=6, target_modules=["q_proj", "down_proj"]),
        "match /q_proj|up_proj/ apply road(group_size=6)",
    ),
    Case(
        "road, each output its own",
        bert,
        lambda: peft.RoadConfig(variant="road_2", group_size=4, target_modules=["query", "dense"]),
        'match /value|dense/ in encoder.layer[*] apply road(variant="road_2", group_size=4)',
    ),
    Case(
        "road, two for each output",
        two,
        lambda: peft.RoadConfig(variant="road_4", group_size=2, target_modules=["first", "last"]),
        'match first apply road(variant="road_4", group_size=6)',
    ),
    Case(
        "beft",
        llama,
        lambda: peft.BeftConfig(target_modules=["v_proj", "up_proj"]),
        "match /v_proj|gate_proj/ apply beft()",
    ),
    Case(
        "beft on small layers",
        two,
        lambda: peft.BeftConfig(target_modules=["first", "last"]),
        "match /first|last/ apply beft()",
    ),
    Case(
        "adalora",
        llama,
        lambda: peft.AdaLoraConfig(
            init_r=5, lora_alpha=3, total_step=10, lora_dropout=0.3, target_modules=ATTENTION
        ),
        "match /q_proj|up_proj/ in layers[*] apply adalora(init_r = 7, r = 3 + 4 * layer)",
    ),
    Case(
        "adalora on Conv1D",
        gpt2,
        lambda: peft.AdaLoraConfig(
            init_r=4, total_step=10, target_modules=["c_attn"], fan_in_fan_out=True
        ),
        "match /c_attn|c_fc/ apply adalora(init_r=5, r=2, alpha=3)",
    ),
    Case(
        "adalora on convolutions",
        convnet,
        lambda: peft.AdaLoraConfig(
            init_r=4, total_step=10, target_modules=["stem", "point", "head"]
        ),
        "match /stem|point|head/ apply adalora(init_r=5, dropout=0.1)",
    ),
)


@every(CASES)
def test_what_peft_saves_attaches(case: Case, tmp_path: Path) -> None:
    attaches(case, tmp_path)


@every(CASES)
def test_what_we_save_peft_loads(case: Case, tmp_path: Path) -> None:
    assert torch.equal(output(surgery.compile(case.spec, case.model()).model), output(case.model()))
    loads(case, tmp_path)


def pruned(directory: Path) -> nn.Module:
    """What peft makes of three of seven values a site, and of none at one site; saved."""
    config = peft.AdaLoraConfig(
        init_r=7, lora_alpha=5, total_step=10, target_modules=[*ATTENTION, "up_proj"]
    )
    model = hf.get_peft_model(llama(), config).eval()
    moved(model)
    generator, marks = torch.Generator().manual_seed(8), dict[str, list[bool]]()
    for name, value in model.base_model.model.named_parameters():
        if "lora_E" in name:
            order = torch.randperm(7, generator=generator)
            count = 0 if "layers.1.self_attn.v_proj" in name else 3
            marks[name] = [bool(i < count) for i in order]
            value.data[~torch.tensor(marks[name])] = 0
    model.peft_config["default"].rank_pattern = marks
    model.save_pretrained(str(directory))
    return model


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor:UserWarning")
def test_values_that_peft_took_away_are_not_there(tmp_path: Path) -> None:
    theirs = pruned(tmp_path / "theirs")
    expected = output(theirs)
    ours = surgery.attach(tmp_path / "theirs", llama())
    assert [dict(s.form.arguments)["r"] for s in ours.plan.sites] == [3] * 5
    spec = surgery.import_config(tmp_path / "theirs", llama())
    same = [
        {s.path: s.form.arguments for s in p.sites}
        for p in (surgery.plan(spec, llama()), ours.plan)
    ]
    assert same[0] == same[1]
    with pytest.raises(surgery.SurgeryError, match="give the model"):
        surgery.import_config(tmp_path / "theirs")
    torch.testing.assert_close(output(ours.model), expected, atol=1e-5, rtol=1e-5)
    assert ours.save(tmp_path / "ours").peft == ""
    again = hf.PeftModel.from_pretrained(llama(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(output(again), expected, atol=1e-5, rtol=1e-5)


# Those of one layer in peft, whose dropout is ours: of x, before anything else.
DROPPING = ("hira", "delora", "adalora")


@every([c for c in CASES if c.name in DROPPING])
def test_dropout_in_training_is_pefts(case: Case, tmp_path: Path) -> None:
    drops(case, tmp_path)


def test_a_layer_without_a_bias_merges_where_peft_refuses(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "beft on small layers")
    theirs = saved_by_peft(case.model, case.config(), tmp_path)
    with pytest.raises(ValueError, match="has no bias"):
        cast(Any, theirs).merge_adapter()
    ours = surgery.attach(tmp_path, two())
    expected = output(ours.model)
    ours.inverse.merge()
    torch.testing.assert_close(output(ours.inverse.unload(keep_merge=True)), expected)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("match apart apply hira(r=2)", "no tensor for A of hira on `apart` (conv3d in 2 groups"),
        ("match dot apply hira(r=2)", "no tensor for A of hira on `dot` (conv3d"),
        ("match wave apply delora(r=2)", "no tensor for A of delora on `wave` (conv1d"),
        ("match wave apply beft()", "no tensor for v of beft on `wave` (conv1d"),
        ("match volume apply adalora(init_r=2)", "no tensor for A of adalora on `volume`"),
        ("match /wave|thin/ apply hira(r = 2 if channels == 3 else 3)", "`r` is one for all sites"),
    ],
)
def test_what_peft_cannot_say_is_said(call: str, reason: str, tmp_path: Path) -> None:
    compiled = surgery.compile(call, wavenet())
    assert reason in compiled.save(tmp_path).peft
    attached = surgery.attach(tmp_path, wavenet())
    torch.testing.assert_close(output(attached.model), output(compiled.model))


# ------------------------------------------------------------------------- norms, tuned as copies


NORMS = Case(
    "norms",
    llama,
    lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "train input_layernorm | norm",
)
NORMS_OF_BERT = Case(
    "norms with biases",
    bert,
    lambda: peft.LNTuningConfig(target_modules=["LayerNorm"], modules_to_save=["pooler"]),
    "train LayerNorm",
)


@every([NORMS, NORMS_OF_BERT])
def test_tuned_norms_of_peft_are_trained_copies(case: Case, tmp_path: Path) -> None:
    theirs = saved_by_peft(case.model, case.config(), tmp_path / "theirs")
    expected, before = output(theirs), output(case.model())
    ours = surgery.attach(tmp_path / "theirs", case.model())
    assert {s.form.method.name for s in ours.plan.sites} == {"trained"}
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(output(ours.model), expected, atol=1e-5, rtol=1e-5)
    keys = read_tensors(tmp_path / "theirs" / "adapter_model.safetensors").shapes
    assert len(ours.parameters()) == len(keys)
    assert ours.save(tmp_path / "ours").peft == ""
    loaded = cast(Any, peft.PeftModel).from_pretrained(case.model(), tmp_path / "ours").eval()
    torch.testing.assert_close(output(loaded), expected, atol=1e-5, rtol=1e-5)
    again = surgery.attach(tmp_path / "ours", case.model())
    assert torch.equal(output(again.model), output(ours.model))
    ours.inverse.merge()
    assert torch.equal(output(ours.model), output(again.model))
    ours.inverse.unload()
    assert torch.equal(output(ours.model), before)


def test_tuned_norms_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    saved_by_peft(NORMS_OF_BERT.model, NORMS_OF_BERT.config(), tmp_path)
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole = stored.load_file(path)
    lost = next(k for k in whole if k.endswith("LayerNorm.ln_tuning_layers.bias"))
    stored.save_file({k: v for k, v in whole.items() if k != lost}, path)
    with pytest.raises(surgery.SurgeryError, match=r"lack a copy of `.*LayerNorm\.bias`"):
        surgery.attach(tmp_path, bert())
    stored.save_file({"base_model.model.other.ln_tuning_layers.weight": torch.ones(3)}, path)
    with pytest.raises(surgery.SurgeryError, match="no tensor of the folder is a copy"):
        surgery.attach(tmp_path, bert())
    stored.save_file(whole, path)
    config.write_text(json.dumps({**json.loads(config.read_text()), "scale": 3}))
    with pytest.raises(surgery.SurgeryError, match="`scale` is 3, which `LN_TUNING` knows"):
        surgery.attach(tmp_path, bert())
