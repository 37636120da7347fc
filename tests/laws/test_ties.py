"""A weight that several layers share: the spec says what becomes of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support import Held, moved
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import surgery

untyped = cast(Any, torch)

METHODS = ("lora(r=5)", "dora(r=5)", "bone(r=5)", "miss(r=5)", "ia3()", "vera(r=5)")


def llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=30,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=37,
        tie_word_embeddings=True,
    )
    return cast(nn.Module, LlamaForCausalLM(config))


def gpt2() -> nn.Module:
    config = GPT2Config(
        n_embd=24, n_layer=1, n_head=4, vocab_size=37, bos_token_id=0, eos_token_id=0
    )
    return cast(nn.Module, GPT2LMHeadModel(config))


Make = Callable[[], nn.Module]
EMBEDDING = {llama: "embed_tokens", gpt2: "wte"}
every_model = pytest.mark.parametrize("make", [llama, gpt2])
every_method = pytest.mark.parametrize("method", METHODS)


def built(make: Make) -> nn.Module:
    untyped.manual_seed(3)
    return make().eval()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])).logits


def weights(model: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """The head's and the embedding's, as they are registered."""
    some = cast(Any, model)
    head, table = some.get_output_embeddings(), some.get_input_embeddings()
    return parameters_of(head)["weight"], parameters_of(table)["weight"]


def parameters_of(module: object) -> dict[str, nn.Parameter]:
    return cast("dict[str, nn.Parameter]", vars(module)["_parameters"])


def everything(model: nn.Module) -> tuple[object, ...]:
    named = model.state_dict(keep_vars=True).items()
    tensors = [(n, Held(t), t.requires_grad, t.detach().numpy().tobytes()) for n, t in named]
    attributes = [sorted(vars(m)) for m in model.modules()]
    return tensors, attributes, cast(Any, model).config.tie_word_embeddings


@every_model
@pytest.mark.parametrize("site", ["head", "embedding"])
def test_silence_is_refused_with_both_remedies(make: Make, site: str) -> None:
    model = built(make)
    before = everything(model)
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.compile(f"match @{site} apply lora()", model)
    found = caught.value.diagnostics[0]
    assert found.code == "E207"
    assert "`share`" in found.hint
    assert "`untie`" in found.hint
    assert everything(model) == before


@every_model
@every_method
@pytest.mark.parametrize("tie", ["share", "untie"])
@pytest.mark.parametrize("site", ["lm_head", "embedding"])
def test_the_merged_model_saved_and_loaded_again_is_the_adapted_one(
    make: Make, method: str, tie: str, site: str, tmp_path: Path
) -> None:
    model = built(make)
    before, at_first = everything(model), outputs(model)
    selected = site if site == "lm_head" else EMBEDDING[cast(Any, make)]
    compiled = surgery.compile(f"match {selected} apply {method} {tie}", model)
    torch.testing.assert_close(outputs(model), at_first, rtol=0, atol=1e-5)
    moved(compiled)
    adapted = outputs(model)
    assert (adapted - at_first).abs().max() > 1e-2

    for other in (copy.deepcopy(model), cast(nn.Module, pickle.loads(pickle.dumps(model)))):
        assert torch.equal(outputs(other), adapted)
    compiled.save(tmp_path / "adapter")
    other = built(make)
    surgery.attach(tmp_path / "adapter", other)
    assert torch.equal(outputs(other), adapted)

    compiled.inverse.merge()
    head, table = weights(model)
    assert (head is table) is (tie == "share")
    torch.testing.assert_close(outputs(model), adapted, rtol=1e-5, atol=1e-5)
    plain = surgery.of(copy.deepcopy(model)).inverse.unload(keep_merge=True)
    cast(Any, plain).save_pretrained(tmp_path / "merged")
    loaded = cast(Any, type(model)).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(outputs(loaded), adapted, rtol=1e-5, atol=1e-5)

    compiled.inverse.unmerge()
    assert torch.equal(outputs(model), adapted)
    compiled.inverse.unload()
    assert everything(model) == before
    assert torch.equal(outputs(model), at_first)


@every_model
def test_a_shared_change_is_one_change_of_one_matrix(make: Make) -> None:
    """The adapted outputs are those of a base whose one tensor is W'."""
    model, reference = built(make), built(make)
    compiled = surgery.compile("match lm_head apply lora(r=3) share", model)
    moved(compiled)
    found = {name.rpartition(".")[2]: value for name, value in compiled.parameters().items()}
    with torch.no_grad():
        weights(reference)[0].add_(found["B"] @ found["A"])
    torch.testing.assert_close(outputs(model), outputs(reference), rtol=1e-5, atol=1e-5)
    loss = cast(Any, model)(torch.tensor([[1, 2, 3]])).logits.square().sum()
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained)


