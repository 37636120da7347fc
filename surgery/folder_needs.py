"""What adapters' folders have sites on, as their files say it by themselves.

Ours list their sites. Those of peft have keys, and the parameters that their config names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from surgery.algebra.kinds import beyond
from surgery.artifact import CONFIG, MAPPING, SPEC, TENSORS
from surgery.integrations.peft import NAME, kind_of
from surgery.integrations.peft_sites import PARAMETERS
from surgery.language.library import Library
from surgery.mapping.forms import same
from surgery.mapping.pieces import named_in
from surgery.mapping.spelling import dialect_of
from surgery.model.layers import KINDS
from surgery.skeleton import ANY, Kinds, Need
from surgery.store import read_json, read_tensors

_LAYERS = frozenset(kind.name for kind in KINDS)


@dataclass(frozen=True, slots=True)
class Stated(Need):
    """A need with what a folder says of a weight that layers share. shape: of that weight."""

    tie: str = ""
    shape: tuple[int, ...] = ()


def needs_of(folder: Path) -> tuple[Stated, ...]:
    """What a folder has sites on, as far as its files say by themselves.

    Raises ArtifactError (E517) for no adapter's folder; what else is wrong is found as it is read.
    """
    if (folder / MAPPING).is_file() and (folder / SPEC).is_file():
        return tuple(_of_manifest(read_json(folder / MAPPING)))
    if (folder / CONFIG).is_file() and (folder / TENSORS).is_file():
        keys = tuple(read_tensors(folder / TENSORS).shapes)
        return tuple(_of_keys(keys, read_json(folder / CONFIG)))
    return ()  # for which there is a word when it is read


def _of_manifest(data: Mapping[str, object]) -> Iterator[Stated]:
    entries = data.get("sites")
    for entry in cast("list[object]", entries) if isinstance(entries, list) else ():
        stated = cast("dict[str, object]", entry if isinstance(entry, dict) else {})
        path, kind = stated.get("path"), stated.get("kind")
        parameter, tie = stated.get("parameter", "weight"), stated.get("tie", "")
        if isinstance(path, str) and isinstance(parameter, str) and isinstance(kind, str):
            sides = stated.get("out"), stated.get("in")
            turned = kind in ("embedding", "transposed_linear")
            shape = cast("tuple[int, ...]", sides[::-1] if turned else sides)
            if beyond(kind):
                yield Stated(path, "", ANY, sides[0] if isinstance(sides[0], int) else 0)
                continue
            kinds = ANY if stated.get("tensor") is True else frozenset({kind})
            yield Stated(path, parameter, kinds, 0, str(tie or ""), shape)


def _of_keys(keys: Sequence[str], config: Mapping[str, object]) -> Iterator[Stated]:
    """The sites that peft's keys name, and which kinds of layers have all the keys of a site."""
    dialect, library = dialect_of(NAME), Library.standard()
    formats = [
        fmt
        for name in library.names()
        for fmt in library.formats(name)
        if fmt.name == NAME and same(kind_of(fmt), config.get("peft_type"))
    ]
    rows = [(e, frozenset(t.kinds)) for f in formats for t in f.tensors for e in named_in(t.key)]
    every: dict[str, Kinds] = {}
    for key in keys:
        path, kinds = _site(key.removeprefix(dialect.site), rows)
        if not key.startswith(dialect.site) or path is None:
            continue
        path = ".".join(name for name in path.split(".") if name != dialect.around)
        before = every.get(path, ANY)
        every[path] = before & kinds if before and kinds else before or kinds
    turned = config.get("fan_in_fan_out")
    for path, kinds in every.items():
        named = [*_parameters(path, config.get(PARAMETERS))]
        yield from (Stated(path, name) for name in named)
        if not named:
            yield Stated(path, "", _laid(kinds, turned))


def _parameters(path: str, stated: object) -> Iterator[str]:
    """The parameters of a module that peft's config names, by the ends of their paths."""
    for name in cast("list[object]", stated) if isinstance(stated, list) else ():
        owner, _, own = str(name).rpartition(".")
        if owner and f".{path}".endswith(f".{owner}"):
            yield own


def _site(name: str, rows: Sequence[tuple[str, Kinds]]) -> tuple[str | None, Kinds]:
    """The path before the longest of some endings, and the kinds of layers that have this one."""
    fitting = [(ending, kinds) for ending, kinds in rows if f".{name}".endswith(f".{ending}")]
    if not fitting:
        return None, ANY
    longest = max((ending for ending, _ in fitting), key=len)
    every = [kinds for ending, kinds in fitting if ending == longest]
    kinds = frozenset[str]().union(*every) if all(every) else ANY
    return f".{name}".removesuffix(f".{longest}")[1:], kinds


def _laid(kinds: Kinds, turned: object) -> Kinds:
    """Without the kinds of layers that lie otherwise than a config says."""
    if type(turned) is not bool:
        return kinds
    left = (kinds or _LAYERS) - {"linear" if turned else "transposed_linear"}
    return left or kinds
