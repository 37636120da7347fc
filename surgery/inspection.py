"""What a folder holds, told without loading a tensor: an adapter, a checkpoint, a merged one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

from surgery.algebra.names import Names
from surgery.algebra.scalars import Scalars, literal
from surgery.arguments import Link, arguments, without_told
from surgery.artifact import CONFIG, MAPPING, SPEC, TENSORS
from surgery.check import resolve
from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.errors import SurgeryError, refuse
from surgery.headers import Entry
from surgery.integrations.imported import import_config
from surgery.integrations.peft import NAME, kind_of
from surgery.integrations.pretrained import base_of
from surgery.language import syntax as ast
from surgery.language.library import Library
from surgery.language.parse import MAX_WORDS, parse, parse_bytes
from surgery.manifest import Manifest
from surgery.mapping.forms import same
from surgery.mapping.pieces import named_in
from surgery.mapping.spelling import dialect_of
from surgery.report import aligned, shown_bytes, shown_shape
from surgery.store import read_json, read_text

RECORD = "inverse.json"
_RANK = "r"  # what a rank is called in methods
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Contents:
    """What some files of tensors hold.

    dtypes: tensors, elements and bytes of each. shards: tensors and bytes of each file.
    """

    tensors: tuple[Entry, ...]
    dtypes: Mapping[str, tuple[int, int, int]]
    shards: Mapping[str, tuple[int, int]]

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(one.bytes for one in self.tensors)


@dataclass(frozen=True, slots=True)
class AdapterSite:
    """A site of a saved adapter. method: with arguments; "" where the folder does not say.

    kind, shape: of the layer, "" and empty likewise. digest: of its weight, as
    `dtype:sha256`, or "".
    """

    path: str
    method: str = ""
    rank: int | None = None
    kind: str = ""
    shape: tuple[int, ...] = ()
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A saved adapter.

    name: its own. sites: where it is. form: under which keys its tensors are. peft: why peft does
    not read it, or "". spec: what puts on the same. base: the model that the folder names.
    """

    name: str
    sites: tuple[AdapterSite, ...]
    form: str
    peft: str
    spec: str
    base: str


