"""A config of peft's read as a spec: the sites and arguments that peft itself makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
import pytest
from peft.tuners.tuners_utils import BaseTunerLayer
from small_models import fresh
from torch import nn

import surgery
from surgery.errors import ArtifactError, SurgeryError

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

hf: Any = peft
ARCHITECTURES = ("llama", "gpt2", "bert", "t5", "opt")
ALL = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj", "c_fc"],
    "bert": ["query", "value", "output.dense"],
    "t5": ["q", "v", "wo"],
    "opt": ["q_proj", "v_proj", "fc2"],
}


@dataclass(frozen=True)
class Case:
    """A config for an architecture, of the names of its layers."""

    name: str
    make: Callable[[list[str]], Any]
    only: tuple[str, ...] = ARCHITECTURES
    says: str = ""


def low_rank(**given: Any) -> Any:
    return hf.LoraConfig(**{"r": 3, "lora_alpha": 5, **given})


TWO = ("bert", "t5")
BIASED = ("gpt2", "bert", "opt")

CASES = (
    Case("names", lambda t: low_rank(target_modules=t, lora_dropout=0.25)),
    Case("absent", lambda t: low_rank()),
    Case("all-linear", lambda t: low_rank(target_modules="all-linear")),
    Case("regex", lambda t: low_rank(target_modules=rf".*\.({'|'.join(t[:2])})")),
    Case("whole regex", lambda t: low_rank(target_modules=rf"(?:\w|\.)+\.{t[2]}|nowhere"), TWO),
    Case("excluded", lambda t: low_rank(target_modules=t, exclude_modules=[t[0], "nothing"])),
    Case(
        "excluded by regex",
        lambda t: low_rank(target_modules=t, exclude_modules=rf".*\.0\..*{t[1]}"),
        ("llama", "bert"),
    ),
    Case(
        "lacking",
        lambda t: low_rank(target_modules=[*t, "nothing"]),
        TWO,
        says="# The model has nothing of nothing",
    ),
    Case(
        "ranks",
        lambda t: low_rank(
            target_modules=t,
            rank_pattern={t[0]: 2, rf".*\.1\..*{t[1]}": 4, t[1]: 1},
            alpha_pattern={t[1]: 7, r".*\.0\..*": 6},
        ),
    ),
    Case(
        "scaled",
        lambda t: low_rank(target_modules=t, use_rslora=True, init_lora_weights="gaussian"),
        TWO,
    ),
    Case("norms", lambda t: low_rank(target_modules=t, use_dora=True), TWO),
    Case("all biases", lambda t: low_rank(target_modules=t, bias="all"), BIASED),
    Case("own biases", lambda t: low_rank(target_modules=t, bias="lora_only"), BIASED),
    Case(
        "saved",
        lambda t: low_rank(target_modules=t, modules_to_save=["norm", "pooler", "ln_f"]),
        ("llama", "bert", "gpt2"),
    ),
    Case(
        "saved above a target",
        lambda t: low_rank(
            target_modules=["dense", "query"], modules_to_save=["pooler"], bias="all"
        ),
        ("bert",),
    ),
    Case("factors", lambda t: hf.IA3Config(target_modules=t, feedforward_modules=[t[2]])),
    Case("factors where absent", lambda t: hf.IA3Config()),
    Case(
        "layers",
        lambda t: low_rank(
            target_modules=t, layers_to_transform=[1, 5], layers_pattern=["layers", "layer"]
        ),
        ("llama", "bert", "opt"),
    ),
    Case(
        "one layer",
        lambda t: low_rank(target_modules=t, layers_to_transform=0),
        ("bert", "opt", "t5"),
    ),
    Case("rotations", lambda t: hf.BOFTConfig(target_modules=t[:2], boft_block_size=4), ("bert",)),
    Case("shards", lambda t: hf.MissConfig(target_modules=t, r=4), TWO),
    Case(
        "shared", lambda t: hf.VeraConfig(target_modules=t, r=5, d_initial=0.25), ("bert", "gpt2")
    ),
)

PAIRS = [pytest.param(case, name, id=f"{case.name}-{name}") for case in CASES for name in case.only]


def theirs(config: Any, name: str) -> tuple[dict[str, Any], set[str]]:
    """The layers of peft's by their paths, and what of the base it trains."""
    model = hf.get_peft_model(fresh(name), config)
    inner = model.base_model.model
    layers = {n: m for n, m in inner.named_modules() if isinstance(m, BaseTunerLayer)}
    prefix = model.base_model.prefix
    trained: set[str] = set()
    for full, parameter in inner.named_parameters():
        if not parameter.requires_grad or prefix in full:
            continue
        plain = full.replace(".base_layer", "").replace(".modules_to_save.default", "")
        if ".original_module" not in plain:
            trained.add(plain)
    return layers, trained


