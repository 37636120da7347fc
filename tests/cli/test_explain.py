"""`surgery explain`, and plans that are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from surgery.cli.commands import app

SPEC = "match /query|value/ in encoder.layer[*] apply bone(r=4)"


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def data(*arguments: str | Path) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# ------------------------------------------------------------------------------------ explain


def test_a_method_is_explained() -> None:
    result = run("explain", "dora", "r=4", "--in", "64", "--out", "48")
    assert result.exit_code == 0
    assert result.stderr == ""
    for part in ("rownorm(W)", "witness0", "[4, in] = [4, 64]", "def forward(", "lora_A.weight"):
        assert part in result.stdout
    told = data("explain", "dora", "r=4", "--in", "64", "--out", "48")
    assert (told["fan_in"], told["fan_out"], told["merge"]) == (64, 48, "witness")
    assert told["diagnostics"] == []


def test_a_method_of_a_file_is_explained(tmp_path: Path) -> None:
    file = tmp_path / "own.peft"
    file.write_text("method twice() on matrix { train s[out] = 0  W' = W + s * rows(W) }")
    assert data("explain", "twice", "--spec", file)["file"] == str(file)
    assert data("explain", "twice", "--spec", file, "--kind", "conv2d")["kind"] == "conv2d"


def test_an_error_is_explained() -> None:
    result = run("explain", "E201")
    assert result.exit_code == 0
    assert result.stdout.startswith("E201: ")
    assert data("explain", "E201")["code"] == "E201"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("lroa",), "E121", "did you mean `lora`?"),
        (("E999",), "E121", "E201 to"),
        (("lora", "--kind", "conv"), "E308", "did you mean `conv"),
        (("lora", "--in", "7"), "E308", "both sizes"),
        (("lora", "--spec", "none.peft"), "E501", "none.peft"),
        (("oft", "block_size=5", "--in", "7", "--out", "5"), "E301", "does not fit"),
    ],
)
def test_what_is_not_there_is_refused(arguments: tuple[str, ...], code: str, said: str) -> None:
    result = run("explain", *arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert f"error[{code}]" in result.stderr
    assert said in result.stderr


@pytest.mark.parametrize("arguments", [(), ("lora", "r"), ("lora", "--in", "x")])
def test_what_is_not_understood_is_bad_usage(arguments: tuple[str, ...]) -> None:
    assert run("explain", *arguments).exit_code == 2


# --------------------------------------------------------------------------------- plan --diff


def test_two_specs_are_compared(bert: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.peft"
    other.write_text("param r: int = 3\nmatch query apply bone(r=r)\n")
    text = run("plan", SPEC, bert, "--diff", other)
    assert text.exit_code == 0
    lines = text.stdout.splitlines()
    assert lines[0].startswith("--- match ")
    assert lines[1] == f"+++ {other} on {bert}"
    assert sum(line.startswith("- ") for line in lines) == 2
    found = data("plan", SPEC, bert, "--diff", other)
    assert len(found["only_here"]) == 2
    assert {c["facts"]["arguments"]["there"]["r"] for c in found["changed"]} == {3}
    same = data("plan", SPEC, bert, "--diff", SPEC)
    assert not any(same.values())


def test_values_are_those_of_the_spec_that_has_the_param(bert: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.peft"
    spec.write_text("param r: int = 2\nmatch query apply lora(r=r)\n")
    found = data("plan", spec, bert, "--diff", SPEC, "--set", "r=4")
    assert {c["facts"]["arguments"]["here"]["r"] for c in found["changed"]} == {4}


def test_two_models_are_compared(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((bert / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    found = data("plan", SPEC, bert, "--against", other)
    assert [site["layer"] for site in found["only_there"]] == [2, 2]
    assert found["only_here"] == found["changed"] == []


# --------------------------------------------------------------------------- misspelt clauses


def stack() -> nn.Module:
    """A thousand modules."""
    model = nn.Module()
    names = ("q_proj", "k_proj", "v_proj")
    with torch.device("meta"):
        layers = (nn.ModuleDict({n: nn.Linear(5, 5) for n in names}) for _ in range(250))
        model.add_module("layers", nn.ModuleList(layers))
    return model


def test_a_misspelt_clause_names_file_line_and_the_three_nearest(tmp_path: Path) -> None:
    spec = tmp_path / "my.peft"
    for name in ("q_porj", "x_proj"):
        spec.write_text(f"match k_proj apply lora(r=2)\nmatch {name} apply lora(r=2)\n")
        result = run("plan", spec, f"python:{__name__}:stack", "--trust")
        assert result.exit_code == 1
        assert f"{spec}:2:7" in result.stderr
        for near in ("q_proj", "k_proj", "v_proj"):
            assert f"`{near}`" in result.stderr
