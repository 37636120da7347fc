"""What else a run with transformers' Trainer may ask for, on a small model; and what is refused."""

from __future__ import annotations

import copy
import os
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, nn
from trainers import curve, trainer
from transformers import BertConfig, BertForSequenceClassification, ViTConfig

import surgery
from surgery.artifact import FILES, MAPPING, TENSORS
from surgery.errors import ArtifactError, StateError, SurgeryError
from surgery.integrations.trainer import AdapterCheckpoints, AdapterTraining, Trainer
from surgery.integrations.training import load_adapters, save_adapters, saved_adapters
from surgery.store import read_tensors

untyped: Any = torch  # whose types are not complete

SPEC = "match query | value apply lora(r=3)\ntrain classifier"
SEVERAL = """
adapter one { match query apply lora(r=2) }
adapter two { match value apply dora(r=3) }
adapter still { match key apply bone(r=3) }
activate one + two
"""


@cache
def first() -> nn.Module:
    untyped.manual_seed(0)
    config = BertConfig(
        vocab_size=13,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
    )
    return BertForSequenceClassification(config)


def base() -> Any:
    return copy.deepcopy(first())


@cache
def rows() -> list[dict[str, Tensor]]:
    """Walks around the vocabulary, up or down."""
    steps = [1 if i % 2 else -1 for i in range(12)]
    walks = [(i + step * torch.arange(7)) % 13 for i, step in enumerate(steps)]
    labels = [torch.tensor(int(step > 0)) for step in steps]
    return [
        {"input_ids": w, "attention_mask": torch.ones_like(w), "labels": y}
        for w, y in zip(walks, labels, strict=True)
    ]


def run(compiled: Any, folder: Path, kind: Any = Trainer, **given: Any) -> Any:
    made = trainer(compiled, rows(), folder, kind, **{"learning_rate": 3e-2, **given})
    made.train()
    return made


def keys(file: Path) -> set[str]:
    return {*read_tensors(file)}


def files(folder: Path) -> set[str]:
    return {*os.listdir(folder)}


