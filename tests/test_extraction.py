"""An adapter made of two checkpoints: what training changed, cut off at a rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.errors import ArtifactError, SelectionError
from surgery.store import save_tensors

untyped = cast(Any, torch)


class Model(nn.Module):
    """A table, whose name says what it is, and two layers."""

    def __init__(self, width: int = 19) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(23, 17)
        self.up = nn.Linear(17, width)
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, 13)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(self.norm(self.up(self.embed_tokens(tokens))))


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    untyped.manual_seed(0)
    return Model().to(dtype)


def saved(one: nn.Module, path: Path) -> Path:
    save_tensors(path / "model.safetensors", one.state_dict())
    return path


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def weight(one: nn.Module, name: str) -> Tensor:
    return one.get_parameter(name).data


def energy(one: nn.Module, other: nn.Module, name: str, rank: int) -> float:
    """Of what changed of a weight, as the largest singular values have it."""
    change = weight(other, name).double() - weight(one, name).double()
    values = cast(Tensor, untyped.linalg.svdvals(change)).square()
    return float(values[:rank].sum() / values.sum())


@pytest.mark.parametrize("to", ["lora", "kasa", "miss"])
def test_a_change_of_low_rank_is_found_again(tmp_path: Path, to: str) -> None:
    one, other = model(), model()
    for name in ("embed_tokens.weight", "up.weight"):
        rows, columns = weight(one, name).shape
        weight(other, name).add_(0.1 * drawn(rows, 3) @ drawn(3, columns))
    base, tuned = saved(one, tmp_path / "base"), saved(other, tmp_path / "tuned")
    if to != "lora":
        with pytest.raises(ArtifactError, match="E523"):
            surgery.extract(base, tuned, tmp_path / "out", rank=3, to=to)
        return
    made = surgery.extract(base, tuned, tmp_path / "out", rank=3)
    assert to in (tmp_path / "out" / "adapter.peft").read_text()
    assert [site.path for site in made.sites] == ["embed_tokens", "up"]
    assert all(site.energy > 1 - 1e-9 for site in made.sites)
    assert made.left_out == ()
    assert made.saved.peft == ""
    adapted = surgery.attach(tmp_path / "out", model())
    tokens = torch.arange(11)
    torch.testing.assert_close(adapted.model(tokens), other(tokens), atol=1e-5, rtol=1e-5)


def test_the_energy_that_is_kept_is_that_of_the_largest_singular_values(tmp_path: Path) -> None:
    one, other = model(torch.bfloat16), model(torch.bfloat16)
    weight(other, "up.weight").add_(0.1 * drawn(19, 17))
    weight(other, "down.bias").add_(1)
    base, tuned = saved(one, tmp_path / "base"), saved(other, tmp_path / "tuned")
    made = surgery.extract(base, tuned, tmp_path / "out", rank=5, match="/up|down/")
    (site,) = made.sites
    assert site.energy == pytest.approx(energy(one, other, "up.weight", 5))
    assert made.left_out == ("down.bias",)
    assert "left out" in str(made)


def test_of_a_large_matrix_the_leading_directions_are_found(tmp_path: Path) -> None:
    untyped.manual_seed(0)
    one = nn.Sequential(nn.Linear(211, 307, bias=False))
    other = nn.Sequential(nn.Linear(211, 307, bias=False))
    other.load_state_dict(one.state_dict())
    change = drawn(307, 4) @ drawn(4, 211) + 0.05 * drawn(307, 211)
    weight(other, "0.weight").add_(change)
    made = surgery.extract(
        saved(one, tmp_path / "base"), saved(other, tmp_path / "tuned"), tmp_path / "out", rank=4
    )
    assert made.sites[0].energy == pytest.approx(energy(one, other, "0.weight", 4), abs=1e-9)


def test_what_is_not_alike_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    one, other = model(), Model(31)
    base, tuned = saved(one, tmp_path / "base"), saved(other, tmp_path / "tuned")
    out = tmp_path / "out"
    with pytest.raises(ArtifactError, match="E540") as caught:
        surgery.extract(base, tuned, out, rank=2)
    assert len(caught.value.diagnostics) == 5
    with pytest.raises(ArtifactError, match="E540"):
        surgery.extract(base, base, out, rank=2)
    with pytest.raises(SelectionError):
        surgery.extract(base, base, out, rank=2, match="/q_proj/")
    with pytest.raises(ArtifactError, match="E523"):
        surgery.extract(base, base, out, rank=0)
    assert not out.exists()