def imported(config: Any, folder: Path, model: nn.Module | None) -> str:
    config.save_pretrained(folder)
    return surgery.import_config(folder, model)


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_the_spec_has_the_sites_and_arguments_of_peft(
    case: Case, name: str, tmp_path: Path
) -> None:
    config = case.make(ALL[name])
    text = imported(config, tmp_path, fresh(name).to("meta"))
    plan = surgery.plan(text, fresh(name))
    # Peft's own order of patterns is lost when it writes a config, so its file is what counts.
    layers, trained = theirs(hf.PeftConfig.from_pretrained(tmp_path), name)
    ours = {s.path: dict(s.form.arguments) for s in plan.sites if not s.site.at.tensor}
    assert ours.keys() == layers.keys()
    for path, layer in layers.items():
        for said, value in _arguments(layer).items():
            assert ours[path].get(said, value) == value, (path, said)
    copies = {s.path for s in plan.sites if s.site.at.tensor}
    assert copies == trained
    assert case.says in text


def _arguments(layer: Any) -> Mapping[str, object]:
    """What a layer of peft's says of itself, by our names."""
    found: dict[str, object] = {}
    for name, said in (("r", "r"), ("lora_alpha", "alpha")):
        if "default" in (getattr(layer, name, None) or {}):
            found[said] = getattr(layer, name)["default"]
    if hasattr(layer, "is_feedforward"):
        found["side"] = "in" if layer.is_feedforward else "out"
    drop = getattr(layer, "lora_dropout", {})
    if "default" in drop:
        found["dropout"] = getattr(drop["default"], "p", 0.0)
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_a_model_the_names_say_the_same(name: str, tmp_path: Path) -> None:
    targets = ALL[name]
    config = low_rank(target_modules=targets, rank_pattern={targets[0]: 2})
    text = imported(config, tmp_path, None)
    plan = surgery.plan(text, fresh(name))
    layers, _ = theirs(config, name)
    assert {s.path: dict(s.form.arguments)["r"] for s in plan.sites} == {
        path: layer.r["default"] for path, layer in layers.items()
    }


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tuned_norms_are_copies(name: str, tmp_path: Path) -> None:
    config = hf.LNTuningConfig()
    text = imported(config, tmp_path, fresh(name))
    model = hf.get_peft_model(fresh(name), config)
    mark = ".ln_tuning_layers.default"
    named = model.base_model.model.named_parameters()
    trained = {full.replace(mark, "") for full, p in named if p.requires_grad}
    assert {s.path for s in surgery.plan(text, fresh(name)).sites} == trained


def test_every_field_that_is_left_out_is_said(tmp_path: Path) -> None:
    config = low_rank(
        target_modules=["query"], task_type="FEATURE_EXTRACTION", base_model_name_or_path="a/b"
    )
    text = imported(config, tmp_path, None)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    said = {
        line.split()[1] for line in text.splitlines() if line.startswith("# ") and " = " in line
    }
    assert {"task_type", "base_model_name_or_path", "peft_version"} <= said
    known = {"peft_type", "target_modules", "r", "lora_alpha", "bias", "init_lora_weights"}
    on = {n for n, v in written.items() if v not in (None, False, [], {}, "", 0, 0.0)}
    assert on - known <= said


