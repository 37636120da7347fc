"""Headers of safetensors files: where in a file each tensor lies, of which dtype and shape.

A file is eight bytes (the header's length, little endian), the header as JSON, and the tensors'
bytes without holes: https://huggingface.co/docs/safetensors. Nothing of a header is believed
before it is checked against the file, and only the header is read.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import cast

import torch

from surgery.errors import Report

MAX_HEADER = 100_000_000
"""Bytes, as in the format's own reader."""

METADATA = "__metadata__"
_LENGTH = 8  # bytes that say how long the header is
_ALIGNED = 8  # bytes of which the header's length is a multiple

_BITS: Mapping[str, tuple[int, str]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F4": (4, ""),
    "F6_E2M3": (6, ""),
    "F6_E3M2": (6, ""),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F32": (32, "float32"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
}
"""Bits of an element, and what torch calls it, or "" where it has no such element by itself."""

DTYPES: Mapping[str, torch.dtype] = {
    name: found
    for name, (_, own) in _BITS.items()
    if isinstance(found := getattr(torch, own or "_", None), torch.dtype)
}
"""torch's dtypes by the format's names. What is not in it can be copied, and not read."""

NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: its bytes are those from `start` to `stop`, in offsets of the file.

    dtype: by the format's name. shape: in elements.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """How many there are."""
        return self.stop - self.start

    @property
    def rows(self) -> int:
        """Along the first axis; one, if there is none."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one of its rows."""
        return self.bytes // self.rows if self.rows else 0

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None where torch has no such elements."""
        return DTYPES.get(self.dtype)


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file by its header.

    header: its very bytes, with the eight that say its length. entries: in the order of the bytes.
    size: of the file, in bytes. modified: when, in nanoseconds.
    """

    path: Path
    header: bytes = field(repr=False)
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    size: int
    modified: int

    @property
    def sha256(self) -> str:
        """Of the header, in hexadecimals."""
        return sha256(self.header).hexdigest()


