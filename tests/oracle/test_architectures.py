"""Every method against peft, on the layers of ten architectures.

A method is a row of `peft_rows`: three configs of peft's, and two architectures. For each of the
six, what peft moves and saves attaches with the same forward, merges into the same model and leaves
the bits of the base, and what is saved again loads in peft with the same forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from peft.tuners.boft import layer as butterflies
from peft_rows import ELSEWHERE, ROWS, Row
from small_models import ARCHITECTURES, Architecture, fresh
from support import bits
from torch import Tensor, nn

import surgery
from surgery.supported import names_on

pytestmark = [
    pytest.mark.filterwarnings("ignore:save_precomputed_indices=False:UserWarning"),
    pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not:UserWarning"),
]

# Libraries whose types are not complete.
hf: Any = peft
untyped: Any = torch

LAYERS = ("query", "value", "down", "convolution")


@dataclass(frozen=True)
class Case:
    """One setting of a row on one architecture."""

    row: Row
    on: str
    setting: int

    @property
    def name(self) -> str:
        return f"{self.row.method}-{self.on}-{self.setting}"

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.on]

    def config(self) -> peft.PeftConfig:
        it = self.architecture
        layers = ["query", "value", "down"]
        if self.row.convolutions and it.convolution:
            layers.append("convolution")
        options = {"target_modules": layers, **self.row.settings[self.setting]}
        if it.transposed:
            options["fan_in_fan_out"] = True
        return self.row.config(**named(options, it))


def named(options: dict[str, Any], it: Architecture) -> dict[str, Any]:
    """A setting with the architecture's own names for its layers."""
    return {key: _named(value, it) for key, value in options.items()}


def _named(value: Any, it: Architecture) -> Any:
    own = {name: getattr(it, name) for name in LAYERS}
    match value:
        case list():
            return [own.get(v, v) for v in cast("list[str]", value)]
        case dict():
            return {own.get(k, k): v for k, v in cast("dict[str, Any]", value).items()}
        case (kind, inner):
            return kind(**named(inner, it))
        case _:
            return value


def cases() -> Iterator[Case]:
    """Three settings of each row on both of its architectures."""
    for row in ROWS:
        yield from (Case(row, on, k) for on in row.on for k in range(3))


@pytest.fixture(autouse=True)
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the CUDA extension, which peft would try to build each time."""
    monkeypatch.setattr(butterflies, "get_fbd_cuda", lambda: None)


def moved(model: nn.Module) -> None:
    """Parameters away from where they begin, so that the adapter does something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def saved_by_peft(case: Case, directory: Path) -> Any:
    untyped.manual_seed(7)
    theirs = hf.get_peft_model(fresh(case.on), case.config()).eval()
    moved(theirs)
    theirs.save_pretrained(str(directory))
    return theirs


def close(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def same_weights(found: nn.Module, expected: nn.Module) -> None:
    """Every tensor of a merged model, in another that still has its adapters besides."""
    here = found.state_dict()
    for name, weight in expected.state_dict().items():
        close(here[name], weight)


@pytest.mark.parametrize("case", [*cases()], ids=lambda case: case.name)
@torch.no_grad()
def test_what_peft_saves_is_the_same_model_both_ways(case: Case, tmp_path: Path) -> None:
    output = case.architecture.output
    theirs = saved_by_peft(case, tmp_path / "theirs")
    expected, model = output(theirs), fresh(case.on)
    was = bits(model)
    assert (expected - output(model)).abs().max() > 1e-3

    ours = surgery.attach(tmp_path / "theirs", model)
    assert {s.form.method.name for s in ours.plan.sites} == {case.row.method}
    close(output(ours.model), expected)

    assert ours.save(tmp_path / "ours").peft == ""
    loaded = hf.PeftModel.from_pretrained(fresh(case.on), str(tmp_path / "ours")).eval()
    close(output(loaded), expected)

    ours.inverse.merge()
    close(output(ours.model), expected)
    same_weights(ours.model, theirs.merge_and_unload())
    ours.inverse.unmerge()
    assert bits(ours.inverse.unload()) == was


def test_every_method_has_a_row() -> None:
    rows = {row.method for row in ROWS}
    assert rows | ELSEWHERE.keys() == set(names_on("matrix"))
    assert not rows & ELSEWHERE.keys()


def test_the_architectures_are_used_evenly() -> None:
    uses = [sum(name in row.on for row in ROWS) for name in ARCHITECTURES]
    assert max(uses) - min(uses) <= 2, uses
