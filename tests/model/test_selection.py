"""The clauses of a statement: what each leaves, what each says if it is wrong, what is lifted."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import Diagnostic, SurgeryError


class Box(nn.Module):
    """A module with named children and no forward of its own."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class TinyRMSNorm(nn.LayerNorm):
    """A norm by its class's name."""


class Wide(nn.Linear):
    """A Linear of another name."""


def block() -> Box:
    return Box(
        self_attn=Box(q_proj=nn.Linear(3, 5), k_proj=Wide(3, 5), o_proj=nn.Linear(5, 3)),
        mlp=Box(up=nn.Linear(3, 7, dtype=torch.bfloat16), down=nn.Linear(7, 3)),
        norm=TinyRMSNorm(3),
    )


def stack(count: int = 3) -> Box:
    return Box(
        embed_tokens=nn.Embedding(11, 3),
        layers=nn.ModuleList(block() for _ in range(count)),
        lm_head=nn.Linear(3, 11),
    )


def chosen(clauses: str, before: str = "", model: nn.Module | None = None) -> list[str]:
    """The paths that `match CLAUSES` takes, with other statements before it."""
    text = f"{before} match {clauses} apply ia3()"
    return [site.path for site in surgery.plan(text, model or stack()).sites]


def wrong(text: str, model: nn.Module | None = None) -> tuple[Diagnostic, ...]:
    with pytest.raises(SurgeryError) as caught:
        surgery.plan(text, model or stack())
    return caught.value.diagnostics


def each(*names: str) -> list[str]:
    return [f"layers.{i}.{name}" for i in range(3) for name in names]


QUERY, KEY, OUTPUT = "self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"

# --------------------------------------------------------------------------------- set algebra


@pytest.mark.parametrize(
    ("clauses", "wanted"),
    [
        ("q_proj | up", each(QUERY, "mlp.up")),
        ("up | q_proj | up", each(QUERY, "mlp.up")),
        ("*_proj & not q_proj", each(KEY, OUTPUT)),
        ("not (*_proj | mlp.*)", ["embed_tokens", "lm_head"]),
        ("self_attn.* & (q_proj | up | down)", each(QUERY)),
        ("q_proj | mlp.* & up", each(QUERY, "mlp.up")),
        ("not not up", each("mlp.up")),
        ("up in layers[0] | layers[2]", ["layers.0.mlp.up", "layers.2.mlp.up"]),
        ("up in layers[1:] | layers[*]", each("mlp.up")),
        (
            "mlp.* | *_proj except up | (q_proj | k_proj) & not k_proj | o_proj",
            each(KEY, "mlp.down"),
        ),
    ],
)
def test_selectors_are_sets(clauses: str, wanted: list[str]) -> None:
    assert chosen(clauses) == wanted


def test_the_first_scope_that_a_site_lies_in_says_its_layer() -> None:
    experts = nn.ModuleList([Box(up=nn.Linear(2, 3)), Box(up=nn.Linear(2, 3))])
    model = Box(layers=nn.ModuleList([Box(experts=experts)]))
    one, other = "layers[*]", "experts[*]"
    for scopes, wanted in ((f"{one} | {other}", [0, 0]), (f"{other} | {one}", [0, 1])):
        plan = surgery.plan(f"match up in {scopes} apply ia3()", model)
        assert [site.site.layer for site in plan.sites] == wanted


# --------------------------------------------------------------------------------------- where


@pytest.mark.parametrize(
    ("clauses", "wanted"),
    [
        ("** where type == Embedding", ["embed_tokens"]),
        ("** where type != Linear", ["embed_tokens"]),
        ("*_proj where type == Wide", each(KEY)),
        ("*_proj where type == Linear", each(QUERY, KEY, OUTPUT)),
        ("** where name == q_proj", each(QUERY)),
        ('** where name == "q_proj" or path == lm_head', [*each(QUERY), "lm_head"]),
        ("** where dtype == bfloat16", each("mlp.up")),
        ("up where layer > 0", each("mlp.up")[1:]),
        ("** where layer >= 0 and in > out", each(OUTPUT, "mlp.down")),
        ("** where not layer >= 0 or in == 7", each("mlp.down")),
        ("** where in == out + 2", each(OUTPUT)),
        ("** where numel == 33 and type == Linear", ["lm_head"]),
        ("** where not tied and numel > 21", ["embed_tokens", "lm_head"]),
        ("mlp.* in layers[1:] where layer % 2 == 0", each("mlp.up", "mlp.down")[4:]),
    ],
)
def test_where_holds_for_what_is_left(clauses: str, wanted: list[str]) -> None:
    assert chosen(clauses) == wanted


