"""Slices of parameters as sites: experts, heads, packed projections, rows that come in turns."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers as t
from support import bits, moved
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.mounted import remembering

untyped = cast(Any, torch)
accelerate = pytest.importorskip("accelerate")

METHODS = (
    "lora(r=5, alpha=7)",
    "olora(r=5)",
    "dora(r=5)",
    "bone(r=3)",
    "bat(r=3)",
    "miss(r=5)",
    "ia3()",
    'ia3(side="in")',
    "vera(r=5)",
    "hira(r=5)",
    'road(variant="road_4", group_size=6)',
    "oft(block_size=6)",
    'c3a(block_size=6, init_weights="zeros")',
    "psoft(r=3)",
    "glora(r=3)",
    "peanut(r=5, depth=1)",
)
EXPERTS, WIDTH, HEAD = 3, 24, 6
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


class Packed(nn.Module):
    """An attention whose projections are one parameter, with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, WIDTH // HEAD, batch_first=True)
        nn.init.normal_(cast(Tensor, self.attention.in_proj_bias))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [n, t] to [n, t, width]."""
        x = self.embed(tokens)
        return self.attention(x, x, x)[0]


class Loose(nn.Module):
    """A matrix and a batch of matrices that no class of torch knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, WIDTH)
        self.mixer = nn.Parameter(torch.randn(18, WIDTH))
        self.banks = nn.Parameter(torch.randn(EXPERTS, 12, 18))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [n, t] to [n, t, experts, 12]."""
        hidden = F.linear(self.embed(tokens), self.mixer)
        return torch.einsum("eoi,nti->nteo", self.banks, hidden)


def decoder(make: Callable[..., Any], config: Callable[..., Any], **more: Any) -> nn.Module:
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, vocab_size=31)
    return make(config(**{**sizes, **more}))


def mixtral() -> nn.Module:
    return decoder(
        t.MixtralModel,
        t.MixtralConfig,
        intermediate_size=18,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        head_dim=HEAD,
        experts_implementation="eager",
    )


def gpt_oss() -> nn.Module:
    """Experts [experts, in, out] with a bias, gate and up by turns."""
    return decoder(
        t.GptOssModel,
        t.GptOssConfig,
        intermediate_size=18,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        head_dim=HEAD,
        experts_implementation="eager",
    )


def llama() -> nn.Module:
    return decoder(
        t.LlamaModel, t.LlamaConfig, intermediate_size=30, num_key_value_heads=2, head_dim=HEAD
    )


def gpt2() -> nn.Module:
    return t.GPT2Model(t.GPT2Config(n_embd=WIDTH, n_layer=2, n_head=4, vocab_size=31))


def bloom() -> nn.Module:
    return t.BloomModel(t.BloomConfig(hidden_size=WIDTH, n_layer=2, n_head=4, vocab_size=31))


def neox() -> nn.Module:
    return decoder(t.GPTNeoXModel, t.GPTNeoXConfig, intermediate_size=30)


def falcon() -> nn.Module:
    """Two groups of two queries, a key and a value."""
    return decoder(t.FalconModel, t.FalconConfig, new_decoder_architecture=True, num_kv_heads=2)


Rows = tuple[int, ...]
"""Which rows of a matrix [out, in]."""


@dataclass(frozen=True)
class Case:
    """A statement's selection, and what one counts by hand.

    rows: of the parameters that change, by the end of their names: of which matrix (all: None).
    """

    make: Callable[[], nn.Module]
    selects: str
    sites: int
    rows: Mapping[str, tuple[int | None, Rows]]
    transposed: bool = False


def span(start: int, stop: int, step: int = 1) -> Rows:
    return tuple(range(start, stop, step))


def turns(start: int, stop: int, period: int, times: int) -> Rows:
    return tuple(period * k + row for k in range(times) for row in range(start, stop))


CASES = {
    "experts": Case(
        mixtral,
        "@gate | @down in @layers[*]",
        4,
        {"gate_up_proj": (None, span(0, 18)), "down_proj": (None, span(0, WIDTH))},
    ),
    "an expert": Case(mixtral, "@up in experts[1]", 2, {"gate_up_proj": (1, span(18, 36))}),
    "experts by turns": Case(
        gpt_oss,
        "@gate in @layers[1]",
        1,
        {"1.mlp.experts.gate_up_proj": (None, span(0, 36, 2))},
        True,
    ),
    "an expert by turns": Case(
        gpt_oss,
        "@up in @layers[1].experts[2]",
        1,
        {"1.mlp.experts.gate_up_proj": (2, span(1, 36, 2))},
        True,
    ),
    "a head": Case(llama, "@query in heads[2]", 2, {"q_proj.weight": (None, span(12, 18))}),
    "a head of several roles": Case(
        llama,
        "@query | @key in @layers[0].self_attn.heads[1]",
        2,
        {
            "0.self_attn.q_proj.weight": (None, span(6, 12)),
            "0.self_attn.k_proj.weight": (None, span(6, 12)),
        },
    ),
    "a head of rows": Case(
        gpt2,
        "@key in @layers[0].attn.heads[3]",
        1,
        {"0.attn.c_attn.weight": (None, span(42, 48))},
        True,
    ),
    "heads by turns": Case(
        bloom,
        "@value in h[1]",
        1,
        {"1.self_attention.query_key_value.weight": (None, turns(12, 18, 18, 4))},
    ),
    "heads of another model by turns": Case(
        neox,
        "@query in @layers[1]",
        1,
        {"1.attention.query_key_value.weight": (None, turns(0, 6, 18, 4))},
    ),
    "groups of heads": Case(
        falcon,
        "@query in h[0]",
        1,
        {"0.self_attention.query_key_value.weight": (None, turns(0, 12, 24, 2))},
    ),
    "a head of a group": Case(
        falcon,
        "@query in h[0].self_attention.heads[3]",
        1,
        {"0.self_attention.query_key_value.weight": (None, span(30, 36))},
    ),
    "packed": Case(
        Packed, "@query | @value", 2, {"in_proj_weight": (None, (*span(0, 24), *span(48, 72)))}
    ),
    "a packed head": Case(
        Packed, "@key in attention.heads[1]", 1, {"in_proj_weight": (None, span(30, 36))}
    ),
    "a matrix": Case(Loose, "mixer", 1, {"mixer": (None, span(0, 18))}),
    "a batch": Case(Loose, "banks", 1, {"banks": (None, span(0, 12))}),
}

UNKNOWN = ("a matrix", "a batch")
"""What is added to these is not known, so a method of y does not go on them."""

OF_Y = ("ia3()", 'road(variant="road_4", group_size=6)')
every_case_and_method = pytest.mark.parametrize(
    ("name", "method"),
    [(n, m) for n in CASES for m in METHODS if not (n in UNKNOWN and m in OF_Y)],
)


def built(case: Case, dtype: torch.dtype) -> nn.Module:
    untyped.manual_seed(5)
    model = case.make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or bool((parameter == 0).all()):  # a bias, not a norm
                parameter.normal_(std=0.3)
    return model.to(dtype)


def outputs(model: nn.Module) -> Tensor:
    found = model(TOKENS)
    return found if isinstance(found, Tensor) else found.last_hidden_state


NEAR = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 0.15}


@every_case_and_method
def test_the_laws_hold(name: str, method: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = built(case, torch.float64)
    before, at_first = bits(model), outputs(model)
    compiled = surgery.compile(f"match {case.selects} apply {method}", model)
    assert len(compiled.plan.sites) == case.sites
    near = NEAR[torch.float64]
    assert (outputs(model) - at_first).abs().max() <= near
    moved(compiled)
    adapted = outputs(model)
    assert (adapted - at_first).abs().max() > 1e-3
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model))), adapted)

    compiled.save(tmp_path / "out")
    other = built(case, torch.float64)
    surgery.attach(tmp_path / "out", other)
    assert torch.equal(outputs(other), adapted)

    compiled.inverse.merge()
    assert (outputs(model) - adapted).abs().max() <= near
    assert torch.equal(outputs(copy.deepcopy(model)), outputs(model))
    check_rows(case, model, before, built(case, torch.float64))
    compiled.inverse.unmerge()
    assert torch.equal(outputs(model), adapted)
    compiled.inverse.merge()
    compiled.inverse.unload()
    assert bits(model) == before
    assert torch.equal(outputs(model), at_first)


def check_rows(case: Case, merged: nn.Module, before: Mapping[str, bytes], base: nn.Module) -> None:
    """Of the merged model exactly the rows of the sites are others; no other weight is."""
    now, was = merged.state_dict(), base.state_dict()
    for name in before:
        if ".surgery." in name or name.endswith("bias"):
            continue
        ends = [end for end in case.rows if name.endswith(end)]
        if not ends:
            assert torch.equal(now[name], was[name]), name
            continue
        index, rows = case.rows[ends[0]]
        one, old = (s[name] if index is None else s[name][index] for s in (now, was))
        matrix, base_matrix = (m.mT if case.transposed else m for m in (one, old))
        others = [row for row in range(matrix.shape[-2]) if row not in rows]
        changed = (matrix != base_matrix).any(-1)
        assert bool(changed[..., list(rows)].all())
        assert not bool(changed[..., others].any())
        if index is not None:
            rest = [i for i in range(len(now[name])) if i != index]
            assert torch.equal(now[name][rest], was[name][rest])


@every_case_and_method
def test_a_slice_is_what_a_layer_of_its_rows_would_be(name: str, method: str) -> None:
    """The merged rows are those of an `nn.Linear` with the same parameters, merged by itself."""
    case = CASES[name]
    model = built(case, torch.float64)
    compiled = surgery.compile(f"match {case.selects} apply {method}", model)
    moved(compiled)
    given = {n: v.clone() for n, v in compiled.parameters().items()}
    base = {n: v.clone() for n, v in model.state_dict().items()}
    compiled.inverse.merge()
    for site in compiled.plan.sites:
        at = site.site.at
        full = ".".join(filter(None, [site.site.owner, at.parameter]))
        (end,) = [end for end in case.rows if full.endswith(end)]
        _, rows = case.rows[end]
        rows = [r for r in rows if _is_of(site.path, r)] if name == "packed" else [*rows]
        indices = [None] if base[full].dim() == 2 else [at.index]
        if site.site.batch is not None:
            indices = [*range(site.site.batch)]
        for index in indices:
            old, new = (
                d if index is None else d[index] for d in (base[full], model.state_dict()[full])
            )
            old, new = (m.mT if case.transposed else m for m in (old, new))
            bias = _bias(base, site.site.owner, at.bias, index)
            wanted = _alone(
                method, old[rows], None if bias is None else bias[rows], given, site, index
            )
            assert torch.allclose(new[rows], wanted, rtol=0, atol=1e-12)


def _is_of(path: str, row: int) -> bool:
    """Whether a row of packed projections is the query's or the value's."""
    return ("query", "key", "value")[row // WIDTH] in path


def _bias(base: Mapping[str, Tensor], owner: str, name: str, index: int | None) -> Tensor | None:
    found = base.get(".".join(filter(None, [owner, name])))
    return found if found is None or index is None else found[index]


def _alone(
    method: str,
    matrix: Tensor,
    bias: Tensor | None,
    given: Mapping[str, Tensor],
    site: Any,
    index: int | None,
) -> Tensor:
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None).double()
    with torch.no_grad():
        layer.weight.copy_(matrix)
        if bias is not None:
            layer.bias.copy_(bias)
    apart = surgery.compile(f"match * apply {method}", nn.Sequential(layer))
    batch = index is not None and site.site.batch is not None
    with torch.no_grad():
        for name, value in apart.parameters().items():
            last = name.rpartition(".")[2]
            shared = ".shared." in name
            source = [
                v
                for n, v in given.items()
                if n.endswith(f".{last}") and (".shared." in n) == shared
            ]
            own = source if shared else [given[site.adapted(last)]]
            found = own[0] if shared or not batch else own[0][index]
            value.copy_(found[tuple(slice(0, length) for length in value.shape)])
    apart.inverse.merge()
    return layer.weight.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["experts", "an expert", "a head", "packed", "groups of heads"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    model = built(case, dtype)
    before, at_first = bits(model), outputs(model)
    compiled = surgery.compile(f"match {case.selects} apply lora(r=5)", model)
    moved(compiled)
    adapted = outputs(model)
    assert adapted.dtype == dtype
    compiled.inverse.merge()
    assert (outputs(model) - adapted).abs().max() <= NEAR[dtype] * (1 + adapted.abs().max())
    compiled.inverse.unload()
    assert bits(model) == before
    assert torch.equal(outputs(model), at_first)


@pytest.mark.parametrize("name", ["experts", "an expert by turns", "packed", "heads by turns"])
@pytest.mark.parametrize("method", ["lora(r=5)", "dora(r=5)", "oft(block_size=6)"])
def test_arithmetic_leads_back(name: str, method: str) -> None:
    case = CASES[name]
    model = built(case, torch.float64)
    base = {n: v.clone() for n, v in model.state_dict().items()}
    compiled = surgery.compile(f"match {case.selects} apply {method}", model)
    moved(compiled)
    adapted = outputs(model)
    compiled.inverse.merge(undo="algebraic")
    compiled.inverse.unmerge()
    assert torch.allclose(outputs(model), adapted, rtol=0, atol=1e-9)
    now = model.state_dict()
    assert all(torch.allclose(now[n], v, rtol=0, atol=1e-11) for n, v in base.items())


def test_a_parameter_is_computed_once_within_a_forward() -> None:
    """The experts read their matrices one by one, and W' is all of them."""
    model = built(CASES["experts"], torch.float32)
    surgery.compile("match down_proj in @layers[0].experts[*] apply lora(r=2)", model)
    experts = model.get_submodule("layers.0.mlp.experts")
    seen: list[Tensor] = []

    def reading(self: nn.Module, *args: Any) -> Tensor:
        seen.extend((cast(Any, self).down_proj, cast(Any, self).down_proj))
        return args[0]

    read = remembering(reading)
    read(experts, TOKENS)
    assert seen[0] is seen[1]
    with torch.no_grad():
        read(experts, TOKENS)
    assert not seen[2].requires_grad
    assert cast(Any, experts).down_proj is not cast(Any, experts).down_proj
    outside = cast(Any, experts).down_proj
    assert torch.equal(outside, seen[0])


