"""`surgery convert` and `surgery import` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import surgery
from surgery.artifact import CONFIG, TENSORS
from surgery.cli.commands import app
from surgery.integrations.transformers import load_model
from surgery.store import read_tensors

SPEC = "match query | value apply {}"


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    return result.stderr


@pytest.fixture
def folder(bert: Path, tmp_path: Path) -> Path:
    surgery.compile(SPEC.format("miss(r=4)"), load_model(str(bert))).save(tmp_path / "a")
    return tmp_path / "a"


def test_a_folder_goes_there_and_back(folder: Path, bert: Path) -> None:
    there, back = folder.parent / "there", folder.parent / "back"
    assert run("convert", folder, bert, "--to", "native", "-o", there).exit_code == 0
    assert not (there / CONFIG).exists()
    assert run("convert", there, bert, "-o", back).exit_code == 0
    assert (back / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()
    assert (back / CONFIG).read_bytes() == (folder / CONFIG).read_bytes()


def test_a_product_is_said_site_by_site(folder: Path, bert: Path) -> None:
    out = folder.parent / "out"
    result = run("convert", folder, bert, "--to", "lora", "-o", out, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["exact"]
    assert len(data["sites"]) == 4
    assert {site["rank"] for site in data["sites"]} == {4}
    assert any("lora_A" in key for key in read_tensors(out / TENSORS))


def test_weights_are_read_where_the_change_is_made_of_them(bert: Path, tmp_path: Path) -> None:
    surgery.compile(SPEC.format("hra(r=2)"), load_model(str(bert))).save(tmp_path / "a")
    result = run("convert", tmp_path / "a", bert, "--to", "lora", "-o", tmp_path / "b")
    assert result.exit_code == 0, result.output
    assert "rank 2, exact" in result.stdout


def test_nothing_is_written_where_it_is_refused(folder: Path, bert: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert "E520" in refused("convert", folder, bert, "-o", folder)
    assert "E523" in refused("convert", folder, bert, "--to", "bone", "-o", folder.parent / "b")
    assert "E517" in refused("convert", folder / "no", bert, "-o", folder.parent / "b")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not (folder.parent / "b").exists()


def test_an_imported_config_is_a_spec(folder: Path, bert: Path) -> None:
    for arguments in ([folder / CONFIG], [folder, bert]):
        result = run("import", *arguments)
        assert result.exit_code == 0, result.output
        paths = {s.path for s in surgery.plan(result.stdout, load_model(str(bert))).sites}
        assert len(paths) == 4
    data = json.loads(run("import", folder, bert, "--json").stdout)
    assert "expect 4" in data["spec"]


def test_a_config_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "E511" in refused("import", tmp_path / "no.json")
    (tmp_path / "bad.json").write_text('{"peft_type": "LOAR"}')
    assert "did you mean LORA" in refused("import", tmp_path / "bad.json")
