"""`surgery merge` and `surgery unmerge` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support import moved
from torch import Tensor, nn
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


# ------------------------------------------------------------------------------------ in part

MIXED = """
method wide(r: int) on matrix {
  train A[r, in] ~ normal(std = 0.2)
  train B[out, r] ~ normal(std = 0.2)
  y' = y + gelu(x @ Aᵀ) @ Bᵀ
}
match query apply lora(r=2)
match value apply wide(r=3)
match output in layer[*] apply bottleneck(r=4)
"""
TOKENS = torch.tensor([[3, 5, 1, 7, 2], [2, 0, 11, 4, 6]])


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return cast(Any, model)(TOKENS)[0]


def saved(spec: str, bert: Path, folder: Path) -> tuple[Path, Tensor]:
    """An adapter's folder, and what the model gives with it."""
    model = load_model(str(bert)).eval()
    compiled = surgery.compile(spec, model)
    moved(compiled)
    compiled.save(folder)
    return folder, output(model)


def test_what_cannot_merge_is_left_as_an_adapter(bert: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "out", files(bert)
    folder, outputs = saved(MIXED, bert, tmp_path / "a")
    refused = run("merge", folder, bert, "-o", out)
    assert (refused.exit_code, out.exists()) == (1, False)
    assert refused.stderr.count("E403") == 2
    for name in ("attention.self.value", "output.call"):
        assert refused.stderr.count(f"layer.0.{name}`") == 1
    plan = run("merge", folder, bert, "--partial", "--dry-run")
    assert "left as adapters: " in plan.stdout
    assert not out.exists()
    made = run("merge", folder, bert, "-o", out, "--partial", "--json")
    assert made.exit_code == 0, made.output
    data = json.loads(made.stdout)
    assert {site["path"].rpartition(".")[2] for site in data["sites"]} == {"query"}
    ((left,),) = (data["left"],)
    assert (left["folder"], left["factor"], len(left["sites"])) == ("unmerged/a", 1, 6)
    model = load_model(str(out)).eval()
    compiled = surgery.attach(out / left["folder"], model)
    assert {site.path for site in compiled.plan.sites} == {*left["sites"]}
    assert torch.allclose(output(model), outputs, atol=1e-5)
    assert run("unmerge", out).exit_code == 0
    assert files(out) == before
    assert not (out / "unmerged").exists()


def test_of_several_what_meets_what_cannot_merge_is_left_of_each(
    bert: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    one, _ = saved("match query | value apply lora(r=2)", bert, tmp_path / "one")
    other, _ = saved(MIXED, bert, tmp_path / "other")
    both = ("--adapter", f"{one}:0.7", "--adapter", f"{other}:0.3")
    assert run("merge", *both, bert, "-o", out).exit_code == 1
    made = run("merge", *both, bert, "-o", out, "--partial", "--json")
    assert made.exit_code == 0, made.output
    left = {row["folder"]: row for row in json.loads(made.stdout)["left"]}
    assert {name: (row["factor"], len(row["sites"])) for name, row in left.items()} == {
        "unmerged/one": (0.7, 2),
        "unmerged/other": (0.3, 6),
    }
    outputs: list[Tensor] = []
    for base, folders in ((bert, (one, other)), (out, [out / name for name in left])):
        model = load_model(str(base)).eval()
        for folder, name in zip(folders, ("one", "other"), strict=True):
            surgery.attach(folder, model, name=name)
        surgery.of(model).activate("0.7*one + 0.3*other")
        outputs.append(output(model))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)


def test_where_nothing_merges_nothing_is_written(bert: Path, tmp_path: Path) -> None:
    folder, _ = saved(MIXED.replace("match query apply lora(r=2)", ""), bert, tmp_path / "a")
    refused = run("merge", folder, bert, "-o", tmp_path / "out", "--partial")
    assert (refused.exit_code, (tmp_path / "out").exists()) == (1, False)
    assert "E495" in refused.stderr
