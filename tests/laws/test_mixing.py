"""Adapters that are live together: what they compute is what their equations say, added up."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

import surgery
from surgery.errors import PlanError, StateError

MakeNet = Callable[[torch.dtype], nn.Module]
Run = Callable[[nn.Module], tuple[Tensor, Tensor]]
Train = Callable[[nn.Module], None]

untyped = cast(Any, torch)  # for calls whose stubs are not fully typed

METHODS = (
    "lora(r=5, alpha=7, dropout=0.1)",
    "dora(r=5)",
    "bone(r=5)",
    "bat(r=6)",
    "ia3()",
    'ia3(side="in")',
    "vera(r=5)",
    "hira(r=5)",
    "delora(r=5)",
    "adalora(init_r=6, r=5)",
    "road(group_size=6)",
    "oft(block_size=6)",
)
PAIRS = [*zip(METHODS, (*METHODS[3:], *METHODS[:3]), strict=True)]
ADDS_BIAS = "method shift() on matrix { train t[out] = 0 b' = b + t }"
BENT = "method bent() on matrix { train u[out] = 1 y' = y + tanh(u * y) }"
BENDS = """
method bends() on matrix {
  train A[out, in] = 0
  train u[in] = 1
  W' = W + A
  x' = u * x
  y' = y + tanh(y)
}
"""

Weights = Mapping[str, tuple[Tensor, Tensor | None]]


def two(first: str, second: str, where: str = "*") -> str:
    return f"adapter a {{ match {where} apply {first} }}\nadapter b {{ match * apply {second} }}"


def weights(model: nn.Module) -> Weights:
    """The weight and bias of every layer that has one."""
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, module in cast(Any, model).named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, Tensor) and "surgery" not in name:
            found[name] = weight.detach().clone(), None if bias is None else bias.detach().clone()
    return found


def merged_weights(compiled: surgery.Compiled, expression: str | None) -> Weights:
    """What the weights are with something merged into them; nothing is changed."""
    compiled.activate(expression)
    if expression is None:
        return weights(compiled.model)
    compiled.inverse.merge()
    found = weights(compiled.model)
    compiled.inverse.unmerge()
    return found


def outputs(compiled: surgery.Compiled, expression: str | None, run: Run) -> tuple[Tensor, Tensor]:
    compiled.activate(expression)
    return run(compiled.model)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def all_close(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(map(close, one, other))


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_mix_adds_up_what_each_does_to_the_base(
    first: str, second: str, make_net: MakeNet, run: Run, train: Train
) -> None:
    compiled = surgery.compile(two(first, second, "* except middle"), make_net(torch.float64))
    train(compiled.model)
    compiled.model.eval()
    base, a, b = (merged_weights(compiled, e) for e in (None, "a", "b"))
    mix = merged_weights(compiled, "0.7*a - 2*b")
    for name, (weight, bias) in base.items():
        wanted = weight + 0.7 * (a[name][0] - weight) - 2 * (b[name][0] - weight)
        assert close(mix[name][0], wanted), name
        if bias is None:
            assert mix[name][1] is a[name][1] is b[name][1] is None
            continue
        moved = [cast(Tensor, own[name][1]) - bias for own in (a, b)]
        assert close(cast(Tensor, mix[name][1]), bias + 0.7 * moved[0] - 2 * moved[1]), name
    forward = outputs(compiled, "0.7*a - 2*b", run)
    compiled.inverse.merge()
    assert all_close(run(compiled.model), forward)
    compiled.inverse.unmerge()
    assert all(map(torch.equal, run(compiled.model), forward))
    assert all_close(outputs(compiled, "-2*b + 0.7*a", run), forward)
    assert compiled.live == "-2*b + 0.7*a"


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_as_it_is_and_none_of_it(
    method: str, make_net: MakeNet, run: Run, train: Train
) -> None:
    compiled = surgery.compile(f"match * apply {method}", make_net(torch.float32))
    base = outputs(compiled, None, run)
    train(compiled.model)
    compiled.model.eval()
    alone = outputs(compiled, "default", run)
    types = [*map(type, compiled.model.modules())]
    for text in ("1.0*default", "2*default - default", "none + default", "default then none"):
        assert all(map(torch.equal, outputs(compiled, text, run), alone))
        assert [*map(type, compiled.model.modules())] == types
        assert compiled.live == "default"
    for text in ("0*default", "default - default", "none", None):
        compiled.model.train()
        compiled.model.eval()
        assert all(map(torch.equal, outputs(compiled, text, run), base))
        assert compiled.live is None


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_then_is_the_second_on_the_model_with_the_first_merged(
    first: str, second: str, make_net: MakeNet, run: Run, train: Train
) -> None:
    model, first = make_net(torch.float64), first.replace(", dropout=0.1", "")
    compiled = surgery.compile(two(first, second, "* except middle"), model)
    train(model)
    model.eval()
    tensors = compiled.parameters("b")
    forward = outputs(compiled, "a then b", run)
    compiled.inverse.merge()
    assert all_close(run(model), forward)
    compiled.inverse.unmerge()

    compiled.activate("a")
    compiled.inverse.merge()
    compiled.inverse.unload(keep_merge=True)
    again = surgery.compile(f"adapter b {{ match * apply {second} }}", model)
    with torch.no_grad():
        for name, value in again.parameters().items():
            value.copy_(tensors[name])
    assert all_close(run(model), forward)


def test_chains_and_mixes_stand_in_one_another(make_net: MakeNet, run: Run, train: Train) -> None:
    spec = f"""{two("lora(r=5)", "ia3()")}
    adapter c {{ match last | image apply bone(r=5) match table apply dora(r=3) }}"""
    compiled = surgery.compile(spec, make_net(torch.float64))
    train(compiled.model)
    compiled.model.eval()
    base = merged_weights(compiled, None)
    inner, turned, c = (merged_weights(compiled, e) for e in ("(a + b) then c", "b then a", "c"))
    whole = merged_weights(compiled, "0.5*((a + b) then c) - (b then a)/4 + 2*c")
    for name, (weight, _) in base.items():
        parts = [own[name][0] - weight for own in (inner, turned, c)]
        assert close(whole[name][0], weight + 0.5 * parts[0] - parts[1] / 4 + 2 * parts[2]), name
    forward = run(compiled.model)
    assert compiled.live == "0.5*((a + b) then c) - 0.25*(b then a) + 2*c"
    compiled.inverse.merge()
    assert all_close(run(compiled.model), forward)


def of_first(model: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.randn(7, 18, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = cast(Tensor, model.get_submodule("first")(x))
    return y, y


@pytest.mark.parametrize("bent", ["bent()", "bends()"])
def test_what_is_no_matrix_is_mixed_as_it_runs(
    bent: str, make_net: MakeNet, run: Run, train: Train
) -> None:
    """One layer alone, whose output is the model's, so that outputs can be added up."""
    model = make_net(torch.float64)
    where = "match wave | volume" if bent == "bent()" else "match first"
    spec = f"""{BENT}{BENDS}{ADDS_BIAS}
    adapter a {{ {where} apply {bent} }}
    adapter b {{ {where} apply lora(r=3) }}
    adapter c {{ {where} apply shift() }}"""
    compiled = surgery.compile(spec, model)
    train(model)
    model.eval()
    if bent == "bends()":
        run = of_first
    base, a, b, c = (outputs(compiled, e, run) for e in (None, "a", "b", "c"))
    mix = outputs(compiled, "3*a + 0.5*b - c", run)
    for y, ya, yb, yc, got in zip(base, a, b, c, mix, strict=True):
        assert close(got, y + 3 * (ya - y) + 0.5 * (yb - y) - (yc - y))
    with pytest.raises(StateError, match="E403"):
        compiled.inverse.merge()
    assert all(map(torch.equal, run(model), mix))
    with pytest.raises(PlanError, match="E309"):
        compiled.activate("a then b")
    assert all(map(torch.equal, run(model), mix))
    assert compiled.live == "3*a + 0.5*b - c"


