"""Checkpoints whose tensors a loaded model has by other names, or joined of several."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import peft
import pytest
import safetensors.torch
import torch
import transformers
from beside_peft import saved_by_peft
from checkpoint_files import contents
from hypothesis import given
from hypothesis import strategies as st
from small_models import logits, untyped
from support import moved
from torch import Tensor, nn

import surgery
from surgery import file_tensors, folder_sites, merging
from surgery.errors import ArtifactError
from surgery.file_record import RECORD
from surgery.joined import Joined, Stretch

hf: Any = transformers  # whose types are not complete
theirs: Any = peft
files: Any = safetensors.torch

Make = Callable[[], nn.Module]
DECODER: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(autouse=True)
def of_small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_tensors, "SMALL", 256)
    hf.utils.logging.disable_progress_bar()


def made(cls: str, **config: Any) -> nn.Module:
    untyped.manual_seed(0)
    kind = getattr(hf, cls)
    return cast(nn.Module, kind(kind.config_class(**config)).eval())


def vit() -> nn.Module:
    sizes = {"hidden_size": 24, "intermediate_size": 44, "num_attention_heads": 2}
    return made(
        "ViTForImageClassification", image_size=8, patch_size=4, num_hidden_layers=2, **sizes
    )


def dinov2() -> nn.Module:
    """Whose gate and up are one tensor of the checkpoint, and two layers of the model."""
    return made(
        "Dinov2ForImageClassification",
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        use_swiglu_ffn=True,
    )


def mixtral() -> nn.Module:
    return made("MixtralForCausalLM", intermediate_size=44, num_local_experts=3, **DECODER)


def qwen() -> nn.Module:
    sizes = {"intermediate_size": 44, "moe_intermediate_size": 20, "head_dim": 12}
    return made("Qwen3MoeForCausalLM", num_experts=3, num_experts_per_tok=2, **sizes, **DECODER)


def answer(model: nn.Module) -> Tensor:
    if "Image" in type(model).__name__:
        pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        return logits(model, pixels)
    return logits(model)


def loaded(folder: Path, like: nn.Module) -> nn.Module:
    return cast(Any, type(like)).from_pretrained(folder).eval()


CASES: dict[str, tuple[Make, str]] = {
    "renamed": (vit, "match q_proj | fc1 apply dora(r=2)\ntrain @norm"),
    "parts of a tensor": (dinov2, "match gate_proj | q_proj apply lora(r=2)"),
    "all of a tensor": (dinov2, "match gate_proj | up_proj apply lora(r=2)"),
    "several tensors": (mixtral, "match experts.gate_up_proj | experts.down_proj apply lora(r=2)"),
    "taken whole": (qwen, "match experts.gate_up_proj apply oft(block_size=6)"),
    "witnesses": (qwen, "match experts.gate_up_proj | down_proj | q_proj apply dora(r=2)"),
    "some rows": (mixtral, "match @gate in experts apply lora(r=2)"),
    "beginnings": (mixtral, "match experts.down_proj apply pissa(r=2)"),
}


@pytest.mark.parametrize("case", CASES)
def test_files_are_merged_by_the_names_of_the_model(case: str, tmp_path: Path) -> None:
    make, spec = CASES[case]
    model = make()
    cast(Any, model).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    before = contents(tmp_path / "base")
    compiled = surgery.compile(spec, model)
    moved(compiled, None)
    compiled.save(tmp_path / "a")
    surgery.merge_files(tmp_path / "a", tmp_path / "base", tmp_path / "out")
    merged = loaded(tmp_path / "out", model)
    assert not torch.allclose(answer(merged), answer(make()), atol=1e-5)
    torch.testing.assert_close(answer(merged), answer(model), atol=1e-5, rtol=1e-4)
    surgery.unmerge_files(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == before


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (vit, {"target_modules": ["q_proj", "fc2"]}),
        (qwen, {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
        (
            mixtral,
            {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        ),
    ],
    ids=["renamed", "one", "two"],
)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_folders_of_peft_are_merged_by_them_too(
    make: Make, config: dict[str, Any], tmp_path: Path
) -> None:
    model = make()
    cast(Any, model).save_pretrained(tmp_path / "base")
    adapted = saved_by_peft(make, theirs.LoraConfig(r=2, **config), tmp_path / "a")
    surgery.merge_files(tmp_path / "a", tmp_path / "base", tmp_path / "out")
    merged = loaded(tmp_path / "out", model)
    expected = answer(cast(Any, adapted).get_base_model())
    assert not torch.allclose(expected, answer(model), atol=1e-5)
    torch.testing.assert_close(answer(merged), expected, atol=1e-5, rtol=1e-4)


def test_of_what_is_joined_each_tensor_is_merged_by_its_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that end where tensors do, and blocks that lie in two of them."""
    model = prepared(mixtral, "match experts.gate_up_proj apply lora(r=2)", tmp_path)
    for rows, most in ((11, 44), (10, 50)):
        monkeypatch.setattr(merging, "BLOCK", rows * 24)
        out = tmp_path / f"out{rows}"
        surgery.merge_files(tmp_path / "a", tmp_path / "base", out)
        (shard,) = json.loads((out / RECORD).read_text())["shards"].values()
        blocks = [m["blocks"] for row in shard["changed"] for m in row["matrices"]]
        assert len(blocks) == 2 * 2 * 3
        assert max(sum(stop - start for start, stop, _ in own) for own in blocks) <= most
        torch.testing.assert_close(answer(loaded(out, model)), answer(model))
        surgery.unmerge_files(out)
        assert contents(out) == contents(tmp_path / "base")


