"""What a merge of files keeps for the way back: `inverse.json`, and files of tensors beside it.

A file of tensors for each shard that changed has corrections and witnesses; `inverse.json` says of
every tensor that changed what they are of, with checksums of what was there before and after.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn, cast, get_args

import torch
from torch import Tensor

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.checksums import bytes_of
from surgery.disk import read_at, write_at
from surgery.errors import refuse
from surgery.file_places import nameless
from surgery.file_quantized import width
from surgery.folder_sites import Adapted
from surgery.headers import NAMES, make_header
from surgery.merge_report import MergeReport, SiteMerge, Way
from surgery.merging import BLOCK, Packed
from surgery.precision import Rounding
from surgery.quantized import Quantized
from surgery.shards import Output
from surgery.store import read_json

RECORD = "inverse.json"
SIDE = "inverse/"
ADAPTERS = "adapters/"
LEFT = "unmerged/"
VERSION = 1

_PIECE = 8 * 2**20
_ASIDE = Path("(a file without a name)")


def is_added(name: str) -> bool:
    """Whether a file of a merged folder is none of the checkpoint's own."""
    return name == RECORD or name.startswith((SIDE, ADAPTERS))


# --------------------------------------------------------------------------------- what is kept


@dataclass(frozen=True, slots=True)
class MatrixRecord:
    """A matrix that was merged. blocks: from which row to before which, and bytes of corrections.

    index: which of a batch. base, merged: checksums; dtype: of the base.
    """

    site: str
    index: int | None
    rounding: Rounding
    base: str = ""
    merged: str = ""
    dtype: str = ""
    blocks: tuple[tuple[int, int, int], ...] = ()

    @staticmethod
    def read(data: Mapping[str, Any]) -> MatrixRecord:
        """From what `asdict` and JSON made of one. Raises KeyError, TypeError for anything else."""
        blocks = tuple(
            (int(start), int(stop), int(length)) for start, stop, length in data["blocks"]
        )
        made = {**data, "rounding": Rounding(**data["rounding"]), "blocks": blocks}
        return MatrixRecord(**cast("Any", made))


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor that changed. way: as in a `SiteMerge`. kept: the bytes that are kept of it.

    base, merged: checksums of all of it, where the way back is the base's own bytes; merged is ""
    where nothing is left of it. of: the quantised weight that it is an entry of, beside its own.
    """

    tensor: str
    way: Way
    kept: int
    by_rows: bool
    matrices: tuple[MatrixRecord, ...] = ()
    base: str = ""
    merged: str = ""
    of: str = ""

    @staticmethod
    def read(data: Mapping[str, Any]) -> TensorRecord:
        """From what `asdict` and JSON made of one. Raises KeyError, TypeError for anything else."""
        matrices = tuple(map(MatrixRecord.read, data["matrices"]))
        return TensorRecord(**cast("Any", {**data, "matrices": matrices}))


def key(tensor: str, number: int | None = None, what: str = "base") -> str:
    """The name that something kept has in the file beside a shard. number: of a matrix."""
    return f"{tensor}|{what}" if number is None else f"{tensor}|{number}|{what}"


class Side:
    """Tensors that are kept beside one shard, on disk from the first byte on; threads may add."""

    def __init__(self, folder: Path) -> None:
        """Begin. folder: on the file system where they will lie."""
        self._file = nameless(folder)
        self._entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        self._adding, self._end = Lock(), 0

    def __enter__(self) -> Side:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Let go of it."""
        os.close(self._file)

    def add(self, name: str, data: Tensor | Sequence[bytes]) -> None:
        """A tensor, or bytes in pieces."""
        if isinstance(data, Tensor):
            plain = data.detach().cpu().contiguous()
            pieces: Sequence[memoryview | bytes] = (bytes_of(plain),)
            dtype, shape = NAMES[plain.dtype], tuple(plain.shape)
        else:
            pieces, dtype = data, "U8"
            shape = (sum(map(len, data)),)
        with self._adding:
            start = self._end
            for piece in pieces:
                write_at(self._file, memoryview(piece), self._end)
                self._end += len(piece)
            self._entries[name] = (dtype, shape, start, self._end)

    def save(self, out: Output, name: str) -> None:
        """As a file of tensors of what is made."""
        rows = sorted((n, *rest) for n, rest in self._entries.items())
        header = make_header((n, dtype, shape) for n, dtype, shape, _, _ in rows)
        with out.shard(name, header) as writer:
            for own, _, _, start, stop in rows:
                for at in range(start, stop, _PIECE):
                    piece = torch.empty(min(_PIECE, stop - at), dtype=torch.uint8)
                    read_at(self._file, bytes_of(piece), at, _ASIDE)
                    writer.write_bytes(own, at - start, piece)


def packed_pieces(packed: Packed) -> tuple[tuple[tuple[int, int, int], ...], list[bytes]]:
    """Corrections as their blocks' rows and lengths, and their bytes."""
    blocks = tuple((start, stop, len(data)) for start, stop, data in packed.blocks)
    return blocks, [data for _, _, data in packed.blocks]


# ------------------------------------------------------------------------------- inverse.json


def record_data(
    shards: Mapping[str, Mapping[str, object]],
    adapters: Mapping[str, float],
    machine: Mapping[str, str],
    before: Mapping[str, str | None],
    options: Mapping[str, object],
) -> dict[str, object]:
    """The content of `inverse.json`.

    shards: what was recorded of each. before: the texts of `config` and `index`, if they changed.
    """
    return {
        "version": VERSION,
        "adapters": dict(adapters),
        "machine": dict(machine),
        "options": {**options, "block": BLOCK},
        "config": before.get("config"),
        "index": before.get("index"),
        "shards": {name: dict(facts) for name, facts in shards.items()},
    }


