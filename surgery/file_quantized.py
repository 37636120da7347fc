"""The quantised weights of a checkpoint: which there are, what they stand for, what a config says.

A weight of 4 or 8 bits has several entries, which may lie in several files. What it stands for is
made of all of them; its size is known without that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import NoReturn, cast

import torch
from torch import Tensor

from surgery.checkpoint import Checkpoint
from surgery.checksums import bytes_of
from surgery.errors import refuse
from surgery.file_places import Source, Target
from surgery.headers import Entry
from surgery.model.roles import ROLES
from surgery.quantized_files import STATE, entries_of, quantiser

SKIPPED = "llm_int8_skip_modules"
"""The field of a config that names the modules whose weights are not quantised."""

_SECTION = "quantization_config"


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A weight of few bits. beside: the names of its other entries. shape: [out, in].

    kind: `nf4`, `fp4` or `int8`. dtype: that it had before, where the checkpoint says so.
    """

    name: str
    beside: tuple[str, ...]
    shape: tuple[int, int]
    kind: str
    dtype: torch.dtype | None = None

    @property
    def path(self) -> str:
        """Of its module."""
        return self.name.rpartition(".")[0]

    @property
    def entries(self) -> tuple[str, ...]:
        """The names of all its entries."""
        return (self.name, *self.beside)


def quantised_in(checkpoint: Checkpoint) -> dict[str, QuantisedWeight]:
    """The quantised weights of a checkpoint by their names; no data of weights is read.

    Raises ArtifactError (E554) for one whose entries do not fit together.
    """
    every = ((name, entries_of(name, checkpoint.tensors)) for name in checkpoint.tensors)
    return {name: _weight(checkpoint, name, beside) for name, beside in every if beside}