# --------------------------------------------------------------------------- any expression at all

Tree = str | tuple[Any, ...]
Site = tuple[Tensor, Tensor]

numbers = st.sampled_from([0.5, 1.0, 2.0, -0.75, 0.0])
trees: st.SearchStrategy[Tree] = st.recursive(
    st.sampled_from(["a", "b", "c", "none"]),
    lambda inner: st.one_of(
        st.tuples(st.just("+"), inner, inner),
        st.tuples(st.just("-"), inner, inner),
        st.tuples(st.just("then"), inner, inner),
        st.tuples(st.just("*"), numbers, inner),
    ),
    max_leaves=5,
)


def written(tree: Tree) -> str:
    match tree:
        case str():
            return tree
        case ("*", factor, inner):
            return f"{factor} * ({written(inner)})"
        case (sign, left, right):
            return f"({written(left)}) {sign} ({written(right)})"
        case _:
            raise AssertionError


def applied(tree: Tree, site: Site, tensors: Mapping[str, Tensor]) -> Site:
    """What an expression makes of W and b, by its meaning and nothing else."""
    weight, bias = site
    match tree:
        case "none":
            return site
        case "a":
            return weight + tensors["a.B"] @ tensors["a.A"], bias
        case "b":
            return tensors["b.l"][:, None] * weight, tensors["b.l"] * bias
        case "c":
            whole = weight + tensors["c.B"] @ tensors["c.A"]
            return tensors["c.m"][:, None] * nn.functional.normalize(whole, dim=1), bias
        case ("then", first, second):
            return applied(second, applied(first, site, tensors), tensors)
        case ("*", factor, inner):
            changed = applied(inner, site, tensors)
            return weight + factor * (changed[0] - weight), bias + factor * (changed[1] - bias)
        case (sign, left, right):
            one, other = applied(left, site, tensors), applied(right, site, tensors)
            by = 1.0 if sign == "+" else -1.0
            return (
                one[0] + by * (other[0] - weight),
                one[1] + by * (other[1] - bias),
            )
        case _:
            raise AssertionError


