"""`train` and `save`: an adapter's own copies of parameters, in whatever shape they lie."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Held, moved
from torch import Tensor, nn

import surgery
from surgery.errors import SurgeryError
from surgery.store import read_tensors

untyped = cast(Any, torch)

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


class Net(nn.Module):
    """Parameters of no axis to four, in layers that are called and in such as are only read."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(31, 12)
        self.norm = nn.LayerNorm(12)
        self.first = nn.Linear(12, 7)
        self.second = nn.Linear(7, 12, bias=False)
        self.again = self.norm
        self.image = nn.Conv2d(3, 5, (2, 3))
        self.batch = nn.BatchNorm2d(5)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.listed = nn.ParameterList([nn.Parameter(torch.ones(12)), nn.Parameter(torch.ones(2))])
        cast(Any, self.image).to(memory_format=torch.channels_last)

    def forward(self, tokens: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [n, t] to [n, t, 12], and an image [n, 3, h, w] to [n, 5, h', w']."""
        x = self.norm(self.tokens(tokens)) * self.listed[0]
        x = self.again(x + self.second(torch.tanh(self.first(x))))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.scale * x, self.batch(self.image(image))


EVERYTHING = tuple(name for name, _ in Net().named_parameters())


def built(dtype: torch.dtype = torch.float32) -> Net:
    untyped.manual_seed(5)
    return Net().to(dtype).eval()


def outputs(model: nn.Module) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    dtype = next(p.dtype for p in model.parameters())
    image = torch.randn(2, 3, 5, 7, generator=generator).to(dtype)
    return model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]), image)


def detached(model: nn.Module) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in outputs(model))


def agree(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, left, right))


def apart(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> float:
    pairs = zip(left, right, strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def base(model: nn.Module) -> dict[str, tuple[Held, bytes]]:
    """Each tensor of the base: which object it is, and its bits."""
    named = model.state_dict(keep_vars=True).items()
    own = {n: t for n, t in named if ".surgery." not in f".{n}"}
    return {
        n: (Held(t), t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for n, t in own.items()
    }


def written(model: nn.Module, compiled: surgery.Compiled) -> nn.Module:
    """The model without adapters, with the values of the copies in its own parameters."""
    for name, value in compiled.parameters().items():
        left, _, right = name.partition("surgery.default.")
        own = f"{left}{right.removesuffix('.T')}"
        with torch.no_grad():
            model.get_parameter(own).copy_(value)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", ["train **", "save ** train scale"])
def test_the_laws(spec: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = built(dtype)
    before, flags = base(model), [p.requires_grad for p in model.parameters()]
    at_first = detached(model)
    compiled = surgery.compile(spec, model)
    assert sorted(s.path for s in compiled.plan.sites) == sorted(EVERYTHING)
    assert compiled.plan.trainable == sum(p.numel() for p in built().parameters())
    assert agree(outputs(model), at_first)
    assert base(model) == before

    wide = torch.float32 if dtype is torch.bfloat16 else dtype
    named = dict(model.named_parameters())
    for name, value in compiled.parameters().items():
        own = named[name.replace("surgery.default.", "").removesuffix(".T")]
        assert (value.dtype, value.shape, value.stride()) == (wide, own.shape, own.stride())

    moved(compiled)
    adapted = detached(model)
    assert apart(adapted, at_first) > 2e-2
    assert agree(adapted, detached(written(built(dtype), compiled)))

    for other in (copy.deepcopy(model), cast(nn.Module, pickle.loads(pickle.dumps(model)))):
        assert agree(outputs(other), adapted)
    compiled.save(tmp_path / "out")
    other = built(dtype)
    assert surgery.attach(tmp_path / "out", other).plan.trainable == compiled.plan.trainable
    assert agree(outputs(other), adapted)

    compiled.inverse.merge()
    assert agree(outputs(model), adapted)
    compiled.inverse.unmerge()
    assert agree(outputs(model), adapted)
    assert base(model) == before
    compiled.inverse.unload()
    assert base(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert agree(outputs(model), at_first)


some_names = st.sets(st.sampled_from(EVERYTHING), min_size=1)


@settings(max_examples=25)
@given(some_names, st.sampled_from(["train", "save"]))
def test_the_copies_are_what_is_selected_and_nothing_else(names: set[str], verb: str) -> None:
    model = built()
    modules = {name.rpartition(".")[0] for name in names} - {""}
    selected = modules if verb == "save" else names
    if not selected:
        return
    compiled = surgery.compile(f"{verb} {' | '.join(sorted(selected))}", model)
    wanted = names
    if verb == "save":
        wanted = {n for n in EVERYTHING if any(n.startswith(f"{m}.") for m in modules)}
    assert {s.path for s in compiled.plan.sites} == wanted
    assert compiled.plan.trainable == sum(model.get_parameter(n).numel() for n in wanted)
    moved(compiled)
    assert agree(detached(model), detached(written(built(), compiled)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_steps_write_no_tensor_of_the_base(dtype: torch.dtype) -> None:
    model = built(dtype)
    before = base(model)
    compiled = surgery.compile("train ** except listed.1", model)
    values = [p for p in model.parameters() if p.requires_grad]
    assert len(values) == len(compiled.plan.sites)
    first = [value.detach().clone() for value in values]
    optimizer = torch.optim.SGD(values, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        cast(Any, sum(t.float().square().sum() for t in outputs(model))).backward()
        cast(Any, optimizer).step()
    assert not any(map(torch.equal, values, first))
    assert base(model) == before


def test_a_file_has_the_keys_of_the_base(tmp_path: Path) -> None:
    model = built()
    compiled = surgery.compile("train first.bias | scale | batch save image", model)
    report = compiled.save(tmp_path / "out")
    found = read_tensors(tmp_path / "out" / "adapter_model.safetensors")
    assert found.shapes == {
        "scale": (),
        "first.bias": (7,),
        "batch.weight": (5,),
        "batch.bias": (5,),
        "image.weight": (5, 3, 2, 3),
        "image.bias": (5,),
    }
    assert report.peft
    moved(compiled)
    whole = compiled.mapping.rename(model.state_dict(), to="native")
    assert whole.keys() == built().state_dict().keys()
    own = {name.rpartition(".surgery")[0]: v for name, v in compiled.parameters().items()}
    assert torch.equal(whole["first.bias"], own["first"])
    plain = built()
    plain.load_state_dict(whole)
    assert agree(outputs(plain), outputs(model))


def test_a_base_of_another_head_takes_the_saved_one(tmp_path: Path) -> None:
    model = built()
    compiled = surgery.compile("save second", model)
    moved(compiled)
    compiled.save(tmp_path / "out")
    other = built()
    with torch.no_grad():
        other.second.weight.normal_()  # as a head that is drawn anew at each load
    surgery.attach(tmp_path / "out", other)
    assert agree(outputs(other), outputs(model))


# ------------------------------------------------------------------------- beside other methods


MATCHES = (
    "lora(r=2)",
    "dora(r=2)",
    "bone(r=7)",
    "ia3()",
    "shift()",
)
SHIFT = "method shift() on matrix { train t[out] = 0.5 b' = 2 * b + t }\n"


@pytest.mark.parametrize("method", MATCHES)
@pytest.mark.parametrize("site", ["first", "attention.out_proj"])
def test_the_b_of_an_equation_is_the_trained_copy(method: str, site: str, tmp_path: Path) -> None:
    """One is reached by its call, the other by its value."""
    model = built(torch.float64)
    before, at_first = base(model), detached(model)
    method = method.replace("r=7", "r=1") if site == "first" else method.replace("r=7", "r=12")
    spec = f"{SHIFT} match {site} apply {method} train {site}.bias"
    compiled = surgery.compile(spec, model)
    moved(compiled)
    adapted = detached(model)

    reference = built(torch.float64)
    alone = surgery.compile(f"{SHIFT} match {site} apply {method}", reference)
    found = compiled.parameters()
    with torch.no_grad():
        for name, value in alone.parameters().items():
            value.copy_(found[name])
        dict(reference.named_parameters())[f"{site}.bias"].copy_(
            found[f"{site}.surgery.default.bias.T"]
        )
    assert apart(adapted, detached(reference)) < 1e-12

    compiled.save(tmp_path / "out")
    other = built(torch.float64)
    surgery.attach(tmp_path / "out", other)
    assert agree(outputs(other), adapted)
    compiled.inverse.merge()
    assert apart(outputs(model), adapted) < 1e-11
    compiled.inverse.unmerge()
    assert agree(outputs(model), adapted)
    compiled.inverse.merge()
    compiled.inverse.unload()
    assert base(model) == before
    assert agree(outputs(model), at_first)


@pytest.mark.parametrize(
    "spec",
    [
        "train first.weight match first apply lora(r=2)",
        "match first apply lora(r=2) save first",
        "train first.bias save first",
        "match in_proj_weight apply lora(r=2) train attention.in_proj_weight",
        "match @query apply lora(r=2) train attention.in_proj_weight",
    ],
)
def test_one_parameter_is_of_one_statement(spec: str) -> None:
    model = built()
    before = base(model)
    with pytest.raises(SurgeryError) as caught:
        surgery.compile(spec, model)
    (found,) = caught.value.diagnostics
    assert found.code == "E302"
    assert found.related
    assert base(model) == before


def test_a_name_that_two_tensors_would_have_is_refused() -> None:
    method = "method own() on matrix { train bias[out] = 0 W' = W + bias * rows(W) }"
    with pytest.raises(SurgeryError) as caught:
        surgery.compile(f"{method} match first apply own() train first.bias", built())
    assert [d.code for d in caught.value.diagnostics] == ["E320"]


# ----------------------------------------------------------------------------- several adapters


TWO = "adapter a { train norm | first.bias } adapter b { save norm | second }"


def test_each_adapter_has_its_own() -> None:
    model = built()
    at_first = detached(model)
    compiled = surgery.compile(TWO, model)
    moved(compiled, "a")
    with_a = detached(model)
    assert apart(with_a, at_first) > 1e-2
    compiled.activate("b")
    assert agree(outputs(model), at_first)
    moved(compiled, "b")
    with_b = detached(model)
    assert apart(with_b, at_first) > 1e-2
    compiled.activate(None)
    assert agree(outputs(model), at_first)
    compiled.activate("a")
    assert agree(outputs(model), with_a)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 3 + 3


def test_copies_are_mixed_as_weights_are() -> None:
    model = built(torch.float64)
    own = {n: p.detach().clone() for n, p in model.named_parameters()}
    compiled = surgery.compile(TWO, model)
    moved(compiled, "a")
    moved(compiled, "b")
    values = {**compiled.parameters("a"), **compiled.parameters("b")}
    compiled.activate("0.7*a + 0.4*b")
    mixed = detached(model)
    reference = built(torch.float64)
    with torch.no_grad():
        for name, value in values.items():
            path, _, rest = name.partition(".surgery.")
            adapter, parameter, _ = rest.split(".")
            factor = {"a": 0.7, "b": 0.4}[adapter]
            full = f"{path}.{parameter}"
            reference.get_parameter(full).add_(factor * (value - own[full]))
    assert apart(mixed, detached(reference)) < 1e-12
    compiled.inverse.merge()
    assert apart(outputs(model), mixed) < 1e-12
    compiled.inverse.unmerge()
    compiled.activate("a then b")
    last = detached(model)
    with torch.no_grad():
        for name, value in values.items():
            path, _, rest = name.partition(".surgery.")
            reference.get_parameter(f"{path}.{rest.split('.')[1]}").copy_(value)
        for name, value in compiled.parameters("b").items():
            path, _, rest = name.partition(".surgery.")
            reference.get_parameter(f"{path}.{rest.split('.')[1]}").copy_(value)
    assert apart(last, detached(reference)) < 1e-12


ONE, OTHER = "train first.bias", "match first apply shift()"


@pytest.mark.parametrize(
    ("spec", "live"),
    [
        (f"adapter a {{ {ONE} }} adapter b {{ {OTHER} }}", "a + b"),
        (f"adapter a {{ {ONE} }} adapter b {{ {OTHER} }}", "b then a"),
        (f"adapter a {{ {ONE} {OTHER} }}", "0.5*a"),
        ("adapter a { train first } adapter b { match first apply lora(r=2) }", "a + b"),
    ],
)
def test_what_a_mix_could_mean_in_two_ways_is_refused(spec: str, live: str) -> None:
    model = built()
    compiled = surgery.compile(f"{SHIFT} {spec}", model)
    before = compiled.live
    with pytest.raises(SurgeryError) as caught:
        compiled.activate(live)
    assert [d.code for d in caught.value.diagnostics] == ["E309"]
    assert compiled.live == before


def test_a_bias_that_is_left_alone_may_be_mixed() -> None:
    model = built(torch.float64)
    spec = f"adapter a {{ {ONE} }} adapter b {{ match first apply lora(r=2) }}"
    compiled = surgery.compile(spec, model)
    moved(compiled, "a")
    moved(compiled, "b")
    compiled.activate("0.5*a + b")
    mixed = detached(model)
    compiled.inverse.merge()
    assert apart(outputs(model), mixed) < 1e-12
    (trained,) = compiled.parameters("a").values()
    first = built(torch.float64).first.bias.detach()
    torch.testing.assert_close(model.first.bias.detach(), first + 0.5 * (trained - first))


# --------------------------------------------------------------------------------------- ties


class Tied(nn.Module):
    """A head with the weight of the embedding, and a norm with the weight of another."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(13, 5)
        self.norms = nn.ModuleList([nn.LayerNorm(5), nn.LayerNorm(5)])
        self.head = nn.Linear(5, 13)
        self.head.weight = self.tokens.weight
        cast(Any, self.norms[1]).weight = self.norms[0].weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norms[0](self.tokens(tokens))
        return self.head(self.norms[1](torch.tanh(x)))


def tied() -> Tied:
    untyped.manual_seed(7)
    return Tied().double()


def run(model: nn.Module) -> Tensor:
    return model(torch.tensor([[3, 1, 4, 12]]))


@pytest.mark.parametrize("spec", ["train tokens", "save head", "train norms.1.weight"])
def test_a_shared_parameter_needs_a_word(spec: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        surgery.compile(spec, tied())
    (found,) = caught.value.diagnostics
    assert found.code == "E207"
    assert "`share` at the end" in found.hint
    assert "`untie`" in found.hint


@pytest.mark.parametrize("tie", ["share", "untie"])
@pytest.mark.parametrize("name", ["tokens", "head", "norms.0", "norms.1"])
def test_what_is_tied_follows_or_stays(tie: str, name: str, tmp_path: Path) -> None:
    model = tied()
    before, at_first = base(model), run(model).detach()
    # The bias beside it is each layer's own, whatever becomes of the weight.
    other = "train head.bias" if name == "tokens" else ""
    compiled = surgery.compile(f"train {name}.weight {tie} {other}", model)
    moved(compiled)
    adapted = run(model).detach()
    assert (adapted - at_first).abs().max() > 1e-3

    reference = tied()
    for full, value in compiled.parameters().items():
        path, _, rest = full.partition(".surgery.default.")
        module, parameter = reference.get_submodule(path), rest.removesuffix(".T")
        with torch.no_grad():
            if tie == "share":
                getattr(module, parameter).copy_(value)
            else:
                setattr(module, parameter, nn.Parameter(value.clone()))
    torch.testing.assert_close(adapted, run(reference), rtol=1e-12, atol=1e-12)

    compiled.save(tmp_path / "out")
    again = tied()
    surgery.attach(tmp_path / "out", again)
    assert torch.equal(run(again), adapted)
    for each in (copy.deepcopy(model), cast(nn.Module, pickle.loads(pickle.dumps(model)))):
        assert torch.equal(run(each), adapted)
    compiled.inverse.merge()
    assert torch.equal(run(model), adapted)
    compiled.inverse.unmerge()
    compiled.inverse.unload()
    assert base(model) == before
    assert not [n for m in model.modules() for n in vars(m) if n.startswith("surgery")]


# ------------------------------------------------------------------------------- what is refused


class Odd(nn.Module):
    """Parameters that no copy can be made of."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.recurrent = nn.GRU(5, 7)
        self.lazy = nn.LazyLinear(3)
        self.codes = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
        self.waves = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.norm = nn.BatchNorm1d(7)
        self.act = nn.Tanh()
        self.heads = nn.Linear(5, 7, bias=False)


@pytest.mark.parametrize(
    ("spec", "code", "said"),
    [
        ("train recurrent", "E209", "reads its weights from a list"),
        ("train lazy", "E209", "it has no shape before the first call"),
        ("train codes", "E209", "it is stored as torch.int8"),
        ("train waves", "E209", "complex"),
        ("train bais", "E201", "did you mean `bias`? "),
        ("train frist", "E201", "did you mean `first`? 1 module has that name"),
        ("train first.wieght", "E201", "did you mean `first.weight`? 1 parameter has that name"),
        ("train running_mean", "E201", "is a buffer, and only parameters are trained"),
        ("train act", "E201", "`act` is a Tanh, which has no parameters"),
        ("train heads.bias", "E201", "`heads.bias` is absent: this Linear has none"),
        ("save first.bias", "E201", "`train` takes it"),
        ("save frist", "E201", "did you mean `first`? 1 module has that name"),
        ("train first | bias.x", "E201", "bias.x"),
        ("train bias in first where out == 3", "E211", "leaves nothing"),
        ("train first where numel > 99", "E211", "leaves nothing"),
        ("train first except heads", "E202", "removes nothing"),
        ("train norm in first", "E201", "`norm` is outside first"),
        ("train first.bias[0:2]", "E217", "`first.bias` is no table with rows"),
        ("train first[0]", "E217", "`first.bias` is no table with rows"),
        ("train first.weight[7]", "E217", "`first.weight` has no such rows"),
        ("train first.weight[0, -7]", "E217", "a row stands twice"),
        ("train first.weight[0:4:2]", "E217", "rows stand together"),
        ("train first.weight[1.5]", "E217", "a row is a whole number"),
        ("save first[0]", "E217", "`save` keeps whole modules"),
        ("match first[0, 1] apply lora()", "E217", "write a slice"),
        ("train first.weight[0, 1] train first.weight[1:3]", "E302", "two statements"),
        ("train first.weight[0] match first apply lora(r=1)", "E302", "two statements"),
        ("train @query", "E212", "`@query`"),
        ("train first untie", "E216", "shares its"),
        ("train first expect 3", "E206", "expected 3 parameters, found 2"),
        ("save first | heads expect 3", "E206", "expected 3 modules, found 2"),
        ("match bias apply lora()", "E201", "`train` takes it"),
    ],
)
def test_what_cannot_be_is_said(spec: str, code: str, said: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        surgery.plan(spec, Odd())
    assert {d.code for d in caught.value.diagnostics} == {code}
    assert said in str(caught.value)
    assert all(d.hint or d.label for d in caught.value.diagnostics)


@pytest.mark.parametrize(
    ("spec", "paths"),
    [
        ("optional train bais train scale", "scale"),
        ("train bias in first", "first.bias"),
        ("train * where name == bias and type == LayerNorm", "norm.bias"),
        ("train norm except bias", "norm.weight"),
        ("train /.*nor.*/ & not (bias | batch)", "norm.weight"),
        ("train @norm except batch expect 2", "norm.bias norm.weight"),
        ("save first | image expect 2", "first.bias first.weight image.bias image.weight"),
        ("save listed expect 1", "listed.0 listed.1"),
        ("train in_proj_bias expect 1", "attention.in_proj_bias"),
        ("save again", "norm.bias norm.weight"),
        ("train first.bias where numel == 7", "first.bias"),
        ("let n = 2 train norm expect n", "norm.bias norm.weight"),
    ],
)
def test_what_is_meant(spec: str, paths: str) -> None:
    plan = surgery.plan(spec, built())
    assert sorted(s.path for s in plan.sites) == paths.split()
    assert {s.form.kind.name for s in plan.sites} == {"tensor"}


def test_the_plan_says_that_buffers_are_not_copied() -> None:
    told = str(surgery.plan("save batch", built()))
    assert "running_mean" in told
    assert "running_mean" not in str(surgery.plan("save norm", built()))
    assert "the base's own is not written" in told
    assert "5 × 3 × 2 × 3" in str(surgery.plan("save image", built()))


# -------------------------------------------------------------------------- where the base lies


def test_copies_begin_when_the_weights_arrive() -> None:
    spec = "train first | scale save image match second apply lora(r=3)"
    reference = built()
    wanted = surgery.compile(spec, reference)
    with torch.device("meta"):
        model = Net().eval()
    compiled = surgery.compile(spec, model)
    assert all(value.is_meta for value in compiled.parameters().values())
    model.load_state_dict(built().state_dict(), assign=True, strict=False)
    compiled.materialize()
    for name, value in compiled.parameters().items():
        assert torch.equal(value, wanted.parameters()[name]), name
    assert agree(outputs(model), outputs(reference))


def test_a_twin_shares_the_base_and_trains_its_own() -> None:
    model = built()
    before, at_first = base(model), detached(model)
    compiled = surgery.compile("train **", model, inplace=False)
    moved(compiled)
    assert apart(outputs(compiled.model), at_first) > 1e-2
    compiled.inverse.merge()
    assert agree(outputs(model), at_first)
    assert base(model) == before


def test_no_graph_breaks() -> None:
    model = built()
    compiled = surgery.compile("train norm | image | scale match first apply ia3()", model)
    moved(compiled)
    run = untyped.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    for one, other in zip(outputs(cast(nn.Module, run)), outputs(model), strict=True):
        torch.testing.assert_close(one, other)


class Plain(nn.Module):
    """What torch.fx can trace, with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.norm(torch.tanh(self.first(x)))


@pytest.mark.parametrize("form", ["traced", "exported"])
def test_a_whole_graph_reads_the_copies(form: str) -> None:
    spec = f"{SHIFT} train scale | first.bias save norm match first apply shift()"
    x = torch.randn(3, 5, dtype=torch.float64)
    reference = Plain().double().eval()
    plain = copy.deepcopy(reference)
    graph: Any = untyped.fx.symbolic_trace(plain)
    if form == "exported":
        graph = untyped.export.export(plain, (x,)).module()
    at_first = graph(x).detach()
    values = [surgery.compile(spec, model) for model in (reference, graph)]
    for compiled in values:
        moved(compiled)
    adapted = graph(x).detach()
    assert (adapted - at_first).abs().max() > 1e-2
    torch.testing.assert_close(adapted, reference(x), rtol=1e-12, atol=1e-12)
    values[1].inverse.merge()
    torch.testing.assert_close(graph(x), adapted, rtol=1e-12, atol=1e-12)
    values[1].inverse.unload()
    assert torch.equal(graph(x), at_first)


def test_checkpoints_of_the_base_load() -> None:
    model, other = built(), built()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    compiled = surgery.compile("train norm", model)
    kept = {n: v.clone() for n, v in compiled.parameters().items()}
    missing = cast(Any, model).load_state_dict(other.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(torch.equal(v, kept[n]) for n, v in compiled.parameters().items())
    compiled.inverse.unload()
    assert agree(outputs(model), outputs(other))


# ------------------------------------------------------------------------ definitions and files


OWN = "method trained() on tensor { train T[out, in] = W W' = T }"


@pytest.mark.parametrize(
    ("spec", "codes"),
    [
        (OWN, []),
        (f"{OWN} train norm", []),
        (f"{OWN} match first apply trained()", ["E135"]),
        (OWN.replace("W' = T", "W' = 2 * T"), ["E106", "E112"]),
        (OWN.replace("tensor", "matrix"), ["E106"]),
        (OWN.replace("trained", "another"), ["E112"]),
        ("match first apply trained()", ["E121"]),
        ("train first expect n", ["E101"]),
        ("train /first(/", ["E007"]),
        ("train first where nam == 3", ["E101"]),
        ("adapter none { train first }", ["E106"]),
    ],
)
def test_what_is_wrong_without_a_model(spec: str, codes: list[str]) -> None:
    found = surgery.check(spec)
    assert sorted(d.code for d in found) == codes
    assert all(d.hint or d.label for d in found)


def test_a_used_file_trains_nothing(tmp_path: Path) -> None:
    (tmp_path / "other.peft").write_text("train norm")
    (tmp_path / "main.peft").write_text('use "other.peft" save first')
    with pytest.raises(SurgeryError) as caught:
        surgery.load(tmp_path / "main.peft")
    (found,) = caught.value.diagnostics
    assert found.code == "E128"
    assert "a `train`" in found.message


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"tensor": False}, "E514"),
        ({"tensor": "yes"}, "E514"),
        ({"index": 0}, "E514"),
        ({"bias": "bias"}, "E514"),
        ({"parameter": "wieght"}, "E306"),
        ({"path": "nrom"}, "E306"),
        ({"path": "first"}, "E518"),
        ({"method": "ia3", "arguments": {"side": "out"}}, "E514"),
    ],
)
def test_a_manifest_is_not_believed(changes: dict[str, Any], code: str, tmp_path: Path) -> None:
    surgery.compile("train norm", built()).save(tmp_path / "out")
    path = tmp_path / "out" / "mapping.json"
    manifest = json.loads(path.read_text())
    assert manifest["features"]["required"] == ["copies"]
    manifest["sites"][0].update(changes)
    path.write_text(json.dumps(manifest))
    model = built()
    before = base(model)
    with pytest.raises(SurgeryError) as caught:
        surgery.attach(tmp_path / "out", model)
    assert code in {d.code for d in caught.value.diagnostics}
    assert base(model) == before


def test_a_file_of_other_shapes_is_refused(tmp_path: Path) -> None:
    surgery.compile("train first.bias", built()).save(tmp_path / "out")
    model = built()
    model.first = nn.Linear(12, 5)
    with pytest.raises(SurgeryError, match="has shape") as caught:
        surgery.attach(tmp_path / "out", model)
    assert {d.code for d in caught.value.diagnostics} == {"E518"}


def test_what_is_tried_out_passes() -> None:
    report = surgery.verify("train norm | scale save first", built(), outputs)
    assert report.passed
    assert report.start == 0
    assert report.sites == 5
