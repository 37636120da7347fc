"""Adapted models in `generate` and in pipelines: what the merged model gives, offloaded or not."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import TOKENS, llama_config, untyped
from support import moved
from torch import Tensor, nn
from transformers import BertConfig, T5Config
from transformers.utils import logging

import surgery
from surgery.integrations import models

library: Any = transformers  # whose types are not complete
log: Any = logging

SPECS = (
    "match q_proj | down_proj apply dora(r=3) match embed_tokens apply lora(r=2)",
    "match /[qv]_proj/ apply oft(block_size=3) match up_proj apply ia3() train @norm",
)

CALLS: Mapping[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "sampled": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "static cache and beams": {"cache_implementation": "static", "num_beams": 2},
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    log.set_verbosity_error()
    log.disable_progress_bar()


def llama() -> Any:
    untyped.manual_seed(0)
    model = library.LlamaForCausalLM(llama_config(pad_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0)  # so that one token is likelier than the others
    return model


def generated(model: Any, tokens: Tensor = TOKENS, **options: Any) -> list[list[int]]:
    untyped.manual_seed(3)
    seen = torch.ones_like(tokens)
    given = {"do_sample": False, "max_new_tokens": 8, "attention_mask": seen, **options}
    return model.generate(tokens, **given).tolist()


def merged(model: nn.Module) -> nn.Module:
    """The same model without adapters, and with them in the weights."""
    other = copy.deepcopy(model)
    inverse = surgery.of(other).inverse
    inverse.merge()
    inverse.unload(keep_merge=True)
    return other


def adapted(model: Any, spec: str = SPECS[0]) -> Any:
    moved(surgery.compile(spec, model))
    return model


@pytest.mark.parametrize("call", CALLS)
def test_what_is_generated_is_what_the_merged_model_generates(call: str) -> None:
    for spec in SPECS:
        model = adapted(llama(), spec)
        found = generated(model, **CALLS[call])
        assert found == generated(merged(model), **CALLS[call])
        assert found != generated(llama(), **CALLS[call])


def test_an_encoder_and_a_decoder_generate_with_beams() -> None:
    untyped.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 12, "d_kv": 5, "d_ff": 20, "num_layers": 1, "num_heads": 3}
    sizes["decoder_start_token_id"] = 0
    config = T5Config(vocab_size=13, **sizes)
    model = library.T5ForConditionalGeneration(config).eval()
    base = generated(model, num_beams=3)
    adapted(model, "match q | v | wo apply bone(r=2) match lm_head apply dora(r=2) untie")
    found = generated(model, num_beams=3)
    assert found == generated(merged(model), num_beams=3)
    assert found != base


def test_verbs_between_calls_change_what_is_generated() -> None:
    model = models.enable(llama())
    model.add_adapter("match q_proj apply lora(r=2)", "a")
    moved(surgery.of(model), "a")
    model.add_adapter("match embed_tokens apply lora(r=2)", "b")
    moved(surgery.of(model), "b")
    expected = {name: generated(_alone(model, name)) for name in "ab"}
    for name in "abab":
        model.set_adapter(name)
        assert generated(model, cache_implementation="static") == expected[name]
        model.disable_adapters()
        assert generated(model) == generated(llama())
        model.enable_adapters()
        assert generated(model) == expected[name]


def _alone(model: Any, name: str) -> nn.Module:
    other = copy.deepcopy(model)
    surgery.of(other).activate(name)
    return merged(other)


# --------------------------------------------------------------------------------- pipelines


def tokenizer() -> Any:
    tokenizers: Any = pytest.importorskip("tokenizers")
    words = {
        word: i
        for i, word in enumerate(
            ["[PAD]", "[UNK]", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"]
        )
    }
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return library.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]"
    )


def test_a_pipeline_that_generates_text() -> None:
    model = adapted(llama())
    options = {"max_new_tokens": 5, "do_sample": False, "batch_size": 2}
    texts = ["a b c", "d e f g", "k j"]
    pipes = [
        library.pipeline("text-generation", model=one, tokenizer=tokenizer(), device="cpu")
        for one in (model, merged(model), llama())
    ]
    found, expected, base = (pipe(texts, **options) for pipe in pipes)
    assert found == expected
    assert found != base


def test_a_pipeline_that_classifies() -> None:
    untyped.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=13, num_attention_heads=2, **sizes)
    model = library.BertForSequenceClassification(config).eval()
    adapted(model, "match query apply dora(r=2) save classifier")
    pipes = [
        library.pipeline("text-classification", model=one, tokenizer=tokenizer(), device="cpu")
        for one in (model, merged(model))
    ]
    found, expected = (pipe(["a b", "c"], top_k=None) for pipe in pipes)
    assert [[one["label"] for one in row] for row in found] == [
        [one["label"] for one in row] for row in expected
    ]
    scores = [[one["score"] for one in row] for row in found]
    torch.testing.assert_close(
        torch.tensor(scores), torch.tensor([[one["score"] for one in row] for row in expected])
    )


# ----------------------------------------------------------------------------------- offload

PLACES = {
    "model.embed_tokens": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "lm_head": "disk",
}


def test_a_folder_is_attached_to_a_model_that_is_on_disk(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    llama().save_pretrained(tmp_path / "base")
    model = adapted(library.LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    models.save_pretrained(model, tmp_path / "adapter")
    expected = {call: generated(model, **CALLS[call]) for call in ("greedy", "beams")}
    placed: Any = {"device_map": PLACES, "offload_folder": tmp_path / "offload"}
    direct = library.LlamaForCausalLM.from_pretrained(tmp_path / "base", **placed)
    base = generated(direct)
    there: tuple[surgery.Compiled, ...] = (
        surgery.attach(tmp_path / "adapter", direct),
        models.from_pretrained(tmp_path / "adapter", **placed),
    )
    for compiled in there:
        assert compiled.model.get_parameter("model.layers.0.self_attn.q_proj.weight").is_meta
        for call, tokens in expected.items():
            assert generated(compiled.model, **CALLS[call]) == tokens
        compiled.activate(None)
        assert generated(compiled.model) == base
        compiled.activate("default")
    compiled = there[0]
    compiled.inverse.merge()
    assert generated(compiled.model) == expected["greedy"]
    compiled.inverse.unload()
    assert generated(compiled.model) == base


def test_a_device_map_that_is_found_by_itself(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    llama().save_pretrained(tmp_path / "base")
    model = library.LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map="auto")
    adapted(model)
    on_cpu = merged(copy.deepcopy(model).to("cpu"))
    assert generated(model.to("cpu")) == generated(on_cpu)