@dataclass(frozen=True, slots=True)
class Record:
    """`inverse.json` of a merged folder, read.

    config, index: texts of what was changed besides. shards: of each that changed, its tensors by
    name. headers: the shards whose own header is kept. quantized: what became of quantised weights.
    partial: whether what cannot merge was left.
    """

    folder: Path
    adapters: Mapping[str, float]
    machine: Mapping[str, str]
    config: str | None
    index: str | None
    shards: Mapping[str, Mapping[str, TensorRecord]]
    headers: frozenset[str] = frozenset()
    quantized: Quantized | None = None
    partial: bool = False
    _sides: dict[str, Checkpoint] = field(default_factory=dict[str, Checkpoint], repr=False)

    def kept(self, shard: str) -> Checkpoint:
        """The tensors that are kept beside a shard."""
        if shard not in self._sides:
            self._sides[shard] = open_checkpoint(self.folder / SIDE / shard)
        return self._sides[shard]

    def packed(self, shard: str, number: int, tensor: str, one: MatrixRecord) -> Packed:
        """The corrections of one matrix, of the tensor's so many."""
        side, name = self.kept(shard), key(tensor, number, "packed")
        blocks: list[tuple[int, int, bytes]] = []
        at = 0
        for start, stop, length in one.blocks:
            data = side.read_bytes(name, at, at + length)
            blocks.append((start, stop, bytes(bytes_of(data))))
            at += length
        dtype = cast("torch.dtype", getattr(torch, one.dtype))
        return Packed(tuple(blocks), dtype, one.base, one.merged)

    def beside(self, shard: str, number: int, tensor: str, what: str) -> dict[str, Tensor]:
        """The witnesses, or the parameters, that are kept of a matrix, by their names."""
        side, begun = self.kept(shard), key(tensor, number, f"{what}|")
        names = [name for name in side.tensors if name.startswith(begun)]
        return {name.removeprefix(begun): side.read(name) for name in names}

    def close(self) -> None:
        """Close its files."""
        for side in self._sides.values():
            side.close()


def read_record(folder: Path) -> Record:
    """The record of a merged folder.

    Raises ArtifactError: E550 if there is none, E538 for one that is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        hint = "name a folder that `surgery merge` wrote, and without `--undo none`"
        refuse("E550", f"{folder} has no {RECORD}, so nothing says what was merged", hint=hint)
    data = cast("dict[str, Any]", read_json(path))
    try:
        if data["version"] != VERSION:
            _damaged(path, f"its version is {data['version']!r}, and {VERSION} is known")
        shards = {
            str(name): {row.tensor: row for row in map(TensorRecord.read, facts["changed"])}
            for name, facts in data["shards"].items()
        }
        headers = frozenset(n for n, facts in data["shards"].items() if facts.get("header"))
        config, index = data["config"], data["index"]
        return Record(
            folder,
            {str(name): float(factor) for name, factor in data["adapters"].items()},
            {str(name): str(value) for name, value in data["machine"].items()},
            None if config is None else str(config),
            None if index is None else str(index),
            shards,
            headers,
            _how(data["options"].get("quantized")),
            data["options"].get("partial") is True,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        _damaged(path, f"it is no record of a merge: {type(error).__name__} {error}")


def _how(stated: object) -> Quantized | None:
    return cast("Quantized | None", stated if stated in get_args(Quantized) else None)


def _damaged(path: Path, what: str) -> NoReturn:
    refuse("E538", f"{path}: {what}", hint="copy the merged folder again, as it was written")


def changed_of(facts: Mapping[str, object]) -> Iterator[TensorRecord]:
    """The tensors that were recorded to have changed in a shard."""
    for one in cast("list[dict[str, Any]]", facts.get("changed", [])):
        yield TensorRecord.read(one)


def plain(record: TensorRecord) -> dict[str, object]:
    """A record as plain data."""
    return asdict(record)


def reported(records: Iterable[TensorRecord], found: Adapted) -> MergeReport:
    """What was merged, a row a site; sites that are one tensor share what is kept of it."""
    rounding: dict[str, Rounding] = {}
    ways: dict[str, Way] = {}
    kept: dict[str, int] = {}
    size: dict[str, int] = {}
    records = [*records]
    beside: dict[str, int] = {}
    for record in records:
        beside[record.of] = beside.get(record.of, 0) + record.kept
    for record in records:
        element = width(found.checkpoint, found.quantised, record.tensor)
        more = 0 if record.of else beside.get(record.tensor, 0)
        paths = dict.fromkeys(one.site for one in record.matrices)
        for one in record.matrices:
            rounding[one.site] = rounding.get(one.site, Rounding()) + one.rounding
            count = round(one.rounding.elements * element)
            size[one.site] = size.get(one.site, 0) + count
        for path in paths:
            both: tuple[Way, ...] = (ways.get(path, "nothing"), record.way)
            ways[path] = max(both, key=_WAYS.index)
            kept[path] = kept.get(path, 0) + (record.kept + more) // len(paths)
    return MergeReport(
        tuple(SiteMerge(p, rounding[p], ways[p], kept[p], size[p]) for p in rounding)
    )


_WAYS: tuple[Way, ...] = ("nothing", "base", "corrections")
