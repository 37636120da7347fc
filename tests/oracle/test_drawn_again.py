"""Against peft: what folders leave out for its seed is drawn again, number for number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from small_models import TOKENS, gpt2, llama
from support import bits
from torch import Tensor, nn

import surgery
from surgery.algebra.beginnings import draw, drawn_again
from surgery.store import read_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not:UserWarning"),
    # Of what peft has drawn by then.
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
]

# Libraries whose types are not complete.
hf: Any = peft
untyped: Any = torch

Make = Callable[[], nn.Module]
SOME = ["q_proj", "down_proj", "up_proj"]  # of unequal sizes
CONV1D = {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}

CASES: dict[str, tuple[Make, Any, dict[str, Any], set[str]]] = {
    "vera": (llama, hf.VeraConfig, {"r": 5, "target_modules": SOME}, {"A", "B"}),
    "vera of a key": (
        gpt2,
        hf.VeraConfig,
        {"r": 26, "projection_prng_key": 2**40 + 3, **CONV1D},
        {"A", "B"},
    ),
    "pvera": (
        llama,
        hf.PveraConfig,
        {"r": 3, "projection_prng_key": 7, "target_modules": SOME},
        {"A", "B"},
    ),
    "randlora": (
        llama,
        hf.RandLoraConfig,
        {"r": 5, "randlora_alpha": 3, "target_modules": SOME},
        {"A", "B"},
    ),
    "randlora of a key": (
        gpt2,
        hf.RandLoraConfig,
        {"r": 4, "randlora_alpha": 2, "projection_prng_key": 3, **CONV1D},
        {"A", "B"},
    ),
    "tinylora": (
        llama,
        hf.TinyLoraConfig,
        {"r": 3, "u": 7, "weight_tying": 0.6, "target_modules": SOME},
        {"P"},
    ),
    "tinylora of a seed": (
        gpt2,
        hf.TinyLoraConfig,
        {
            "r": 4,
            "u": 5,
            "projection_seed": 3,
            "target_modules": ["c_attn", "wte"],
            "fan_in_fan_out": True,
        },
        {"P"},
    ),
}


def output(model: nn.Module) -> Tensor:
    return cast(Tensor, model(TOKENS).last_hidden_state).detach()


def saved(case: str, directory: Path, model: nn.Module, **options: Any) -> Tensor:
    """peft's forward of what it has moved and saved."""
    _, config, mine, _ = CASES[case]
    adapted = hf.get_peft_model(model, config(**{**mine, **options})).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    adapted.save_pretrained(str(directory))
    return output(adapted)


def keys(directory: Path) -> set[str]:
    return set(read_tensors(directory / "adapter_model.safetensors").shapes)


def close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_a_folder_without_its_projections_is_read_and_written(case: str, tmp_path: Path) -> None:
    make, *_, left = CASES[case]
    expected = saved(case, tmp_path / "theirs", make(), save_projection=False)
    ours = surgery.attach(tmp_path / "theirs", make())
    close(output(ours.model), expected)
    assert (expected - output(make())).abs().max() > 1e-3
    ours.inverse.merge()
    close(output(ours.model), expected)
    ours.inverse.unmerge()

    assert ours.save(tmp_path / "short", config={"save_projection": False}).peft == ""
    assert ours.save(tmp_path / "long").peft == ""
    assert keys(tmp_path / "short") == keys(tmp_path / "theirs")
    more = keys(tmp_path / "long") - keys(tmp_path / "theirs")
    assert {key[-1] for key in more} == left
    assert bits(ours.inverse.unload()) == bits(make())
    for name in ("short", "long"):
        back = hf.PeftModel.from_pretrained(make(), str(tmp_path / name)).eval()
        close(output(back), expected)
        close(output(surgery.attach(tmp_path / name, make()).model), expected)


@pytest.mark.parametrize("case", ["vera", "pvera", "randlora", "tinylora of a seed"])
def test_the_numbers_are_those_of_peft_to_the_bit(case: str, tmp_path: Path) -> None:
    """On weights of 16 bits too, to which peft rounds what it draws."""
    make, *_, left = CASES[case]
    for dtype in (torch.float32, torch.bfloat16):
        saved(case, tmp_path / "full", make().to(dtype))
        saved(case, tmp_path / "short", make().to(dtype), save_projection=False)
        drawn, read = (
            surgery.attach(tmp_path / name, make().to(dtype)).parameters()
            for name in ("short", "full")
        )
        mine = {name for name in read if name.rpartition(".")[2] in left}
        assert mine
        for name in mine:
            assert torch.equal(drawn[name], read[name]), (dtype, name)


def test_what_begins_here_is_what_peft_begins_with(tmp_path: Path) -> None:
    spec = "match /q_proj|down_proj|up_proj/ apply vera(r=5, projection_prng_key=3)"
    ours = surgery.compile(spec, llama())
    saved("vera", tmp_path, llama(), projection_prng_key=3)
    file = read_tensors(tmp_path / "adapter_model.safetensors")
    for name in "AB":
        assert torch.equal(
            ours.parameters()[f"surgery.default.shared.vera.{name}"],
            file[f"base_model.vera_{name}"],
        )


