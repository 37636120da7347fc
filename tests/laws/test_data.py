"""Beginnings that read data: what is seen, what is left as it was, and what is made of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import bits, moved
from torch import Tensor, nn
from torch.nn import functional as F

import surgery

untyped = cast(Any, torch)  # for calls whose stubs are not fully typed

MakeNet = Callable[[torch.dtype], nn.Module]
Run = Callable[[nn.Module], tuple[Tensor, Tensor]]

SEEING = """
method see() on matrix {
  frozen C[in, in] = comoment(x)
  frozen M[in, in] = moment(x)
  frozen G[out, in] = gradient(W)
  train d[out] = 0
  W' = W + d * rows(W @ C + G + W @ M)
}
"""


def drawn(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def line(fan_in: int = 5, fan_out: int = 7) -> nn.Sequential:
    untyped.manual_seed(2)
    return nn.Sequential(nn.Linear(fan_in, fan_out), nn.Dropout(0.5)).double()


def squares(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().sum()


def seen(model: nn.Module, batches: list[Any], where: str = "/0/") -> dict[str, Tensor]:
    spec = f"{SEEING} match {where} apply see()"
    compiled = surgery.compile(spec, model, data=batches, loss=squares)
    return {name.split(".")[-1]: t for name, t in compiled.parameters().items()}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 11), min_size=1, max_size=4))
def test_what_is_seen_is_what_the_whole_data_is(sizes: list[int]) -> None:
    batches = [3 + drawn(n, 5, seed=i) for i, n in enumerate(sizes)]
    found, every, model = seen(line(), batches), torch.cat(batches), line().eval()
    apart = every - every.mean(0)
    torch.testing.assert_close(found["C"], apart.T @ apart)
    scaled = [b / b.max().abs() for b in batches]
    mean = sum((b.T @ b for b in scaled), torch.zeros(5, 5).double()) / len(batches)
    torch.testing.assert_close(found["M"], mean)
    gradients = [2 * model(b).T @ b for b in batches]
    torch.testing.assert_close(found["G"], sum(gradients, torch.zeros(())) / len(batches))


def test_the_input_of_a_convolution_is_its_patches() -> None:
    untyped.manual_seed(2)
    conv = nn.Conv2d(6, 4, (3, 2), stride=(1, 2), padding=1, dilation=(1, 2), groups=2).double()
    model, x = nn.Sequential(conv), drawn(3, 6, 7, 9)
    found = seen(model, [x])
    patches = F.unfold(x, (3, 2), dilation=(1, 2), padding=1, stride=(1, 2))
    every = cast(Tensor, patches.unflatten(1, (2, 18))).permute(0, 1, 3, 2).reshape(-1, 18)
    apart = every - every.mean(0)
    torch.testing.assert_close(found["C"], apart.T @ apart)
    conv.requires_grad_(True)
    (wanted,) = torch.autograd.grad(squares(model, x), [conv.weight])
    torch.testing.assert_close(found["G"], wanted.flatten(1))


class Labelled(nn.Module):
    """A model whose batches have names, and whose output has a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 5)
        self.first = nn.Linear(5, 7)
        self.idle = nn.Linear(5, 3)
        self.calls = 0

    def forward(self, tokens: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        """Tokens [n, t]."""
        self.calls += 1
        found = self.first(self.table(tokens))
        return type("Output", (), {"loss": found[labels != -100].square().sum()})()


def labelled() -> tuple[Labelled, dict[str, Tensor]]:
    untyped.manual_seed(3)
    tokens = torch.arange(2 * 7).reshape(2, 7) % 11
    mask, labels = torch.ones(2, 7).long(), tokens.clone()
    mask[1, 4:], labels[0, :2] = 0, -100
    return Labelled(), {"tokens": tokens, "attention_mask": mask, "labels": labels}


def test_what_counts_is_no_padding_and_has_a_label() -> None:
    model, batch = labelled()
    spec = f"{SEEING} match first apply see()"
    found = surgery.compile(spec, model, data=[batch]).parameters()["first.surgery.default.C"]
    counts = (batch["attention_mask"] == 1) & (batch["labels"] != -100)
    x = model.table(batch["tokens"])[counts].detach()
    apart = x - x.mean(0)
    torch.testing.assert_close(found, apart.T @ apart)


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was(failing: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.3)).double()
    model[1].eval()
    cast(Any, model[0]).weight.requires_grad_(False)
    model[0].bias.grad = torch.ones(7).double()
    before, modes = bits(model), [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state, python = torch.get_rng_state(), random.getstate()

    def batches() -> Iterator[Tensor]:
        yield torch.randn(3, 5).double() * random.random()
        if failing:
            raise KeyError("the loader broke")
        yield torch.randn(3, 5).double()

    def run() -> surgery.Compiled:
        return surgery.compile(
            f"{SEEING} match /0/ apply see()", model, data=batches(), loss=squares
        )

    if failing:
        with pytest.raises(KeyError, match="broke"):
            run()
    else:
        run().inverse.unload()
    assert bits(model) == before
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model[0].bias.grad, torch.ones(7).double())
    assert cast(Any, model[0]).weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert not any(vars(m)["_forward_pre_hooks"] for m in model.modules())


