"""Against peft itself: spectra, wavelets, circulants, sparse entries, shared bases and banks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from small_models import TOKENS, gpt2, llama
from torch import Tensor, nn

import surgery
from surgery.store import read_tensors, save_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
    # peft has the shared bases at every site besides, and looks for them there.
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
]

# Libraries whose types are not complete.
hf: Any = peft
untyped: Any = torch


# ------------------------------------------------------------------------------------- models


class Mlp(nn.Module):
    """Sides of every parity, wider and narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(14, 35)
        self.second = nn.Linear(35, 21, bias=False)
        self.third = nn.Linear(21, 28)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def dense() -> nn.Module:
    untyped.manual_seed(0)
    return Mlp().eval()


def output(model: nn.Module) -> Tensor:
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if isinstance(inner, Mlp):
        generator = torch.Generator().manual_seed(4)
        return cast(Tensor, model(torch.randn(5, 14, generator=generator)))
    return cast(Tensor, model(TOKENS).last_hidden_state)


def moved(model: nn.Module) -> None:
    """Parameters away from where they begin, so that the adapter does something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


# -------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    config: Callable[[], peft.PeftConfig]
    spec: str


ALL = ["first", "second", "third"]
SOME = ["q_proj", "v_proj", "down_proj"]
FUSED = ["c_attn", "mlp.c_proj"]
CASES = (
    Case(
        "fourierft",
        dense,
        lambda: peft.FourierFTConfig(n_frequency=17, scaling=70.0, target_modules=ALL),
        "match /first|second|third/ apply fourierft(n_frequency=13, random_loc_seed=5)",
    ),
    Case(
        "fourierft of llama",
        llama,
        lambda: peft.FourierFTConfig(n_frequency=11, random_loc_seed=3, target_modules=SOME),
        "match /q_proj|v_proj|down_proj/ apply fourierft(n_frequency=7, scaling=90)",
    ),
    Case(
        "fourierft on Conv1D",
        gpt2,
        lambda: peft.FourierFTConfig(n_frequency=19, target_modules=FUSED, fan_in_fan_out=True),
        "match /c_attn|mlp\\.c_proj/ apply fourierft(n_frequency=19)",
    ),
    Case(
        "waveft",
        dense,
        lambda: peft.WaveFTConfig(n_frequency=23, scaling=7.0, target_modules=ALL),
        "match /first|second|third/ apply waveft(n_frequency=17, random_loc_seed=5)",
    ),
    Case(
        "waveft of llama, each site its own number",
        llama,
        lambda: peft.WaveFTConfig(
            n_frequency=13,
            target_modules=SOME,
            n_frequency_pattern={"layers.1.self_attn.q_proj": 7},
        ),
        "match /q_proj|v_proj|down_proj/ in layers[*] apply waveft(n_frequency = 11 + 2 * layer)",
    ),
    Case(
        "waveft on Conv1D",
        gpt2,
        lambda: peft.WaveFTConfig(n_frequency=19, target_modules=FUSED, fan_in_fan_out=True),
        "match /c_attn|mlp\\.c_proj/ apply waveft(n_frequency=19)",
    ),
    Case(
        "waveft without wavelets",
        dense,
        lambda: peft.WaveFTConfig(n_frequency=23, use_idwt=False, target_modules=ALL),
        "match /first|second|third/ apply waveft(n_frequency=17, use_idwt=false)",
    ),
    Case(
        "c3a",
        dense,
        lambda: peft.C3AConfig(block_size=7, init_weights=False, target_modules=ALL),
        "match /first|second|third/ apply c3a(block_size=7)",
    ),
    Case(
        "c3a of llama",
        llama,
        lambda: peft.C3AConfig(block_size=6, init_weights=True, target_modules=SOME),
        'match /q_proj|v_proj|down_proj/ apply c3a(block_size=2, init_weights="zeros")',
    ),
    Case(
        "shira",
        dense,
        lambda: peft.ShiraConfig(r=3, target_modules=ALL),
        "match /first|second|third/ apply shira(r=2)",
    ),
    Case(
        "shira of llama",
        llama,
        lambda: peft.ShiraConfig(r=2, random_seed=5, target_modules=SOME),
        "match /q_proj|v_proj|down_proj/ apply shira(r=3, random_seed=7)",
    ),
    Case(
        "randlora",
        dense,
        lambda: peft.RandLoraConfig(r=3, randlora_alpha=5, target_modules=ALL),
        "match /first|second|third/ apply randlora(r=5, alpha=3, projection_prng_key=2)",
    ),
    Case(
        "randlora of llama",
        llama,
        lambda: peft.RandLoraConfig(r=5, randlora_alpha=3, very_sparse=True, target_modules=SOME),
        "match /q_proj|v_proj|down_proj/ apply randlora(r=3, alpha=2)",
    ),
    Case(
        "randlora on Conv1D",
        gpt2,
        lambda: peft.RandLoraConfig(
            r=5, randlora_alpha=3, target_modules=FUSED, fan_in_fan_out=True
        ),
        "match /c_attn|mlp\\.c_proj/ apply randlora(r=4, alpha=2)",
    ),
    Case(
        "vblora",
        dense,
        lambda: peft.VBLoRAConfig(r=3, num_vectors=11, vector_length=7, topk=3, target_modules=ALL),
        "match /first|second|third/ apply vblora(r=2, num_vectors=5, vector_length=7, topk=5)",
    ),
    Case(
        "vblora of llama",
        llama,
        lambda: peft.VBLoRAConfig(r=2, num_vectors=5, vector_length=6, target_modules=SOME),
        "match /q_proj|v_proj|down_proj/ apply vblora(num_vectors=7, vector_length=2)",
    ),
    Case(
        "vblora on Conv1D",
        gpt2,
        lambda: peft.VBLoRAConfig(
            r=2, num_vectors=5, vector_length=4, target_modules=FUSED, fan_in_fan_out=True
        ),
        "match /c_attn|mlp\\.c_proj/ apply vblora(num_vectors=7, vector_length=12)",
    ),
)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def saved_by_peft(case: Case, directory: Path) -> nn.Module:
    untyped.manual_seed(7)
    model = cast(peft.PeftModel, hf.get_peft_model(case.model(), case.config()))
    moved(model)
    model.save_pretrained(str(directory))
    return model.eval()


def saved_by_us(case: Case, directory: Path) -> surgery.Compiled:
    compiled = surgery.compile(case.spec, case.model())
    moved(compiled.model)
    report = compiled.save(directory)
    assert report.peft == ""
    return compiled


def close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


# -------------------------------------------------------------------------------------- tests


@every_case
def test_what_peft_saves_attaches(case: Case, tmp_path: Path) -> None:
    theirs = saved_by_peft(case, tmp_path)
    expected, before = output(theirs), output(case.model())
    ours = surgery.attach(tmp_path, case.model())
    assert (expected - before).abs().max() > 1e-3
    close(output(ours.model), expected)
    ours.inverse.merge()
    close(output(ours.model), expected)
    ours.inverse.unmerge()
    ours.inverse.unload()
    assert torch.equal(output(ours.model), before)


@every_case
def test_what_we_save_peft_loads(case: Case, tmp_path: Path) -> None:
    compiled = saved_by_us(case, tmp_path)
    expected = output(compiled.model)
    theirs = hf.PeftModel.from_pretrained(case.model(), str(tmp_path)).eval()
    assert (expected - output(case.model())).abs().max() > 1e-3
    close(output(theirs), expected)
    again = surgery.attach(tmp_path, case.model())
    assert torch.equal(output(again.model), expected)
    wanted = cast("dict[str, Tensor]", hf.get_peft_model_state_dict(theirs))
    written = compiled.mapping.rename(compiled.parameters(), to="peft")
    once = {k: t for k, t in wanted.items() if not k.endswith((".randlora_A", ".randlora_B"))}
    once |= {k: t for k, t in wanted.items() if k.startswith("base_model.randlora_")}
    assert {k: (t.shape, t.dtype) for k, t in written.items()} == {
        k: (t.shape, t.dtype) for k, t in once.items()
    }


STARTS = (
    ("fourierft", lambda: peft.FourierFTConfig(n_frequency=5, init_weights=True)),
    ("waveft", lambda: peft.WaveFTConfig(n_frequency=5)),
    ("c3a", lambda: peft.C3AConfig(block_size=7, init_weights=True)),
    ("shira", lambda: peft.ShiraConfig(r=3)),
    ("randlora", lambda: peft.RandLoraConfig(r=3)),
)
CALLS = {
    "fourierft": "fourierft(n_frequency=5, init_weights=true)",
    "waveft": "waveft(n_frequency=5)",
    "c3a": 'c3a(block_size=7, init_weights="zeros")',
    "shira": "shira(r=3)",
    "randlora": "randlora(r=3)",
}


@pytest.mark.parametrize(("name", "config"), STARTS)
def test_the_start_is_pefts(name: str, config: Callable[[], Any], tmp_path: Path) -> None:
    built = config()
    built.target_modules = {*ALL}
    case = Case(name, dense, lambda: built, "")
    theirs = cast(peft.PeftModel, hf.get_peft_model(case.model(), case.config()))
    before = output(dense())
    close(output(theirs), before)
    compiled = surgery.compile(f"match /first|second|third/ apply {CALLS[name]}", dense())
    assert torch.equal(output(compiled.model), before)
    mine = sum(p.numel() for p in compiled.model.parameters() if p.requires_grad)
    assert mine == compiled.plan.trainable
    assert mine == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert compiled.save(tmp_path).peft == ""


@pytest.mark.parametrize(
    ("call", "spread"),
    [
        ("fourierft(n_frequency=200)", 1.0),
        ("c3a(block_size=7)", (2 / 49) ** 0.5),
        ('c3a(block_size=7, init_weights="kaiming_uniform")', 14**-0.5 / 3**0.5),
        ('c3a(block_size=7, init_weights="gaussian")', 1.0),
    ],
)
def test_what_begins_at_random_is_spread_as_pefts(call: str, spread: float) -> None:
    model = nn.Sequential(nn.Linear(14, 35))
    compiled = surgery.compile(f"match * apply {call}", model)
    drawn = next(t for t in compiled.parameters().values() if t.is_floating_point())
    assert 0.7 * spread < float(drawn.std()) < 1.3 * spread


def test_places_are_those_that_peft_draws(tmp_path: Path) -> None:
    config = peft.ShiraConfig(r=3, random_seed=11, target_modules=ALL)
    theirs = saved_by_peft(Case("", dense, lambda: config, ""), tmp_path)
    del theirs
    file = read_tensors(tmp_path / "adapter_model.safetensors")
    compiled = surgery.compile(
        "match /first|second|third/ apply shira(r=3, random_seed=11)", dense()
    )
    for name in ALL:
        drawn = compiled.parameters()[f"{name}.surgery.default.entries"]
        stored = file[f"base_model.model.{name}.shira_indices"]
        assert drawn.dtype == torch.int32
        assert pairs(drawn) == pairs(stored)


def pairs(places: Tensor) -> set[tuple[int, int]]:
    return {(int(places[0, k]), int(places[1, k])) for k in range(places.shape[1])}


def test_places_stay_whole_whatever_the_adapter_is_cast_to() -> None:
    model = nn.Sequential(nn.Linear(700, 300))
    compiled = surgery.compile("match * apply shira(r=2)", model, dtype=torch.bfloat16)
    moved(model)
    x = torch.randn(3, 700)
    before = model(x)
    values = compiled.parameters()
    assert {t.dtype for t in values.values()} == {torch.bfloat16, torch.int32}
    model.double()
    torch.testing.assert_close(model(x.double()).float(), before, atol=1e-2, rtol=1e-2)
    assert compiled.parameters()["0.surgery.default.entries"].dtype == torch.int32


REFUSED: tuple[tuple[Any, dict[str, Any], str], ...] = (
    (peft.WaveFTConfig, {"n_frequency": 5, "wavelet_family": "db2"}, '`wavelet_family` is "db2"'),
    (peft.WaveFTConfig, {"n_frequency": 5, "proportional_parameters": True}, "how many places"),
)


@pytest.mark.filterwarnings("ignore:Specified to not save:UserWarning")
@pytest.mark.parametrize(("kind", "options", "message"), REFUSED)
def test_what_would_compute_something_else_is_refused(
    kind: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = kind(**{"target_modules": ALL, **options})
    saved_by_peft(Case("", dense, lambda: config, ""), tmp_path)
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.attach(tmp_path, dense())
    assert message in str(caught.value)


def test_a_base_that_a_site_has_otherwise_is_refused(tmp_path: Path) -> None:
    saved_by_peft(next(c for c in CASES if c.name == "randlora"), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    file = read_tensors(path)
    tensors = {key: file[key].clone() for key in file.shapes}
    tensors["base_model.model.second.randlora_B"] += 1
    save_tensors(path, tensors)
    with pytest.raises(surgery.SurgeryError, match=r"second\.randlora_B` is another than"):
        surgery.attach(tmp_path, dense())


def test_places_outside_of_the_matrix_are_refused(tmp_path: Path) -> None:
    saved_by_peft(next(c for c in CASES if c.name == "shira"), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    file = read_tensors(path)
    tensors = {key: file[key].clone() for key in file.shapes}
    tensors["base_model.model.second.shira_indices"][1, 0] = 35
    save_tensors(path, tensors)
    with pytest.raises(surgery.SurgeryError, match=r"`second.*entries` has places outside of"):
        surgery.attach(tmp_path, dense())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("shira(r=15)", "the nearest that fit: r=9 or 10"),
        ("fourierft(n_frequency=491)", "n_frequency=489 or 490"),
        ("c3a(block_size=5)", "block_size=1 or 7"),
        ("vblora(num_vectors=3, vector_length=7, topk=4)", "topk=2 or 3"),
    ],
)
def test_more_than_there_is_room_for_is_refused(call: str, message: str) -> None:
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.plan(f"match first apply {call}", dense())
    assert message in str(caught.value)


def test_the_config_of_what_was_saved_names_no_places(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "fourierft")
    compiled = saved_by_us(case, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["random_loc_seed"], config["n_frequency"]) == (5, 13)
    keys = read_tensors(tmp_path / "adapter_model.safetensors").shapes
    assert len(keys) == 3
    assert len(compiled.parameters()) == 6


class Batch(nn.Module):
    """Three matrices in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        untyped.manual_seed(9)
        self.mixer = nn.Parameter(torch.randn(3, 12, 18))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.mixer.mT


@pytest.mark.parametrize("site", ["mixer", "mixer[0:6]"])
@pytest.mark.parametrize(
    "call",
    [
        "c3a(block_size=6)",
        "fourierft(n_frequency=5)",
        "shira(r=2)",
        "waveft(n_frequency=7)",
        "randlora(r=5, alpha=2)",
        "vblora(num_vectors=5, vector_length=6)",
        "unilora(theta_d_length=11, init_theta_d_bound=0.5)",
        "supertuning(sparsity=0.9)",
    ],
)
def test_a_batch_of_matrices_and_rows(call: str, site: str, tmp_path: Path) -> None:
    model, x = Batch(), torch.randn(3, 5, 18, generator=torch.Generator().manual_seed(4))
    before = model(x)
    compiled = surgery.compile(f"match {site} apply {call}", model)
    moved(model)
    adapted = model(x)
    assert (adapted - before).abs().max() > 1e-2
    compiled.save(tmp_path)
    assert torch.equal(surgery.attach(tmp_path, Batch()).model(x), adapted)
    compiled.inverse.merge()
    close(model(x), adapted)
    compiled.inverse.unload()
    assert torch.equal(model(x), before)
