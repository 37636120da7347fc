from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import surgery
from surgery.artifact import TENSORS
from surgery.cli.commands import app
from surgery.cli.inputs import parse_values
from surgery.cli.output import styled
from surgery.errors import Diagnostic, Source, Span
from surgery.integrations.transformers import example_inputs, load_model
from surgery.store import read_tensors

SPEC = "match /query|value/ in encoder.layer[*] apply bone(r=4)"
SITES = [
    f"encoder.layer.{layer}.attention.self.{name}"
    for layer in (0, 1)
    for name in ("query", "value")
]


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def fine(*arguments: str | Path) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: str | Path) -> list[dict[str, Any]]:
    """What a command is refused for, which is the same with and without --json."""
    text = run(*arguments)
    assert text.exit_code == 1
    assert text.stdout == ""
    data = run(*arguments, "--json")
    assert data.exit_code == 1
    assert data.stderr == ""
    found: list[dict[str, Any]] = json.loads(data.stdout)["diagnostics"]
    for diagnostic in found:
        assert f"[{diagnostic['code']}]: {diagnostic['message']}" in text.stderr
    return found


# --------------------------------------------------------------------------------------- plan


def test_plan_is_a_table_on_stdout_and_nothing_else(bert: Path) -> None:
    result = fine("plan", SPEC, bert)
    assert result.stderr == ""
    assert [line.split()[0] for line in result.stdout.splitlines()[2:6]] == SITES


def test_plan_as_json(bert: Path) -> None:
    data = json.loads(fine("plan", SPEC, bert, "--json").stdout)
    assert [site["path"] for site in data["sites"]] == SITES
    assert data["trainable"] == 4 * 4 * 12
    assert data["diagnostics"] == []


def test_plan_reads_no_weights(bert: Path, tmp_path: Path) -> None:
    shutil.copy(bert / "config.json", tmp_path)
    whole, config = fine("plan", SPEC, bert, "--json"), fine("plan", SPEC, tmp_path, "--json")
    assert config.stdout == whole.stdout


def test_warnings_are_said_and_do_not_refuse(bert: Path) -> None:
    result = fine("plan", "match query in encoder.layer[0:9] apply bone(r=4)", bert)
    assert "warning[" in result.stdout


def test_set_gives_params_their_values(bert: Path, tmp_path: Path) -> None:
    spec = tmp_path / "ranks.peft"
    spec.write_text('param r: int = 2\nparam side: text = "out"\nmatch query apply lora(r=r)\n')
    data = json.loads(fine("plan", spec, bert, "--set", "r=3", "--json").stdout)
    assert {site["arguments"]["r"] for site in data["sites"]} == {3}
    assert [d["code"] for d in refused("plan", spec, bert, "--set", "s=3")] == ["E117"]
    assert [d["code"] for d in refused("plan", spec, bert, "--set", "r=x")] == ["E119"]


@pytest.mark.parametrize("pairs", [["r"], ["=3"], ["2r=3"], ["r=1", "r=2"]])
def test_a_value_without_a_name_is_bad_usage(bert: Path, pairs: list[str]) -> None:
    options = [option for pair in pairs for option in ("--set", pair)]
    assert run("plan", SPEC, bert, *options).exit_code == 2


def test_values_may_hold_anything_after_the_first_sign() -> None:
    assert parse_values(["a=", "b=x=y", "c= 1"]) == {"a": "", "b": "x=y", "c": " 1"}


# -------------------------------------------------------------------------------------- check


