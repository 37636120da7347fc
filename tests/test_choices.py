"""What a thread has live, what each sample of a batch has, and what is computed once."""

from __future__ import annotations

import copy
import gc
import linecache
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import language_model
from support import moved
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from transformers import T5Config, T5ForConditionalGeneration

import surgery
from surgery import switching
from surgery.coding import code_of
from surgery.errors import SurgeryError
from surgery.model.holder import modules_of
from surgery.mount import is_mounted
from surgery.mounted import runs_of
from surgery.state import require_state

untyped: Any = torch

CALLS = {
    "a": "lora(r=3)",
    "b": "dora(r=2)",
    "c": "oft(block_size=4)",
    "d": "ia3()",
    "e": "bone(r=4)",
    "f": "lora(r=5, alpha=2)",
    "g": "vera(r=3)",
    "h": "loha(r=2)",
    "i": "hra(r=2)",
    "j": "dora(r=3, alpha=7)",
}
MIX, TURN = "0.7*a + 0.3*b", "a then e"
LIVE: list[str | None] = [*CALLS, None, MIX, TURN]
TOKENS = (torch.arange(12) * 7 % 61).view(4, 3)


def llama() -> nn.Module:
    return language_model()


def ten(model: nn.Module) -> surgery.Compiled:
    """Ten adapters of eight methods, on different sites."""
    compiled = None
    for name, call in CALLS.items():
        where = "q_proj | o_proj | up_proj" if name in "abe" else "v_proj | up_proj"
        compiled = surgery.compile(f"adapter {name} {{ match {where} apply {call} }}", model)
        moved(compiled, name)
    assert compiled is not None
    return compiled


@pytest.fixture(scope="module")
def adapted() -> surgery.Compiled:
    return ten(llama())


def logits(compiled: surgery.Compiled, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return cast(Any, compiled.model)(tokens).logits


def alone(compiled: surgery.Compiled, live: str | None, tokens: Tensor = TOKENS) -> Tensor:
    with compiled.using(live):
        return logits(compiled, tokens)


def refused(code: str, call: Callable[[], object]) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        call()
    assert code in {d.code for d in caught.value.diagnostics}
    return caught.value


# ---------------------------------------------------------------------------- default and thread


@pytest.mark.parametrize("name", CALLS)
def test_each_of_ten_is_what_it_is_alone(adapted: surgery.Compiled, name: str) -> None:
    where = "q_proj | o_proj | up_proj" if name in "abe" else "v_proj | up_proj"
    spec = f"adapter {name} {{ match {where} apply {CALLS[name]} }}"
    other = surgery.compile(spec, llama())
    moved(other, name)
    wanted = logits(other)
    adapted.activate(name)
    assert torch.equal(logits(adapted), wanted)
    adapted.activate(None)
    assert torch.equal(alone(adapted, name), wanted)


def test_a_switch_changes_no_module(adapted: surgery.Compiled) -> None:
    for live in LIVE:
        adapted.activate(live)
    before = {path: type(module) for path, module in modules_of(adapted.model)}
    tables = {p: copy.copy(vars(m).get("_surgery_runs")) for p, m in modules_of(adapted.model)}
    for live in LIVE:
        adapted.activate(live)
        assert {path: type(module) for path, module in modules_of(adapted.model)} == before
    after = {p: vars(m).get("_surgery_runs") for p, m in modules_of(adapted.model)}
    for path, table in tables.items():
        now = after[path]
        assert (table is None) == (now is None)
        if table is not None and now is not None:
            assert table.forwards.keys() == now.forwards.keys()


def test_a_choice_ends_with_its_block_and_is_the_threads_own(adapted: surgery.Compiled) -> None:
    wanted = {live: alone(adapted, live) for live in ("a", "b", None)}
    adapted.activate("a")
    with adapted.using("b"):
        assert torch.equal(logits(adapted), wanted["b"])
        with adapted.using(None):
            assert torch.equal(logits(adapted), wanted[None])
        assert torch.equal(logits(adapted), wanted["b"])
        with ThreadPoolExecutor(1) as pool:  # as a streamer's thread: the default
            assert torch.equal(pool.submit(logits, adapted).result(), wanted["a"])
    assert torch.equal(logits(adapted), wanted["a"])
    with pytest.raises(ZeroDivisionError), adapted.using("b"):
        raise ZeroDivisionError
    assert torch.equal(logits(adapted), wanted["a"])
    adapted.activate(None)


def test_sixteen_threads_do_not_disturb_each_other(adapted: surgery.Compiled) -> None:
    wanted = {live: alone(adapted, live) for live in LIVE}
    route = [*LIVE[:4]]

    def work(number: int) -> bool:
        same = True
        for step in range(100):
            live = LIVE[(number * 7 + step) % len(LIVE)]
            if (number + step) % 10 == 0:
                with adapted.route(route):
                    rows = logits(adapted)
                found = zip(rows, route, range(4), strict=True)
                same &= all(torch.allclose(r, wanted[n][i], atol=1e-5) for r, n, i in found)
            else:
                same &= torch.equal(alone(adapted, live), wanted[live])
        return same

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(16)))


