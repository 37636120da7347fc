"""Merges of files that are killed at random moments, or whose disk fills: `--kills 20`.

    python -m benchmarks.crashes --kills 20

After each end the inputs are what they were, and OUT is not there, or is complete. What is begun
again goes on after the files that were finished, and in the end is, byte for byte, what a run gives
that nothing disturbed. A disk of its own size is a tmpfs, mounted where that is permitted.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import file_digest
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

files: Any = safetensors.torch
untyped: Any = torch

WIDTH, INNER, WORDS, LAYERS, SHARDS, RANK = 1024, 4096, 4000, 12, 6, 16
SHAPES = {
    **dict.fromkeys([f"self_attn.{x}_proj" for x in "qkvo"], (WIDTH, WIDTH)),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
MERGE = "import sys; from surgery.cli import main; sys.argv[0] = 'surgery'; main()"
FULL = (0.3, 0.6, 0.9)
"""Parts of the room that a merge takes, which a disk has at first."""


def write_inputs(folder: Path) -> None:
    """A Llama of bfloat16 in several files, and an adapter of peft's on its attention."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    lora: dict[str, Any] = {}
    config: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
    places: dict[str, str] = {}
    for shard in range(SHARDS):
        own: dict[str, Any] = {}
        for layer in range(shard * LAYERS // SHARDS, (shard + 1) * LAYERS // SHARDS):
            for name, shape in SHAPES.items():
                weight = (untyped.randn(shape) * 0.02).to(torch.bfloat16)
                own[f"model.layers.{layer}.{name}.weight"] = weight
            for target in "qv":
                at = f"base_model.model.model.layers.{layer}.self_attn.{target}_proj"
                lora[f"{at}.lora_A.weight"] = untyped.randn(RANK, WIDTH) * 0.02
                lora[f"{at}.lora_B.weight"] = untyped.randn(WIDTH, RANK) * 0.0025
        if shard == 0:
            own["model.embed_tokens.weight"] = untyped.randn(WORDS, WIDTH).to(torch.bfloat16)
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        files.save_file(own, base / name, metadata={"format": "pt"})
        places |= dict.fromkeys(own, name)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    files.save_file(lora, adapter / "adapter_model.safetensors")
    config["target_modules"] = ["q_proj", "v_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def sums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder."""
    found: dict[str, str] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            name = path.relative_to(folder).as_posix()
            found[name] = file_digest(file, "sha256").hexdigest()
    return found


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


@dataclass
class Merges:
    """Merges of one adapter into one checkpoint, each in a process of its own.

    whole: what a merge gives that nothing disturbs, and `seconds` how long it writes.
    """

    folder: Path
    whole: dict[str, str] = field(default_factory=dict[str, str])
    seconds: float = 0.0
    before: dict[str, str] = field(default_factory=dict[str, str])

    def start(self, out: Path) -> subprocess.Popen[str]:
        own = [str(self.folder / "adapter"), str(self.folder / "base"), "-o", str(out)]
        call = [sys.executable, "-c", MERGE, "merge", *own]
        piped = subprocess.PIPE
        return subprocess.Popen(call, stdout=piped, stderr=subprocess.STDOUT, text=True)

    def run(self, out: Path) -> tuple[int, str]:
        running = self.start(out)
        said, _ = running.communicate()
        return running.returncode, said

    def undisturbed(self, out: Path) -> None:
        self.before = {**sums(self.folder / "base"), **sums(self.folder / "adapter")}
        running = self.start(out)
        began = written(running, out)
        said, _ = running.communicate()
        assert running.returncode == 0, said
        self.seconds, self.whole = time.monotonic() - began, sums(out)
        self.check(out, "undisturbed")

    def check(self, out: Path, when: str) -> bool:
        """Whether there is an OUT, which then is complete; inputs are what they were."""
        now = {**sums(self.folder / "base"), **sums(self.folder / "adapter")}
        assert now == self.before, f"{when}: the inputs changed"
        assert not out.exists() or sums(out) == self.whole, f"{when}: {out} is not complete"
        return out.exists()


def state(out: Path) -> list[tuple[str, int, int]]:
    """The files of what is being made, with sizes and times."""
    found: list[tuple[str, int, int]] = []
    for path in (out.parent / f".{out.name}.partial").rglob("*"):
        try:
            stat = path.stat()
        except OSError:  # gone meanwhile
            continue
        found.append((str(path), stat.st_size, stat.st_mtime_ns))
    return sorted(found)


def written(running: subprocess.Popen[str], out: Path) -> float:
    """When a process began to write; 0 if it ended before."""
    before = state(out)
    while running.poll() is None:
        if state(out) != before:
            return time.monotonic()
        time.sleep(0.002)
    return 0.0


def killed(merges: Merges, out: Path, count: int, drawn: random.Random) -> str:
    """Kill so many runs; what is there is gone on with, and begun anew once it is complete."""
    kills = ended = there = 0
    while kills < count:
        running = merges.start(out)
        written(running, out)
        time.sleep(drawn.uniform(0, merges.seconds / 2))
        running.kill()
        running.communicate()
        if running.returncode == 0:
            ended += 1
        else:
            kills += 1
            there += out.exists()
        if merges.check(out, f"kill {kills}"):
            shutil.rmtree(out)
    code, said = merges.run(out)
    assert code == 0, said
    assert merges.check(out, "the last run"), "the last run made nothing"
    left = [p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}")]
    assert not left, f"{left} are left"
    shutil.rmtree(out)
    return (
        f"{kills} runs killed after they began to write, {there} of them when OUT was there (and "
        f"{ended} ended before): each time the inputs are the same, and OUT complete or not there; "
        "the last run gives the same bytes"
    )


@contextmanager
def disk(at: Path, room: int) -> Generator[None]:
    """A tmpfs of so many bytes. Raises CalledProcessError where none can be mounted."""
    at.mkdir()
    call = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(at)]
    subprocess.run(call, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(at)], check=True)


def filled(merges: Merges, folder: Path, room: int) -> str:
    """Merge to a disk that is too small, and again when it is larger."""
    try:
        for part in FULL:
            at = folder / f"disk-{part}"
            with disk(at, int(part * room)):
                code, said = merges.run(at / "out")
                assert code == 1, said
                assert "E535" in said, said
                assert not merges.check(at / "out", f"a disk of {part}")
                larger = ["mount", "-o", f"remount,size={3 * room}", str(at)]
                subprocess.run(larger, check=True)
                code, said = merges.run(at / "out")
                assert code == 0, said
                assert merges.check(at / "out", f"a disk of {part}, made larger")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no disk of its own can be mounted here: {error}"
    return (
        f"{len(FULL)} disks filled, at {', '.join(f'{part:.0%}' for part in FULL)}: E535, no OUT, "
        "the same inputs; with more room the same bytes"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary one if absent")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as made:
        folder = Path(made)
        untyped.manual_seed(given.seed)
        write_inputs(folder)
        merges = Merges(folder)
        merges.undisturbed(folder / "whole")
        room = size(folder / "whole")
        print(f"{room / 1e6:.0f} MB, written in {merges.seconds:.1f} s")
        print(killed(merges, folder / "out", given.kills, random.Random(given.seed)), flush=True)
        print(filled(merges, folder, room))


if __name__ == "__main__":
    main()
