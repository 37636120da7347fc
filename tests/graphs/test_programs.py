"""Exported programs: adapted, exported again, saved and loaded, with all their names and sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, fx, nn

import surgery
from surgery.errors import SelectionError, StateError
from surgery.model.holder import under_adapters

# torch's own, when it copies how a program is called.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

library = cast(Any, transformers)
untyped = cast(Any, torch)  # for calls whose stubs are not fully typed

Train = Callable[[nn.Module], None]

LENGTH, LEAST, MOST = 7, 1, 50
SIZES: Mapping[str, Mapping[str, Any]] = {
    "BertModel": {"hidden_size": 36, "intermediate_size": 60, "num_attention_heads": 3},
    "LlamaForCausalLM": {
        "hidden_size": 24,
        "intermediate_size": 44,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "use_cache": False,
    },
}
SPECS = (
    ("BertModel", "match @query | @value in @layers[0:1] apply dora(r=2)"),
    ("BertModel", "match * except pooler.** apply lora(r=2)"),
    ("BertModel", "match @attention in layer[-1:] apply ia3() match @up apply oft(block_size=4)"),
    ("LlamaForCausalLM", "match @query | @value in layers[0:1] apply lora(r=2, alpha=4)"),
    ("LlamaForCausalLM", "match * in layers where layer == 1 apply bone(r=4)"),
    ("LlamaForCausalLM", "match @mlp apply dora(r=2) match @head apply vera(r=3)"),
)


def make(name: str, **more: object) -> Any:
    """A small model of a class of transformers, always with the same weights."""
    untyped.manual_seed(3)
    cls = getattr(library, name)
    sizes = {**SIZES[name], "vocab_size": 31, "num_hidden_layers": 2, **more}
    return cls(cls.config_class(**sizes)).eval()


@cache
def program(name: str, tied: bool = False) -> torch.export.ExportedProgram:
    """The program of such a model; its batch may vary."""
    model = make(name, tie_word_embeddings=True) if tied else make(name)
    shapes = {"input_ids": {0: torch.export.Dim("batch", min=LEAST, max=MOST)}}
    return torch.export.export(model, (), {"input_ids": tokens()}, dynamic_shapes=shapes)


def tokens(batch: int = 2) -> Tensor:
    return torch.arange(batch * LENGTH).reshape(batch, LENGTH) % 31


def run(model: Any, batch: int = 2) -> Tensor:
    given = model(input_ids=tokens(batch))
    return given.logits if hasattr(given, "logits") else given.last_hidden_state


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-5, atol=2e-6)


def paths(compiled: surgery.Compiled) -> list[str]:
    return sorted(site.path for site in compiled.plan.sites)


@pytest.mark.parametrize(("name", "spec"), SPECS)
def test_a_program_and_its_graph_compute_what_modules_compute(
    name: str, spec: str, train: Train
) -> None:
    modules = surgery.compile(spec, make(name))
    graph = copy.deepcopy(program(name)).module()
    assert isinstance(graph, fx.GraphModule)
    base = run(graph)
    train(modules.model)
    wanted = run(modules.model)
    assert not torch.allclose(wanted, base, atol=1e-3)
    for form in (program(name), graph):
        whole = surgery.compile(spec, form)
        assert paths(modules) == paths(whole)
        train(whole.model)
        close(run(whole.model), wanted)
        whole.inverse.merge()
        close(run(whole.model), wanted)
        whole.inverse.unmerge()
        close(run(whole.model), wanted)
        whole.inverse.unload()
        assert torch.equal(run(whole.model), base)


@pytest.mark.parametrize("name", SIZES)
def test_an_adapted_program_is_exported_saved_and_loaded(
    name: str, train: Train, tmp_path: Path
) -> None:
    compiled = surgery.compile("match * in @layers[*] apply lora(r=2)", program(name))
    train(compiled.model)
    wanted = run(compiled.model)
    torch.export.save(compiled.export(), tmp_path / "adapted.pt2")
    loaded = torch.export.load(tmp_path / "adapted.pt2")
    close(run(loaded.module()), wanted)
    close(run(loaded.module(), 5)[:2], wanted)
    with pytest.raises(AssertionError, match="Guard failed"):
        run(loaded.module(), MOST + 1)
    own = {n for n, _ in compiled.model.named_parameters()}
    before = program(name).state_dict.keys()
    assert own <= loaded.state_dict.keys() == {*before, *own}
    assert {n for n in loaded.state_dict if not under_adapters(n)} == {*before}
    compiled.inverse.merge()
    merged = compiled.inverse.unload(keep_merge=True)
    close(run(merged), wanted)
    with pytest.raises(StateError, match="E418"):
        surgery.compile("match * apply lora(r=2)", loaded)


def test_a_program_that_is_adapted_stays_what_it_was(train: Train) -> None:
    one = program("BertModel")
    before = {name: (t, t.requires_grad, t.detach().clone()) for name, t in one.state_dict.items()}
    nodes = [(n.op, n.name) for n in one.graph.nodes]
    compiled = surgery.compile("match query apply lora(r=2)", one)
    train(compiled.model)
    compiled.inverse.merge()
    for name, tensor in one.state_dict.items():
        known, flag, value = before[name]
        assert tensor is known
        assert tensor.requires_grad is flag
        assert torch.equal(tensor, value)
    assert [(n.op, n.name) for n in one.graph.nodes] == nodes


@pytest.mark.parametrize("spec", ["lm_head apply lora(r=2) share", "lm_head apply lora(r=2) untie"])
def test_tied_weights_of_a_program_are_those_of_the_model(spec: str, train: Train) -> None:
    whole = surgery.compile(f"match {spec}", program("LlamaForCausalLM", tied=True))
    modules = surgery.compile(f"match {spec}", make("LlamaForCausalLM", tie_word_embeddings=True))
    plain = program("LlamaForCausalLM", tied=True).module()
    base = run(plain)
    for compiled in (modules, whole):
        train(compiled.model)
    wanted = run(modules.model)
    assert not torch.allclose(wanted, base, atol=1e-3)
    close(run(whole.model), wanted)
    whole.inverse.merge()
    close(run(whole.model), wanted)
    kept = copy.deepcopy(whole.model)
    close(run(surgery.of(kept).inverse.unload(keep_merge=True)), wanted)
    model = whole.inverse.unload()
    assert torch.equal(run(model), base)
    assert cast(fx.GraphModule, model).code == plain.code


def test_a_tie_is_refused_until_the_spec_says_what_it_wants() -> None:
    with pytest.raises(SelectionError, match="E207"):
        surgery.plan("match embed_tokens apply lora(r=2)", program("LlamaForCausalLM", tied=True))


def test_a_chain_and_a_second_adapter_on_a_program(train: Train) -> None:
    first, second = (
        "match @query apply ia3() then lora(r=2)",
        "adapter b { match @mlp apply dora() }",
    )
    compiled = [surgery.compile(first, m) for m in (make("BertModel"), program("BertModel"))]
    for one in compiled:
        surgery.compile(second, one.model)
        train(one.model)
        assert all(site.form.mode == "call" for site in one.plan.sites)
    for live in ("default", "b", "0.5*default + b", None):
        for one in compiled:
            one.activate(live)
        close(run(compiled[1].model), run(compiled[0].model))


def test_an_adapter_of_modules_goes_on_a_program_rows_included(
    train: Train, tmp_path: Path
) -> None:
    config = library.GPT2Config(
        n_embd=12, n_head=2, n_layer=2, n_positions=17, vocab_size=31, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = library.GPT2LMHeadModel(config).eval()
    whole = torch.export.export(model, (), {"input_ids": tokens()})
    compiled = surgery.compile("match @query apply lora(r=2)", model)
    train(model)
    compiled.save(tmp_path)
    attached = surgery.attach(tmp_path, whole)
    assert paths(attached) == [f"transformer.h.{i}.attn.c_attn.query" for i in range(2)]
    close(run(attached.model), run(model))
    attached.inverse.merge()
    close(run(attached.model), run(model))


def test_adapters_are_wider_than_a_narrow_base(train: Train) -> None:
    model = make("BertModel", num_hidden_layers=1).bfloat16()
    whole = torch.export.export(model, (), {"input_ids": tokens()})
    compiled = [surgery.compile("match @attention apply lora(r=2)", m) for m in (model, whole)]
    for one in compiled:
        train(one.model)
        assert {t.dtype for t in one.parameters().values()} == {torch.float32}
    assert torch.equal(run(compiled[1].model), run(compiled[0].model))
    exported = compiled[1].export().module()
    assert torch.equal(run(exported), run(compiled[0].model))


def test_example_inputs_are_asked_for_where_there_are_none() -> None:
    model = make("BertModel", num_hidden_layers=1)
    without = torch.export.export(model, (), {"input_ids": tokens()})
    without.example_inputs = None
    compiled = surgery.compile("match query apply lora(r=2)", without)
    with pytest.raises(StateError, match="E419"):
        compiled.export()
    again = compiled.export((), {"input_ids": tokens()})
    close(run(again.module()), run(compiled.model))
