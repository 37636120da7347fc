"""Checkpoints are read as they are, by rows, and only where nothing about them is wrong."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoint_files import every_dtype, same, sharded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from surgery.checkpoint import INDEX, WHOLE, Checkpoint, open_checkpoint
from surgery.disk import memory_of
from surgery.errors import ArtifactError, Report
from surgery.headers import DTYPES, MAX_HEADER, make_header, parse_header, read_header

# A library whose types are not complete.
files: Any = safetensors.torch


def codes(path: Path) -> list[str]:
    with pytest.raises(ArtifactError) as raised:
        open_checkpoint(path)
    assert all(d.hint for d in raised.value.diagnostics)
    return [d.code for d in raised.value.diagnostics]


def raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def one(dtype: object = "F32", shape: object = (2,), at: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": at}


# ------------------------------------------------------------------------------------- reading


def test_every_dtype_is_read_as_it_is(tmp_path: Path) -> None:
    tensors = every_dtype()
    files.save_file(tensors, tmp_path / WHOLE, {"format": "pt"})
    with open_checkpoint(tmp_path) as found:
        assert found.tensors.keys() == tensors.keys()
        assert found.shards[WHOLE].metadata == {"format": "pt"}
        for name, tensor in tensors.items():
            assert same(found.read(name), tensor), name


Rows = tuple[Checkpoint, dict[str, Tensor]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder = tmp_path_factory.mktemp("rows")
    drawn = torch.randn(13, 5, generator=torch.Generator().manual_seed(0))
    tensors = {"w": drawn.bfloat16(), "b": drawn[:, 0].half(), "i": drawn[:, :2].char()}
    files.save_file({n: t.contiguous() for n, t in tensors.items()}, folder / WHOLE)
    return open_checkpoint(folder), tensors


@given(st.integers(0, 13), st.integers(0, 13), st.booleans())
def test_rows_are_those_of_the_whole(rows: Rows, a: int, b: int, reused: bool) -> None:
    found, tensors = rows
    start, stop = sorted((a, b))
    buffer = torch.full((13 * 5 * 2,), 7, dtype=torch.uint8) if reused else None
    for name, tensor in tensors.items():
        assert same(found.read(name, start, stop, buffer), tensor[start:stop])


def test_a_buffer_is_filled_in_place(tmp_path: Path) -> None:
    files.save_file({"w": torch.ones(3, 5)}, tmp_path / WHOLE)
    found = open_checkpoint(tmp_path / WHOLE)
    buffer = torch.zeros(64, dtype=torch.uint8)
    assert found.read("w", 1, 3, buffer).data_ptr() == buffer.data_ptr()
    for bad in (buffer[:39], buffer.int(), buffer[::2]):
        with pytest.raises(ValueError, match="no room"):
            found.read("w", 1, 3, bad)
    for rows in ((-1, 2), (2, 1), (0, 4)):
        with pytest.raises(ValueError, match="3 rows"):
            found.read("w", *rows)


def test_what_torch_does_not_have_can_be_copied_alone(tmp_path: Path) -> None:
    path = raw(
        tmp_path / WHOLE, {"x": one("X9", [3], [0, 5]), "y": one("F4", [3], [5, 7])}, b"abcdefg"
    )
    found = open_checkpoint(path)
    assert bytes(memory_of(found.read_bytes("x", 1, 5))) == b"bcde"
    for name in ("x", "y"):
        with pytest.raises(ArtifactError, match="E533"):
            found.read(name)
    with pytest.raises(ArtifactError, match="did you mean"):
        open_checkpoint(path).entry("xx")


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    files.save_file({"w": torch.ones(3, 5)}, tmp_path / WHOLE)
    found = open_checkpoint(tmp_path)
    found.check_unchanged()
    before = found.fingerprint()
    (tmp_path / WHOLE).write_bytes((tmp_path / WHOLE).read_bytes()[:-4])
    with pytest.raises(ArtifactError, match="E531"):
        found.read("w")
    with pytest.raises(ArtifactError, match="E537"):
        found.check_unchanged()
    assert before == json.loads(json.dumps(before))
    (tmp_path / WHOLE).unlink()
    with pytest.raises(ArtifactError, match="E537"):
        found.check_unchanged()


# ------------------------------------------------------------------------------------- folders


def test_shards_are_put_together(tmp_path: Path) -> None:
    tensors = sharded(tmp_path, 3)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    (tmp_path / "sub" / "more.txt").write_text("x")
    (tmp_path / "sub" / ".git" / "no").write_text("x")
    for path in (tmp_path, tmp_path / INDEX):
        found = open_checkpoint(path)
        assert (found.index, len(found.shards), found.folder) == (INDEX, 3, tmp_path)
        assert [p.as_posix() for p in found.others] == ["config.json", "sub/more.txt"]
        assert {n: same(found.read(n), t) for n, t in tensors.items()} == dict.fromkeys(
            tensors, True
        )
    assert {INDEX, "config.json", "sub/more.txt"} <= found.fingerprint().keys()


def test_a_file_by_itself_has_nothing_beside_it(tmp_path: Path) -> None:
    files.save_file({"w": torch.ones(3)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = open_checkpoint(tmp_path / "adapter_model.safetensors")
    assert (found.others, found.source) == ((), tmp_path / "adapter_model.safetensors")
    found = open_checkpoint(tmp_path)
    assert (len(found.others), found.source) == (1, tmp_path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    assert codes(tmp_path) == codes(tmp_path / "no") == ["E530"]
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ArtifactError, match="pickle"):
        open_checkpoint(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        files.save_file({"w": torch.ones(3)}, tmp_path / name)
    assert codes(tmp_path) == ["E530"]
    files.save_file({"w": torch.ones(3)}, tmp_path / WHOLE)
    open_checkpoint(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": {"w": "a.safetensors"}}')
    assert codes(tmp_path) == ["E530"]
    open_checkpoint(tmp_path / INDEX)


def test_an_index_that_disagrees_is_refused_with_all_that_is_wrong(tmp_path: Path) -> None:
    sharded(tmp_path, 3)
    index = json.loads((tmp_path / INDEX).read_text())
    places: dict[str, str] = index["weight_map"]
    first, second, third = sorted({*places.values()})
    moved = next(n for n, f in places.items() if f == first)
    places |= {moved: second, "new": first, "out": "../../etc/passwd", "gone": "gone.safetensors"}
    del places[next(n for n, f in places.items() if f == third)]
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert codes(tmp_path) == ["E532"] * 5
    (tmp_path / second).write_bytes((tmp_path / second).read_bytes()[:-1])
    (tmp_path / third).write_bytes(b"\x80\x02not a shard")
    assert sorted(codes(tmp_path)) == ["E531"] * 2 + ["E532"] * 3


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        files.save_file(
            {name: torch.ones(2), "both": torch.ones(3)}, tmp_path / f"{name}.safetensors"
        )
    places = {"a": "a.safetensors", "b": "b.safetensors", "both": "a.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    assert codes(tmp_path) == ["E532"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": []}'])
def test_an_index_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    assert codes(tmp_path) in (["E512"], ["E532"])


# ------------------------------------------------------------------------------------- headers

DAMAGED: dict[str, tuple[object, bytes]] = {
    "no JSON": (b"{]", b""),
    "no object": (b"[1]", b""),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "nested too deep": (b"[" * 100_000, b""),
    "a name twice": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', b""),
    "a field twice": (b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b""),
    "a surrogate": (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b""),
    "metadata": ({"__metadata__": {"a": 1}}, b""),
    "metadata that are a list": ({"__metadata__": []}, b""),
    "no tensor": ({"a": 3}, b""),
    "a field too many": ({"a": {**one(), "x": 1}}, bytes(8)),
    "no dtype": ({"a": one(4)}, bytes(8)),
    "no shape": ({"a": one("F32", 2)}, bytes(8)),
    "half a row": ({"a": one("F32", [0.5], [0, 2])}, bytes(2)),
    "true rows": ({"a": one("U8", [True], [0, 1])}, bytes(1)),
    "fewer than none": ({"a": one("F32", [-1, -2])}, bytes(8)),
    "endless": ({"a": one("F32", [2**80], [0, 2**82])}, b""),
    "one offset": ({"a": one(at=[8])}, bytes(8)),
    "backwards": ({"a": one(at=[8, 0])}, bytes(8)),
    "another size": ({"a": one(shape=[3])}, bytes(8)),
    "an overlap": ({"a": one(), "b": one(at=[4, 12])}, bytes(12)),
    "a hole": ({"a": one(), "b": one(at=[12, 20])}, bytes(20)),
    "a hole at first": ({"a": one(at=[4, 12])}, bytes(12)),
    "cut off": ({"a": one()}, bytes(7)),
    "more behind": ({"a": one()}, bytes(9)),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_header_is_refused(what: str, tmp_path: Path) -> None:
    header, data = DAMAGED[what]
    assert codes(raw(tmp_path / WHOLE, header, data)) == ["E531"]


def test_several_faults_of_a_file_are_said_at_once(tmp_path: Path) -> None:
    header = {"a": one(4), "b": one(at=[8]), "c": one(), "__metadata__": 3}
    assert codes(raw(tmp_path / WHOLE, header, bytes(8))) == ["E531"] * 3


@pytest.mark.parametrize(
    "data", [b"", b"1234567", struct.pack("<Q", MAX_HEADER + 1), bytes([9] * 9)]
)
def test_a_file_that_is_too_short_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / WHOLE).write_bytes(data)
    assert codes(tmp_path) == ["E531"]


def test_a_length_may_begin_as_a_pickle_does(tmp_path: Path) -> None:
    """A header of 128 bytes: its length has the first byte of every pickle."""
    header = make_header([("w", "F32", (2,))])
    text = header[8:].rstrip() + b" " * (128 - len(header[8:].rstrip()))
    whole = struct.pack("<Q", len(text)) + text + bytes(8)
    assert whole[0] == 0x80
    (tmp_path / WHOLE).write_bytes(whole)
    with open_checkpoint(tmp_path) as found:
        assert same(found.read("w"), torch.zeros(2))
    (tmp_path / WHOLE).write_bytes(pickle.dumps([1] * 30))
    with pytest.raises(ArtifactError, match="is a pickle"):
        open_checkpoint(tmp_path)


def test_a_whole_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    files.save_file({"w": torch.ones(3, 5), "b": torch.ones(2)}, tmp_path / WHOLE)
    whole = (tmp_path / WHOLE).read_bytes()
    for length in range(len(whole)):
        (tmp_path / WHOLE).write_bytes(whole[:length])
        assert codes(tmp_path) == ["E531"]


def test_a_file_that_goes_away_is_said(tmp_path: Path) -> None:
    report = Report()
    assert read_header(tmp_path / "no.safetensors", report) is None
    assert [d.code for d in report.found] == ["E531"]


def test_a_header_is_made_as_it_is_read(tmp_path: Path) -> None:
    tensors = every_dtype()
    listed = [(n, dtype_name(t), tuple(t.shape)) for n, t in tensors.items()]
    header = make_header(listed, {"format": "pt", "ü": "→"})
    assert len(header) % 8 == 0
    report = Report()
    found = parse_header(tmp_path / "x", header, None, report)
    assert found is not None
    assert report.found == []
    assert [(e.name, e.dtype, e.shape) for e in found.entries.values()] == listed
    assert found.metadata == {"format": "pt", "ü": "→"}
    (tmp_path / "x").write_bytes(header + bytes(found.size - len(header)))
    assert files.load_file(tmp_path / "x").keys() == tensors.keys()


def dtype_name(tensor: Tensor) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)


HEADER = make_header([("w", "F32", (3, 5)), ("b", "BF16", (7,)), ("n", "U8", (0, 2))], {"a": "b"})


@given(st.integers(8, len(HEADER) - 1), st.integers(0, 255), st.sampled_from(["set", "cut", "add"]))
def test_whatever_a_byte_of_a_header_becomes_tensors_lie_inside(
    at: int, byte: int, how: str
) -> None:
    end = at if how == "add" else at + 1
    text = HEADER[8:at] + (b"" if how == "cut" else bytes([byte])) + HEADER[end:]
    header = struct.pack("<Q", len(text)) + text
    size, report = len(header) + 74, Report()
    found = parse_header(Path("x"), header, size, report)
    assert (found is None) == report.failed
    if found is not None:
        places = [(e.start, e.stop) for e in found.entries.values()]
        assert [start for start, _ in places] == [len(header), *(stop for _, stop in places)][:-1]
        assert places[-1][1] == size