def three() -> surgery.Compiled:
    untyped.manual_seed(2)
    spec = """
    adapter a { match * apply lora(r=2) }
    adapter b { match * apply ia3() }
    adapter c { match * apply dora(r=3) }"""
    compiled = surgery.compile(spec, nn.Sequential(nn.Linear(5, 7)).double())
    with torch.no_grad():
        for name in ("a", "b", "c"):
            for value in compiled.parameters(name).values():
                value.add_(0.3 * torch.randn_like(value))
    return compiled


@settings(max_examples=60, deadline=None)
@given(trees)
def test_any_expression_computes_what_it_means(tree: Tree) -> None:
    compiled = three()
    model = compiled.model
    layer = cast(nn.Linear, model.get_submodule("0"))
    base = layer.weight.detach().clone(), layer.bias.detach().clone()
    tensors = {
        f"{adapter}.{name.rpartition('.')[2]}": value
        for adapter in compiled.adapters
        for name, value in compiled.parameters(adapter).items()
    }
    weight, bias = applied(tree, base, tensors)
    x = torch.randn(11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    compiled.activate(written(tree))
    assert close(model(x), nn.functional.linear(x, weight, bias))
    live = compiled.live
    compiled.activate(live)
    assert compiled.live == live
    if live is not None:
        compiled.inverse.merge()
        assert close(layer.weight, weight)
        assert close(layer.bias, bias)
    compiled.inverse.unload()
    assert torch.equal(layer.weight, base[0])
    assert torch.equal(layer.bias, base[1])


# ------------------------------------------------------------------------------- where they meet


def gpt2() -> nn.Module:
    untyped.manual_seed(5)
    model = GPT2Model(GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=31))
    return cast(nn.Module, model).eval().double()


def hidden(model: nn.Module) -> tuple[Tensor, Tensor]:
    found = model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])).last_hidden_state
    return found, found


def test_rows_of_one_layer_are_mixed_where_they_are_the_same(train: Train) -> None:
    spec = """
    adapter a { match @query | @key apply lora(r=3) }
    adapter b { match @query apply ia3() match @value apply dora(r=2) }"""
    compiled = surgery.compile(spec, gpt2())
    train(compiled.model)
    base, a, b = (merged_weights(compiled, e) for e in (None, "a", "b"))
    mix = merged_weights(compiled, "0.3*a + 0.9*b")
    for name, (weight, bias) in base.items():
        wanted = weight + 0.3 * (a[name][0] - weight) + 0.9 * (b[name][0] - weight)
        assert close(mix[name][0], wanted), name
        assert (bias is None) is (mix[name][1] is None)
    forward = hidden(compiled.model)
    assert len(compiled.graphs) == 6
    compiled.inverse.merge()
    assert all_close(hidden(compiled.model), forward)
    before = weights(gpt2())
    after = weights(compiled.inverse.unload())
    assert all(torch.equal(before[n][0], after[n][0]) for n in before)


def test_a_layer_and_some_rows_of_it_are_not_live_together(train: Train) -> None:
    spec = """
    adapter a { match @query apply lora(r=3) }
    adapter b { match c_attn apply lora(r=3) }"""
    compiled = surgery.compile(spec, gpt2())
    train(compiled.model)
    before = hidden(compiled.model)
    with pytest.raises(PlanError, match="some of which are the same") as caught:
        compiled.activate("a + b")
    assert {d.code for d in caught.value.diagnostics} == {"E309"}
    assert all(d.related and d.hint and d.span for d in caught.value.diagnostics)
    assert compiled.live == "a"
    assert all(map(torch.equal, hidden(compiled.model), before))
    model = gpt2()
    names = [*model.state_dict()]
    with pytest.raises(PlanError, match="E309"):
        surgery.compile(f"{spec} activate a + b", model)
    assert [*model.state_dict()] == names


