"""A method explained: its definition, and all that the compiler derives from it, at one site.

Nothing here knows a method. The method is put on a layer without data, and what comes of it is what
any model would get.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import cast

import torch
from torch import Tensor, nn

from surgery.algebra.derive import Derived
from surgery.algebra.expr import render
from surgery.algebra.kinds import beyond
from surgery.algebra.scalars import did_you_mean
from surgery.compiling import SpecLike, compile_model, plan, read_spec
from surgery.errors import PlanError, Source, Span, SurgeryError, refuse
from surgery.language import syntax as ast
from surgery.language.library import Library
from surgery.language.parse import parse
from surgery.model.layers import KINDS, LayerKind
from surgery.planned import MERGE_NOTES, SiteClass
from surgery.report import aligned, shown, shown_bytes, shown_shape
from surgery.runtime import Compiled

SITE = "site"
"""The path of the layer that the method is shown on."""

DEFAULT_SIZES = ((1024, 768), (1024, 1024))
"""The [in, out] that is shown where none is asked for; the second where the first does not fit."""

MOST = 2**24
"""The largest size of a layer that can be asked for."""

KERNEL = 3
"""The length of a convolution's kernel along each axis; its `in` is the number of channels."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """A method, and what is derived from it for one layer. `str` is a page, `as_json` plain data.

    signature, definition: as written. about: the comment before it.
    derived: W' and b', or the equations between activations, simplified, by their names.
    parameters, totals, keys, flops: of the one site, in elements, names and operations.
    merge, reason: the merge class, and why there is no merge.
    inverse: W from W', "" where only the base itself leads back. witnesses: what a merge keeps.
    kinds: for each layer kind why the method does not work on it, "" where it does.
    graph, code: the forward of the site as an FX graph, and what runs.
    """

    method: str
    file: str
    signature: str
    about: str
    definition: str
    arguments: Mapping[str, object]
    kind: str
    fan_in: int
    fan_out: int
    derived: Mapping[str, str]
    parameters: tuple[Mapping[str, object], ...]
    totals: Mapping[str, int]
    merge: str
    reason: str
    inverse: str
    witnesses: Mapping[str, str]
    keys: tuple[Mapping[str, object], ...]
    kinds: Mapping[str, str]
    flops: Mapping[str, int] | None
    graph: str
    code: str

    def __str__(self) -> str:
        """A page: the definition, then what follows from it."""
        return "\n".join(_page(self))

    def as_json(self) -> dict[str, object]:
        """Every field by its name, as plain data."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def _plain(value: object) -> object:
    match value:
        case Mapping():
            return dict(cast("Mapping[str, object]", value))
        case tuple():
            return [_plain(v) for v in cast("tuple[object, ...]", value)]
        case _:
            return value


def explain(
    method: str,
    arguments: Mapping[str, object] | None = None,
    *,
    fan_in: int | None = None,
    fan_out: int | None = None,
    kind: str = "linear",
    spec: SpecLike | None = None,
) -> Explanation:
    """What a method is, and what is derived from it.

    arguments: numbers, truths and texts; a text for an argument that is none is an expression.
    fan_in, fan_out: the sizes of the layer, in elements, both or neither; for a convolution its
        channels. kind: of the layer. spec: where the method may be defined, before the library.
    Raises DefinitionError for an unknown method (E121) or argument, PlanError where the method does
    not fit the layer (E301 to E307), E308 for a kind that does not exist or sizes that are none.
    """
    _check_layer(kind, fan_in, fan_out)
    given = () if spec is None else _definitions(read_spec(spec))
    statement = _statement(method, arguments or {}, given)
    asked = ((fan_in, fan_out),) if fan_in and fan_out else DEFAULT_SIZES
    compiled = _first(statement, kind, asked)
    return _explained(compiled, statement)


# ------------------------------------------------------------------------------- the layers


class _Transposed(nn.Module):
    """A layer whose weight is stored as [in, out], without its library."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_in, fan_out))
        self.bias = nn.Parameter(torch.empty(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] to […, out]."""
        return x @ self.weight + self.bias


def _stand_in(qualified: str) -> type[nn.Module]:
    """The class that the table of kinds knows by a name, without the library that has it."""
    module, _, name = qualified.rpartition(".")
    return type(name, (_Transposed,), {"__module__": module, "forward": _Transposed.forward})


def _layer(kind: LayerKind, fan_in: int, fan_out: int) -> nn.Module:
    """A layer of a kind, without data."""
    package, _, name = kind.qualified.rpartition(".")
    constants = (KERNEL,) if kind.input == "patches" else ()
    standard = package.startswith("torch.nn.")
    cls = cast("type[nn.Module]", getattr(nn, name)) if standard else _stand_in(kind.qualified)
    with torch.device("meta"):
        return cast("Callable[..., nn.Module]", cls)(fan_in, fan_out, *constants)


