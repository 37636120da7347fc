"""What a backward pass computes again runs the adapters of its forward, whatever is live then."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from small_models import llama
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing

import surgery
from surgery.recomputing import Repeated, follow, unfollow

# Libraries whose types are not complete.
untyped: Any = torch
checkpoint: Callable[..., Any] = cast(Any, checkpointing).checkpoint

SPEC = """
adapter a { match q_proj | v_proj apply lora(r=2) }
adapter b { match q_proj | down_proj apply dora(r=3) }
"""
TOKENS = torch.tensor([[3, 5, 1, 7, 2], [2, 0, 11, 4, 6], [1, 8, 9, 4, 12]])

both_kinds = pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])


def adapted() -> surgery.Compiled:
    compiled = surgery.compile(SPEC, llama().train())
    generator = torch.Generator().manual_seed(5)
    for name in compiled.adapters:
        for _, tensor in sorted(compiled.parameters(name).items()):
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    cast(Any, compiled.model).enable_input_require_grads()
    return compiled


def checkpointed(reentrant: bool) -> surgery.Compiled:
    compiled = adapted()
    cast(Any, compiled.model).activation_checkpointing_enable({"use_reentrant": reentrant})
    return compiled


def site_of(compiled: surgery.Compiled) -> nn.Module:
    return compiled.model.get_submodule("layers.0.self_attn.q_proj")


def loss(model: nn.Module) -> Any:
    return cast(Any, model)(TOKENS).last_hidden_state.square().sum()


def gradients(compiled: surgery.Compiled) -> dict[str, Tensor]:
    named = compiled.model.named_parameters()
    found = {n: p.grad.clone() for n, p in named if p.grad is not None}
    compiled.model.zero_grad()
    return found


def expected(chosen: str | list[str | None]) -> dict[str, Tensor]:
    """The gradients without checkpoints."""
    compiled = adapted()
    within = compiled.using(chosen) if isinstance(chosen, str) else compiled.route(chosen)
    with within:
        loss(compiled.model).backward()
    return gradients(compiled)


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert wanted
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


@both_kinds
@pytest.mark.parametrize("chosen", ["a", "b", "0.7*a + 0.3*b"])
def test_the_default_may_change_before_the_backward(chosen: str, reentrant: bool) -> None:
    compiled = checkpointed(reentrant)
    compiled.activate(chosen)
    value = loss(compiled.model)
    compiled.activate("b" if chosen == "a" else None)
    value.backward()
    same(gradients(compiled), expected(chosen))
    assert compiled.live == ("b" if chosen == "a" else None)


@both_kinds
@pytest.mark.parametrize("chosen", ["b", ["a", None, "b"]], ids=["one", "routed"])
def test_a_threads_choice_is_repeated_in_another(
    chosen: str | list[str | None], reentrant: bool
) -> None:
    compiled = checkpointed(reentrant)
    with compiled.using(chosen) if isinstance(chosen, str) else compiled.route(chosen):
        value = loss(compiled.model)
    thread = threading.Thread(target=value.backward)
    thread.start()
    thread.join()
    same(gradients(compiled), expected(chosen))


def test_a_function_that_is_checkpointed_by_hand() -> None:
    def run(compiled: surgery.Compiled, wrap: Callable[..., Any]) -> dict[str, Tensor]:
        x = torch.linspace(-1, 1, 36).view(3, 12).requires_grad_()
        with compiled.using("a"):
            value = checkpoint(wrap(site_of(compiled)), x, use_reentrant=False).square().sum()
        compiled.activate("b")
        value.backward()
        return gradients(compiled)

    plain = adapted()
    with plain.using("a"):
        x = torch.linspace(-1, 1, 36).view(3, 12)
        untyped.autograd.backward(site_of(plain)(x).square().sum())
    same(run(adapted(), surgery.repeating), gradients(plain))


def test_what_is_set_before_and_after_is_followed_once_and_given_back() -> None:
    model = llama()
    before = {id(m): dict(vars(m)) for m in model.modules()}
    cast(Any, model).activation_checkpointing_enable()
    layer = model.get_submodule("layers.0")
    own = vars(layer)["_gradient_checkpointing_func"]
    for _ in range(2):
        follow(model)
        assert vars(layer)["_gradient_checkpointing_func"] == Repeated(own)
    cast(Any, model).activation_checkpointing_enable({"use_reentrant": True})
    assert vars(layer)["_gradient_checkpointing_func"].checkpoint.keywords["use_reentrant"]
    unfollow(model)
    assert not isinstance(vars(layer)["_gradient_checkpointing_func"], Repeated)
    gained = {n for m in model.modules() for n in vars(m).keys() - before[id(m)].keys()}
    assert {n for n in gained if "require_grads" not in n} == {
        "_gradient_checkpointing_func",
        "gradient_checkpointing",
    }


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, pickled],
)
def test_copies_follow_by_themselves(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = surgery.compile(SPEC, llama().train()).model
    other = surgery.of(copied(model))
    cast(Any, other.model).activation_checkpointing_enable()
    other.activate("a")
    value = loss(other.model)
    other.activate("b")
    value.backward()
    found = gradients(other)
    other.activate("a")
    cast(Any, other.model).activation_checkpointing_disable()
    loss(other.model).backward()
    same(found, gradients(other))
    assert not gradients(surgery.of(model))


def test_a_module_without_checkpoints_is_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 5))
    before = [dict(vars(m)) for m in model.modules()]
    follow(model)
    assert [dict(vars(m)) for m in model.modules()] == before


def test_a_compiled_function_has_checkpoints() -> None:
    compiled = adapted()
    site = site_of(compiled)
    repeated = Repeated(checkpoint)

    def run(x: Tensor) -> Any:
        return repeated(site, x, use_reentrant=False).square().sum()

    found: list[dict[str, Tensor]] = []
    for made in (run, untyped.compile(run, backend="aot_eager", fullgraph=True)):
        compiled.activate("a")
        value = made(torch.linspace(-1, 1, 36).view(3, 12).requires_grad_())
        compiled.activate("b")
        value.backward()
        found.append(gradients(compiled))
    assert found[0].keys() == found[1].keys() != set()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor)
