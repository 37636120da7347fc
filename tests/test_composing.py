"""An adapter made of several is the sum of what they do, or says how far it is from that."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from library_calls import CASES
from torch import Tensor, nn

import surgery
from surgery.algebra.degrees import degree
from surgery.algebra.expr import IN, OUT, parameter
from surgery.algebra.rules import make
from surgery.artifact import CONFIG
from surgery.combining import COMBINES, Change, Pruning, elected
from surgery.composition import Composition
from surgery.errors import ArtifactError, DefinitionError, PlanError, StateError, SurgeryError
from surgery.recipe import WAYS

hf: Any = peft  # whose types are not complete
untyped: Any = torch

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


class Experts(nn.Module):
    """A batch of matrices, which is called as no layer is."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Parameter(torch.randn(3, 7, 20) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("noi,bi->bno", self.mixer, x)


class Net(nn.Module):
    """A linear layer with a bias and one without, a convolution, an embedding, a batch, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 12)
        self.first = nn.Linear(12, 20)
        self.norm = nn.LayerNorm(20)
        self.second = nn.Linear(20, 24, bias=False)
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.experts = Experts()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.first(self.embed(tokens))))
        mixed = self.experts(x)
        return torch.cat([self.conv(self.second(x).reshape(-1, 4, 6)).flatten(), mixed.flatten()])


TOKENS = torch.tensor([3, 5, 1, 7, 2, 12])


def net(dtype: torch.dtype = torch.float64) -> Net:
    untyped.manual_seed(0)
    return Net().to(dtype).eval()


def layer() -> nn.Module:
    untyped.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20)).double().eval()


def moved(compiled: surgery.Compiled, name: str, seed: int, far: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in sorted(compiled.model.named_parameters()):
            if f"surgery.{name}." in key and value.requires_grad:
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                value.add_(far * noise.to(value.dtype))


def two(first: str, second: str, model: nn.Module, where: str = "*") -> surgery.Compiled:
    """Two adapters that are away from where they begin."""
    for seed, (name, call) in enumerate((("a", first), ("b", second)), 1):
        spec = f"adapter {name} {{ match {where} apply {call} }}"
        compiled = surgery.compile(spec, model, seed=3)
        moved(compiled, name, seed)
    return surgery.of(model)


def output(compiled: surgery.Compiled, live: str | None, x: Tensor = TOKENS) -> Tensor:
    with torch.no_grad(), compiled.using(live):
        return compiled.model(x)


def close(one: Tensor, other: Tensor, far: float = 1e-9) -> bool:
    return torch.allclose(one, other, rtol=far, atol=far)


def folders(first: str, second: str, tmp_path: Path, where: str = "*") -> dict[str, Path]:
    compiled = two(first, second, net(), where)
    for name in "ab":
        compiled.save(tmp_path / name, name)
    return {name: tmp_path / name for name in "ab"}


def length(matrix: Tensor) -> float:
    return float(matrix.square().sum()) ** 0.5


def codes(error: pytest.ExceptionInfo[SurgeryError]) -> set[str]:
    return {one.code for one in error.value.diagnostics}


# ------------------------------------------------------------------------- one adapter as it is

NEEDS_DATA = ("eva", "corda", "lora_ga")
FIRSTS = {call.partition("(")[0]: call for call, _ in reversed(CASES)}
CALLS = [call for call in FIRSTS.values() if not call.startswith(NEEDS_DATA)]


def composed(
    compiled: surgery.Compiled, expression: str, name: str, **options: Any
) -> Composition | set[str]:
    """What it is, or the codes of what is against it."""
    try:
        return surgery.compose_on(compiled, expression, name, **options)
    except ArtifactError as error:
        return {one.code for one in error.diagnostics}


@pytest.mark.parametrize("call", CALLS)
def test_every_method_is_composed_exactly_or_refused(call: str, tmp_path: Path) -> None:
    compiled = two(call, "lora(r=2, alpha=3)", layer())
    whole = surgery.compose_on(compiled, "1.0*a", "whole", how="linear")
    assert whole.exact
    assert whole.error == 0
    there, here = compiled.parameters("whole"), compiled.parameters("a")
    assert all(torch.equal(t, h) for t, h in zip(there.values(), here.values(), strict=True))
    wanted = output(compiled, "0.7*a - 0.4*b", X)
    for name, options in (("beside", {}), ("nearest", {"how": "svd", "rank": 12})):
        made = composed(compiled, "0.7*a - 0.4*b", name, **cast(Any, options))
        if isinstance(made, set):
            assert made == {"E580"}
            assert name not in compiled.adapters
            continue
        assert made.exact is (name == "beside")
        assert made.error is not None
        assert made.error < 1e-9
        assert close(output(compiled, name, X), wanted, 1e-8)


SAVED = ("lora", "ia3", "vera", "randlora", "fourierft", "vblora", "pissa", "shira", "kasa")
"""Methods with parameters that are shared, frozen, drawn again, whole numbers, made of W."""


@pytest.mark.parametrize("method", SAVED)
def test_one_times_a_saved_adapter_is_its_folder_to_the_byte(method: str, tmp_path: Path) -> None:
    compiled = surgery.compile(f"match * apply {FIRSTS[method]}", layer(), seed=3)
    moved(compiled, "default", 1)
    compiled.save(tmp_path / "a")
    surgery.compose("1.0*a", {"a": tmp_path / "a"}, tmp_path / "b", base=layer())
    names = [path.name for path in (tmp_path / "a").iterdir()]
    assert names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_copied_adapter_is_another_one() -> None:
    compiled = two("lora(r=2)", "lora(r=2)", net(), "first")
    before = output(compiled, "a")
    surgery.compose_on(compiled, "a", "c")
    moved(compiled, "c", 7)
    assert torch.equal(output(compiled, "a"), before)
    assert compiled.live == "a"


# ------------------------------------------------------------------------- the sum of the changes


SOME = ("lora(r=3, alpha=5)", "hra(r=2)", "ia3()", "dora(r=2)", "miss(r=4)", "oft(block_size=4)")


def change(compiled: surgery.Compiled, live: str | None) -> Tensor:
    """W' of a linear layer without a bias, out of what it does to every unit vector."""
    one = torch.eye(12, dtype=torch.float64)
    return output(compiled, live, one).T - output(compiled, None, one).T


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(SOME),
    st.sampled_from(SOME),
    st.sampled_from([name for name in WAYS if name != "cat"]),
    st.integers(1, 12),
    st.sampled_from([0.7, -1.3, 2.0]),
)
def test_the_error_that_is_told_is_the_error_that_is_measured(
    first: str, second: str, how: str, rank: int, number: float
) -> None:
    untyped.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=False)).double().eval()
    way = WAYS[how]
    compiled = two(first, first if way.of == "parameters" else second, model)
    options: dict[str, Any] = {"density": 0.6} if way.prunes else {}
    options |= {"rank": rank} if way.of == "changes" else {}
    made = surgery.compose_on(compiled, f"{number}*a + 0.3*b", "c", how=how, **options)
    total = number * change(compiled, "a") + 0.3 * change(compiled, "b")
    apart = change(compiled, "c") - total
    told = made.error
    assert told is not None
    assert told == pytest.approx(length(apart) / length(total), rel=1e-6, abs=1e-9)
    if how == "svd":
        values = untyped.linalg.svdvals(total)
        nearest = float((values[rank:].square().sum() / values.square().sum()) ** 0.5)
        assert told == pytest.approx(nearest, rel=1e-6, abs=1e-9)


