"""An adapter merged into a checkpoint on disk: ours, a bare loop over the same bytes, and peft.

    python -m benchmarks.merge_files --gigabytes 4

Each runs in a process of its own, which reports its time and how far its memory rose over what it
had when all was imported. The checkpoint is a Llama of bfloat16 in eight files, and the adapter has
rank 16 on the projections of its attention.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor

files: Any = safetensors.torch
untyped: Any = torch

WIDTH, INNER, WORDS, RANK = 2048, 5632, 16000, 16
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
SHARDS = 8


def drawn(shape: tuple[int, ...], scale: float) -> Tensor:
    return (untyped.randn(shape) * scale).to(torch.bfloat16)


def write_base(folder: Path, gigabytes: float) -> int:
    """A checkpoint of about so many bytes; gives the number of its layers."""
    layer = 2 * sum(rows * columns for rows, columns in SHAPES.values())
    layers = max(SHARDS, round((gigabytes * 1e9 - 4 * WORDS * WIDTH) / layer))
    shards: list[list[int]] = [[] for _ in range(SHARDS)]
    for number in range(layers):
        shards[number * SHARDS // layers].append(number)
    places: dict[str, str] = {}
    for index, numbers in enumerate(shards):
        tensors = {
            f"model.layers.{number}.{name}.weight": drawn(shape, 0.02)
            for number in numbers
            for name, shape in SHAPES.items()
        }
        for number in numbers:
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{number}.{norm}.weight"] = drawn((WIDTH,), 1.0)
        if index == 0:
            tensors["model.embed_tokens.weight"] = drawn((WORDS, WIDTH), 0.02)
        if index == SHARDS - 1:
            tensors["lm_head.weight"] = drawn((WORDS, WIDTH), 0.02)
            tensors["model.norm.weight"] = drawn((WIDTH,), 1.0)
        name = f"model-{index + 1:05}-of-{SHARDS:05}.safetensors"
        files.save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": WORDS,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return layers


def write_adapter(folder: Path, layers: int) -> None:
    """An adapter of peft's that changes weights by about a hundredth of themselves."""
    tensors: dict[str, Tensor] = {}
    for number in range(layers):
        for target in TARGETS:
            at = f"base_model.model.model.layers.{number}.self_attn.{target}"
            tensors[f"{at}.lora_A.weight"] = untyped.randn(RANK, WIDTH) * 0.02
            tensors[f"{at}.lora_B.weight"] = untyped.randn(WIDTH, RANK) * 0.0025
    files.save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": [*TARGETS],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


# ------------------------------------------------------------------------------------- the jobs


def ours(folder: Path, out: Path) -> Callable[[], object]:
    from surgery.file_merge import merge_files

    return lambda: merge_files(folder / "adapter", folder / "base", out)


def without_undo(folder: Path, out: Path) -> Callable[[], object]:
    from surgery.file_merge import merge_files

    return lambda: merge_files(folder / "adapter", folder / "base", out, undo="none")


def bare(folder: Path, out: Path) -> Callable[[], object]:
    """The same bytes read and written, in pieces of 8 MB, and synced."""

    def run() -> None:
        out.mkdir()
        piece = bytearray(8 * 2**20)
        for path in sorted((folder / "base").iterdir()):
            with path.open("rb", buffering=0) as source, (out / path.name).open("wb", 0) as target:
                while count := source.readinto(piece):
                    target.write(memoryview(piece)[:count])
                os.fsync(target.fileno())

    return run


def with_peft(folder: Path, out: Path) -> Callable[[], object]:
    import peft
    import transformers

    hf: Any = transformers

    def run() -> None:
        model = hf.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        loaded = cast(Any, peft.PeftModel).from_pretrained(model, str(folder / "adapter"))
        loaded.merge_and_unload().save_pretrained(out, max_shard_size="500MB")

    return run


JOBS = {"ours": ours, "ours, no undo": without_undo, "bare loop": bare, "peft": with_peft}


def peak_kilobytes() -> int:
    """The most resident memory so far; `getrusage` would begin with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measured(job: str, folder: Path) -> dict[str, object]:
    """The time of one job, and how far its memory rose."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    run = JOBS[job](folder, out)
    idle = peak_kilobytes()
    begun = time.perf_counter()
    run()
    seconds = time.perf_counter() - begun
    peak = peak_kilobytes()
    written = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    shutil.rmtree(out)
    return {"job": job, "seconds": seconds, "peak_mb": (peak - idle) / 1024, "bytes": written}


def table(rows: list[Mapping[str, Any]]) -> str:
    lines = [f"{'job':16}{'seconds':>9}{'peak MB':>9}{'GB written':>12}"]
    for row in rows:
        written = row["bytes"] / 1e9
        lines.append(f"{row['job']:16}{row['seconds']:9.1f}{row['peak_mb']:9.0f}{written:12.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary one if absent")
    parser.add_argument("--jobs", nargs="*", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--job", choices=list(JOBS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job is not None:
        print(json.dumps(measured(given.job, given.folder)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as made:
        folder = Path(made)
        (folder / "base").mkdir()
        (folder / "adapter").mkdir()
        write_adapter(folder / "adapter", write_base(folder / "base", given.gigabytes))
        rows: list[Mapping[str, Any]] = []
        for job in given.jobs:
            own = ["--job", job, "--folder", str(folder)]
            call = [sys.executable, "-m", "benchmarks.merge_files", *own]
            done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(json.dumps(rows, indent=2) if given.json else table(rows))


if __name__ == "__main__":
    main()
