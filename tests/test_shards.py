"""Shards are written as they were, and a folder is there whole or not at all, whatever happens."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoint_files import contents, every_dtype, same, sharded

from surgery import disk
from surgery.checkpoint import WHOLE, open_checkpoint
from surgery.errors import ArtifactError, refuse
from surgery.shards import ASIDE, Output, ShardWriter

# A library whose types are not complete.
files: Any = safetensors.torch


@contextmanager
def refused(code: str, words: str | None = None) -> Generator[None]:
    with pytest.raises(ArtifactError, match=words) as raised:
        yield
    assert [d.code for d in raised.value.diagnostics] == [code]
    assert all(d.hint for d in raised.value.diagnostics)


# ------------------------------------------------------------------------------------- one file


@pytest.fixture
def source(tmp_path: Path) -> Path:
    files.save_file(every_dtype(), tmp_path / WHOLE, {"format": "pt"})
    return tmp_path / WHOLE


def copied(source: Path, target: Path) -> None:
    checkpoint = open_checkpoint(source)
    with ShardWriter(target, checkpoint.shards[source.name].header) as writer:
        for entry in checkpoint.tensors.values():
            writer.copy(entry)
        writer.finish()


def test_a_copy_is_the_same_file(source: Path) -> None:
    copied(source, source.with_name("b"))
    assert source.with_name("b").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, None])
def test_a_copy_is_the_same_without_the_kernel(
    number: int | None, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> int:
        if number is None:
            return 0
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", failing)
    monkeypatch.setattr(os, "posix_fallocate", failing)
    monkeypatch.setattr(disk, "BLOCK", 13)
    copied(source, source.with_name("b"))
    assert source.with_name("b").read_bytes() == source.read_bytes()


def test_short_reads_and_writes_are_gone_on_with(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read, move = os.pwrite, os.preadv, os.copy_file_range
    monkeypatch.setattr(os, "pwrite", lambda f, m, at: write(f, m[:3], at))  # pyright: ignore
    monkeypatch.setattr(os, "preadv", lambda f, m, at: read(f, [m[0][:3]], at))  # pyright: ignore
    monkeypatch.setattr(
        os,
        "copy_file_range",
        lambda a, b, n, x, y: move(a, b, min(n, 5), x, y),  # pyright: ignore
    )
    copied(source, source.with_name("b"))
    assert source.with_name("b").read_bytes() == source.read_bytes()
    found = open_checkpoint(source)
    assert all(same(found.read(n), t) for n, t in every_dtype().items())


def test_rows_stand_in_their_places_in_any_order(source: Path) -> None:
    tensors = every_dtype()
    header = open_checkpoint(source).shards[WHOLE].header
    with ShardWriter(source.with_name("b"), header) as writer, ThreadPoolExecutor(3) as pool:
        work: list[tuple[str, int]] = [
            (n, r) for n, t in tensors.items() for r in range(t.shape[0] if t.ndim else 1)
        ]
        random.Random(0).shuffle(work)

        def write(one: tuple[str, int]) -> None:
            name, at = one
            writer.write_rows(name, at, row(tensors[name], at))

        assert len([*pool.map(write, work)]) == len(work)
        writer.finish()
    assert source.with_name("b").read_bytes() == source.read_bytes()


def row(tensor: torch.Tensor, at: int) -> torch.Tensor:
    return tensor[at : at + 1] if tensor.ndim else tensor


def test_what_does_not_fit_is_an_error(source: Path) -> None:
    checkpoint = open_checkpoint(source)
    entries = checkpoint.tensors
    with ShardWriter(source.with_name("b"), checkpoint.shards[WHOLE].header) as writer:
        for bad in (torch.ones(3, 9), torch.ones(3, 10, dtype=torch.int32), torch.ones(4, 10)):
            with pytest.raises(ValueError, match="F32"):
                writer.write_rows("F32", 0, bad)
        with pytest.raises(ValueError, match="F32"):
            writer.write_rows("F32", 3, torch.ones(1, 10))
        with pytest.raises(ValueError, match="F32"):
            writer.copy(entries["vector"], "F32")
        writer.copy(entries["I32"], "F32")
        with pytest.raises(ValueError, match="not written once"):
            writer.finish()


# ------------------------------------------------------------------------------------ a folder

INPUTS: dict[str, object] = {"base": [1, 2], "options": {"round": "nearest"}}


def small(out: Output, name: str) -> None:
    header = b"\x38\x00\x00\x00\x00\x00\x00\x00" + (
        b'{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'.ljust(56)
    )
    with out.shard(name, header) as writer:
        writer.write_rows("w", 0, torch.ones(3))
        writer.facts["sites"] = [name]


def test_a_folder_is_there_when_it_is_finished(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with Output(tmp_path / "deep" / "out", INPUTS) as out:
        small(out, WHOLE)
        out.copy_file(tmp_path / "config.json", "sub/config.json")
        out.write("a.json", b"[]", {"x": 1})
        small(out, f"{ASIDE}piece")
        assert out.place(f"{ASIDE}piece").is_file()
        assert out.facts(WHOLE) == {"sites": [WHOLE]}
        assert out.facts("a.json") == {"x": 1}
        assert out.facts("b.json") == {}
        assert not (tmp_path / "deep" / "out").exists()
        out.finish()
    assert contents(tmp_path / "deep").keys() == {
        "out/a.json",
        f"out/{WHOLE}",
        "out/sub/config.json",
    }
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def interrupted(place: Path, inputs: dict[str, object], work: Callable[[Output], None]) -> None:
    def run() -> None:
        with Output(place, inputs) as out:
            work(out)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()


def test_a_later_run_goes_on_after_what_is_finished(tmp_path: Path) -> None:
    def work(out: Output) -> None:
        small(out, "a")
        small(out, f"{ASIDE}b")
        out.place("half").write_bytes(b"half")

    interrupted(tmp_path / "out", INPUTS, work)
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    with Output(tmp_path / "out", INPUTS) as out:
        assert out.note == "goes on after 2 finished files of an earlier run"
        assert out.done("a")
        assert out.done(f"{ASIDE}b")
        assert out.facts("a") == {"sites": ["a"]}
        assert not out.done("half")
        assert not out.place("half").exists()
        out.finish()
    assert contents(tmp_path).keys() == {"out/a"}


def test_other_inputs_start_anew(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", INPUTS, lambda out: small(out, "a"))
    with Output(tmp_path / "out", {**INPUTS, "options": {}}) as out:
        assert out.note == "starts anew: an earlier run had other options"
        assert not out.done("a")
        assert not out.place("a").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["gone", "cut", "record"])
def test_a_finished_file_that_is_not_as_it_was_is_made_again(change: str, tmp_path: Path) -> None:
    interrupted(tmp_path / "out", INPUTS, lambda out: small(out, "a"))
    place = tmp_path / ".out.partial"
    if change == "gone":
        (place / "files" / "a").unlink()
    elif change == "cut":
        (place / "files" / "a").write_bytes(b"1")
    else:
        next((place / "done").iterdir()).write_bytes(b"{")
    with Output(tmp_path / "out", INPUTS) as out:
        assert out.note == ""
        assert not out.done("a")
        assert not out.place("a").exists()


def test_the_record_of_a_run_that_was_ended_last_is_swept(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", INPUTS, lambda out: small(out, "a"))
    (tmp_path / ".out.partial" / "files").rename(tmp_path / "out")
    with refused("E520"):
        Output(tmp_path / "out", INPUTS)
    assert contents(tmp_path).keys() == {"out/a"}


def test_what_is_refused_leaves_nothing(tmp_path: Path) -> None:
    with refused("E531"), Output(tmp_path / "out", INPUTS) as out:
        small(out, "a")
        refuse("E531", "damaged", hint="copy it again")
    assert list(tmp_path.iterdir()) == []
    interrupted(tmp_path / "out", INPUTS, lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_an_output_is_new_and_not_in_the_input(tmp_path: Path) -> None:
    base = tmp_path / "base"
    sharded(tmp_path, 1)
    base.mkdir()
    (base / "file").write_text("x")
    (tmp_path / "link").symlink_to(base)
    for place in (base, base / "out", tmp_path / "link" / "out", base / "x" / ".."):
        with refused("E534"):
            Output(place, INPUTS, [tmp_path / "base"])
    with refused("E520", "not empty"):
        Output(base, INPUTS)
    with refused("E520", "is a file"):
        Output(base / "file", INPUTS, [base / "file" / "x"])
    for wrong in ("/etc/x", "../x", ""):
        with pytest.raises(ValueError, match="no file below"):
            Output(tmp_path / "new", INPUTS, joins=True).place(wrong)
    (tmp_path / "empty").mkdir()
    with Output(tmp_path / "empty", INPUTS, [base, base / "file"]) as out:
        small(out, "a")
        out.finish()
    assert contents(base) == {"file": b"x"}
    assert contents(tmp_path / "empty").keys() == {"a"}


def test_two_runs_do_not_meet(tmp_path: Path) -> None:
    with Output(tmp_path / "out", INPUTS) as out:
        with refused("E536"):
            Output(tmp_path / "out", INPUTS)
        with Output(tmp_path / "out", INPUTS, joins=True) as other:
            small(other, "b")
        small(out, "a")
        assert out.done("b")
        out.finish()
    assert contents(tmp_path).keys() == {"out/a", "out/b"}


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with refused("E535", "File exists"):
        Output(tmp_path / "file" / "out", INPUTS)
    with refused("E535", "too long"):
        Output(tmp_path / ("x" * 250), INPUTS)
    assert contents(tmp_path) == {"file": b"x"}


def test_a_folder_that_appears_meanwhile_is_not_touched(tmp_path: Path) -> None:
    with refused("E535", "kept in"), Output(tmp_path / "out", INPUTS) as out:
        small(out, "a")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("x")
        out.finish()
    assert contents(tmp_path / "out") == {"mine": b"x"}
    assert (tmp_path / ".out.partial").is_dir()


# ----------------------------------------------------------------------------------- disasters

COPY = textwrap.dedent("""
    import sys
    from pathlib import Path
    from surgery.checkpoint import open_checkpoint
    from surgery.shards import Output

    def copy(base, place, pause=0.0):
        import time
        with open_checkpoint(base) as base, Output(place, base.fingerprint(), [base.folder]) as out:
            for name, shard in base.shards.items():
                if out.done(name):
                    continue
                with out.shard(name, shard.header) as writer:
                    for entry in shard.entries.values():
                        time.sleep(pause)
                        if entry.shape[1:]:
                            for at in range(entry.rows):
                                rows = base.read(entry.name, at, at + 1)
                                writer.write_rows(entry.name, at, rows)
                        else:
                            writer.copy(entry)
            out.copy_file(base.folder / base.index, base.index)
            out.finish()
            return out.note
    """)


def copy(base: Path, place: Path) -> str:
    names: dict[str, Any] = {}
    exec(COPY, names)
    return names["copy"](base, place)


KILL = textwrap.dedent("""
    import os, random, signal, time

    base, place = map(Path, sys.argv[1:])
    drawn = random.Random(3)
    for _ in range(8):
        child = os.fork()
        if not child:
            try:
                copy(base, place, 0.02)
            finally:
                os._exit(0)
        time.sleep(drawn.uniform(0.02, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(len(list(place.iterdir())) if place.exists() else -1)
    """)


def test_killed_at_any_moment_it_is_whole_or_gone_on_with(tmp_path: Path) -> None:
    base, place = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    sharded(base, 29)
    before = contents(base)
    command = [sys.executable, "-c", COPY + KILL, str(base), str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = [*map(int, done.stdout.split())]
    assert {*counts} <= {-1, len(before)}
    assert counts[0] == -1
    if counts[-1] == -1:
        copy(base, place)
    assert contents(place) == contents(base) == before
    with refused("E520"):
        copy(base, place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path) -> None:
    base, disk_ = tmp_path / "base", tmp_path / "disk"
    base.mkdir()
    disk_.mkdir()
    sharded(base, 3)
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk_)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only who may mount has a disk to fill")
    try:
        (disk_ / "ballast").write_bytes(bytes(16 * 1024))
        with refused("E535", r"(?s)No space left.*make room.*kept in"):
            copy(base, disk_ / "out")
        assert not (disk_ / "out").exists()
        (disk_ / "ballast").unlink()
        assert copy(base, disk_ / "out").startswith("goes on after")
        assert contents(disk_) == {f"out/{n}": data for n, data in contents(base).items()}
    finally:
        subprocess.run(["umount", str(disk_)], check=True)


def test_a_limit_of_the_process_is_said(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    files.save_file({"w": torch.ones(50_000)}, base / WHOLE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with refused("E535", "ulimit"):
            copy(base, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_an_input_is_never_written(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    sharded(base, 2)
    for path in base.iterdir():
        path.chmod(0o444)
    before = {p: p.stat().st_mtime_ns for p in base.iterdir()}
    copy(base, tmp_path / "out")
    assert {p: p.stat().st_mtime_ns for p in base.iterdir()} == before
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
