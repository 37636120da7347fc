"""Selection: against an oracle, and every way it can go wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from surgery.errors import Diagnostic, Report, Source, Span
from surgery.language.syntax import (
    Application,
    Every,
    Expression,
    Glob,
    Index,
    Indices,
    Match,
    Name,
    Number,
    Regex,
    Scope,
    Selector,
    Slice,
    Step,
)
from surgery.model.holder import ADAPTERS, Holder, modules_of
from surgery.model.sites import Site, select, survey


def span_of(text: str) -> Span:
    return Span(Source("<test>", text), 0, len(text))


def selector(text: str) -> Selector:
    if text.startswith("/"):
        return Regex(text[1:-1], span=span_of(text))
    return Glob(text, span=span_of(text))


def number(value: int) -> Number:
    return Number(value, span=span_of(str(value)))


def optional(value: int | None) -> Number | None:
    return None if value is None else number(value)


def indexed(start: int | None = None, stop: int | None = None, step: int | None = None) -> Slice:
    bounds = optional(start), optional(stop), optional(step)
    return Slice(*bounds, span=span_of(f"{start}:{stop}:{step}"))


def listed(*values: int) -> Indices:
    return Indices(tuple(number(v) for v in values), span=span_of(str(values)))


def every() -> Every:
    return Every(span=span_of("*"))


def step(container: str, index: Index | None = None) -> Step:
    return Step(selector(container), index, span=span_of(f"{container}[…]"))


def scope(*steps: Step) -> Scope:
    return Scope(steps, span=span_of(".".join(s.span.text for s in steps)))


def match(
    take: str,
    within: Scope | None = None,
    leave: str | None = None,
    expect: Expression | None = None,
) -> Match:
    method = Application("m", span=span_of("m()"))
    exclude = None if leave is None else selector(leave)
    return Match(selector(take), within, exclude, method, expect, span=span_of("match"))


def values(expression: Expression) -> object:
    match expression:
        case Number(value):
            return value
        case Name("unknown"):
            return None
        case _:
            return "text"


def run(model: nn.Module, statement: Match) -> tuple[tuple[Site, ...], list[Diagnostic]]:
    report = Report()
    sites = select(statement, survey(model), report, values)
    return sites, report.found


def chosen(model: nn.Module, statement: Match) -> list[str]:
    sites, found = run(model, statement)
    assert not [d for d in found if d.severity == "error"], found
    return [site.path for site in sites]


def codes(model: nn.Module, statement: Match) -> list[str]:
    return [d.code for d in run(model, statement)[1]]


def only(model: nn.Module, statement: Match) -> Diagnostic:
    (found,) = run(model, statement)[1]
    return found


# ------------------------------------------------------------------------------------ models


class Box(nn.Module):
    """A module with named children and no forward of its own."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def attention() -> Box:
    return Box(q_proj=nn.Linear(3, 5), k_proj=nn.Linear(3, 5), o_proj=nn.Linear(5, 3))


def block() -> Box:
    mlp = Box(up=nn.Linear(3, 7), down=nn.Linear(7, 3), norm=nn.LayerNorm(3))
    return Box(self_attn=attention(), mlp=mlp)


def stack(count: int) -> Box:
    return Box(
        embed=nn.Embedding(11, 3),
        layers=nn.ModuleList(block() for _ in range(count)),
        head=nn.Linear(3, 11),
    )


def two_stacks() -> Box:
    return Box(encoder=stack(4), decoder=stack(2))


# ------------------------------------------------------------------------------- the oracle

NAMES = ["q", "v", "qv", "a", "layers"]


