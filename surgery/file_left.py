"""What a merge of files leaves of an adapter: on quantised weights, and what no weight computes.

It is an adapter's folder by itself, to be attached to the model that was merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from surgery.artifact import save_adapter
from surgery.errors import refuse
from surgery.file_record import LEFT
from surgery.folder_sites import Adapted, Adapter
from surgery.mapping import mapping_of
from surgery.mapping.keys import ADAPTED
from surgery.mixture import sources_of
from surgery.partial import stays
from surgery.plan import plan_assignments
from surgery.planned import Plan, PlannedSite


def left_sites(found: Adapted, merged: Iterable[PlannedSite]) -> dict[str, tuple[str, ...]]:
    """By the names of adapters the paths of the sites that a merge leaves, as folders have them.

    merged: the sites that it does not leave. One that several adapters have is left of each.
    """
    left = {
        (one.adapter, one.path) for site in stays(found.sites, merged) for one in sources_of(site)
    }
    every = {
        a.wanted.name: tuple(
            stated.path
            for site, stated in zip(a.plan.sites, a.stated.sites, strict=True)
            if (site.adapter, site.path) in left
        )
        for a in found.adapters
    }
    return {name: paths for name, paths in every.items() if paths}


def check_left(found: Adapted, names: Iterable[str]) -> None:
    """Raises ArtifactError (E552) where a checkpoint has already what an earlier merge left."""
    for name in names:
        there = (path for path in found.checkpoint.others if path.as_posix().startswith(LEFT))
        if any(path.parts[1] == name for path in there):
            hint = "give the adapter's folder another name, or move that one away"
            refuse("E552", f"{found.checkpoint.folder} has {LEFT}{name} already", hint=hint)


def save_left(found: Adapted, adapter: Adapter, left: Sequence[str], folder: Path) -> None:
    """Write what is left of an adapter, as `left_sites` has it, to a folder."""
    loaded = adapter.loaded
    stay = [i for i, site in enumerate(adapter.stated.sites) if site.path in left]
    resolved = replace(loaded.resolved, adapters=((loaded.adapter, ()),))
    some = tuple(loaded.assignments[i] for i in stay)
    plan = plan_assignments(resolved, adapter.model, some, loaded.adapter)
    paths = {site.path for site in plan.sites}
    base = {path: digest for path, digest in loaded.base.items() if path in paths}
    tensors = _tensors(found, adapter, plan)
    save_adapter(folder, plan, loaded.adapter, tensors, loaded.seed, base, model=adapter.model)


def _tensors(found: Adapted, adapter: Adapter, plan: Plan) -> Mapping[str, Tensor]:
    """Those of a plan's sites; what the folder does not have, for it is made of the base, too."""
    before = adapter.loaded.tensors
    names = mapping_of(plan).index(ADAPTED, adapter.loaded.adapter)
    tensors = {name: before[name] for name in names if name in before}
    for site in plan.sites:
        own = {site.adapted(p.name): p.name for p in site.form.parameters if not p.shared}
        if own.keys() <= tensors.keys():
            continue
        stated = next(s for s in adapter.stated.sites if s.path == site.path)
        made = found.tensors_at(adapter, stated)
        tensors |= {name: made[p] for name, p in own.items() if name not in tensors}
    return tensors