@pytest.mark.parametrize("case", ["vera", "tinylora"])
def test_numbers_that_the_seed_does_not_draw_are_not_left_out(case: str, tmp_path: Path) -> None:
    make, *_, left = CASES[case]
    saved(case, tmp_path / "theirs", make())
    ours = surgery.attach(tmp_path / "theirs", make())
    name = next(n for n in ours.parameters() if n.rpartition(".")[2] in left)
    with torch.no_grad():
        ours.parameters()[name].view(-1)[0] += 1
    with pytest.raises(surgery.SurgeryError, match="is not what its seed draws"):
        ours.save(tmp_path / "short", config={"save_projection": False})
    assert not (tmp_path / "short").exists()
    assert ours.save(tmp_path / "long").peft == ""
    close(output(surgery.attach(tmp_path / "long", make()).model), output(ours.model))


def test_places_that_the_seed_does_not_draw_are_saved_in_the_native_form(tmp_path: Path) -> None:
    ours = surgery.compile("match q_proj apply fourierft(n_frequency=5)", llama())
    assert ours.save(tmp_path / "one").peft == ""
    with torch.no_grad():
        next(t for n, t in ours.parameters().items() if n.endswith("entries")).neg_().add_(11)
    assert "is not what its seed draws here" in ours.save(tmp_path / "two").peft
    close(output(surgery.attach(tmp_path / "two", llama()).model), output(ours.model))


@pytest.mark.parametrize("option", ["sparse", "very_sparse"])
def test_sparse_projections_that_no_file_has_are_refused(option: str, tmp_path: Path) -> None:
    saved("randlora", tmp_path, llama(), save_projection=False, **{option: True})
    with pytest.raises(surgery.SurgeryError, match="sparse projections that no file has"):
        surgery.attach(tmp_path, llama())


# --------------------------------------------------------------------------------- the language


@pytest.mark.parametrize("after", [0, 1, 35, 77])
def test_a_stream_goes_on_after_what_was_drawn(after: int) -> None:
    generator = torch.Generator().manual_seed(11)
    draw("uniform", {}, (after,), generator) if after else None
    expected = draw("kaiming_uniform", {"a": 1}, (5, 7), generator)
    for name in "AB":  # whatever it is called
        assert torch.equal(
            drawn_again("kaiming_uniform", {"a": 1}, (5, 7), 11, name, after), expected
        )


SHARED = """
method m(seed: int = 3) on matrix {{
  shared A[2, in] ~ uniform(low = -1, seed = seed, after = 0)
  shared B[out, 2] ~ uniform(low = -1, seed = seed, after = {after})
  train g[out] = 1
  W' = W + g * rows(B @ A)
}}
match * apply m()
"""


def test_what_is_shared_goes_on_after_the_largest(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 11), nn.Linear(11, 3))
    found = surgery.compile(SHARED.format(after="2 * in"), model).parameters()
    one = drawn_again("uniform", {"low": -1}, (2 * 11 + 2 * 11,), 3, "", 0)
    assert torch.equal(found["surgery.default.shared.m.A"], one[:22].view(2, 11))
    assert torch.equal(found["surgery.default.shared.m.B"], one[22:].view(11, 2))


@pytest.mark.parametrize("after", ["in / 2", "-in", "10 ** 12"])
def test_no_such_number_can_have_been_drawn(after: str) -> None:
    with pytest.raises(surgery.SurgeryError, match="no number of draws"):
        surgery.plan(SHARED.format(after=after), nn.Sequential(nn.Linear(5, 11)))


@pytest.mark.parametrize(
    ("draws", "code", "said"),
    [
        ("uniform(after = 3)", "E104", "`after` is of the generator of a seed"),
        ("dealt(numbers = 2, cards = 3, first = 0, seed = 1, after = 3)", "E101", "`after`"),
        ('uniform(seed = 1, after = "x")', "E103", "a number is needed"),
    ],
)
def test_a_stream_is_that_of_a_seed(draws: str, code: str, said: str) -> None:
    body = f"frozen A[out, in] ~ {draws} W' = W"
    (found, *_) = surgery.check(f"method m() on matrix {{ {body} }} match q apply m()")
    assert found.code == code
    assert said in found.message


def test_a_place_counts_the_sites_of_all_arguments() -> None:
    body = "place' = place() frozen P[in] ~ normal(seed = place, after = 0) W' = W + r * place * W"
    spec = f"method m(r: int, place: int = 0) on matrix {{ {body} }} "
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)))
    made = surgery.plan(spec + "match 3 | 1 apply m(r=1) match 0 | 2 apply m(r=2)", model)
    told = {s.path: dict(s.form.arguments)["place"] for s in made.sites}
    assert told == {"0": 0, "1": 1, "2": 2, "3": 3}
    (found, *_) = surgery.check(spec.replace("place()", "place(1)"))
    assert (found.code, found.message) == ("E104", "place() takes no arguments")