def test_check_says_which_specs_are_fine(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.peft", tmp_path / "bad.peft"
    good.write_text(SPEC)
    bad.write_text("match query apply bnoe(r=4)\nmatch value apply lora(rr=4)\n")
    assert f"{good}: nothing wrong" in fine("check", good, SPEC).stdout
    both = run("check", good, bad, tmp_path / "none.peft", "--json")
    assert both.exit_code == 1
    found = json.loads(both.stdout)["diagnostics"]
    assert [d["code"] for d in found] == ["E121", "E122", "E501"]
    assert [d["span"] and d["span"]["line"] for d in found] == [1, 2, None]


# --------------------------------------------------------------------------- compile and verify


def test_compile_writes_what_attach_reads(bert: Path, tmp_path: Path) -> None:
    data = json.loads(fine("compile", SPEC, bert, "-o", tmp_path / "out", "--json").stdout)
    (saved,) = data["saved"]
    assert saved["adapter"] == "default"
    assert sorted(map(Path, saved["files"])) == sorted((tmp_path / "out").iterdir())
    model = load_model(str(bert))
    assert [s.path for s in surgery.attach(tmp_path / "out", model).plan.sites] == SITES


def test_compile_is_the_same_for_the_same_seed(bert: Path, tmp_path: Path) -> None:
    spec = "match query apply lora(r=3)"
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        fine("compile", spec, bert, "-o", tmp_path / name, "--seed", str(seed))
    a, b, c = (dict(read_tensors(tmp_path / name / TENSORS)) for name in ("a", "b", "c"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_compile_names_its_files_and_says_whether_peft_reads_them(
    bert: Path, tmp_path: Path
) -> None:
    native = "method twice(k: float = 1) on matrix { train s[out] = 0 W' = W + s * rows(W) }"
    known = fine("compile", SPEC, bert, "-o", tmp_path / "known").stdout
    own = fine(
        "compile", f"{native} match query apply twice()", bert, "-o", tmp_path / "own"
    ).stdout
    assert "adapter_config.json" in known
    assert "peft reads this folder as well" in known
    assert "it has no adapter_config.json: " in own


def test_every_adapter_gets_a_folder_of_its_own(bert: Path, tmp_path: Path) -> None:
    spec = tmp_path / "two.peft"
    spec.write_text(
        "adapter first { match query apply bone(r=4) }\n"
        "adapter second { match value apply lora(r=2) }\n"
    )
    fine("compile", spec, bert, "-o", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["first", "second"]


def test_a_folder_with_files_is_left_alone(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert [d["code"] for d in refused("compile", SPEC, bert, "-o", tmp_path)] == ["E520"]
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    fine("compile", SPEC, bert, "-o", tmp_path, "--force")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    file = tmp_path / "notes.txt"
    assert [d["code"] for d in refused("compile", SPEC, bert, "-o", file, "--force")] == ["E520"]


def test_a_refused_compile_writes_nothing(bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert [d["code"] for d in refused("compile", "match quary apply bone(r=4)", bert, "-o", out)]
    assert not out.parent.exists()


def test_verify_says_what_it_saw(bert: Path) -> None:
    assert "to the bit" in fine("verify", SPEC, bert).stdout
    data = json.loads(fine("verify", SPEC, bert, "--json").stdout)
    assert data["sites"] == len(SITES)
    assert data["passed"]
    assert data["unload_exact"]
    assert data["unmerge_exact"]
    assert data["effect"] > 1e-3
    assert data["forward_vs_merged"] < 1e-5


# ---------------------------------------------------------------------------------- bad input


def test_a_misspelt_selector_names_the_nearest(bert: Path) -> None:
    (found,) = refused("plan", "match /quary|value/ in encoder.layer[*] apply bone(r=4)", bert)
    assert found["code"] == "E201"
    assert "query" in json.dumps(found)
    assert (found["span"]["line"], found["span"]["column"]) == (1, 8)


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ("nowhere.peft", "E501"),
        (".", "E501"),
        ("x" * 10_000, "E501"),
        ("match", "E501"),
        ("match query aply bone(r=4)", "E"),
        ("match " * 60_000, "E002"),
    ],
)
def test_specs_that_are_none(bert: Path, spec: str, code: str) -> None:
    for verb in (("plan",), ("verify",), ("compile", "-o", "unused")):
        found = refused(verb[0], spec, bert, *verb[1:])
        assert found[0]["code"].startswith(code)


def test_models_that_are_none(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for reference, code in (
        (tmp_path / "empty", "E501"),
        (tmp_path / "none", "E501"),
        (bert / "config.json", "E501"),
        (tmp_path / "broken", "E502"),
        ("python:torch.nn:Identity", "E505"),
        ("python:nowhere", "E501"),
    ):
        assert [d["code"] for d in refused("plan", SPEC, reference)] == [code]


def test_code_runs_only_where_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_factory_module.py").write_text(
        "import torch\n"
        "def make():\n"
        "    print('noise')\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(5, 7))\n"
        "    model.dummy_inputs = {'input': torch.ones(2, 5)}\n"
        "    return model\n"
        "def fail():\n"
        "    raise OSError('no such disk')\n"
    )
    spec = "match 0 apply bone(r=3)"
    made, failing = (f"python:own_factory_module:{name}" for name in ("make", "fail"))
    assert [d["code"] for d in refused("plan", spec, made)] == ["E505"]
    assert "own_factory_module" not in sys.modules
    data = json.loads(fine("verify", spec, made, "--trust", "--json").stdout)
    assert data["passed"]
    (found,) = refused("plan", spec, failing, "--trust")
    assert found["code"] == "E503"
    assert "no such disk" in found["message"]


def test_data_is_what_trusted_code_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "own_batches_module.py"
    file.write_text(
        "import torch\n"
        "def make():\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(5, 7))\n"
        "    model.dummy_inputs = {'input': torch.ones(2, 5)}\n"
        "    return model\n"
        "def batches():\n"
        "    return [torch.eye(5) + n for n in range(3)]\n"
        "def none():\n"
        "    return 3\n"
    )
    spec, model = "match 0 apply eva(r=2)", "python:own_batches_module:make"
    named = (f"{file}:batches", "python:own_batches_module:batches")
    for data, out in zip(named, ("one", "other"), strict=True):
        fine("compile", spec, model, "--data", data, "--trust", "-o", tmp_path / out)
    files = [tmp_path / out / "adapter_model.safetensors" for out in ("one", "other")]
    assert files[0].read_bytes() == files[1].read_bytes()
    given = ("--data", named[0], "--trust", "--json")
    assert json.loads(fine("verify", spec, model, *given).stdout)["passed"]
    for data, code in (
        (f"{file}:none", "E503"),
        (f"{file}:nothing", "E503"),
        ("nowhere.py:batches", "E501"),
        ("batches", "E501"),
    ):
        found = refused("verify", spec, model, "--trust", "--data", data)
        assert [d["code"] for d in found] == [code]
    assert [d["code"] for d in refused("verify", spec, model, "--trust")] == ["E421"]


def test_data_runs_only_where_it_is_trusted(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("raise OSError")
    found = refused("verify", SPEC, bert, "--data", f"{tmp_path / 'own.py'}:batches")
    assert [d["code"] for d in found] == ["E505"]


# -------------------------------------------------------------------------------------- edges


def test_a_command_without_what_it_needs_is_bad_usage(bert: Path) -> None:
    for arguments in ((), ("compile", SPEC, bert), ("plan", SPEC), ("plann", SPEC, bert)):
        assert run(*arguments).exit_code == 2


def test_help_and_version() -> None:
    for verb in ("check", "plan", "compile", "verify"):
        assert "Usage" in fine(verb, "--help").stdout
    assert fine("--version").stdout == f"surgery {surgery.__version__}\n"


def test_help_waits_for_nothing_slow() -> None:
    code = (
        "import sys, surgery.cli.commands\n"
        "print(*{'safetensors', 'transformers', 'accelerate', 'einops'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_colour_changes_no_character() -> None:
    source = Source("a.peft", "match\tquary apply bone()")
    diagnostic = Diagnostic("E201", "none: here", Span(source, 6, 11), "did you mean?", "look")
    text = styled(diagnostic)
    assert text.plain == str(diagnostic)
    assert {"bold red", "cyan", "blue"} <= {str(span.style) for span in text.spans}


def test_the_command_and_the_function_agree(bert: Path, tmp_path: Path) -> None:
    fine("compile", "match query apply lora(r=3)", bert, "-o", tmp_path / "out", "--seed", "3")
    ours, theirs = load_model(str(bert)), load_model(str(bert))
    made = surgery.compile("match query apply lora(r=3)", ours, seed=3).parameters()
    read = surgery.attach(tmp_path / "out", theirs).parameters()
    assert made.keys() == read.keys()
    assert all(torch.equal(made[name], read[name]) for name in made)
    assert example_inputs(ours).keys() == {"input_ids"}