def test_what_is_live_already_is_not_seen() -> None:
    batches = [drawn(11, 5)]
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).double()
    alone = seen(model, batches, "/1/")
    surgery.of(model).inverse.unload()
    compiled = surgery.compile("adapter other { match /0/ apply lora(r=2) }", model)
    moved(compiled)
    surgery.compile(
        f"{SEEING} adapter late {{ match /1/ apply see() }}", model, data=batches, loss=squares
    )
    found = {n.split(".")[-1]: t for n, t in compiled.parameters("late").items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in alone.items())
    assert compiled.live == "other"


def test_batches_of_every_form_and_the_progress() -> None:
    x, told = drawn(3, 5), list[tuple[int, int | None]]()
    forms: list[Any] = [x, (x,), [x], {"input": x}]
    for batch in forms:
        spec = "match /0/ apply eva(r=2, rho=1)"

        def progress(done: int, of: int | None) -> None:
            told.append((done, of))

        surgery.compile(spec, line(), data=[batch], progress=progress)
        surgery.compile(spec, line(), data=iter([batch]), progress=progress)
    assert told == [(1, 1), (1, None)] * len(forms)


# ------------------------------------------------------------------------------ what is made of it

CALLS = (
    "eva(r=4, alpha=3, dropout=0.1)",
    "eva(r=3, rho=1, whiten=true, rslora=true)",
    "corda(r=4, alpha=3)",
    'corda(r=3, alpha=3, corda_method="kpm", rslora=true)',
    "lora_ga(r=2, alpha=3)",
    'lora_ga(r=2, direction="ArBr", scale="unit")',
)
SITES = "first | middle | last | image | grouped | wave | volume"


def of_both(model: nn.Module, batch: Any) -> Tensor:
    return sum((y.square().mean() for y in model(*batch)), torch.zeros(()))


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tokens = torch.arange(40).reshape(4, 10) * 7 % 30
    return tokens, drawn(4, 6, 7, 9).to(dtype)


@pytest.mark.parametrize("call", CALLS)
def test_every_kind_begins_as_the_base_merges_and_comes_off(
    call: str, make_net: MakeNet, run: Run, tmp_path: Path
) -> None:
    model = make_net(torch.float64).eval()
    before, base = bits(model), run(model)
    table = "" if "lora_ga" not in call else " | table"
    compiled = surgery.compile(
        f"match {SITES}{table} apply {call}",
        model,
        data=[inputs(torch.float64)],
        loss=of_both,
    )
    for y, wanted in zip(run(model), base, strict=True):
        torch.testing.assert_close(y, wanted)
    moved(compiled)
    adapted = run(model)
    assert not torch.allclose(adapted[0], base[0])
    compiled.save(tmp_path)
    for act in (compiled.inverse.merge, compiled.inverse.unmerge):
        act()
        for y, wanted in zip(run(model), adapted, strict=True):
            torch.testing.assert_close(y, wanted)
    compiled.inverse.unload()
    assert bits(model) == before
    again = surgery.attach(tmp_path, model)  # which needs no data
    for y, wanted in zip(run(again.model), adapted, strict=True):
        assert torch.equal(y, wanted)


def test_without_data_numbers_are_drawn_and_weights_rounded(make_net: MakeNet, run: Run) -> None:
    for call in ("ortholora(r=4)", "loftq(r=2)", 'loftq(r=2, rounding="int8", alpha=3)'):
        model = make_net(torch.float64)
        before, base = bits(model), run(model)
        compiled = surgery.compile(f"match {SITES} | table apply {call}", model)
        same = zip(run(model), base, strict=True)
        assert all(torch.allclose(y, b) for y, b in same) is call.startswith("ortho")
        if call.startswith("ortho"):
            assert all(t.abs().max() > 0 for t in compiled.parameters().values())
        compiled.inverse.unload()
        assert bits(model) == before


