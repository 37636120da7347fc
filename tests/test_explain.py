"""A method explained: what is told of it is what a model gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import surgery
from surgery.algebra.kinds import beyond
from surgery.errors import SurgeryError
from surgery.explanation import DEFAULT_SIZES, explain
from surgery.language.library import Library
from surgery.model.layers import KINDS

METHODS = Library.standard().names()
OWN = """
# Twice the weight,
# and nothing else.
method twice(k: float = 1) on matrix {
  train s[out] = 0
  W' = W + k * (s * rows(W))
}
format peft twice { config peft_type = "TWICE" tensor s = "twice_s" }
match nothing apply twice()
"""


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_explained(method: str) -> None:
    told = explain(method)
    widths = [(out, out) for _, out in DEFAULT_SIZES] if beyond(told.kind) else DEFAULT_SIZES
    assert (told.fan_in, told.fan_out) in widths
    assert told.method == method
    assert told.signature.startswith(f"method {method}(")
    assert told.definition.endswith("}")
    assert told.about
    text = str(told)
    for part in (told.signature, told.merge, *told.derived.values(), told.code.splitlines()[-1]):
        assert part.strip() in text
    data = told.as_json()
    assert json.loads(json.dumps(data)) == data


@pytest.mark.parametrize("method", METHODS)
def test_what_is_told_is_what_a_model_gets(method: str) -> None:
    told = explain(method, fan_in=1024, fan_out=1024)
    model = nn.Module()
    model.add_module("site", nn.Linear(1024, 1024, device="meta"))
    compiled = surgery.compile(f"match site apply {method}()", model)
    (site,) = compiled.plan.sites
    shapes = {p["name"]: p["shape"] for p in told.parameters}
    assert shapes == {name: list(shape) for name, shape in site.form.shapes.items()}
    assert told.totals["trainable"] == compiled.plan.trainable
    assert told.graph == str(compiled.graphs[site.path])
    assert told.merge == site.form.derived.merge_class
    assert {k["adapted"] for k in told.keys} == {r.adapted for r in compiled.mapping.rows}


def test_sizes_and_arguments() -> None:
    told = explain("lora", {"r": 3, "alpha": 6}, fan_in=7, fan_out=5)
    assert dict(told.derived) == {"W'": "W + ((2 * B) @ A)", "b'": "b"}
    a, b = told.parameters
    assert (a["symbolic"], a["shape"], a["count"]) == (["3", "in"], [3, 7], 21)
    assert (b["symbolic"], b["shape"], b["begins"]) == (["out", "3"], [5, 3], "0")
    assert told.inverse == "W' - ((2 * B) @ A)"
    assert "base_model.model.site.lora_A.weight" in str(told)
    assert told.flops is not None
    assert told.flops["token"] == 2 * 3 * (7 + 5) + 5 + 5  # the sum, and the scale


def test_arguments_as_they_come_from_a_command_line() -> None:
    told = explain("ia3", {"side": "in"}, fan_in=7, fan_out=5)
    assert dict(told.arguments) == {"side": "in"}
    assert dict(explain("lora", {"r": "2", "alpha": "3 * 2"}).arguments)["alpha"] == 6


def test_witnesses_and_roles_are_told() -> None:
    told = explain("dora", {"r": 4}, fan_in=64, fan_out=48)
    assert told.merge == "witness"
    assert list(told.witnesses) == ["witness0"]
    shared = {p["name"]: (p["trained"], p["shared"]) for p in explain("vera").parameters}
    assert shared["A"] == (False, True)
    assert shared["d"] == (True, False)


@pytest.mark.parametrize("kind", [k.name for k in KINDS])
def test_every_layer_kind_can_be_asked_for(kind: str) -> None:
    told = explain("lora", {"r": 3}, kind=kind, fan_in=10, fan_out=6)
    assert told.kind == kind
    assert told.fan_in == 10
    assert told.kinds[kind] == ""
    assert set(told.kinds) == {k.name for k in KINDS}


def test_kinds_on_which_a_method_does_not_go_are_told_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "own.peft"
    file.write_text("method shift() on matrix { train t[out] = 0  b' = b + t }")
    told = explain("shift", spec=file)
    assert told.kinds["linear"] == ""
    assert "never adds one" in told.kinds["embedding"]
    assert "not embedding: " in str(told)


def test_a_method_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "own.peft"
    file.write_text(OWN)
    told = explain("twice", {"k": 2}, spec=file)
    assert told.file == str(file)
    assert told.about == "Twice the weight,\nand nothing else."
    assert told.keys[0]["peft"] == "base_model.model.site.twice_s"
    assert explain("lora", spec=file).method == "lora"


def test_what_does_not_merge_has_a_reason() -> None:
    text = (
        "method gated() on matrix { train A[5, in] = 0  train B[out, 5] = 0  "
        "y' = y + gelu(x @ transpose(A)) @ transpose(B) } match a apply gated()"
    )
    told = explain("gated", spec=surgery.parse(text))
    assert told.merge == "none"
    assert "not linear in x" in told.reason
    assert told.inverse == ""
    assert set(told.derived) == {"y'"}


@pytest.mark.parametrize(
    ("method", "arguments", "options", "code", "said"),
    [
        ("lroa", {}, {}, "E121", "did you mean `lora`?"),
        ("lora) match x apply bone(", {}, {}, "E121", "no name"),
        ("lora", {"rr": 3}, {}, "E122", "did you mean `r`?"),
        ("lora", {"r": "x"}, {}, "E101", "unknown name `x`"),
        ("oft", {"block_size": 5}, {"fan_in": 7, "fan_out": 5}, "E301", "does not fit"),
        ("lora", {}, {"kind": "liner"}, "E308", "did you mean `linear`?"),
        ("lora", {}, {"fan_in": 7}, "E308", "both sizes"),
        ("lora", {}, {"fan_in": 0, "fan_out": 5}, "E308", "sizes from 1"),
        ("lora", {}, {"fan_in": 7, "fan_out": 10**9}, "E308", "sizes from 1"),
    ],
)
def test_what_cannot_be_explained(
    method: str, arguments: dict[str, object], options: dict[str, object], code: str, said: str
) -> None:
    with pytest.raises(SurgeryError) as caught:
        explain(method, arguments, **options)  # pyright: ignore
    assert caught.value.diagnostics[0].code == code
    assert said in str(caught.value)


def test_explaining_takes_no_memory_and_changes_nothing() -> None:
    before = torch.random.get_rng_state()
    explain("lora", fan_in=2**20, fan_out=2**20)
    assert torch.equal(torch.random.get_rng_state(), before)