def make_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The first bytes of a file with some tensors: name, dtype by the format's name, and shape.

    They lie in the order given. Raises KeyError for a dtype that the format does not have.
    """
    stated: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        end = at + _bytes(dtype, shape)
        stated[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(stated, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return struct.pack("<Q", len(text)) + text


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return -(-prod(shape) * _BITS[dtype][0] // 8)


# ------------------------------------------------------------------------------------- reading


def read_header(path: Path, report: Report) -> Shard | None:
    """A file by its header, or None where that, or the file, is not what it should be.

    What is wrong is reported as E531, all of it.
    """
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            header = _header_bytes(path, file.read(_LENGTH), stat.st_size, report)
            if header is None:
                return None
            header += file.read(struct.unpack("<Q", header)[0])
    except OSError as error:
        report.error("E531", f"cannot read {path}: {error.strerror}", hint="check the path")
        return None
    return parse_header(path, header, stat.st_size, report, stat.st_mtime_ns)


_COPY = "copy it again; it may have been cut off on the way"


def _header_bytes(path: Path, start: bytes, size: int, report: Report) -> bytes | None:
    """The first eight bytes, if what they say can be."""
    # The length of a small header may begin as a pickle does, but no pickle says one that fits.
    told = int.from_bytes(start, "little") + _LENGTH
    if told > size and (start[:1] == b"\x80" or start[:4] == b"PK\x03\x04"):
        hint = "it is a pickle, which can run code when read; save it again as safetensors"
        report.error("E531", f"{path} is not a safetensors file", hint=hint)
        return None
    if len(start) < _LENGTH:
        report.error("E531", f"{path} has {size} bytes, and no header", hint=_COPY)
        return None
    (length,) = struct.unpack("<Q", start)
    if length > MAX_HEADER:
        hint = f"it is no safetensors file, or damaged: {MAX_HEADER:,} bytes are the most"
        report.error("E531", f"{path} says that its header has {length:,} bytes", hint=hint)
        return None
    if length + _LENGTH > size:
        message = f"{path} ends in its header, which has {length:,} bytes, after {size:,}"
        report.error("E531", message, hint=_COPY)
        return None
    return start


def parse_header(
    path: Path, header: bytes, size: int | None, report: Report, modified: int = 0
) -> Shard | None:
    """A file by the bytes of its header; `size` is that of the file, or what is said. E531."""
    found = Report()
    stated = _stated(path, header, found)
    metadata = _metadata(path, stated.pop(METADATA, {}), found)
    entries = [
        entry
        for name, value in stated.items()
        if (entry := _entry(path, name, value, len(header), found)) is not None
    ]
    entries.sort(key=lambda e: (e.start, e.stop))
    size = max((e.stop for e in entries), default=len(header)) if size is None else size
    if not found.failed:
        _check_places(path, entries, len(header), size, found)
    report.extend(found.found)
    if found.failed:
        return None
    return Shard(path, header, metadata, {e.name: e for e in entries}, size, modified)


def _stated(path: Path, header: bytes, report: Report) -> dict[str, object]:
    try:
        text = header[_LENGTH:].decode("utf-8")
        value: object = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        message = f"the header of {path} is not JSON: {str(error).splitlines()[0]}"
        report.error("E531", message, hint=_COPY)
        return {}
    if not isinstance(value, dict):
        report.error("E531", f"the header of {path} is no JSON object", hint=_COPY)
        return {}
    return cast("dict[str, object]", value)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(n for n, _ in pairs if n in seen or seen.add(n))
        raise ValueError(f"`{twice}` stands twice")
    return found


def _metadata(path: Path, value: object, report: Report) -> dict[str, str]:
    texts = cast("dict[str, object]", value) if isinstance(value, dict) else {"": None}
    if not all(isinstance(text, str) for text in texts.values()):
        hint = "a text for each name is all that it may have"
        report.error("E531", f"{path} has metadata that are no texts", hint=hint)
        return {}
    return cast("dict[str, str]", texts)


_FIELDS = {"dtype", "shape", "data_offsets"}
_LIE = "the file is damaged, or was made by a faulty program; save it again"


def _entry(path: Path, name: str, value: object, data: int, report: Report) -> Entry | None:
    stated = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    dtype, shape, places = (stated.get(n) for n in ("dtype", "shape", "data_offsets"))
    shape, places = _sizes(shape), _sizes(places)
    wrong = ""
    if stated.keys() != _FIELDS or not isinstance(dtype, str) or shape is None or places is None:
        wrong = "is not described by dtype, shape and data_offsets"
    elif len(places) != 2 or places[0] > places[1]:
        wrong = f"has the offsets {list(places)}, which are no beginning and end"
    elif dtype in _BITS and places[1] - places[0] != _bytes(dtype, shape):
        wrong = (
            f"has {places[1] - places[0]:,} bytes, and {dtype} {list(shape)} takes "
            f"{_bytes(dtype, shape):,}"
        )
    elif not _can_be_written(name):
        wrong = "has a name that is not Unicode"
    if wrong:
        report.error("E531", f"{path}: `{_printable(name)}` {wrong}", hint=_LIE)
        return None
    assert isinstance(dtype, str)
    assert shape is not None
    assert places is not None
    return Entry(name, dtype, shape, path, data + places[0], data + places[1])


def _sizes(value: object) -> tuple[int, ...] | None:
    """A list of sizes, none of which is more than a file can have."""
    listed = cast("list[object]", value) if isinstance(value, list) else [None]
    found = [x for x in listed if type(x) is int and 0 <= x < 2**63]
    return tuple(found) if len(found) == len(listed) else None


def _can_be_written(name: str) -> bool:
    return _printable(name) == name


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _check_places(path: Path, entries: list[Entry], data: int, size: int, report: Report) -> None:
    """Whether tensors lie one behind another from the header to the file's end."""
    at, before = data, ""
    for entry in entries:
        if entry.start < at:
            message = f"{path}: `{entry.name}` lies where `{before}` does"
            report.error("E531", message, hint=_LIE)
        elif entry.start > at:
            message = f"{path}: {entry.start - at:,} bytes before `{entry.name}` are no tensor's"
            report.error("E531", message, hint=_LIE)
        at, before = max(at, entry.stop), entry.name
    if at > size:
        message = f"{path} is cut off: it has {size:,} bytes, and its header says {at:,}"
        report.error("E531", message, hint=_COPY)
    elif at < size:
        message = f"{path} has {size - at:,} bytes behind the last of its tensors"
        report.error("E531", message, hint=_LIE)
