"""One class of sites → one `fx.Graph`: the interpreter run over proxies.

The graph has one `base` call, which is the site's own layer, and the adapter's nodes around it. It
is made once for all sites that are alike, and compiled once to straight-line code.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.fx.proxy import GraphAppendingTracer

from surgery.algebra.expr import Expr
from surgery.algebra.interpret import Domain, Interpreter, Unlowerable
from surgery.errors import Report
from surgery.model.holder import ADAPTERS, SHARED
from surgery.model.layers import InputForm
from surgery.plan import Plan, SiteClass


@dataclass(frozen=True)
class Lowering:
    """What a graph depends on: the class of site, the adapter's name, the shared parameters.

    banks: for each shared parameter, the holder's name below `SHARED` and its stored shape.
    """

    form: SiteClass
    adapter: str
    banks: tuple[tuple[str, str, tuple[int, ...]], ...] = ()

    def __deepcopy__(self, memo: dict[int, object]) -> Lowering:
        """Itself, since it is immutable and shared by all sites that are alike."""
        return self


@dataclass(frozen=True)
class SiteGraph:
    """A lowered class of sites: its graph, its source, and the function compiled from it.

    run: `run(module, input)`, the forward of a mounted site.
    """

    graph: fx.Graph
    source: str
    run: Callable[..., Tensor]


def cast_like(x: Tensor, other: Tensor) -> Tensor:
    """X in the dtype of another; as it is under autocast, which casts where it must.

    The dtype is read when it runs: the model may have been cast since it was adapted.
    """
    if torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(other.dtype)


@lru_cache(maxsize=4096)
def lower(key: Lowering) -> SiteGraph:
    """The graph of a class of sites. Raises `Unlowerable` where an equation cannot run there."""
    graph = _build(key)
    code = graph.python_code("self")
    return SiteGraph(graph, code.src, _compiled(code.src, code.globals))


def check(plan: Plan) -> None:
    """Lower every class of sites of a plan. Raises PlanError (E305) with all that cannot run."""
    report = Report()
    seen: set[int] = set()
    for site in plan.sites:
        if id(site.form) in seen:
            continue
        seen.add(id(site.form))
        try:
            lower(key_of(plan, site.form, site.adapter))
        except Unlowerable as obstacle:
            report.error(
                "E305",
                f"{site.form.method.name} cannot run on `{site.path}` ({site.form.kind.name}): "
                f"{obstacle}",
                site.span,
                hint="exclude such sites with `except`",
            )
    report.stop()


def key_of(plan: Plan, form: SiteClass, adapter: str) -> Lowering:
    """What the graph of a site of this class is looked up by."""
    shared = {s.key: s for s in plan.shared}
    keys = {p.name: (adapter, form.method.name, form.arguments, p.name) for p in form.parameters}
    banks = tuple(
        (name, plan.groups[key], shared[key].shape) for name, key in keys.items() if key in shared
    )
    return Lowering(form, adapter, banks)


# ------------------------------------------------------------------------------- the graph


class _Value(fx.Proxy):
    """A value in the graph.

    Whatever is called with one is a function: a method of it never comes this way. `fx.Proxy` would
    ask torch, which makes a table of all that can be overridden for the answer.
    """

    @classmethod
    def __torch_function__(
        cls,
        orig_method: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> fx.Proxy:
        del types
        found: list[fx.Proxy] = []
        map_aggregate(cast(Any, (args, kwargs)), lambda a: _noted(a, found))
        return found[0].tracer.create_proxy("call_function", orig_method, args or (), kwargs or {})


def _noted(value: Any, found: list[fx.Proxy]) -> Any:
    if isinstance(value, fx.Proxy):
        found.append(value)
    return value


class _Tracer(GraphAppendingTracer):
    """Appends to a graph, in values of the class above."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)