def _on(layer: nn.Module) -> nn.Module:
    model = nn.Module()
    model.add_module(SITE, layer)
    return model


def layer_model(kind: str, fan_in: int, fan_out: int) -> nn.Module:
    """A model that is one layer of a kind, without data, called `site`. KeyError for no kind."""
    return _on(_layer(_BY_NAME[kind], fan_in, fan_out))


_BY_NAME = {kind.name: kind for kind in KINDS}


def _check_layer(kind: str, fan_in: int | None, fan_out: int | None) -> None:
    if kind not in _BY_NAME:
        listed = f"there are: {', '.join(_BY_NAME)}"
        refuse(
            "E308", f"there is no layer kind `{kind}`", hint=did_you_mean(kind, _BY_NAME) or listed
        )
    if (fan_in is None) != (fan_out is None):
        refuse("E308", "a layer has an `in` and an `out`", hint="give both sizes, or neither")
    if any(size is not None and not 1 <= size <= MOST for size in (fan_in, fan_out)):
        refuse("E308", "a layer of such a size cannot be", hint=f"give sizes from 1 to {MOST:,}")


def _first(spec: ast.Spec, kind: str, asked: Sequence[tuple[int, int]]) -> Compiled:
    """The method on the first size that it fits. Raises what is wrong at the first of them."""
    refusal: SurgeryError | None = None
    for fan_in, fan_out in asked:
        try:
            return compile_model(spec, _on(_layer(_BY_NAME[kind], fan_in, fan_out)))
        except PlanError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _kinds(spec: ast.Spec, sizes: tuple[int, int], known: str) -> Mapping[str, str]:
    """For each layer kind why the method cannot be put on it at these sizes, "" where it can."""
    found: dict[str, str] = {}
    for kind in KINDS:
        found[kind.name] = "" if kind.name == known else _refusal(spec, kind, sizes)
    return found


def _refusal(spec: ast.Spec, kind: LayerKind, sizes: tuple[int, int]) -> str:
    try:
        plan(spec, _on(_layer(kind, *sizes)))
    except SurgeryError as error:
        return error.diagnostics[0].message
    return ""


# ------------------------------------------------------------------------------ the statement


def _statement(
    method: str, arguments: Mapping[str, object], definitions: tuple[ast.Statement, ...]
) -> ast.Spec:
    """The spec that puts the method on the one site, with the definitions before it."""
    if not _NAME.fullmatch(method):
        refuse("E121", f"`{method}` is no name of a method", hint="give a name, or a code as E201")
    library = Library.standard().extended(ast.Spec(definitions, span=_NOWHERE))
    found = library.method(method)
    types = {} if found is None else {a.name: a.type for a in found.arguments}
    given = ", ".join(f"{n}={_written(v, types.get(n, ''))}" for n, v in arguments.items())
    parsed = parse(f"match {SITE} apply {method}({given})", "<explain>")
    return ast.Spec((*definitions, *parsed.statements), span=parsed.span)


_NAME = re.compile(r"[A-Za-z_]\w*")
_NOWHERE = Span(Source("<explain>", ""), 0, 0)


def _written(value: object, declared: str) -> str:
    """A value as a spec has it; a text stands for itself where a text is wanted."""
    match value:
        case bool():
            return str(value).lower()
        case str() if declared == "text":
            return f'"{value}"'
        case _:
            return str(value)


def _definitions(spec: ast.Spec) -> tuple[ast.Statement, ...]:
    """What a file defines; the rest of it is not looked at."""
    kinds = ast.Method | ast.Format | ast.Let | ast.Param
    return tuple(s for s in spec.statements if isinstance(s, kinds))


# ------------------------------------------------------------------------------ the derivation


def _explained(compiled: Compiled, spec: ast.Spec) -> Explanation:
    made = compiled.plan
    (site,) = made.sites
    form, derived = site.form, site.form.derived
    source = form.method.span.source
    asked = _asked(form)
    graph = compiled.graphs[site.path]
    work = form.work
    return Explanation(
        method=form.method.name,
        file=source.name,
        signature=" ".join(form.method.span.text.partition("{")[0].split()),
        about=_comment_before(form.method.span),
        definition=form.method.span.text,
        arguments=dict(form.arguments),
        kind=form.kind.name,
        fan_in=asked[0],
        fan_out=asked[1],
        derived=_equations(derived),
        parameters=tuple(_parameters(form)),
        totals={"trainable": made.trainable, "total": made.total, "bytes": made.bytes},
        merge=derived.merge_class,
        reason=derived.reason or MERGE_NOTES[derived.merge_class],
        inverse=_inverse(derived),
        witnesses={name: render(kept) for name, kept in derived.inverse.witnesses},
        keys=tuple(_keys(compiled)),
        kinds=_kinds(spec, asked, form.kind.name),
        flops=None if work is None else {"token": work.token, "call": work.call},
        graph=str(graph),
        code=graph.python_code("self").src,
    )


