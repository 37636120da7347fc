"""The library's methods on calls: each is its published equation, written out here in plain torch.

Bottlenecks and Compacter are AdapterHub's, the edits of hidden states are pyreft's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import ARCHITECTURES, fresh
from support import moved
from torch import Tensor, nn
from torch.nn import functional as F

import surgery

untyped: Any = torch

Own = Mapping[str, Tensor]
Equation = Callable[[Own, Tensor, Tensor], Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
}

# --------------------------------------------------------------------------- the equations


def bottleneck(act: str = "relu", scaling: float = 1, side: str = "out") -> Equation:
    """AdapterHub's: two linear layers with biases, an activation between, scaled, added."""

    def equation(own: Own, x: Tensor, y: Tensor) -> Tensor:
        down = F.linear(x if side == "in" else y, own["D"], own["d"])
        return y + scaling * F.linear(ACTIVATIONS[act](down), own["U"], own["u"])

    return equation


def hypercomplex(rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The weight [in, out] of a PHM layer: sum of rule[i] ⊗ (left[i] right[i])."""
    terms = (torch.kron(a, s @ t) for a, s, t in zip(rule, left, right, strict=True))
    return torch.stack(tuple(terms)).sum(0)


def compacter(act: str = "gelu") -> Equation:
    def equation(own: Own, x: Tensor, y: Tensor) -> Tensor:
        down = y @ hypercomplex(own["A"], own["S"], own["T"]) + own["d"]
        return y + ACTIVATIONS[act](down) @ hypercomplex(own["A"], own["P"], own["Q"]) + own["u"]

    return equation


def basis(own: Own) -> Tensor:
    """The columns of R made orthonormal, by reflections of LAPACK: Q of R = QT, diag T > 0."""
    q, t = cast("tuple[Tensor, Tensor]", untyped.linalg.qr(own["R"]))
    return q * torch.diagonal(t).sign()


def loreft(own: Own, x: Tensor, y: Tensor) -> Tensor:
    rotate = basis(own)
    return y + (F.linear(y, own["W1"], own["c"]) - y @ rotate) @ rotate.T


def noreft(own: Own, x: Tensor, y: Tensor) -> Tensor:
    there = F.linear(y, own["P"], own.get("p"))
    return y + (F.linear(y, own["W1"], own["c"]) - there) @ own["P"]


def direft(own: Own, x: Tensor, y: Tensor) -> Tensor:
    return y + F.linear(y, own["W1"], own["c"]) @ basis(own).T


def steering(scale: float) -> Equation:
    def equation(own: Own, x: Tensor, y: Tensor) -> Tensor:
        return y + scale * own["v"]

    return equation


CALLS: dict[str, Equation] = {
    "bottleneck(r=5)": bottleneck(),
    'bottleneck(r=5, act_fn="silu", scaling=4)': bottleneck("silu", 4),
    'bottleneck(r=5, act_fn="tanh", init_weights="bert")': bottleneck("tanh"),
    'bottleneck(r=5, side="in", scaling=0.5)': bottleneck("relu", 0.5, "in"),
    'compacter(r=6, n=3, k=2, act_fn="silu")': compacter("silu"),
    "compacter(r=8, n=4)": compacter(),
    "loreft(r=5)": loreft,
    "noreft(r=5)": noreft,
    "noreft(r=5, add_bias=true)": noreft,
    "direft(r=5)": direft,
    "steering(scale=0.7)": steering(0.7),
}

# ------------------------------------------------------------------------ where they are put


def owned(compiled: surgery.Compiled, module: nn.Module) -> dict[str, Tensor]:
    """What an adapter has at a module's call, and what all its sites share."""
    here = dict(module.get_submodule("surgery.default.call").named_parameters())
    named = compiled.model.named_parameters()
    shared = {n.rpartition(".")[2]: p for n, p in named if ".shared." in n}
    return {**here, **shared}


@contextmanager
def written(compiled: surgery.Compiled, equation: Equation) -> Generator[None]:
    """The base alone, with an equation done by hooks of torch at each site."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        y = output if isinstance(output, Tensor) else output[0]
        made = equation(owned(compiled, module), x, y)
        return made if isinstance(output, Tensor) else (made, *output[1:])

    handles = [
        cast(Any, s.site.module).register_forward_hook(hook, with_kwargs=True)
        for s in compiled.plan.sites
    ]
    with compiled.using(None):
        yield
    for handle in handles:
        handle.remove()


PLACES = (
    ("llama", "mlp in layers[*]"),
    ("llama", "self_attn in layers[*]"),
    ("llama", "layers.*"),
    ("gpt2", "mlp in h[*]"),
    ("gpt2", "h.*"),
    ("bert", "output.dense in layer[*]"),
    ("bert", "layer.*"),
    ("t5", "/layer\\.[0-9]+/ in block[*]"),
    ("t5", "DenseReluDense in block[*]"),
    ("vit", "mlp in layers[*]"),
    ("vit", "layers.*"),
)


TRIED = [
    (name, where, call)
    for name, where in PLACES
    for call in CALLS
    if "output.dense" not in where or '"in"' not in call  # what goes in there has another width
]


@pytest.mark.parametrize(("name", "where", "call"), TRIED)
def test_outputs_and_gradients_are_those_of_the_equation(name: str, where: str, call: str) -> None:
    architecture, model = ARCHITECTURES[name], fresh(name)
    compiled = surgery.compile(f"match {where} apply {call}", model)
    moved(compiled)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == compiled.parameters().keys()
    found = architecture.output(model)
    gradients = torch.autograd.grad(found.square().sum(), list(trained.values()))
    with written(compiled, CALLS[call]):
        expected = architecture.output(model)
        plain = torch.autograd.grad(expected.square().sum(), list(trained.values()))
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)
    for key, one, two in zip(trained, gradients, plain, strict=True):
        assert torch.allclose(one, two, atol=1e-4 * float(two.abs().max() + 1)), key


class Inner(nn.Module):
    """Any module with a call; its matrix is as wide as it has to be."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * self.weight)


@dataclass(frozen=True)
class Case:
    """A call of a method at a width, and its equation."""

    call: str
    hidden: int
    equation: Equation


@st.composite
def cases(draw: st.DrawFn) -> Case:
    act = draw(st.sampled_from(sorted(ACTIVATIONS)))
    kind = draw(st.sampled_from(("bottleneck", "compacter", "loreft", "noreft", "direft")))
    if kind == "compacter":
        n, k = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        down, wide = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((5, 7)))
        call = f'compacter(r={n * down}, n={n}, k={k}, act_fn="{act}")'
        return Case(call, n * wide, compacter(act))
    hidden = draw(st.sampled_from((5, 7, 11, 13)))
    r = draw(st.integers(1, 5))
    if kind == "bottleneck":
        where, scaling = draw(st.sampled_from(("in", "out"))), draw(st.sampled_from((0.5, 1, 4)))
        call = f'bottleneck(r={r}, act_fn="{act}", scaling={scaling}, side="{where}")'
        return Case(call, hidden, bottleneck(act, scaling, where))
    return Case(f"{kind}(r={r})", hidden, {"loreft": loreft, "noreft": noreft}.get(kind, direft))