@pytest.mark.parametrize("name", ["experts", "packed", "groups of heads", "a batch"])
def test_a_slice_is_compiled_in_one_graph_and_trained(name: str) -> None:
    case = CASES[name]
    model = built(case, torch.float32)
    compiled = surgery.compile(f"match {case.selects} apply lora(r=2)", model)
    moved(compiled)
    for parameter in compiled.parameters().values():
        assert parameter.shape[0] in (2, EXPERTS) or parameter.dim() == 2
    cast(Any, outputs(model).square().mean()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in trained)


def test_a_batch_compiles_in_one_graph() -> None:
    model = built(CASES["a batch"], torch.float32)
    compiled = surgery.compile("match banks | mixer apply lora(r=2)", model)
    moved(compiled)
    whole = untyped.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(whole(TOKENS), outputs(model), atol=1e-5)


def refused(spec: str, make: Callable[[], nn.Module]) -> str:
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.plan(spec, make())
    return str(caught.value)


def test_what_is_not_there_is_refused() -> None:
    assert "E204" in refused("match @query in heads[4] apply lora()", llama)
    assert "has no child 3" in refused("match @up in experts[3] apply lora()", mixtral)
    assert "E203" in refused("match * in heads[0] apply lora()", Loose)
    found = refused("match @key in heads[3] apply lora()", llama)
    assert "E212" in found  # there are two heads of keys