# ------------------------------------------------------------------------------------- options


def prepared(make: Make, spec: str, at: Path) -> nn.Module:
    """A checkpoint of a model in `base`, and in `a` an adapter that the model has."""
    model = make()
    cast(Any, model).save_pretrained(at / "base")
    compiled = surgery.compile(spec, model)
    moved(compiled, None)
    compiled.save(at / "a")
    return model


def test_joined_tensors_are_cast_and_rounded_by_chance(tmp_path: Path) -> None:
    model = prepared(mixtral, CASES["several tensors"][1], tmp_path)
    merge = surgery.merge_files
    wide = tmp_path / "wide"
    merge(tmp_path / "a", tmp_path / "base", wide, dtype=torch.float64)
    torch.testing.assert_close(answer(loaded(wide, model).float()), answer(model))
    surgery.unmerge_files(wide)
    assert contents(wide) == contents(tmp_path / "base")
    for name in ("one", "two"):
        merge(tmp_path / "a", tmp_path / "base", tmp_path / name, round="stochastic", seed=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    torch.testing.assert_close(answer(loaded(tmp_path / "one", model)), answer(model))


def refused(code: str, at: Path, **options: Any) -> str:
    with pytest.raises(ArtifactError) as caught:
        surgery.merge_files(at / "a", at / "base", at / "out", **options)
    assert {d.code for d in caught.value.diagnostics} == {code}
    assert not (at / "out").exists()
    return str(caught.value)


def test_part_of_a_parameter_has_its_dtype(tmp_path: Path) -> None:
    prepared(mixtral, "match @gate in experts apply lora(r=2)", tmp_path)
    assert "w3" in refused("E552", tmp_path, dtype=torch.float64)


def test_a_bias_that_is_part_of_a_tensor_is_refused(tmp_path: Path) -> None:
    prepared(dinov2, "match gate_proj apply lora(r=2, bias=true)", tmp_path)
    assert "several tensors" in refused("E547", tmp_path)


@pytest.fixture
def turned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that has columns where the model has rows."""
    prepared(mixtral, "match q_proj apply lora(r=2)", tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    found = files.load_file(path)
    named = {n.replace("q_proj", "query"): t for n, t in found.items()}
    files.save_file(named, path, metadata={"format": "pt"})
    core: Any = import_module("transformers.core_model_loading")
    mapping: Any = import_module("transformers.conversion_mapping")
    turn = core.WeightConverter("attn.query.weight", "attn.q_proj.weight", [core.Transpose(0, 1)])
    monkeypatch.setattr(mapping, "get_model_conversion_mapping", Gives([turn]))
    return tmp_path


class Gives:
    """A function that gives the same, whatever it is asked."""

    def __init__(self, what: object) -> None:
        self.what = what

    def __call__(self, *given: object) -> object:
        return self.what


def test_what_is_turned_as_it_is_loaded_is_refused(turned: Path) -> None:
    told = refused("E545", turned)
    assert "no rows" in told
    assert "save_pretrained" in told


def test_without_transformers_it_is_said_what_might_help(
    turned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_sites, "names_of", Gives(None))
    assert "install transformers" not in refused("E545", turned)
    monkeypatch.setattr(folder_sites, "find_spec", Gives(None))
    assert "install transformers" in refused("E545", turned)


# ---------------------------------------------------------------------------------------- bytes


@given(st.permutations(range(11)), st.data())
def test_a_joined_parameter_is_read_and_written_as_its_rows_lie(
    order: list[int], data: st.DataObject
) -> None:
    """Any bytes of it, of rows of two tensors in any order."""
    cut, width = data.draw(st.integers(1, 10)), 3
    rows = torch.arange(11 * width, dtype=torch.int16).view(11, width)
    tensors = {"a": rows[:cut].clone(), "b": rows[cut:].clone()}
    stretches = tuple(
        Stretch("a" if row < cut else "b", row if row < cut else row - cut, at, 1)
        for at, row in enumerate(order)
    )
    joined = Joined("w", torch.int16, (11, width), width, stretches)
    source = joined.source(cast(Any, InMemory(tensors)))
    whole = rows[order].flatten().view(torch.uint8)
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    found = torch.empty(whole.numel(), dtype=torch.uint8)
    assert torch.equal(source.read(start, stop, found), whole[start:stop])
    for name, tensor in tensors.items():
        made = torch.full((tensor.numel() * 2,), 255, dtype=torch.uint8)
        spans = joined.inside(name)

        def write(at: int, piece: Tensor, made: Tensor = made) -> None:
            made[at : at + piece.numel()] = piece

        joined.target(name, torch.int16, write).write(0, whole)
        assert torch.equal(made.view(torch.int16).view(-1, width), tensor)
        assert sum(last - first for first, last in spans) == tensor.numel()


class InMemory:
    """What a checkpoint is asked here."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def entry(self, name: str) -> Any:
        return SimpleNamespace(torch_dtype=self.tensors[name].dtype)

    def read_bytes(self, name: str, start: int, stop: int, into: Tensor) -> Tensor:
        return into.copy_(self.tensors[name].flatten().view(torch.uint8)[start:stop])
