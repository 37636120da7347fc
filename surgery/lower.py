"""One class of sites → one `fx.Graph`: the interpreter run over proxies.

The graph has one `base` call, which is the site's own layer, and the adapter's nodes around it. It
is made once for all sites that are alike, and compiled once to straight-line code.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from surgery.algebra.expr import BIAS, WEIGHT, depends_on
from surgery.algebra.interpret import Unlowerable
from surgery.algebra.rules import is_zero
from surgery.errors import Report
from surgery.model.layers import LayerKind
from surgery.model.parts import Part
from surgery.model.storage import ParameterName
from surgery.nodes import GraphPort, Layer, Lowering, Lowerings, at_site, cast_like
from surgery.plan import Plan, PlannedSite, SharedParameter, SiteClass
from surgery.planned import SharedKey


@dataclass(frozen=True)
class SiteGraph:
    """The graph of a module with its sites, its source, and the function compiled from it.

    run: `run(module, input)`, the forward of a mounted module; for a parameter, `run(module)`.
    """

    graph: fx.Graph
    source: str
    run: Callable[..., Tensor]


@lru_cache(maxsize=4096)
def lower(keys: Lowerings) -> SiteGraph:
    """The graph of a class of modules. Raises `Unlowerable` where an equation cannot run there.

    A module with one site that is all of it, or with sites that are rows of it and do not overlap.
    """
    return _site_graph(_build(keys))


@lru_cache(maxsize=4096)
def lower_values(keys: Lowerings) -> Mapping[ParameterName, SiteGraph]:
    """For modules that are reached by their weight: the graph of each parameter that changes.

    Raises `Unlowerable` where there is no weight to be computed.
    """
    found: dict[ParameterName, SiteGraph] = {}
    for name in RAW:
        # What layers share is the weight; a bias is each layer's own.
        if any([_changes(key, name) for key in keys]) and not (name == "bias" and keys[0].follows):
            found[name] = _site_graph(_build_value(keys, name))
    return found


def _site_graph(graph: fx.Graph) -> SiteGraph:
    code = graph.python_code("self")
    return SiteGraph(graph, code.src, _compiled(code.src, code.globals))


def graphs(keys: Lowerings) -> Mapping[str, SiteGraph]:
    """All graphs of a module: `forward`, or those of its parameters."""
    if keys[0].form.mode == "value":
        return {**lower_values(keys)}
    return {"forward": lower(keys)}


def check(plan: Plan) -> None:
    """Lower every class of sites of a plan. Raises PlanError (E305) with all that cannot run."""
    report = Report()
    seen: set[int] = set()
    for site in plan.sites:
        if id(site.form) in seen:
            continue
        seen.add(id(site.form))
        try:
            key = _key(plan, site)
            graphs((key,))
            if site.site.followers:
                graphs((_following(key),))
        except Unlowerable as obstacle:
            report.error(
                "E305",
                f"{site.form.method.name} cannot run on `{site.path}` ({site.form.kind.name}): "
                f"{obstacle}",
                site.span,
                hint="exclude such sites with `except`",
            )
    report.stop()


def by_module(plan: Plan, adapter: str) -> list[tuple[nn.Module, Lowerings]]:
    """Every module with sites of an adapter, in order, and what its graph is looked up by."""
    shared = {s.key: s for s in plan.shared}
    found: dict[int, list[PlannedSite]] = {}
    for site in plan.sites:
        if site.adapter == adapter:
            found.setdefault(id(site.site.module), []).append(site)
    modules: list[tuple[nn.Module, Lowerings]] = []
    for sites in found.values():
        keys = tuple(_key_of(plan, s, shared) for s in sorted(sites, key=_start))
        modules.append((sites[0].site.module, keys))
        modules += [(m, tuple(map(_following, keys))) for m in sites[0].site.followers]
    return modules


def _following(key: Lowering) -> Lowering:
    """What a layer that shares the weight of a site is lowered by."""
    return replace(key, form=replace(key.form, mode="value"), follows=True)


def _start(site: PlannedSite) -> int:
    return 0 if site.site.part is None else site.site.part.start


def _key(plan: Plan, site: PlannedSite) -> Lowering:
    return _key_of(plan, site, {s.key: s for s in plan.shared})


def _key_of(plan: Plan, site: PlannedSite, shared: Mapping[SharedKey, SharedParameter]) -> Lowering:
    form, adapter = site.form, site.adapter
    keys = {p.name: (adapter, form.method.name, form.arguments, p.name) for p in form.parameters}
    banks = tuple(
        (name, plan.groups[key], shared[key].shape) for name, key in keys.items() if key in shared
    )
    return Lowering(form, adapter, banks)


# ------------------------------------------------------------------------------- the graph


def _build(keys: Lowerings) -> fx.Graph:
    graph = fx.Graph()
    kind = keys[0].form.kind
    layer = Layer(graph, kind.argument)
    found = [(key.form.part, _site_nodes(key, layer)) for key in keys]
    y = found[0][1] if found[0][0] is None else _joined(found, layer, kind)
    graph.output(cast(Any, kind.features_back(y)).node)
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    graph.lint()
    return graph


def _site_nodes(key: Lowering, layer: Layer) -> Any:
    """The output of one site, features last."""
    interpreter, port = at_site(key, layer)
    return _finished(interpreter.run(key.form.derived, cast(Tensor, layer.input)), port)


def _joined(found: list[tuple[Part | None, Any]], layer: Layer, kind: LayerKind) -> Any:
    """The outputs of parts, and between them the layer's own."""

    def own(start: int, length: int) -> Any:
        return kind.features_last(layer.output).narrow(-1, start, length)

    return layer.function(torch.cat, _filled(found, own), -1)


