"""Whatever was done to a model, it can be undone to the bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from support import Held
from torch import Tensor, nn

import surgery
from surgery.errors import StateError
from surgery.model.holder import modules_of

pytestmark = pytest.mark.usefixtures("corrected")

METHODS = (
    "lora(r=5, alpha=7, dropout=0.1)",
    "dora(r=5)",
    "bone(r=5)",
    "bat(r=6)",
    "miss(r=5)",
    'miss(r=4, mini_r=6, init_weights="mini")',
    'miss(r=3, init_weights="bat")',
    "ia3()",
    'ia3(side="in")',
    "vera(r=5)",
    "delora(r=5)",
    "adalora(init_r=6, r=5)",
    "oft(block_size=6)",
)
ADDS_BIAS = """
method shift() on matrix { train t[out] = 0 b' = b + t }
match * except table apply shift()
"""
NO_INVERSE = """
method turn(r: int = 2) on matrix { train A[out, out] = eye(out) W' = A @ W + W }
match * apply turn()
"""
SNAPSHOTS = ("match * apply hira(r=5)", "match * apply road(group_size=6)")
SPECS = (*(f"match * apply {m}" for m in METHODS), *SNAPSHOTS, ADDS_BIAS, NO_INVERSE)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

MakeNet = Callable[[torch.dtype], nn.Module]
Run = Callable[[nn.Module], tuple[Tensor, Tensor]]
Train = Callable[[nn.Module], None]

every_spec = pytest.mark.parametrize("spec", SPECS)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def everything(model: nn.Module) -> dict[str, Any]:
    """All that can be told of a model: keys in order, objects, bits, types, places, flags."""
    tensors = model.state_dict(keep_vars=True)
    return {
        "objects": [*map(Held, tensors.values())],
        "tensors": {n: (t.data_ptr(), bits(t)) for n, t in tensors.items()},
        **of_nobody(model),
    }


def of_nobody(model: nn.Module) -> dict[str, Any]:
    """What can be told of a model by whoever holds none of its tensors."""
    tensors = model.state_dict(keep_vars=True)
    return {
        "keys": list(tensors),
        "values": {
            n: (type(t), t.dtype, t.stride(), t.requires_grad, bits(t)) for n, t in tensors.items()
        },
        "parameters": [n for n, _ in model.named_parameters()],
        "modules": [(n, id(m), type(m), m.training, sorted(vars(m))) for n, m in modules_of(model)],
    }


def values(model: nn.Module) -> dict[str, tuple[torch.dtype, bool, bytes]]:
    """What a copy of a model has in common with it."""
    tensors = model.state_dict(keep_vars=True)
    return {n: (t.dtype, t.requires_grad, bits(t)) for n, t in tensors.items()}


def fresh(compiled: surgery.Compiled, train: Train) -> None:
    del compiled, train


def trained(compiled: surgery.Compiled, train: Train) -> None:
    train(compiled.model)


def inactive(compiled: surgery.Compiled, train: Train) -> None:
    train(compiled.model)
    compiled.activate(None)


def merged(compiled: surgery.Compiled, train: Train) -> None:
    train(compiled.model)
    compiled.inverse.merge()


def unmerged(compiled: surgery.Compiled, train: Train) -> None:
    merged(compiled, train)
    compiled.inverse.unmerge()


def merged_again(compiled: surgery.Compiled, train: Train) -> None:
    unmerged(compiled, train)
    train(compiled.model)
    compiled.inverse.merge()


STATES = (fresh, trained, inactive, merged, unmerged, merged_again)


@every_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unload_gives_back_everything(
    spec: str, dtype: torch.dtype, make_net: MakeNet, train: Train
) -> None:
    model = make_net(dtype)
    before = everything(model)
    for state in STATES:
        compiled = surgery.compile(spec, model)
        state(compiled, train)
        assert compiled.inverse.unload() is model
        assert everything(model) == before, state.__name__
        with pytest.raises(StateError, match="E401"):
            surgery.of(model)


@every_spec
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_base_that_nobody_holds_comes_back_to_the_bit(
    spec: str, dtype: torch.dtype, make_net: MakeNet, train: Train
) -> None:
    model = make_net(dtype)
    before = of_nobody(model)
    compiled = surgery.compile(spec, model)
    train(model)
    compiled.inverse.merge()
    compiled.inverse.unload()
    assert of_nobody(model) == before


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return cast(nn.Module, torch.load(file, weights_only=False))


@every_spec
@pytest.mark.parametrize(
    ("carry", "state"),
    [*((copied, state) for state in STATES), (pickled, merged), (saved, merged)],
)
def test_a_copy_carries_its_state(
    spec: str,
    carry: Callable[[nn.Module], nn.Module],
    state: Callable[[surgery.Compiled, Train], None],
    make_net: MakeNet,
    run: Run,
    train: Train,
) -> None:
    model = make_net(torch.float32)
    before = values(model)
    compiled = surgery.compile(spec, model)
    state(compiled, train)
    model.eval()
    now, output = everything(model), run(model)
    twin = carry(model)
    handle = surgery.of(twin)
    assert (handle.live, handle.merged) == (compiled.live, compiled.merged)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert all(map(torch.equal, run(twin), output))
    if handle.merged:
        handle.inverse.unmerge()
        handle.inverse.merge()
        assert all(map(torch.equal, run(twin), output))
    handle.inverse.unload()
    assert values(twin) == before
    assert everything(model) == now
    assert all(map(torch.equal, run(model), output))


@every_spec
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_unmerge_gives_back_the_same_forward(
    spec: str, dtype: torch.dtype, make_net: MakeNet, run: Run, train: Train
) -> None:
    model = make_net(dtype)
    compiled = surgery.compile(spec, model)
    train(model)
    model.eval()
    before, output = everything(model), run(model)
    compiled.inverse.merge()
    compiled.inverse.unmerge()
    assert everything(model) == before
    assert all(map(torch.equal, run(model), output))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_arithmetic_leads_back_to_rounding(
    method: str, dtype: torch.dtype, make_net: MakeNet, train: Train
) -> None:
    model = make_net(dtype)
    compiled = surgery.compile(f"match * apply {method}", model)
    sites = [s.path for s in compiled.plan.sites]
    train(model)
    before = {p: model.get_parameter(f"{p}.weight").detach().clone() for p in sites}
    compiled.inverse.merge(undo="algebraic")
    new = {p: model.get_parameter(f"{p}.weight").detach().clone() for p in sites}
    compiled.inverse.unmerge()
    for path, old in before.items():
        # Merging rounds W' once, and the way back may magnify that.
        room = 100 * torch.finfo(dtype).eps * (old.double().abs().max() + new[path].abs().max())
        back = model.get_parameter(f"{path}.weight").detach()
        assert back.dtype == dtype
        assert (back.double() - old.double()).abs().max() <= room
        assert not torch.equal(new[path], old) or method.startswith("ia3")


def test_where_arithmetic_does_not_lead_back_it_is_refused_before(
    make_net: MakeNet, train: Train
) -> None:
    model = make_net(torch.float32)
    compiled = surgery.compile(NO_INVERSE, model)
    train(model)
    before = everything(model)
    with pytest.raises(StateError, match="E405") as caught:
        compiled.inverse.merge(undo="algebraic")
    assert everything(model) == before
    assert len(caught.value.diagnostics) == 8
    assert all(d.span and d.hint for d in caught.value.diagnostics)


def test_a_merge_that_keeps_nothing_says_so(make_net: MakeNet, run: Run, train: Train) -> None:
    model = make_net(torch.float32)
    plain = type(model.get_submodule("first"))
    compiled = surgery.compile("match * apply lora(r=5)", model)
    train(model)
    model.eval()
    compiled.inverse.merge(undo="none")
    output = run(model)
    for call in (compiled.inverse.unmerge, compiled.inverse.unload):
        with pytest.raises(StateError, match="E407"):
            call()
    assert all(map(torch.equal, run(model), output))
    compiled.inverse.unload(keep_merge=True)
    assert type(model.get_submodule("first")) is plain
    assert all(map(torch.equal, run(model), output))
    assert not any(".surgery." in name for name in model.state_dict())


def test_a_bias_comes_with_a_merge_and_goes_with_it(make_net: MakeNet, train: Train) -> None:
    model = make_net(torch.float32)
    compiled = surgery.compile(ADDS_BIAS, model)
    assert "adds a bias" in str(compiled.plan)
    train(model)
    last = cast(nn.Linear, model.get_submodule("last"))
    compiled.inverse.merge()
    assert last.bias is not None
    assert "last.bias" in model.state_dict()
    compiled.inverse.unmerge()
    assert cast("Tensor | None", last.bias) is None
    assert "last.bias" not in model.state_dict()
