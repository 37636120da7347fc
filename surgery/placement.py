"""Whether adapters are where their sites run: found where something is made live, at no call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from surgery.algebra.equations import Parameter
from surgery.errors import Diagnostic, Report
from surgery.located import shared_tensor_of
from surgery.mixture import MixedSite
from surgery.model.hooked import execution_device
from surgery.mount import parameter_of
from surgery.plan import Plan
from surgery.planned import PlannedSite


def check_placed(model: nn.Module, sites: Iterable[PlannedSite], plans: Mapping[str, Plan]) -> None:
    """Refuse sites that would run adapters which are on another device.

    Raises StateError (E451), a finding an adapter and pair of devices. What waits on meta passes.
    """
    report = Report()
    every = (own for s in sites for own in (s.sources if isinstance(s, MixedSite) else (s,)))
    report.extend(misplaced(model, every, plans))
    report.stop()


def misplaced(
    model: nn.Module, sites: Iterable[PlannedSite], plans: Mapping[str, Plan]
) -> Iterator[Diagnostic]:
    """E451 for the adapters' own sites whose parameters are on another device than they run on."""
    found: dict[tuple[str, torch.device, torch.device, bool], list[PlannedSite]] = {}
    for site in sites:
        runs = execution_device(site.site.module)
        plan, every = plans[site.adapter], site.form.parameters
        places = {(_whole(model, plan, site, p).device, p.shared): None for p in every}
        for device, shared in places:
            if device != runs and "meta" not in (device.type, runs.type):
                found.setdefault((site.adapter, device, runs, shared), []).append(site)
    for (adapter, device, runs, shared), some in found.items():
        more = f" and {len(some) - 1} more" * (len(some) > 1)
        what = f"what the sites of `{adapter}` share" if shared else f"`{adapter}`"
        yield Diagnostic(
            "E451",
            f"{what} is on {device} at `{some[0].path}`{more}, which runs on {runs}",
            hint=_SHARED if shared else _MOVE.format(runs),
        )


def _whole(model: nn.Module, plan: Plan, site: PlannedSite, p: Parameter) -> torch.Tensor:
    if p.shared:
        return shared_tensor_of(model, plan, site, p)
    return parameter_of(site.site.module, site.holders, p.name)


_MOVE = "move the whole model, model.to('{}'): adapters move with their layers"
_SHARED = "put its sites on one device, or into adapters of their own, each for one device"
