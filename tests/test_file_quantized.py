"""Adapters merged into quantised checkpoints on disk, beside the same models merged in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import safetensors.torch
import torch
import transformers
from checkpoint_files import contents, refused, same, tensors
from small_models import logits, untyped
from support import moved
from torch import nn

import surgery
from surgery import file_quantized, file_tensors

packed: Any = pytest.importorskip("bitsandbytes")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

hf: Any = transformers  # whose types are not complete
files: Any = safetensors.torch
theirs: Any = peft

TOKENS = torch.arange(12).view(2, 6) * 5 % 61

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(autouse=True)
def no_bars() -> None:
    hf.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each kind in several files, which begin in the midst of weights."""
    hf.utils.logging.disable_progress_bar()
    untyped.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    root = tmp_path_factory.mktemp("bases")
    hf.LlamaForCausalLM(config).bfloat16().save_pretrained(root / "dense")
    for name, how in KINDS.items():
        own = hf.BitsAndBytesConfig(**how)
        model = hf.AutoModelForCausalLM.from_pretrained(root / "dense", quantization_config=own)
        model.save_pretrained(root / name, max_shard_size="20KB")
    return {name: root / name for name in KINDS}


def loaded(folder: Path) -> nn.Module:
    return hf.AutoModelForCausalLM.from_pretrained(folder).eval()


def ours(base: Path, spec: str, at: Path) -> Path:
    compiled = surgery.compile(spec, loaded(base))
    moved(compiled)
    compiled.save(at)
    return at