def test_every_kind_of_layer_is_composed_and_shown() -> None:
    where = "embed | first | second | conv | experts.mixer"
    compiled = two("lora(r=3, alpha=5)", "lora(r=2)", net(), where)
    surgery.compose_on(compiled, "0.7*a + 0.3*b", "c")
    assert close(output(compiled, "c"), output(compiled, "0.7*a + 0.3*b"))
    made = surgery.compose_on(compiled, "0.7*a + 0.3*b", "d", how="svd", rank=5)
    assert close(output(compiled, "d"), output(compiled, "0.7*a + 0.3*b"))
    cut = surgery.compose_on(compiled, "0.7*a + 0.3*b", "e", how="svd", rank=1)
    assert {site.rank for site in cut.sites} == {1}
    assert all(0 < cast(float, site.error) < 1 for site in cut.sites)
    text = str(cut).splitlines()
    assert text[0].split() == ["site", "rank", "off", "the", "sum", "cut", "off"]
    assert len(text) == 2 + 5 + 2
    assert "off the sum of the changes by" in text[-1]
    assert [row["rank"] for row in cast(Any, made.as_json()["sites"])] == [5, 5, 5, 5, 5]


def test_a_site_of_one_adapter_alone_is_that_times_its_number() -> None:
    model = net()
    for seed, (name, where) in enumerate((("a", "first | second"), ("b", "second | conv"))):
        moved(
            surgery.compile(f"adapter {name} {{ match {where} apply lora(r=2) }}", model),
            name,
            seed,
        )
    compiled = surgery.of(model)
    made = surgery.compose_on(compiled, "-0.5*a + 3*b", "c")
    assert [(s.path, s.rank) for s in made.sites] == [("first", 2), ("second", 4), ("conv", 2)]
    assert close(output(compiled, "c"), output(compiled, "-0.5*a + 3*b"))


