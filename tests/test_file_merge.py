"""Adapters merged into checkpoints on disk: what comes out, the way back, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import safetensors.torch
import small_models
import torch
import transformers
from beside_peft import close, output, saved_by_peft
from checkpoint_files import contents, refused, tensors
from small_models import language_model, logits, untyped
from support import moved
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import surgery
from surgery import file_places, file_tensors
from surgery.errors import SurgeryError
from surgery.file_record import RECORD

hf: Any = transformers  # whose types are not complete
files: Any = safetensors.torch
theirs: Any = peft

Make = Callable[[], nn.Module]


@pytest.fixture(autouse=True)
def no_bars() -> None:
    hf.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def of_small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corrections for what is otherwise kept as it is, and turning on disk."""
    monkeypatch.setattr(file_tensors, "SMALL", 256)
    monkeypatch.setattr(file_places, "IN_MEMORY", 4096)


def llama(**given: Any) -> nn.Module:
    return language_model(attention_bias=True, **given)


def tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


def gpt2() -> nn.Module:
    untyped.manual_seed(1)
    sizes: dict[str, Any] = {"vocab_size": 61, "n_embd": 24, "n_head": 2, "n_layer": 2}
    config = GPT2Config(bos_token_id=1, eos_token_id=2, n_positions=8, **sizes)
    return GPT2LMHeadModel(config).eval()


def saved(model: nn.Module, at: Path, most: str = "20KB") -> Path:
    """A checkpoint in several files, with a tokenizer's file beside it."""
    cast(Any, model).save_pretrained(at, max_shard_size=most)
    (at / "tokenizer.json").write_text("{}")
    return at


def adapter(model: nn.Module, spec: str, at: Path, name: str | None = None) -> Path:
    """A saved adapter that does something; the model stays adapted."""
    compiled = surgery.compile(spec, model)
    moved(compiled, name)
    compiled.save(at, name)
    return at


CASES: dict[str, tuple[Make, str]] = {
    "rows": (llama, "match q_proj | down_proj apply dora(r=4)"),
    "rotations": (
        llama,
        "match q_proj | o_proj apply oft(block_size=6)\nmatch up_proj apply loha(r=3)",
    ),
    "shared": (llama, "match @query | @value apply vera(r=7)\ntrain @norm"),
    "tables": (llama, "match embed_tokens apply lora(r=4)\nmatch lm_head apply miss(r=4)"),
    "biases": (llama, "match q_proj apply lora(r=4, bias=true)\ntrain @norm"),
    "of the base": (llama, "match q_proj apply pissa(r=4)"),
    "rows of tables": (llama, "train embed_tokens[3, 5, 11]"),
    "tied head": (tied, "match lm_head apply lora(r=4) share"),
    "tied table": (tied, "match embed_tokens apply lora(r=4) share"),
    "transposed": (gpt2, "match c_attn | c_fc | mlp.c_proj apply lora(r=4)"),
    "parts": (gpt2, "match @query | @value apply lora(r=4)\nmatch wte apply lora(r=2) share"),
}


DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@pytest.mark.parametrize(("case", "dtype"), [(case, DTYPES[i % 3]) for i, case in enumerate(CASES)])
def test_files_are_merged_as_models_are_and_back(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    make, spec = CASES[case]
    model = make().to(dtype)
    base = saved(model, tmp_path / "base")
    before = contents(base)
    folder = adapter(make().to(dtype), spec, tmp_path / "a")
    surgery.attach(folder, model).inverse.merge()
    made = surgery.merge_files(folder, base, tmp_path / "out")
    merged = tensors(tmp_path / "out")
    own = model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in merged.items())
    assert any(not torch.equal(t, merged[n]) for n, t in tensors(base).items())
    assert (tmp_path / "out/tokenizer.json").exists()
    assert {s.path for s in made.report.sites} == {s.path for s in surgery.of(model).plan.sites}
    assert contents(base) == before
    surgery.unmerge_files(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == before


def test_what_loads_computes_what_the_adapted_model_does(tmp_path: Path) -> None:
    model = llama()
    base = saved(model, tmp_path / "base")
    folder = adapter(model, "match q_proj | down_proj apply lora(r=4)", tmp_path / "a")
    surgery.merge_files(folder, base, tmp_path / "out")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("targets", [["c_attn", "c_proj"], ["q_proj", "embed_tokens"]], ids=str)
def test_folders_of_peft_merge(targets: list[str], tmp_path: Path) -> None:
    model = small_models.gpt2() if "c_attn" in targets else small_models.llama()
    base = saved(model, tmp_path / "base")
    config = theirs.LoraConfig(r=4, target_modules=targets, fan_in_fan_out="c_attn" in targets)
    saved_by_peft(lambda: model, config, tmp_path / "a")
    surgery.merge_files(tmp_path / "a", base, tmp_path / "out")
    loaded = hf.AutoModel.from_pretrained(tmp_path / "out").eval()
    close(output(loaded), output(model))
    surgery.unmerge_files(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(base)


def test_several_adapters_are_merged_at_once(tmp_path: Path) -> None:
    model = llama()
    base = saved(model, tmp_path / "base")
    for name, spec in (
        ("a", "match q_proj | v_proj apply lora(r=4)"),
        ("b", "match q_proj apply ia3()"),
    ):
        adapter(model, f"adapter {name} {{ {spec} }}", tmp_path / name, name)
    surgery.of(model).activate("a + 0.5*b")
    expected = logits(model)
    with_numbers = [tmp_path / "a", (tmp_path / "b", 0.5)]
    made = surgery.merge_files(with_numbers, base, tmp_path / "out", workers=1)
    assert "2 are copied" not in str(made)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-4)
    surgery.unmerge_files(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def test_a_weight_that_is_shared_no_more_is_said_by_the_config(tmp_path: Path) -> None:
    """A checkpoint that has both tensors of a tie, of which an adapter changes one."""
    model = tied()
    base = saved(model, tmp_path / "base", "1GB")
    both = {n: t.clone() for n, t in model.state_dict().items()}
    files.save_file(both, base / "model.safetensors", metadata={"format": "pt"})
    folder = adapter(model, "match lm_head apply lora(r=4) untie", tmp_path / "a")
    surgery.merge_files(folder, base, tmp_path / "out")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-4)
    assert not loaded.config.tie_word_embeddings
    surgery.unmerge_files(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def test_merged_tensors_may_have_another_dtype(tmp_path: Path) -> None:
    base = saved(llama().to(torch.bfloat16), tmp_path / "base")
    model = llama().to(torch.bfloat16)
    folder = adapter(model, "match q_proj apply lora(r=4, bias=true)", tmp_path / "a")
    surgery.merge_files(folder, base, tmp_path / "out", dtype=torch.float32)
    found = tensors(tmp_path / "out")
    wide = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
    assert wide == {n for n in found if ".q_proj." in n}
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in found.values())
    surgery.unmerge_files(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


@pytest.mark.parametrize("workers", [1, 3])
def test_rounding_at_random_is_the_same_each_time(workers: int, tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    base = saved(model, tmp_path / "base")
    folder = adapter(model, "match q_proj apply lora(r=4)", tmp_path / "a")
    surgery.of(model).inverse.merge(round="stochastic", seed=5)
    surgery.merge_files(folder, base, tmp_path / "out", round="stochastic", seed=5, workers=workers)
    own = model.state_dict()
    assert all(torch.equal(t, own[n]) for n, t in tensors(tmp_path / "out").items())


@pytest.mark.parametrize("inner", [True, False])
def test_what_differs_by_a_prefix_finds_its_place(inner: bool, tmp_path: Path) -> None:
    """An adapter of the inner model on the whole checkpoint, and the other way round."""
    whole = llama()
    decoder = cast(nn.Module, whole.model)
    base = saved(whole if inner else decoder, tmp_path / "base")
    model = decoder if inner else whole
    folder = adapter(model, "match q_proj apply lora(r=4)", tmp_path / "a")
    surgery.of(model).inverse.merge()
    surgery.merge_files(folder, base, tmp_path / "out")
    own = (whole if inner else decoder).state_dict()
    assert all(torch.equal(t, own[n]) for n, t in tensors(tmp_path / "out").items())


# ------------------------------------------------------------------------------------- refused


@pytest.fixture
def ready(tmp_path: Path) -> tuple[Path, Path]:
    """An adapter, and the checkpoint that it was made on."""
    model = llama().to(torch.float16)
    base = saved(model, tmp_path / "base")
    return adapter(model, "match q_proj | v_proj apply lora(r=4)", tmp_path / "a"), base


def test_what_is_refused_leaves_nothing(ready: tuple[Path, Path], tmp_path: Path) -> None:
    folder, base = ready
    out = tmp_path / "out"
    merge = surgery.merge_files
    other = renamed(folder, "kk_proj")
    assert "k_proj" in refused(tmp_path, "E545", lambda: merge(other, base, out))
    refused(tmp_path, "E431", lambda: merge(folder, base, out, max_rel_err=1e-9))
    refused(tmp_path, "E430", lambda: merge([(folder, 1e9)], base, out))
    refused(tmp_path, "E534", lambda: merge(folder, base, base / "out"))
    refused(tmp_path, "E534", lambda: merge(folder, base, base))
    refused(tmp_path, "E530", lambda: merge(folder, tmp_path / "none", out))
    refused(tmp_path, "E552", lambda: merge([], base, out))
    refused(tmp_path, "E552", lambda: merge([folder, folder], base, out))
    refused(tmp_path, "E552", lambda: merge(folder, base, out, dtype=torch.int8))
    refused(tmp_path, "E517", lambda: merge(tmp_path / "none", base, out))
    assert merge([(folder, 1e9)], base, out, allow_nonfinite=True).out == out
    refused(tmp_path, "E520", lambda: merge(folder, base, out))
    refused(tmp_path, "E551", lambda: merge(folder, out, tmp_path / "twice"))


def renamed(folder: Path, name: str) -> Path:
    """The same adapter with sites that are called otherwise."""
    other = folder.with_name(f"other_{name}")
    if not other.exists():
        other.mkdir()
        for path in folder.iterdir():
            text = path.read_bytes()
            (other / path.name).write_bytes(text.replace(b"q_proj", name.encode()))
    return other


def test_another_base_is_told_by_its_digests(ready: tuple[Path, Path], tmp_path: Path) -> None:
    folder, base = ready
    weights = base / "model-00001-of-00002.safetensors"
    found = files.load_file(weights)
    changed = next(n for n in sorted(found) if n.endswith(("q_proj.weight", "v_proj.weight")))
    found[changed] += 1
    files.save_file(found, weights, metadata={"format": "pt"})
    out = tmp_path / "out"
    refused(tmp_path, "E522", lambda: surgery.merge_files(folder, base, out))
    surgery.merge_files(folder, base, out, force=True)


def test_the_way_back_is_guarded(ready: tuple[Path, Path], tmp_path: Path) -> None:
    folder, base = ready
    out, back = tmp_path / "out", tmp_path / "back"
    surgery.merge_files(folder, base, out)
    record = json.loads((out / RECORD).read_text())
    shard = next(iter(record["shards"]))
    undo = surgery.unmerge_files
    whole = (out / RECORD).read_text()
    for row in record["shards"][shard]["changed"]:
        row["matrices"][0]["base"] = "0" * 64
    (out / RECORD).write_text(json.dumps({**record, "machine": {"cpu": "another"}}))
    assert "another" in refused(tmp_path, "E549", lambda: undo(out, back))
    (out / RECORD).write_text('{"version": 1}')
    refused(tmp_path, "E538", lambda: undo(out, back))
    (out / RECORD).write_text(whole)
    side = out / "inverse" / shard
    kept = side.read_bytes()
    side.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    refused(tmp_path, "E549", lambda: undo(out, back))
    side.write_bytes(kept)
    data = (out / shard).read_bytes()
    name = record["shards"][shard]["changed"][0]["tensor"]
    entry = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])[name]
    at = 8 + int.from_bytes(data[:8], "little") + entry["data_offsets"][0]
    (out / shard).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    refused(tmp_path, "E548", lambda: undo(out, back))
    (out / shard).write_bytes(data)
    (out / "notes.txt").write_text("mine")
    assert undo(out).out == out
    assert contents(out) == {**contents(base), "notes.txt": b"mine"}
    refused(tmp_path, "E550", lambda: undo(out))


def test_nothing_is_kept_where_it_is_not_wanted(ready: tuple[Path, Path], tmp_path: Path) -> None:
    folder, base = ready
    surgery.merge_files(folder, base, tmp_path / "out", undo="none")
    assert contents(tmp_path / "out").keys() == contents(base).keys()


def test_a_plan_writes_nothing(ready: tuple[Path, Path], tmp_path: Path) -> None:
    folder, base = ready
    before = contents(tmp_path)
    plan = surgery.plan_files(folder, base)
    assert contents(tmp_path) == before
    assert {c.tensor for c in plan.changes} == {
        n for n in tensors(base) if "q_proj.w" in n or "v_proj.w" in n
    }
    assert all(change.by_rows for change in plan.changes)
    assert "4 tensors change" in str(plan)
    assert json.loads(json.dumps(plan.as_json()))["copied"] == plan.copied


# --------------------------------------------------------------------------------- interrupted


def child(run: Callable[[], object]) -> int:
    """A process of its own that does something and ends; its exit status when it has."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            run()
            status = 0
        finally:
            os._exit(status)
    return pid


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_run_is_gone_on_with(ready: tuple[Path, Path], tmp_path: Path) -> None:
    folder, base = ready
    out, whole = tmp_path / "out", tmp_path / "whole"
    surgery.merge_files(folder, base, whole)
    before, count = contents(base), len(tensors(base))
    for kill_at in (1, count - 1, 2):
        seen: list[str] = []

        def tell(
            name: str, done: int, total: int, seen: list[str] = seen, kill_at: int = kill_at
        ) -> None:
            seen.append(name)
            if len(seen) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        pid = child(lambda t=tell: surgery.merge_files(folder, base, out, workers=1, progress=t))
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        assert not out.exists()
        with pytest.raises(SurgeryError):
            surgery.unmerge_files(out)
    assert "goes on after" in surgery.merge_files(folder, base, out).note
    assert contents(out) == contents(whole)
    assert contents(base) == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_ranks_write_what_one_process_does(ready: tuple[Path, Path], tmp_path: Path) -> None:
    folder, base = ready
    surgery.merge_files(folder, base, tmp_path / "one")
    found = socket.create_server(("127.0.0.1", 0))
    port = str(found.getsockname()[1])
    found.close()

    def rank(number: int, **more: Any) -> int:
        own = {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_PORT": port}

        def run() -> None:
            os.environ.update(own, MASTER_ADDR="127.0.0.1")
            surgery.merge_files(folder, base, tmp_path / "two", **more)

        return child(run)

    pids = [rank(0), rank(1)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