def pefts(base: Path, targets: list[str], at: Path) -> Path:
    config = theirs.LoraConfig(r=3, lora_alpha=5, target_modules=targets)
    model = theirs.get_peft_model(loaded(base), config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(at)
    return at


def unmerged(out: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, bytes]:
    """The files that are made again where no library reads quantised weights."""

    def absent() -> None:
        raise AssertionError

    with monkeypatch.context() as here:
        here.setattr(file_quantized, "quantiser", absent)
        here.setattr(file_tensors, "quantiser", absent)
        surgery.unmerge_files(out, out.with_name("back"))
    return contents(out.with_name("back"))


Make = Callable[[Path, Path], Path]

ADAPTERS: dict[str, Make] = {
    "peft": lambda base, at: pefts(base, ["q_proj", "down_proj"], at),
    "ours": lambda base, at: ours(base, "match q_proj | down_proj apply dora(r=4)", at),
    "begun": lambda base, at: ours(base, "match @mlp apply pissa(r=4)\ntrain @norm", at),
    "rows": lambda base, at: ours(base, "match up_proj[16:48] | lm_head apply dora(r=2)", at),
}

CASES = [
    ("nf4", "peft", "requantize"),
    ("nf4", "ours", "dequantize"),
    ("fp4", "rows", "requantize"),
    ("fp4", "begun", "dequantize"),
    ("int8", "ours", "requantize"),
    ("int8", "peft", "dequantize"),
]


@pytest.mark.parametrize(("kind", "adapter", "how"), CASES)
def test_files_are_merged_as_models_are_and_back(
    kind: str,
    adapter: str,
    how: Any,
    bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, out = bases[kind], tmp_path / "out"
    before = contents(base)
    folder = ADAPTERS[adapter](base, tmp_path / "a")
    model = loaded(base)
    told = surgery.attach(folder, model).inverse.merge(quantized=how)
    made = surgery.merge_files(folder, base, out, quantized=how)
    merged = tensors(out)
    own = {n: t for n, t in model.state_dict().items() if ".surgery." not in n}
    assert merged.keys() == own.keys()
    differing = {n for n, tensor in merged.items() if not same(tensor, own[n])}
    assert all(".quant_state." in name for name in differing)  # which are as long as they were
    errors = {site.path: site.rounding.error for site in told.sites}
    assert {s.path: s.rounding.error for s in made.report.sites} == pytest.approx(errors, rel=1e-6)
    whole = [s for s in made.report.sites if "_proj" in s.path]
    assert all(s.way == "base" and s.kept >= s.bytes for s in whole)
    again = loaded(out)
    assert torch.equal(logits(again, TOKENS), logits(model, TOKENS))
    if how == "requantize":
        headers = (len(data) for name, data in contents(out).items() if name in before)
        assert [*headers] == [len(data) for data in before.values()]
    assert contents(base) == before
    assert unmerged(out, monkeypatch) == before


@pytest.mark.parametrize("adapter", ["ours", "peft"])
def test_what_is_quantised_may_stay_with_its_adapter(
    adapter: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = bases["nf4"], tmp_path / "out"
    if adapter == "ours":
        spec = "match q_proj apply vera(r=4)\nmatch lm_head apply lora(r=3)\ntrain @norm"
        folder = ours(base, spec, tmp_path / "a")
    else:
        folder = pefts(base, ["q_proj", "lm_head"], tmp_path / "a")
    model, factor = loaded(base), 0.5 if adapter == "ours" else 1.0
    live = surgery.attach(folder, model)
    live.activate(f"{factor}*default")
    live.inverse.merge(quantized="separate")
    made = surgery.merge_files([(folder, factor)], base, out, quantized="separate")
    ((left, (given, paths)),) = made.left.items()
    assert (left, given, len(paths)) == ("unmerged/a", factor, 2)
    assert all(path.endswith("q_proj") for path in paths)
    assert str(out / left) in str(made)
    again = loaded(out)
    compiled = surgery.attach(out / left, again)
    compiled.activate(f"{factor}*default")
    assert {site.path for site in compiled.plan.sites} == {*paths}
    assert torch.equal(logits(again, TOKENS), logits(model, TOKENS))
    assert (out / left / "adapter_config.json").exists()
    nothing = surgery.merge_files(folder, base, tmp_path / "o", quantized="separate", undo="none")
    said = refused(
        tmp_path,
        "E552",
        lambda: surgery.merge_files(folder, nothing.out, tmp_path / "p", quantized="separate"),
    )
    assert "unmerged/a" in said
    assert unmerged(out, monkeypatch) == contents(base)


def test_config_says_which_weights_are_quantised(bases: dict[str, Path], tmp_path: Path) -> None:
    every = "match @attention | @mlp apply lora(r=2)"
    for number, spec in enumerate(("match q_proj in layers[1] apply lora(r=2)", every)):
        folder = ours(bases["int8"], spec, tmp_path / f"a{number}")
        out = tmp_path / f"out{number}"
        surgery.merge_files(
            folder, bases["int8"], out, quantized="dequantize", undo="none", workers=1
        )
        config = json.loads((out / "config.json").read_text())
        index = json.loads((out / "model.safetensors.index.json").read_text())
        found = tensors(out)
        assert index["weight_map"].keys() == found.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
        layers = [m for m in loaded(out).modules() if isinstance(m, packed.nn.Linear8bitLt)]
        if number:
            assert "quantization_config" not in config
            assert not any(name.endswith("SCB") for name in found)
            assert not layers
        else:
            skipped = config["quantization_config"]["llm_int8_skip_modules"]
            assert "model.layers.1.self_attn.q_proj" in skipped
            assert "lm_head" in skipped
            assert len(layers) == 13


def test_what_becomes_of_quantised_weights_is_to_be_said(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base, out, merge = bases["nf4"], tmp_path / "out", surgery.merge_files
    folder = ours(base, "match q_proj apply lora(r=4)", tmp_path / "a")
    said = refused(tmp_path, "E424", lambda: merge(folder, base, out))
    assert all(word in said for word in ("dequantize", "requantize", "separate"))
    refused(tmp_path, "E424", lambda: surgery.plan_files(folder, base))
    refused(tmp_path, "E424", lambda: merge(folder, base, out, quantized=cast(Any, "float")))
    refused(tmp_path, "E553", lambda: merge(folder, base, out, quantized="separate"))
    again = "requantize"
    refused(tmp_path, "E431", lambda: merge(folder, base, out, quantized=again, max_rel_err=1e-3))
    plan = surgery.plan_files(folder, base, quantized="dequantize")
    assert [(c.shape, c.dtype, c.by_rows) for c in plan.changes] == 2 * [((64, 64), "nf4", False)]
    damaged = tmp_path / "damaged"
    shutil.copytree(base, damaged)
    for path in damaged.glob("*.safetensors"):
        path.write_bytes(path.read_bytes().replace(b'"shape": [64, 64]', b'"shape": [64, 46]'))
    refused(tmp_path, "E554", lambda: merge(folder, damaged, out, quantized=again))
