from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import nn

from surgery.errors import ArtifactError, StateError
from surgery.integrations import transformers as ours
from surgery.integrations.transformers import example_inputs, load_model

library = cast(Any, transformers)

_SMALL: Mapping[str, Mapping[str, object]] = {
    "BertModel": {
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_attention_heads": 3,
        "num_hidden_layers": 1,
        "vocab_size": 31,
    },
    "LlamaForCausalLM": {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 31,
        "tie_word_embeddings": True,
    },
    "T5ForConditionalGeneration": {
        "d_model": 12,
        "d_kv": 5,
        "d_ff": 20,
        "num_layers": 1,
        "num_heads": 3,
        "vocab_size": 31,
    },
    "ViTModel": {
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_attention_heads": 3,
        "num_hidden_layers": 1,
        "image_size": 14,
        "patch_size": 7,
    },
    "WhisperModel": {
        "d_model": 12,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 3,
        "decoder_attention_heads": 3,
        "encoder_ffn_dim": 20,
        "decoder_ffn_dim": 20,
        "vocab_size": 31,
        "max_source_positions": 11,
        "num_mel_bins": 7,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
    "ResNetModel": {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1]},
}


def build(name: str) -> nn.Module:
    cls = getattr(library, name)
    return cls(cls.config_class(**_SMALL[name])).eval()


def saved(name: str, folder: Path) -> nn.Module:
    model = build(name)
    cast(Any, model).save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", _SMALL)
def test_a_folder_gives_the_model_it_was_saved_from(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded) is type(model)
    assert not loaded.training
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("name", _SMALL)
def test_on_meta_the_model_has_the_same_modules_and_ties(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    meta = load_model(str(tmp_path), meta=True)
    assert all(p.is_meta for p in meta.parameters())
    assert [*meta.state_dict()] == [*model.state_dict()]
    shapes = [(n, p.shape, p.dtype) for n, p in meta.named_parameters()]
    assert shapes == [(n, p.shape, p.dtype) for n, p in model.named_parameters()]


def test_half_precision_stays_half(tmp_path: Path) -> None:
    cast(Any, build("BertModel").to(torch.bfloat16)).save_pretrained(tmp_path)
    for meta in (False, True):
        model = load_model(str(tmp_path), meta=meta)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_without_an_architecture_the_config_decides(tmp_path: Path) -> None:
    saved("BertModel", tmp_path)
    change_config(tmp_path, architectures=None)
    assert type(load_model(str(tmp_path))) is library.BertModel


def test_a_model_one_level_down_is_found(tmp_path: Path) -> None:
    saved("BertModel", tmp_path / "0_Transformer")
    assert type(load_model(str(tmp_path), meta=True)) is library.BertModel


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": ["NoSuchModel"]},
        {"architectures": None, "model_type": "no_such_type"},
        {"num_hidden_layers": 2},
        {"hidden_size": 18},
        {"hidden_size": "wide"},
    ],
)
def test_a_config_that_does_not_fit_is_refused(fields: dict[str, object], tmp_path: Path) -> None:
    saved("BertModel", tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(ArtifactError, match="E502"):
        load_model(str(tmp_path))


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    saved("BertModel", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="E502"):
        load_model(str(tmp_path))
    weights.unlink()
    with pytest.raises(ArtifactError, match="E502"):
        load_model(str(tmp_path))


def test_a_near_folder_is_named(tmp_path: Path) -> None:
    saved("BertModel", tmp_path / "model")
    with pytest.raises(ArtifactError, match=r"did you mean `.*model`"):
        load_model(str(tmp_path / "modle"))
    shutil.rmtree(tmp_path / "model")


def test_a_factory_must_be_trusted_and_give_a_module() -> None:
    assert isinstance(load_model("python:torch.nn:Identity", trust=True), nn.Identity)
    with pytest.raises(ArtifactError, match="E505"):
        load_model("python:torch.nn:Identity")
    for reference in ("python:builtins:dict", "python:torch.nn:Linear", "python:torch:nowhere"):
        with pytest.raises(ArtifactError, match="E503"):
            load_model(reference, trust=True)


def test_the_library_is_as_talkative_afterwards(tmp_path: Path) -> None:
    saved("BertModel", tmp_path)
    log = library.utils.logging
    before = (log.get_verbosity(), log.is_progress_bar_enabled())
    load_model(str(tmp_path))
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("name", _SMALL)
def test_a_model_runs_on_its_example_inputs(name: str) -> None:
    model = build(name)
    before = torch.get_rng_state()
    inputs, again = example_inputs(model), example_inputs(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(inputs[key], again[key]) for key in inputs)
    with torch.no_grad():
        assert model(**inputs)[0].isfinite().all()


def test_example_inputs_have_the_models_dtype_and_no_padding() -> None:
    vision = build("ViTModel").to(torch.bfloat16)
    assert example_inputs(vision)["pixel_values"].dtype == torch.bfloat16
    text = example_inputs(build("T5ForConditionalGeneration"))
    assert {n: tuple(t.shape) for n, t in text.items()} == {
        "input_ids": (2, 7),
        "decoder_input_ids": (2, 5),
    }
    assert all((t != 0).all() for t in text.values())


def test_a_model_without_a_config_brings_its_inputs() -> None:
    with pytest.raises(StateError, match="E413"):
        example_inputs(nn.Linear(2, 3))


class Ready(nn.Linear):
    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        return {"input": torch.ones(5, 2)}


def test_ready_inputs_are_taken() -> None:
    model = Ready(2, 3)
    assert model(**example_inputs(model)).shape == (5, 3)


def test_what_stands_beside_is_found_here() -> None:
    for name in ("Trainer", "enable", "from_pretrained", "push_to_hub", "save_base"):
        assert callable(getattr(ours, name))
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = cast(Any, ours).nothing_such