def test_what_overlaps_is_refused() -> None:
    whole = "match @mlp apply ia3() match @up in experts[1] apply lora(r=2)"
    assert "E302" in refused(whole, mixtral)
    rows = "match @query in heads[0] apply ia3() match q_proj apply lora(r=2)"
    assert "E302" in refused(rows, llama)
    turns_and_a_head = (
        "match @value in h[0] apply ia3() match @query in heads[1] apply lora(r=2) "
        "match @query in h[0].self_attention.heads[2] apply lora(r=2)"
    )
    assert len(surgery.plan(turns_and_a_head, bloom()).sites) == 4


def test_rows_by_turns_and_heads_stand_together() -> None:
    model = built(CASES["heads by turns"], torch.float64)
    at_first = outputs(model)
    compiled = surgery.compile(
        "match @value in h[0] apply ia3() "
        "match @query in h[0].self_attention.heads[2] apply lora(r=2)",
        model,
    )
    assert (outputs(model) - at_first).abs().max() < 1e-12
    moved(compiled)
    adapted = outputs(model)
    compiled.inverse.merge()
    assert (outputs(model) - adapted).abs().max() < 1e-11
    compiled.inverse.unload()
    assert torch.equal(outputs(model), at_first)


def test_what_an_owner_keeps_in_a_list_is_refused() -> None:
    assert "E209" in refused("match weight_ih_l0 apply lora()", lambda: nn.LSTM(6, 4))