def test_rounding_is_nearly_made_good() -> None:
    model = line(23, 31)
    weight = cast(Any, model[0]).weight.detach().clone()
    errors: list[Tensor] = []
    for r in (1, 8, 20):
        compiled = surgery.compile(f"match /0/ apply loftq(r={r}, alpha=5)", model)
        compiled.inverse.merge()
        errors.append((cast(Any, model[0]).weight - weight).norm())
        compiled.inverse.unload()
    assert errors[0] > errors[1] > errors[2] > 0


# -------------------------------------------------------------------------------- ranks, shared out


def ranks(compiled: surgery.Compiled) -> dict[str, int]:
    return {s.path: s.form.shapes["A"][0] for s in compiled.plan.sites}


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1.0, 1.5, 2.0, 3.0]), st.integers(0, 9))
def test_ranks_are_those_of_the_largest_shares(r: int, rho: float, seed: int) -> None:
    model = nn.ModuleList([nn.Linear(5, 3), nn.Linear(7, 2), nn.Linear(11, 3)]).double()
    scales = [drawn(n, seed=seed + n).exp() for n in (5, 7, 11)]
    batches = [[drawn(13, len(s), seed=seed + i) * s for i, s in enumerate(scales)]]

    class Each(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each = model

        def forward(self, *xs: Tensor) -> list[Tensor]:
            return [layer(x) for layer, x in zip(self.each, xs, strict=True)]

    spec = f"match each.* apply eva(r={r}, alpha=3, rho={rho})"
    compiled = surgery.compile(spec, Each(), data=batches)
    shares: list[tuple[float, str]] = []
    for i, x in enumerate(batches[0]):
        squares = cast(Tensor, untyped.linalg.svdvals(x - x.mean(0))).square()
        most = min(int(r * rho + 0.5), x.shape[1])
        shares += [(float(s), f"each.{i}") for s in (squares / squares.sum())[:most]]
    largest = [path for _, path in sorted(shares, reverse=True)[: 3 * r]]
    assert ranks(compiled) == {p: largest.count(p) for p in sorted({*largest})}
    for site in compiled.plan.sites:
        now: dict[str, Any] = dict(site.form.arguments)
        assert now["alpha"] == pytest.approx(3 * now["r"] / r)


# ------------------------------------------------------------------------------- what is refused


def refused(spec: str, model: nn.Module, **given: Any) -> surgery.Diagnostic:
    before = bits(model)
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.compile(spec, model, **given)
    assert bits(model) == before
    return caught.value.diagnostics[0]


def test_what_cannot_be_seen_is_refused_and_the_model_left_alone() -> None:
    model, batch = labelled()
    eva = "match first apply eva(r=2)"
    assert refused(eva, model).code == "E421"
    assert "table" in refused("match table apply eva(r=2)", model, data=[batch]).message
    assert "never called" in refused("match idle apply eva(r=2)", model, data=[batch]).message
    idle = refused("match idle apply lora_ga(r=1)", model, data=[batch])
    assert "no gradient reaches it" in idle.message
    assert "never called" in refused(eva, model, data=[]).message
    no_loss = refused("match /0/ apply lora_ga(r=2)", line(), data=[drawn(3, 5)])
    assert (no_loss.code, no_loss.message) == ("E422", "the model's output has no loss")
    endless = drawn(3, 5) / 0
    assert "not finite" in refused("match /0/ apply eva(r=2)", line(), data=[endless]).message
    with pytest.raises(surgery.SurgeryError, match="on the meta device"):
        surgery.compile(eva, Labelled().to("meta"), data=[batch])


def test_a_chain_sees_another_w() -> None:
    found = refused("match /0/ apply ia3() then corda(r=2)", line(), data=[drawn(3, 5)])
    assert found.code == "E134"
    found = refused("match /0/ apply eva(r=2) then ia3()", line(), data=[drawn(3, 5)])
    assert "shares out" in found.message


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("train A[in, in] = comoment(W); W' = W @ A", "E104", "is asked of x"),
        ("train A[out, in] = gradient(); W' = W + A", "E104", "takes one argument"),
        ("W' = W + gradient(W)", "E136", "stands in a beginning"),
        ("let k = among(singular_values(W, r), r); W' = k * W", "E138", "after the sites are"),
        ("train d[out] = 0; r' = kept(2 * d); W' = d * rows(W)", "E104", "a trained vector"),
        ("train A[r, in] = 0; r' = among(A, r); W' = W", "E108", "a vector is needed"),
    ],
)
def test_what_is_asked_in_another_way_is_refused(body: str, code: str, said: str) -> None:
    found = surgery.check(f"method m(r: int = 2) on matrix {{ {body} }} match q apply m()")
    assert [d.code for d in found][:1] == [code]
    assert said in found[0].message