def tied() -> nn.Module:
    untyped.manual_seed(3)
    config = GPT2Config(
        n_embd=24, n_layer=1, n_head=4, vocab_size=37, bos_token_id=0, eos_token_id=0
    )
    return cast(nn.Module, GPT2LMHeadModel(config)).eval().double()


def logits(model: nn.Module) -> tuple[Tensor, Tensor]:
    found = model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])).logits
    return found, found


def test_layers_that_share_a_weight_follow_the_mix(train: Train) -> None:
    spec = """
    adapter a { match wte apply lora(r=3) share }
    adapter b { match wte apply ia3() share match c_fc apply lora(r=2) }
    adapter c { match wte apply lora(r=2) untie }
    adapter d { match lm_head apply lora(r=2) untie }"""
    model = tied()
    compiled = surgery.compile(spec, model)
    train(model)
    forward = outputs(compiled, "a - 0.5*b", logits)
    compiled.inverse.merge()
    assert model.get_parameter("lm_head.weight") is model.get_parameter("transformer.wte.weight")
    assert all_close(logits(model), forward)
    compiled.inverse.unmerge()
    assert all(map(torch.equal, logits(model), forward))
    for text in ("a + c", "b then d", "a + d"):
        with pytest.raises(PlanError, match="E309"):
            compiled.activate(text)
    forward = outputs(compiled, "c + 2*d", logits)
    compiled.inverse.merge()
    assert all_close(logits(model), forward)
    compiled.inverse.unload()
    fresh = tied().state_dict()
    assert all(torch.equal(t, fresh[n]) for n, t in model.state_dict().items())


def test_adapters_of_several_compilations_and_dtypes(
    make_net: MakeNet, run: Run, train: Train
) -> None:
    model = make_net(torch.bfloat16)
    surgery.compile("match * apply vera(r=5)", model, dtype=torch.bfloat16)
    compiled = surgery.compile("adapter b { match * apply lora(r=5) }", model, seed=7)
    half = surgery.compile("adapter c { match first apply lora(r=5) }", model, dtype=torch.float16)
    train(model)
    model.eval()
    forward = outputs(compiled, "2*default - b", run)
    assert all(y.dtype == torch.bfloat16 for y in forward)
    apart = [own.double() for own in outputs(compiled, None, run)]
    compiled.activate("2*default - b")
    compiled.inverse.merge()
    for merged, y, base in zip(run(model), forward, apart, strict=True):
        moved = (y.double() - base).abs().max()
        assert (merged.double() - y.double()).abs().max() < 0.1 * moved
    compiled.inverse.unmerge()
    assert all(map(torch.equal, run(model), forward))
    with pytest.raises(PlanError, match="no dtype in common"):
        half.activate("default + c")


def test_where_a_layer_is_reached_by_its_weight(train: Train) -> None:
    untyped.manual_seed(1)
    model = nn.MultiheadAttention(24, 2, batch_first=True).double().eval()
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def run(some: nn.Module) -> tuple[Tensor, Tensor]:
        y = cast(Tensor, some(x, x, x)[0])
        return y, y

    spec = f"""{BENT}
    adapter a {{ match out_proj apply lora(r=3) }}
    adapter b {{ match out_proj apply ia3() }}"""
    compiled = surgery.compile(spec, model)
    train(model)
    base, a, b = (outputs(compiled, e, run) for e in (None, "a", "b"))
    for y, ya, yb, got in zip(base, a, b, outputs(compiled, "3*a - b", run), strict=True):
        assert close(got, y + 3 * (ya - y) - (yb - y))
    forward = outputs(compiled, "a then b", run)
    compiled.inverse.merge()
    assert all_close(run(model), forward)


class Banks(nn.Module):
    """A batch of matrices that no class of torch knows."""

    def __init__(self) -> None:
        super().__init__()
        self.banks = nn.Parameter(torch.randn(3, 13, 17))

    def forward(self, x: Tensor) -> Tensor:
        """[n, 17] to [n, 3, 13]."""
        return torch.einsum("eoi,ni->neo", self.banks, x)


