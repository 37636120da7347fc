"""Adapted models in several processes: replicated, sharded, and prepared by accelerate.

Two processes on this machine meet over a file, run every check of `two_processes.py`, and leave
what went wrong in another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from two_processes import (
    BATCH,
    CHECKS,
    WORLD,
    adapted,
    assert_same_parameters,
    batch,
    made,
    optimizer,
    steps,
    untyped,
)
from two_processes import loss as loss_of

import surgery
from surgery.distributed import unwrapped
from surgery.errors import StateError
from surgery.model.holder import parameters_of
from surgery.model.layers import base_class
from surgery.model.sharded import MANAGED
from surgery.model.stacked import own_class, restacked

PROGRAM = Path(__file__).parents[1] / "two_processes.py"
LONGEST = 300  # seconds


def test_what_two_processes_check(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[1])}
    started = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        said = [process.communicate(timeout=LONGEST)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for rank, process in enumerate(started):
        assert process.returncode == 0, said[rank]
        wrong = json.loads((tmp_path / f"{rank}.json").read_text())
        assert not wrong, "\n".join(f"{name} in process {rank}:\n{w}" for name, w in wrong.items())


def test_there_is_something_to_check() -> None:
    names = [check.__name__ for check in CHECKS]
    assert len(names) == len(set(names)) > 15


# ---------------------------------------------------------------------------- one process


def test_accelerate_prepares_a_model_in_one_process(tmp_path: Path) -> None:
    accelerator: Any = pytest.importorskip("accelerate").Accelerator(cpu=True)
    spec = "match * apply dora(r=2)"
    one, two = adapted(spec), adapted(spec)
    loader: Any = DataLoader(TensorDataset(*batch()), batch_size=BATCH)
    model, stepping, loader = accelerator.prepare(two.model, optimizer(two.model), loader)
    assert surgery.of(accelerator.unwrap_model(model)).model is two.model
    for _ in range(2):
        for x, y in loader:
            accelerator.backward(loss_of(model, x, y))
            stepping.step()
            stepping.zero_grad()
    steps(one.model, *batch())
    assert_same_parameters(two.model, one.model)
    surgery.of(model).save(tmp_path / "prepared")
    again = surgery.attach(tmp_path / "prepared", made())
    torch.testing.assert_close(again.model(batch()[0]), two.model(batch()[0]))


class Wrapper(nn.Module):
    """Keeps a model as some library does."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, model)


def test_the_handle_is_found_through_wrappers() -> None:
    compiled = adapted()
    model = compiled.model
    assert unwrapped(model) is model
    assert surgery.of(Wrapper(Wrapper(model, "module"), "_orig_mod")).model is model
    other = Wrapper(model, "encoder")
    assert unwrapped(other) is other
    with pytest.raises(StateError, match="E401"):
        surgery.of(other)
    with pytest.raises(StateError, match="E401"):
        surgery.of(Wrapper(made(), "module"))


def test_a_wrapper_of_an_adapted_model_is_not_adapted_itself() -> None:
    compiled = adapted()
    before = {name: id(p) for name, p in compiled.model.named_parameters()}
    with pytest.raises(StateError, match="E460"):
        surgery.compile("match up apply lora(r=2)", Wrapper(compiled.model, "module"))
    assert {name: id(p) for name, p in compiled.model.named_parameters()} == before
    assert compiled.adapters == ("a", "b")


def test_a_part_of_a_tensor_is_not_saved(tmp_path: Path) -> None:
    compiled = adapted()
    parameter = compiled.model.get_parameter("layers.0.up.surgery.a.A")
    kept, parameter.data = parameter.data, torch.empty(0)
    with pytest.raises(StateError, match="E462"):
        compiled.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    parameter.data = kept
    compiled.save(tmp_path / "out")


def test_a_bank_is_not_read_where_its_parameters_were_sharded_since() -> None:
    compiled, (x, _) = adapted(), batch()
    model = compiled.model.eval()
    compiled.reserve(max_rank=3)
    for module in model.modules():
        vars(module)[MANAGED] = True
        for name, parameter in parameters_of(module).items():
            if parameter is not None:  # another object, as of something that shards it
                module.register_parameter(name, nn.Parameter(2 * parameter.detach()))
    with torch.no_grad():
        found = untyped.compile(model, backend="eager")(x)
        torch.testing.assert_close(found, model(x))


class FSDPModule:
    """A stand-in for torch's, of the same name."""


FSDPModule.__module__ = "torch.distributed.elsewhere"


def _top(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"FSDP{cls.__name__}", (FSDPModule, cls), {"mark": 1})


def test_what_is_on_top_of_a_class_stays_when_the_class_below_changes() -> None:
    top = _top(nn.Linear)
    assert own_class(top) is nn.Linear
    assert own_class(nn.Linear) is nn.Linear
    assert restacked(nn.Linear, nn.Conv1d) is nn.Conv1d
    other = restacked(top, nn.Conv1d)
    assert other is restacked(top, nn.Conv1d)
    assert other.__name__ == "FSDPConv1d"
    assert other.__bases__ == (FSDPModule, nn.Conv1d)
    assert vars(other)["mark"] == 1
    assert restacked(other, nn.Linear) is top
    module: Any = nn.Linear(2, 3)
    module.__class__ = top
    assert base_class(module) is nn.Linear
