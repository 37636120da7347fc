"""Selection: what a statement means on a model, and every way it can go wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from surgery.errors import Diagnostic, Report
from surgery.language.parse import parse
from surgery.language.syntax import Expression, Match, Name, Number, Unary
from surgery.model.facts import Facts
from surgery.model.holder import ADAPTERS, Holder, modules_of
from surgery.model.sites import Site, select, survey


def match(take: str, within: str = "", leave: str = "", expect: str = "") -> Match:
    clauses = {"match": take, "in": within, "except": leave, "apply": "m()", "expect": expect}
    text = " ".join(f"{word} {clause}" for word, clause in clauses.items() if clause)
    (statement,) = parse(text).statements
    assert isinstance(statement, Match)
    return statement


def values(expression: Expression) -> object:
    match expression:
        case Number(value):
            return value
        case Unary("-", operand):
            return -cast(int, values(operand))
        case Name("unknown"):
            return None
        case _:
            return "text"


def holds(where: Expression, facts: Facts) -> bool | None:
    raise AssertionError(where, facts)


def run(model: nn.Module, statement: Match) -> tuple[tuple[Site, ...], list[Diagnostic]]:
    report = Report()
    sites = select(statement.selection, survey(model), report, values, holds)
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
        ("*", [0, 1, 2, 3]),
        ("1:3", [1, 2]),
        ("-2:", [2, 3]),
        ("::2", [0, 2]),
        ("::-1", [0, 1, 2, 3]),
        ("-1, 0, 0", [0, 3]),
    ],
)
def test_indices_are_those_of_python(index: str, layers: Sequence[int]) -> None:
    sites, found = run(stack(4), match("q_proj", f"layers[{index}]"))
    assert not found
    assert [site.layer for site in sites] == list(layers)
    assert {site.container for site in sites} == {"layers"}


def test_every_container_that_answers_counts() -> None:
    sites, _ = run(two_stacks(), match("q_proj", "layers[*]"))
    assert [site.container for site in sites] == ["encoder.layers"] * 4 + ["decoder.layers"] * 2
    assert [site.layer for site in sites] == [0, 1, 2, 3, 0, 1]


def test_several_steps_each_below_the_one_before() -> None:
    model = Box(
        encoder=Box(
            layers=nn.ModuleList(Box(experts=nn.ModuleList([block(), block()])) for _ in range(3))
        ),
        decoder=Box(layers=nn.ModuleList(Box(experts=nn.ModuleList([block()])) for _ in range(3))),
    )
    within = "encoder.layers[0:2].experts[1]"
    sites, found = run(model, match("up", within))
    assert not found
    assert [site.path for site in sites] == [f"encoder.layers.{i}.experts.1.mlp.up" for i in (0, 1)]
    assert [site.layer for site in sites] == [0, 1]
    assert sites[0].container == "encoder.layers.0.experts"


def test_a_step_without_an_index_is_the_container_itself() -> None:
    sites, _ = run(two_stacks(), match("q_proj", "decoder"))
    assert [(site.path, site.layer) for site in sites] == [
        (f"decoder.layers.{i}.self_attn.q_proj", i) for i in range(2)
    ]
    assert chosen(stack(2), match("*", "head")) == ["head"]


def test_the_layer_is_the_index_in_the_outermost_list() -> None:
    inner = Box(layer=nn.ModuleList([attention(), attention()]))
    model = Box(block=nn.ModuleList([inner]), head=nn.Linear(3, 2))
    sites, _ = run(model, match("{q_proj,head}"))
    assert [site.layer for site in sites] == [0, 0, None]
    sites, _ = run(model, match("q_proj", "layer[*]"))
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
    sites, _ = run(model, match("2.self_attn.q_proj", "layers[2]"))
    assert [(s.path, s.layer) for s in sites] == [("layers.0.self_attn.q_proj", 2)]


# -------------------------------------------------------------------------------- what is wrong


def test_nothing_selected_names_the_nearest_in_the_scope() -> None:
    found = only(stack(3), match("/q_porj|up/", "layers[0:2]"))
    assert found.code == "E201"
    assert found.span is not None
    assert found.span.text == "q_porj"
    assert "did you mean `q_proj`? 2 modules have that name in layers" in found.label
    found = only(stack(3), match("{up,self_atn.q_proj}"))
    assert "`self_attn.q_proj`" in found.label


def test_nothing_selected_says_what_is_elsewhere() -> None:
    found = only(stack(3), match("head", "layers[*]"))
    assert found.code == "E201"
    assert "outside" in found.hint
    assert "`head`" in found.hint
    found = only(stack(3), match("mlp"))
    assert "is a Box, which owns no weight matrix" in found.hint
    assert "`mlp.**`" in found.hint


def test_a_parameter_is_a_site_where_it_is_named() -> None:
    model = stack(1)
    every = chosen(model, match("*"))
    model.register_parameter("gate_up", nn.Parameter(torch.zeros(2, 3, 5)))
    model.register_parameter("vector", nn.Parameter(torch.zeros(2)))
    assert chosen(model, match("gate_up")) == ["gate_up"]
    assert chosen(model, match("gate_*")) == ["gate_up"]
    assert chosen(model, match("*")) == every  # nothing is known of it
    found = only(model, match("vector"))
    assert "`vector` is a parameter of a Box, and no matrix; `train` takes it" in found.hint


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
        ("layer[*]", "E203"),
        ("layers[*].experts", "E203"),
        ("{layers,nothing}[*]", "E203"),
        ("layers[0, 3]", "E204"),
        ("layers[-4]", "E204"),
        ("layers[::0]", "E204"),
        ("layers[2:1]", "E214"),
        ("q_proj[*]", "E214"),
    ],
)
def test_a_scope_that_is_not_there(within: str, code: str) -> None:
    found = only(stack(3), match("up", within))
    assert (found.code, found.severity) == (code, "error")
    assert not run(stack(3), match("up", within))[0]


def test_a_container_that_is_not_there_names_the_nearest_or_the_lists() -> None:
    assert "did you mean `layers`? 2 modules" in only(two_stacks(), match("up", "layer")).label
    found = only(two_stacks(), match("up", "z"))
    assert found.hint == "here are `layers` (2)"


def test_an_index_past_the_end_tells_the_length() -> None:
    found = only(stack(3), match("up", "layers[3]"))
    assert "3 children, 0 to 2" in found.label
    assert found.message == "`layers` has no child 3"


@pytest.mark.parametrize("bounds", ["0:4", "-4:", "1:9"])
def test_a_slice_past_the_end_is_a_warning(bounds: str) -> None:
    statement = match("up", f"layers[{bounds}]")
    found = only(stack(3), statement)
    assert (found.code, found.severity) == ("E205", "warning")
    assert run(stack(3), statement)[0]


def test_an_index_is_a_whole_number_that_is_known() -> None:
    assert codes(stack(3), match("up", "layers[text]")) == ["E204"]
    assert run(stack(3), match("up", "layers[unknown]")) == ((), [])


def test_expect() -> None:
    model = stack(3)
    assert len(chosen(model, match("up", expect="3"))) == 3
    found = only(model, match("{up,head}", expect="3"))
    assert found.code == "E206"
    assert found.message == "expected 3 sites, found 4"
    assert "`up` (3), `head` (1)" in found.hint
    assert codes(model, match("up", expect="text")) == ["E206"]
    assert codes(model, match("up", expect="unknown")) == []


def test_ties_are_refused_and_both_are_named() -> None:
    model = stack(1)
    cast(nn.Linear, model.head).weight = cast(nn.Embedding, model.embed).weight
    found = only(model, match("head"))
    assert found.code == "E207"
    assert "`head`" in found.message
    assert "`embed.weight`" in found.message
    assert "`share`" in found.hint
    assert "`untie`" in found.hint
    assert only(model, match("{up,head}")).hint.endswith("; or leave it out: `except head`")
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


@pytest.mark.parametrize("module", [nn.ConvTranspose1d(2, 3, 1), nn.Bilinear(2, 3, 5)])
def test_an_unknown_weight_is_refused(module: nn.Module) -> None:
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
    ],
)
def test_a_module_that_cannot_be_adapted_says_why(module: nn.Module, reason: str) -> None:
    found = only(Box(odd=module), match("odd"))
    assert found.code == "E209"
    assert reason in found.message


class Encoder(nn.TransformerEncoderLayer):
    """A subclass inherits the fast path."""


def modes(model: nn.Module) -> dict[str, str]:
    sites, found = run(model, match("*"))
    assert not found
    return {site.path.rpartition(".")[2]: site.mode for site in sites}


def test_children_that_are_never_called_are_adapted_by_their_weights() -> None:
    model = nn.TransformerEncoder(Encoder(4, 2, 6, batch_first=True), 2)
    assert modes(model) == dict.fromkeys(
        ("in_proj_weight", "out_proj", "linear1", "linear2"), "value"
    )
    assert modes(Box(out_proj=nn.Linear(2, 3))) == {"out_proj": "call"}


@pytest.mark.parametrize("module", [Scaled(2, 3), Standardised(2, 3, 1), replaced()])
def test_a_forward_that_no_row_knows_is_adapted_by_its_weight(module: nn.Module) -> None:
    assert modes(Box(good=nn.Linear(2, 3), odd=module)) == {"good": "call", "odd": "value"}
