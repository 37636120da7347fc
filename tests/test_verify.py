"""`verify` finds what no forward shows: trained parameters that no gradient reaches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support import Held
from torch import Tensor, nn
from typer.testing import CliRunner

import surgery
from surgery.cli.commands import app
from surgery.model.holder import modules_of
from surgery.verification import Verification

untyped: Any = torch


class Net(nn.Module):
    """One layer in use, one that is never called, one whose output is dropped, one detached."""

    def __init__(self) -> None:
        super().__init__()
        untyped.manual_seed(3)
        self.used = nn.Linear(5, 7)
        self.idle = nn.Linear(7, 5)
        self.dropped = nn.Linear(7, 3)
        self.cut = nn.Linear(7, 11)

    def forward(self, x: Tensor) -> dict[str, Any]:
        """[..., 5] to [..., 7] and, detached, [..., 11]."""
        y = torch.tanh(cast(Tensor, self.used(x)))
        self.dropped(y)
        return {"y": y, "rest": [cast(Tensor, self.cut(y)).detach(), torch.arange(3)]}


def x() -> Tensor:
    return torch.linspace(-1, 1, 10).reshape(2, 5)


def verified(spec: str, model: nn.Module | None = None, **options: Any) -> Verification:
    model = model or Net()
    before = {n: (Held(p), p.requires_grad) for n, p in model.named_parameters()}
    modules = [(n, type(m), sorted(vars(m))) for n, m in modules_of(model)]
    seen = surgery.verify(spec, model, lambda m: m(x()), **options)
    assert {n: (Held(p), p.requires_grad) for n, p in model.named_parameters()} == before
    assert [(n, type(m), sorted(vars(m))) for n, m in modules_of(model)] == modules
    assert all(p.grad is None for p in model.parameters())
    assert not any(vars(m)["_forward_pre_hooks"] for m in model.modules())
    return seen


def dead(seen: Verification) -> dict[str, tuple[str, ...]]:
    return {one.path: one.parameters for one in seen.without_gradient}


@pytest.mark.parametrize(
    "method",
    ["lora(r=2)", "dora(r=2)", "ia3()", 'ia3(side="in")', "bone(r=1)", "vera(r=3)", "miss(r=1)"],
)
def test_what_is_in_use_has_gradients_even_where_they_begin_as_zeros(method: str) -> None:
    seen = verified(f"match used apply {method}")
    assert seen.without_gradient == ()
    assert seen.passed
    assert "reaches every trained parameter" in str(seen)


def test_each_dead_site_is_listed_with_its_reason() -> None:
    seen = verified("match used | dropped | cut apply lora(r=2) match idle apply dora(r=2)")
    assert not seen.passed
    assert seen.unload_exact
    assert dead(seen) == {"idle": ("A", "B", "m"), "dropped": ("A", "B"), "cut": ("A", "B")}
    reasons = {one.path: one.reason for one in seen.without_gradient}
    assert "did not call" in reasons["idle"]
    assert "reaches no output" in reasons["dropped"]
    assert "detached" in reasons["cut"]
    text = str(seen)
    assert "DOES NOT REACH trained parameters at 3 sites" in text
    assert f"  idle (A, B, m): {reasons['idle']}" in text
    data = json.loads(json.dumps(seen.as_json()))
    assert data["passed"] is False
    assert {one["path"]: one["reason"] for one in data["without_gradient"]} == reasons
    assert data["without_gradient"][0].keys() == {"adapter", "path", "parameters", "reason"}


def test_what_the_equation_does_not_use_is_named_by_itself() -> None:
    method = """
    method odd() on matrix {
      train s[out] = 1
      train t[out] = 1
      train u[out] = 1
      W' = (stop_gradient(t) * s) * rows(W)
    }
    """
    seen = verified(f"{method} match used apply odd()")
    assert dead(seen) == {"used": ("t", "u")}
    assert "stop_gradient" in seen.without_gradient[0].reason


def test_every_adapter_has_a_pass_of_its_own() -> None:
    spec = """
    adapter one { match used apply lora(r=2) }
    adapter two { match used apply ia3() match idle apply vera(r=3) }
    """
    seen = verified(spec)
    (found,) = seen.without_gradient
    assert (found.adapter, found.path) == ("two", "idle")
    assert found.parameters == ("d", "g")


def test_shared_parameters_are_seen_where_they_lie() -> None:
    method = """
    method tied() on matrix {
      shared train S[out, in] = 0
      train t[out] = 1
      W' = W + t * rows(S)
    }
    """
    assert verified(f"{method} match used apply tied()").without_gradient == ()
    seen = verified(f"{method} match used apply tied() match dropped apply tied()")
    assert dead(seen) == {"dropped": ("t",)}
    assert dead(verified(f"{method} match idle apply tied()")) == {"idle": ("S", "t")}


def test_a_run_without_gradients_is_said_to_be_one() -> None:
    def run(model: nn.Module) -> object:
        with torch.no_grad():
            return model(x())

    seen = surgery.verify("match used apply lora(r=2)", Net(), run)
    assert not seen.passed
    assert "does `run` switch gradients off?" in seen.without_gradient[0].reason


class Backwardless(torch.autograd.Function):
    """A kernel that nobody wrote a backward for."""

    @staticmethod
    def forward(ctx: object, *args: Any) -> Tensor:
        """The same again."""
        return args[0].clone()

    @staticmethod
    def backward(ctx: object, *grad_outputs: Any) -> Any:
        """Nothing."""
        raise RuntimeError("no kernel\nin many lines")


def test_a_backward_that_fails_is_a_reason() -> None:
    class Model(Net):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"y": cast(Any, Backwardless).apply(super().forward(x)["y"])}

    seen = verified("match used apply lora(r=2)", Model())
    assert seen.without_gradient[0].reason == "the backward pass failed: no kernel"


def test_a_method_that_trains_nothing_has_nothing_to_miss() -> None:
    method = "method fixed() on matrix { frozen s[out] = 1 W' = s * rows(W) }"
    assert verified(f"{method} match used | idle apply fixed()").passed


def test_a_model_in_training_stays_in_training() -> None:
    model = Net().train()
    assert verified("match used apply lora(r=2, dropout=0.5)", model).passed
    assert model.training


# --------------------------------------------------------------------------------- the command


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "some_net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.used, self.idle = torch.nn.Linear(5, 7), torch.nn.Linear(7, 5)\n"
        "        self.dummy_inputs = {'x': torch.ones(2, 5)}\n"
        "    def forward(self, x):\n"
        "        return self.used(x)\n"
    )
    monkeypatch.chdir(tmp_path)
    return "python:some_net:Net"


@pytest.mark.parametrize(("selector", "code"), [("used", 0), ("used | idle", 1)])
def test_the_command_fails_for_a_dead_site(selector: str, code: int, factory: str) -> None:
    command = ["verify", f"match {selector} apply lora(r=2)", factory, "--trust"]
    plain = CliRunner().invoke(app, command)
    assert plain.exit_code == code
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == code
    data = json.loads(done.stdout)
    assert [one["path"] for one in data["without_gradient"]] == ["idle"] * code
    assert data["passed"] is (code == 0)
    assert ("DOES NOT REACH" in plain.stdout) is (code == 1)