def _weight(checkpoint: Checkpoint, name: str, beside: tuple[str, ...]) -> QuantisedWeight:
    state = next((own for own in beside if f".{STATE}" in own), None)
    entry = checkpoint.entry(name)
    if state is None:
        if len(entry.shape) != 2 or entry.dtype != "I8":
            _unfit(name, f"codes of 8 bits are no {entry.dtype} of {len(entry.shape)} axes")
        return QuantisedWeight(name, beside, entry.shape, "int8")
    try:
        stated = json.loads(bytes(bytes_of(checkpoint.read(state))))
        rows, columns = (int(size) for size in stated["shape"])
        found = getattr(torch, str(stated.get("dtype")), None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _unfit(name, f"`{state}` has no shape: {error}")
    # Codes of two weights are a byte, and these are joined to elements of at most eight.
    if min(rows, columns) < 1 or abs(rows * columns / 2 - entry.bytes) > 8:
        _unfit(name, f"{rows} × {columns} weights are not {entry.bytes} bytes")
    dtype = found if isinstance(found, torch.dtype) else None
    return QuantisedWeight(name, beside, (rows, columns), state.rpartition("__")[2], dtype)


def _unfit(name: str, why: str) -> NoReturn:
    hint = "copy the checkpoint again, or quantise the model again"
    refuse("E554", f"the entries of `{name}` are of no quantised weight: {why}", hint=hint)


def whole(checkpoint: Checkpoint, weight: QuantisedWeight) -> tuple[dict[str, Tensor], Tensor]:
    """The entries of a weight, and what it stands for [out, in], in float32.

    Raises ArtifactError: E525 where the library that reads it is not installed, E554 for entries
    that do not fit together.
    """
    entries = {name: checkpoint.read(name).clone() for name in weight.entries}
    try:
        matrix = quantiser().dequantised(weight.name, entries)
    except ValueError as error:
        _unfit(weight.name, str(error).rpartition(": ")[2])
    if tuple(matrix.shape) != weight.shape:
        _unfit(weight.name, f"it is of {[*matrix.shape]}, and said to be of {[*weight.shape]}")
    return entries, matrix


def seen(
    checkpoint: Checkpoint, weights: Mapping[str, QuantisedWeight]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors of a checkpoint as a model has them, with weights that are not quantised."""
    beside = {name for weight in weights.values() for name in weight.beside}
    return {
        name: (torch.float32, weights[name].shape) if name in weights else (dtype, entry.shape)
        for name, entry in checkpoint.tensors.items()
        if (dtype := entry.torch_dtype) is not None and name not in beside
    }


def width(checkpoint: Checkpoint, weights: Mapping[str, QuantisedWeight], name: str) -> float:
    """The bytes of an element of a tensor; of a quantised weight, of all its entries on average."""
    dtype, weight = checkpoint.entry(name).torch_dtype, weights.get(name)
    if weight is not None:
        return sum(checkpoint.entry(own).bytes for own in weight.entries) / prod(weight.shape)
    return 1 if dtype is None else dtype.itemsize


def dense_dtype(checkpoint: Checkpoint, weights: Mapping[str, QuantisedWeight]) -> torch.dtype:
    """The dtype of plain weights: of the first tensor that no quantised module has.

    Where there is none, that which the quantised ones had before, or float16.
    """
    own = {weight.path for weight in weights.values()}
    found = (
        entry.torch_dtype
        for name, entry in checkpoint.tensors.items()
        if name.rpartition(".")[0] not in own and not _is_beside(name, weights)
    )
    plain = next((dtype for dtype in found if dtype and dtype.is_floating_point), None)
    before = next((w.dtype for w in weights.values() if w.dtype is not None), torch.float16)
    return plain or before


def _is_beside(name: str, weights: Mapping[str, QuantisedWeight]) -> bool:
    owner, weight, _ = name.rpartition(".weight.")
    return bool(weight) and f"{owner}.weight" in weights


def unquantised(
    config: Mapping[str, object],
    entries: Mapping[str, Entry],
    weights: Mapping[str, QuantisedWeight],
    made: Iterable[str],
) -> dict[str, object]:
    """A config that says of some weights that they are quantised no more.

    made: their names. Where no quantised weight is left, nothing is said of such. Where the config
    leaves it to who reads it which modules are plain, all of them are named.
    """
    left = weights.keys() - set(made)
    stated = config.get(_SECTION)
    if not isinstance(stated, dict):
        return dict(config)
    if not left:
        return {name: value for name, value in config.items() if name != _SECTION}
    section = cast("dict[str, object]", stated)
    before = section.get(SKIPPED)
    skipped = cast("list[object]", before) if isinstance(before, list) else []
    named = [weights[name].path for name in made]
    if not isinstance(before, list):
        named += _plain(entries, weights)
        named += _heads(weights) if config.get("tie_word_embeddings", True) else ()
    section = {**section, SKIPPED: [*skipped, *(n for n in sorted({*named}) if n not in skipped)]}
    return {**config, _SECTION: section}


def _plain(entries: Mapping[str, Entry], weights: Mapping[str, QuantisedWeight]) -> Iterator[str]:
    """The modules that have a matrix which is not quantised."""
    for name, entry in entries.items():
        path, _, own = name.rpartition(".")
        if own == "weight" and len(entry.shape) == 2 and name not in weights:
            yield path


def _heads(weights: Mapping[str, QuantisedWeight]) -> Iterator[str]:
    """What a head may be called that shares its weight, and has no entry by its name then."""
    for glob in ROLES["head"].globs:
        for name in glob.strip("{}").split(","):
            if not any(weight.path.endswith(name) for weight in weights.values()):
                yield name


# ----------------------------------------------------------------------------------- in memory


def held(tensor: Tensor) -> Source:
    """A tensor in memory to be read."""
    data = _bytes(tensor)

    def read(start: int, stop: int, into: Tensor) -> Tensor:
        return into[: stop - start].copy_(data[start:stop])

    return Source(tensor.dtype, tuple(tensor.shape), read)


def filled(tensor: Tensor) -> Target:
    """A tensor in memory to be written; it is contiguous."""
    data = _bytes(tensor)

    def write(start: int, piece: Tensor) -> None:
        data[start : start + piece.numel()] = piece

    return Target(tensor.dtype, write)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
