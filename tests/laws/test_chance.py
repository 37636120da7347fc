"""What is random in training: noise, what is dropped together, and the facts that decide it."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import surgery
from surgery.model.holder import parameters_of

untyped = cast(Any, torch)  # for calls whose stubs are not fully typed

NOISY = """method blurred(deviation: float = 1) on matrix {
  train v[out] = 0
  y' = y + noise(deviation * exp(v * y))
}
"""


def layer(bias: bool = True) -> nn.Module:
    untyped.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5, bias=bias))


def adapted(spec: str, model: nn.Module) -> surgery.Compiled:
    compiled = surgery.compile(spec, model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in compiled.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return compiled


def test_noise_has_its_deviation_in_training_and_is_nothing_elsewhere() -> None:
    model = layer()
    x = torch.randn(1, 7).expand(20_000, 7)
    base = model(x)
    compiled = adapted(f"{NOISY} match 0 apply blurred(deviation=0.5)", model)
    assert torch.equal(model.eval()(x), base)
    v = next(t for n, t in compiled.parameters().items() if n.endswith("v"))
    seen = model.train()(x) - base
    wanted = 0.5 * torch.exp(v * base[0])
    torch.testing.assert_close(seen.std(0), wanted, rtol=0.05, atol=0)
    assert (seen.mean(0).abs() < 6 * wanted / len(x) ** 0.5).all()
    assert compiled.plan.sites[0].form.derived.merge_class == "exact"


def test_noise_has_the_gradient_of_its_deviation() -> None:
    model = layer()
    compiled = adapted(f"{NOISY} match 0 apply blurred()", model.train())
    x = torch.randn(3, 7)
    v = next(p for p in compiled.model.parameters() if p.requires_grad)
    y = model.eval()(x).detach()
    untyped.manual_seed(2)
    noise = model.train()(x) - y
    (found,) = torch.autograd.grad(noise.sum(), [v])
    torch.testing.assert_close(found, (noise.detach() * y).sum(0))


def test_noise_is_drawn_for_each_of_a_vmap() -> None:
    model = layer()
    compiled = adapted(f"{NOISY} match 0 apply blurred()", model.train())
    state = {n: p.detach() for n, p in compiled.model.named_parameters()}

    def run(x: Tensor) -> Tensor:
        return functional_call(compiled.model, state, (x,))

    one = torch.randn(7)
    many = untyped.func.vmap(run, randomness="different")(one.expand(4, 7))
    assert many.shape == (4, 5)
    assert not torch.equal(many[0], many[1])


def test_a_mix_has_the_noise_of_its_parts_and_their_weights() -> None:
    model = layer()
    spec = (
        f"{NOISY} adapter a {{ match 0 apply pvera(r=3) }}\n"
        "adapter b { match 0 apply lora(r=2) } activate 0.5*a + 2*b"
    )
    compiled = adapted(spec, model.eval())
    x = torch.randn(3, 7)
    quiet = model(x)
    assert not torch.equal(model.train()(x), quiet)
    compiled.inverse.merge()
    torch.testing.assert_close(model.eval()(x), quiet)


def test_what_reads_the_weight_cannot_follow_noise() -> None:
    with pytest.raises(surgery.SurgeryError, match=r"the noise before it is no part of W'"):
        surgery.compile("match 0 apply pvera(r=2) then dora(r=2)", layer())
    surgery.compile("match 0 apply pvera(r=2) then ia3()", layer())


def test_noise_is_refused_where_a_weight_is_computed() -> None:
    attention = nn.MultiheadAttention(6, 2)
    with pytest.raises(surgery.SurgeryError, match=r"error\[E30[57]\]"):
        surgery.compile("match out_proj apply pvera(r=2)", attention)


@pytest.mark.parametrize(
    ("equation", "code"),
    [
        ("W' = W + noise(W)", "E108"),
        ("b' = b + noise(b)", "E108"),
        ("W" + "' = W @ drop(0.1, 5)", "E111"),
        ("W" + '\' = W @ drop(0.1, "row")', "E111"),
        ("W' = W @ drop()", "E104"),
        ("W' = W @ transpose(blockdiag(neumann(W, 2)))", "E108"),
    ],
)
def test_what_is_no_equation_of_chance_is_refused(equation: str, code: str) -> None:
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.compile(f"method m() on matrix {{ {equation} }} match 0 apply m()", layer())
    assert code in {d.code for d in caught.value.diagnostics}


def test_too_many_terms_are_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 5))
    spec = (
        "method m(n: int = 2) on matrix { train Q[in, in] = 0; W' = W @ neumann(Q, n) }"
        "match 0 apply m(n=5000)"
    )
    with pytest.raises(surgery.SurgeryError, match=r"error\[E301\]"):
        surgery.compile(spec, model)


DROPPED = """method part(p: float = 0, how: text = "rows") on matrix {
  train D[out, in] = 1
  if how == "rows" { W' = W + drop(p, "rows") @ D }
  else if how == "scaled" { W' = W + drop(p, "scaled rows") @ D }
  else if how == "whole" { W' = W + drop(p, "whole") @ D }
  else { W' = W + D }
}
"""


@pytest.mark.parametrize("how", ["rows", "scaled", "whole"])
def test_what_is_dropped_together_is_the_same_of_all_tokens(how: str) -> None:
    model = layer()
    x = torch.rand(4, 7) + 1
    base = model(x)
    spec = f'{DROPPED} match 0 apply part(p=0.4, how="{how}")'
    surgery.compile(spec, model)
    whole = model.eval()(x) - base
    shares: set[float] = set()
    for _ in range(40):
        share = (model.train()(x) - base) / whole  # [4, 5], what is left of each row of D
        assert torch.allclose(share, share[:1].expand(4, 5), atol=1e-4)
        row = share[0]
        kept = row[row.abs() > 1e-4]
        if how == "scaled" and len(kept):
            assert torch.allclose(kept, torch.tensor(5 / len(kept)), atol=1e-3)
        elif how != "scaled":
            assert torch.allclose(kept, torch.tensor(1.0), atol=1e-3)
        assert how != "whole" or len(kept) in (0, 5)
        shares.add(len(kept))
    assert len(shares) > 1


FACTS = """method told() on matrix {
  if has_bias { train c[out] = 1; b' = b + c } else { train D[out, in] = 1; W' = W + D }
  if kind == "linear" { train e[out] = 0 } else { train e[in] = 0 }
}
"""


def test_a_method_may_ask_for_a_bias_and_the_kind_of_its_site() -> None:
    for bias in (True, False):
        compiled = surgery.compile(f"{FACTS} match 0 apply told()", layer(bias))
        shapes = {n.rpartition(".")[2]: tuple(t.shape) for n, t in compiled.parameters().items()}
        assert shapes == ({"c": (5,)} if bias else {"D": (5, 7)}) | {"e": (5,)}
    table = surgery.compile(f"{FACTS} match 0 apply told()", nn.Sequential(nn.Embedding(7, 5)))
    assert "D" in parameters_of_adapter(table)


def parameters_of_adapter(compiled: surgery.Compiled) -> set[str]:
    return {name.rpartition(".")[2] for name in compiled.parameters()}


def test_facts_are_no_names_for_a_method() -> None:
    for name in ("has_bias", "kind"):
        spec = f"method m({name}: int = 1) on matrix {{ W' = {name} * W }} match 0 apply m()"
        with pytest.raises(surgery.SurgeryError, match=r"error\[E106\]"):
            surgery.compile(spec, layer())


def test_a_bias_that_is_added_is_merged_where_there_is_none() -> None:
    model = layer(bias=False)
    x = torch.randn(3, 7)
    compiled = adapted("match 0 apply lora(r=2, bias=true)", model)
    expected = model(x)
    compiled.inverse.merge()
    assert parameters_of(model.get_submodule("0")).get("bias") is not None
    torch.testing.assert_close(model(x), expected)
    compiled.inverse.unload()
    assert parameters_of(model.get_submodule("0")).get("bias") is None
