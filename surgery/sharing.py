"""What all sites of a method share: parameters as large as the largest of them asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from surgery.algebra.axes import evaluate
from surgery.algebra.equations import Parameter, Random, drawn_after
from surgery.errors import Report
from surgery.planned import PlannedSite, SharedKey, SharedParameter
from surgery.rating import at_odds


def shared_parameters(sites: Iterable[PlannedSite], report: Report) -> Iterator[SharedParameter]:
    """What the sites of a plan share, each once. E310 where they cannot; see `rating.at_odds`."""
    found: dict[SharedKey, SharedParameter] = {}
    largest: dict[SharedKey, dict[str, int]] = {}
    firsts: dict[SharedKey, PlannedSite] = {}
    for site in sites:
        form = site.form
        for p in form.parameters:
            if not p.shared:
                continue
            key = form.bank(site.adapter, p)
            names = largest.setdefault(key, {})
            names.update({n: max(v, names.get(n, v)) for n, v in form.sizes.names.items()})
            shape = _shape_for(p, form.shapes[p.name], names)
            declared = replace(p, name=p.declared_name, declared="", link=0)
            at = site.site
            dtypes = (form.dtype_of(p), at.device, at.dtype)
            one = SharedParameter(*key[:3], declared, shape, *dtypes, _after(p, names))
            before = found.get(key)
            if before is not None:
                _check_alike(before, one, site, report)
            first = firsts.setdefault(key, site)
            report.extend(at_odds(p, (first.rates, first.span), (site.rates, site.span)))
            found[key] = one if before is None else _larger(before, one)
    yield from found.values()


def _after(p: Parameter, names: Mapping[str, int]) -> int | None:
    return drawn_after(p.beginning, names) if isinstance(p.beginning, Random) else None


def _check_alike(
    before: SharedParameter, one: SharedParameter, site: PlannedSite, report: Report
) -> None:
    """E310 where what sites share begins by sizes that are not the same at all of them."""
    p = one.parameter
    whole = isinstance(p.beginning, Random) or p.beginning.op == "number"
    if p.beginning != before.parameter.beginning or not (whole or one.shape == before.shape):
        report.error(
            "E310",
            f"`{p.name}` of {one.method} is shared by sites of other sizes than `{site.path}`",
            site.span,
            label=f"it is {_began(p)}{list(one.shape)} there, and {list(before.shape)} before",
            hint="put the method on them by statements with other arguments, or in another adapter",
        )


def _began(p: Parameter) -> str:
    return f"{p.begins} " if isinstance(p.beginning, Random) else ""


def _shape_for(p: Parameter, own: tuple[int, ...], largest: Mapping[str, int]) -> tuple[int, ...]:
    """What a site asks of a shared parameter, or the largest sizes, each of whichever site."""
    asked = (evaluate(length, largest) for length in p.shape)
    return tuple(max(o, a) if isinstance(a, int) else o for o, a in zip(own, asked, strict=True))


def _larger(shared: SharedParameter, one: SharedParameter) -> SharedParameter:
    both = tuple(map(max, shared.shape, one.shape))
    return replace(shared, shape=both, after=one.after)