@settings(max_examples=25)
@given(data=st.data())
def test_a_routed_batch_is_its_samples_alone(
    adapted: surgery.Compiled, data: st.DataObject
) -> None:
    samples = data.draw(st.lists(st.sampled_from(LIVE), min_size=1, max_size=7))
    tokens = (torch.arange(len(samples) * 5) * 11 % 61).view(len(samples), 5)
    with adapted.route(samples):
        found = logits(adapted, tokens)
    for row, live, own in zip(found, samples, tokens, strict=True):
        assert torch.allclose(row, alone(adapted, live, own[None])[0], atol=1e-5)


GENERATE: dict[str, Any] = {
    "max_new_tokens": 6,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
}


@pytest.mark.parametrize(
    "given_", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str
)
def test_generation_follows_a_route(adapted: surgery.Compiled, given_: dict[str, Any]) -> None:
    route: list[str | None] = ["a", None, MIX, "c"]
    model, each = cast(Any, adapted.model), given_.get("num_return_sequences", 1)
    with adapted.route(route):
        found = model.generate(TOKENS, **GENERATE, **given_)
        again = logits(adapted)  # a batch as it was, whatever beams there were
    for index, live in enumerate(route):
        with adapted.using(live):
            own = model.generate(TOKENS[index : index + 1], **GENERATE, **given_)
        assert torch.equal(own, found[index * each : (index + 1) * each])
        assert torch.allclose(again[index], alone(adapted, live)[index], atol=1e-5)


def test_eight_adapters_generate_in_a_batch_of_32(adapted: surgery.Compiled) -> None:
    names = [*CALLS][:8]
    route = [names[number * 5 % 8] for number in range(32)]
    tokens = (torch.arange(32 * 4) * 11 % 61).view(32, 4)
    asked: dict[str, Any] = {**GENERATE, "max_new_tokens": 20}
    asked |= {"output_logits": True, "return_dict_in_generate": True}
    model = cast(Any, adapted.model)
    with adapted.route(route):
        found = model.generate(tokens, **asked)
    assert found.sequences.shape == (32, 24)
    for index, live in enumerate(route):
        with adapted.using(live):
            own = model.generate(tokens[index : index + 1], **asked)
        assert torch.equal(own.sequences[0], found.sequences[index])
        for one, every in zip(own.logits, found.logits, strict=True):
            assert torch.allclose(one[0], every[index], atol=1e-5)


def test_an_encoder_runs_before_beams_and_a_decoder_after() -> None:
    untyped.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 24, "d_kv": 12, "d_ff": 44, "num_layers": 2, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=61, **sizes)).eval()
    compiled = surgery.compile("adapter a { match q | wo apply lora(r=3) }", model)
    compiled = surgery.compile("adapter b { match v | wi apply dora(r=3) }", model)
    moved(compiled, "a")
    moved(compiled, "b")
    given_ = {**GENERATE, "num_beams": 3, "decoder_start_token_id": 0}
    route = ["b", "a", None, "b"]
    with compiled.route(route):
        found = cast(Any, model).generate(TOKENS, **given_)
    for index, live in enumerate(route):
        with compiled.using(live):
            own = cast(Any, model).generate(TOKENS[index : index + 1], **given_)
        assert torch.equal(own[0], found[index])


