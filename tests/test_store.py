"""Files: what is written is read, what is damaged is refused, and nothing is ever half there."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.errors import ArtifactError
from surgery.store import (
    Writer,
    read_json,
    read_tensors,
    read_text,
    save_tensors,
    tensors_writer,
    text_writer,
    write_atomic,
    write_directory,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
names = st.text("abc.01_", min_size=1, max_size=8)


def sample() -> dict[str, Tensor]:
    return {"a.A": torch.arange(35.0).reshape(5, 7), "a.B": torch.ones(3, 2)}


@given(st.dictionaries(names, st.tuples(shapes, st.sampled_from(DTYPES)), max_size=5))
@settings(max_examples=40, deadline=None)
def test_what_is_saved_is_read(described: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    tensors = {
        n: torch.ones(shape).cumsum(0).to(d) if shape else torch.ones(()).to(d)
        for n, (shape, d) in described.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.safetensors"
        save_tensors(path, tensors, {"note": "x"})
        file = read_tensors(path)
        assert dict(file.shapes) == {n: tuple(t.shape) for n, t in tensors.items()}
        assert file.metadata == {"format": "pt", "note": "x"}
        for name, tensor in tensors.items():
            assert torch.equal(file[name], tensor)
            assert file[name].dtype == tensor.dtype


def test_views_of_one_memory_and_transposes_are_saved(tmp_path: Path) -> None:
    base = torch.arange(15.0).reshape(3, 5)
    save_tensors(tmp_path / "t", {"a": base, "b": base, "c": base.t(), "d": base[1]})
    file = read_tensors(tmp_path / "t")
    assert torch.equal(file["b"], base)
    assert torch.equal(file["c"], base.t())
    assert torch.equal(file["d"], base[1])
    with pytest.raises(KeyError):
        file["e"]


def test_a_read_tensor_outlives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "t"
    save_tensors(path, sample())
    tensor = read_tensors(path)["a.A"]
    path.write_bytes(b"")
    assert torch.equal(tensor, sample()["a.A"])


def test_a_tensor_without_data_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"E513.*`a` has no data yet"):
        tensors_writer({"a": torch.empty(2, device="meta")}, {})


# ------------------------------------------------------------------------------------ damage


def whole() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(Path(folder) / "t", sample())
        return (Path(folder) / "t").read_bytes()


WHOLE = whole()


@given(st.integers(0, len(WHOLE) - 1))
@settings(max_examples=60, deadline=None)
def test_a_truncated_file_is_refused(length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t"
        path.write_bytes(WHOLE[:length])
        with pytest.raises(ArtifactError, match="E512"):
            read_tensors(path)


@given(st.integers(0, 120), st.integers(0, 255))
@settings(max_examples=120, deadline=None)
def test_a_damaged_header_is_refused_or_means_something(at: int, byte: int) -> None:
    data = bytearray(WHOLE)
    data[at] = byte
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t"
        path.write_bytes(bytes(data))
        try:
            file = read_tensors(path)
        except ArtifactError:
            return
        assert {tuple(t.shape) for t in file.values()} == set(file.shapes.values())


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t"
        path.write_bytes(data)
        for read in (read_tensors, read_json):
            try:
                read(path)
            except ArtifactError:
                continue


def header(description: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(description).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}, b"1234"),
        header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}, b"1234"),
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        header({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678"),
        (2**62).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_header_that_lies_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(ArtifactError, match="E512"):
        read_tensors(tmp_path / "t")


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/tmp/surgery-was-here",)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    for name, data in (("p", pickle.dumps(Trap())), ("zip", b"PK\x03\x04rest")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ArtifactError, match="it is a pickle"):
            read_tensors(tmp_path / name)
    assert not Path("/tmp/surgery-was-here").exists()


def test_what_is_missing_is_said_to_be(tmp_path: Path) -> None:
    for read in (read_tensors, read_json, read_text):
        with pytest.raises(ArtifactError, match="E511"):
            read(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="E511"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", '{"a":' * 50_000])
def test_json_must_be_an_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "j").write_text(text)
    with pytest.raises(ArtifactError, match="E512"):
        read_json(tmp_path / "j")


def test_text_has_a_limit_and_is_utf8(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"abc\xff")
    with pytest.raises(ArtifactError, match="not UTF-8 at byte 3"):
        read_text(tmp_path / "t")
    with pytest.raises(ArtifactError, match="4 bytes, and 3 is the most"):
        read_text(tmp_path / "t", limit=3)


# ------------------------------------------------------------------------------------ writing


def contents(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}


def failing(path: Path) -> None:
    path.write_text("half")
    raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_atomic(path, text_writer("old"))
    with pytest.raises(ArtifactError, match=r"E513.*No space left"):
        write_atomic(path, failing)
    assert contents(tmp_path) == {"t": "old"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    with pytest.raises(ArtifactError, match="E513"):
        write_directory(folder, {"a": text_writer("1"), "b": failing})
    assert list((tmp_path / "deep").iterdir()) == []
    written = write_directory(folder, {"a": text_writer("1"), "b": text_writer("2")})
    assert written == (folder / "a", folder / "b")
    assert contents(folder) == {"a": "1", "b": "2"}
    assert list((tmp_path / "deep").iterdir()) == [folder]


def test_stale_files_of_the_set_go_and_others_stay(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write_directory(folder, {"a": text_writer("1"), "b": text_writer("2")})
    (folder / "mine").write_text("kept")
    write_directory(folder, {"a": text_writer("3"), "c": text_writer("4")}, owned=("a", "b", "c"))
    assert contents(folder) == {"a": "3", "c": "4", "mine": "kept"}


@pytest.mark.parametrize("fails_at", range(6))
def test_whatever_fails_the_folder_is_as_it_was(
    fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    before = {"a": "1", "b": "2", "mine": "kept"}
    write_directory(folder, {n: text_writer(t) for n, t in before.items()})
    calls = iter(range(100))
    replace = os.replace

    def fragile(source: Path, target: Path) -> None:
        if next(calls) == fails_at:
            raise OSError(5, "Input/output error")
        replace(source, target)

    files: dict[str, Writer] = {n: text_writer(n) for n in ("a", "c", "d")}
    monkeypatch.setattr(os, "replace", fragile)
    if fails_at < 5:
        with pytest.raises(ArtifactError, match="Input/output error"):
            write_directory(folder, files, owned=("a", "b", "c", "d"))
        assert contents(folder) == before
    else:
        write_directory(folder, files, owned=("a", "b", "c", "d"))
        assert contents(folder) == {"a": "a", "c": "c", "d": "d", "mine": "kept"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_interruption_is_not_swallowed(tmp_path: Path) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "out"
    write_directory(folder, {"a": text_writer("1")})
    with pytest.raises(KeyboardInterrupt):
        write_directory(folder, {"a": interrupted})
    assert contents(folder) == {"a": "1"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_where_the_folder_should_be_stays(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ArtifactError, match="E513"):
        write_directory(tmp_path / "out", {"a": text_writer("1")})
    assert contents(tmp_path) == {"out": "a file"}
