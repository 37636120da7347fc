"""The commands on a file that `torch.export.save` wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import surgery
from surgery.cli.commands import app
from surgery.errors import ArtifactError
from surgery.integrations import programs

SPEC = "match up apply lora(r=2)"
IN, HIDDEN, OUT = 5, 11, 7


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(IN, HIDDEN)
        self.down = nn.Linear(HIDDEN, OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("programs") / "net.pt2"
    torch.export.save(torch.export.export(Net().eval(), (torch.randn(3, IN),)), path)
    return path


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_a_program_is_planned_verified_and_compiled(net: Path, tmp_path: Path) -> None:
    planned = run("plan", SPEC, net, "--trust", "--json")
    assert [s["path"] for s in json.loads(planned.stdout)["sites"]] == ["up"]
    verified = run("verify", SPEC, net, "--trust", "--json")
    assert verified.exit_code == 0
    assert json.loads(verified.stdout)["passed"] is True
    out, adapted = tmp_path / "out", tmp_path / "adapted.pt2"
    done = run("compile", SPEC, net, "-o", out, "--program", adapted, "--trust")
    assert done.exit_code == 0, done.output
    assert str(adapted) in done.stdout
    loaded = torch.export.load(adapted)
    assert {"up.surgery.default.A", "up.weight"} <= loaded.state_dict.keys()
    x = torch.randn(3, IN)
    attached = surgery.attach(out, torch.export.load(net))
    assert torch.equal(attached.model(x), loaded.module()(x))


def test_a_program_is_read_only_if_it_is_trusted(net: Path, tmp_path: Path) -> None:
    refused = run("plan", SPEC, net, "--json")
    assert refused.exit_code == 1
    assert [d["code"] for d in json.loads(refused.stdout)["diagnostics"]] == ["E505"]
    with pytest.raises(ArtifactError, match="E501"):
        programs.load_program(str(tmp_path / "no.pt2"), trust=True)
    (tmp_path / "bad.pt2").write_bytes(b"PK")
    with pytest.raises(ArtifactError, match="E502"):
        programs.load_program(str(tmp_path / "bad.pt2"), trust=True)


def test_only_a_program_becomes_one(net: Path, tmp_path: Path) -> None:
    for model, program in (("python:a:b", "a.pt2"), (net, "a.txt")):
        done = run("compile", SPEC, model, "-o", tmp_path / "out", "--program", program, "--trust")
        assert done.exit_code == 2
    done = run("compile", SPEC, net, "-o", tmp_path / "out", "--program", _folder(tmp_path))
    assert done.exit_code == 1
    assert "E520" in done.stderr


def _folder(above: Path) -> Path:
    folder = above / "folder.pt2"
    folder.mkdir()
    return folder
