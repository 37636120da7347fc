"""`M then N` is N on the site with M: against the two put on one after the other, in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support import bits, moved
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

import surgery
from surgery.located import parameters_at

untyped = cast(Any, torch)

METHODS = (
    "lora(r=5, alpha=7)",
    "dora(r=5)",
    "bone(r=5)",
    "bat(r=6)",
    'miss(r=4, mini_r=3, init_weights="mini")',
    "ia3()",
    'ia3(side="in")',
    "vera(r=5)",
    "delora(r=5)",
    "oft(block_size=6)",
)
RANDOM = ("lora(r=5, dropout=0.3)", "dora(r=5, dropout=0.3)", "vera(r=5, dropout=0.3)")
ON_EVERY_KIND = (
    ("ia3()", "lora(r=2, dropout=0.2)"),
    ("lora(r=2)", "dora(r=2)"),
    ("bat(r=6)", "vera(r=3)"),
    ('ia3(side="in")', "bone(r=3)"),
    ("dora(r=2)", "ia3()"),
    ("oft(block_size=6)", "lora(r=2)"),
    ('road(variant="road_4", group_size=6)', "hira(r=2)"),
    ("hira(r=2)", "road(group_size=6)"),
)

MakeNet = Callable[[torch.dtype], nn.Module]
Run = Callable[[nn.Module], tuple[Tensor, Tensor]]
Train = Callable[[nn.Module], None]


class Two(nn.Module):
    """A layer with a bias and one without; 18 to 42 to 12."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(18, 42)
        self.b = nn.Linear(42, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of [n, 18]."""
        return self.b(torch.tanh(self.a(x)))


def two(dtype: torch.dtype = torch.float64) -> Two:
    untyped.manual_seed(7)
    return Two().to(dtype).eval()


X = torch.randn(5, 18, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def one_after_the_other(chained: surgery.Compiled, model: nn.Module, *calls: str) -> nn.Module:
    """Each method by itself on the merged model of those before it, with the chain's parameters."""
    by_path = {site.path: site for site in chained.plan.sites}
    for index, call in enumerate(calls):
        alone = surgery.compile(f"match * apply {call}", model)
        for site in alone.plan.sites:
            source = parameters_at(chained.model, chained.plan, by_path[site.path])
            for name, value in parameters_at(model, alone.plan, site).items():
                with torch.no_grad():
                    value.copy_(source[f"{name}_{index + 1}" if index else name])
        if index + 1 < len(calls):
            alone.inverse.merge()
            alone.inverse.unload(keep_merge=True)
    return model


def near(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------- every pair


@pytest.mark.parametrize("second", METHODS)
@pytest.mark.parametrize("first", METHODS)
def test_a_chain_is_the_second_on_the_merged_first(first: str, second: str) -> None:
    model = two()
    base, before = model(X), bits(model)
    compiled = surgery.compile(f"match * apply {first} then {second}", model)
    near(model(X), base)
    moved(compiled)
    adapted = model(X)
    assert (adapted - base).abs().max() > 1e-2
    near(adapted, one_after_the_other(compiled, two(), first, second)(X))
    counts = [surgery.plan(f"match * apply {call}", two()).trainable for call in (first, second)]
    assert compiled.plan.trainable == sum(counts)
    compiled.inverse.merge()
    near(model(X), adapted)
    compiled.inverse.unmerge()
    assert torch.equal(model(X), adapted)
    compiled.inverse.merge(undo="algebraic")
    compiled.inverse.unmerge()
    torch.testing.assert_close(model(X), adapted, rtol=1e-7, atol=1e-7)
    compiled.inverse.unload()
    untouched = two()
    assert bits(model).keys() == before.keys()
    torch.testing.assert_close(model(X), untouched(X), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("pair", ON_EVERY_KIND)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_chains_on_every_kind_of_layer(
    pair: tuple[str, str],
    dtype: torch.dtype,
    make_net: MakeNet,
    run: Run,
    train: Train,
    tmp_path: Path,
) -> None:
    model = make_net(dtype).eval()
    base, before = run(model), bits(model)
    compiled = surgery.compile(f"match * apply {pair[0]} then {pair[1]}", model)
    train(model)
    adapted = run(model)
    assert any((a - b).abs().max() > 1e-2 for a, b in zip(adapted, base, strict=True))
    report = compiled.save(tmp_path / "out")
    assert " then " in report.peft
    other = make_net(dtype).eval()
    surgery.attach(tmp_path / "out", other)
    assert all(map(torch.equal, run(other), adapted))
    copied = pickle.loads(pickle.dumps(model))
    assert all(map(torch.equal, run(copied), adapted))
    compiled.inverse.merge()
    if dtype is torch.float64:
        for merged, found in zip(run(model), adapted, strict=True):
            near(merged, found)
        alone = one_after_the_other(surgery.of(copied), make_net(dtype).eval(), *pair)
        for there, found in zip(run(alone), adapted, strict=True):
            near(there, found)
    compiled.inverse.unload()
    assert bits(model) == before
    assert all(map(torch.equal, run(model), base))


def test_three_methods_and_arguments_that_a_site_decides() -> None:
    calls = ("ia3()", "lora(r = 2 if in == 18 else 3)", "bone(r = out / 6)")
    model = two()
    compiled = surgery.compile(f"match * apply {' then '.join(calls)}", model)
    moved(compiled)
    near(model(X), one_after_the_other(compiled, two(), *calls)(X))
    first, last = compiled.plan.sites
    assert first.form.call == (
        'ia3(side="out") then lora(r=2, alpha=2, dropout=0, rslora=false, '
        'init_weights="default", bias=false) then bone(r=7)'
    )
    assert [*first.form.shapes] == ["l", "A_2", "B_2", "D_3"]
    assert dict(last.form.links[1].arguments)["r"] == 3
    compiled.inverse.merge()
    compiled.inverse.unmerge()


# ------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("first", [*RANDOM, "ia3()", "oft(block_size=6)"])
@pytest.mark.parametrize("second", RANDOM)
def test_each_method_of_a_chain_drops_by_itself(first: str, second: str) -> None:
    model = two()
    compiled = surgery.compile(f"match a apply {first} then {second}", model)
    moved(compiled)
    at_rest = model.a(X)
    graph = compiled.graphs["a"]
    drops = {n for n in graph.nodes if n.target is F.dropout}
    assert len(drops) >= sum("dropout" in call for call in (first, second))
    model.train()
    untyped.manual_seed(0)
    some = model.a(X.expand(4000, 5, 18))
    assert some.std(0).max() > 1e-2
    error = 6 * some.std(0) / 4000**0.5 + 1e-3
    assert ((some.mean(0) - at_rest).abs() < error).all()
    model.a(X).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    compiled.inverse.merge()
    near(model.a(X), at_rest)


def test_what_both_drop_on_one_vector_is_not_the_same() -> None:
    spec = "method own() on matrix { train B[out, in] = 0 W' = W + B @ drop(0.5) }"
    model = two()
    compiled = surgery.compile(f"{spec} match b apply own() then own()", model)
    (graph,) = compiled.graphs.values()
    assert sum(node.target is F.dropout for node in graph.nodes) == 2


# --------------------------------------------------------------------------------- beginnings


def test_a_beginning_sees_the_weight_as_the_methods_before_it_leave_it() -> None:
    grow = "method grow() on matrix { train k[out] = 3 W' = k * rows(W) }"
    model = two()
    norms = model.a.weight.detach().square().sum(1).sqrt()
    compiled = surgery.compile(f"{grow} match a apply grow() then dora(r=2)", model)
    parameters = {n.rpartition(".")[2]: v for n, v in compiled.parameters().items()}
    near(parameters["m_2"], 3 * norms)
    near(model.a(X), 3 * F.linear(X, model.a.weight) + model.a.bias)


def test_a_beginning_reads_what_the_first_shares() -> None:
    shared = """
    method base(k: float = 1) on matrix { shared S[out, in] ~ normal(std = 1) W' = W + k * S }
    """
    model = two()
    weight = model.a.weight.detach().clone()
    compiled = surgery.compile(f"{shared} match * apply base(k=2) then dora(r=2)", model)
    found = {n.rpartition(".")[2]: v for n, v in compiled.parameters().items() if "b." not in n}
    near(found["m_2"], (weight + 2 * found["S"][:42, :18]).square().sum(1).sqrt())
    on_meta = Two().to(torch.float64).to("meta")
    waiting = surgery.compile(f"{shared} match * apply base(k=2) then dora(r=2)", on_meta)
    on_meta.load_state_dict(two().state_dict(), strict=False, assign=True)
    waiting.materialize()
    arrived = waiting.parameters()
    assert arrived.keys() == compiled.parameters().keys()
    assert all(torch.equal(arrived[n], v) for n, v in compiled.parameters().items())


def test_what_is_shared_is_shared_wherever_it_stands_in_a_chain() -> None:
    model = two()
    spec = "match a apply vera(r=3) then lora(r=2) match b apply ia3() then vera(r=3)"
    compiled = surgery.compile(spec, model)
    moved(compiled)
    (*shared,) = compiled.plan.shared
    assert {s.parameter.name for s in shared} == {"A", "B"}
    assert {s.shape for s in shared} == {(3, 42), (42, 3)}
    names = {n for n in compiled.parameters() if "shared" in n}
    assert len(names) == 2
    both = surgery.plan("match a apply vera(r=3) then vera(r=3)", two())
    assert len(both.shared) == 2
    assert both.trainable == 2 * (3 + 42)
    assert len(surgery.plan("match a apply vera(r=3) then vera(r=2)", two()).shared) == 4
    adapted = model(X)
    compiled.inverse.merge()
    near(model(X), adapted)


# ------------------------------------------------------- what the site is reached by, and parts


def gpt2() -> nn.Module:
    untyped.manual_seed(5)
    config = GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=31)
    return GPT2Model(config).eval().double()


@pytest.mark.parametrize("second", ["lora(r=3)", "dora(r=3)", "bat(r=6)", "vera(r=3)"])
def test_chains_on_rows_of_a_layer(second: str, tmp_path: Path) -> None:
    model, tokens = gpt2(), torch.tensor([[3, 1, 4, 1, 5, 9]])
    before, base = bits(model), model(tokens).last_hidden_state
    compiled = surgery.compile(f"match @query | @value apply ia3() then {second}", model)
    moved(compiled)
    adapted = model(tokens).last_hidden_state
    assert (adapted - base).abs().max() > 1e-2
    compiled.save(tmp_path / "out")
    other = gpt2()
    surgery.attach(tmp_path / "out", other)
    assert torch.equal(other(tokens).last_hidden_state, adapted)
    compiled.inverse.merge()
    near(model(tokens).last_hidden_state, adapted)
    compiled.inverse.unload()
    assert bits(model) == before


def test_chains_where_the_owner_reads_the_weight() -> None:
    untyped.manual_seed(2)
    model = nn.MultiheadAttention(12, 3).double()
    x = torch.randn(4, 2, 12, dtype=torch.float64)
    compiled = surgery.compile("match out_proj apply ia3() then lora(r=3) then dora(r=2)", model)
    moved(compiled)
    adapted = model(x, x, x)[0]
    compiled.inverse.merge()
    near(model(x, x, x)[0], adapted)
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.plan(
            "match out_proj apply ia3() then lora(dropout=0.1)", nn.MultiheadAttention(12, 3)
        )
    (found,) = caught.value.diagnostics
    assert found.code == "E305"
    assert "ia3 then lora cannot run on `out_proj`" in found.message


@pytest.mark.parametrize("tie", ["share", "untie"])
def test_chains_on_a_weight_that_layers_share(tie: str) -> None:
    untyped.manual_seed(3)
    config = GPT2Config(n_embd=24, n_layer=1, n_head=4, vocab_size=37, bos_token_id=0)
    model = cast(Any, GPT2LMHeadModel(config)).eval().double()
    before, tokens = bits(model), torch.tensor([[3, 1, 4, 1, 5]])
    base = model(tokens).logits
    compiled = surgery.compile(f"match wte apply bone(r=5) then lora(r=3) {tie}", model)
    moved(compiled)
    adapted = model(tokens).logits
    assert (adapted - base).abs().max() > 1e-2
    compiled.inverse.merge()
    near(model(tokens).logits, adapted)
    compiled.inverse.unload()
    assert bits(model) == before


class Batch(nn.Module):
    """Three matrices [11, 18] in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.banks = nn.Parameter(torch.randn(3, 11, 18))

    def forward(self, x: Tensor) -> Tensor:
        """Of [n, 18]."""
        return torch.einsum("ni,boi->nbo", x, self.banks)


def test_chains_on_a_batch_of_matrices() -> None:
    untyped.manual_seed(3)
    model = Batch().double()
    each = [nn.Linear(18, 11, bias=False).double() for _ in range(3)]
    calls = ("vera(r=2)", "lora(r=3)", "dora(r=2)")
    compiled = surgery.compile(f"match banks apply {' then '.join(calls)}", model)
    moved(compiled)
    (site,) = compiled.plan.sites
    values = parameters_at(model, compiled.plan, site)
    for index, layer in enumerate(each):
        with torch.no_grad():
            layer.weight.copy_(vars(model)["_parameters"]["banks"][index])
        alone = surgery.compile(f"match 0 apply {' then '.join(calls)}", nn.Sequential(layer))
        (there,) = alone.plan.sites
        shared = {p.name for p in site.form.parameters if p.shared}
        for name, value in parameters_at(alone.model, alone.plan, there).items():
            with torch.no_grad():
                value.copy_(values[name] if name in shared else values[name][index])
        near(model(X)[:, index], alone.model(X))
    adapted = model(X)
    compiled.inverse.merge()
    near(model(X), adapted)


def test_a_graph_of_a_chain_is_one_piece() -> None:
    model = two(torch.float32)
    surgery.compile("match * apply ia3() then lora(r=2, dropout=0.1) then dora(r=2)", model)
    run = untyped.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(X.float()), model(X.float()))


# ----------------------------------------------------------------------------- not affine in x

BENT = "method bent() on matrix { train s[out] = 1 y' = tanh(s * y) }"
SHAPED = """
method shaped() on matrix {
  train s[in] = 1
  train P[out, in] = 0
  x' = tanh(s * x)
  y' = y + tanh(x) @ transpose(P)
}
"""


def test_activations_one_after_the_other() -> None:
    model = two()
    compiled = surgery.compile(f"{BENT}{SHAPED} match a apply shaped() then bent()", model)
    moved(compiled)
    p = {n.rpartition(".")[2]: v for n, v in compiled.parameters().items()}
    layer = two().a
    x = torch.tanh(p["s"] * X)
    near(model.a(X), torch.tanh(p["s_2"] * (layer(x) + torch.tanh(x) @ p["P"].T)))
    with pytest.raises(surgery.SurgeryError):
        compiled.inverse.merge()


def test_an_input_is_each_methods_own() -> None:
    model = two()
    compiled = surgery.compile(f"{SHAPED} match a apply shaped() then shaped()", model)
    moved(compiled)
    p = {n.rpartition(".")[2]: v for n, v in compiled.parameters().items()}
    outer = torch.tanh(p["s_2"] * X)
    inner = torch.tanh(p["s"] * outer)
    y = two().a(inner) + torch.tanh(inner) @ p["P"].T
    near(model.a(X), y + torch.tanh(outer) @ p["P_2"].T)


def test_what_is_affine_merges_and_what_follows_it_may_be_anything() -> None:
    model = two()
    compiled = surgery.compile(f"{BENT} match a apply lora(r=2) then bent()", model)
    moved(compiled)
    p = {n.rpartition(".")[2]: v for n, v in compiled.parameters().items()}
    layer = two().a
    near(model.a(X), torch.tanh(p["s_2"] * (layer(X) + X @ p["A"].T @ p["B"].T)))


# --------------------------------------------------------------------------- what is refused


def refused(spec: str, model: nn.Module | None = None) -> list[tuple[str, str, str]]:
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.plan(spec, model or two())
    return [
        (d.code, "" if d.span is None else d.span.text, d.message) for d in caught.value.diagnostics
    ]


def test_what_reads_the_weight_cannot_follow_what_has_none() -> None:
    for second in ("lora(r=2)", "dora(r=2)", "shift()"):
        text = f"{BENT} method shift() on matrix {{ train t[out] = 0 b' = b + t }} "
        ((code, place, message),) = refused(f"{text}match a apply bent() then {second}")
        assert (code, place) == ("E134", second)
        assert "is not linear in x" in message
        assert [d.code for d in surgery.check(f"{text}match a apply bent() then {second}")] == [
            code
        ]
    early = "method early() on matrix { train m[out] = rownorm(W) y' = m * y }"
    ((code, *_),) = refused(f"{BENT}{early} match a apply bent() then early()")
    assert code == "E134"


def test_a_branch_of_the_sites_sizes_decides_whether_a_method_can_follow() -> None:
    some = "method some() on matrix { if in == 18 { y' = tanh(y) } else { y' = 2 * y } }"
    spec = f"{some} match SITE apply some() then lora(r=2)"
    assert surgery.check(spec.replace("SITE", "a")) == ()
    surgery.plan(spec.replace("SITE", "b"), two())
    ((code, place, message),) = refused(spec.replace("SITE", "a"))
    assert (code, place) == ("E134", "lora(r=2)")
    assert message.startswith("lora cannot follow some at `a`")


def test_what_is_dropped_is_not_dropped_in_silence() -> None:
    ((code, _, message),) = refused("match a apply lora(r=2, dropout=0.1) then bat(r=6)")
    assert code == "E134"
    assert "drop(p)" in message
    surgery.plan("match a apply lora(r=2) then bat(r=6)", two())
    late = "method late() on matrix { train s[out] = 1 y' = (s * y) @ drop(0.5) }"
    ((code, _, message),) = refused(f"{late} match a apply late() then lora(r=2)")
    assert code == "E134"
    surgery.plan(f"{late} match a apply lora(r=2) then late()", two())


def test_outputs_are_not_mixed_where_groups_keep_them_apart() -> None:
    mix = "method mix() on matrix { train P[out, out] = 0 y' = y + y @ P }"
    grouped = nn.Sequential(nn.Conv2d(6, 12, 3, groups=2))
    for chain in ("mix() then lora(r=2)", "lora(r=2) then mix()", "mix() then ia3()"):
        ((code, *_),) = refused(f"{mix} match * apply {chain}", grouped)
        assert code == "E305"


def test_every_link_is_checked_with_its_place() -> None:
    found = refused("match * apply lora(r=2) then lroa() then ia3(sid=3) then bone(r=1.5)")
    assert [(code, place) for code, place, _ in found] == [
        ("E121", "lroa"),
        ("E122", "sid"),
        ("E119", "r=1.5"),
    ]
    ((code, place, _),) = refused("match b apply ia3() then bat(r=5)")
    assert (code, place) == ("E301", "bat(r=5)")
    ((code, *_),) = refused("match a apply lora() match a apply ia3()")
    assert code == "E302"


def test_a_chain_has_an_end() -> None:
    spec = "match a apply lora(r=1)" + " then dora(r=1)" * 300
    assert {code for code, *_ in refused(spec)} == {"E134"}


# ------------------------------------------------------------------------------- plan and files


def test_a_plan_names_the_methods_of_a_chain() -> None:
    plan = surgery.plan("match a apply ia3() then lora(r=4)", two())
    lora = 'lora(r=4, alpha=4, dropout=0, rslora=false, init_weights="default", bias=false)'
    assert f'ia3(side="out") then {lora}' in str(plan)
    (site,) = cast("list[dict[str, Any]]", plan.as_json()["sites"])
    assert (site["method"], site["arguments"]) == ("ia3", {"side": "out"})
    assert [link["method"] for link in site["then"]] == ["lora"]
    other = surgery.plan("match a apply ia3() then lora(r=2)", two())
    assert "then" in str(plan.diff(other))
    assert not plan.diff(plan)
    gone = surgery.plan("match b apply ia3()", two())
    assert 'a  ia3(side="out") then lora(r=4' in str(plan.diff(gone))


def test_a_folder_whose_chain_was_changed_is_refused(tmp_path: Path) -> None:
    compiled = surgery.compile("match a apply ia3() then lora(r=4)", two())
    compiled.save(tmp_path / "out")
    mapping = tmp_path / "out" / "mapping.json"
    text = mapping.read_text()
    assert '"chains"' in text
    for change in (
        ('"method": "lora"', '"method": "lor"'),
        ('"r": 4', '"r": 5'),
        ('"chains"', '"chain"'),
        ('"then"', '"next"'),
    ):
        assert change[0] in text
        mapping.write_text(text.replace(*change))
        with pytest.raises(surgery.SurgeryError):
            surgery.attach(tmp_path / "out", two())
    mapping.write_text(text)
    again = two()
    surgery.attach(tmp_path / "out", again)
    saved = surgery.of(again).save(tmp_path / "again")
    assert saved.peft == compiled.save(tmp_path / "third").peft
    third = two()
    surgery.attach(tmp_path / "again", third)
    assert torch.equal(third(X), again(X))
    assert copy.deepcopy(third)(X).equal(third(X))


def test_names_are_distinct_whatever_a_method_calls_its_own() -> None:
    own = "method own() on matrix { train B_2[out] = 1 train B[out] = 1 W' = (B * B_2) * rows(W) }"
    plan = surgery.plan(f"{own} match a apply own() then own() then own()", two())
    names = [*plan.sites[0].form.shapes]
    assert len({*names}) == 6
    assert all(name.isidentifier() for name in names)