@dataclass(frozen=True, slots=True)
class Merged:
    """What was merged into a checkpoint: how many tensors, and the bytes kept for the way back."""

    adapters: Mapping[str, float]
    machine: Mapping[str, str]
    tensors: int
    kept: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a path holds. model: of its config.json: type, and whether its embeddings are tied."""

    path: Path
    kind: Literal["adapter", "checkpoint", "merged"]
    contents: Contents
    model: tuple[str, bool | None] = ("", None)
    adapter: Adapter | None = None
    merged: Merged | None = None

    def as_json(self) -> dict[str, object]:
        """As plain data, with every tensor and every site."""
        data: dict[str, object] = {
            "path": str(self.path),
            "kind": self.kind,
            "bytes": self.contents.bytes,
            "dtypes": _named(self.contents.dtypes, ("tensors", "elements", "bytes")),
            "shards": _named(self.contents.shards, ("tensors", "bytes")),
            "tensors": [_plain(one) for one in self.contents.tensors],
        }
        if self.adapter is None:
            data |= {"model": self.model[0] or None, "tied": self.model[1]}
        else:
            data["adapter"] = asdict(self.adapter)
        if self.merged is not None:
            data["merged"] = asdict(self.merged)
        return data

    def __str__(self) -> str:
        """For a person: like tensors of many layers, and like sites, are one line."""
        parts = [_title(self), *_totals(self.contents)]
        if self.merged is not None:
            parts += ["", *_merged_lines(self.merged)]
        if self.adapter is not None:
            parts += ["", *_adapter_lines(self.adapter)]
        return "\n".join([*parts, "", *_tensor_lines(self.contents.tensors)])


def _named(table: Mapping[str, tuple[int, ...]], names: Sequence[str]) -> dict[str, object]:
    return {key: dict(zip(names, row, strict=True)) for key, row in table.items()}


def _plain(one: Entry) -> dict[str, object]:
    shape = [*one.shape]
    return {"name": one.name, "dtype": one.dtype, "shape": shape, "file": one.file.name}


# ------------------------------------------------------------------------------------- reading


def inspect(path: str | Path) -> Inspection:
    """What a folder, or a file of tensors, holds; of tensors only headers are read.

    Raises ArtifactError: E530 to E532 as `open_checkpoint` does, E511 to E521 for a saved adapter
    that does not hold together, E538 for a merged one.
    """
    path = Path(path)
    own = path / MAPPING if (path / MAPPING).is_file() else path / CONFIG
    adapted = own.is_file() and (path / TENSORS).is_file()
    with open_checkpoint(path / TENSORS if adapted else path) as found:
        contents, folder = _contents(found), found.folder
    if adapted:
        read = _own_adapter if own.name == MAPPING and (path / SPEC).is_file() else _peft_adapter
        return Inspection(path, "adapter", contents, adapter=read(path, contents))
    model = _model(folder / "config.json")
    if path.is_dir() and (path / RECORD).is_file():
        return Inspection(path, "merged", contents, model, merged=_merged(path / RECORD))
    return Inspection(path, "checkpoint", contents, model)


def _contents(found: Checkpoint) -> Contents:
    dtypes: dict[str, tuple[int, int, int]] = {}
    for entry in found.tensors.values():
        count, elements, size = dtypes.get(entry.dtype, (0, 0, 0))
        more = 1
        for length in entry.shape:
            more *= length
        dtypes[entry.dtype] = (count + 1, elements + more, size + entry.bytes)
    shards = {name: (len(one.entries), one.size) for name, one in found.shards.items()}
    return Contents(tuple(found.tensors.values()), dtypes, shards)


def _model(path: Path) -> tuple[str, bool | None]:
    """The type of model that a config names, and whether it says that embeddings are tied."""
    if not path.is_file():
        return "", None
    config = read_json(path)
    tied = config.get("tie_word_embeddings")
    kind = config.get("model_type")
    return (kind if isinstance(kind, str) else ""), (tied if isinstance(tied, bool) else None)


def _own_adapter(folder: Path, _: Contents) -> Adapter:
    manifest = Manifest(folder / MAPPING, read_json(folder / MAPPING))
    text = read_text(folder / SPEC)
    spec = parse_bytes(text.encode(), str(folder / SPEC), 4 * MAX_WORDS)
    assignments = manifest.assignments(resolve(spec, Library.standard()))
    stated = cast("list[dict[str, object]]", manifest.data["sites"])
    sites = [
        AdapterSite(
            one.path,
            " then ".join(map(_called, one.links)),
            _rank(one.links),
            str(entry.get("kind", "")),
            _shape(entry),
            _digest(entry.get("base")),
        )
        for one, entry in zip(assignments, stated, strict=True)
    ]
    peft = manifest.data.get("peft", "")
    base = _base(folder)
    return Adapter(manifest.adapter, tuple(sites), manifest.form, str(peft), "", base)


def _called(link: Link) -> str:
    """A method with its rank, and with what is given it besides its defaults."""
    values = dict(link.arguments)
    defaults = {a.name: a.default for a in link.method.arguments if a.name != _RANK}
    given = [
        f"{name}={literal(value)}"
        for name, value in without_told(link)
        if not same(_value(defaults.get(name), values), value)
    ]
    return f"{link.method.name}({', '.join(given)})"


def _value(default: ast.Expression | None, names: Mapping[str, object]) -> object:
    try:
        return None if default is None else Scalars(names)(default)
    except SurgeryError:  # it can only be told at a site
        return None


def _rank(links: Sequence[Link]) -> int | None:
    found = [value for link in links for name, value in link.arguments if name == _RANK]
    return found[0] if len(found) == 1 and isinstance(found[0], int) else None


def _shape(entry: Mapping[str, object]) -> tuple[int, ...]:
    sizes = (entry.get("out"), entry.get("in"))
    return tuple(size for size in sizes if type(size) is int)


def _digest(stated: object) -> str:
    entry = cast("dict[str, object]", stated if isinstance(stated, dict) else {})
    return f"{entry.get('dtype')}:{entry.get('sha256')}" if entry else ""


def _base(folder: Path) -> str:
    """The base that a folder names, or the config of peft's in it."""
    return base_of(folder).name


def _peft_adapter(folder: Path, contents: Contents) -> Adapter:
    """A folder of peft's, by its config as a spec, if it is one, and its tensors' keys."""
    try:
        spec = import_config(folder)
        method = _only_method(spec)
    except SurgeryError as error:
        spec, method = "".join(f"# {one.message}\n" for one in error.diagnostics), None
    kind = read_json(folder / CONFIG).get("peft_type")
    formats = [f for f in Library.standard().all_formats() if f.name == NAME]
    rows = [row for f in formats if same(kind_of(f), kind) for row in f.tensors]
    known = {name for row in rows for name in named_in(row.key)}
    paths = dict.fromkeys(filter(None, (_path(one.name, known) for one in contents.tensors)))
    called, rank = ("", None) if method is None else (_called(method), _rank([method]))
    sites = tuple(AdapterSite(path, called, rank) for path in paths)
    unread = f"its {CONFIG} has no peft_type" if kind is None else ""
    return Adapter("default", sites, NAME, unread, spec, _base(folder))