@every_model
def test_an_untied_change_is_at_one_place(make: Make) -> None:
    model, reference = built(make), built(make)
    compiled = surgery.compile("match lm_head apply lora(r=3) untie", model)
    moved(compiled)
    found = {name.rpartition(".")[2]: value for name, value in compiled.parameters().items()}
    head = cast(Any, reference).get_output_embeddings()
    with torch.no_grad():
        head.weight = nn.Parameter(head.weight + found["B"] @ found["A"])
    torch.testing.assert_close(outputs(model), outputs(reference), rtol=1e-5, atol=1e-5)


def test_each_of_the_ties_may_be_untied() -> None:
    model = built(llama)
    before = everything(model)
    compiled = surgery.compile("match {lm_head,embed_tokens} apply lora(r=3) untie", model)
    moved(compiled)
    adapted = outputs(model)
    compiled.inverse.merge(undo="algebraic")
    head, table = weights(model)
    assert head is not table
    torch.testing.assert_close(outputs(model), adapted, rtol=1e-5, atol=1e-5)
    compiled.inverse.unmerge()
    compiled.inverse.unload()
    assert everything(model)[2] == before[2]


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ("match q_proj apply lora() untie", "E216"),
        ("match {lm_head,embed_tokens} apply lora() share", "E302"),
        ("match lm_head apply lora() share match embed_tokens apply ia3() untie", "E302"),
        ("match lm_head apply lora(dropout=0.1) share", "E305"),
    ],
)
def test_what_contradicts_itself_is_refused(spec: str, code: str) -> None:
    model = built(llama)
    before = everything(model)
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.compile(spec, model)
    assert [d.code for d in caught.value.diagnostics] == [code]
    assert everything(model) == before


def test_nothing_that_is_optional_contradicts_nothing() -> None:
    plan = surgery.plan("optional match nothing apply lora() untie", built(llama))
    assert plan.sites == ()


def test_the_base_alone_and_another_adapter_leave_the_other_layer_alone() -> None:
    model = built(llama)
    at_first = outputs(model)
    compiled = surgery.compile(
        "adapter a { match lm_head apply lora(r=3) share } adapter b { match q_proj apply ia3() }",
        model,
    )
    for name in ("a", "b"):
        with torch.no_grad():
            for value in compiled.parameters(name).values():
                value.add_(0.3)
    first = outputs(model)
    compiled.activate("b")
    second = outputs(model)
    compiled.activate(None)
    assert torch.equal(outputs(model), at_first)
    assert not torch.equal(first, second)
    compiled.activate("a")
    assert torch.equal(outputs(model), first)


def test_the_plan_says_what_becomes_of_the_weight() -> None:
    model = built(llama)
    assert "change with it" in str(surgery.plan("match lm_head apply lora() share", model))
    plan = surgery.plan("match lm_head apply lora() untie", model)
    assert "weight of its own" in str(plan)
    assert "is built whenever" not in str(plan)


class Twice(nn.Module):
    """Two layers with one weight, and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("method", ["ia3()", "lora(r=2)", "dora(r=2)"])
def test_a_bias_is_each_layers_own(method: str) -> None:
    untyped.manual_seed(3)
    model, x = Twice(), torch.randn(7, 5)
    at_first, bias = model(x).detach(), model.second.bias.detach().clone()
    compiled = surgery.compile(f"match first apply {method} share", model)
    moved(compiled)
    adapted = model(x).detach()
    assert torch.equal(model.second.bias, bias)
    compiled.inverse.merge()
    torch.testing.assert_close(model(x), adapted, rtol=1e-5, atol=1e-5)
    assert model.first.weight is model.second.weight
    compiled.inverse.unload()
    assert torch.equal(model(x), at_first)


def test_a_weight_that_is_made_of_a_bias_is_not_shared() -> None:
    method = "method m() on matrix { train t[out] = 0 W' = (t + b) * rows(W) }"
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.compile(f"{method} match first apply m() share", Twice())
    assert [d.code for d in caught.value.diagnostics] == ["E305"]
