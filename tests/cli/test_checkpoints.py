"""`surgery inspect` and `surgery diff` on the command line."""

from __future__ import annotations

import json
import shutil
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
def adapter(bert: Path, tmp_path: Path) -> Path:
    surgery.compile("match query | value apply lora(r=3)", load_model(str(bert))).save(
        tmp_path / "a"
    )
    return tmp_path / "a"


def test_a_checkpoint_and_an_adapter_are_told(bert: Path, adapter: Path) -> None:
    result = run("inspect", bert)
    assert result.exit_code == 0
    assert "a checkpoint (bert" in result.stdout
    assert "encoder.layer.*.attention.self.query.weight" in result.stdout
    data = json.loads(run("inspect", bert, "--json").stdout)
    assert data["diagnostics"] == []
    assert data["kind"] == "checkpoint"
    data = json.loads(run("inspect", adapter, "--json").stdout)
    assert {site["rank"] for site in data["adapter"]["sites"]} == {3}
    assert "lora(r=3)" in run("inspect", adapter).stdout


def test_a_difference_ends_with_one(bert: Path, adapter: Path, tmp_path: Path) -> None:
    assert run("diff", bert, bert).exit_code == 0
    other = shutil.copytree(adapter, tmp_path / "b")
    assert run("diff", adapter, other).exit_code == 0
    file = other / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    result = run("diff", adapter, other, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["equal"]
    assert [t["verdict"] for t in found["tensors"]].count("different") == 1
    result = run("diff", bert, adapter)
    assert result.exit_code == 1
    assert "only in B" in result.stdout
    assert result.stderr == ""


def test_bad_usage_and_what_is_refused(bert: Path, tmp_path: Path) -> None:
    for arguments in (["inspect", tmp_path / "no"], ["diff", bert, tmp_path / "no"]):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "E530" in result.stderr
    assert run("diff", bert, bert, "--tolerance", "-1").exit_code == 2
    assert run("diff", bert).exit_code == 2