def test_a_chain_has_a_change_of_its_own() -> None:
    compiled = two("lora(r=2)", "hra(r=2)", net(), "first | second")
    surgery.compose_on(compiled, "0.5*(a then b) + a", "c", how="svd", rank=20)
    assert close(output(compiled, "c"), output(compiled, "0.5*(a then b) + a"), 1e-8)
    with pytest.raises(ArtifactError, match="combines parameters") as error:
        surgery.compose_on(compiled, "0.5*(a then b) + a", "d", how="linear")
    assert codes(error) == {"E582"}


@pytest.mark.parametrize("expression", ["0.7*a + 0.3*b", "2*a - 0.5*b"])
def test_copies_are_added_up_as_changes(expression: str, tmp_path: Path) -> None:
    spec = "match first apply lora(r=2)\ntrain norm\n"
    model = net()
    for seed, name in enumerate("ab", 1):
        compiled = surgery.compile(f"adapter {name} {{\n{spec}}}", model)
        moved(compiled, name, seed)
        compiled.save(tmp_path / name, name)
    compiled = surgery.of(model)
    made = surgery.compose_on(compiled, expression, "c")
    assert close(output(compiled, "c"), output(compiled, expression))
    assert {s.path for s in made.sites} == {"first", "norm.weight", "norm.bias"}
    assert all(cast(float, s.error) < 1e-12 < s.length for s in made.sites)
    fresh = net()
    surgery.compose(expression, {n: tmp_path / n for n in "ab"}, tmp_path / "c", base=net())
    surgery.attach(tmp_path / "c", fresh)
    assert close(fresh(TOKENS), output(compiled, expression))


# --------------------------------------------------------------------------------- parameters

ALIKE = ("lora(r=3, alpha=5)", "ia3()", "dora(r=2)", "vera(r=5)", "loha(r=2)", "hra(r=2)", "beft()")


@pytest.mark.parametrize("call", ALIKE)
def test_parameters_of_one_method_are_combined_and_keep_it(call: str) -> None:
    compiled = two(call, call, layer())
    made = surgery.compose_on(compiled, "0.25*a + 0.25*a + 0.5*a", "whole", how="linear")
    assert made.how == "as it is"
    surgery.compose_on(compiled, "0.7*a + 0.3*b", "c", how="linear")
    here, there = (
        next(s for s in compiled.plan.sites if s.adapter == name).form.links for name in "ac"
    )
    assert here == there
    same = surgery.compose_on(compiled, "0.5*a", "less", how="linear")
    if call.startswith(("lora", "vera", "loha", "beft")):  # products of their parameters
        assert close(output(compiled, "less", X), output(compiled, "0.5*a", X))
        if same.error is not None:
            assert same.error < 1e-9


def test_a_number_is_shared_out_among_the_factors_of_a_product() -> None:
    a, b = parameter("A", (OUT, IN)), parameter("B", (OUT, OUT))
    product = make("matmul", b, a)
    assert [degree(product, n) for n in ("A", "B", "C")] == [1, 1, 0]
    assert degree(make("add", product, a), "B") is None
    assert degree(make("add", product, a), "A") == 1
    assert degree(make("mul", a, a), "A") == 2