def test_where_reads_params_and_lets() -> None:
    before = 'param from: int = 1 let last = from + layer let wanted = "q_proj"'
    assert chosen("q_proj where layer >= from", before) == each(QUERY)[1:]
    assert chosen("q_proj where last == 3", before) == each(QUERY)[2:]
    assert chosen("** where name == wanted", before) == each(QUERY)
    # Without a layer a let that asks for one has no value, and what asks for it does not hold.
    assert chosen("** where last > 0 and type != Linear or name == up", before) == each("mlp.up")


def test_a_word_that_the_spec_defines_is_no_text() -> None:
    assert chosen("** where name == up", 'let up = "down"') == each("mlp.down")
    (found,) = wrong("let up = 3 match ** where name == up apply ia3()")
    assert (found.code, found.span and found.span.text) == ("E103", "up")


def test_where_looks_through_what_is_mounted() -> None:
    model = stack()
    surgery.compile("adapter first { match q_proj apply ia3() }", model)
    plan = surgery.plan("match {q,k}_proj where type == Linear apply ia3()", model)
    assert len(plan.sites) == 6
    plan = surgery.plan("match {q,k}_proj where type == Wide apply ia3()", model)
    assert [site.path for site in plan.sites] == each(KEY)


def test_a_weight_that_is_computed_has_no_size() -> None:
    odd = nn.Linear(2, 2)
    nn.utils.parametrizations.orthogonal(odd)
    model = Box(odd=odd, even=nn.Linear(2, 2))
    assert chosen("* where numel == 4", model=model) == ["even"]
    assert chosen("* where dtype == float32", model=model) == ["even"]


def test_tied_weights_are_found_by_where() -> None:
    model = stack()
    cast(nn.Linear, model.lm_head).weight = cast(nn.Embedding, model.embed_tokens).weight
    assert len(chosen("** where not tied", model=model)) == 15


# ------------------------------------------------------------------------------ what is wrong

# The whole text, its errors by code and place, and what each says.
WRONG = [
    ("match q_proj & up apply m()", "E201", "q_proj & up", "no site is in both", "`A | B`"),
    ("match q_proj | (up & down) apply m()", "E201", "up & down", "no site is in both", ""),
    ("match not ** apply m()", "E201", "not **", "`**` takes all there is", "leave it out"),
    ("match up | q_porj apply m()", "E201", "q_porj", "did you mean `q_proj`?", ""),
    ("match * & /q_porj|up/ apply m()", "E201", "q_porj", "did you mean `q_proj`?", ""),
    ("match not {q,z}_proj apply m()", "E201", "z", "", ""),
    ("match up except up apply m()", "E201", "up", "", "take away less"),
    ("match mlp.* except q_proj | up apply m()", "E202", "q_proj", "", "`up` (3), `down` (3)"),
    ("match mlp.* except dwn apply m()", "E202", "dwn", "did you mean `down`?", ""),
    ("match up except up & down apply m()", "E202", "up & down", "", "selected are `up` (3)"),
    ("match up except @query apply m()", "E202", "@query", "", "selected are `up` (3)"),
    ("match up in layers[0] | layer[*] apply m()", "E203", "layer", "did you mean `layers`?", ""),
    ("match up in layers[0] | layers[3] apply m()", "E204", "3", "3 children, 0 to 2", ""),
    ("match up in layers[2:1] apply m()", "E214", "layers[2:1]", "this chooses nothing", ""),
    ("match up where in == 9 apply m()", "E211", "in == 9", "of 3 sites", "`in` is `3` (3)"),
    (
        "match * where type == Linaer and layer < 9 apply m()",
        "E211",
        "type == Linaer and layer < 9",
        "did you mean `Linear`?",
        "`layer` is `0` (5), `1` (5), `2` (5); `type` is `Linear` (13)",
    ),
    ("match lm_head where layer > 0 apply m()", "E211", "layer > 0", "", "none has a `layer`"),
    ("match up where tied apply m()", "E211", "tied", "", "`tied` is `false` (3)"),
    ("match @value apply m()", "E212", "@value", "", "here are `@query`, `@key`, `@output`"),
    ("match @norm apply m()", "E212", "@norm", "a TinyRMSNorm, which owns no weight", ""),
    (
        "match @head in @layers[*] apply m()",
        "E212",
        "@head",
        "1 module outside @layers[*] would match, the first is `lm_head`",
        "here are `@query`",
    ),
    ("match up in @experts[*] apply m()", "E212", "@experts", "", "here are `layers` (1)"),
    ("match @qeury apply m()", "E213", "@qeury", "did you mean `@query`?", "`@router`"),
    ("match up except @qeury apply m()", "E213", "@qeury", "did you mean `@query`?", ""),
    ("match @layers apply m()", "E213", "@layers", "as in `in @layers[*]`", "there are `@query`"),
    ("match up in @layer[*] apply m()", "E213", "@layer", "did you mean `@layers`?", ""),
    ("match up in @query apply m()", "E213", "@query", "what it is in", "`@experts`, `@layers`"),
    ("match up apply m() expect 2", "E206", "2", "3 are selected", "they are `up` (3)"),
    ("match ** where nmae == q apply m()", "E101", "nmae", "did you mean `name`?", ""),
    ("match ** where in apply m()", "E103", "in", "this is a number", ""),
    ("match ** where name < 3 apply m()", "E103", "name", "this is a text", ""),
    ("match ** where name == 0 apply m()", "E103", "0", "this is a number", '`"0"`'),
    ("match ** where 1 / layer > 0 apply m()", "E105", "1 / layer", "", "other than 0"),
    ("match ** where [0-9] apply m()", "E003", "[", "", ""),
]