def _only_method(spec: str) -> Link | None:
    """The method of a spec that applies one in one way."""
    matches = [s for s in parse(spec).statements if isinstance(s, ast.Match)]
    if len(matches) != 1 or len(matches[0].applications) != 1:
        return None
    (application,) = matches[0].applications
    method = Library.standard().method(application.method)
    return method and Link(method, arguments(application, method, Names({}, {})))


def _path(key: str, known: Iterable[str]) -> str:
    """The site whose tensor a key is; "" for what is of none."""
    site = dialect_of(NAME).site
    ends = [end for name in known if key.endswith(end := f".{name}")]
    return key.removeprefix(site).removesuffix(max(ends, key=len)) if ends else ""


def _merged(path: Path) -> Merged:
    data = read_json(path)
    try:
        shards = cast("dict[str, dict[str, list[dict[str, int]]]]", data["shards"])
        changed = [one for shard in shards.values() for one in shard["changed"]]
        adapters = cast("dict[str, float]", data["adapters"])
        machine = cast("dict[str, str]", data["machine"])
        kept = sum(one["kept"] for one in changed)
        return Merged({**adapters}, {**machine}, len(changed), kept)
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__} {error}"
        hint = "copy the folder again, as `surgery merge` wrote it"
        refuse("E538", f"{path} does not say what was merged: {what}", hint=hint)


# ------------------------------------------------------------------------------------- showing


def _title(found: Inspection) -> str:
    kind, tied = found.model
    said = {True: ", embeddings tied", False: ", embeddings not tied", None: ""}[tied]
    about = f" ({kind}{said})" if kind else ""
    what = {"merged": "a merged checkpoint", "adapter": "an adapter"}.get(
        found.kind, "a checkpoint"
    )
    return f"{found.path}: {what}{about}"


def _totals(contents: Contents) -> list[str]:
    lines = [f"{len(contents.tensors):,} tensors, {shown_bytes(contents.bytes)}"]
    for dtype, (count, elements, size) in contents.dtypes.items():
        lines.append(f"  {dtype}: {count:,} tensors, {elements:,} elements, {shown_bytes(size)}")
    if len(contents.shards) > 1:
        for name, (count, size) in contents.shards.items():
            lines.append(f"  {name}: {count:,} tensors, {shown_bytes(size)}")
    return lines


def _merged_lines(merged: Merged) -> list[str]:
    mix = " + ".join(f"{factor:g} × {name}" for name, factor in merged.adapters.items())
    made = ", ".join(merged.machine.values())
    return [
        f"merged: {mix}; {merged.tensors:,} tensors changed",
        f"undone with {shown_bytes(merged.kept)} that are kept, on a machine such as {made}",
    ]


def _adapter_lines(adapter: Adapter) -> list[str]:
    digests = {site.digest.partition(":")[0] for site in adapter.sites} - {""}
    count = sum(bool(site.digest) for site in adapter.sites)
    base = [f"base: {adapter.base}"] if adapter.base else []
    if count:
        known = f"digests of {count:,} of {len(adapter.sites):,} weights, in "
        base.append(known + ", ".join(sorted(digests)))
    return [
        f"adapter `{adapter.name}` at {len(adapter.sites):,} sites, {adapter.form} keys",
        f"peft does not read it: {adapter.peft}" if adapter.peft else "peft reads this folder",
        *base,
        "",
        *_spec_lines(adapter.spec),
        *_site_lines(adapter.sites),
    ]


def _spec_lines(spec: str) -> list[str]:
    """A spec without what it says of itself."""
    lines = [line for line in spec.splitlines() if line and not line.startswith("#")]
    return [*lines, ""] if lines else []


def _site_lines(sites: Sequence[AdapterSite]) -> list[str]:
    def row(site: AdapterSite) -> tuple[str, ...]:
        shape = shown_shape(site.shape) if site.shape else ""
        return (_starred(site.path), site.kind, shape, site.method)

    return _table(("site", "kind", "shape", "method"), map(row, sites))


def _tensor_lines(tensors: Sequence[Entry]) -> list[str]:
    def row(one: Entry) -> tuple[str, ...]:
        return (_starred(one.name), one.dtype, shown_shape(one.shape))

    return _table(("tensor", "dtype", "shape"), map(row, tensors))


def _starred(name: str) -> str:
    """A name without the numbers in its path, which tell layers apart."""
    return ".".join("*" if _NUMBER.fullmatch(part) else part for part in name.split("."))


def _table(head: Sequence[str], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows in columns, those that are alike as one with their number."""
    counts: dict[tuple[str, ...], int] = {}
    for row in rows:
        counts[row] = counts.get(row, 0) + 1
    if not counts:
        return []
    return aligned([[*head, "number"], *([*row, f"{n:,}"] for row, n in counts.items())])