@st.composite
def trees(draw: st.DrawFn, depth: int = 4) -> nn.Module:
    """A random tree of boxes and lists with linear and norm leaves."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return nn.Linear(2, 3) if draw(st.integers(0, 3)) else nn.LayerNorm(2)
    count = draw(st.integers(1, 3))
    below = [draw(trees(depth=depth - 1)) for _ in range(count)]
    if draw(st.booleans()):
        return nn.ModuleList(below)
    names = draw(st.lists(st.sampled_from(NAMES), min_size=count, max_size=count, unique=True))
    return Box(**dict(zip(names, below, strict=True)))


def takes(pattern: str, path: str) -> bool:
    parts = path.split(".")
    every_tail = (".".join(parts[i:]) for i in range(len(parts)))
    return any(re.fullmatch(pattern, tail) for tail in every_tail)


def parts_of(model: nn.Module, container: str, taken: slice) -> list[str]:
    """The paths of the chosen children of all outermost answers."""
    paths = [path for path, _ in modules_of(model) if path]
    answers = [path for path in paths if takes(container, path)]
    outer = [a for a in answers if not any(a.startswith(f"{b}.") for b in answers)]
    children = [
        [f"{a}.{name}" for name, _ in model.get_submodule(a).named_children()] for a in outer
    ]
    return [path for group in children for path in group[taken]]


def expected(model: nn.Module, pattern: str, leave: str, parts: list[str] | None) -> list[str]:
    linear = [p for p, m in modules_of(model) if isinstance(m, nn.Linear)]
    inside = [
        p for p in linear if parts is None or any(p == e or p.startswith(f"{e}.") for e in parts)
    ]
    return [p for p in inside if takes(pattern, p) and not (leave and takes(leave, p))]


PATTERNS = st.lists(
    st.sampled_from([*NAMES, "q.?", ".*", r"a\.q", r"[0-9]", r"layers\.0"]),
    min_size=1,
    max_size=3,
    unique=True,
)
BOUNDS = st.none() | st.integers(-3, 3)


@settings(deadline=None)
@given(
    model=trees(),
    patterns=PATTERNS,
    leave=st.sampled_from(["", "q", "0", r"layers\..*"]),
    container=st.sampled_from(["", "layers", "a", "[0-9]", ".*"]),
    bounds=st.tuples(BOUNDS, BOUNDS, st.sampled_from([None, 1, 2, -1])),
)
def test_selection_agrees_with_the_oracle(
    model: nn.Module,
    patterns: list[str],
    leave: str,
    container: str,
    bounds: tuple[int | None, int | None, int | None],
) -> None:
    within = scope(step(f"/{container}/", indexed(*bounds))) if container else None
    parts = parts_of(model, container, slice(*bounds)) if container else None
    exclude = f"/{leave}/" if leave else None
    results: list[list[str]] = []
    for ordered in (patterns, patterns[::-1]):
        sites, found = run(model, match(f"/{'|'.join(ordered)}/", within, exclude))
        results.append([site.path for site in sites])
        everything = expected(model, "|".join(patterns), "", parts)
        errors = [d.code for d in found if d.severity == "error"]
        empty = [p for p in patterns if not expected(model, p, "", parts)]
        if parts == []:
            assert errors in (["E203"], ["E205"])
        else:
            assert (errors.count("E201") > 0) == bool(empty or not results[-1])
        dead = bool(leave and everything and results[-1] == everything)
        assert ("E202" in errors) == dead
    assert results[0] == results[1] == expected(model, "|".join(patterns), leave, parts)


# --------------------------------------------------------------------------- what is selected


def test_the_whole_of_a_tail_must_match() -> None:
    model = stack(2)
    assert chosen(model, match("/q_proj/")) == [f"layers.{i}.self_attn.q_proj" for i in range(2)]
    assert len(chosen(model, match("/.*proj/"))) == 6
    assert chosen(model, match("0.mlp.*")) == ["layers.0.mlp.up", "layers.0.mlp.down"]
    assert codes(model, match("/q/")) == ["E201"]


def test_sites_come_in_module_order_whatever_the_order_of_alternatives() -> None:
    model = stack(3)
    assert chosen(model, match("{q_proj,head,up}")) == chosen(model, match("{up,head,q_proj}"))
    paths = chosen(model, match("**"))
    assert paths == [p for p, m in modules_of(model) if isinstance(m, nn.Linear | nn.Embedding)]


@pytest.mark.parametrize(
    ("index", "layers"),
    [
        (every(), [0, 1, 2, 3]),
        (indexed(1, 3), [1, 2]),
        (indexed(-2), [2, 3]),
        (indexed(None, None, 2), [0, 2]),
        (indexed(None, None, -1), [0, 1, 2, 3]),
        (listed(-1, 0, 0), [0, 3]),
    ],
)
def test_indices_are_those_of_python(index: Index, layers: Sequence[int]) -> None:
    sites, found = run(stack(4), match("q_proj", scope(step("layers", index))))
    assert not found
    assert [site.layer for site in sites] == list(layers)
    assert {site.container for site in sites} == {"layers"}


def test_every_container_that_answers_counts() -> None:
    sites, _ = run(two_stacks(), match("q_proj", scope(step("layers", every()))))
    assert [site.container for site in sites] == ["encoder.layers"] * 4 + ["decoder.layers"] * 2
    assert [site.layer for site in sites] == [0, 1, 2, 3, 0, 1]


def test_several_steps_each_below_the_one_before() -> None:
    model = Box(
        encoder=Box(
            layers=nn.ModuleList(Box(experts=nn.ModuleList([block(), block()])) for _ in range(3))
        ),
        decoder=Box(layers=nn.ModuleList(Box(experts=nn.ModuleList([block()])) for _ in range(3))),
    )
    within = scope(step("encoder.layers", indexed(0, 2)), step("experts", listed(1)))
    sites, found = run(model, match("up", within))
    assert not found
    assert [site.path for site in sites] == [f"encoder.layers.{i}.experts.1.mlp.up" for i in (0, 1)]
    assert [site.layer for site in sites] == [0, 1]
    assert sites[0].container == "encoder.layers.0.experts"


def test_a_step_without_an_index_is_the_container_itself() -> None:
    sites, _ = run(two_stacks(), match("q_proj", scope(step("decoder"))))
    assert [(site.path, site.layer) for site in sites] == [
        (f"decoder.layers.{i}.self_attn.q_proj", i) for i in range(2)
    ]
    assert chosen(stack(2), match("*", scope(step("head")))) == ["head"]


def test_the_layer_is_the_index_in_the_outermost_list() -> None:
    inner = Box(layer=nn.ModuleList([attention(), attention()]))
    model = Box(block=nn.ModuleList([inner]), head=nn.Linear(3, 2))
    sites, _ = run(model, match("{q_proj,head}"))
    assert [site.layer for site in sites] == [0, 0, None]
    sites, _ = run(model, match("q_proj", scope(step("layer", every()))))
    assert [site.layer for site in sites] == [0, 1]


def test_a_site_says_what_it_is() -> None:
    model = Box(conv=nn.Conv2d(4, 6, (3, 5), groups=2, bias=False, dtype=torch.float64))
    ((site,), _) = run(model, match("conv"))
    assert (site.kind.name, site.has_bias, site.dtype) == ("conv2d", False, torch.float64)
    assert (site.sizes.fan_in, site.sizes.fan_out, site.sizes.channels) == (30, 6, 2)
    assert site.geometry is not None
    assert site.module is model.get_submodule("conv")
    with torch.device("meta"):
        model = Box(h=Conv1D(7, 3))
    ((site,), _) = run(model, match("h"))
    assert (site.kind.name, site.device.type, site.has_bias) == ("transposed_linear", "meta", True)
    assert (site.sizes.fan_in, site.sizes.fan_out) == (3, 7)


def test_the_root_can_be_a_site() -> None:
    ((site,), _) = run(nn.Linear(2, 3), match("**"))
    assert (site.path, site.layer) == ("", None)


def test_nothing_below_adapters_is_a_site() -> None:
    model = stack(1)
    holder = Holder()
    holder.add_module("default", nn.Linear(3, 3))
    model.get_submodule("layers.0.self_attn.q_proj").add_module(ADAPTERS, holder)
    assert chosen(model, match("**")) == chosen(stack(1), match("**"))


class Mounted(nn.Linear):
    surgery_base = nn.Linear

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)


def test_mounted_classes_are_looked_through() -> None:
    ((site,), found) = run(Box(q=Mounted(2, 3)), match("q"))
    assert not found
    assert site.kind.name == "linear"


def test_a_module_of_several_names_is_one_site() -> None:
    shared = block()
    model = Box(layers=nn.ModuleList([shared, shared, shared]))
    assert chosen(model, match("q_proj")) == ["layers.0.self_attn.q_proj"]
    sites, _ = run(model, match("2.self_attn.q_proj", scope(step("layers", listed(2)))))
    assert [(s.path, s.layer) for s in sites] == [("layers.0.self_attn.q_proj", 2)]


# -------------------------------------------------------------------------------- what is wrong


def test_nothing_selected_names_the_nearest_in_the_scope() -> None:
    found = only(stack(3), match("/q_porj|up/", scope(step("layers", indexed(0, 2)))))
    assert found.code == "E201"
    assert found.span is not None
    assert found.span.text == "q_porj"
    assert "did you mean `q_proj`? 2 modules have that name in layers" in found.label
    found = only(stack(3), match("{up,self_atn.q_proj}"))
    assert "`self_attn.q_proj`" in found.label


def test_nothing_selected_says_what_is_elsewhere() -> None:
    found = only(stack(3), match("head", scope(step("layers", every()))))
    assert found.code == "E201"
    assert "outside" in found.hint
    assert "`head`" in found.hint
    found = only(stack(3), match("mlp"))
    assert "is a Box, which owns no weight matrix" in found.hint
    assert "`mlp.**`" in found.hint


def test_a_parameter_is_not_a_site() -> None:
    model = stack(1)
    model.register_parameter("gate_up", nn.Parameter(torch.zeros(2, 3, 5)))
    found = only(model, match("gate_up"))
    assert "`gate_up` is a parameter of a Box" in found.hint


def test_every_dead_alternative_is_told() -> None:
    assert codes(stack(2), match("{up,left,right}")) == ["E201", "E201"]


def test_an_exception_must_remove_something() -> None:
    model = stack(2)
    assert len(chosen(model, match("*", leave="{embed,head}"))) == 10
    found = only(model, match("mlp.*", leave="{up,dwn}"))
    assert found.code == "E202"
    assert found.span is not None
    assert found.span.text == "dwn"
    assert "`down`" in found.label
    assert codes(model, match("up", leave="mlp.up")) == ["E201"]


@pytest.mark.parametrize(
    ("within", "code"),
    [
        (scope(step("layer", every())), "E203"),
        (scope(step("layers", every()), step("experts")), "E203"),
        (scope(step("{layers,nothing}", every())), "E203"),
        (scope(step("layers", listed(0, 3))), "E204"),
        (scope(step("layers", listed(-4))), "E204"),
        (scope(step("layers", indexed(None, None, 0))), "E204"),
        (scope(step("layers", indexed(2, 1))), "E205"),
        (scope(step("q_proj", every())), "E205"),
    ],
)
def test_a_scope_that_is_not_there(within: Scope, code: str) -> None:
    found = only(stack(3), match("up", within))
    assert (found.code, found.severity) == (code, "error")
    assert not run(stack(3), match("up", within))[0]


def test_a_container_that_is_not_there_names_the_nearest_or_the_lists() -> None:
    assert (
        "did you mean `layers`? 2 modules"
        in only(two_stacks(), match("up", scope(step("layer")))).label
    )
    found = only(two_stacks(), match("up", scope(step("z"))))
    assert found.hint == "here are `layers` (2)"


def test_an_index_past_the_end_tells_the_length() -> None:
    found = only(stack(3), match("up", scope(step("layers", listed(3)))))
    assert "3 children, 0 to 2" in found.label
    assert found.message == "`layers` has no child 3"


@pytest.mark.parametrize("bounds", [(0, 4), (-4, None), (1, 9)])
def test_a_slice_past_the_end_is_a_warning(bounds: tuple[int | None, int | None]) -> None:
    statement = match("up", scope(step("layers", indexed(*bounds))))
    found = only(stack(3), statement)
    assert (found.code, found.severity) == ("E205", "warning")
    assert run(stack(3), statement)[0]


def test_an_index_is_a_whole_number_that_is_known() -> None:
    text = Indices((Name("text", span=span_of("text")),), span=span_of("[text]"))
    assert codes(stack(3), match("up", scope(step("layers", text)))) == ["E204"]
    unknown = Indices((Name("unknown", span=span_of("unknown")),), span=span_of("[unknown]"))
    assert run(stack(3), match("up", scope(step("layers", unknown)))) == ((), [])


def test_expect() -> None:
    model = stack(3)
    assert len(chosen(model, match("up", expect=number(3)))) == 3
    found = only(model, match("{up,head}", expect=number(3)))
    assert found.code == "E206"
    assert found.message == "expected 3 sites, found 4"
    assert "`up` (3), `head` (1)" in found.hint
    assert codes(model, match("up", expect=Name("text", span=span_of("text")))) == ["E206"]
    assert codes(model, match("up", expect=Name("unknown", span=span_of("unknown")))) == []


def test_ties_are_refused_and_both_are_named() -> None:
    model = stack(1)
    cast(nn.Linear, model.head).weight = cast(nn.Embedding, model.embed).weight
    found = only(model, match("head"))
    assert found.code == "E207"
    assert "`head`" in found.message
    assert "`embed.weight`" in found.message
    assert codes(model, match("{head,embed}")) == ["E207", "E207"]
    assert codes(model, match("*", leave="{head,embed}")) == []


def test_data_that_is_shared_is_a_tie_too() -> None:
    model = Box(a=nn.Linear(2, 3), b=nn.Linear(2, 3), c=nn.Linear(2, 3))
    cast(nn.Linear, model.b).weight.data = cast(nn.Linear, model.a).weight.data
    assert codes(model, match("{a,b}")) == ["E207", "E207"]
    assert codes(model, match("c")) == []


class Scaled(nn.Embedding):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


class Standardised(nn.Conv2d):
    def _conv_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super()._conv_forward(*args, **kwargs)


@pytest.mark.parametrize(
    "module", [Scaled(2, 3), Standardised(2, 3, 1), nn.Conv3d(2, 3, 1), nn.Bilinear(2, 3, 5)]
)
def test_an_unknown_forward_is_refused(module: nn.Module) -> None:
    model = Box(good=nn.Linear(2, 3), odd=module, again=module)
    found = only(model, match("*"))
    assert found.code == "E208"
    assert type(module).__name__ in found.message
    assert "except odd" in found.hint
    assert chosen(model, match("*", leave="odd")) == ["good"]
    assert [site.path for site in run(model, match("*"))[0]] == ["good"]


def parametrized() -> nn.Module:
    module = nn.Linear(2, 2)
    nn.utils.parametrizations.orthogonal(module)
    return module


def replaced() -> nn.Module:
    module = nn.Linear(2, 3)
    vars(module)["forward"] = lambda x: x  # pyright: ignore[reportUnknownLambdaType]
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Embedding(3, 2, max_norm=1.0), "max_norm"),
        (parametrized(), "parametrization"),
        (replaced(), "replaced on the instance"),
    ],
)
def test_a_module_that_cannot_be_adapted_says_why(module: nn.Module, reason: str) -> None:
    found = only(Box(odd=module), match("odd"))
    assert found.code == "E209"
    assert reason in found.message


class Encoder(nn.TransformerEncoderLayer):
    """A subclass inherits the fast path."""


def test_children_that_are_never_called_are_refused() -> None:
    model = nn.TransformerEncoder(Encoder(4, 2, 6, batch_first=True), 2)
    found = run(model, match("*"))[1]
    assert [d.code for d in found] == ["E210", "E210", "E210"]
    assert "(and 1 more)" in found[0].message
    assert codes(Box(out_proj=nn.Linear(2, 3)), match("out_proj")) == []