def test_the_matrices_of_a_batch_are_mixed_each_by_itself(train: Train) -> None:
    untyped.manual_seed(1)
    model = Banks().double()
    x = torch.randn(2, 17, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spec = """
    adapter a { match banks apply vera(r=3) }
    adapter b { match banks apply dora(r=2) }"""
    compiled = surgery.compile(spec, model)
    train(model)

    def run(some: nn.Module) -> tuple[Tensor, Tensor]:
        y = cast(Tensor, some(x))
        return y, y

    base, a, b = (outputs(compiled, e, run) for e in (None, "a", "b"))
    for y, ya, yb, got in zip(base, a, b, outputs(compiled, "3*a - b", run), strict=True):
        assert close(got, y + 3 * (ya - y) - (yb - y))
    forward = outputs(compiled, "a then b", run)
    compiled.inverse.merge()
    assert all_close(run(model), forward)
    compiled.inverse.unmerge()
    assert all(map(torch.equal, run(model), forward))


# ------------------------------------------------------------------------------------- the state

MIXES = ("0.7*a - 2*b", "a then b", "-b", "a - 0.5*(b then a)")


@pytest.mark.parametrize("text", MIXES)
@pytest.mark.parametrize("merge", [False, True])
def test_copies_carry_what_is_live(
    text: str, merge: bool, make_net: MakeNet, run: Run, train: Train
) -> None:
    model = make_net(torch.float32)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    compiled = surgery.compile(two("lora(r=5)", "vera(r=5)"), model)
    train(model)
    model.eval()
    forward = outputs(compiled, text, run)
    if merge:
        compiled.inverse.merge()
    now = run(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        handle = surgery.of(twin)
        assert (handle.live, handle.merged) == (compiled.live, merge)
        assert all(map(torch.equal, run(twin), now))
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        if merge:
            handle.inverse.unmerge()
        assert all(map(torch.equal, run(twin), forward))
        handle.inverse.merge()
        plain = handle.inverse.unload()
        assert all(torch.equal(t, before[n]) for n, t in plain.state_dict().items())


def test_an_adapter_is_saved_while_a_mix_is_merged(
    tmp_path: Path, make_net: MakeNet, run: Run, train: Train
) -> None:
    model = make_net(torch.float32)
    compiled = surgery.compile(two("lora(r=5)", "vera(r=5)"), model)
    train(model)
    model.eval()
    alone = outputs(compiled, "b", run)
    compiled.activate("a - 2*b")
    compiled.inverse.merge()
    compiled.save(tmp_path / "b", "b")
    other = make_net(torch.float32).eval()
    assert surgery.attach(tmp_path / "b", other).live == "b"
    assert all(map(torch.equal, run(other), alone))


def test_arithmetic_takes_a_mix_of_updates_back(make_net: MakeNet, train: Train) -> None:
    model = make_net(torch.float64)
    compiled = surgery.compile(two("lora(r=5)", "bone(r=5)"), model)
    train(model)
    base = merged_weights(compiled, None)
    compiled.activate("0.5*a + 2*b")
    compiled.inverse.merge(undo="algebraic")
    compiled.inverse.unmerge()
    assert all(close(now, base[name][0]) for name, (now, _) in weights(model).items())
    other = surgery.compile("adapter c { match first apply ia3() }", model)
    other.activate("a + c")
    with pytest.raises(StateError, match="E405"):
        other.inverse.merge(undo="algebraic")


def test_each_part_of_a_mix_has_gradients_and_the_base_runs_once(
    make_net: MakeNet, run: Run, train: Train
) -> None:
    model = make_net(torch.float64)
    compiled = surgery.compile(two("lora(r=5)", "dora(r=5)", "first"), model)
    train(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    outputs(compiled, "0.5*a + 2*b", run)
    for graph in compiled.graphs.values():
        assert [n.op for n in graph.nodes].count("call_module") <= 1
    untyped.autograd.backward(sum(y.sum() for y in run(model)))
    found = {n for n, p in model.named_parameters() if p.grad is not None}
    assert {n for n, needed in flags.items() if needed} == found
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_what_a_mix_drops_is_dropped_by_each_for_itself(make_net: MakeNet, run: Run) -> None:
    spec = """
    method thin() on matrix { train A[out, in] = 0 W' = W + A @ drop(0.5) }
    adapter a { match last apply thin() }
    adapter b { match last apply thin() }"""
    model = make_net(torch.float64)
    compiled = surgery.compile(spec, model)
    with torch.no_grad():
        for parameter in (*compiled.parameters("a").values(), *compiled.parameters("b").values()):
            parameter.fill_(1.0)
    model.train()
    base = outputs(compiled, None, run)[0]
    assert not close(outputs(compiled, "a - b", run)[0], base)
    model.eval()
    assert close(run(model)[0], outputs(compiled, None, run)[0])