def test_gradients_of_a_route_are_those_of_its_samples(adapted: surgery.Compiled) -> None:
    route = ["a", "b", "a", None]
    trained = [p for p in adapted.model.parameters() if p.requires_grad]

    def gradients(run: Callable[[], Tensor]) -> list[Tensor | None]:
        for parameter in trained:
            parameter.grad = None
        untyped.autograd.backward(run())
        return [None if p.grad is None else p.grad.clone() for p in trained]

    def routed() -> Tensor:
        with adapted.route(route):
            return cast(Any, adapted.model)(TOKENS).logits.square().sum()

    def singly() -> Tensor:
        total = torch.zeros(())
        for live, tokens in zip(route, TOKENS, strict=True):
            with adapted.using(live):
                total = total + cast(Any, adapted.model)(tokens[None]).logits.square().sum()
        return total

    for one, other in zip(gradients(routed), gradients(singly), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_routed_is_refused_by_name(adapted: surgery.Compiled) -> None:
    def run(samples: Any, tokens: Tensor = TOKENS) -> Tensor:
        with adapted.route(samples):
            return logits(adapted, tokens)

    assert "model.layers.0.self_attn.q_proj" in str(refused("E436", lambda: run(["a", "b"])))
    refused("E436", lambda: run(["a"] * 2 + [None] * 6))
    refused("E434", lambda: run([]))
    refused("E411", lambda: run(["a", "nobody", "b", None]))
    adapted.activate("a")
    with adapted.route(["a", None]):
        refused("E446", adapted.inverse.merge)
        refused("E446", adapted.inverse.unload)
    adapted.activate(None)
    net = nn.TransformerEncoderLayer(12, 2, batch_first=True)
    inside = surgery.compile("match self_attn.* apply lora(r=2)", net)
    assert "self_attn" in str(refused("E435", lambda: inside.route(["default", None]).__enter__()))


# -------------------------------------------------------------------------------- torch.compile


def test_no_switch_breaks_a_compiled_graph(adapted: surgery.Compiled) -> None:
    for live in LIVE:
        adapted.activate(live)  # prepared, as a server does before it is warm
    counter = CompileCounter()
    untyped._dynamo.reset()
    run: Any = untyped.compile(cast(Any, adapted.model), backend=counter, fullgraph=True)
    chosen = ("a", "b", "c", None, MIX)
    for _ in range(2):
        for live in chosen:
            adapted.activate(live)
            with torch.no_grad():
                assert torch.allclose(run(TOKENS).logits, logits(adapted), atol=1e-6)
    assert counter.frame_count == len(chosen)
    with torch.no_grad(), adapted.using("b"):
        run(TOKENS)
    assert counter.frame_count <= len(chosen) + 1  # a choice of a thread is looked up elsewhere
    adapted.activate(None)


# --------------------------------------------------------------------- adapters that come and go


def test_an_adapter_is_deleted_and_the_others_stay() -> None:
    compiled = ten(llama())
    wanted = {live: alone(compiled, live) for live in LIVE}
    names = {"a", "c", "g"}
    compiled.activate("b")
    for name in names:
        compiled.delete(name)
        refused("E411", lambda name=name: compiled.activate(name))
    assert set(compiled.adapters) == CALLS.keys() - names
    for live in (*compiled.adapters, None):
        assert torch.equal(alone(compiled, live), wanted[live])
    state = {key for key in compiled.model.state_dict() if ".surgery." in key}
    assert not any(f".{name}." in key for key in state for name in names)
    assert {site.adapter for site in compiled.plan.sites} == set(compiled.adapters)
    refused("E442", lambda: compiled.delete("b"))
    compiled.inverse.unload()
    assert not any(is_mounted(module) for _, module in modules_of(compiled.model))


def test_a_name_changes_and_nothing_else(tmp_path: Path) -> None:
    compiled = ten(llama())
    wanted = {live: alone(compiled, live) for live in LIVE}
    held = {id(tensor) for tensor in compiled.model.parameters()}
    compiled.activate("0.7*a + 0.3*g")
    before = logits(compiled)
    compiled.rename("a", "zeta")
    compiled.rename("g", "eta")
    assert compiled.live == "0.7*zeta + 0.3*eta"
    assert torch.equal(logits(compiled), before)
    assert torch.equal(alone(compiled, "zeta"), wanted["a"])
    assert torch.equal(alone(compiled, "eta"), wanted["g"])
    assert {id(tensor) for tensor in compiled.model.parameters()} == held
    compiled.save(tmp_path / "eta", "eta")
    other = surgery.attach(tmp_path / "eta", llama())
    assert other.adapters == ("eta",)
    assert torch.equal(logits(other), wanted["g"])
    refused("E412", lambda: compiled.rename("zeta", "b"))
    refused("E443", lambda: compiled.rename("zeta", "b.c"))
    refused("E443", lambda: compiled.rename("zeta", "half"))  # a method of every module
    refused(
        "E443", lambda: surgery.compile("adapter half { match q_proj apply ia3() }", compiled.model)
    )
    refused("E411", lambda: compiled.rename("a", "b2"))


@pytest.mark.parametrize("name", CALLS)
def test_weights_are_swapped_in_place(name: str, tmp_path: Path) -> None:
    spec = f"adapter {name} {{ match q_proj | v_proj apply {CALLS[name]} }}"
    one, other = surgery.compile(spec, llama()), surgery.compile(spec, llama(), seed=1)
    moved(other, name)
    moved(other, name)
    other.save(tmp_path / name)
    one.activate(name)
    logits(one)
    held = {key: id(tensor) for key, tensor in one.model.named_parameters()}
    one.hotswap(name, tmp_path / name)
    assert torch.equal(logits(one), logits(other))
    assert {key: id(tensor) for key, tensor in one.model.named_parameters()} == held
    one.inverse.merge()
    refused("E402", lambda: one.hotswap(name, tmp_path / name))


def test_weights_of_another_adapter_change_nothing(tmp_path: Path) -> None:
    one = surgery.compile("match q_proj apply lora(r=3)", llama())
    moved(one)
    before = logits(one)
    for number, spec in enumerate(
        ("match q_proj apply lora(r=4)", "match v_proj apply lora(r=3)", "match q_proj apply ia3()")
    ):
        surgery.compile(spec, llama()).save(tmp_path / str(number))
        refused("E439", lambda number=number: one.hotswap("default", tmp_path / str(number)))
    tensors = {key: torch.zeros_like(value) for key, value in one.parameters().items()}
    first, second, *_ = sorted(tensors)
    wrong = {**tensors, first: torch.zeros(2, 2), f"{second}x": torch.zeros(1)}
    del wrong[second]
    assert len(refused("E438", lambda: one.hotswap("default", wrong)).diagnostics) == 3
    assert torch.equal(logits(one), before)
    one.hotswap("default", tensors)
    assert not torch.equal(logits(one), before)


def test_a_folder_attaches_under_a_name_of_the_callers(tmp_path: Path) -> None:
    compiled = ten(llama())
    for name in CALLS:
        compiled.save(tmp_path / name, name)
        surgery.attach(tmp_path / name, compiled.model, name=f"{name}_2")
        assert torch.equal(alone(compiled, f"{name}_2"), alone(compiled, name))
    refused("E412", lambda: surgery.attach(tmp_path / "a", compiled.model, name="b"))
    refused("E443", lambda: surgery.attach(tmp_path / "a", compiled.model, name="b-c"))


# ------------------------------------------------------------------------------------- frozen


def test_frozen_computes_the_same_from_parameters_as_they_were() -> None:
    compiled = ten(llama())
    wanted = {live: alone(compiled, live) for live in LIVE}
    route: list[str | None] = ["b", "c", None, MIX]
    with compiled.route(route):
        routed = logits(compiled)
    with compiled.frozen():
        for live in LIVE:
            assert torch.equal(alone(compiled, live), wanted[live])
        with compiled.route(route):
            assert torch.equal(logits(compiled), routed)
        tensors = {key: value + 1 for key, value in compiled.parameters("c").items()}
        for value in compiled.parameters("c").values():
            value.add_(1)  # as a fused optimizer does: nobody sees it
        assert torch.equal(alone(compiled, "c"), wanted["c"])
        compiled.hotswap("c", tensors)
        swapped = alone(compiled, "c")
        assert not torch.equal(swapped, wanted["c"])
    assert torch.equal(alone(compiled, "c"), swapped)


def test_frozen_is_for_inference() -> None:
    compiled = ten(llama())
    compiled.activate("c")
    compiled.freeze()
    refused("E440", lambda: cast(Any, compiled.model)(TOKENS))
    refused("E441", lambda: compiled.model.train())
    assert not any(module.training for _, module in modules_of(compiled.model))
    compiled.model.eval()
    copied = copy.deepcopy(compiled.model)
    copied.train()  # a copy is not frozen
    assert torch.equal(logits(compiled), logits(surgery.of(copied.eval())))
    compiled.thaw()
    compiled.model.train()
    refused("E441", compiled.freeze)
    untyped.autograd.backward(cast(Any, compiled.model)(TOKENS).logits.sum())
    compiled.model.eval()
    compiled.freeze()
    model = compiled.inverse.unload()
    assert "train" not in vars(model)
    assert model.train().training


def test_frozen_under_compile_has_no_rotation_in_the_graph(adapted: surgery.Compiled) -> None:
    counter = CompileCounter()
    adapted.activate("c")
    counts: list[int] = []
    for frozen in (False, True):
        untyped._dynamo.reset()
        counter.clear()
        run: Any = untyped.compile(cast(Any, adapted.model), backend=counter, fullgraph=True)
        if frozen:
            adapted.freeze()
        with torch.no_grad():
            assert torch.allclose(run(TOKENS).logits, logits(adapted), atol=1e-6)
        counts.append(counter.op_count)
    adapted.thaw()
    adapted.activate(None)
    assert counts[1] < counts[0]


# ---------------------------------------------------------------------------- copies, checkpoints


def test_copies_and_pickles_have_choices_of_their_own(adapted: surgery.Compiled) -> None:
    wanted = {live: alone(adapted, live) for live in LIVE}
    adapted.activate("b")
    for model in (copy.deepcopy(adapted.model), pickle.loads(pickle.dumps(adapted.model))):
        other = surgery.of(model)
        assert torch.equal(logits(other), wanted["b"])
        other.activate("a")
        with adapted.using("c"):
            assert torch.equal(logits(other), wanted["a"])
        assert torch.equal(alone(other, MIX), wanted[MIX])
        assert torch.equal(logits(adapted), wanted["b"])
    adapted.activate(None)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_repeats_its_choice(
    adapted: surgery.Compiled, reentrant: bool
) -> None:
    layer = adapted.model.get_submodule("model.layers.0.self_attn.q_proj")
    checkpoint = cast(Any, import_module("torch.utils.checkpoint")).checkpoint
    own = [p for n, p in adapted.model.named_parameters() if "0.self_attn.q_proj.surgery.a" in n]

    def again(x: Tensor) -> Tensor:
        return checkpoint(surgery.repeating(layer), x, use_reentrant=reentrant)

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(5)).requires_grad_()
        for parameter in own:
            parameter.grad = None
        with adapted.using("a"):
            total = run(x).square().sum()
        with adapted.using("b"):  # whatever is live when the gradients are asked for
            untyped.autograd.backward(total)
        return [x.grad, *(p.grad for p in own)]

    for one, other in zip(gradients(layer), gradients(again), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_a_graph_runs_one_choice_for_all() -> None:
    net = nn.Sequential(nn.Linear(5, 7))
    compiled = surgery.compile("match * apply lora(r=2)", net, mode="graph")
    refused("E433", lambda: compiled.using(None).__enter__())
    refused("E433", lambda: compiled.route([None]).__enter__())


# ------------------------------------------------------------------------ ever new mixtures


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three mixtures are kept, so that others are withdrawn soon."""
    monkeypatch.setattr(switching, "MIXTURES", 3)


def three_layers() -> surgery.Compiled:
    """One has both adapters, and the others one each."""
    untyped.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3), nn.Linear(3, 2)).eval()
    surgery.compile("adapter a { match 0 | 2 apply lora(r=2) }", net)
    compiled = surgery.compile("adapter b { match 0 apply dora(r=3) match 3 apply ia3() }", net)
    for name in compiled.adapters:
        moved(compiled, name)
    return compiled


def mix(number: int) -> str:
    return f"0.{number}7*a + 0.{number}3*b"


ROWS = torch.linspace(-1, 1, 20).view(4, 5)


def output(compiled: surgery.Compiled, live: str | None) -> Tensor:
    with torch.no_grad(), compiled.using(live):
        return cast(Any, compiled.model)(ROWS)


def churn(compiled: surgery.Compiled, first: int = 100, count: int = 5) -> None:
    """Many others are used, each of them once."""
    for number in range(first, first + count):
        with compiled.using(mix(number)):
            pass


def prepared(compiled: surgery.Compiled) -> set[str]:
    return set(require_state(compiled.model).switch.prepared)


@pytest.mark.usefixtures("few")
def test_tables_stay_as_large_as_what_is_kept() -> None:
    compiled = three_layers()
    compiled.activate("a")
    wanted = {live: output(compiled, live) for live in ("a", "b", None, mix(1))}
    classes = [type(module) for module in compiled.model.modules()]
    churn(compiled, count=12)
    assert prepared(compiled) == {"none", "a", "b", mix(109), mix(110), mix(111)}
    for module in (m for m in compiled.model.modules() if is_mounted(m)):
        runs = runs_of(module)
        assert runs is not None
        tables = (runs.keys, runs.forwards, *runs.values.values())
        assert all(table.keys() <= prepared(compiled) for table in tables)
    with compiled.using(mix(109)):  # used again, so it is not the next to go
        churn(compiled, 200, 2)
    assert mix(109) in prepared(compiled)
    assert mix(110) not in prepared(compiled)
    for live, tensor in wanted.items():
        assert torch.equal(output(compiled, live), tensor)
    assert [type(module) for module in compiled.model.modules()] == classes


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_in_use_stays(frozen: bool) -> None:
    compiled = three_layers()
    wanted = {number: output(compiled, mix(number)) for number in range(1, 7)}
    compiled.activate(mix(1))
    if frozen:
        compiled.freeze()
    with compiled.route([mix(2), mix(3), mix(4), mix(5)]), ThreadPoolExecutor(1) as pool:
        pool.submit(churn, compiled).result()
        with torch.no_grad():
            rows = cast(Any, compiled.model)(ROWS)
        for index, number in enumerate(range(2, 6)):
            assert torch.allclose(rows[index], wanted[number][index], atol=1e-6)
        with compiled.using(mix(6)):
            pool.submit(churn, compiled, 200).result()
            with torch.no_grad():
                assert torch.equal(cast(Any, compiled.model)(ROWS), wanted[6])
                assert torch.equal(pool.submit(output, compiled, mix(1)).result(), wanted[1])
    churn(compiled, 300)
    assert {mix(number) for number in range(1, 7)} & prepared(compiled) == {mix(1)}
    with torch.no_grad():
        assert torch.equal(cast(Any, compiled.model)(ROWS), wanted[1])
    compiled.activate(None)
    churn(compiled, 400, 2)  # a thread may be in the midst of what was the default until now
    assert mix(1) in prepared(compiled)
    churn(compiled, 500, 1)
    assert mix(1) not in prepared(compiled)


@pytest.mark.usefixtures("few")
def test_a_layer_whose_last_mixture_goes_keeps_its_class() -> None:
    compiled = three_layers()
    wanted, layer = output(compiled, "0.5*b"), compiled.model.get_submodule("3")
    cls = type(layer)
    for number in range(1, 6):
        output(compiled, f"0.{number}*a")
    assert "0.5*b" not in prepared(compiled)
    assert type(layer) is cls
    assert torch.equal(output(surgery.of(copy.deepcopy(compiled.model)), "0.5*b"), wanted)
    assert torch.equal(output(compiled, "0.5*b"), wanted)
    compiled.inverse.unload()
    assert type(layer) is nn.Linear


def applied(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return run(x)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("default", [False, True])
def test_what_is_computed_again_stays_until_it_was(reentrant: bool, default: bool) -> None:
    checkpoint = cast(Any, import_module("torch.utils.checkpoint")).checkpoint
    compiled, found, total = three_layers(), list[list[Tensor]](), None
    for wrap in cast(Any, (applied, partial(checkpoint, use_reentrant=reentrant))):
        compiled.activate(mix(1) if default else "a")
        with nullcontext() if default else compiled.using(mix(1)):
            x = ROWS.clone().requires_grad_()
            total = wrap(surgery.repeating(cast(Any, compiled.model)), x).square().sum()
        compiled.activate("b")
        churn(compiled)
        untyped.autograd.backward(total)
        own = [p for p in compiled.model.parameters() if p.grad is not None]
        found.append([cast(Tensor, p.grad).clone() for p in (x, *own)])
        compiled.model.zero_grad()
    assert len(found[0]) > 3
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    total = None
    churn(compiled, 200)
    assert mix(1) not in prepared(compiled)


@pytest.mark.usefixtures("few")
def test_sixteen_threads_with_ever_new_mixtures() -> None:
    compiled = three_layers()
    other = surgery.of(copy.deepcopy(compiled.model))
    numbers = [(thread, 100 + 3 * thread + step) for step in range(3) for thread in range(16)]
    wanted = {number: output(other, mix(number)) for _, number in numbers}

    def work(thread: int) -> bool:
        own = [number for one, number in numbers if one == thread]
        return all(
            torch.equal(output(compiled, mix(number)), wanted[number])
            for number in (*own, *reversed(own), 100 + thread)  # the last is another thread's
        )

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(16)))
    churn(compiled, 900, 1)
    assert len(prepared(compiled) - {"none", "a", "b"}) == 3


@pytest.mark.usefixtures("few")
def test_what_goes_is_not_compiled_anew_by_others() -> None:
    net, counter = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), CompileCounter()
    compiled = surgery.compile("adapter a { match * apply lora(r=2) }", net.eval())
    surgery.compile("adapter b { match * apply dora(r=3) }", net)
    for live in ("b", mix(1), "a"):
        compiled.activate(live)
    untyped._dynamo.reset()
    run: Any = untyped.compile(cast(Any, compiled.model), backend=counter, fullgraph=True)
    with torch.no_grad():
        wanted = run(ROWS)
        assert counter.frame_count == 1
        churn(compiled)
        assert mix(1) not in prepared(compiled)
        assert torch.equal(run(ROWS), wanted)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("few")
def test_a_bank_knows_as_many_choices_as_are_kept() -> None:
    compiled = three_layers()
    bank = compiled.reserve(3, terms=2)
    churn(compiled, count=12)
    assert bank.known.keys() <= prepared(compiled)


def test_what_was_deleted_while_it_was_chosen_is_told_of() -> None:
    compiled = three_layers()
    compiled.activate("b")
    with compiled.using("a"):
        compiled.delete("a")
        assert [one.name for one in compiled.status().adapters] == ["b"]
        refused("E437", lambda: cast(Any, compiled.model)(ROWS))


def test_a_copy_after_what_computed_a_weight_is_gone() -> None:
    net = nn.MultiheadAttention(12, 2, batch_first=True).eval()
    surgery.compile("adapter a { match * apply lora(r=2) }", net)
    compiled = surgery.compile("adapter b { match out_proj apply ia3() }", net)
    compiled.activate("b")
    compiled.delete("a")
    x = torch.linspace(-1, 1, 60).view(1, 5, 12)
    with torch.no_grad():
        wanted = net(x, x, x)[0]
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(other(x, x, x)[0], wanted)


def test_a_source_is_there_as_long_as_its_code() -> None:
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    made = code_of(graph)
    name = made.run.__code__.co_filename
    assert linecache.getline(name, 4)
    del made
    gc.collect()
    assert name not in linecache.cache


def test_what_is_deleted_while_a_thread_has_it_live_is_missed_there() -> None:
    """Also where it was all that a layer had: none gives the base in silence."""
    model = llama()
    compiled = surgery.compile("adapter a { match q_proj apply lora(r=2) }", model)
    surgery.compile("adapter b { match up_proj apply lora(r=2) }", model)
    compiled.activate("b")
    with compiled.using("a"):
        compiled.delete("a")
        refused("E437", lambda: logits(compiled))
    compiled.inverse.unload()
    assert not any(is_mounted(module) for _, module in modules_of(model))