class _GraphPort:
    """What a site offers, as nodes of a graph."""

    def __init__(self, graph: fx.Graph, tracer: GraphAppendingTracer, form: SiteClass) -> None:
        self.form_class = form
        self.form: InputForm = form.kind.input
        self.groups = form.sizes.groups
        self.mixed = form.dtype != form.base_dtype
        self.graph = graph
        self.tracer = tracer
        self.output: Any = None
        self.anchor: Callable[[], Any] = lambda: None  # some tensor of the parameters' dtype
        self._cast: dict[Any, Any] = {}

    def attribute(self, path: str) -> Any:
        """A node that reads an attribute of the site."""
        return self.tracer.proxy(self.graph.get_attr(path))

    def function(self, target: Callable[..., Any], *args: Any) -> Any:
        """A node that calls a function which proxies do not see by themselves."""
        return self.tracer.create_proxy("call_function", target, args, {})

    def base(self, x: Any, changed: bool) -> Any:
        """The site's own layer."""
        if changed and self.mixed and self.form != "indices":
            x = self.function(cast_like, x, self.attribute("weight"))
        self.output = self.tracer.create_proxy("call_module", "base", (x,), {})
        return self.form_class.kind.features_last(self.output)

    def apply(self, matrix: Any, x: Any, whole: bool) -> Any:
        """A whole matrix on the input."""
        form = self.form_class
        if self.form != "indices":
            x = self.features(x)
        return form.kind.apply(matrix, x, form.sizes, form.geometry, whole)

    def features(self, x: Any) -> Any:
        """The input in the dtype of the parameters."""
        if not self.mixed:
            return x
        if x not in self._cast:
            self._cast[x] = self.function(cast_like, x, self.anchor())
        return self._cast[x]

    def widen(self, y: Any) -> Any:
        """The layer's output in the dtype of the parameters."""
        return self.function(cast_like, y, self.anchor()) if self.mixed else y

    def scale_channels(self, x: Any, factors: Any) -> Any:
        """Patches times a factor a channel."""
        scale = self.form_class.kind.scale
        assert scale is not None
        return scale(self.features(x), factors, self.form_class.sizes)

    def training(self) -> Any:
        """Whether the site is in training mode, read when it runs."""
        return self.attribute("training")


def _build(key: Lowering) -> fx.Graph:
    form = key.form
    graph = fx.Graph()
    tracer = _Tracer(graph)
    x = tracer.proxy(graph.placeholder(form.kind.argument))
    port = _GraphPort(graph, tracer, form)
    leaves = _Leaves(key, port)
    port.anchor = leaves.anchor
    domain = Domain(form.names, leaves, leaves.anchor)
    y = Interpreter(domain, port, form.has_bias).run(form.derived, cast(Tensor, x))
    graph.output(_finished(cast(Any, y), port).node)
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    graph.lint()
    return graph


def _finished(y: Any, port: _GraphPort) -> Any:
    """The output in the layout and dtype of the site's own."""
    form = port.form_class
    y = form.kind.features_back(y)
    if port.output is not None:
        return y.to(port.output.dtype)
    return port.function(cast_like, y, port.attribute("weight")) if port.mixed else y


class _Leaves:
    """The tensors an equation reads, as nodes, each read once."""

    def __init__(self, key: Lowering, port: _GraphPort) -> None:
        self.key = key
        self.port = port
        self.banks = {name: (group, shape) for name, group, shape in key.banks}
        self.read: dict[Expr, Any] = {}
        self.parameters: dict[str, Any] = {}

    def __call__(self, expr: Expr) -> Tensor:
        if expr not in self.read:
            self.read[expr] = self._leaf(expr)
        return self.read[expr]

    def anchor(self) -> Tensor:
        """Some tensor of the dtype and device of the parameters."""
        names = [p.name for p in self.key.form.parameters]
        if not names:
            return self._own("weight")
        return self._parameter(next((n for n in names if n not in self.banks), names[0]))

    def _leaf(self, expr: Expr) -> Any:
        match expr.op:
            case "parameter":
                return self._parameter(expr.text("name"))
            case "weight":
                return self.key.form.kind.to_matrix(self._own("weight"))
            case _:
                return self._own(expr.op)

    def _own(self, name: str) -> Any:
        tensor, form = self.port.attribute(name), self.key.form
        if not self.port.mixed:
            return tensor
        return tensor.to(cast(Any, self.anchor()).dtype if form.parameters else form.dtype)

    def _parameter(self, name: str) -> Any:
        if name not in self.parameters:
            self.parameters[name] = self._read(name)
        return self.parameters[name]

    def _read(self, name: str) -> Any:
        if name not in self.banks:
            return self.port.attribute(f"{ADAPTERS}.{self.key.adapter}.{name}")
        group, stored = self.banks[name]
        tensor = self.port.attribute(f"{ADAPTERS}.{self.key.adapter}.{SHARED}.{group}.{name}")
        for axis, length in enumerate(self.key.form.shapes[name]):
            if length != stored[axis]:
                tensor = tensor.narrow(axis, 0, length)
        return tensor


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
