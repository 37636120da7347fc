"""Scripts of the kind in peft's quick tour, run twice: with peft, and with the calls here."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
import transformers
from small_models import TOKENS, llama_config
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import surgery
import surgery.compat.peft as compat
import surgery.integrations.trainer as adapters
from surgery.errors import ArtifactError, StateError
from surgery.store import read_tensors

# Libraries whose types are not complete, and which are called by the same names.
theirs: Any = peft
ours: Any = compat
hf: Any = transformers
untyped: Any = torch

pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
    pytest.mark.filterwarnings("ignore:The density 1.0 is greater than or equal to 1"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))


class Small(nn.Module):
    """A small module of one's own."""

    def __init__(self) -> None:
        super().__init__()
        untyped.manual_seed(0)
        self.lin0 = nn.Linear(12, 24)
        self.norm = nn.LayerNorm(24)
        self.lin1 = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(torch.relu(self.norm(self.lin0(x))))


def causal() -> Any:
    untyped.manual_seed(0)
    return hf.LlamaForCausalLM(llama_config(pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()


def seq2seq() -> Any:
    untyped.manual_seed(0)
    config = hf.T5Config(
        vocab_size=13,
        d_model=12,
        d_kv=6,
        d_ff=20,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=1,
        pad_token_id=0,
    )
    return hf.T5ForConditionalGeneration(config).eval()


def moved(tensors: dict[str, Tensor], far: float = 0.3) -> dict[str, Tensor]:
    """An adapter's tensors away from where they begin, the same every time."""
    generator = torch.Generator().manual_seed(5)
    return {
        key: value + far * torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else value
        for key, value in sorted(tensors.items())
    }


def begun(library: Any, model: Any, tensors: dict[str, Tensor], name: str = "default") -> None:
    """Give an adapter some tensors."""
    result = library.set_peft_model_state_dict(model, tensors, adapter_name=name)
    assert not result.unexpected_keys


def wrapped(
    make: Callable[[], nn.Module], config: str, far: float = 0.3, **fields: Any
) -> tuple[Any, Any]:
    """The same adapter with the same tensors: peft's, and the one that is here."""
    both = [lib.get_peft_model(make(), getattr(lib, config)(**fields)) for lib in (theirs, ours)]
    start = moved(theirs.get_peft_model_state_dict(both[0]), far)
    for library, model in zip((theirs, ours), both, strict=True):
        begun(library, model, start)
    return both[0], both[1]


def close(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


# --------------------------------------------------------------------- a module of one's own

METHODS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 3, "lora_alpha": 5},
    "IA3Config": {"feedforward_modules": ["lin1"]},
    "VeraConfig": {"r": 5},
    "LoHaConfig": {"r": 3, "alpha": 5},
    "LoKrConfig": {"r": 2, "alpha": 3},
    "OFTConfig": {"oft_block_size": 4},
    "BOFTConfig": {"boft_block_size": 4},
    "HRAConfig": {"r": 4},
    "MissConfig": {"r": 3},
    "FourierFTConfig": {"n_frequency": 17},
    "RoadConfig": {"group_size": 4},
    "HiraConfig": {"r": 3},
    "C3AConfig": {"block_size": 4},
}


def stepped(model: Any, steps: int = 2) -> list[Tensor]:
    """The losses of some steps, and then the output with and without the adapter, and merged."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = untyped.optim.SGD(trained, lr=0.05)
    seen: list[Tensor] = []
    model.train()
    for _ in range(steps):
        loss = model(X).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.detach())
    model.eval()
    with torch.no_grad():
        seen.append(model(X))
        with model.disable_adapter():
            seen.append(model(X))
        seen.append(model.merge_and_unload(safe_merge=True)(X))
    return seen


@pytest.mark.parametrize("config", METHODS)
def test_a_module_of_ones_own_trains_merges_and_is_counted_as_with_peft(config: str) -> None:
    fields: dict[str, Any] = {"target_modules": ["lin0", "lin1"], **METHODS[config]}
    one, other = wrapped(Small, config, **fields)
    assert one.get_nb_trainable_parameters()[0] == other.get_nb_trainable_parameters()[0]
    for found, expected in zip(stepped(other), stepped(one), strict=True):
        close(found, expected, atol=1e-4)


def test_a_norm_and_a_head_are_trained_as_with_peft(capsys: pytest.CaptureFixture[str]) -> None:
    one, other = wrapped(Small, "LoraConfig", r=2, target_modules="lin0", modules_to_save=["lin1"])
    for model in (one, other):
        model.print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    for found, expected in zip(stepped(other), stepped(one), strict=True):
        close(found, expected)
    one, other = wrapped(Small, "LNTuningConfig", target_modules=["norm"])
    for found, expected in zip(stepped(other), stepped(one), strict=True):
        close(found, expected)


def test_an_adapter_is_put_into_a_model_without_a_wrapper() -> None:
    fields: dict[str, Any] = {"r": 3, "target_modules": ["lin0"], "lora_dropout": 0.0}
    made: list[Any] = []
    start: dict[str, Tensor] = {}
    for library in (theirs, ours):
        model = library.inject_adapter_in_model(library.LoraConfig(**fields), Small())
        start = start or moved(library.get_peft_model_state_dict(model))
        begun(library, model, start)
        assert library.get_peft_model_state_dict(model).keys() == start.keys()
        made.append(model)
    close(made[1](X), made[0](X))
    assert type(made[1]).__name__ == "Small"
    assert made[1].peft_config["default"].r == 3


def test_beginnings_are_the_base_and_follow_torchs_seed() -> None:
    drawn: list[Tensor] = []
    for seed in (1, 1, 2):
        base = Small()
        expected = base(X)
        untyped.manual_seed(seed)
        model = ours.get_peft_model(base, ours.LoraConfig(r=2, target_modules=["lin0"]))
        assert torch.equal(model(X), expected)
        drawn.append(ours.get_peft_model_state_dict(model)["base_model.model.lin0.lora_A.weight"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_wrapper_is_copied_and_pickled_and_forwards_what_it_has_not() -> None:
    _, model = wrapped(causal, "LoraConfig", task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    assert isinstance(model, compat.PeftModelForCausalLM)
    assert model.config is model.get_base_model().config
    assert model.base_model.model is model.get_base_model()
    assert type(model.base_model.model) is LlamaForCausalLM
    assert model.state_dict().keys() >= {"base_model.model.model.norm.weight"}
    expected = model(input_ids=TOKENS).logits
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is type(model)
        assert torch.equal(again(input_ids=TOKENS).logits, expected)
        assert again.active_adapter == "default"
    with pytest.raises(AttributeError, match="has no attribute 'weigths'"):
        _ = model.weigths


# ------------------------------------------------------------------------- language models


ROWS: list[dict[str, Any]] = [
    {"input_ids": t, "labels": t, "unused": 1} for t in TOKENS.repeat(4, 1)
]


def made(cls: Any, model: Any, folder: Path, **given: Any) -> Any:
    """A trainer of a few steps."""
    arguments = hf.TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=0.02,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=7,
        **given,
    )
    return cls(model=model, args=arguments, train_dataset=ROWS)


def trainer_losses(model: Any, folder: Path) -> list[float]:
    trainer = made(hf.Trainer, model, folder, save_strategy="no")
    trainer.train()
    evaluated = trainer.evaluate(ROWS)["eval_loss"]
    return [row["loss"] for row in trainer.state.log_history if "loss" in row] + [evaluated]


def test_a_causal_model_has_the_losses_that_it_has_with_peft(tmp_path: Path) -> None:
    both = wrapped(
        causal,
        "LoraConfig",
        task_type="CAUSAL_LM",
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj"],
    )
    first, second = (trainer_losses(model, tmp_path / str(i)) for i, model in enumerate(both))
    assert second == pytest.approx(first, abs=1e-4)
    assert second[3] < second[0]


def test_a_trainer_of_adapters_keeps_them_alone_and_goes_on_from_there(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.2}
    runs: list[list[float]] = []
    for start in (None, str(tmp_path / "checkpoint-2")):
        _, model = wrapped(causal, "LoraConfig", task_type="CAUSAL_LM", **fields)
        saving = {"save_strategy": "steps", "save_steps": 2}
        trainer = made(adapters.Trainer, model, tmp_path, **saving)
        trainer.train(resume_from_checkpoint=start)
        runs.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert runs[1][2:] == pytest.approx(runs[0][2:], abs=1e-6)
    checkpoint = tmp_path / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists()
    assert ours.PeftModel.from_pretrained(causal(), checkpoint).active_adapter == "default"
    assert len(read_tensors(checkpoint / "adapter_model.safetensors").shapes) == 4


def test_a_budget_shrinks_as_it_does_with_peft() -> None:
    both = wrapped(
        causal,
        "AdaLoraConfig",
        task_type="CAUSAL_LM",
        init_r=4,
        target_r=2,
        tinit=1,
        tfinal=1,
        total_step=5,
        target_modules=["q_proj", "v_proj"],
    )
    seen: list[list[float]] = []
    for model in both:
        optimizer = untyped.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses: list[float] = []
        for step in range(5):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        seen.append(losses)
    assert seen[1] == pytest.approx(seen[0], abs=1e-4)


def test_an_adapter_that_comes_under_a_name_of_one_that_went_has_a_budget_of_its_own() -> None:
    def config() -> Any:
        given = {"init_r": 4, "target_r": 2, "total_step": 5, "target_modules": ["q_proj"]}
        return ours.AdaLoraConfig(task_type="CAUSAL_LM", **given)

    model = ours.get_peft_model(causal(), config())
    model.add_adapter("other", config())
    first = model.base_model._budget()
    assert model.base_model._budget() is first
    model.delete_adapter("default")
    model.add_adapter("default", config())
    model.set_adapter("default")
    assert model.base_model._budget() is not first


def test_a_model_of_two_texts_is_trained_saved_and_generates_as_with_peft(tmp_path: Path) -> None:
    both = wrapped(
        seq2seq,
        "LoraConfig",
        task_type="SEQ_2_SEQ_LM",
        inference_mode=False,
        r=4,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=["q", "v"],
    )
    losses: list[list[float]] = []
    texts: list[Tensor] = []
    for library, model, at in zip((theirs, ours), both, ("theirs", "ours"), strict=True):
        optimizer = untyped.optim.AdamW(model.parameters(), lr=0.01)
        seen: list[float] = []
        for _ in range(3):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(float(loss.detach()))
        losses.append(seen)
        model.eval()
        model.save_pretrained(str(tmp_path / at))
        loaded = library.PeftModel.from_pretrained(seq2seq(), str(tmp_path / at))
        assert type(loaded).__name__ == "PeftModelForSeq2SeqLM"
        assert not any(p.requires_grad for p in loaded.parameters())
        texts.append(loaded.generate(input_ids=TOKENS, max_new_tokens=6, num_beams=2))
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert torch.equal(texts[0], texts[1])
    # What either of the two writes, the other reads.
    crossed = theirs.PeftModel.from_pretrained(seq2seq(), str(tmp_path / "ours")).eval()
    again = ours.PeftModel.from_pretrained(seq2seq(), str(tmp_path / "theirs"))
    fed = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
    for found, expected in ((crossed, both[1]), (again, both[0])):
        close(found(**fed).logits, expected(**fed).logits)


# ------------------------------------------------------------------------- several adapters


def two(library: Any, start: dict[str, Tensor] | None = None) -> tuple[Any, dict[str, Tensor]]:
    """A causal model with adapters "red" and "blue"."""
    names = {"task_type": "CAUSAL_LM", "lora_alpha": 6}
    config = library.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], **names)
    model = library.get_peft_model(causal(), config, adapter_name="red")
    other = library.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], **names)
    model.add_adapter("blue", other)
    start = start or moved(library.get_peft_model_state_dict(model, adapter_name="red"))
    begun(library, model, start, "red")
    begun(library, model, {key: 2 * value.flip(0) for key, value in start.items()}, "blue")
    return model.eval(), start


def switched(model: Any) -> list[Tensor]:
    """What a model with "red" and "blue" says, in several states."""
    seen: list[Tensor] = []
    with torch.no_grad():
        for name in ("red", "blue", "red"):
            model.set_adapter(name)
            seen.append(model(input_ids=TOKENS).logits)
        with model.disable_adapter():
            seen.append(model(input_ids=TOKENS).logits)
        seen.append(model(input_ids=TOKENS, adapter_names=["blue", "__base__"]).logits)
        model.base_model.set_adapter(["red", "blue"])
        seen.append(model(input_ids=TOKENS).logits)
        model.merge_adapter()
        seen.append(model(input_ids=TOKENS).logits)
        model.unmerge_adapter()
        model.set_adapter("blue")
        model.delete_adapter("red")
        seen.append(model(input_ids=TOKENS).logits)
    return seen


def test_two_adapters_are_switched_mixed_merged_and_deleted_as_with_peft() -> None:
    one, start = two(theirs)
    other, _ = two(ours, start)
    for model in (one, other):
        model.set_adapter("blue")
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all(".blue." in name or name.endswith(".blue") for name in trained)
    for found, expected in zip(switched(other), switched(one), strict=True):
        close(found, expected, atol=1e-4)
    assert other.active_adapters == ["blue"]
    assert [*other.peft_config] == ["blue"]


def test_adapters_are_saved_and_loaded_in_folders_of_their_names(tmp_path: Path) -> None:
    model, _ = two(ours)
    model.set_adapter("blue")
    expected = model(input_ids=TOKENS).logits
    model.save_pretrained(tmp_path, selected_adapters=["blue"])
    assert (tmp_path / "blue" / "adapter_config.json").is_file()
    assert not (tmp_path / "red").exists()
    for library in (theirs, ours):
        config = library.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM")
        again = library.get_peft_model(causal(), config)
        again.load_adapter(str(tmp_path / "blue"), "blue")
        assert again.active_adapter == "default"
        again.set_adapter("blue")
        close(again.eval()(input_ids=TOKENS).logits, expected, atol=1e-4)
    with pytest.raises(StateError, match="no adapter `c`"):
        model.save_pretrained(tmp_path, selected_adapters=["c"])


def test_what_cannot_be_merged_leaves_live_what_was() -> None:
    model, _ = two(ours)
    model.set_adapter("blue")
    for value in surgery.of(model.get_base_model()).parameters("red").values():
        value.data.fill_(float("nan"))
    expected = model(input_ids=TOKENS).logits
    with pytest.raises(StateError, match="E430"):
        model.merge_adapter(["red"], safe_merge=True)
    assert model.active_adapter == "blue"
    assert torch.equal(model(input_ids=TOKENS).logits, expected)


def test_what_is_merged_is_a_plain_model_that_is_saved_and_read_again(tmp_path: Path) -> None:
    model, _ = two(ours)
    expected = model(input_ids=TOKENS).logits
    plain: Any = model.merge_and_unload(progressbar=False, safe_merge=True, adapter_names=["red"])
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert not hasattr(plain, "peft_config")
    assert plain.state_dict().keys() == causal().state_dict().keys()
    plain.save_pretrained(tmp_path)
    again: Any = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    close(again(TOKENS).logits, expected)
    other, _ = two(ours)
    base = other.unload()
    assert all(torch.equal(t, base.state_dict()[n]) for n, t in causal().state_dict().items())


def test_status_says_what_is_there() -> None:
    one, start = two(theirs)
    other, _ = two(ours, start)
    for name in ("trainable_params", "enabled", "active_adapters", "available_adapters"):
        statuses = (library.get_model_status(m) for library, m in ((theirs, one), (ours, other)))
        first, second = statuses
        assert getattr(first, name) == getattr(second, name), name
    layers = other.get_layer_status()
    assert len(layers) == 4
    assert layers[0].requires_grad == {"red": True, "blue": False}
    other.base_model.disable_adapter_layers()
    assert not other.get_model_status().enabled
    assert other.active_adapters == ["red"]
    assert torch.equal(other(input_ids=TOKENS).logits, causal()(TOKENS).logits)
    other.base_model.enable_adapter_layers()
    assert surgery.of(other.get_base_model()).live == "red"


COMBINED: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {"svd_rank": 4},
    "ties": {"density": 0.5},
    "ties_svd": {"density": 0.5},
    "magnitude_prune": {"density": 0.5},
    "dare_linear": {"density": 1.0},
    "dare_ties": {"density": 1.0, "majority_sign_method": "frequency"},
}


@pytest.mark.parametrize("how", COMBINED)
def test_weighted_adapters_do_what_they_do_with_peft(how: str) -> None:
    one, start = two(theirs)
    other, _ = two(ours, start)
    seen: list[Tensor] = []
    for model in (one, other):
        given = {"combination_type": how, **COMBINED[how]}
        model.add_weighted_adapter(["red", "blue"], [0.7, -0.3], "c", **given)
        model.set_adapter("c")
        with torch.no_grad():
            seen.append(model.eval()(input_ids=TOKENS).logits)
    close(seen[1], seen[0], atol=1e-4)
    assert other.peft_config["c"].peft_type == "LORA"


# --------------------------------------------------------------------- texts and pictures


def test_bone_on_a_text_encoder_gives_what_miss_gives_with_peft(tmp_path: Path) -> None:
    config = hf.CLIPTextConfig(
        vocab_size=13,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
    )

    def encoder() -> Any:
        untyped.manual_seed(0)
        return hf.CLIPTextModel(config).eval()

    names = {"r": 4, "target_modules": ["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"]}
    one = theirs.get_peft_model(encoder(), theirs.MissConfig(**names)).eval()
    other = ours.get_peft_model(encoder(), ours.BoneConfig(**names)).eval()
    start = moved(theirs.get_peft_model_state_dict(one))
    begun(theirs, one, start)
    begun(ours, other, {k.replace("miss_block", "bone_block"): v for k, v in start.items()})
    expected = one(TOKENS).last_hidden_state
    close(other(TOKENS).last_hidden_state, expected)
    other.save_pretrained(tmp_path)
    assert ours.PeftConfig.from_pretrained(tmp_path).peft_type == "BONE"
    again = ours.PeftModel.from_pretrained(encoder(), tmp_path)
    close(again(TOKENS).last_hidden_state, expected)


def test_bone_on_a_u_net_gives_what_miss_gives_with_peft() -> None:
    diffusers: Any = pytest.importorskip("diffusers")

    def net() -> Any:
        untyped.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=4,
        ).eval()

    def output(model: Any) -> Tensor:
        latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        text = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2))
        return cast(Tensor, model(latent, 3, text).sample)

    names = {"r": 2, "target_modules": ["to_k", "to_q", "to_v", "to_out.0"]}
    one = theirs.get_peft_model(net(), theirs.MissConfig(**names)).eval()
    other = ours.get_peft_model(net(), ours.BoneConfig(**names)).eval()
    start = moved(theirs.get_peft_model_state_dict(one))
    begun(theirs, one, start)
    begun(ours, other, {k.replace("miss_block", "bone_block"): v for k, v in start.items()})
    close(output(other), output(one))
    close(output(other.merge_and_unload()), output(one))


# ---------------------------------------------------------------------------- what goes wrong


def test_whatever_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model, start = two(ours)
    expected = model(input_ids=TOKENS).logits
    before = {n: t.clone() for n, t in model.state_dict().items()}
    calls: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (StateError, "no adapter `c`", lambda: model.set_adapter("c")),
        (StateError, "no adapter `c`", lambda: model.delete_adapter("c")),
        (StateError, "has an adapter `blue` already", lambda: model.add_adapter("blue", lora())),
        (StateError, "no name of an adapter", lambda: model.add_adapter("a.b", lora())),
        (ArtifactError, "names no module", lambda: model.add_adapter("c", lora("qproj"))),
        (ArtifactError, "cannot be had", lambda: model.load_adapter(tmp_path / "none", "c")),
        (ArtifactError, "safe_serialization", lambda: model.save_pretrained(tmp_path, False)),
        (ArtifactError, "weights", lambda: model.add_weighted_adapter(["red", "blue"], [1.0], "c")),
        (
            ArtifactError,
            "has shape",
            lambda: ours.set_peft_model_state_dict(
                model, {k: t[:1] for k, t in start.items()}, "red"
            ),
        ),
        (ArtifactError, "max_shard", lambda: model.push_to_hub("me/it", max_shard_size="1GB")),
        (
            StateError,
            "2 samples",
            lambda: model(input_ids=TOKENS[:1], adapter_names=["red", "blue"]),
        ),
    ]
    for kind, text, call in calls:
        with pytest.raises(kind, match=text):
            call()
    assert model.active_adapter == "red"
    assert [*model.peft_config] == ["red", "blue"]
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    assert torch.equal(model(input_ids=TOKENS).logits, expected)


def lora(*names: str) -> Any:
    return ours.LoraConfig(r=2, target_modules=[*names] or ["q_proj"], task_type="CAUSAL_LM")