@pytest.mark.parametrize(("text", "code", "place", "label", "hint"), WRONG)
def test_what_is_said(text: str, code: str, place: str, label: str, hint: str) -> None:
    (found,) = wrong(text.replace("m()", "ia3()"))
    assert found.span is not None
    assert (found.code, found.severity, found.span.text) == (code, "error", place)
    assert label in found.label
    assert hint in found.hint
    assert found.label or found.hint


def test_everything_that_takes_nothing_is_told_at_once() -> None:
    found = wrong("match a | q_proj & (b | not c) in layers[*] apply ia3()")
    assert [(d.code, d.span and d.span.text) for d in found] == [
        ("E201", "a"),
        ("E201", "b"),
        ("E201", "c"),
    ]


def test_a_count_is_not_checked_where_something_else_is_wrong() -> None:
    assert [d.code for d in wrong("match up | x apply ia3() expect 9")] == ["E201"]
    assert [d.code for d in wrong("match ** where 1 / layer > 0 apply ia3() expect 9")] == ["E105"]


# ------------------------------------------------------------------------------------ optional


@pytest.mark.parametrize(
    ("clauses", "wanted"),
    [
        ("nothing", []),
        ("q_proj & up", []),
        ("up | nothing", each("mlp.up")),
        ("/up|nothing/", each("mlp.up")),
        ("up in blocks[*]", []),
        ("up in layers[0] | blocks[*]", ["layers.0.mlp.up"]),
        ("up in {layers,blocks}[0]", ["layers.0.mlp.up"]),
        ("up in layers[3:3]", []),
        ("@value", []),
        ("@value | @query", each(QUERY)),
        ("up in @experts[*]", []),
        ("up where in == 9", []),
        ("up except down", each("mlp.up")),
        ("up except up", []),
        ("mlp.* except up | nothing", each("mlp.down")),
    ],
)
def test_optional_lifts_what_selects_nothing(clauses: str, wanted: list[str]) -> None:
    assert wrong(f"match {clauses} apply ia3()")
    text = f"optional match {clauses} apply ia3() match lm_head apply ia3()"
    assert [site.path for site in surgery.plan(text, stack()).sites] == [*wanted, "lm_head"]


@pytest.mark.parametrize(
    ("clauses", "code"),
    [
        ("up in layers[3]", "E204"),
        ("up in layers[0] | layers[3]", "E204"),
        ("up in layers[::0]", "E204"),
        ("/(/", "E007"),
        ("up except /(/", "E007"),
        ("@qeury", "E213"),
        ("@layers", "E213"),
        ("up in @query", "E213"),
        ("up where nmae == q", "E101"),
        ("up where 1 / layer > 0", "E105"),
    ],
)
def test_optional_does_not_lift_mistakes(clauses: str, code: str) -> None:
    assert {d.code for d in wrong(f"optional match {clauses} apply ia3()")} == {code}


def test_optional_and_a_count() -> None:
    assert surgery.plan("optional match nothing apply ia3() expect 0", stack()).sites == ()
    assert [d.code for d in wrong("optional match nothing apply ia3() expect 3")] == ["E206"]
    assert [d.code for d in wrong("optional match up | nothing apply ia3() expect 2")] == ["E206"]


def test_optional_does_not_lift_what_cannot_be_adapted() -> None:
    model = Box(odd=nn.Bilinear(2, 3, 5))
    assert [d.code for d in wrong("optional match odd apply ia3()", model)] == ["E208"]
