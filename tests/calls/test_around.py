"""Methods on calls: what a module gives, or takes, changed by an equation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import language_model, logits
from support import moved
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, T5Config, T5Model

import surgery
from surgery.errors import SurgeryError

untyped: Any = torch
TOKENS = torch.tensor([[3, 5, 1, 7, 2], [2, 0, 11, 4, 6], [1, 1, 8, 3, 9]])

BOTTLENECK = """
method bend(r: int, s: float = 1) on call {
  train D[r, hidden] ~ kaiming_uniform(a = sqrt(5))
  train U[hidden, r] = 0
  y' = y + s * relu(y @ Dᵀ) @ Uᵀ
}
"""
BESIDE = """
method beside(r: int) on call {
  train D[r, hidden] ~ kaiming_uniform(a = sqrt(5))
  train U[hidden, r] = 0
  y' = y + tanh(x @ Dᵀ) @ Uᵀ
}
"""
ENTERS = """
method enters() on call {
  train v[hidden] = 0
  x' = x + v
}
"""
Put = Callable[[nn.Module, Tensor, Tensor], Tensor]


def gpt2() -> nn.Module:
    untyped.manual_seed(0)
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 61}
    return GPT2LMHeadModel(GPT2Config(**cast(Any, sizes))).eval()


def bert() -> nn.Module:
    untyped.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=61,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=44,
        )
    ).eval()


def t5() -> nn.Module:
    untyped.manual_seed(0)
    return T5Model(
        T5Config(vocab_size=61, d_model=24, d_kv=12, d_ff=44, num_layers=2, num_heads=2)
    ).eval()


def ran(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    """What a model gives first."""
    both = {"decoder_input_ids": tokens[:, :3]} if hasattr(model, "decoder") else {}
    with torch.no_grad():
        return cast(Any, model)(tokens, **both)[0]


def holder(module: nn.Module, adapter: str = "default") -> Any:
    return module.get_submodule(f"surgery.{adapter}.call")


def bent(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    own = holder(module)
    return y + torch.relu(y @ own.D.T) @ own.U.T


def put_beside(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    own = holder(module)
    return y + torch.tanh(x @ own.D.T) @ own.U.T


@contextmanager
def hooked(compiled: surgery.Compiled, put: Put) -> Generator[None]:
    """The base, with what an equation says done by hooks of torch."""

    def hook(module: nn.Module, args: Any, kwargs: Any, given_: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        if isinstance(given_, Tensor):
            return put(module, x, given_)
        return (put(module, x, given_[0]), *given_[1:])

    modules = {
        id(s.site.module): s.site.module for s in compiled.plan.sites if s.site.at.kind
    }.values()
    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in modules]
    with compiled.using(None):
        yield
    for handle in handles:
        handle.remove()


PLACES = (
    (language_model, "mlp in layers[*]"),
    (language_model, "self_attn in layers[*]"),
    (language_model, "layers.*"),
    (language_model, "q_proj in layers[*]"),
    (language_model, "input_layernorm | post_attention_layernorm"),
    (gpt2, "h.*"),
    (gpt2, "attn | mlp in h[*]"),
    (bert, "attention.output"),
    (bert, "layer.*"),
    (t5, "block.*"),
    (t5, "/layer\\.[0-9]+/ in block[*]"),
)


@pytest.mark.parametrize(("make", "where"), PLACES)
@pytest.mark.parametrize(("method", "put"), [("bend(r=3)", bent), ("beside(r=3)", put_beside)])
def test_a_call_gives_what_its_equation_says(
    make: Callable[[], nn.Module], where: str, method: str, put: Put
) -> None:
    model = make()
    before = ran(model)
    compiled = surgery.compile(f"{BOTTLENECK}{BESIDE} match {where} apply {method}", model)
    assert torch.equal(ran(model), before)
    moved(compiled)
    after = ran(model)
    assert not torch.allclose(after, before, atol=1e-4)
    with hooked(compiled, put):
        assert torch.equal(ran(model), after)
    compiled.inverse.unload()
    assert torch.equal(ran(model), before)
    assert not any("surgery" in name for name in model.state_dict())
    assert not any("_surgery" in name for m in model.modules() for name in vars(m))


def test_what_enters_a_call_is_changed_before_it() -> None:
    model = language_model()
    compiled = surgery.compile(f"{ENTERS} match mlp in layers[*] apply enters()", model)
    moved(compiled)
    after = logits(model, TOKENS)

    def hook(module: nn.Module, args: Any) -> Any:
        return (args[0] + holder(module).v,)

    with compiled.using(None):
        for site in compiled.plan.sites:
            site.site.module.register_forward_pre_hook(hook)
        assert torch.equal(logits(model, TOKENS), after)


BOTH = """
method both(r: int) on call {
  train v[hidden] = 0
  train D_2[r, hidden] ~ kaiming_uniform(a = sqrt(5))
  train U_2[hidden, r] = 0
  x' = x + v
  y' = y + tanh(x @ D_2ᵀ) @ U_2ᵀ
}
"""


@pytest.mark.parametrize("chain", [False, True])
def test_in_an_output_x_is_what_the_call_was_made_with(chain: bool) -> None:
    """Where a second method is put on it, that is what came: the call is then that of both."""
    model = language_model()
    call = "enters() then beside(r=3)" if chain else "both(r=3)"
    spec = f"{ENTERS}{BESIDE}{BOTH} match mlp in layers[*] apply {call}"
    compiled = surgery.compile(spec, model)
    moved(compiled)
    after = logits(model, TOKENS)

    def put(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        own = holder(module)
        came = x - own.v if chain else x
        return y + torch.tanh(came @ own.D_2.T) @ own.U_2.T

    def hook(module: nn.Module, args: Any) -> Any:
        return (args[0] + holder(module).v,)

    for site in compiled.plan.sites:
        site.site.module.register_forward_pre_hook(hook)
    with hooked(compiled, put):
        assert torch.allclose(logits(model, TOKENS), after, atol=1e-6)


def two(model: nn.Module) -> surgery.Compiled:
    """An adapter on calls, and one on the same calls and on weights below them."""
    compiled = surgery.compile(
        f"{BOTTLENECK} adapter a {{ match mlp in layers[*] apply bend(r=3) }}\n"
        "adapter b { match mlp in layers[*] apply bend(r=2, s=2) }\n"
        "adapter c { match up_proj | q_proj apply lora(r=2) }",
        model,
    )
    for number, name in enumerate(compiled.adapters):
        untyped.manual_seed(number)
        for value in compiled.parameters(name).values():
            nn.init.normal_(value, std=0.3)
    return compiled


@given(st.floats(-2, 2), st.floats(-2, 2))
@settings(max_examples=10, deadline=None)
def test_a_mix_adds_what_each_changes(one: float, other: float) -> None:
    model = language_model()
    compiled = two(model)

    def put(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        made = y
        for factor, name, scale in ((one, "a", 1), (other, "b", 2)):
            own = holder(module, name)
            made = made + factor * scale * torch.relu(y @ own.D.T) @ own.U.T
        return made

    with compiled.using(f"{one}*a + {other}*b" if other >= 0 else f"{one}*a - {-other}*b"):
        mixed = logits(model, TOKENS)
    with hooked(compiled, put):
        assert torch.allclose(logits(model, TOKENS), mixed, atol=1e-5)


def test_samples_have_their_own_and_what_is_on_weights_as_well() -> None:
    compiled = two(language_model())
    names = ["b", None, "c", "a", "b"]
    tokens = torch.randint(0, 61, (5, 4), generator=torch.Generator().manual_seed(1))
    with compiled.route(names):
        routed = logits(compiled.model, tokens)
    for row, name in enumerate(names):
        with compiled.using(name):
            alone = logits(compiled.model, tokens[row : row + 1])
        assert torch.allclose(routed[row], alone[0], atol=1e-6)


def test_threads_have_their_own() -> None:
    compiled = two(language_model())

    def run(name: str | None) -> Tensor:
        with compiled.using(name):
            return logits(compiled.model, TOKENS)

    names = [None, "a", "b", "c", "a + b", "a + c"] * 8
    alone = {name: run(name) for name in set(names)}
    assert len({float(one.sum()) for one in alone.values()}) == len(alone)
    with ThreadPoolExecutor(6) as threads:
        for name, found in zip(names, threads.map(run, names), strict=True):
            assert torch.equal(found, alone[name])


def test_a_generated_text_is_that_of_a_whole_forward() -> None:
    compiled = two(language_model())
    compiled.activate("a + c")
    model = cast(Any, compiled.model)
    made = model.generate(
        TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=6, eos_token_id=None
    )
    again = TOKENS
    for _ in range(6):
        again = torch.cat([again, logits(model, again)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, again)


def test_a_compiled_model_has_one_graph() -> None:
    compiled = two(language_model())
    compiled.activate("a + c")
    counter = CompileCounter()
    run: Any = untyped.compile(compiled.model, backend=counter, fullgraph=True)
    with torch.no_grad():
        made = run(TOKENS).logits
    assert torch.allclose(made, logits(compiled.model, TOKENS), atol=1e-6)
    assert counter.frame_count == 1


def test_frozen_it_computes_the_same() -> None:
    compiled = two(language_model())
    compiled.activate("a")
    before = logits(compiled.model, TOKENS)
    with compiled.frozen():
        assert torch.allclose(logits(compiled.model, TOKENS), before, atol=1e-6)


def test_gradients_are_those_of_the_equation() -> None:
    model = language_model()
    compiled = surgery.compile(f"{BOTTLENECK} match mlp in layers[*] apply bend(r=3)", model)
    moved(compiled)
    cast(Any, model)(TOKENS).logits.square().sum().backward()
    trained = {n: p for n, p in model.named_parameters() if n in compiled.parameters()}
    found = {name: value.grad for name, value in trained.items()}
    model.zero_grad()
    with hooked(compiled, bent):
        cast(Any, model)(TOKENS).logits.square().sum().backward()
    for name, value in trained.items():
        own = found[name]
        assert own is not None
        assert value.grad is not None
        assert torch.allclose(value.grad, own, atol=1e-5)


def test_copies_files_and_pickles_compute_the_same(tmp_path: Path) -> None:
    compiled = two(language_model())
    compiled.activate("a")
    before = logits(compiled.model, TOKENS)
    for twin in (copy.deepcopy(compiled.model), pickle.loads(pickle.dumps(compiled.model))):
        assert torch.equal(logits(twin, TOKENS), before)
    compiled.save(tmp_path / "a", "a")
    fresh = language_model()
    other = surgery.attach(tmp_path / "a", fresh)
    assert torch.equal(logits(fresh, TOKENS), before)
    other.rename("a", "z")
    other.activate(None)
    other.hotswap("z", tmp_path / "a")
    with other.using("z"):
        assert torch.equal(logits(fresh, TOKENS), before)
    other.delete("z")
    assert not any("surgery" in name for name in fresh.state_dict())


def test_16_bits_are_kept_and_adapters_are_wider() -> None:
    model = language_model().to(torch.bfloat16)
    compiled = surgery.compile(f"{BOTTLENECK} match mlp in layers[*] apply bend(r=3)", model)
    assert {p.dtype for p in compiled.parameters().values()} == {torch.float32}
    moved(compiled)
    assert logits(model, TOKENS).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(language_model(), TOKENS).isfinite().all()


# -------------------------------------------------------------------------------- bad input


def refused(code: str, call: Callable[[], object]) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        call()
    assert code in {d.code for d in caught.value.diagnostics}
    return caught.value


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ("match mlp apply bend(r=2) then lora(r=2)", "E134"),
        ("match layers in model apply bend(r=2)", "E201"),
        ("match rotary_emb apply bend(r=2)", "E209"),
        ("match mlp apply bend(r=0)", "E111"),
        ("match mlp apply bend(r=2)\nmatch mlp apply bend(r=3)", "E302"),
    ],
)
def test_what_does_not_fit_is_refused(spec: str, code: str) -> None:
    model = language_model()
    refused(code, lambda: surgery.compile(BOTTLENECK + spec, model))
    assert not any("surgery" in name for name in model.state_dict())


def test_it_is_in_no_weight() -> None:
    compiled = two(language_model())
    compiled.activate("a")
    before = {name: value.clone() for name, value in compiled.model.state_dict().items()}
    assert "no weight" in str(refused("E403", compiled.inverse.merge))
    assert all(torch.equal(v, before[n]) for n, v in compiled.model.state_dict().items())


def test_other_hidden_states_are_refused_by_name() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 6))
            self.names = nn.ModuleDict({"counts": Counts()})

        def forward(self, x: Tensor) -> Tensor:
            self.names["counts"](x)
            return self.inner(x[..., :5])[..., :3]

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> int:
            return x.numel()

    model = Odd()
    compiled = surgery.compile(f"{BOTTLENECK} match counts apply bend(r=2)", model)
    assert "`names.counts`" in str(refused("E486", lambda: model(torch.ones(2, 5))))
    compiled.inverse.unload()
    surgery.compile(f"{BESIDE} match inner apply beside(r=2)", model)
    assert "`inner`" in str(refused("E485", lambda: model(torch.ones(2, 5))))