def test_a_head_that_shares_its_weight_is_untied(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = cast(Any, LlamaConfig)(
        vocab_size=13, hidden_size=12, intermediate_size=20, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(small).eval()
    text = imported(low_rank(target_modules=["lm_head", "q_proj"]), tmp_path, model)
    paths = {s.path: s.site.tie for s in surgery.plan(text, model).sites}
    assert paths["lm_head"] == "untie"
    saved = low_rank(target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert "save lm_head untie" in imported(saved, tmp_path, model)


def test_a_task_brings_its_head(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    small = cast(Any, BertConfig)(
        vocab_size=13, hidden_size=12, intermediate_size=20, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = BertForSequenceClassification(small).eval()
    text = imported(low_rank(target_modules="all-linear", task_type="SEQ_CLS"), tmp_path, model)
    plan = surgery.plan(text, model)
    adapted = {s.path for s in plan.sites if not s.site.at.tensor}
    peer = hf.get_peft_model(model, low_rank(target_modules="all-linear", task_type="SEQ_CLS"))
    layers = {n for n, m in peer.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert adapted == layers
    assert {s.path for s in plan.sites if s.site.at.tensor} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_parameters_are_named_as_they_are(tmp_path: Path) -> None:
    model = fresh("mixtral")
    config = low_rank(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    plan = surgery.plan(imported(config, tmp_path, model), model)
    paths = {s.path for s in plan.sites}
    assert paths == {
        f"layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.experts.gate_up_proj")
    }


ROWS: tuple[tuple[Any, bool, dict[str, tuple[list[int], str | None]]], ...] = (
    (
        lambda: hf.TrainableTokensConfig(token_indices=[7, 2, 11]),
        True,
        {"model.embed_tokens": ([7, 2, 11], "share")},
    ),
    (
        lambda: low_rank(target_modules=["q_proj"], trainable_token_indices=[3, 4]),
        False,
        {"model.embed_tokens": ([3, 4], None)},
    ),
    (
        lambda: low_rank(
            target_modules=["q_proj"],
            trainable_token_indices={"embed_tokens": [3, 4], "lm_head": [1]},
        ),
        False,
        {"model.embed_tokens": ([3, 4], None), "lm_head": ([1], None)},
    ),
)


@pytest.mark.parametrize(("make", "tied", "wanted"), ROWS)
def test_rows_of_tables_are_trained(make: Any, tied: bool, wanted: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = cast(Any, LlamaConfig)(
        vocab_size=13, hidden_size=12, intermediate_size=20, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(small).eval()
    plan = surgery.plan(imported(make(), tmp_path, model), model)
    rows = [s for s in plan.sites if s.site.at.tensor]
    assert {s.site.owner: ([*s.site.at.picked], s.site.tie) for s in rows} == wanted


@pytest.mark.parametrize(
    ("rows", "said"),
    [([1, 1], "E515"), ([10**6], "E518"), ({"nowhere": [1]}, "E516"), ("1", "E515")],
)
def test_rows_that_are_not_there_are_refused(rows: Any, said: str, tmp_path: Path) -> None:
    low_rank(target_modules=["query"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trainable_token_indices": rows}))
    with pytest.raises(SurgeryError, match=said):
        surgery.import_config(path, fresh("bert"))


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "kind": ({"peft_type": "LOAR"}, "did you mean LORA?"),
    "unknown field": ({"layer_replication": [[0, 1]]}, "`layer_replication`"),
    "another equation": ({"use_twist": True}, "`use_twist`"),
    "no model": ({"target_modules": None}, "`target_modules` is absent"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "`trainable_token_indices`"),
    "layers": ({"layers_to_transform": "first"}, "`layers_to_transform`"),
    "look-ahead": ({"target_modules": "(?!a).*q_proj"}, ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_mathematics_is_refused(name: str, tmp_path: Path) -> None:
    changed, said = REFUSED[name]
    low_rank(target_modules=["query"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(SurgeryError) as caught:
        surgery.import_config(path)
    assert said in str(caught.value)
    assert all(d.hint or d.label for d in caught.value.diagnostics)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="names no module of the model"):
        imported(low_rank(target_modules=["c_attn"]), tmp_path, fresh("bert"))
    odd = nn.Sequential(nn.Linear(3, 5), nn.LSTM(5, 7))
    with pytest.raises(ArtifactError, match="is a LSTM"):
        imported(low_rank(target_modules=["0", "1"]), tmp_path, odd)
    with pytest.raises(ArtifactError, match="depends on the type"):
        imported(low_rank(), tmp_path, odd)


def test_the_table_of_targets_is_that_of_peft() -> None:
    from peft.utils import constants

    from surgery.errors import Source, Span
    from surgery.integrations.targets import taken_where_absent
    from surgery.mapping.fields import ConfigFile

    class Named(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.config = type("Config", (), {"model_type": kind})

    span = Span(Source("config", "{}"), 0, 1)
    kinds = {"LNTUNING": "LN_TUNING"}
    for name, table in vars(constants).items():
        kind = name.removeprefix("TRANSFORMERS_MODELS_TO_").partition("_TARGET_MODULES")[0]
        if not name.endswith("_TARGET_MODULES_MAPPING"):
            continue
        config = ConfigFile({"peft_type": kinds.get(kind, kind)}, span)
        for model_type in vars(constants)["TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"]:
            try:
                found = taken_where_absent(config, "target_modules", Named(model_type))
            except ArtifactError:
                found = None
            assert found == table.get(model_type), (name, model_type)
