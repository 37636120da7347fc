"""Configs have peft's fields and defaults, say what is wrong, and mean what a file of them does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import peft
import pytest
import torch
import transformers
from small_models import TOKENS, llama_config
from torch import nn
from transformers import LlamaForCausalLM

import surgery
import surgery.compat.peft as compat
from surgery.compat.peft.config import defaults_of, free_in
from surgery.compat.peft.weighted import expression
from surgery.errors import ArtifactError, SurgeryError, error_of

theirs: Any = peft
ours: Any = compat
hf: Any = transformers
untyped: Any = torch

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

KINDS = sorted(compat.PEFT_TYPE_TO_CONFIG_MAPPING)
THEIRS = {
    kind.value: cls
    for kind, cls in cast("dict[Any, Any]", theirs.PEFT_TYPE_TO_CONFIG_MAPPING).items()
}
NEEDED: dict[str, dict[str, Any]] = {"ADALORA": {"total_step": 7}}


def llama() -> Any:
    untyped.manual_seed(0)
    made: Any = LlamaForCausalLM
    return made(llama_config()).eval()


def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return sorted(cast("set[Any]", value)) if isinstance(value, set) else value


def test_there_is_a_class_for_all_of_pefts_kinds_but_those_that_say_why_not() -> None:
    assert {*KINDS} - THEIRS.keys() == {"BONE"}
    for kind in THEIRS.keys() - {*KINDS}:
        name = THEIRS[kind].__name__
        with pytest.raises(ArtifactError, match=f"`{name}` is not here"):
            getattr(compat, name)
    assert {t.value for t in compat.PeftType} == {*THEIRS, "BONE"}
    assert {t.value for t in compat.TaskType} == {t.value for t in theirs.TaskType}
    missing: object = getattr(compat, "get_peft_modell", None)
    assert missing is None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in THEIRS])
def test_a_config_has_pefts_fields_and_defaults(kind: str) -> None:
    fields = {"target_modules": ["q_proj"], **NEEDED.get(kind, {})}
    expected = THEIRS[kind](**fields).to_dict()
    cls: Any = compat.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    assert cls.__name__ == THEIRS[kind].__name__
    assert getattr(compat, cls.__name__) is cls
    found = cls(**fields).to_dict()
    expected.pop("peft_version")
    assert found.pop("peft_version").startswith("0.21.")
    assert {n: plain(v) for n, v in found.items()} == {n: plain(v) for n, v in expected.items()}
    assert free_in(kind) <= {*defaults_of(kind), "use_bdlora.match_strict"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_is_written_and_read_in_its_class(kind: str, tmp_path: Path) -> None:
    cls: Any = compat.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    config = cls(target_modules=["v_proj", "q_proj"], task_type=compat.TaskType.CAUSAL_LM)
    config.save_pretrained(tmp_path)
    again = compat.PeftConfig.from_pretrained(tmp_path)
    assert type(again) is cls
    assert again.to_dict() == config.to_dict()
    assert again == config
    assert again != cls(target_modules=["k_proj"])
    assert again.task_type == "CAUSAL_LM"
    assert not again.is_prompt_learning
    assert repr(config).startswith(f"{cls.__name__}(task_type=")
    if kind in THEIRS and kind not in NEEDED:
        assert plain(theirs.PeftConfig.from_pretrained(tmp_path).target_modules)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("LN_TUNING", "TRAINABLE_TOKENS")])
def test_every_config_is_an_adapter_on_a_model(kind: str) -> None:
    """What its defaults do to a model that they fit, and every one is what its file says."""
    sizes: dict[str, dict[str, Any]] = {
        "BOFT": {"boft_block_size": 2},
        "C3A": {"block_size": 2, "init_weights": True},
        "FOURIERFT": {"n_frequency": 7, "init_weights": True},
        "WAVEFT": {"n_frequency": 7},
        "GRALORA": {"r": 4},
        "IA3": {"feedforward_modules": []},
        "OFT": {"oft_block_size": 4},
        "ROAD": {"group_size": 4},
        "VBLORA": {"vector_length": 6, "num_vectors": 5},
        "PSOFT": {"r": 3},
        "ADAMSS": {"r": 4, "num_subspaces": 2},
        "RANDLORA": {"r": 4},
        "SHIRA": {"r": 1},
        "SUPERTUNING": {"sparsity": 0.9, "r": None},
    }
    cls: Any = compat.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    small = {"r": 3} if "r" in defaults_of(kind) and kind != "OFT" else {}
    fields = {**small, **sizes.get(kind, {}), **NEEDED.get(kind, {})}
    config = cls(target_modules=["q_proj"], **fields)
    base = llama()
    expected = base(TOKENS).logits
    model = compat.get_peft_model(base, config)
    torch.testing.assert_close(model.eval()(TOKENS).logits, expected, atol=1e-4, rtol=1e-3)
    assert {s.path for s in surgery.of(base).plan.sites} == {
        f"model.layers.{i}.self_attn.q_proj" for i in range(2)
    }
    assert any(p.requires_grad for p in model.parameters())


def test_what_is_wrong_with_a_config_is_said_all_at_once() -> None:
    with pytest.raises(ArtifactError) as caught:
        ours.LoraConfig(rr=8, lora_alfa=3, target_modules=["q_proj"])
    text = str(caught.value)
    assert "no field `rr`" in text
    assert "did you mean `lora_alpha`?" in text
    config = ours.LoraConfig(r=8)
    for change in (lambda: setattr(config, "lora_alfa", 3), lambda: config.lora_alfa):
        with pytest.raises((ArtifactError, AttributeError), match="did you mean `lora_alpha`"):
            change()
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("says nothing alone", {"layers_pattern": "layers"}),
        ("not with a regex", {"target_modules": ".*q", "layers_to_transform": [0]}),
        ("is a text", {"target_parameters": "q.weight"}),
        ("there is no task", {"task_type": "CAUSAL"}),
    ]
    for message, fields in wrong:
        with pytest.raises(ArtifactError, match=message):
            ours.LoraConfig(**fields)
    with pytest.raises(ArtifactError, match="one of the two"):
        ours.OFTConfig(r=8)
    with pytest.raises(ArtifactError, match="no field `nblock`"):
        ours.BdLoraConfig(nblock=2)
    with pytest.raises(ArtifactError, match="did you mean LORA"):
        ours.get_peft_config({"peft_type": "LORAA"})


UNFOLLOWED: list[tuple[str, dict[str, Any], str]] = [
    ("LoraConfig", {"init_lora_weights": False}, "init_lora_weights"),
    ("LoraConfig", {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    ("LoraConfig", {"layer_replication": [(0, 1), (0, 1)]}, "layer_replication"),
    ("LoraConfig", {"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ("LoraConfig", {"ensure_weight_tying": True}, "ensure_weight_tying"),
    ("LoHaConfig", {"init_weights": False}, "init_weights"),
    ("OFTConfig", {"oft_block_size": 4, "module_dropout": 0.5}, "module_dropout"),
    ("BOFTConfig", {"boft_dropout": 0.5}, "boft_dropout"),
    ("WaveFTConfig", {"wavelet_family": "db4"}, "wavelet_family"),
    ("ShiraConfig", {"mask_type": "custom"}, "mask_type"),
    ("DeftConfig", {"init_scale": 0.5}, "init_scale"),
]


@pytest.mark.parametrize(("name", "fields", "field"), UNFOLLOWED)
def test_what_is_not_followed_is_refused_and_never_passed_over(
    name: str, fields: dict[str, Any], field: str
) -> None:
    model = llama()
    with pytest.raises(SurgeryError) as caught:
        ours.get_peft_model(model, getattr(ours, name)(target_modules=["q_proj"], **fields))
    assert f"`{field}`" in str(caught.value)
    assert type(error_of(caught.value.diagnostics)) is ArtifactError
    assert not hasattr(model, "peft_config")
    assert all("surgery" not in name for name, _ in model.named_parameters())


def test_beginnings_that_are_methods_are_taken_as_such() -> None:
    for value, method in (
        (True, "lora"),
        ("gaussian", "lora"),
        ("pissa", "pissa"),
        ("olora", "olora"),
        ("orthogonal", "ortholora"),
        ("mica", "mica"),
    ):
        base = llama()
        config = ours.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=value)
        ours.get_peft_model(base, config)
        assert {s.form.method.name for s in surgery.of(base).plan.sites} == {method}


def test_targets_are_taken_as_peft_takes_them() -> None:
    cases: list[dict[str, Any]] = [
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*layers\.0.*(up|down)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["layers.0.mlp.down_proj"]},
        {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 2}, "r": 4},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 3]}},
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "all"},
    ]
    for fields in cases:
        expected = theirs.get_peft_model(llama(), theirs.LoraConfig(**fields))
        found = ours.get_peft_model(llama(), ours.LoraConfig(**fields))
        one, other = (
            {k: t.shape for k, t in library.get_peft_model_state_dict(model).items()}
            for library, model in ((theirs, expected), (ours, found))
        )
        assert one == other, fields


def test_a_folder_says_which_base_it_is_for(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    cls: Any = LlamaForCausalLM
    base = cls.from_pretrained(tmp_path / "base").eval()
    config = ours.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = ours.get_peft_model(base, config, revision=None)
    model.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "base")
    assert written["target_modules"] == ["q_proj"]
    assert written["inference_mode"]
    for auto in (ours.AutoPeftModelForCausalLM, ours.AutoPeftModel):
        again = auto.from_pretrained(tmp_path / "adapter")
        assert isinstance(again, compat.PeftModelForCausalLM)
        assert torch.equal(again(TOKENS).logits, model.eval()(TOKENS).logits)
    tensors = ours.load_peft_weights(tmp_path / "adapter")
    assert tensors.keys() == ours.get_peft_model_state_dict(model).keys()
    read = theirs.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    torch.testing.assert_close(read(TOKENS).logits, model(TOKENS).logits)


def test_a_folder_of_another_version_may_have_fields_that_are_off(tmp_path: Path) -> None:
    model = ours.get_peft_model(llama(), ours.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "use_newer": False, "newer_config": None}))
    loaded = ours.PeftModel.from_pretrained(llama(), tmp_path)
    assert loaded.peft_config["default"].r == 2
    file.write_text(json.dumps({**values, "use_newer": True}))
    with pytest.raises(ArtifactError, match="no field `use_newer`"):
        ours.PeftConfig.from_pretrained(tmp_path)


def test_a_quantised_model_is_prepared_as_with_peft() -> None:
    for library in (theirs, ours):
        model = llama().to(torch.bfloat16)
        prepared = library.prepare_model_for_kbit_training(model)
        assert prepared is model
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in model.parameters())


def test_an_adapter_may_have_the_dtype_of_its_base() -> None:
    for cast_up, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = ours.get_peft_model(
            llama().to(torch.bfloat16),
            ours.LoraConfig(r=2, target_modules=["q_proj"]),
            autocast_adapter_dtype=cast_up,
        )
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}


def test_an_adapter_of_another_base_is_loaded_with_a_warning(tmp_path: Path) -> None:
    model = ours.get_peft_model(llama(), ours.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    other = llama()
    nn.init.normal_(other.model.layers[0].self_attn.q_proj.weight)
    with pytest.warns(UserWarning, match="another base"):
        loaded = ours.PeftModel.from_pretrained(other, tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in loaded.parameters())


def test_adapters_of_several_methods_come_and_go_beside_each_other() -> None:
    config = ours.LoraConfig(r=2, target_modules=["q_proj"])
    model = ours.get_peft_model(llama(), config, mixed=True)
    model.add_adapter("loha", ours.LoHaConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter(["default", "loha"])
    assert model.active_adapters == ["default", "loha"]
    again = ours.get_peft_model(model, ours.IA3Config(), "ia3")
    assert again.active_adapter == "ia3"
    for name in ("ia3", "default", "loha"):
        again.delete_adapter(name)
    assert again.active_adapters == []
    assert torch.equal(again(TOKENS).logits, llama()(TOKENS).logits)
    again.add_adapter("ia3", ours.IA3Config())
    again.set_adapter("ia3")
    assert again.active_peft_config.peft_type == "IA3"


def test_a_quantised_model_may_be_trained_by_transformers() -> None:
    """Which asks the wrapper whether what is trained are adapters."""
    base = llama()
    base.is_quantized = True
    base.hf_quantizer = SimpleNamespace(is_trainable=True)
    validate = hf.trainer_utils.validate_quantization_for_training
    with pytest.raises(ValueError, match="purely quantized"):
        validate(base)
    validate(ours.get_peft_model(base, ours.LoraConfig(r=2, target_modules=["q_proj"])))


def test_a_weighted_sum_is_said_in_the_language() -> None:
    assert expression(["a", "b"], [0.5, -1]) == "0.5*a - 1*b"
    assert expression(["a"], [-2]) == "- 2*a"
