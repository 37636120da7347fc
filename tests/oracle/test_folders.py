"""All that a folder of peft's may hold besides a method: both ways, against peft itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import peft
import pytest
import torch
from peft.tuners.lora.config import KasaConfig
from small_models import TOKENS, bert, gpt2, llama, llama_config
from support import moved
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralModel,
)

import surgery
from surgery.store import read_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),  # tied ones
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

# Libraries whose types are not complete.
hf: Any = peft
untyped: Any = torch


class Attending(nn.Module):
    """Two attentions of torch's, and a layer behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.MultiheadAttention(12, 3) for _ in range(2)])
        self.heads = nn.ModuleList([nn.Linear(12, 12) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        """[time, batch, 12] to the same."""
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = torch.relu(head(x + block(x, x, x, need_weights=False)[0]))
        return x


class Experts(nn.Module):
    """A batch of matrices [out, in], one that lies the other way by its owner's word, and one."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.is_transposed = turned
        shape = (3, 7, 11) if turned else (3, 11, 7)
        self.up = nn.Parameter(torch.randn(shape) / 3)
        self.down = nn.Parameter(torch.randn(shape).transpose(1, 2).contiguous() / 3)
        self.mixer = nn.Parameter(torch.randn(5, 7) / 3)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 7] to [batch, 5]."""
        up, down = (w if self.is_transposed else w.transpose(1, 2) for w in (self.up, self.down))
        y = torch.einsum("bi,eio->beo", x, up).relu()
        return torch.einsum("beo,eoi->bi", y, down) @ self.mixer.t()


class Mixed(nn.Module):
    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.first = nn.Linear(7, 7)
        self.moe = Experts(turned)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 7] to [batch, 5]."""
        return self.moe(torch.tanh(self.first(x)))


def made(make: Callable[[], nn.Module]) -> nn.Module:
    untyped.manual_seed(6)
    return make().eval()


def attending() -> nn.Module:
    return made(Attending)


def experts() -> nn.Module:
    return made(lambda: Mixed(False))


def turned() -> nn.Module:
    return made(lambda: Mixed(True))


def mixtral() -> nn.Module:
    config = MixtralConfig(
        vocab_size=13,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    return made(lambda: MixtralModel(config))


def causal(tied: bool = False) -> nn.Module:
    return made(lambda: LlamaForCausalLM(llama_config(tie_word_embeddings=tied)))


def output(model: nn.Module) -> Tensor:
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    generator = torch.Generator().manual_seed(4)
    if isinstance(inner, Attending):
        return cast(Tensor, model(torch.randn(5, 2, 12, generator=generator)))
    if isinstance(inner, Mixed):
        return cast(Tensor, model(torch.randn(5, 7, generator=generator)))
    found = cast(Any, model)(TOKENS)
    return cast(Tensor, found.logits if hasattr(found, "logits") else found.last_hidden_state)


def same(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


def saved_by_peft(make: Callable[[], nn.Module], config: Any, directory: Path) -> nn.Module:
    """An adapter of peft's, moved away from where it began, in a folder."""
    model = hf.get_peft_model(make(), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return model.eval()


@dataclass(frozen=True)
class Case:
    """copies: how many parameters are copied. saved: fields of the config that we write."""

    name: str
    model: Callable[[], nn.Module]
    config: Callable[[], Any]
    sites: int
    copies: int = 0
    saved: dict[str, object] = field(default_factory=dict[str, object])


def lora(**given: Any) -> Callable[[], Any]:
    return lambda: hf.LoraConfig(**{"r": 3, "lora_alpha": 5, **given})


ATTENTION = ["q_proj", "v_proj"]
CASES = (
    Case(
        "whole modules",
        causal,
        lora(target_modules=ATTENTION, modules_to_save=["lm_head", "model.norm"]),
        *(4, 2),
        {"modules_to_save": ["model.norm", "lm_head"], "bias": "none", "task_type": "CAUSAL_LM"},
    ),
    Case(
        "a module with modules in it",
        bert,
        lora(target_modules=["query"], modules_to_save=["encoder.layer.1.attention.output"]),
        *(2, 4),
        {"modules_to_save": ["encoder.layer.1.attention.output"]},
    ),
    Case(
        "all biases",
        llama,
        lora(target_modules=ATTENTION, bias="all"),
        *(4, 8),
        {"bias": "all"},
    ),
    Case(
        "all biases of another method",
        bert,
        lambda: peft.VeraConfig(r=3, target_modules=["query", "value"], bias="all"),
        *(4, 18),
        {"bias": "all"},
    ),
    Case(
        "biases of layers of their own",
        gpt2,
        lora(target_modules=["c_attn", "c_fc"], bias="lora_only", fan_in_fan_out=True),
        *(4, 4),
        {"bias": "lora_only"},
    ),
    Case(
        "biases of layers of another method",
        bert,
        lambda: peft.HRAConfig(r=2, target_modules=["query", "value"], bias="hra_only"),
        *(4, 4),
        {"bias": "hra_only"},
    ),
    Case(
        "all biases and a whole module",
        bert,
        lora(target_modules=["query"], bias="all", modules_to_save=["pooler"]),
        *(2, 19),
        {"bias": "all", "modules_to_save": ["pooler"]},
    ),
    Case(
        "norms",
        bert,
        lambda: peft.LNTuningConfig(target_modules=["LayerNorm"]),
        *(0, 10),
        {"peft_type": "LN_TUNING"},
    ),
    Case(
        "norms of a model without biases",
        llama,
        lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
        *(0, 3),
        {"peft_type": "LN_TUNING"},
    ),
    Case("attentions", attending, lora(target_modules=["blocks.0", "blocks.1"]), 4),
    Case(
        "attentions with dropout, ranks, a layer and biases",
        attending,
        lora(
            target_modules=["blocks.0", "blocks.1", "heads.0"],
            lora_dropout=0.3,
            rank_pattern={"blocks.1": 2, "heads.0": 5},
            bias="lora_only",
        ),
        *(5, 3),
        {"bias": "lora_only", "lora_dropout": 0.3},
    ),
    Case("a batch", experts, lora(target_modules=["first"], target_parameters=["moe.up"]), 2),
    Case(
        "all matrices of an owner, each around the other",
        experts,
        lora(
            target_modules=[],
            target_parameters=["moe.up", "moe.down", "moe.mixer"],
            rank_pattern={"moe.down": 2, "mixer": 4},
            alpha_pattern={"moe.up": 7},
        ),
        3,
    ),
    Case(
        "batches that lie the other way",
        turned,
        lora(target_modules=["first"], target_parameters=["moe.down", "moe.up"]),
        3,
    ),
    Case("a weight named as a parameter", experts, lora(target_parameters=["first.weight"]), 1),
    Case(
        "experts of transformers",
        mixtral,
        lora(
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
        ),
        8,
    ),
)


def test_the_config_says_what_the_base_is_for(tmp_path: Path) -> None:
    def make() -> nn.Module:
        config = cast(Any, BertConfig)(
            vocab_size=13,
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            name_or_path=str(tmp_path / "base"),
        )
        config.save_pretrained(tmp_path / "base")
        return made(lambda: BertForSequenceClassification(config))

    config = lora(target_modules=["query"], task_type="SEQ_CLS")()
    theirs = saved_by_peft(make, config, tmp_path / "theirs")
    ours = surgery.attach(tmp_path / "theirs", make())
    same(output(ours.model), output(theirs))
    assert ours.save(tmp_path / "ours").peft == ""
    said = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(tmp_path / "base")
    assert (said["task_type"], said["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    again = hf.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    assert type(again).__name__ == "PeftModelForSequenceClassification"
    same(output(again), output(theirs))
    # Without a copy of the head peft would make one, so the task is not said.
    surgery.compile("match query apply lora(r=2)", make()).save(tmp_path / "plain")
    assert "task_type" not in json.loads((tmp_path / "plain" / "adapter_config.json").read_text())


def test_attentions_are_adapted_whole_and_as_peft_means_them(tmp_path: Path) -> None:
    for spec, reason in (
        ("match in_proj_weight apply lora(r=2)", "adapts all projections of `blocks.0` together"),
        ("match blocks.*.* apply lora(r=2, alpha=3)", "2 times the alpha at `blocks.0.out_proj`"),
        (
            "match in_proj_weight apply lora(r=2, alpha=3) match out_proj apply lora(r=2, alpha=6)",
            "",
        ),
    ):
        compiled = surgery.compile(spec, attending())
        assert reason in compiled.save(tmp_path).peft
        same(output(surgery.attach(tmp_path, attending()).model), output(compiled.model))
        assert bool(compiled.save(tmp_path).peft) is bool(reason)


def test_an_attention_is_imported_as_it_attaches(tmp_path: Path) -> None:
    config = hf.LoraConfig(target_modules=["0", "blocks.1"], r=3, lora_alpha=5, bias="lora_only")
    saved_by_peft(attending, config, tmp_path)
    made = surgery.plan(surgery.import_config(tmp_path, attending()), attending())
    there = surgery.attach(tmp_path, attending()).plan
    assert {s.path: s.form.links for s in made.sites} == {s.path: s.form.links for s in there.sites}
    assert {"blocks.1.in_proj_weight", "blocks.1.out_proj"} <= {s.path for s in made.sites}


def test_what_is_refused_is_told_by_the_method_that_knows_the_most(tmp_path: Path) -> None:
    saved_by_peft(causal, lora(target_modules=["q_proj"], kasa_config=KasaConfig())(), tmp_path)
    path = tmp_path / "adapter_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "init_lora_weights": "pissa"}))
    for reading in (
        lambda: surgery.attach(tmp_path, causal()),
        lambda: surgery.import_config(path),
    ):
        with pytest.raises(surgery.SurgeryError) as caught:
            reading()
        assert "`init_lora_weights`" in str(caught.value)
        assert "`kasa_config`" not in str(caught.value)
    path.write_text(json.dumps({**said, "peft_type": "LNTUNING"}))
    for reading in (
        lambda: surgery.attach(tmp_path, causal()),
        lambda: surgery.import_config(path),
    ):
        with pytest.raises(
            surgery.SurgeryError, match=r"did you mean LN_TUNING\? .*TRAINABLE_TOKENS"
        ):
            reading()


def test_rows_that_peft_has_no_place_for_stay_in_this_form(tmp_path: Path) -> None:
    for make, spec, reason in (
        (headed, "train head.weight[2]", "it passes over the bias"),
        (causal, "train embed_tokens[1] train embed_tokens[3]", "one tensor of rows a table"),
        (causal, "train embed_tokens[1] train lm_head[3]", "the same rows of every table"),
        (tied, "train embed_tokens[1] untie", "as the model's config does"),
        (causal, "train embed_tokens[1] match q_proj apply ia3()", "no rows of tables beside ia3"),
        (causal, "train embed_tokens[1] match q_proj apply lora(r=2)", ""),
    ):
        compiled = surgery.compile(spec, make())
        moved(compiled)
        report = compiled.save(tmp_path / "out")
        assert reason in report.peft
        assert bool(reason) is bool(report.peft)
        same(output(surgery.attach(tmp_path / "out", make()).model), output(compiled.model))


class Headed(nn.Module):
    """A table and a head that has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 12)
        self.head = nn.Linear(12, 13)

    def forward(self, tokens: Tensor) -> Any:
        """Tokens [...] to what has logits [..., 13]."""
        return SimpleNamespace(logits=self.head(self.table(tokens)))


def headed() -> nn.Module:
    return made(Headed)


def tied() -> nn.Module:
    return causal(tied=True)


TOKEN_CASES: tuple[tuple[str, Callable[[], nn.Module], Callable[[], Any], int], ...] = (
    ("alone", llama, lambda: hf.TrainableTokensConfig(token_indices=[7, 2, 11]), 1),
    ("tied", tied, lambda: hf.TrainableTokensConfig(token_indices=[7, 2, 11]), 1),
    (
        "beside",
        causal,
        lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 4]}),
        3,
    ),
    (
        "beside, tied",
        tied,
        lora(target_modules=["q_proj"], trainable_token_indices=[3, 4]),
        3,
    ),
)


@pytest.mark.parametrize("case", TOKEN_CASES, ids=lambda case: case[0])
def test_rows_of_a_table_go_both_ways(case: Any, tmp_path: Path) -> None:
    _, make, config, sites = case
    theirs = saved_by_peft(make, config(), tmp_path / "theirs")
    model = make()
    before = output(model)
    ours = surgery.attach(tmp_path / "theirs", model)
    assert len(ours.plan.sites) == sites
    wanted = output(theirs)
    same(output(ours.model), wanted)
    assert (wanted - before).abs().max() > 1e-3
    report = ours.save(tmp_path / "ours")
    assert report.peft == ""
    files = [read_tensors(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "ours")]
    assert {*files[0]} >= {*files[1]}
    same(output(surgery.attach(tmp_path / "ours", make()).model), wanted)
    same(output(hf.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()), wanted)
    ours.inverse.merge()
    same(output(ours.model), wanted)
    ours.inverse.unload()
    assert torch.equal(output(model), before)


def test_rows_of_a_head_leave_its_bias(tmp_path: Path) -> None:
    config = hf.TrainableTokensConfig(token_indices=[2, 5], target_modules=["head"])
    theirs = saved_by_peft(headed, config, tmp_path)
    ours = surgery.attach(tmp_path, headed())
    bias = cast(Tensor, ours.model.get_parameter("head.bias"))
    same(output(ours.model), output(theirs) + bias)  # peft drops it
    ours.inverse.merge()
    same(output(ours.model), output(cast(Any, theirs).merge_and_unload()))  # but not here


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_indices": [7, 2]}, "its shape is [3, 12], not [2, 12]"),
        ({"token_indices": [7, 2, 13]}, "the table has no row 13"),
        ({"token_indices": [7, 2, 2]}, "does not say which rows"),
        ({"token_indices": None}, "does not say which rows"),
        ({"peft_type": "LORA"}, "does not say which rows"),
        ({"odd": 3}, "`odd` is 3"),
    ],
)
def test_rows_that_are_not_there(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved_by_peft(llama, hf.TrainableTokensConfig(token_indices=[7, 2, 11]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.attach(tmp_path, llama())
    assert message in str(caught.value)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_ways(case: Case, tmp_path: Path) -> None:
    theirs = saved_by_peft(case.model, case.config(), tmp_path / "theirs")
    model = case.model()
    before, state = output(model), copy.deepcopy(model.state_dict())
    ours = surgery.attach(tmp_path / "theirs", model)
    copies = [s for s in ours.plan.sites if s.site.at.tensor]
    assert len(copies) == case.copies
    assert len(ours.plan.sites) == case.sites + case.copies
    wanted = output(theirs)
    same(output(ours.model), wanted)
    assert (wanted - before).abs().max() > 1e-3

    report = ours.save(tmp_path / "ours")
    assert report.peft == ""
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert {name: config.get(name) for name in case.saved} == case.saved
    files = [read_tensors(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "ours")]
    for key, shape in files[1].shapes.items():
        assert files[0].shapes[key] == shape
        assert torch.equal(files[0][key], files[1][key])
    same(output(hf.PeftModel.from_pretrained(case.model(), tmp_path / "ours").eval()), wanted)
    again = surgery.attach(tmp_path / "ours", case.model())
    assert torch.equal(output(again.model), output(ours.model))
    (tmp_path / "ours" / "mapping.json").unlink()  # what is left is a folder of peft's
    same(output(surgery.attach(tmp_path / "ours", case.model()).model), wanted)

    ours.inverse.merge()
    same(output(ours.model), wanted)
    ours.inverse.unmerge()
    ours.inverse.unload()
    assert torch.equal(output(model), before)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
