"""Against peft: a basis that layers of one kind share, and what its folders are here."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.frod import model as frod
from safetensors import torch as safe
from torch import Tensor, nn

import surgery
from surgery.model.endings import ending, layer_number

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

# Libraries whose types are not complete.
hf: Any = peft
theirs: Any = frod
untyped: Any = torch
files: Any = safe
NAMES = ("layers", "layer", "attention", "output", "dense", "0", "11", "q_proj")


class Side(nn.Module):
    def __init__(self, depth: int, wide: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6 if i else wide) for i in range(depth))
        self.down = nn.Linear(wide, 6)

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.layers
        x = self.down(torch.tanh(first(x)))
        for layer in rest:
            x = x + torch.tanh(layer(x))
        return x


def net() -> nn.Module:
    """An encoder and a decoder, whose layers have the same numbers."""
    untyped.manual_seed(0)
    parts: dict[str, nn.Module] = {"encoder": Side(3, 3), "decoder": Side(3, 3)}
    return nn.Sequential(OrderedDict({**parts, "head": nn.Linear(6, 2)})).eval()


SOME = ["1", "2", "down", "head"]
SPEC = "match /1|2|down|head/ apply frod(sparse_rate=0.2)"
X = torch.linspace(-1, 1, 24).view(4, 6)


def moved(parameters: Any) -> None:
    with torch.no_grad():
        for parameter in parameters:
            if parameter.requires_grad:
                parameter += 0.1 * torch.arange(parameter.numel()) / parameter.numel()


def close(found: object, wanted: Tensor) -> None:
    torch.testing.assert_close(cast(Tensor, found), wanted, rtol=1e-5, atol=1e-5)


@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_a_path_ends_as_peft_says(names: list[str], otherwise: int) -> None:
    path = ".".join(names)
    assert ending(path) == theirs._category_from_key(path)
    assert layer_number(path, otherwise) == theirs._layer_index_from_key(path, otherwise)


def folder(path: Path, **options: Any) -> tuple[Path, Tensor]:
    """A folder of peft's, and the forward of what is in it."""
    options = {"target_modules": SOME, "sparse_rate": 0.2, "progressbar": False, **options}
    adapted = hf.get_peft_model(net(), peft.FrodConfig(**options)).eval()
    moved(adapted.parameters())
    adapted.save_pretrained(path)
    return path, cast(Tensor, adapted(X)).detach()


def test_bases_are_those_of_peft_bit_for_bit() -> None:
    """Of an encoder and a decoder with one it is the decoder's; what has few rows is completed."""
    adapted = hf.get_peft_model(
        net(), peft.FrodConfig(target_modules=SOME, sparse_rate=0.2, progressbar=False)
    )
    wanted = {k: dict(v.items())["default"] for k, v in adapted.base_model.frod_V.items()}
    compiled = surgery.compile(SPEC, net())
    groups = {
        str(dict(s.arguments)["category"]): compiled.plan.groups[s.key]
        for s in compiled.plan.shared
    }
    assert groups.keys() == wanted.keys()
    state = compiled.model.state_dict()
    for category, group in groups.items():
        assert torch.equal(state[f"surgery.default.shared.{group}.V"], wanted[category])


def test_what_is_made_here_is_the_same_in_peft(tmp_path: Path) -> None:
    compiled = surgery.compile(SPEC, net())
    before = cast(Tensor, compiled.model(X))
    moved(compiled.model.parameters())
    assert not torch.allclose(cast(Tensor, compiled.model(X)), before, atol=1e-2)
    assert not compiled.save(tmp_path).peft
    back = hf.PeftModel.from_pretrained(net(), tmp_path, progressbar=False).eval()
    close(back(X), cast(Tensor, compiled.model(X)))


@pytest.mark.parametrize(("to", "rank"), [("native", None), ("lora", 6)])
def test_a_folder_is_converted(tmp_path: Path, to: str, rank: int | None) -> None:
    path, wanted = folder(tmp_path / "one")
    surgery.convert(path, tmp_path / "other", net(), to=to, rank=rank)
    again = net()
    surgery.attach(tmp_path / "other", again)
    close(again(X), wanted)


def test_another_basis_than_the_layers_have_is_right_here_and_not_in_peft(tmp_path: Path) -> None:
    """peft makes U of the basis that it finds anew, and then takes the one that is in the file."""
    path, _ = folder(tmp_path)
    file = path / "adapter_model.safetensors"
    tensors = files.load_file(file)
    for key in [k for k in tensors if "frod_V" in k]:
        tensors[key] = tensors[key].flip(1).contiguous()
    for key in [k for k in tensors if "lambda_l" in k]:
        tensors[key] = tensors[key].flip(0).contiguous()
    for key in [k for k in tensors if "lambda_s" in k]:
        tensors[key].zero_()
    files.save_file(tensors, file)
    here = surgery.attach(path, net())
    there = hf.PeftModel.from_pretrained(net(), path).eval()
    found = cast(Tensor, here.model(X))
    assert not torch.allclose(there(X), found, atol=1e-2)
    here.inverse.merge()
    close(here.model(X), found)


@pytest.mark.parametrize(
    ("key", "more", "reason"),
    [
        ("s_indices.encoder_down", 9, "has places outside of 3 × 3"),
        ("s_size.encoder_down", 1, r"is \[4, 4\], and 3 is meant"),
        ("s_size.encoder_down", None, "lacks the tensor"),
        ("V.head", None, "lacks the tensor"),
    ],
)
def test_a_folder_that_was_changed_is_refused(
    tmp_path: Path, key: str, more: int | None, reason: str
) -> None:
    path, _ = folder(tmp_path)
    file = path / "adapter_model.safetensors"
    tensors = files.load_file(file)
    kept = tensors.pop(f"base_model.frod_{key}")
    if more is not None:
        tensors[f"base_model.frod_{key}"] = kept + more
    files.save_file(tensors, file)
    with pytest.raises(surgery.SurgeryError, match=reason):
        surgery.attach(path, net())


def test_a_folder_without_its_projections_is_refused(tmp_path: Path) -> None:
    path, _ = folder(tmp_path, save_projection=False)
    with pytest.raises(surgery.SurgeryError, match="places off the diagonal are not in the file"):
        surgery.attach(path, net())


def test_with_no_place_off_the_diagonal_the_folder_has_empty_tensors(tmp_path: Path) -> None:
    path, wanted = folder(tmp_path, sparse_rate=0.0)
    here = surgery.attach(path, net())
    close(here.model(X), wanted)
    here.save(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["sparse_rate"] == 0
