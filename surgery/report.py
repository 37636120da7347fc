"""How plans are shown: as a table for people, as plain data for programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.plan import Plan, PlannedSite

_MERGE_NOTES = {
    "exact": "merging changes no weight",
    "algebraic": "the merge can be undone by arithmetic alone",
    "witness": "undoing the merge needs a vector that the merge keeps",
    "snapshot": "undoing the merge needs the base weight itself",
    "none": "cannot be merged",
}


def plan_table(plan: Plan) -> str:
    """The table: a row a site, then the equations, then the totals."""
    several = len(plan.adapters) > 1
    header = ["site", "kind", "out × in", "method", "parameters", "trained", "merge"]
    rows = [_row(site, several) for site in plan.sites]
    lines = _aligned([header, *rows])
    lines += ["", *_equations(plan), "", *_totals(plan)]
    lines += [str(d) for d in plan.diagnostics]
    return "\n".join(lines)


def _row(site: PlannedSite, several: bool) -> list[str]:
    form = site.form
    call = f"{form.method.name}({_arguments(site)})"
    trained = sum(_numel(form.shapes[p.name]) for p in form.parameters if p.trained)
    return [
        site.path or "(the model itself)",
        form.kind.name,
        f"{form.sizes.fan_out} × {form.sizes.fan_in}",
        f"{site.adapter}: {call}" if several else call,
        " ".join(f"{n}{_shape(s)}" for n, s in form.shapes.items()),
        f"{trained:,}",
        form.derived.merge_class,
    ]


def _arguments(site: PlannedSite) -> str:
    return ", ".join(f"{n}={_value(v)}" for n, v in site.form.arguments)


def _value(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case float():
            return f"{value:g}"
        case _:
            return str(value)


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _numel(shape: Iterable[int]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def _equations(plan: Plan) -> list[str]:
    lines: dict[str, None] = {}
    for site in plan.sites:
        form = site.form
        note = form.derived.reason or _MERGE_NOTES[form.derived.merge_class]
        lines[f"{form.method.name}: {form.equation}"] = None
        lines[f"  {form.derived.merge_class}: {note}"] = None
        if _adds_bias(site):
            lines[
                f"  {form.method.name} adds a bias to layers that have none when it is merged"
            ] = None
    return list(lines)


def _adds_bias(site: PlannedSite) -> bool:
    merged = site.form.derived.still
    return merged is not None and not site.form.has_bias and merged.bias.op != "zeros"


def _totals(plan: Plan) -> list[str]:
    share = plan.trainable / plan.base_count if plan.base_count else 0
    lines = [
        f"{len(plan.sites)} sites, {plan.trainable:,} trainable of {plan.total:,} adapter "
        f"parameters, {_size(plan.bytes)}",
        f"the base has {plan.base_count:,} parameters, {_size(plan.base_bytes)}; "
        f"{share:.3%} of that is trained",
    ]
    if plan.shared:
        names = ", ".join(f"{s.method}.{s.parameter.name}{_shape(s.shape)}" for s in plan.shared)
        lines.append(f"shared by all their sites and counted once: {names}")
    return lines


def _size(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return [lines[0], "─" * max(map(len, lines)), *lines[1:]]


def plan_json(plan: Plan) -> dict[str, object]:
    """The plan as plain data, one object a site."""
    return {
        "sites": [_site_json(site) for site in plan.sites],
        "shared": [
            {
                "adapter": s.adapter,
                "method": s.method,
                "name": s.parameter.name,
                "shape": list(s.shape),
                "trained": s.parameter.trained,
            }
            for s in plan.shared
        ],
        "adapters": list(plan.adapters),
        "trainable": plan.trainable,
        "total": plan.total,
        "bytes": plan.bytes,
        "base": {"parameters": plan.base_count, "bytes": plan.base_bytes},
        "diagnostics": [d.as_json() for d in plan.diagnostics],
    }


def _site_json(site: PlannedSite) -> dict[str, object]:
    form = site.form
    return {
        "path": site.path,
        "adapter": site.adapter,
        "kind": form.kind.name,
        "in": form.sizes.fan_in,
        "out": form.sizes.fan_out,
        "layer": site.site.layer,
        "method": form.method.name,
        "arguments": dict(form.arguments),
        "equation": form.equation,
        "parameters": {
            p.name: {
                "shape": list(form.shapes[p.name]),
                "trained": p.trained,
                "shared": p.shared,
                "dtype": str(form.dtype).removeprefix("torch."),
            }
            for p in form.parameters
        },
        "merge": form.derived.merge_class,
        "reason": form.derived.reason,
        "adds_bias": _adds_bias(site),
    }
