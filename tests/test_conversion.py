"""A converted adapter is the one it was: to the bit between forms, and as the nearest product."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.artifact import CONFIG, TENSORS
from surgery.conversion import Conversion, needs_weights
from surgery.errors import ArtifactError
from surgery.store import read_tensors

untyped: Any = torch


class Experts(nn.Module):
    """A batch of matrices, which is called as no layer is."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Parameter(torch.randn(3, 5, 24) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("noi,bi->bno", self.mixer, x)


class Net(nn.Module):
    """A linear layer with a bias and one without, a grouped convolution, an embedding, a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 36)
        self.first = nn.Linear(36, 24)
        self.second = nn.Linear(24, 36, bias=False)
        self.conv = nn.Conv1d(4, 6, 3, groups=2, padding=1)
        self.experts = Experts()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.first(self.embed(tokens)))
        mixed = self.experts(x)
        return self.conv(self.second(x).reshape(-1, 4, 9)), mixed


TOKENS = torch.tensor([3, 5, 1, 7, 2, 12])


def net() -> Net:
    untyped.manual_seed(0)
    return Net().double().eval()


def moved(compiled: surgery.Compiled) -> surgery.Compiled:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(compiled.model.named_parameters()):
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.2 * noise, alpha=1.0 if name else 0.0)
    return compiled


def output(model: nn.Module) -> Tensor:
    return torch.cat([part.flatten() for part in cast(Any, model)(TOKENS)]).detach()


def saved(spec: str, folder: Path) -> Tensor:
    """Save an adapter away from its beginning; gives what the model computes with it."""
    compiled = moved(surgery.compile(spec, net()))
    compiled.save(folder)
    return output(compiled.model)


def attached(folder: Path) -> Tensor:
    model = net()
    surgery.attach(folder, model)
    return output(model)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def reason(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ArtifactError) as caught:
        surgery.convert(*arguments, **options)
    (found,) = caught.value.diagnostics
    assert found.code in ("E520", "E523")
    return f"{found.message} | {found.hint}"


# ---------------------------------------------------------------------------- between two forms


BOTH_WAYS = (
    "lora(r=2)",
    "dora(r=2)",
    "loha(r=2)",
    "vera(r=3)",
    "pissa(r=2)",
    "ia3()",
)


@pytest.mark.parametrize("call", BOTH_WAYS)
def test_no_tensor_changes_by_a_bit_there_and_back(call: str, tmp_path: Path) -> None:
    before = saved(f"match first | second apply {call}", tmp_path / "a")
    surgery.convert(tmp_path / "a", tmp_path / "b", net(), to="native")
    surgery.convert(tmp_path / "b", tmp_path / "c", net(), to="peft")
    assert not (tmp_path / "b" / CONFIG).exists()
    assert (tmp_path / "c" / CONFIG).read_text() == (tmp_path / "a" / CONFIG).read_text()
    assert (tmp_path / "c" / TENSORS).read_bytes() == (tmp_path / "a" / TENSORS).read_bytes()
    assert torch.equal(attached(tmp_path / "b"), before)
    assert torch.equal(attached(tmp_path / "c"), before)


def test_a_model_without_weights_will_do(tmp_path: Path) -> None:
    saved("match first | second apply lora(r=2)", tmp_path / "a")
    empty = net().to("meta")
    for to in ("native", "peft"):
        assert not needs_weights(tmp_path / "a", empty, to=to)
        surgery.convert(tmp_path / "a", tmp_path / to, empty, to=to)
        assert torch.equal(attached(tmp_path / to), attached(tmp_path / "a"))


def test_a_foreign_folder_becomes_native_without_its_own_files(tmp_path: Path) -> None:
    before = saved("match first | second apply miss(r=3)", tmp_path / "a")
    for name in ("adapter.peft", "mapping.json", "inverse.json"):
        (tmp_path / "a" / name).unlink()
    made = surgery.convert(tmp_path / "a", tmp_path / "b", net(), to="native")
    assert {p.name for p in made.saved.files} >= {"adapter.peft", "mapping.json", TENSORS}
    assert torch.equal(attached(tmp_path / "b"), before)


def test_what_peft_has_no_form_for_is_refused_with_the_reason(tmp_path: Path) -> None:
    saved("match first apply lora(r=2) then ia3()", tmp_path / "a")
    found = reason(tmp_path / "a", tmp_path / "b", net(), to="peft")
    assert "one method a layer" in found
    assert not (tmp_path / "b").exists()


def test_a_folder_that_has_something_is_not_written_to(tmp_path: Path) -> None:
    saved("match first apply lora(r=2)", tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert "exists already" in reason(tmp_path / "a", tmp_path / "a", net())
    (tmp_path / "file").write_text("mine")
    assert "exists already" in reason(tmp_path / "a", tmp_path / "file", net())
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before


# ------------------------------------------------------------------------------- another method


EXACT = {
    "lora(r=3)": 3,
    "lora(r=3, alpha=5, rslora=true)": 3,
    "pissa(r=2)": 4,  # beside the true base: what is there, less what was
    "mica(r=2)": 2,
    "miss(r=4)": 4,
    "bone(r=4)": 4,
    "vera(r=5)": 5,
    "adalora(init_r=4)": 4,
    "delora(r=3)": 3,
    "loha(r=2)": 4,  # element by element, ranks are multiplied
    "hra(r=4)": 4,  # reflections, which are made of W
    "vblora(vector_length=12)": 4,
    "unilora(theta_d_length=11)": 4,
    "lora(r=2) then bone(r=3)": 5,
    "hra(r=2) then lora(r=3)": 5,
}


@pytest.mark.parametrize("call", EXACT)
def test_an_equation_that_is_a_product_has_an_exact_one(call: str, tmp_path: Path) -> None:
    before = saved(f"match first | second apply {call}", tmp_path / "a")
    made = surgery.convert(tmp_path / "a", tmp_path / "b", net(), to="lora")
    assert made.exact
    assert {site.rank for site in made.sites} == {EXACT[call]}
    assert made.saved.peft == ""
    assert close(attached(tmp_path / "b"), before)


@pytest.mark.parametrize("call", ["lora(r=2)", "miss(r=2)", "vera(r=3)", "loha(r=2)"])
def test_what_does_not_read_the_base_needs_none(call: str, tmp_path: Path) -> None:
    before = saved(f"match first | second apply {call}", tmp_path / "a")
    empty = net().to("meta")
    assert not needs_weights(tmp_path / "a", empty, to="lora")
    surgery.convert(tmp_path / "a", tmp_path / "b", empty, to="lora")
    assert close(attached(tmp_path / "b"), before)


@pytest.mark.parametrize("call", ["hra(r=2)", "pissa(r=2)", "dora(r=2)"])
def test_what_reads_the_base_is_refused_without_it(call: str, tmp_path: Path) -> None:
    saved(f"match first apply {call}", tmp_path / "a")
    empty = net().to("meta")
    assert needs_weights(tmp_path / "a", empty, to="lora")
    assert "with its weights" in reason(tmp_path / "a", tmp_path / "b", empty, to="lora", rank=2)


def test_numbers_that_need_no_arithmetic_keep_their_bits(tmp_path: Path) -> None:
    saved("match first apply miss(r=4)", tmp_path / "a")
    surgery.convert(tmp_path / "a", tmp_path / "b", net(), to="lora")
    before, after = (read_tensors(tmp_path / name / TENSORS) for name in "ab")
    (block,) = before.values()
    assert torch.equal(after["base_model.model.first.lora_B.weight"], block.T)
    ones = after["base_model.model.first.lora_A.weight"]
    assert bool(((ones == 0) | (ones == 1)).all())


def test_every_kind_of_site_has_its_product(tmp_path: Path) -> None:
    spec = """
        match embed apply mica(r=2)  match conv apply bone(r=3)  match first[3:17] apply vera(r=5)
        match mixer apply delora(r=2)  train second.weight | first.bias
    """
    before = saved(spec, tmp_path / "a")
    made = surgery.convert(tmp_path / "a", tmp_path / "b", net(), to="lora")
    assert made.exact
    assert {s.path for s in made.sites} == {"embed", "conv", "first.rows_3_17", "experts.mixer"}
    assert "peft" in made.saved.peft  # copies and rows have no place in its config
    assert close(attached(tmp_path / "b"), before)


def test_a_gain_has_no_exact_product_and_gets_the_nearest(tmp_path: Path) -> None:
    saved("match first apply dora(r=2)", tmp_path / "a")
    found = reason(tmp_path / "a", tmp_path / "b", net(), to="lora")
    assert "no product of few columns" in found
    errors: list[float] = []
    for rank in (3, 7, 24):
        made = surgery.convert(tmp_path / "a", tmp_path / str(rank), net(), to="lora", rank=rank)
        (site,) = made.sites
        assert not made.exact
        assert site.rank == rank
        assert site.error is not None
        errors.append(site.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 1e-12
    assert close(attached(tmp_path / "24"), attached(tmp_path / "a"))


@pytest.mark.parametrize("call", ["bone(r=4)", "dora(r=2)"])
def test_the_error_is_that_of_the_nearest_product(call: str, tmp_path: Path) -> None:
    saved(f"match first apply {call}", tmp_path / "a")
    made = surgery.convert(tmp_path / "a", tmp_path / "b", net(), to="lora", rank=2)
    changes: list[Tensor] = []
    for name in "ab":
        model = net()
        before = model.first.weight.detach().clone()
        surgery.attach(tmp_path / name, model).inverse.merge()
        changes.append(model.first.weight.detach() - before)
    values = untyped.linalg.svdvals(changes[0])
    norm = untyped.linalg.norm
    left_out = norm(changes[0] - changes[1]) / norm(changes[0])
    assert made.sites[0].error == pytest.approx(float(left_out))
    assert made.sites[0].error == pytest.approx(float(values[2:].norm() / values.norm()))


def test_a_rank_that_suffices_leaves_the_product_exact(tmp_path: Path) -> None:
    saved("match first apply vera(r=3)", tmp_path / "a")
    made = surgery.convert(tmp_path / "a", tmp_path / "b", net(), to="lora", rank=5)
    assert [(s.rank, s.error) for s in made.sites] == [(3, None)]


@pytest.mark.parametrize("call", ["ia3()", "beft()", "road(group_size=4)"])
def test_a_changed_bias_is_refused(call: str, tmp_path: Path) -> None:
    saved(f"match first apply {call}", tmp_path / "a")
    found = reason(tmp_path / "a", tmp_path / "b", net(), to="lora", rank=4)
    assert "changes the bias" in found


def test_a_gain_on_a_layer_without_bias_is_a_change_of_weights(tmp_path: Path) -> None:
    before = saved("match second apply ia3()", tmp_path / "a")
    surgery.convert(tmp_path / "a", tmp_path / "b", net(), to="lora", rank=24)
    assert close(attached(tmp_path / "b"), before)


def test_what_is_no_target_is_refused(tmp_path: Path) -> None:
    saved("match first apply bone(r=2)", tmp_path / "a")
    for name in ("dora", "bone", "loha", "mica", "ia3", "vera"):
        assert "just any product" in reason(tmp_path / "a", tmp_path / "b", net(), to=name)
    assert "lora" in reason(tmp_path / "a", tmp_path / "b", net(), to="loraa")
    assert "no product of rank" in reason(tmp_path / "a", tmp_path / "b", net(), to="lora", rank=0)


def test_dropout_is_said_to_be_left_out(tmp_path: Path) -> None:
    saved("match first apply miss(r=2, dropout=0.25)", tmp_path / "a")
    made = surgery.convert(tmp_path / "a", tmp_path / "b", net(), to="lora")
    assert len(made.notes) == 1
    assert "dropout" in str(made)


def test_what_is_said_is_data_as_well(tmp_path: Path) -> None:
    saved("match first apply bone(r=2)", tmp_path / "a")
    made: Conversion = surgery.convert(tmp_path / "a", tmp_path / "b", net(), to="lora")
    data = made.as_json()
    assert data["sites"] == [{"path": "first", "rank": 2, "error": None}]
    assert data["exact"] is True
    assert "first: rank 2, exact" in str(made)