def test_what_is_not_trained_must_be_the_same(tmp_path: Path) -> None:
    model = layer()
    for seed, name in enumerate("ab", 1):
        moved(
            surgery.compile(
                f"adapter {name} {{ match * apply fourierft(n_frequency=9, "
                f"scaling=2, random_loc_seed={seed}) }}",
                model,
            ),
            name,
            seed,
        )
    with pytest.raises(ArtifactError) as error:
        surgery.compose_on(model, "a + b", "c", how="linear")
    assert codes(error) == {"E583"}
    surgery.compose_on(model, "a + b", "c", how="svd", rank=12)
    compiled = surgery.of(model)
    assert close(output(compiled, "c", X), output(compiled, "a + b", X), 1e-8)


def test_signs_are_elected_by_size_or_by_number() -> None:
    tensors = [
        torch.tensor([3.0, -1.0, 0.0]),
        torch.tensor([-1.0, -1.0, 2.0]),
        torch.tensor([-1.0, 4.0, 2.0]),
    ]
    ones = [1.0, 1.0, 1.0]
    by_size = elected(tensors, ones, Pruning(1.0, "total", lambda _: torch.Generator()))
    by_number = elected(tensors, ones, Pruning(1.0, "frequency", lambda _: torch.Generator()))
    assert torch.equal(by_size, torch.tensor([3.0, 4.0, 2.0]))
    assert torch.equal(by_number, torch.tensor([-1.0, -1.0, 2.0]))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_the_length_of_a_product_is_that_of_its_matrix(m: int, n: int, r: int, batch: bool) -> None:
    untyped.manual_seed(m * 100 + n * 10 + r)
    lead = (2,) if batch else ()
    left, right = torch.randn(*lead, m, r).double(), torch.randn(*lead, r, n).double()
    one = Change(left, right)
    assert one.length() == pytest.approx(length(left @ right))
    apart = one + Change(dense=left @ right) * -1.0
    assert apart.length() < 1e-12


# --------------------------------------------------------------------------------- peft's own


THEIRS = ("one", "other")  # a name that is in the prefix of all would be warned of