def _asked(form: SiteClass) -> tuple[int, int]:
    """The sizes as the layer was made of them."""
    patches = form.kind.input == "patches"
    return form.sizes.channels if patches else form.sizes.fan_in, form.sizes.fan_out


def _sizes(told: Explanation) -> str:
    """What it was tried at, as a page has it."""
    if beyond(told.kind):
        return f"hidden={told.fan_out:,}"
    return f"in={told.fan_in:,} out={told.fan_out:,}{_kernel(told)}"


def _comment_before(span: Span) -> str:
    """The lines of comment that end where a definition begins."""
    lines: list[str] = []
    for line in reversed(span.source.text[: span.start].rstrip().splitlines()):
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").removeprefix(" ").rstrip())
    return "\n".join(reversed(lines))


def _equations(derived: Derived) -> Mapping[str, str]:
    """W' and b' where there are such, else the equations as they stand."""
    if derived.merged is not None:
        return {"W'": render(derived.merged.weight), "b'": render(derived.merged.bias)}
    told = derived.equations
    given = {"W'": told.weight, "b'": told.bias, "x'": told.input, "y'": told.output}
    return {name: render(expr) for name, expr in given.items() if expr is not None}


def _inverse(derived: Derived) -> str:
    return "" if derived.inverse.weight is None else render(derived.inverse.weight)


def _parameters(form: SiteClass) -> Iterator[Mapping[str, object]]:
    for p in form.parameters:
        shape = form.shapes[p.name]
        yield {
            "name": p.name,
            "symbolic": [str(length) for length in p.shape],
            "shape": list(shape),
            "count": prod(shape),
            "begins": p.begins,
            "trained": p.trained,
            "shared": p.shared,
            "lr": None if p.rate is None else str(p.rate),
        }


def _keys(compiled: Compiled) -> Iterator[Mapping[str, object]]:
    for row in compiled.mapping.rows:
        formats = {s.format: s.key for s in row.spellings}
        yield {"name": row.name, "adapted": row.adapted, "native": row.native, **formats}


# ------------------------------------------------------------------------------------ a page


def _page(told: Explanation) -> Iterator[str]:
    yield f"{told.signature}   ({told.file})"
    yield from _indented(told.about)
    yield ""
    yield from _indented(told.definition)
    given = ", ".join(f"{n}={shown(v)}" for n, v in told.arguments.items())
    yield ""
    yield f"on {told.kind}, {_sizes(told)}: {given}"
    yield ""
    yield from (f"  {name} = {expr}" for name, expr in told.derived.items())
    yield ""
    yield from _indented("\n".join(aligned([*_rows(told)])))
    yield "  {trainable:,} trainable of {total:,}, {size}".format(
        size=shown_bytes(told.totals["bytes"]), **told.totals
    )
    yield ""
    yield f"merge: {told.merge}; {told.reason}"
    yield from [f"  W = {told.inverse}"] * bool(told.inverse)
    yield from (f"  {name} = {kept}" for name, kept in told.witnesses.items())
    yield from _cost(told)
    yield ""
    yield "keys"
    yield from _indented("\n".join(aligned([*_key_rows(told)])))
    yield ""
    yield f"layer kinds: {', '.join(n for n, reason in told.kinds.items() if not reason)}"
    yield from (f"  not {name}: {reason}" for name, reason in told.kinds.items() if reason)
    yield ""
    yield "forward"
    yield from _indented(told.graph.strip())
    yield ""
    yield from _indented(told.code.strip())


def _kernel(told: Explanation) -> str:
    patches = _BY_NAME[told.kind].input == "patches"
    return f" channels, kernel {KERNEL}" if patches else ""


def _indented(text: str) -> Iterator[str]:
    return (f"  {line}".rstrip() for line in text.splitlines())


def _rows(told: Explanation) -> Iterator[list[str]]:
    yield ["parameter", "shape", "elements", "begins", ""]
    for p in told.parameters:
        symbolic = ", ".join(cast("list[str]", p["symbolic"]))
        shape = f"[{symbolic}] = {shown_shape(cast('list[int]', p['shape']))}"
        role = ("trained" if p["trained"] else "frozen") + (", shared" if p["shared"] else "")
        role += f", lr {p['lr']}" if p["lr"] else ""
        yield [str(p["name"]), shape, f"{p['count']:,}", str(p["begins"]), role]


def _key_rows(told: Explanation) -> Iterator[list[str]]:
    forms = list(dict.fromkeys(form for key in told.keys for form in key if form != "name"))
    yield ["parameter", *forms]
    for key in told.keys:
        yield [str(key["name"]), *(str(key.get(form, "-")) for form in forms)]


def _cost(told: Explanation) -> Iterator[str]:
    if told.flops is not None:
        token, call = told.flops["token"], told.flops["call"]
        once = f", and {call:,} a call" if call else ""
        yield f"forward: {token:,} FLOPs more for each token{once}"