def _filled(found: list[tuple[Part | None, Any]], own: Callable[[int, int], Any]) -> list[Any]:
    """The values of parts in order, and between them `own(start, length)`."""
    pieces: list[Any] = []
    at = whole = 0
    for part, value in found:
        assert part is not None  # a whole stands alone
        if part.start > at:
            pieces.append(own(at, part.start - at))
        pieces.append(value)
        at, whole = part.stop, part.whole
    if at < whole:
        pieces.append(own(at, whole - at))
    return pieces


# ------------------------------------------------------------------------------ a parameter

RAW: Mapping[ParameterName, str] = {"weight": "surgery_weight", "bias": "surgery_bias"}
"""Under which names a module that is reached by its weight has its own parameters."""


def _changes(key: Lowering, name: ParameterName) -> bool:
    """Whether an adapter changes a parameter of a layer. Raises `Unlowerable` if there is no W'."""
    merged = key.form.derived.merged
    if merged is None:
        raise Unlowerable(key.form.derived.reason)
    if key.follows and depends_on(merged.weight, BIAS):
        raise Unlowerable("W' is made of b, which the layers that share the weight do not share")
    if name == "weight":
        return merged.weight is not WEIGHT
    return not (merged.bias.op == "bias" or is_zero(merged.bias))


def _build_value(keys: Lowerings, name: ParameterName) -> fx.Graph:
    graph = fx.Graph()
    layer = Layer(graph, None, {**RAW})
    found = [(key.form.part, _value_nodes(key, layer, name)) for key in keys]
    value = found[0][1]
    if found[0][0] is not None:
        value = layer.function(torch.cat, _filled(found, _own_rows(keys[0].form, layer, name)))
    if name == "weight":
        value = keys[0].form.kind.from_matrix(value, layer.attribute(name).shape)
    graph.output(cast(Any, value).node)
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    graph.lint()
    return graph


def _value_nodes(key: Lowering, layer: Layer, name: ParameterName) -> Any:
    """The rows of a site, in the dtype of the layer's own."""
    interpreter, port = at_site(key, layer)
    merged = key.form.derived.merged
    assert merged is not None  # else it is refused before
    value: Any = interpreter.value(merged.weight if name == "weight" else merged.bias)
    return value.to(port.attribute("weight").dtype) if port.mixed else value


def _own_rows(form: SiteClass, layer: Layer, name: ParameterName) -> Callable[[int, int], Any]:
    """What a parameter is where no site changes it; an absent bias is zero."""

    def own(start: int, length: int) -> Any:
        weight = layer.attribute("weight")
        if name == "weight":
            return form.kind.to_matrix(weight).narrow(0, start, length)
        if form.has_bias:
            return layer.attribute(name).narrow(0, start, length)
        return weight.new_zeros(length)

    return own


def _finished(y: Any, port: GraphPort) -> Any:
    """The output in the dtype of the site's own."""
    if port.output is not None:
        return y.to(port.output.dtype)
    return port.function(cast_like, y, port.attribute("weight")) if port.mixed else y


# -------------------------------------------------------------------------------- the code

_COUNTER = iter(range(10**9))


def _compiled(source: str, names: Mapping[str, Any]) -> Callable[..., Tensor]:
    """The function `forward` of some source, whose lines a traceback can show."""
    filename = f"<surgery site {next(_COUNTER)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    scope: dict[str, Any] = dict(names)
    # The source is written by torch.fx from a graph that was built here from an equation; no text
    # of a spec or an artifact is part of it.
    exec(compile(source, filename, "exec"), scope)
    return cast(Callable[..., Tensor], scope["forward"])