def test_what_is_added_to_a_parameter_must_be_known() -> None:
    assert "E307" in refused("match mixer apply ia3()", Loose)
    shift = "method shift() on matrix { train t[out] = 0 b' = b + t }"
    assert "E307" in refused(f"{shift} match banks apply shift()", Loose)
    assert len(surgery.plan(f"{shift} match in_proj_weight apply shift()", Packed()).sites) == 1


def test_rows_by_number() -> None:
    case = Case(
        llama,
        "q_proj[6:-6] | @key[:4] in @layers[1]",
        2,
        {"1.self_attn.q_proj.weight": (None, span(6, 18)), "k_proj.weight": (None, span(0, 4))},
    )
    model = built(case, torch.float64)
    before, at_first = bits(model), outputs(model)
    compiled = surgery.compile(f"match {case.selects} apply dora(r=2)", model)
    assert [site.path.rpartition(".")[2] for site in compiled.plan.sites] == [
        "rows_6_18",
        "rows_0_4",
    ]
    moved(compiled)
    adapted = outputs(model)
    compiled.inverse.merge()
    assert (outputs(model) - adapted).abs().max() < 1e-11
    now, was = model.state_dict(), built(case, torch.float64).state_dict()
    name = "layers.1.self_attn.q_proj.weight"
    assert (now[name] != was[name]).any(1).tolist() == [6 <= row < 18 for row in range(WIDTH)]
    compiled.inverse.unload()
    assert bits(model) == before
    assert torch.equal(outputs(model), at_first)
    assert len(surgery.plan("match q_proj[0:24] apply ia3()", llama()).sites) == 2
    assert [s.path for s in surgery.plan("match q_proj[0:24] apply ia3()", llama()).sites] == [
        s.path for s in surgery.plan("match q_proj apply ia3()", llama()).sites
    ]


