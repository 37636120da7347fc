"""An adapter that a spec makes of others is the one that is composed by hand of the same."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.errors import (
    ArtifactError,
    DefinitionError,
    Diagnostic,
    PlanError,
    StateError,
    SurgeryError,
)
from surgery.recipe import OPTIONS, WAYS, How
from surgery.status import status

untyped: Any = torch

BOTH = "adapter a { match * apply lora(r=2) }\nadapter b { match * apply lora(r=3) }\n"
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def net() -> nn.Sequential:
    untyped.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 7, bias=False)).double().eval()


def moved(compiled: surgery.Compiled, *names: str) -> surgery.Compiled:
    """Adapters that are away from where they begin."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in names:
            for value in compiled.parameters(name).values():
                value.add_(0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
    return compiled


def two(first: str = "lora(r=2)", second: str = "lora(r=3, alpha=5)") -> surgery.Compiled:
    """A model with `a` and `b`, which add something."""
    spec = f"adapter a {{ match * apply {first} }} adapter b {{ match * apply {second} }}"
    return moved(surgery.compile(spec, net()), "a", "b")


def marked(found: tuple[Diagnostic, ...]) -> list[tuple[str, str]]:
    """Codes, and what of the source they underline."""
    return [(one.code, "" if one.span is None else one.span.text) for one in found]


def refused(spec: str, model: nn.Module, **options: Any) -> tuple[Diagnostic, ...]:
    """What is said of a spec that does not compile, which leaves the model as it was."""
    before = _whole(model)
    with pytest.raises(SurgeryError) as caught:
        surgery.compile(spec, model, **options)
    after = _whole(model)
    assert [*after] == [*before]
    for key, was in before.items():
        now = after[key]
        assert torch.equal(now, was) if isinstance(was, Tensor) else now == was, key
    return caught.value.diagnostics


def _whole(model: nn.Module) -> dict[str, Any]:
    """All that a surgery could leave on a model."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {f"? {name}": p.requires_grad for name, p in model.named_parameters()}
    every: list[tuple[str, Any]] = [*cast(Any, model).named_modules()]
    modules = {f"# {n}": f"{m.__class__} {sorted(m.__dict__)}" for n, m in every}
    handle = surgery.of(model) if hasattr(model, "_surgery_state") else None
    state = None if handle is None else (handle.adapters, handle.live)
    return {**tensors, **flags, **modules, "state": state}


def same(one: surgery.Compiled, other: surgery.Compiled, name: str) -> bool:
    here, there = one.parameters(name), other.parameters(name)
    return here.keys() == there.keys() and all(torch.equal(here[k], there[k]) for k in here)


def output(compiled: surgery.Compiled, live: str | None) -> Tensor:
    with torch.no_grad(), compiled.using(live):
        return compiled.model(X)


# ------------------------------------------------------------------------------------- it is that


@pytest.mark.parametrize("call", ["lora(r=2)", "dora(r=2)", "ia3()", "bone(r=2)", "loha(r=2)"])
@pytest.mark.parametrize("way", ["", "by linear()"])
def test_one_adapter_as_it_is_stays_that(call: str, way: str) -> None:
    compiled = two(call)
    surgery.compile(f"adapter c = 1.0*a {way}", compiled.model)
    there, here = compiled.parameters("c"), compiled.parameters("a")
    assert all(torch.equal(t, h) for t, h in zip(there.values(), here.values(), strict=True))
    assert torch.equal(output(compiled, "c"), output(compiled, "a"))
    assert compiled.compositions["c"].how == "as it is"


GIVEN = {"rank": "3", "density": "0.5", "sign": '"frequency"', "seed": "4", "to": '"lora"'}


@pytest.mark.parametrize("way", WAYS)
def test_what_a_spec_makes_is_what_a_call_makes(way: str) -> None:
    given = {name: GIVEN[name] for name in WAYS[way].options}
    arguments = ", ".join(f"{name}={text}" for name, text in given.items())
    compiled, by_hand = two("lora(r=2)", "lora(r=2)"), two("lora(r=2)", "lora(r=2)")
    surgery.compile(f"adapter c = 0.7*a - 0.3*b by {way}({arguments})", compiled.model)
    numbers = {
        n: t.strip('"') if '"' in t else float(t) if "." in t else int(t) for n, t in given.items()
    }
    options: Any = numbers
    made = by_hand.compose("0.7*a - 0.3*b", name="c", how=way, **options)
    assert same(compiled, by_hand, "c")
    assert compiled.compositions == {"c": made} == by_hand.compositions
    assert surgery.compose_on(by_hand, "0.7*a - 0.3*b", "d", how=way, **options).sites == made.sites
    assert compiled.live == "a"
    assert compiled.adapters == ("a", "b", "c")


def test_a_sum_side_by_side_is_the_default_and_exact() -> None:
    compiled = two()
    surgery.compile("adapter c = 0.7*a + 0.3*b", compiled.model)
    assert compiled.compositions["c"].exact
    assert torch.allclose(output(compiled, "c"), output(compiled, "0.7*a + 0.3*b"), atol=1e-12)


def test_what_is_new_is_made_of_what_comes_with_it_in_any_order() -> None:
    spec = """
    adapter e = 2*d - a
    adapter d = half*a + b by svd(rank = 2 * high)
    activate e - 0.5*b
    adapter a { match 0 apply far(r=2) }
    let half = 1 / 2
    param high: int = 1
    method far(r: int) on matrix {
      train A[r, in] ~ normal(std = 1)
      train B[out, r] ~ normal(std = 1)
      W' = W + B @ A
    }
    match 1 apply lora(r=2)
    adapter b { match 0 apply far(r=3) }
    """
    compiled = surgery.compile(spec, net(), values={"high": 2}, seed=3)
    assert compiled.adapters == ("a", "default", "b", "d", "e")
    assert compiled.live == "e - 0.5*b"
    by_hand = surgery.compile(
        spec.replace("adapter e", "# ").replace("adapter d", "# ").replace("activate", "# "),
        net(),
        seed=3,
    )
    by_hand.compose("0.5*a + b", name="d", how="svd", rank=4)
    by_hand.compose("2*d - a", name="e")
    assert same(compiled, by_hand, "d")
    assert same(compiled, by_hand, "e")
    by_hand.activate("e - 0.5*b")
    assert torch.equal(compiled.model(X), by_hand.model(X))
    assert compiled.inverse.unload() is compiled.model
    assert not any("surgery" in name for name in compiled.model.state_dict())


def test_what_nothing_is_added_to_is_off_by_nothing() -> None:
    spec = f"{BOTH}adapter d {{ train bias }}\nadapter c = 0.7*a + 0.3*b + 0.3*d"
    compiled = surgery.compile(spec, net())
    assert compiled.compositions["c"].error == 0
    assert {site.error for site in compiled.compositions["c"].sites} == {0}


def test_a_cut_is_made_of_one_adapter_too_and_told() -> None:
    compiled = two("dora(r=2)")
    surgery.compile("adapter c = a by svd(rank = 2)", compiled.model)
    made = compiled.compositions["c"]
    assert made.error is not None
    assert made.error > 0
    assert {site.rank for site in made.sites} == {2}
    assert f"made: {made.summary}" in str(compiled)
    assert [one.made_of for one in status(compiled.model).adapters] == ["", "", made.summary]
    compiled.rename("c", "short")
    assert compiled.compositions["short"].summary.startswith("short = a, svd: off the sum")
    tensors = compiled.parameters("short")
    compiled.hotswap("short", {name: tensor.detach() * 2 for name, tensor in tensors.items()})
    assert not compiled.compositions


def test_what_is_made_is_an_adapter_like_any_other(tmp_path: Path) -> None:
    compiled = two()
    surgery.compile("adapter c = 0.7*a + 0.3*b by cat()", compiled.model)
    compiled.save(tmp_path / "c", "c")
    again = surgery.attach(tmp_path / "c", net())
    assert torch.allclose(again.model(X), output(compiled, "c"), atol=1e-12)
    copy = surgery.of(deepcopy(compiled.model))
    assert copy.compositions == compiled.compositions
    compiled.activate("c")
    adapted = compiled.model(X)
    compiled.inverse.merge()
    assert torch.allclose(compiled.model(X), adapted, atol=1e-12)


def test_a_twin_has_it_and_the_model_has_not() -> None:
    model = net()
    spec = "match 0 apply lora(r=2)\nadapter c = 2*default"
    compiled = surgery.compile(spec, model, inplace=False)
    assert compiled.adapters == ("default", "c")
    assert compiled.live == "default"
    assert not hasattr(model, "_surgery_state")


# ----------------------------------------------------------------------------------- what it says


def test_the_plan_says_what_is_made_of_what() -> None:
    spec = BOTH + 'adapter c = (1 - 0.3)*a + b by ties_svd(rank=2, density=0.5, sign="frequency")'
    plan = surgery.plan(spec, net())
    told = 'c = 0.7*a + b by ties_svd(rank = 2, density = 0.5, sign = "frequency")'
    assert f"made of other adapters: {told}" in str(plan)
    assert plan.as_json()["derived"] == [
        {"adapter": "c", "expression": "0.7*a + b", "how": told.partition(" by ")[2]}
    ]
    assert plan.adapters == ("a", "b")
    assert len(plan.sites) == 4


def test_how_is_told_as_it_is_written() -> None:
    for way in WAYS.values():
        given = ", ".join(
            f"{n} = {GIVEN[n]}"
            for n in ("rank", "density", "to", "sign", "seed")
            if n in way.options
        )
        text = f"{way.name}({given})"
        found = surgery.plan(f"{BOTH}adapter c = a + b by {text}", net()).resolved.derived
        assert [str(one.how) for one in found] == [text]
    assert str(How()) == "cat()"
    assert {name for way in WAYS.values() for name in way.options} == OPTIONS.keys()


# ---------------------------------------------------------------------------------- what is wrong

WRONG: Mapping[str, list[tuple[str, str]]] = {
    "adapter c = d + a\nadapter d = 2*e\nadapter e = c": [("E140", "d")],
    "adapter c = a + 2*c": [("E140", "c")],
    "adapter a = b": [("E141", "adapter a = b")],
    "adapter c = a\nadapter c = b": [("E141", "adapter c = b")],
    "adapter none = a": [("E106", "adapter none = a")],
    "adapter c = a by svt(rank = 2)": [("E142", "svt")],
    "adapter c = a by svd(ranc = 2)": [("E142", "ranc")],
    "adapter c = a by svd(density = 1)": [("E142", "density")],
    "adapter c = a by svd(rank = 0)": [("E142", "0")],
    "adapter c = a by ties()": [("E142", "ties()")],
    'adapter c = a by ties(density = 2, sign = "x")': [("E142", "2"), ("E142", '"x"')],
    'adapter c = a by cat(to = "lorra")': [("E142", '"lorra"')],
    "adapter c = a by svd(rank = 2, rank = 3)": [("E107", "rank = 3")],
    'adapter c = a by svd(rank = "r")': [("E119", '"r"')],
    "adapter c = a by svd(rank = high)": [("E101", "high")],
    "adapter c = a * b": [("E132", "b")],
    "adapter c = 3": [("E132", "3")],
    "adapter c = 0*a": [("E132", "0*a")],
    "adapter c = a by svd(8)": [("E008", "8")],
    "activate c + a\nadapter d = a": [("E131", "c")],
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_seen_without_a_model_and_underlined(text: str) -> None:
    found = surgery.check(BOTH + text)
    assert marked(found) == WRONG[text]
    assert all(one.label or one.hint for one in found)
    if "E008" not in {one.code for one in found}:
        assert marked(refused(BOTH + text, net())) == WRONG[text]


def test_the_nearest_right_answer_is_said() -> None:
    def said(text: str) -> tuple[str, str]:
        (one,) = surgery.check(BOTH + text)
        return one.label, one.hint

    assert said("adapter c = a by svt()")[0] == "did you mean `svd`?"
    assert said("adapter c = a by svd(ranc = 2)") == ("did you mean `rank`?", "it has: rank, to")
    assert said("adapter c = a by svd(density = 1)")[1].startswith("`density` goes with ties, ")


def test_a_name_of_no_adapter_may_be_the_models() -> None:
    assert surgery.check("adapter c = 0.7*x + y by svd(rank = 2)") == ()
    (found,) = surgery.check(BOTH + "adapter bb = a\nadapter c = 0.7*a + bbb")
    assert (found.code, found.severity, found.label) == ("E131", "warning", "did you mean `bb`?")
    (found,) = refused("adapter c = 0.7*x", net())
    assert marked((found,)) == [("E131", "x")]
    compiled = two()
    (found,) = refused("adapter c = a + x", compiled.model)
    assert marked((found,)) == [("E131", "x")]
    assert "a, b" in found.hint


def test_a_name_that_the_file_gives_a_meaning_means_that() -> None:
    compiled = two()
    surgery.compile("let a = 0.5\nadapter c = a*b", compiled.model)
    assert compiled.compositions["c"].expression == "0.5*b"


def test_a_name_that_the_model_has_is_refused() -> None:
    compiled = two()
    with pytest.raises(StateError, match="E412"):
        surgery.compile("adapter a = 2*b", compiled.model)
    with pytest.raises(StateError, match="E443"):
        surgery.compile("adapter forward = 2*b", compiled.model)
    compiled.inverse.merge()
    with pytest.raises(StateError, match="E402"):
        surgery.compile("adapter c = 2*b", compiled.model)


LATE: Mapping[str, tuple[str, type[SurgeryError], str]] = {
    "bent": ("adapter c = f + g by cat()", ArtifactError, "E580"),
    "chain": ("adapter c = f then g by linear()", ArtifactError, "E582"),
    "apart": ("adapter c = f + g by linear()", ArtifactError, "E583"),
    "target": ('adapter c = f + g by svd(rank = 2, to = "dora")', ArtifactError, "E523"),
    "second": ("adapter c = 2*g\nadapter d = f + c by linear()", ArtifactError, "E583"),
    "live": (
        "adapter c = 2*g\nadapter e { match 0[0:3] apply lora(r=2) }\nactivate c + e",
        PlanError,
        "E309",
    ),
}


@pytest.mark.parametrize("name", LATE)
@pytest.mark.parametrize("there", [False, True])
def test_what_fails_leaves_the_model_as_it_was(name: str, there: bool) -> None:
    text, error, code = LATE[name]
    spec = (
        f"adapter f {{ match * apply dora(r=2) }} adapter g {{ match * apply lora(r=2) }}\n{text}"
    )
    model = two().model if there else net()
    with pytest.raises(error):
        surgery.compile(spec, deepcopy(model))
    found = refused(spec, model)
    assert {one.code for one in found} == {code}
    if name != "live":
        assert all(one.span is not None and one.span.text.startswith("adapter ") for one in found)
    if name == "bent":
        with pytest.raises(error):
            surgery.plan(spec, model)
        assert "by svd(…)" in found[0].hint


def test_what_fails_in_python_leaves_the_model_as_it_was() -> None:
    compiled = two("dora(r=2)")
    before = _whole(compiled.model)
    wrong: list[dict[str, Any]] = [
        {},
        {"how": "svd", "rank": 0},
        {"how": "linear"},
        {"how": "ways"},
    ]
    for options in wrong:
        with pytest.raises(ArtifactError):
            compiled.compose("a + b", name="c", **options)
    with pytest.raises(ArtifactError, match="E582"):
        compiled.compose("a", name="c", how="ties")
    with pytest.raises(StateError, match="E411"):
        compiled.compose("a + x", name="c")
    with pytest.raises(DefinitionError, match="E132"):
        compiled.compose("a * b", name="c")
    assert [*_whole(compiled.model)] == [*before]


def test_weights_that_have_not_come_are_waited_for() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(12, 20))
    spec = BOTH + "adapter c = a + b by svd(rank = 2)"
    assert surgery.plan(spec, model).adapters == ("a", "b")
    with pytest.raises(ArtifactError, match="E584"):
        surgery.compile(spec, model)
    assert not any("surgery" in name for name in model.state_dict())


def test_other_verbs_take_such_specs(tmp_path: Path) -> None:
    seen = surgery.verify(f"{BOTH}adapter c = a + b\nactivate a", net(), lambda m: m(X))
    assert seen.passed
    (tmp_path / "used.peft").write_text("adapter c = a + b")
    (tmp_path / "spec.peft").write_text(f'use "used.peft"\n{BOTH}')
    with pytest.raises(DefinitionError, match="E128"):
        surgery.load(tmp_path / "spec.peft")
