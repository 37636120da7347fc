"""A saved adapter, attached to the same base, computes the same to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.store import read_tensors

OWN = """
param width: int = 5
method gated(r: int, gain: float = 0.5) on matrix {
  train  A[r, in] ~ normal(std = 0.3)
  train  B[out, r] = 0
  frozen s[out] = rownorm(W)
  train  g[out] = 1
  W' = tanh(g) * rows(W) + (gain * s) * rows(B @ A)
}
match * except image apply gated(r = width)
match image apply lora(r = 3)
"""
SPECS = (
    "match * apply lora(r=5, alpha=7, dropout=0.1)",
    "match * apply lora(r=5, rslora=true)",
    "match * apply dora(r=5)",
    "match * apply bone(r=5)",
    "match * apply bat(r=6)",
    "match * apply miss(r=5)",
    'match * apply miss(r=4, mini_r=6, init_weights="mini")',
    "match * apply ia3()",
    'match * apply ia3(side="in")',
    'match first apply ia3()\nmatch last apply ia3(side="in")',
    "match * apply vera(r=5)",
    "match * apply delora(r=5)",
    "match * apply adalora(init_r=6, r=5)",
    "match first apply vera(r=5)\nmatch middle apply vera(r=7)",
    "match * apply oft(block_size=6)",
    "adapter mine { match first apply lora(r=2) match last apply bone(r=4) }",
    OWN,
)

MakeNet = Callable[[torch.dtype], nn.Module]
Run = Callable[[nn.Module], tuple[Tensor, Tensor]]
Train = Callable[[nn.Module], None]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attach_gives_the_same_outputs(
    spec: str, dtype: torch.dtype, make_net: MakeNet, run: Run, train: Train, tmp_path: Path
) -> None:
    model, base = make_net(dtype), make_net(dtype)
    compiled = surgery.compile(spec, model, seed=3)
    train(model)
    model.eval()
    base.eval()
    before, output = run(base), run(model)
    compiled.save(tmp_path / "out")
    attached = surgery.attach(tmp_path / "out", base)
    assert all(map(torch.equal, run(base), output))
    assert not all(map(torch.equal, run(base), before))
    left, right = compiled.parameters(), attached.parameters()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[n], right[n]) for n in left)
    assert [s.path for s in attached.plan.sites] == [s.path for s in compiled.plan.sites]
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in base.named_parameters()} == flags
    attached.inverse.unload()
    assert all(map(torch.equal, run(base), before))


@pytest.mark.parametrize("spec", SPECS)
def test_saving_again_writes_the_same_tensors(
    spec: str, make_net: MakeNet, train: Train, tmp_path: Path
) -> None:
    model, base = make_net(torch.float32), make_net(torch.float32)
    compiled = surgery.compile(spec, model)
    train(model)
    compiled.save(tmp_path / "one")
    surgery.attach(tmp_path / "one", base).save(tmp_path / "two")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in (tmp_path / "two").iterdir()}
    one, two = (
        dict(read_tensors(tmp_path / n / "adapter_model.safetensors")) for n in ("one", "two")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("spec", SPECS)
def test_attaching_before_the_weights_arrive(
    spec: str, make_net: MakeNet, run: Run, train: Train, tmp_path: Path
) -> None:
    model = make_net(torch.float32)
    compiled = surgery.compile(spec, model)
    train(model)
    model.eval()
    compiled.save(tmp_path / "out")
    base = make_net(torch.float32)
    later = make_net(torch.float32).to("meta")
    attached = surgery.attach(tmp_path / "out", later)
    later.load_state_dict(base.state_dict(), strict=False, assign=True)
    attached.materialize()
    assert all(map(torch.equal, run(later.eval()), run(model)))


def test_a_merged_or_inactive_adapter_is_saved_as_it_is(
    make_net: MakeNet, run: Run, train: Train, tmp_path: Path
) -> None:
    model = make_net(torch.float32)
    compiled = surgery.compile("match * apply lora(r=5)", model)
    train(model)
    model.eval()
    output = run(model)
    compiled.activate(None)
    compiled.save(tmp_path / "inactive")
    compiled.activate("default")
    compiled.inverse.merge()
    compiled.save(tmp_path / "merged")
    for name in ("inactive", "merged"):
        base = make_net(torch.float32).eval()
        surgery.attach(tmp_path / name, base)
        assert all(map(torch.equal, run(base), output))