# ------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_checkpointed_activations_and_accumulated_gradients(
    reentrant: bool, tmp_path: Path
) -> None:
    expected = run(surgery.compile(SPEC, base()), tmp_path / "a", gradient_accumulation_steps=2)
    found = run(
        surgery.compile(SPEC, base()),
        tmp_path / "b",
        gradient_accumulation_steps=2,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert curve(found) == curve(expected)
    one, two = surgery.of(found.model), surgery.of(expected.model)
    assert all(torch.equal(t, two.parameters()[n]) for n, t in one.parameters().items())


def test_reentrant_checkpoints_of_what_has_no_tokens(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=6,
        patch_size=3,
    )
    untyped.manual_seed(0)
    model: Any = transformers.ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(12, 3, 6, 6, generator=generator)
    data = [{"pixel_values": x, "labels": torch.tensor(i % 2)} for i, x in enumerate(images)]
    curves: list[list[float]] = []
    for options in ({}, {"use_reentrant": True}):
        spec = "match attention.q_proj | attention.v_proj apply lora(r=2)"
        compiled = surgery.compile(spec, copy.deepcopy(model))
        given: dict[str, Any] = {
            "activation_checkpointing": bool(options),
            "activation_checkpointing_kwargs": options,
        }
        made = trainer(compiled, data, tmp_path, learning_rate=3e-2, save_strategy="no", **given)
        made.train()
        curves.append(curve(made))
    assert curves[0] == curves[1]
    assert curves[0][0] != curves[0][-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_adapters_are_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    compiled = surgery.compile(SPEC, base().to(dtype))
    seen: set[torch.dtype] = set()

    def note(gradient: Tensor) -> None:
        seen.add(gradient.dtype)

    for p in _trained(compiled):
        cast(Any, p).register_hook(note)
    before = {n: t.clone() for n, t in compiled.parameters().items()}
    made = run(compiled, tmp_path, bf16=True)
    assert seen == {torch.float32}
    found = compiled.parameters()
    assert {t.dtype for t in found.values()} == {torch.float32}
    assert not any(torch.equal(t, before[n]) for n, t in found.items())
    states = cast("dict[Any, dict[str, Tensor]]", made.optimizer.state)
    assert {t.dtype for state in states.values() for t in state.values()} == {torch.float32}
    saved = read_tensors(tmp_path / "checkpoint-6" / TENSORS)
    assert {t.dtype for t in saved.values()} == {torch.float32}
    compiled.inverse.unload()
    first_dtype = base().to(dtype).state_dict()
    assert all(torch.equal(t, first_dtype[n]) for n, t in compiled.model.state_dict().items())


def test_autocast_to_float16_with_scaled_gradients() -> None:
    compiled = surgery.compile(SPEC, base())
    optimizer: Any = torch.optim.AdamW(
        [p for p in compiled.model.parameters() if p.requires_grad], lr=3e-2
    )
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    batch = {n: torch.stack([row[n] for row in rows()]) for n in rows()[0]}
    losses: list[float] = []
    for _ in range(6):
        with torch.autocast("cpu", torch.float16):
            loss = cast(Any, compiled.model)(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert scaler.get_scale() == 2.0**10
    assert {t.dtype for t in compiled.parameters().values()} == {torch.float32}


def test_the_best_is_live_at_the_end(tmp_path: Path) -> None:
    compiled = surgery.compile(SPEC, base())
    own = [p for p in compiled.model.parameters() if p.requires_grad]
    made = run(
        compiled,
        tmp_path,
        learning_rate=0.5,  # so that the last step is not the best
        max_steps=4,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        save_total_limit=1,
        save_only_model=True,
    )
    evaluated = [row["eval_loss"] for row in made.state.log_history if "eval_loss" in row]
    best = min(evaluated)
    assert best < evaluated[-1]
    step = evaluated.index(best) + 1
    assert made.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{step}")
    assert made.evaluate()["eval_loss"] == best
    # It alone is kept, without the state of the optimizer; parameters are the same objects.
    assert files(tmp_path) == {f"checkpoint-{step}"}
    written = files(tmp_path / f"checkpoint-{step}")
    assert written <= {*FILES, "trainer_state.json", "training_args.bin"}
    assert all(one is two for one, two in zip(own, _trained(compiled), strict=True))
    attached = surgery.attach(made.state.best_model_checkpoint, base())
    expected = compiled.parameters()
    assert all(torch.equal(t, expected[n]) for n, t in attached.parameters().items())


def _trained(compiled: surgery.Compiled) -> list[nn.Parameter]:
    return [p for p in compiled.model.parameters() if p.requires_grad]


def test_learning_rates_of_a_spec(tmp_path: Path) -> None:
    compiled = surgery.compile("match query apply lora(r=3) lr B = 16x", base())
    made = run(compiled, tmp_path, learning_rate=1e-3)
    rates = {
        id(p): group["initial_lr"] for group in made.optimizer.param_groups for p in group["params"]
    }
    named = {n: rates[id(p)] for n, p in compiled.model.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2]: rate for n, rate in named.items()} == {"A": 1e-3, "B": 16e-3}
    other = surgery.compile("match query apply lora(r=3) lr B = 16x", base(), seed=4)
    again = trainer(other, rows(), tmp_path, learning_rate=1e-3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert curve(again) == curve(made)


def test_a_quantised_base(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base().save_pretrained(tmp_path / "base")
    options: Any = {"load_in_4bit": True, "llm_int8_skip_modules": ["classifier"]}
    model = cast(Any, BertForSequenceClassification).from_pretrained(
        tmp_path / "base",
        quantization_config=transformers.BitsAndBytesConfig(**options),
        device_map="cpu",
    )
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, rows(), tmp_path)
    compiled = surgery.compile(SPEC, model)
    made = run(compiled, tmp_path, max_steps=2, save_steps=2)
    assert "_hf_peft_config_loaded" not in vars(made.model)
    assert keys(tmp_path / "checkpoint-2" / TENSORS)


# ------------------------------------------------------------------------------ several adapters


def several() -> surgery.Compiled:
    compiled = surgery.compile(SEVERAL, base())
    for n, p in compiled.model.named_parameters():
        if ".still." in n:
            p.requires_grad_(False)
    return compiled


def test_each_of_several_adapters_has_a_folder(tmp_path: Path) -> None:
    compiled = several()
    whole = run(compiled, tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert saved_adapters(checkpoint) == {"one": checkpoint / "one", "two": checkpoint / "two"}
    assert not files(checkpoint) & {*FILES}
    again = trainer(several(), rows(), tmp_path, learning_rate=3e-2)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert curve(again) == curve(whole)
    # Then one of them, in the same folder.
    save_adapters(compiled.model, tmp_path / "one")
    for n, p in compiled.model.named_parameters():
        p.requires_grad_(".two." in n)
    save_adapters(compiled.model, tmp_path / "one")
    assert saved_adapters(tmp_path / "one") == {"two": tmp_path / "one"}
    for n, p in compiled.model.named_parameters():
        p.requires_grad_(".two." in n or ".one." in n)
    save_adapters(compiled.model, tmp_path / "one")
    assert saved_adapters(tmp_path / "one").keys() == {"one", "two"}


# --------------------------------------------------------------------------------- plain trainers


def test_a_plain_trainer_saves_the_base_too(tmp_path: Path) -> None:
    compiled = surgery.compile(SPEC, base())
    plain = run(compiled, tmp_path / "plain", transformers.Trainer)
    checkpoint = tmp_path / "plain" / "checkpoint-3"
    assert keys(checkpoint / "model.safetensors") == compiled.model.state_dict().keys()
    for kind in (transformers.Trainer, Trainer):
        again = trainer(surgery.compile(SPEC, base(), seed=4), rows(), tmp_path, kind)
        again.args.learning_rate = 3e-2
        again.train(resume_from_checkpoint=str(checkpoint))
        assert curve(again) == curve(plain)


def test_a_callback_takes_the_base_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = surgery.compile(SPEC, base())
    options: dict[str, Any] = {
        "callbacks": [AdapterCheckpoints()],
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "learning_rate": 3e-2,
    }
    save = cast(Any, compiled.model).save_pretrained  # in several files, as large models are
    monkeypatch.setattr(compiled.model, "save_pretrained", partial(save, max_shard_size="20KB"))
    plain = run(compiled, tmp_path / "plain", transformers.Trainer, **options)
    checkpoint = tmp_path / "plain" / "checkpoint-3"
    assert [file.name for file in checkpoint.glob("model*")] == ["model.safetensors"]
    assert keys(checkpoint / "model.safetensors") == compiled.parameters().keys()
    assert (checkpoint / MAPPING).is_file()
    other = surgery.compile(SPEC, base(), seed=4)
    again = trainer(other, rows(), tmp_path, transformers.Trainer, **options)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert curve(again) == curve(plain)
    attached = surgery.attach(plain.state.best_model_checkpoint, base())
    expected = compiled.parameters()
    assert all(torch.equal(t, expected[n]) for n, t in attached.parameters().items())


def test_a_model_without_adapters_is_trained_as_ever(tmp_path: Path) -> None:
    run(base(), tmp_path, max_steps=2, save_steps=2)
    assert keys(tmp_path / "checkpoint-2" / "model.safetensors") == base().state_dict().keys()


def test_another_trainer_becomes_one_of_adapters(tmp_path: Path) -> None:
    class Theirs(transformers.Trainer):
        """Somebody's own."""

    class Mine(AdapterTraining, Theirs):
        """The same for adapters."""

    run(surgery.compile(SPEC, base()), tmp_path, Mine, max_steps=2, save_steps=2)
    assert not [*tmp_path.rglob("model*.safetensors")]
    assert saved_adapters(tmp_path / "checkpoint-2").keys() == {"default"}


def test_what_is_pushed_is_what_a_checkpoint_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[str] = []

    def push(self: Any, folder: str) -> None:
        del self
        pushed.append(folder)

    monkeypatch.setattr(transformers.Trainer, "_push_from_checkpoint", push)
    compiled = surgery.compile(SPEC, base())
    made = trainer(compiled, rows(), tmp_path)
    made.save_model(str(tmp_path / "checkpoint-1"))
    made._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert pushed == [str(tmp_path / "checkpoint-1")]
    assert saved_adapters(tmp_path) == {"default": tmp_path}
    surgery.attach(tmp_path, base())


# ------------------------------------------------------------------------------------- refusals


def test_a_parameter_of_the_base_that_no_checkpoint_would_hold(tmp_path: Path) -> None:
    compiled = surgery.compile("match query apply lora(r=2)", base())
    cast(Any, compiled.model).classifier.requires_grad_(True)
    for kind, callbacks in ((Trainer, []), (transformers.Trainer, [AdapterCheckpoints()])):
        with pytest.raises(ArtifactError, match=r"`classifier.weight` of the base") as error:
            run(compiled, tmp_path, kind, callbacks=callbacks)
        assert [d.code for d in error.value.diagnostics] == ["E571", "E571"]
    cast(Any, compiled.model).bert.encoder.requires_grad_(True)
    with pytest.raises(ArtifactError, match="more parameters of the base"):
        run(compiled, tmp_path)
    assert not tmp_path.exists() or not files(tmp_path)


@pytest.mark.parametrize("way", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_trainer_that_shards_the_model(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(surgery.compile(SPEC, base()), rows(), tmp_path)
    monkeypatch.setattr(made, way, True)
    with pytest.raises(ArtifactError, match="E572"):
        made.create_optimizer()


def test_what_is_read_off_the_models_class_is_there(tmp_path: Path) -> None:
    data = [{**row, "note": "of no use to the model"} for row in rows()]
    made = trainer(surgery.compile(SPEC, base()), cast(Any, data), tmp_path, max_steps=1)
    assert made.label_names == ["labels"]
    assert made.can_return_loss is trainer(base(), rows(), tmp_path).can_return_loss
    made.train()
    assert made.predict(data[:4]).label_ids.tolist() == [0, 1, 0, 1]


def test_a_frozen_model(tmp_path: Path) -> None:
    compiled = surgery.compile(SPEC, base().eval())
    compiled.freeze()
    with pytest.raises(StateError, match="E441"):
        run(compiled, tmp_path)


def test_nothing_that_would_be_trained(tmp_path: Path) -> None:
    compiled = surgery.compile(SEVERAL, base())
    compiled.activate("still")
    for n, p in compiled.model.named_parameters():
        p.requires_grad_(".one." in n)
    with pytest.raises(StateError, match=r"`still` is live, and `one`.*\n.*activate\('one'\)"):
        run(compiled, tmp_path)
    compiled.activate(None)
    with pytest.raises(StateError, match="the base alone is live"):
        run(compiled, tmp_path)
    compiled.model.requires_grad_(False)
    with pytest.raises(StateError, match="E450"):
        run(compiled, tmp_path)
    compiled.activate("one")
    compiled.inverse.merge()
    with pytest.raises(StateError, match="E402"):
        run(compiled, tmp_path)


def test_checkpoints_that_do_not_belong(tmp_path: Path) -> None:
    compiled = several()
    before = {n: t.clone() for n, t in compiled.model.state_dict().items()}
    other = surgery.compile("adapter one { match query apply lora(r=2) }", base(), seed=3)
    other.save(tmp_path / "short")
    surgery.compile("adapter odd { match query apply lora(r=2) }", base()).save(tmp_path / "odd")
    save_adapters(surgery.compile(SEVERAL.replace("r=3", "r=2"), base()).model, tmp_path / "rank")
    save_adapters(surgery.compile(SEVERAL.replace("value", "key"), base()).model, tmp_path / "at")
    (tmp_path / "output").mkdir()
    save_adapters(compiled.model, tmp_path / "output" / "checkpoint-1")
    changed = several()
    for t in changed.parameters("one").values():
        t.add_(1)
    save_adapters(changed.model, tmp_path / "cut")
    tensors = tmp_path / "cut" / "two" / TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-8])
    moved = base()
    moved.bert.encoder.layer[0].attention.self.query.weight.data.add_(1)
    save_adapters(surgery.compile(SEVERAL, moved).model, tmp_path / "moved")
    (tmp_path / "empty").mkdir()
    for name, code, text in (
        ("short", "E570", "lacks the adapter `two`, which is trained"),
        ("odd", "E570", "has an adapter `odd`, and the model has none"),
        ("cut", "E512", "is not a whole safetensors file"),
        ("moved", "E522", "another base"),
        ("rank", "E439", r"has bone\(r=3\) on the model, and bone\(r=2\)"),
        ("at", "E439", "adapts `bert.encoder.layer.0.attention.self.key`"),
        ("output", "E570", "holds no adapter"),
        ("empty", "E570", "holds no adapter"),
        ("nowhere", "E570", "holds no adapter"),
    ):
        with pytest.raises(SurgeryError, match=text) as error:
            load_adapters(compiled.model, tmp_path / name)
        assert code in {d.code for d in error.value.diagnostics}, name
        now = compiled.model.state_dict()
        assert all(torch.equal(t, now[n]) for n, t in before.items()), name
