"""`surgery compose` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import surgery
from surgery.cli.commands import app
from surgery.integrations.transformers import load_model


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def folders(bert: Path, tmp_path: Path) -> Path:
    """A folder with three adapters: `a` and `b` products, `c` made of the weight."""
    model = load_model(str(bert))
    for name, call in (("a", "lora(r=2)"), ("b", "lora(r=3)"), ("c", "dora(r=2)")):
        spec = f"adapter {name} {{ match query | value apply {call} }}"
        compiled = surgery.compile(spec, model)
        for number, tensor in enumerate(compiled.parameters(name).values()):
            tensor.data += 0.01 * (number + 1)
        compiled.save(tmp_path / name, name)
    return tmp_path


def given(folders: Path, names: str) -> list[str | Path]:
    return [word for name in names for word in ("-a", f"{name}={folders / name}")]


def test_saved_adapters_become_one(folders: Path, bert: Path) -> None:
    out = folders / "out"
    result = run("compose", "0.7*a + 0.3*b", *given(folders, "ab"), "-o", out)
    assert result.exit_code == 0, result.output
    assert "default = 0.7*a + 0.3*b, cat: exactly that" in result.stdout
    assert "peft reads it" in result.stdout
    model = load_model(str(bert))
    assert {s.form.call for s in surgery.attach(out, model).plan.sites} == {
        'lora(r=5, alpha=5, dropout=0, rslora=false, init_weights="default", bias=false)'
    }


def test_what_is_cut_off_is_told_as_data(folders: Path) -> None:
    out = folders / "out"
    options = ("--how", "ties_svd", "--rank", "2", "--density", "0.5", "--sign", "frequency")
    names = ("--name", "mix", "--json")
    result = run("compose", "a - b", *given(folders, "ab"), "-o", out, *options, *names)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["adapter"], data["how"], data["exact"]) == ("mix", "ties_svd", False)
    assert len(data["sites"]) == 4
    assert all(site["rank"] == 2 and 0 < site["cut"] < 1 for site in data["sites"])
    assert data["error"] > 0


def test_the_model_is_read_where_it_is_needed(folders: Path, bert: Path) -> None:
    out = folders / "out"
    words = ("compose", "0.5*c", *given(folders, "c"), "-o", out, "--how", "svd", "--rank", "12")
    result = run(*words)
    assert result.exit_code == 1
    assert "E584" in result.output
    assert "--base" in result.output
    assert not out.exists()
    result = run(*words, "--base", bert)
    assert result.exit_code == 0, result.output
    assert out.is_dir()


def test_what_is_wrong_is_said(folders: Path) -> None:
    words = ("-o", folders / "out")
    assert run("compose", "a", "-a", "a", *words).exit_code == 2
    assert run("compose", "a", *given(folders, "aa"), *words).exit_code == 2
    unknown = run("compose", "a + d", *given(folders, "ab"), *words)
    assert unknown.exit_code == 1
    assert "E131" in unknown.output
    there = run("compose", "a + b", *given(folders, "ab"), "-o", folders / "a")
    assert there.exit_code == 1
    assert "E520" in there.output
    assert not (folders / "out").exists()


def test_a_spec_makes_one_of_several_and_each_has_a_folder(bert: Path, tmp_path: Path) -> None:
    spec, out = tmp_path / "spec.peft", tmp_path / "out"
    spec.write_text(
        "method far(r: int) on matrix {\n"
        "  train A[r, in] ~ normal(std = 1)\n"
        "  train B[out, r] ~ normal(std = 1)\n"
        "  W' = W + B @ A\n"
        "}\n"
        "adapter a { match query apply far(r=2) }\n"
        "adapter b { match query | value apply far(r=3) }\n"
        "adapter c = 0.7*a + 0.3*b by svd(rank = 3)\n"
    )
    result = run("compile", spec, bert, "-o", out)
    assert result.exit_code == 0, result.output
    assert "made of other adapters: c = 0.7*a + 0.3*b by svd(rank = 3)" in result.stdout
    assert "c = 0.7*a + 0.3*b, svd: off the sum of the changes by" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == ["a", "b", "c"]
    compiled = surgery.attach(out / "c", load_model(str(bert)))
    assert {s.form.named for s in compiled.plan.sites} == {"far"}
    result = run("compile", spec, bert, "-o", out, "--force", "--json")
    data = json.loads(result.stdout)
    assert [one["adapter"] for one in data["made"]] == ["c"]
    assert 0 < data["made"][0]["error"] < 1
    assert [one["adapter"] for one in data["saved"]] == ["a", "b", "c"]
    result = run("fmt", "--diff", spec)
    assert "+adapter c = 0.7 * a + 0.3 * b by svd(rank = 3)" in result.stdout
    assert run("check", "match query apply lora(r=2) adapter c = d").exit_code == 0
    assert run("check", "match query apply lora(r=2) adapter c = c").exit_code == 1
