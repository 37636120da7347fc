"""An adapter made of two checkpoints: what training changed of each matrix, cut off at a rank.

The product of some rank that is nearest to a change is its truncated singular value decomposition
(Eckart and Young, 1936). Both checkpoints are read matrix by matrix, and no model is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from surgery import low_rank
from surgery.algebra.expr import WEIGHT
from surgery.artifact import SaveReport, save_adapter
from surgery.check import DEFAULT_ADAPTER, resolve, unstated
from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.conversion import check_output, first_target, target_of
from surgery.digests import Digest, digest
from surgery.errors import Report, refuse
from surgery.language.library import Library
from surgery.language.parse import parse
from surgery.model import storage
from surgery.plan import Assignment, plan, plan_assignments
from surgery.planned import Plan, PlannedSite
from surgery.report import aligned
from surgery.skeleton import Skeleton, built
from surgery.store import read_json
from surgery.tensor_diff import same_bytes

Progress = Callable[[str, int, int], None]
"""Is told the name of a matrix that is done, how many are, and of how many."""


@dataclass(frozen=True, slots=True)
class ExtractedSite:
    """One matrix that differs.

    rank: of the product. energy: the part of the change's squared length that it has. change: the
    length of the change as a share of that of the longer of the two matrices (Frobenius norms).
    """

    path: str
    rank: int
    energy: float
    change: float


@dataclass(frozen=True, slots=True)
class Extraction:
    """What was written; `str` is a table, `as_json` plain data.

    left_out: names of tensors that differ and are no matrix that was asked for, or are in one of
    the two checkpoints alone; the adapter does not have what changed there.
    """

    saved: SaveReport
    sites: tuple[ExtractedSite, ...]
    left_out: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        """As plain data."""
        rows = [
            {"path": s.path, "rank": s.rank, "energy": s.energy, "change": s.change}
            for s in self.sites
        ]
        files = [str(path) for path in self.saved.files]
        left_out = [*self.left_out]
        return {"files": files, "peft": self.saved.peft, "sites": rows, "left_out": left_out}

    def __str__(self) -> str:
        """A row a matrix, what is left out, the files."""
        head = ["site", "rank", "energy kept", "change"]
        rows = [[s.path, str(s.rank), f"{s.energy:.4%}", f"{s.change:.2e}"] for s in self.sites]
        lines = [*aligned([head, *rows]), ""]
        lines += [f"{name}: it differs, and is left out" for name in self.left_out]
        return "\n".join([*lines, *(str(path) for path in self.saved.files)])


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int,
    match: str = "*",
    to: str | None = None,
    progress: Progress | None = None,
) -> Extraction:
    """Write the adapter that comes nearest to what changed from one checkpoint to another.

    base, tuned: folders with safetensors, or such files, whose tensors have the same names. rank:
    of each product, at most. match: of a spec, which matrices may differ. to: a method that adds a
    product of two trained factors to W; by default the first of those that formats spell. Both
    checkpoints are read one matrix at a time, which is in float64 then. What a layer is, a
    checkpoint does not say: that a weight is a table of embeddings or lies as [in, out] is told by
    its name and by config.json.
    Raises ArtifactError: E520 if `out` has files already, E523 for a method of another kind, E530
    to E532 for a checkpoint, E540 where nothing can be compared or nothing differs; SelectionError
    for a `match` that finds nothing.
    """
    check_output(Path(out))
    if rank < 1:
        refuse("E523", f"there is no product of rank {rank}", hint="a rank is 1 or more")
    with open_checkpoint(base) as before, open_checkpoint(tuned) as after:
        _check(before, after, str(base), str(tuned))
        aim = target_of(to or first_target())
        return _Extracting(before, after, aim, rank, progress).write(Path(out), match)


def _check(before: Checkpoint, after: Checkpoint, base: str, tuned: str) -> None:
    common = before.tensors.keys() & after.tensors.keys()
    if not common:
        message = f"no tensor of {tuned} has the name of one of {base}"
        refuse("E540", message, hint="name two checkpoints of the same model")
    report = Report()
    for name in sorted(common):
        shapes = [list(c.tensors[name].shape) for c in (before, after)]
        if shapes[0] != shapes[1]:
            message = f"`{name}` is {shapes[0]} in {base}, and {shapes[1]} in {tuned}"
            report.error("E540", message, hint="name two checkpoints of the same model")
    report.stop()


class _Extracting:
    """One extraction."""

    def __init__(
        self,
        before: Checkpoint,
        after: Checkpoint,
        aim: low_rank.Target,
        rank: int,
        progress: Progress | None,
    ) -> None:
        self.before, self.after, self.aim, self.rank = before, after, aim, rank
        self.progress = progress
        self.skeleton = _skeleton(before)

    def write(self, out: Path, match: str) -> Extraction:
        """The adapter of all matrices that differ."""
        wanted = self._wanted(match).sites
        differing = frozenset(self._differing())
        sites = [site for site in wanted if self._name(site) in differing]
        if not sites:
            refuse("E540", "no matrix differs", hint="look at `surgery diff BASE TUNED`")
        links = {site.path: self.aim.link(self._rank_of(site)) for site in sites}
        made = plan_assignments(
            unstated(DEFAULT_ADAPTER, self.aim.method.span),
            self.skeleton.model,
            [Assignment(s.path, (links[s.path],), s.span, s.site.at) for s in sites],
            DEFAULT_ADAPTER,
        )
        tensors, digests, rows = self._products(made)
        saved = save_adapter(
            out, made, DEFAULT_ADAPTER, tensors, 0, digests, model=self.skeleton.model
        )
        taken = {self._name(site) for site in sites}
        apart = self.before.tensors.keys() ^ self.after.tensors.keys()
        return Extraction(saved, rows, tuple(sorted((differing - taken) | apart)))

    def _wanted(self, match: str) -> Plan:
        text = f"match {match} apply {self.aim.method.name}({self.aim.argument}=1)"
        resolved = resolve(parse(text, "--match"), Library.standard())
        return plan(resolved, self.skeleton.model)

    def _differing(self) -> Iterator[str]:
        for name in self.before.tensors.keys() & self.after.tensors.keys():
            same_dtype = self.before.entry(name).dtype == self.after.entry(name).dtype
            if not (same_dtype and same_bytes(name, self.before, self.after)):
                yield name

    def _name(self, site: PlannedSite) -> str:
        name = self.skeleton.tensor(site.site.module, site.site.at.parameter)
        assert name is not None  # a skeleton has no parameter that is no tensor
        return name

    def _rank_of(self, site: PlannedSite) -> int:
        return min(self.rank, *site.form.numbers(WEIGHT.shape))

    def _products(
        self, made: Plan
    ) -> tuple[dict[str, Tensor], dict[str, Digest], tuple[ExtractedSite, ...]]:
        tensors: dict[str, Tensor] = {}
        digests: dict[str, Digest] = {}
        rows: list[ExtractedSite] = []
        for count, site in enumerate(made.sites, 1):
            base = self._matrix(self.before, site)
            digests[site.path] = digest(base)
            tuned = self._matrix(self.after, site).double()
            change = tuned - base.double()
            rank = self._rank_of(site)
            one = low_rank.nearest(change, rank)
            dtype = site.form.dtype
            left = one.left / self.aim.scale(rank)
            tensors[site.adapted(self.aim.left)] = left.to(dtype).contiguous()
            tensors[site.adapted(self.aim.right)] = one.right.to(dtype).contiguous()
            share = _length(change) / max(_length(base.double()), _length(tuned))
            rows.append(ExtractedSite(site.path, rank, 1 - (one.error or 0.0) ** 2, share))
            if self.progress is not None:
                self.progress(site.path, count, len(made.sites))
        return tensors, digests, tuple(rows)

    def _matrix(self, checkpoint: Checkpoint, site: PlannedSite) -> Tensor:
        whole = checkpoint.read(self._name(site))
        return storage.matrix_of(site.form.kind, site.site.at, whole).clone()


def _length(matrix: Tensor) -> float:
    return float(matrix.square().sum()) ** 0.5


def _skeleton(checkpoint: Checkpoint) -> Skeleton:
    shapes = {
        name: (entry.torch_dtype, entry.shape)
        for name, entry in checkpoint.tensors.items()
        if entry.torch_dtype is not None
    }
    config: Mapping[str, object] = {}
    if any(path.as_posix() == "config.json" for path in checkpoint.others):
        config = read_json(checkpoint.folder / "config.json")
    return built(shapes, {}, config)
