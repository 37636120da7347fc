"""Plans compared: what one does and the other does not, and that a plan as JSON is whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, cast

import pytest
from torch import nn

import surgery
from surgery.planned import Plan

SPECS = (
    "match /0|1/ apply lora(r=2)",
    "match /0|1/ apply lora(r=3)",
    "match /1|2/ apply lora(r=2)",
    "match 0 apply lora(r=2) match 1 apply bone(r=5)",
    "match 0 apply lora(r=2, dropout=0.1) match 1 apply lora(r=2)",
    "adapter a { match /0|1/ apply lora(r=2) }",
    "match /0|1/ apply vera(r=5)",
    "match /0|1/ apply vera(r=7)",
)


def model(*, bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 7, bias=bias), nn.Linear(7, 11, bias=bias), nn.Linear(11, 3, bias=bias)
    )


def planned(spec: str) -> Plan:
    return surgery.plan(spec, model())


@pytest.mark.parametrize("spec", SPECS)
def test_a_plan_is_as_itself(spec: str) -> None:
    diff = planned(spec).diff(planned(spec))
    assert not diff
    assert str(diff) == "the plans are the same"
    assert diff.as_json() == {
        "only_here": [],
        "only_there": [],
        "changed": [],
        "shared": None,
        "totals": {},
    }


@pytest.mark.parametrize("here", SPECS)
@pytest.mark.parametrize("there", SPECS)
def test_a_difference_is_the_other_way_round(here: str, there: str) -> None:
    forth, back = planned(here).diff(planned(there)), planned(there).diff(planned(here))
    assert bool(forth) == bool(back) == (here != there)
    assert forth.only_here == back.only_there
    assert forth.only_there == back.only_here
    turned = [(c.path, [(n, b, a) for n, a, b in c.facts]) for c in back.changed]
    assert [(c.path, list(c.facts)) for c in forth.changed] == turned
    assert json.loads(json.dumps(forth.as_json())) == forth.as_json()


@pytest.mark.parametrize("spec", SPECS)
def test_nothing_of_a_plan_is_left_out(spec: str) -> None:
    """A plan is what both have, what changed, and what it has alone."""
    here, there = planned(SPECS[0]), planned(spec)
    diff = here.diff(there)
    paths = {(s.adapter, s.path) for s in here.sites}
    alone = {(str(s["adapter"]), str(s["path"])) for s in diff.only_here}
    both = paths & {(s.adapter, s.path) for s in there.sites}
    assert paths == alone | both
    assert {(c.adapter, c.path) for c in diff.changed} <= both


def test_what_is_said_of_a_difference() -> None:
    diff = planned(SPECS[0]).diff(planned(SPECS[2]))
    assert [site["path"] for site in diff.only_here] == ["0"]
    assert [site["path"] for site in diff.only_there] == ["2"]
    assert diff.changed == ()
    text = str(diff).splitlines()
    assert text[0].startswith("- 0  lora(r=2, ")
    assert text[1].startswith("+ 2  lora(r=2, ")
    assert text[2].startswith("sites: 1 only here, 1 only there, 0 changed")


def test_arguments_and_shapes_that_changed_are_told_apart() -> None:
    diff = planned(SPECS[0]).diff(planned(SPECS[1]))
    facts = {name for change in diff.changed for name, _, _ in change.facts}
    assert {"arguments", "parameters"} <= facts
    assert "method" not in facts
    lines = [line.strip() for line in str(diff).splitlines()]
    assert "arguments r: 2 → 3" in lines
    assert "parameters A shape: [2, 5] → [3, 5]" in lines
    assert "trainable" in dict((n, None) for n, _, _ in diff.totals)


def test_a_method_and_its_merge_class() -> None:
    turned = surgery.plan("match 0 apply oft(block_size=5)", model())
    exact = surgery.plan("match 0 apply dora(r=2)", model())
    lines = [line.strip() for line in str(turned.diff(exact)).splitlines()]
    assert 'method: "oft" → "dora"' in lines
    assert 'merge: "algebraic" → "witness"' in lines


def test_two_models_of_other_shapes() -> None:
    spec = "match /0|1/ apply lora(r=2)"
    wider = nn.Sequential(nn.Linear(5, 13), nn.Linear(13, 11))
    diff = surgery.plan(spec, model()).diff(surgery.plan(spec, wider))
    assert [c.path for c in diff.changed] == ["0", "1"]
    assert "    out: 7 → 13" in str(diff)
    assert "base" in {name for name, _, _ in diff.totals}
    assert surgery.plan(spec, model()).diff(surgery.plan(spec, model(bias=False)))


def test_shared_parameters_are_compared() -> None:
    diff = planned(SPECS[6]).diff(planned(SPECS[7]))
    assert diff.shared is not None
    assert "what sites share differs:" in str(diff)


# ------------------------------------------------------------------------------------ as JSON


@pytest.mark.parametrize("spec", SPECS)
def test_a_plan_as_json_is_plain_data(spec: str) -> None:
    data = planned(spec).as_json()
    assert json.loads(json.dumps(data)) == data


def test_a_plan_as_json_tells_everything_that_is_done() -> None:
    data = cast(Any, planned("match 0 apply vera(r=5)").as_json())
    (site,) = data["sites"]
    assert set(site) >= {"path", "adapter", "kind", "in", "out", "layer", "dtype", "bias"}
    assert set(site) >= {"method", "arguments", "equation", "merge", "reason", "flops"}
    for parameter in (*site["parameters"].values(), *data["shared"]):
        assert set(parameter) >= {"shape", "trained", "dtype", "begins"}
    assert all(s["arguments"] for s in data["shared"])


def test_a_plan_as_json_is_the_same_in_another_process() -> None:
    code = (
        "import json, surgery; from torch import nn\n"
        "model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 11), nn.Linear(11, 3))\n"
        f"print(*(json.dumps(surgery.plan(s, model).as_json()) for s in {SPECS!r}), sep='\\n')"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert runs == {"".join(f"{json.dumps(planned(s).as_json())}\n" for s in SPECS)}
