"""`at`: what is adapted for some tokens of a text, and nowhere else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import language_model
from support import moved
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import BertConfig, BertModel

import surgery
from surgery.errors import SurgeryError

untyped: Any = torch
METHODS = ("lora(r=2)", "dora(r=2)", "ia3()", "oft(block_size=4)", "bone(r=4)")
ON_WEIGHTS = "match q_proj | up_proj apply {} at {}"
ON_CALLS = "match mlp in layers[*] apply {} at {}"
SPECS = (
    *((ON_WEIGHTS, m) for m in METHODS),
    (ON_CALLS, "bottleneck(r=3)"),
    (ON_CALLS, "steering()"),
)


def tokens(batch: int = 3, length: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 61, (batch, length), generator=generator)


def ran(model: nn.Module, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return cast(Any, model)(ids, **more).logits


def put(spec: str, model: nn.Module | None = None) -> surgery.Compiled:
    compiled = surgery.compile(spec, language_model() if model is None else model)
    moved(compiled)
    return compiled


def refused(code: str, call: Callable[[], object]) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        call()
    assert code in {d.code for d in caught.value.diagnostics}
    return caught.value


@pytest.mark.parametrize(("form", "method"), SPECS)
def test_all_places_are_all_of_it_and_no_places_none(form: str, method: str) -> None:
    """On the first layer alone, a token that is not meant is as the base has it."""
    ids, base = tokens(), language_model()
    whole = put(form.format(method, "first(1)").partition(" at ")[0])
    every = put(form.format(method, "first(99)"))
    assert torch.allclose(ran(every.model, ids), ran(whole.model, ids), atol=1e-6)
    assert not torch.allclose(ran(every.model, ids), ran(base, ids), atol=1e-4)
    none = put(form.format(method, "[99]"))
    assert torch.equal(ran(none.model, ids), ran(base, ids))
    last = put(form.format(method, "last(2)"))
    found, before = ran(last.model, ids), ran(base, ids)
    assert torch.equal(found[:, :-2], before[:, :-2])  # of which no later token is any part
    assert not torch.allclose(found[:, -2:], before[:, -2:], atol=1e-5)


@given(st.sampled_from(["first(2)", "last(2)", "[0, -1]", "first(1) | last(1)", "after(7, 9)"]))
@settings(max_examples=5, deadline=None)
def test_padding_on_either_side_is_no_token(at: str) -> None:
    compiled = put(ON_CALLS.format("bottleneck(r=3)", at))
    ids = tokens(1, 5)
    ids[0, 2:4] = torch.tensor([7, 9])
    alone = ran(compiled.model, ids)
    pad, ones = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 5, dtype=torch.long)
    right = ran(compiled.model, torch.cat([ids, pad], 1), attention_mask=torch.cat([ones, pad], 1))
    mask = torch.cat([pad, ones], 1)
    left = ran(
        compiled.model,
        torch.cat([pad, ids], 1),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
    )
    assert torch.allclose(right[:, :5], alone, atol=1e-5)
    assert torch.allclose(left[:, 3:], alone, atol=1e-5)


@pytest.mark.parametrize("at", ["first(3)", "last(2)", "after(7, 9)"])
@pytest.mark.parametrize("more", [{}, {"num_beams": 2}])
def test_generation_goes_on_as_it_began(at: str, more: dict[str, Any]) -> None:
    """With a cache, what is generated is what a text is that is read again at every step."""
    compiled = put(
        f"{ON_CALLS.format('bottleneck(r=3)', at)}\nmatch v_proj apply lora(r=2) at {at}"
    )
    ids = tokens(2, 5)
    ids[0, 1:3] = torch.tensor([7, 9])
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "eos_token_id": None}
    made = cast(Any, compiled.model).generate(ids, do_sample=False, **asked, **more)
    if at != "last(2)":  # a text without a cache is a prompt anew at every step
        again = cast(Any, compiled.model).generate(
            ids, do_sample=False, use_cache=False, **asked, **more
        )
        assert torch.equal(made, again)
    for row in range(2):
        one = {**asked, "attention_mask": torch.ones(1, 5, dtype=torch.long)}
        single = cast(Any, compiled.model).generate(
            ids[row : row + 1], do_sample=False, **one, **more
        )
        assert torch.equal(single[0], made[row])


def test_samples_have_their_own_places() -> None:
    model = language_model()
    compiled = surgery.compile(
        "adapter a { match q_proj apply lora(r=2) at first(2) match mlp in layers[*] apply "
        "bottleneck(r=2) at last(2) }\nadapter b { match q_proj apply lora(r=3) at first(2) }",
        model,
    )
    for name in compiled.adapters:
        moved(compiled, name)
    ids, names = tokens(5), ["b", None, "a", "b", "a"]
    mask = torch.ones_like(ids)
    mask[3, 5:] = 0
    with compiled.route(names):
        routed = ran(model, ids, attention_mask=mask)
    for row, name in enumerate(names):
        with compiled.using(name):
            alone = ran(model, ids[row : row + 1], attention_mask=mask[row : row + 1])
        assert torch.allclose(routed[row], alone[0], atol=1e-6)
    with compiled.using("0.5*a + 2*b"):
        assert not torch.allclose(ran(model, ids), ran(language_model(), ids))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_is_for_the_same_tokens(reentrant: bool) -> None:
    grads: list[list[Tensor | None]] = []
    for checkpointed in (False, True):
        compiled = put(ON_CALLS.format("bottleneck(r=3)", "first(2)"))
        model = cast(Any, compiled.model).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(tokens(), labels=tokens()).loss.backward()
        named = model.named_parameters()
        grads.append([p.grad for n, p in named if n in compiled.parameters()])
    for one, other in zip(*grads, strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, atol=1e-7)


def test_a_compiled_model_has_one_graph() -> None:
    compiled = put("match q_proj apply lora(r=2) at first(2) | last(1)")
    counter = CompileCounter()
    run: Any = untyped.compile(compiled.model, backend=counter, fullgraph=True)
    with torch.no_grad():
        made = run(tokens()).logits
    assert torch.allclose(made, ran(compiled.model, tokens()), atol=1e-6)
    assert counter.frame_count == 1


def test_an_encoder_has_places_too() -> None:
    untyped.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 44}
    config = BertConfig(vocab_size=61, num_hidden_layers=1, **cast(Any, sizes))
    model, ids = BertModel(config).eval(), tokens()
    base = model(ids).last_hidden_state
    compiled = put("match layer.* apply bottleneck(r=3) at [0]", model)
    moved_ = model(ids).last_hidden_state
    assert torch.equal(moved_[:, 1:], base[:, 1:])
    assert not torch.allclose(moved_[:, 0], base[:, 0], atol=1e-3)
    compiled.inverse.unload()
    assert torch.equal(model(ids).last_hidden_state, base)


def test_files_copies_and_pickles_have_the_places(tmp_path: Path) -> None:
    compiled = put(
        "match q_proj apply lora(r=2) at after(7, 9) | [0]\n"
        + ON_CALLS.format("steering()", "last(1)")
    )
    ids = tokens()
    expected = ran(compiled.model, ids)
    for twin in (copy.deepcopy(compiled.model), pickle.loads(pickle.dumps(compiled.model))):
        assert torch.equal(ran(twin, ids), expected)
    saved = compiled.save(tmp_path / "a")
    assert "tokens" in saved.peft
    fresh = language_model()
    again = surgery.attach(tmp_path / "a", fresh)
    assert torch.equal(ran(fresh, ids), expected)
    assert [s.form.places for s in again.plan.sites] == [s.form.places for s in compiled.plan.sites]
    again.activate(None)
    again.delete("default")
    assert type(fresh) is type(language_model())
    assert not any("_surgery_runs" in vars(m) for m in fresh.modules())


class Letters:
    """A tokenizer, whose ids are those of letters."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [*([1] if add_special_tokens else []), *(ord(letter) - 90 for letter in text)]


