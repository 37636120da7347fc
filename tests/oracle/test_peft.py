"""Against peft itself: what it saves, attaches; what we save, it loads; the outputs agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from beside_peft import Case, attaches, drops, every, fed, loads, output, saved_by_peft
from small_models import bert, gpt2, llama
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
)

import surgery
from surgery.store import read_tensors

# Libraries whose types are not complete.
hf: Any = peft
untyped: Any = torch


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 0))
        self.point = nn.Conv2d(8, 6, 1)
        self.grouped = nn.Conv2d(6, 4, 3, groups=2, bias=False)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.point(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.grouped(x)).mean((2, 3)))


def convnet() -> nn.Module:
    untyped.manual_seed(3)
    return fed(ConvNet(), 2, 3, 11, 7)


class WaveNet(nn.Module):
    """Convolutions of one and of three axes, that end in [n, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.wave = nn.Conv1d(3, 8, 4, stride=2, padding=3)
        self.thin = nn.Conv1d(8, 6, 3, padding="same", bias=False)
        self.split = nn.Conv1d(6, 4, 3, groups=2, dilation=2)
        self.volume = nn.Conv3d(3, 8, (2, 3, 1), stride=(1, 2, 2), padding=(1, 2, 0))
        self.dot = nn.Conv3d(8, 6, (1, 1, 2), bias=False)
        self.apart = nn.Conv3d(6, 4, 2, groups=2, padding=1, padding_mode="circular")
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        wave = self.split(torch.relu(self.thin(torch.relu(self.wave(x.flatten(2))))))
        volume = self.apart(torch.relu(self.dot(torch.relu(self.volume(x)))))
        return self.head(torch.relu(wave.mean(2)) + torch.relu(volume.mean((2, 3, 4))))


def wavenet() -> nn.Module:
    untyped.manual_seed(3)
    return fed(WaveNet(), 2, 3, 2, 7, 5)


ATTENTION = ["q_proj", "v_proj"]
CASES = (
    Case(
        "lora",
        llama,
        lambda: peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.3, target_modules=ATTENTION),
        "match /q_proj|v_proj/ apply lora(r=3, alpha=5, dropout=0.3)",
    ),
    Case(
        "lora, each site its own rank",
        llama,
        lambda: peft.LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=True,
            target_modules=[*ATTENTION, "down_proj"],
            rank_pattern={"layers.1.self_attn.v_proj": 2, "down_proj": 5},
            alpha_pattern={r"layers\.0\..*": 3},
        ),
        "match /q_proj|v_proj|down_proj/ in layers[*]"
        " apply lora(r = 4 - 2 * layer, alpha = 3 + layer, rslora = true)",
    ),
    Case(
        "lora on Conv1D",
        gpt2,
        lambda: peft.LoraConfig(r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
        "match /c_attn|c_proj/ apply lora(r=3)",
    ),
    Case(
        "lora on embeddings",
        bert,
        lambda: peft.LoraConfig(r=3, target_modules=["word_embeddings", "query", "dense"]),
        "match /word_embeddings|query|dense/ apply lora(r=3, alpha=8)",
    ),
    Case(
        "lora on convolutions",
        convnet,
        lambda: peft.LoraConfig(r=3, target_modules=["stem", "point", "head"]),
        "match /stem|point|head/ apply lora(r=3)",
    ),
    Case(
        "lora on convolutions of one and three axes",
        wavenet,
        lambda: peft.LoraConfig(
            r=3, lora_dropout=0.3, target_modules=["wave", "thin", "volume", "dot", "head"]
        ),
        "match /wave|thin|volume|dot|head/ apply lora(r=3, dropout=0.3)",
    ),
    Case(
        "dora",
        llama,
        lambda: peft.LoraConfig(
            r=3, use_dora=True, lora_dropout=0.4, target_modules=[*ATTENTION, "gate_proj"]
        ),
        "match /q_proj|gate_proj/ apply dora(r=3, alpha=7, dropout=0.4)",
    ),
    Case(
        "dora on Conv1D and embeddings",
        gpt2,
        lambda: peft.LoraConfig(
            r=3, use_dora=True, target_modules=["c_fc", "wte"], fan_in_fan_out=True
        ),
        "match /c_fc|wte/ apply dora(r=3)",
    ),
    Case(
        "dora on convolutions",
        convnet,
        lambda: peft.LoraConfig(r=3, use_dora=True, target_modules=["stem", "point"]),
        "match /stem|point/ apply dora(r=3)",
    ),
    Case(
        "dora on convolutions of one and three axes",
        wavenet,
        lambda: peft.LoraConfig(
            r=3, use_dora=True, lora_dropout=0.3, target_modules=["wave", "thin", "volume", "dot"]
        ),
        "match /wave|thin|volume|dot/ apply dora(r=3, dropout=0.3)",
    ),
    Case(
        "ia3",
        llama,
        lambda: peft.IA3Config(
            target_modules=[*ATTENTION, "down_proj"], feedforward_modules=["down_proj"]
        ),
        'match /q_proj|v_proj/ apply ia3() match down_proj apply ia3(side="in")',
    ),
    Case(
        "ia3 on Conv1D",
        gpt2,
        lambda: peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
        'match c_attn apply ia3() match mlp.c_proj apply ia3(side="in")',
    ),
    Case(
        "ia3 on convolutions",
        convnet,
        lambda: peft.IA3Config(
            target_modules=["stem", "point", "grouped"], feedforward_modules=["point"]
        ),
        'match /stem|grouped/ apply ia3() match point apply ia3(side="in")',
    ),
    Case(
        "ia3 on convolutions of three axes",
        wavenet,
        lambda: peft.IA3Config(
            target_modules=["volume", "dot", "apart"], feedforward_modules=["dot"]
        ),
        'match /volume|apart/ apply ia3() match dot apply ia3(side="in")',
    ),
    Case(
        "vera",
        llama,
        lambda: peft.VeraConfig(r=7, target_modules=[*ATTENTION, "up_proj"], d_initial=0.3),
        "match /q_proj|v_proj|up_proj/ apply vera(r=7, projection_prng_key=3)",
    ),
    Case(
        "vera on Conv1D",
        gpt2,
        lambda: peft.VeraConfig(r=5, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
        "match /c_attn|c_fc/ apply vera(r=5)",
    ),
    Case(
        "oft",
        llama,
        lambda: peft.OFTConfig(
            oft_block_size=3, use_cayley_neumann=False, target_modules=[*ATTENTION, "down_proj"]
        ),
        "match /q_proj|down_proj/ apply oft(block_size=6)",
    ),
    Case(
        "oft by the number of blocks",
        llama,
        lambda: peft.OFTConfig(
            r=2, oft_block_size=0, use_cayley_neumann=False, target_modules=["q_proj", "down_proj"]
        ),
        "match /q_proj|down_proj/ apply oft(block_size=0, r=3)",
    ),
    Case(
        "oft on a convolution of one pixel",
        convnet,
        lambda: peft.OFTConfig(
            oft_block_size=4, use_cayley_neumann=False, target_modules=["point", "head"]
        ),
        "match /point|head/ apply oft(block_size=2)",
    ),
    Case(
        "miss",
        llama,
        lambda: peft.MissConfig(r=5, miss_dropout=0.2, target_modules=[*ATTENTION, "down_proj"]),
        "match /q_proj|down_proj/ apply miss(r=5, dropout=0.2)",
    ),
    Case(
        "miss, whole shards",
        llama,
        lambda: peft.MissConfig(r=3, miss_dropout=0.2, target_modules=["k_proj", "up_proj"]),
        "match /k_proj|up_proj/ apply miss(r=2)",
    ),
    Case(
        "miss, mini",
        llama,
        lambda: peft.MissConfig(
            r=5, mini_r=3, init_weights="mini", target_modules=["q_proj", "up_proj"]
        ),
        'match /q_proj|up_proj/ apply miss(r=5, mini_r=3, init_weights="mini")',
    ),
    Case(
        "miss, bat",
        llama,
        lambda: peft.MissConfig(r=3, init_weights="bat", target_modules=["q_proj", "up_proj"]),
        'match /q_proj|up_proj/ apply miss(r=6, init_weights="bat")',
    ),
    Case(
        "bone, whose heir is miss",
        llama,
        lambda: peft.MissConfig(r=4, target_modules=["q_proj", "up_proj"]),
        "match /q_proj|up_proj/ apply bone(r=7)",
    ),
    Case(
        "bat, whose heir is miss",
        llama,
        lambda: peft.MissConfig(r=2, init_weights="bat", target_modules=["v_proj", "down_proj"]),
        "match /v_proj|down_proj/ apply bat(r=3)",
    ),
)


@every(CASES)
def test_what_peft_saves_attaches(case: Case, tmp_path: Path) -> None:
    attaches(case, tmp_path)


@every(CASES)
def test_what_we_save_peft_loads(case: Case, tmp_path: Path) -> None:
    loads(case, tmp_path)


# With a shard cut short, peft drops elements of its padding too, and so draws other numbers.
DROPPING = (
    "lora",
    "lora on convolutions of one and three axes",
    "dora",
    "dora on convolutions of one and three axes",
    "miss, whole shards",
)


@every([c for c in CASES if c.name in DROPPING])
def test_dropout_in_training_is_pefts(case: Case, tmp_path: Path) -> None:
    drops(case, tmp_path)


@every([c for c in CASES if c.name.startswith("dora on convolutions")])
def test_gradients_are_pefts(case: Case, tmp_path: Path) -> None:
    theirs = saved_by_peft(case.model, case.config(), tmp_path)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name)
    cast(Any, output(theirs).square().sum()).backward()
    ours = surgery.attach(tmp_path, case.model())
    cast(Any, output(ours.model).square().sum()).backward()
    wanted = {
        n.replace(".default", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.grad is not None
    }
    found = {n: p.grad for n, p in ours.model.named_parameters() if p.grad is not None}
    renamed = ours.mapping.rename(found, to="peft")
    assert {k.removesuffix(".weight") for k in renamed} == {
        k.removesuffix(".weight") for k in wanted
    }
    for key, gradient in wanted.items():
        mine = renamed.get(key, renamed.get(key.removesuffix(".weight")))
        assert mine is not None
        torch.testing.assert_close(mine, gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bone", "bone-pad", "bat"])
def test_golden_vectors_of_bone(name: str) -> None:
    folder = Path(__file__).parents[1] / "golden" / "bone" / name
    model = cast(Any, LlamaForCausalLM).from_pretrained(folder / "base").eval()
    vectors = read_tensors(folder / "io.safetensors")
    torch.testing.assert_close(model(vectors["x"]).logits, vectors["base"])
    compiled = surgery.attach(folder / "adapter", model)
    method = {s.form.method.name for s in compiled.plan.sites}
    assert method == {"bat" if name == "bat" else "bone"}
    logits = compiled.model(vectors["x"]).logits
    torch.testing.assert_close(logits, vectors["adapted"], atol=1e-5, rtol=1e-5)


def test_embeddings_that_peft_saves_too_must_be_the_models_own(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"])
    theirs = saved_by_peft(llama, config, tmp_path)
    keys = [k for k in read_tensors(tmp_path / "adapter_model.safetensors") if "base_layer" in k]
    assert keys == ["base_model.model.embed_tokens.base_layer.weight"]
    ours = surgery.attach(tmp_path, llama())
    torch.testing.assert_close(output(ours.model), output(theirs), atol=1e-5, rtol=1e-4)
    other = llama()
    with torch.no_grad():
        cast(Tensor, cast(Any, other).embed_tokens.weight).add_(1)
    with pytest.raises(surgery.SurgeryError, match=r"another `embed_tokens\.weight` than"):
        surgery.attach(tmp_path, other)


Make = Callable[[], nn.Module]

SAVED: tuple[tuple[Make, list[str], int], ...] = (
    (llama, ["norm"], 5 * 1),
    (llama, ["input_layernorm", "embed_tokens"], 2 + 1),
    (bert, ["pooler", "LayerNorm"], 2 + 2 * 2 * 2 + 2),
    (convnet, ["head"], 2),
)


@pytest.mark.parametrize(("make", "names", "count"), SAVED)
def test_whole_modules_that_peft_trained_are_copies(
    make: Make, names: list[str], count: int, tmp_path: Path
) -> None:
    target = {llama: "q_proj", bert: "query", convnet: "point"}[cast(Any, make)]
    config = peft.LoraConfig(r=3, target_modules=[target], modules_to_save=names)
    theirs = saved_by_peft(make, config, tmp_path / "theirs")
    ours = surgery.attach(tmp_path / "theirs", make())
    copies = [s for s in ours.plan.sites if s.site.at.tensor]
    assert len(copies) == count
    torch.testing.assert_close(output(ours.model), output(theirs), atol=1e-5, rtol=1e-4)
    before = output(make())
    assert (output(ours.model) - before).abs().max() > 1e-3
    # What is written again is a folder of peft's, and the same adapter.
    assert ours.save(tmp_path / "ours").peft == ""
    again = surgery.attach(tmp_path / "ours", make())
    assert torch.equal(output(again.model), output(ours.model))
    theirs_keys = read_tensors(tmp_path / "theirs" / "adapter_model.safetensors").shapes
    renamed = ours.mapping.rename(ours.parameters(), to="peft")
    assert {key: tuple(t.shape) for key, t in renamed.items()} == theirs_keys
    ours.inverse.unload()
    assert torch.equal(output(ours.model), before)


def test_a_module_to_save_that_is_not_there_is_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["norm"])
    saved_by_peft(llama, config, tmp_path)
    path = tmp_path / "adapter_config.json"
    for names, message in (
        (["nrom"], "has no module `nrom` with parameters"),
        (["norm", "k_proj"], "lack a copy of `layers.0.self_attn.k_proj.bias`"),
        (["norm", "q_proj"], "lack a copy of `layers.0.self_attn.q_proj.weight`"),
        ("norm", "`modules_to_save` is"),
        ([3], "`modules_to_save` is"),
    ):
        path.write_text(json.dumps({**json.loads(path.read_text()), "modules_to_save": names}))
        with pytest.raises(surgery.SurgeryError) as caught:
            surgery.attach(tmp_path, llama())
        assert message in str(caught.value), names


REFUSED: tuple[tuple[Any, dict[str, Any], str], ...] = (
    (peft.PolyConfig, {}, 'peft_type "POLY" is not known'),
)


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor:UserWarning")
@pytest.mark.parametrize(("kind", "options", "message"), REFUSED)
def test_what_would_compute_something_else_is_refused(
    kind: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = kind(**{"r": 3, "target_modules": ["q_proj"], **options})
    saved_by_peft(llama, config, tmp_path)
    model = llama()
    before = output(model)
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.attach(tmp_path, model)
    assert message in str(caught.value)
    assert len(caught.value.diagnostics) == 1
    assert torch.equal(output(model), before)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_lora_of_a_grouped_convolution_is_another_equation(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["grouped", "head"])
    saved_by_peft(convnet, config, tmp_path)
    with pytest.raises(surgery.SurgeryError, match=r"peft's lora on `grouped`.*2 group"):
        surgery.attach(tmp_path, convnet())
    compiled = surgery.compile("match /grouped/ apply lora(r=2)", convnet())
    report = compiled.save(tmp_path / "ours")
    assert "no tensor for A of lora on `grouped` (conv2d in 2 groups" in report.peft
    torch.testing.assert_close(
        output(surgery.attach(tmp_path / "ours", convnet()).model), output(compiled.model)
    )


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("match split apply lora(r=2)", "`split` (conv1d in 2 groups"),
        ("match apart apply dora(r=2)", "`apart` (conv3d in 2 groups"),
        ("match wave apply ia3()", "`wave` (conv1d"),
        ("match dot apply oft(block_size=2)", "`dot` (conv3d"),
    ],
)
def test_convolutions_that_peft_does_not_know_are_said(
    call: str, reason: str, tmp_path: Path
) -> None:
    compiled = surgery.compile(call, wavenet())
    assert reason in compiled.save(tmp_path).peft
    attached = surgery.attach(tmp_path, wavenet())
    torch.testing.assert_close(output(attached.model), output(compiled.model))