def test_rows_that_do_not_fit_are_refused() -> None:
    assert "it has 24 rows" in refused("match q_proj[0:25] apply lora()", llama)
    assert "E217" in refused("match q_proj[12:6] apply lora()", llama)
    assert "E217" in refused("match q_proj[0:12:2] apply lora()", llama)
    assert "come in turns" in refused("match @query[0:6] apply lora()", bloom)
    assert "E302" in refused("match q_proj[0:8] | q_proj[6:12] apply lora()", llama)
    assert "E302" in refused("match q_proj[0:8] apply ia3() match q_proj apply lora()", llama)
    assert "E215" in refused("match q_proj except q_proj[0:8] apply lora()", llama)


SPREAD = (
    "match @gate | @down in @layers[*] apply dora(r=2) "
    "match @query in heads[1] apply oft(block_size=6)"
)


def test_slices_of_weights_that_arrive_later_begin_as_they_would_have() -> None:
    model = built(CASES["experts"], torch.float32)
    compiled = surgery.compile(SPREAD, model, seed=3)
    moved(compiled)
    adapted, given = outputs(model), compiled.parameters()
    with torch.device("meta"):
        later = mixtral().eval()
    waiting = surgery.compile(SPREAD, later, seed=3)
    base = built(CASES["experts"], torch.float32)
    later.load_state_dict(base.state_dict(), strict=False, assign=True)
    cast(Any, later).rotary_emb = cast(Any, base).rotary_emb
    waiting.materialize()
    moved(waiting)
    assert all(torch.equal(given[name], value) for name, value in waiting.parameters().items())
    assert torch.equal(outputs(later), adapted)


def test_slices_of_a_twin_and_of_offloaded_weights() -> None:
    model = built(CASES["experts"], torch.float32)
    at_first = outputs(model)
    twin = surgery.compile(SPREAD, model, seed=3, inplace=False)
    moved(twin)
    adapted = outputs(twin.model)
    assert torch.equal(outputs(model), at_first)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    compiled = surgery.compile(SPREAD, model, seed=3)
    moved(compiled)
    assert torch.equal(outputs(model), adapted)
    compiled.inverse.merge()
    assert torch.allclose(outputs(model), adapted, atol=1e-5)
    compiled.inverse.unload()
    assert torch.equal(outputs(model), at_first)
    compiled = surgery.compile(SPREAD, built(CASES["experts"], torch.float32), seed=3)
    moved(compiled)
    accelerate.cpu_offload(compiled.model, execution_device=torch.device("cpu"))
    surgery.of(compiled.model)
    assert torch.equal(outputs(compiled.model), adapted)