# ------------------------------------------------------------------------------ slices and batches


class Mixture(nn.Module):
    """Three matrices in one parameter, and rows of one layer that play several parts."""

    def __init__(self) -> None:
        super().__init__()
        untyped.manual_seed(5)
        self.mixer = nn.Parameter(0.3 * torch.randn(3, 7, 5).double())
        self.fused = nn.Linear(7, 12).double()

    def forward(self, x: Tensor) -> Tensor:
        """[n, 5] to [n, 3, 12]."""
        return self.fused(torch.tanh(torch.einsum("koi,ni->nko", self.mixer, x)))


def test_the_matrices_of_a_batch_have_their_own_gradients() -> None:
    spec, x = "match mixer apply lora_ga(r=2, alpha=3)", drawn(11, 5)
    model = Mixture()
    base, before = model(x), bits(model)
    compiled = surgery.compile(spec, model, data=[x], loss=squares)
    torch.testing.assert_close(model(x), base)
    found = compiled.parameters()["surgery.default.mixer.A"]
    fresh = Mixture()
    (gradient,) = torch.autograd.grad(squares(fresh, x), [fresh.mixer])
    wanted = torch.stack([untyped.linalg.svd(g)[2][:2] for g in gradient])
    torch.testing.assert_close(found.abs(), wanted.abs())
    moved(compiled)
    adapted = model(x)
    compiled.inverse.merge()
    torch.testing.assert_close(model(x), adapted)
    compiled.inverse.unload()
    assert bits(model) == before


def test_rows_of_a_layer_see_its_inputs_and_their_own_gradient() -> None:
    x = drawn(11, 5)
    for call, name in (("eva(r=3, rho=1)", "A"), ("lora_ga(r=2)", "A")):
        spec = f"match fused[0:5] | fused[5:12] apply {call}"
        model = Mixture()
        compiled = surgery.compile(spec, model, data=[x], loss=squares)
        first, second = (s.adapted(name) for s in compiled.plan.sites)
        same = torch.equal(compiled.parameters()[first], compiled.parameters()[second])
        assert same is call.startswith("eva")
        torch.testing.assert_close(model(x), Mixture()(x))


def test_a_batch_of_matrices_has_one_rank() -> None:
    method = """
    method m(r: int = 2) on matrix {
      r' = among(singular_values(gradient(W), r), r)
      train A[r, in] = 0
      train B[out, r] = 0
      W' = W + B @ A
    }
    """
    found = refused(f"{method} match mixer apply m()", Mixture(), data=[drawn(3, 5)], loss=squares)
    assert (found.code, "one by one" in found.hint) == ("E422", True)


def test_a_twin_and_a_second_call_see_the_same() -> None:
    x, spec = drawn(11, 5), "match /0/ apply eva(r=2, rho=1)"
    model = line()
    twin = surgery.compile(spec, model, data=[x], inplace=False)
    assert twin.model is not model
    own = surgery.compile(spec, model, data=[x])
    for name, tensor in own.parameters().items():
        assert torch.equal(tensor, twin.parameters()[name])


def test_on_meta_it_waits_for_data_that_never_comes_and_attaches_all_the_same(
    tmp_path: Path,
) -> None:
    x, spec = drawn(11, 5), "match /0/ apply eva(r=2, rho=1)"
    waiting = surgery.compile(spec, line().to("meta"))
    assert all(t.is_meta for n, t in waiting.parameters().items() if n.endswith("A"))
    waiting.model.to_empty(device="cpu")
    real = surgery.compile(spec, line(), data=[x])
    real.save(tmp_path)
    later = surgery.attach(tmp_path, line().to("meta"))
    for name, tensor in later.parameters().items():
        assert torch.equal(tensor, real.parameters()[name])
    empty = line().to("meta")
    compiled = surgery.compile(spec, empty)
    empty.load_state_dict(line().state_dict(), strict=False, assign=True)
    with pytest.raises(surgery.SurgeryError, match="which only data shows"):
        compiled.materialize()


def test_it_can_be_verified() -> None:
    x = drawn(11, 5)
    told = surgery.verify("match /0/ apply eva(r=2)", line(), lambda m: m(x), data=[x])
    assert told.passed


def test_the_plan_says_so() -> None:
    told = str(surgery.plan("match /0/ apply eva(r=2)", line()))
    assert "begins with comoment(x), which is seen of data" in told
    assert "shared out among all sites of the method: r, alpha" in told
    told = str(surgery.plan("match /0/ apply loftq(r=2)", line()))
    assert "changes W at the start, by what is kept as Q;" in told
    assert "seen" not in told