def beside(ranks: tuple[int, int]) -> tuple[Any, nn.Module]:
    """Two adapters under peft, and their base."""
    untyped.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9)).eval()
    theirs: Any = None
    for name, r in zip(THEIRS, ranks, strict=True):
        rslora = name == "other"
        config = hf.LoraConfig(r=r, lora_alpha=5, target_modules=["0", "2"], use_rslora=rslora)
        if theirs is None:
            theirs = hf.get_peft_model(deepcopy(base), config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "lora_" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return theirs, base


MIXES: list[tuple[str, tuple[int, int], dict[str, Any]]] = [
    ("linear", (3, 3), {}),
    ("cat", (3, 2), {}),
    ("svd", (3, 2), {"rank": 4}),
    ("svd", (3, 2), {}),
    ("ties", (3, 3), {"density": 0.6}),
    ("ties", (3, 3), {"density": 0.6, "sign": "frequency"}),
    ("ties_svd", (3, 2), {"density": 0.6}),
    ("ties_svd", (3, 2), {"density": 0.4, "sign": "frequency"}),
    ("magnitude_prune", (3, 3), {"density": 0.5}),
    ("magnitude_prune_svd", (3, 2), {"density": 0.5}),
]


@pytest.mark.parametrize(("how", "ranks", "options"), MIXES)
def test_every_way_is_that_of_peft(
    how: str, ranks: tuple[int, int], options: dict[str, Any], tmp_path: Path
) -> None:
    theirs, base = beside(ranks)
    named = {"rank": "svd_rank", "sign": "majority_sign_method", "density": "density"}
    given = {named[key]: value for key, value in options.items()}
    theirs.add_weighted_adapter([*THEIRS], [0.7, -0.4], "mix", combination_type=how, **given)
    theirs.set_adapter("mix")
    theirs.save_pretrained(str(tmp_path), selected_adapters=[*THEIRS])
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    parts = {name: tmp_path / own for name, own in zip("ab", THEIRS, strict=True)}
    made = surgery.compose("0.7*a - 0.4*b", parts, tmp_path / "c", how=how, **options)
    surgery.attach(tmp_path / "c", base)
    torch.testing.assert_close(base(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert made.saved is not None
    assert made.saved.peft == ""
    untyped.manual_seed(0)
    again = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9)).eval()
    loaded = hf.PeftModel.from_pretrained(again, str(tmp_path / "c"))
    torch.testing.assert_close(loaded(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_without_pruning_chance_does_nothing(how: str, tmp_path: Path) -> None:
    parts = folders("lora(r=3)", "lora(r=3)", tmp_path, "first | second")
    other = how.replace("dare_", "")
    other = {"linear_svd": "svd"}.get(other, other)
    density = None if WAYS[other].prunes is False else 1.0
    one = surgery.compose("a + b", parts, tmp_path / "one", how=how, density=1.0)
    two_ = surgery.compose("a + b", parts, tmp_path / "two", how=other, density=density)
    assert one.error == pytest.approx(two_.error)
    models = [net(), net()]
    for model, name in zip(models, ("one", "two"), strict=True):
        surgery.attach(tmp_path / name, model)
    assert close(models[0](TOKENS), models[1](TOKENS))


def test_chance_leaves_a_share_and_in_the_mean_the_sum() -> None:
    tensor = torch.randn(60, 50, generator=torch.Generator().manual_seed(1)).double()
    combine, total, count = COMBINES["dare_linear"], torch.zeros_like(tensor), 300
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        pruned = combine([tensor], [2.0], Pruning(0.4, "total", lambda _, g=generator: g))
        kept = pruned != 0
        assert 0.35 < float(kept.double().mean()) < 0.45
        assert torch.allclose(pruned[kept], 2.0 * tensor[kept] / 0.4)
        total += pruned / count
    assert length(total - 2 * tensor) / length(2 * tensor) < 0.12


def test_a_seed_says_what_chance_does(tmp_path: Path) -> None:
    parts = folders("lora(r=3)", "lora(r=3)", tmp_path, "first")
    told: list[Composition] = []
    for number, seed in enumerate((1, 1, 2)):
        out = tmp_path / f"out{number}"
        told.append(surgery.compose("a + b", parts, out, how="dare_linear", density=0.5, seed=seed))
    assert told[0].error == told[1].error
    assert told[0].error != told[2].error


# --------------------------------------------------------------------------------- folders


def test_folders_need_no_model_where_no_equation_does(tmp_path: Path) -> None:
    parts = folders("lora(r=3, alpha=5)", "miss(r=4)", tmp_path, "embed | first | second")
    with_model = surgery.compose("0.7*a + 0.3*b", parts, tmp_path / "c", base=net())
    without = surgery.compose("0.7*a + 0.3*b", parts, tmp_path / "d")
    assert [(s.path, s.rank) for s in with_model.sites] == [(s.path, s.rank) for s in without.sites]
    model, other = net(), net()
    surgery.attach(tmp_path / "c", model)
    surgery.attach(tmp_path / "d", other)
    assert torch.equal(model(TOKENS), other(TOKENS))
    assert (tmp_path / "d" / CONFIG).is_file()


def test_what_is_on_a_model_is_written_as_it_would_be_put_there(tmp_path: Path) -> None:
    compiled = two("lora(r=2)", "dora(r=2)", net(), "first | second")
    made = surgery.compose("a - b", compiled, tmp_path / "c", how="svd", rank=20, name="c")
    told = surgery.compose_on(compiled, "a - b", "c", how="svd", rank=20)
    assert made.sites == told.sites
    compiled.save(tmp_path / "d", "c")
    for path in (tmp_path / "c").iterdir():
        assert path.read_bytes() == (tmp_path / "d" / path.name).read_bytes()
    fresh = surgery.attach(tmp_path / "c", net())
    assert close(output(fresh, "c"), output(compiled, "a - b"), 1e-8)


def test_folders_of_peft_alone_say_the_sizes_too(tmp_path: Path) -> None:
    parts = folders("lora(r=3, alpha=5)", "lora(r=2)", tmp_path, "embed | first | second")
    for folder in parts.values():
        for name in ("adapter.peft", "mapping.json", "inverse.json"):
            (folder / name).unlink()
    surgery.compose("0.7*a + 0.3*b", parts, tmp_path / "c")
    model = net()
    surgery.attach(tmp_path / "c", model)
    compiled = two("lora(r=3, alpha=5)", "lora(r=2)", net(), "embed | first | second")
    assert close(model(TOKENS), output(compiled, "0.7*a + 0.3*b"))


@pytest.mark.parametrize(
    ("call", "where"),
    [("dora(r=2)", "first"), ("lora(r=2)", "conv"), ("lora(r=2)", "first[0:10]")],
)
def test_a_base_is_asked_for_where_it_is_needed(call: str, where: str, tmp_path: Path) -> None:
    parts = folders(call, call, tmp_path, where)
    with pytest.raises(ArtifactError) as error:
        surgery.compose("a + b", parts, tmp_path / "c", how="svd", rank=6)
    assert codes(error) == {"E584"}
    assert not (tmp_path / "c").exists()
    surgery.compose("a + b", parts, tmp_path / "c", how="svd", rank=12, base=net())
    model = net()
    surgery.attach(tmp_path / "c", model)
    compiled = two(call, call, net(), where)
    assert close(model(TOKENS), output(compiled, "a + b"), 1e-7)


def test_a_folder_that_is_not_known_by_itself_asks_for_its_model(tmp_path: Path) -> None:
    config = hf.LoraConfig(r=2, target_modules=["first"], modules_to_save=["second"])
    theirs = hf.get_peft_model(net(torch.float32), config)
    with torch.no_grad():
        for value in theirs.parameters():
            value.add_(0.3 * float(value.requires_grad))
    theirs.save_pretrained(str(tmp_path / "a"))
    with pytest.raises(ArtifactError, match="without its model") as error:
        surgery.compose("0.5*a", {"a": tmp_path / "a"}, tmp_path / "c")
    assert codes(error) == {"E584"}
    meta = net(torch.float32).to("meta")
    with pytest.raises(ArtifactError, match="is a copy") as error:
        surgery.compose("0.5*a", {"a": tmp_path / "a"}, tmp_path / "c", base=meta)
    assert codes(error) == {"E584"}
    assert not (tmp_path / "c").exists()
    base = net(torch.float32)
    surgery.compose("0.5*a", {"a": tmp_path / "a"}, tmp_path / "c", base=base)
    model = net(torch.float32)
    compiled = surgery.attach(tmp_path / "a", model, name="a")
    wanted = output(compiled, "0.5*a")
    again = hf.PeftModel.from_pretrained(net(torch.float32), str(tmp_path / "c"))
    assert close(again(TOKENS), wanted, 1e-5)


def test_the_method_of_the_product_can_be_asked_for(tmp_path: Path) -> None:
    parts = folders("lora(r=3)", "lora(r=2)", tmp_path, "first")
    surgery.compose("a + b", parts, tmp_path / "c", to="bdlora")
    model = net()
    compiled = surgery.attach(tmp_path / "c", model)
    assert [site.form.named for site in compiled.plan.sites] == ["bdlora"]
    there = two("lora(r=3)", "lora(r=2)", net(), "first")
    assert close(model(TOKENS), output(there, "a + b"))


# --------------------------------------------------------------------------------- bad input


def test_what_cannot_be_composed_is_refused_whole(tmp_path: Path) -> None:
    model = net()
    compiled = two("lora(r=2)", "ia3()", model, "first | second")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cases: list[tuple[str, dict[str, Any], type[SurgeryError], str]] = [
        ("0*a", {}, ArtifactError, "E580"),
        ("a + b", {}, ArtifactError, "E580"),
        ("a + b", {"how": "svd"}, ArtifactError, "E582"),
        ("2*a", {"how": "svd", "rank": 0}, ArtifactError, "E582"),
        ("2*a", {"how": "cat", "rank": 2}, ArtifactError, "E582"),
        ("2*a", {"how": "svdd"}, ArtifactError, "E582"),
        ("2*a", {"how": "ties"}, ArtifactError, "E582"),
        ("2*a", {"how": "ties", "density": 1.5}, ArtifactError, "E582"),
        ("2*a", {"density": 0.5}, ArtifactError, "E582"),
        ("2*a", {"how": "ties", "density": 0.5, "sign": "loud"}, ArtifactError, "E582"),
        ("2*a", {"to": "hra"}, ArtifactError, "E523"),
        ("a + b", {"how": "linear"}, ArtifactError, "E583"),
        ("a + d", {}, StateError, "E411"),
        ("a * b", {}, DefinitionError, "E132"),
    ]
    for expression, options, kind, code in cases:
        with pytest.raises(kind) as error:
            surgery.compose_on(compiled, expression, "c", **options)
        assert code in codes(error), expression
        assert all(one.hint or one.label for one in error.value.diagnostics)
    with pytest.raises(StateError) as error:
        surgery.compose_on(compiled, "2*a", "b")
    assert codes(error) == {"E412"}
    with pytest.raises(StateError) as error:
        surgery.compose_on(compiled, "2*a", "b.c")
    assert codes(error) == {"E443"}
    compiled.inverse.merge("a")
    with pytest.raises(StateError) as error:
        surgery.compose_on(compiled, "2*a", "c")
    assert codes(error) == {"E402"}
    compiled.inverse.unmerge()
    assert compiled.adapters == ("a", "b")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_every_site_that_cannot_be_is_told() -> None:
    compiled = two("lora(r=2)", "dora(r=2)", net(), "first | second")
    with pytest.raises(ArtifactError) as error:
        surgery.compose_on(compiled, "a + b", "c")
    assert [one.message.split("`")[1] for one in error.value.diagnostics] == ["first", "second"]


def test_adapters_of_other_bases_are_refused(tmp_path: Path) -> None:
    parts = folders("lora(r=2)", "lora(r=2)", tmp_path, "first")
    other = net()
    with torch.no_grad():
        other.first.weight += 1
    moved(surgery.compile("match first apply lora(r=2)", other), "default", 1)
    surgery.of(other).save(tmp_path / "d")
    with pytest.raises(ArtifactError) as error:
        surgery.compose("a + d", {**parts, "d": tmp_path / "d"}, tmp_path / "c")
    assert codes(error) == {"E581"}
    with pytest.raises(ArtifactError) as error:
        surgery.compose("2*d", {"d": tmp_path / "d"}, tmp_path / "c", base=net())
    assert codes(error) == {"E522"}
    assert not (tmp_path / "c").exists()
    made = surgery.compose(
        "a + d", {"a": tmp_path / "a", "d": tmp_path / "d"}, tmp_path / "c", force=True
    )
    assert made.exact


def test_adapters_of_other_sizes_are_refused(tmp_path: Path) -> None:
    parts = folders("lora(r=2)", "lora(r=2)", tmp_path, "first")
    other = nn.Module()
    other.add_module("first", nn.Linear(12, 21))
    surgery.compile("match first apply lora(r=2)", other).save(tmp_path / "d")
    with pytest.raises(ArtifactError, match=r"20 × 12 in .* and 21 × 12 in") as error:
        surgery.compose("a + d", {**parts, "d": tmp_path / "d"}, tmp_path / "c")
    assert codes(error) == {"E581"}
    assert not (tmp_path / "c").exists()


def test_names_folders_and_places_are_checked(tmp_path: Path) -> None:
    parts = folders("lora(r=2, dropout=0.1)", "lora(r=2)", tmp_path, "first")
    made = surgery.compose("2*a + b", parts, tmp_path / "named", name="mixture")
    assert any("dropout" in note for note in made.notes)
    assert surgery.attach(tmp_path / "named", net()).adapters == ("mixture",)
    with pytest.raises(DefinitionError, match="no adapter `x`"):
        surgery.compose("a + x", parts, tmp_path / "c")
    with pytest.raises(ArtifactError, match="exists already"):
        surgery.compose("a + b", parts, tmp_path / "a")
    with pytest.raises(ArtifactError, match="is no folder"):
        surgery.compose("a + x", {**parts, "x": tmp_path / "x"}, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_parts_that_overlap_are_refused() -> None:
    model = net()
    surgery.compile("adapter a { match experts.mixer apply lora(r=2) }", model)
    surgery.compile("adapter b { match experts.mixer[1:2] apply lora(r=2) }", model)
    with pytest.raises(PlanError) as error:
        surgery.compose_on(model, "a + b", "c")
    assert codes(error) == {"E309"}