@given(case=cases(), dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16)))
@settings(max_examples=25, deadline=None)
def test_equations_hold_at_any_size_and_dtype(case: Case, dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"inner": Inner(case.hidden)}).to(dtype)
    inner: Any = model["inner"]
    compiled = surgery.compile(f"match inner apply {case.call}", model)
    moved(compiled)
    own = owned(compiled, inner)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    assert {p.dtype for p in own.values()} == {wide}
    x = torch.randn(3, 2, case.hidden, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad(), compiled.using(None):
        y = inner(x)
    found = inner(x)
    expected = case.equation(own, x.to(wide), y.to(wide)).to(dtype)
    assert found.dtype == dtype
    close = {torch.bfloat16: 1e-2, torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    assert torch.allclose(found, expected, atol=close, rtol=close)


# --------------------------------------------------------------- where the papers put them


def test_on_bert_it_is_houlsbys_layer() -> None:
    """Behind both halves of a layer, before what goes around them is added and normalised."""
    architecture, model = ARCHITECTURES["bert"], fresh("bert")
    call = 'bottleneck(r=5, act_fn="silu")'
    compiled = surgery.compile(f"match output.dense in layer[*] apply {call}", model)
    moved(compiled)
    found = architecture.output(model)

    def adapted(dense: Any, h: Tensor) -> Tensor:
        made = F.linear(h, dense.weight, dense.bias)
        own = owned(compiled, dense)
        down = F.silu(F.linear(made, own["D"], own["d"]))
        return made + F.linear(down, own["U"], own["u"])

    whole: Any = model
    with compiled.using(None):
        h = whole.embeddings(architecture.inputs["input_ids"])
        for layer in whole.encoder.layer:
            attended = layer.attention.self(h)[0]
            half = layer.attention.output
            h = half.LayerNorm(adapted(half.dense, attended) + h)
            h = layer.output.LayerNorm(adapted(layer.output.dense, layer.intermediate(h)) + h)
    assert torch.allclose(found, h, atol=1e-5)


def rms(norm: Any, h: Tensor) -> Tensor:
    return h / (h.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight


def test_on_layers_that_normalise_first_it_is_pfeiffers() -> None:
    """AdapterHub's seq_bn adds f(h + residual) to h + residual, which is what a layer gives."""
    architecture, model = ARCHITECTURES["llama"], fresh("llama")
    compiled = surgery.compile("match layers.0 apply bottleneck(r=5)", model)
    moved(compiled)
    layer: Any = cast(Any, model).layers[0]
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            seen.update({name: args[0], f"{name}'": output})

        return hook

    handles = [layer.post_attention_layernorm.register_forward_hook(keep("residual"))]
    handles += [layer.mlp.register_forward_hook(keep("mlp"))]
    handles += [cast(Any, model).layers[1].input_layernorm.register_forward_hook(keep("next"))]
    with torch.no_grad():
        architecture.output(model)
    for handle in handles:
        handle.remove()
    own, z = owned(compiled, layer), seen["residual"] + seen["mlp'"]
    up = F.linear(F.relu(F.linear(z, own["D"], own["d"])), own["U"], own["u"])
    assert torch.allclose(seen["next"], seen["mlp'"] + up + seen["residual"], atol=1e-5)


def test_beside_a_feed_forward_it_reads_what_that_takes() -> None:
    """He et al.: h + s f(x), where x is normed already in Llama, and T5's layer norms it itself."""
    parallel = 'bottleneck(r=5, side="in", scaling=4)'
    model = fresh("llama")
    compiled = surgery.compile(f"match mlp in layers[0] apply {parallel}", model)
    moved(compiled)
    layer: Any = cast(Any, model).layers[0]
    h = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(1))
    x = rms(layer.post_attention_layernorm, h)
    with compiled.using(None):
        y = layer.mlp(x)
    expected = bottleneck("relu", 4, "in")(owned(compiled, layer.mlp), x, y)
    assert torch.allclose(layer.mlp(layer.post_attention_layernorm(h)), expected, atol=1e-5)

    model = fresh("t5")
    compiled = surgery.compile(f"match layer.1 in encoder.block[0] apply {parallel}", model)
    moved(compiled)
    (planned,) = compiled.plan.sites
    half: Any = planned.site.module
    with compiled.using(None):
        y = h + half.DenseReluDense(rms(half.layer_norm, h))
    expected = bottleneck("relu", 4, "in")(owned(compiled, half), h, y)  # of h, before the norm
    assert torch.allclose(half(h), expected, atol=1e-5)


# ---------------------------------------------------------------------------- pyreft's rotation


def test_an_orthonormal_basis_is_itself() -> None:
    """So R can be the rotation that torch's parametrisation, which pyreft has, came to."""
    untyped.manual_seed(3)
    hidden, r = 13, 5
    rotation: Any = nn.utils.parametrizations.orthogonal(nn.Linear(hidden, r, bias=False))
    learned = nn.Linear(hidden, r)
    y = torch.randn(2, 3, hidden)
    for call in ("loreft", "direft"):
        model = nn.ModuleDict({"inner": Inner(hidden)})
        compiled = surgery.compile(f"match inner apply {call}(r={r})", model)
        own = owned(compiled, model["inner"])
        with torch.no_grad():
            own["R"].copy_(rotation.weight.T)
            own["W1"].copy_(learned.weight)
            own["c"].copy_(cast(Tensor, learned.bias))
            with compiled.using(None):
                base = model["inner"](y)
            there = rotation(base) if call == "loreft" else 0
            expected = base + (learned(base) - there) @ rotation.weight
            assert torch.allclose(model["inner"](y), expected, atol=1e-5)


# ---------------------------------------------------------------------------------- beginnings


def begun(call: str, hidden: int = 400) -> dict[str, Tensor]:
    model = nn.ModuleDict({"inner": Inner(hidden)})
    compiled = surgery.compile(f"match inner apply {call}", model)
    return {n: p.detach() for n, p in owned(compiled, model["inner"]).items()}


def drawn(value: Tensor, std: float) -> bool:
    """Whether a tensor's elements have about this deviation, and 0 for their mean."""
    slack = 5 / math.sqrt(value.numel())
    return abs(float(value.std()) / std - 1) < slack and abs(float(value.mean())) < slack * std


def test_beginnings_are_those_of_the_programs() -> None:
    hidden, r = 400, 100
    linear = 1 / math.sqrt(3 * hidden)  # both of torch's nn.Linear
    mam, bert = begun(f"bottleneck(r={r})"), begun(f'bottleneck(r={r}, init_weights="bert")')
    assert drawn(mam["D"], linear)
    assert float(mam["D"].abs().max()) <= 1 / math.sqrt(hidden)
    assert drawn(bert["D"], 0.02)
    assert drawn(bert["U"], 0.02)
    assert not any(value.any() for value in (mam["U"], mam["d"], mam["u"], bert["d"], bert["u"]))
    small = begun(f"compacter(r={r}, n=20, k=5)")
    assert drawn(small["A"], 1e-4)
    # Glorot's, of each of the n matrices by itself.
    assert drawn(small["S"], math.sqrt(2 / (hidden / 20 + 5)))
    assert drawn(small["Q"], math.sqrt(2 / (hidden / 20 + 5)))
    assert drawn(small["T"], math.sqrt(2 / (r / 20 + 5)))
    assert drawn(small["P"], math.sqrt(2 / (r / 20 + 5)))
    for call in (f"loreft(r={r})", f"direft(r={r})", f"noreft(r={r}, add_bias=true)"):
        edit = begun(call)
        assert drawn(edit["W1"], linear)
        assert drawn(edit["c"], linear)
        if "P" in edit:
            assert drawn(edit["P"], linear)
            assert drawn(edit["p"], linear)
        else:
            assert torch.allclose(basis(edit).T @ basis(edit), torch.eye(r), atol=1e-5)
    assert not begun("steering()")["v"].any()


@pytest.mark.parametrize(
    "call", ["bottleneck(r=3)", 'bottleneck(r=3, side="in", dropout=0.5)', "steering()"]
)
def test_some_begin_as_no_change(call: str) -> None:
    model = nn.ModuleDict({"inner": Inner(7)})
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(2))
    before = model["inner"](x)
    surgery.compile(f"match inner apply {call}", model)
    assert torch.equal(model["inner"](x), before)


def test_compacters_share_what_stands_on_the_left() -> None:
    model = fresh("llama")
    compiled = surgery.compile("match mlp | self_attn apply compacter(r=8)", model)
    shared = {n for n in compiled.parameters() if n.endswith(".A")}
    assert shared == {"surgery.default.shared.compacter.A"}
    n, hidden, r, sites = 4, 24, 8, 4
    count = sum(p.numel() for p in compiled.parameters().values())
    assert count == n**3 + sites * (2 * (hidden + r) + hidden + r)


# ------------------------------------------------------------------------------------- dropout

DROPPED = {
    'bottleneck(r=3, act_fn="tanh", dropout=0.5)': "change",
    'bottleneck(r=3, dropout=0.5, side="in", scaling=4)': "change",
    "loreft(r=3, dropout=0.5)": "all",
    "noreft(r=3, dropout=0.5)": "all",
    "direft(r=3, dropout=0.5)": "all",
}


@pytest.mark.parametrize("call", DROPPED)
def test_dropout_is_of_what_the_programs_drop(call: str) -> None:
    """Of AdapterHub's bottlenecks what is added, of pyreft's edits all; each element by itself."""
    model = nn.ModuleDict({"inner": Inner(7)})
    compiled = surgery.compile(f"match inner apply {call}", model)
    moved(compiled)
    x = torch.randn(2000, 2, 7, generator=torch.Generator().manual_seed(2)) + 3
    inner = model["inner"]
    with torch.no_grad():
        whole = inner.eval()(x)
        assert torch.equal(inner(x), whole)
        with compiled.using(None):
            kept = inner(x) if DROPPED[call] == "change" else torch.zeros_like(whole)
        untyped.manual_seed(5)
        trained = inner.train()(x)
    change, found = whole - kept, trained - kept
    gone = found.abs() < 1e-6
    assert torch.allclose(found[~gone], 2 * change[~gone], atol=1e-5)
    here = change.abs() > 1e-4  # what an element is dropped of
    assert abs(float(gone[here].float().mean()) - 0.5) < 0.02
    alone = gone[:, 0] != gone[:, 1]
    assert 0.4 < float(alone.float().mean()) < 0.6
    # The mean over draws is what is computed without.
    untyped.manual_seed(6)
    with torch.no_grad():
        many = torch.stack([inner(x[:20]) for _ in range(4000)]).mean(0)
    assert torch.allclose(many, whole[:20], atol=0.15 * float(change.abs().max()))