def test_a_text_has_the_ids_that_a_tokenizer_gives(tmp_path: Path) -> None:
    spec = 'match q_proj apply lora(r=2) at after("ab", 9)'
    assert surgery.check(spec) == ()
    refused("E143", lambda: surgery.compile(spec, language_model()))
    compiled = surgery.compile(spec, language_model(), tokenizer=Letters())
    assert str(compiled.plan.sites[0].form.places[0]) == "after(7, 8, 9)"
    compiled.save(tmp_path)
    again = surgery.attach(tmp_path, language_model())
    assert again.plan.sites[0].form.places == compiled.plan.sites[0].form.places


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ("match q_proj apply lora(r=2) at furst(2)", "E143"),
        ("match q_proj apply lora(r=2) at first(0)", "E143"),
        ("match q_proj apply lora(r=2) at first(1, 2)", "E143"),
        ("match q_proj apply lora(r=2) at last(0.5)", "E143"),
        ('match q_proj apply lora(r=2) at first("a text")', "E143"),
        ("match q_proj apply lora(r=2) at after(-3)", "E143"),
        ("match q_proj apply lora(r=2) at first(n)", "E101"),
    ],
)
def test_what_says_no_places_is_refused(spec: str, code: str) -> None:
    assert code in {d.code for d in surgery.check(spec)}
    refused(code, lambda: surgery.compile(spec, language_model()))


def test_a_merge_and_its_undo_leave_the_places() -> None:
    model = language_model()
    compiled = surgery.compile(
        "adapter a { match q_proj apply lora(r=2) at first(2) match v_proj apply lora(r=2) }", model
    )
    moved(compiled)
    expected = ran(model, tokens())
    compiled.inverse.merge(partial=True)
    assert torch.allclose(ran(model, tokens()), expected, atol=1e-5)
    compiled.inverse.unmerge()
    assert torch.equal(ran(model, tokens()), expected)
    compiled.inverse.unload()
    assert not any("_surgery_runs" in vars(m) for m in model.modules())


def test_a_convolution_reads_no_tokens() -> None:
    refused(
        "E305",
        lambda: surgery.compile(
            "match * apply lora(r=2) at [0]", nn.Sequential(nn.Conv1d(3, 5, 3))
        ),
    )


def test_what_is_for_some_tokens_is_in_no_weight_and_mixes_with_its_like(tmp_path: Path) -> None:
    model = language_model()
    compiled = surgery.compile(
        "adapter a { match q_proj apply lora(r=2) at first(2) }\n"
        "adapter b { match q_proj apply lora(r=2) }",
        model,
    )
    assert "some of the tokens" in str(refused("E403", compiled.inverse.merge))
    assert "different tokens" in str(refused("E309", lambda: compiled.activate("a + b")))
    refused("E482", lambda: cast(Any, model).model(tokens()))
    compiled.save(tmp_path / "a", "a")
    cast(Any, language_model()).save_pretrained(tmp_path / "b")
    refused("E403", lambda: surgery.merge_files(tmp_path / "a", tmp_path / "b", tmp_path / "c"))
