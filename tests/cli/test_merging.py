"""`surgery merge` and `surgery unmerge` on the command line."""

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
def folder(bert: Path, tmp_path: Path) -> Path:
    compiled = surgery.compile("match query | value apply miss(r=4)", load_model(str(bert)))
    for tensor in compiled.parameters().values():
        tensor.data += 0.01
    compiled.save(tmp_path / "a")
    return tmp_path / "a"


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_a_checkpoint_is_merged_and_made_again(folder: Path, bert: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    result = run("merge", folder, bert, "-o", out)
    assert result.exit_code == 0, result.output
    assert "4 tensors merged" in result.stdout
    assert files(out).keys() == files(bert).keys() | {"inverse.json"}
    assert run("unmerge", out, "-o", back).exit_code == 0
    assert files(back) == files(bert)
    assert run("unmerge", out).exit_code == 0
    assert files(out) == files(bert)


def test_several_are_named_by_options(folder: Path, bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        *("merge", "--adapter", f"{folder}:0.5", bert, "-o", out, "--dtype", "float64"),
        *("--round", "stochastic", "--undo", "none", "--workers", "1", "--json"),
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert len(data["sites"]) == 4
    assert {site["way"] for site in data["sites"]} == {"nothing"}
    assert not (out / "inverse.json").exists()


def test_a_dry_run_writes_nothing(folder: Path, bert: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    result = run("merge", folder, bert, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "by rows" in result.stdout
    assert sorted(tmp_path.iterdir()) == before
    data = json.loads(run("merge", folder, bert, "--dry-run", "--json").stdout)
    assert len(data["changes"]) == 4


def test_what_cannot_be_is_said(folder: Path, bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("merge", bert, "-o", out).exit_code == 2
    assert run("merge", folder, bert).exit_code == 2
    assert run("merge", folder, bert, "--dry-run", "--quantized", "float").exit_code == 2
    assert run("merge", folder, bert, "--dry-run", "--quantized", "separate").exit_code == 0
    assert run("merge", "--adapter", folder, folder, bert, "-o", out).exit_code == 2
    refused = run("merge", folder, bert, "-o", out, "--max-rel-err", "1e-12")
    assert refused.exit_code == 1
    assert "E431" in refused.stderr
    assert not out.exists()
    assert "E550" in run("unmerge", bert).stderr
