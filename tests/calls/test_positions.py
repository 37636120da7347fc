"""Which tokens of a text are meant, however the text comes."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5Model,
)

from surgery.calls.positions import (
    Places,
    current,
    names_of,
    placed,
    places,
    repeated,
    rows_of,
    stacks_of,
)
from surgery.errors import SurgeryError

untyped: Any = torch  # whose types are not complete

IDS = (7, 3)
SPECS = (
    Places("first", (2,)),
    Places("last", (2,)),
    Places("at", (0, 3)),
    Places("at", (1, -1)),
    Places("after", IDS),
)
GROWING = (Places("first", (5,)), Places("at", (0, 3, 7)), Places("after", IDS))
"""Those that do not ask for the end of a prompt."""


# ---------------------------------------------------------------------------------- one call


def meant(spec: Places, tokens: Tensor | None, x: Tensor | None = None, **given: Any) -> Tensor:
    """The places in one call of a model that has nothing but hidden states."""
    if x is None:
        assert tokens is not None
        x = torch.zeros(*tokens.shape, 3)

    def forward(module: nn.Module, **given: Any) -> Tensor:
        return places(spec, x)

    return placed(nn.Identity(), forward, (), (), {"input_ids": tokens, **given})


def listed(tensor: Tensor) -> Any:
    """The entries of a tensor."""
    return cast(Any, tensor).tolist()


def by_hand(spec: Places, text: list[int]) -> list[bool]:
    """The places in a text, by their definition."""
    every = range(len(text))
    match spec.kind:
        case "first":
            return [i < spec.numbers[0] for i in every]
        case "last":
            return [i >= len(text) - spec.numbers[0] for i in every]
        case "at":
            return [i in spec.numbers or i - len(text) in spec.numbers for i in every]
        case "after":
            found = [i for i in every if tuple(text[i : i + len(spec.numbers)]) == spec.numbers]
            return [bool(found) and i >= found[-1] for i in every]


texts = st.lists(st.sampled_from((3, 7, 1)), min_size=1, max_size=9)
batches = st.lists(texts, min_size=1, max_size=3)
ends = st.sampled_from(("first", "last"))
some = st.lists(st.integers(-5, 5), min_size=1).map(tuple)
ids = st.lists(st.sampled_from((3, 7)), min_size=1, max_size=3).map(tuple)
specs = st.one_of(
    st.builds(Places, ends, st.tuples(st.integers(1, 9))),
    st.builds(Places, st.just("at"), some),
    st.builds(Places, st.just("after"), ids),
)


@given(spec=specs, batch=batches, left=st.booleans(), pad=st.sampled_from((0, 3)))
def test_places_are_those_of_the_text(
    spec: Places, batch: list[list[int]], left: bool, pad: int
) -> None:
    longest = max(map(len, batch))
    spaces = [[pad] * (longest - len(text)) for text in batch]
    rows = [s + t if left else t + s for s, t in zip(spaces, batch, strict=True)]
    real = [
        [False] * len(s) + [True] * len(t) if left else [True] * len(t) + [False] * len(s)
        for s, t in zip(spaces, batch, strict=True)
    ]
    found = meant(spec, torch.tensor(rows), attention_mask=torch.tensor(real).long())
    for row, is_real, text in zip(found, real, batch, strict=True):
        kept = torch.tensor(is_real)
        assert listed(row[kept]) == by_hand(spec, text)
        assert not row[~kept].any()


@given(spec=specs, batch=batches)
def test_texts_in_one_row_have_places_of_their_own(spec: Places, batch: list[list[int]]) -> None:
    tokens = torch.tensor([[token for text in batch for token in text]])
    positions = torch.cat([torch.arange(len(text)) for text in batch])[None]
    found = meant(spec, tokens, position_ids=positions)
    assert listed(found[0]) == [here for text in batch for here in by_hand(spec, text)]


@given(spec=specs, text=texts, cuts=st.sets(st.integers(1, 9), max_size=3))
def test_a_text_that_comes_by_pieces_has_the_same_places(
    spec: Places, text: list[int], cuts: set[int]
) -> None:
    pieces = [*pairwise(sorted({0, *(c for c in cuts if c < len(text)), len(text)}))]
    several = any(b - a > 1 for a, b in pieces[1:])
    cache, found = _Counting(), list[bool]()
    try:
        for start, stop in pieces:
            one = torch.tensor([text[start:stop]])
            found += listed(meant(spec, one, past_key_values=cache)[0])
            cache.tokens = stop
    except SurgeryError:
        assert several
        assert spec.kind in ("last", "after") or min(spec.numbers) < 0
        return
    prompt = text[: pieces[0][1]]
    generated = range(len(prompt), len(text))
    if spec.kind == "after" and several:  # the last of the pieces that have them
        starts = [
            by_hand(spec, text[a:b]).index(True) + a for a, b in pieces if holds(spec, text[a:b], a)
        ]
        assert found == [bool(starts) and i >= starts[-1] for i in range(len(text))]
    elif spec.kind == "after":
        assert found == by_hand(spec, prompt) + [any(by_hand(spec, prompt))] * len(generated)
    else:  # the end is the prompt's
        more = [spec.kind != "last" and by_hand(spec, text)[i] for i in generated]
        if spec.kind == "at":
            more = [i in spec.numbers for i in generated]
        assert found == by_hand(spec, prompt) + more


def holds(spec: Places, piece: list[int], start: int) -> bool:
    """Whether a piece is looked through, and has the ids."""
    return (len(piece) > 1 or start == 0) and any(by_hand(spec, piece))


class _Counting:
    """A cache that counts."""

    tokens = 0

    def get_seq_length(self) -> int:
        return self.tokens


def test_tokens_in_a_row_are_those_of_the_batch() -> None:
    tokens = torch.tensor([[1, 2, 3], [7, 3, 4]])
    whole = meant(SPECS[4], tokens)
    assert torch.equal(meant(SPECS[4], tokens, torch.zeros(6, 5)), whole.flatten())
    assert torch.equal(
        meant(SPECS[4], tokens, torch.zeros(2, 1, 5), logits_to_keep=1), whole[:, -1:]
    )
    with rows_of(torch.tensor([1])):
        assert torch.equal(meant(SPECS[4], tokens, torch.zeros(1, 3, 5)), whole[1:])


def test_a_model_of_no_tokens_has_those_of_its_hidden_states() -> None:
    found = meant(
        Places("first", (1,)), None, torch.zeros(2, 5, 3), pixel_values=torch.zeros(2, 3, 8)
    )
    assert listed(found) == [[True, False, False, False, False]] * 2


# --------------------------------------------------------------------------------- refusals


def test_outside_of_a_call_there_are_no_places() -> None:
    with pytest.raises(SurgeryError, match="E482"):
        places(SPECS[0], torch.zeros(2, 5, 3))


@pytest.mark.parametrize(
    "call",
    [
        {"x": torch.zeros(2, 4, 3)},
        {"attention_mask": torch.ones(2, 4)},
        {"attention_mask": torch.ones(2, 1, 3, 3)},
        {"cache_params": object()},
        {"x": (states := torch.zeros(2, 3, 3)), "encoder_hidden_states": states},
    ],
)
def test_a_call_that_does_not_tell_is_refused(call: dict[str, Any]) -> None:
    with pytest.raises(SurgeryError, match="E483"):
        meant(SPECS[0], torch.ones(2, 3, dtype=torch.long), **call)


def test_ids_are_not_sought_in_a_call_without_any() -> None:
    with pytest.raises(SurgeryError, match="E483"):
        meant(SPECS[4], None, torch.zeros(2, 3, 5), inputs_embeds=torch.zeros(2, 3, 5))


def test_what_follows_unknown_tokens_is_refused() -> None:
    cache = _Counting()
    cache.tokens = 4
    one, three = torch.tensor([[1]]), torch.tensor([[1, *IDS]])
    with pytest.raises(SurgeryError, match="E484"):
        meant(SPECS[4], one, past_key_values=cache)
    with pytest.raises(SurgeryError, match="E484"):
        meant(SPECS[4], three[:, :2], past_key_values=cache)
    assert listed(meant(SPECS[4], three, past_key_values=cache)[0]) == [False, True, True]


def test_ids_in_two_pieces_of_a_prompt_are_refused() -> None:
    for first, second in (([1, 7], [3, 1]), ([7, 3], [7, 3])):
        cache = _Counting()
        meant(SPECS[4], torch.tensor([first]), past_key_values=cache)
        cache.tokens = 2
        with pytest.raises(SurgeryError, match="E484"):
            meant(SPECS[4], torch.tensor([second]), past_key_values=cache)


def test_a_later_turn_begins_anew() -> None:
    cache = _Counting()
    assert meant(SPECS[4], torch.tensor([[7, 3, 1]]), past_key_values=cache).all()
    cache.tokens = 4  # a token was generated
    found = meant(SPECS[4], torch.tensor([[1, 7, 3]]), past_key_values=cache)
    assert listed(found[0]) == [False, True, True]


# ----------------------------------------------------------------------------------- a model


def llama() -> nn.Module:
    """Two layers."""
    untyped.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 24,
    "intermediate_size": 30,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}


def changed(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let a module's class have another forward, as a mounted module's has."""
    base = type(module)
    module.__class__ = type(base.__name__, (base,), {"forward": forward})


def adapted(spec: Places, model: nn.Module | None = None) -> nn.Module:
    """A model of which some projections have a low rank more at some places."""
    model = model or llama()
    for stack in stacks_of(model):
        base: Any = type(stack).forward
        names = names_of(base)

        def call(
            self: nn.Module, *args: Any, base: Any = base, names: Any = names, **kw: Any
        ) -> Any:
            return placed(self, base, names, args, kw)

        changed(stack, call)
    drawn = torch.Generator().manual_seed(1)
    for path, module in cast(Any, model).named_modules():
        if path.endswith(("q_proj", "v_proj")):
            a = torch.randn(module.in_features, 2, generator=drawn) / 4
            b = torch.randn(2, module.out_features, generator=drawn) * 3

            def linear(self: nn.Linear, x: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
                y = nn.functional.linear(x, self.weight, self.bias)
                return y + places(spec, x)[..., None] * (x @ a @ b)

            changed(module, linear)
    return model


TEXTS = ([5, 7, 3, 2, 1, 4], [9, 8, 7, 3])


def padded(left: bool) -> dict[str, Tensor]:
    """The texts, with their mask."""
    longest = max(map(len, TEXTS))
    spaces = [[0] * (longest - len(text)) for text in TEXTS]
    rows = [s + t if left else t + s for s, t in zip(spaces, TEXTS, strict=True)]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def logits(model: nn.Module, *args: Any, **given: Any) -> Tensor:
    """Of a language model."""
    with torch.no_grad():
        return cast(Any, model)(*args, **given).logits


@pytest.mark.parametrize("spec", SPECS)
def test_padding_makes_no_difference(spec: Places) -> None:
    model = adapted(spec)
    alone = [logits(model, torch.tensor([text]))[0] for text in TEXTS]
    base = [logits(llama(), torch.tensor([text]))[0] for text in TEXTS]
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(alone, base, strict=True))
    for left in (True, False):
        given = padded(left)
        found = logits(model, **given)
        for row, real, own in zip(found, given["attention_mask"], alone, strict=True):
            torch.testing.assert_close(row[real == 1], own)


@pytest.mark.parametrize("spec", GROWING)
def test_a_text_read_token_by_token_is_the_text(spec: Places) -> None:
    model, text = adapted(spec), torch.tensor([[5, 7, 3, 2, 1, 4, 9, 8, 6]])
    whole = logits(model, text)
    out: Any = cast(Any, model)(text[:, :4], use_cache=True)  # which makes a cache
    found = [out.logits]
    for i in range(4, 9):
        found.append(logits(model, text[:, i : i + 1], past_key_values=out.past_key_values))
    torch.testing.assert_close(torch.cat(found, 1), whole)


GENERATED: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("spec", GROWING)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}],
    ids=["greedy", "beams", "static", "chunks"],
)
def test_what_is_generated_with_a_cache_is_the_same(spec: Places, options: dict[str, Any]) -> None:
    model: Any = adapted(spec)
    given = padded(left=True)
    if "prefill_chunk_size" in options:  # of which none cuts the ids
        given = {name: tensor[1:] for name, tensor in given.items()}
    plain = {k: v for k, v in options.items() if k == "num_beams"}
    own = model.generate(**given, **GENERATED, **plain, use_cache=False)
    base: Any = llama()
    assert not torch.equal(own, base.generate(**given, **GENERATED, **plain))
    written = model.generate(**given, **GENERATED, **options)
    assert torch.equal(written, own)
    again = model.generate(**given, **GENERATED, **options)  # nothing is left of the first
    assert torch.equal(again, own)


def test_a_window_over_the_text_makes_no_difference() -> None:
    untyped.manual_seed(0)
    config = MistralConfig(**SIZES, sliding_window=3)
    model: Any = adapted(Places("first", (8,)), MistralForCausalLM(config).eval())
    given: Any = {**padded(left=True), **GENERATED}
    own = model.generate(**given, use_cache=False)
    assert torch.equal(model.generate(**given), own)
    with pytest.raises(SurgeryError, match="E483"):  # its mask has the window, and not the padding
        model.generate(**given, cache_implementation="static")


def test_the_end_of_a_prompt_is_not_what_is_generated() -> None:
    model: Any = adapted(Places("last", (2,)))
    text = torch.tensor([TEXTS[0]])
    written = model.generate(text, attention_mask=torch.ones_like(text), **GENERATED)
    cache = DynamicCache()
    own = logits(model, text, past_key_values=cache)
    base = llama()
    for i in range(6):  # what follows runs the model itself
        assert int(own[0, -1].argmax()) == int(written[0, 6 + i])
        own = logits(base, written[:, 6 + i : 7 + i], past_key_values=cache)
    with pytest.raises(SurgeryError, match="E483"):
        model.generate(
            text, attention_mask=torch.ones_like(text), **GENERATED, prefill_chunk_size=4
        )


def test_a_copied_cache_knows_its_text() -> None:
    model = adapted(SPECS[4])
    cache = DynamicCache()
    logits(model, torch.tensor([TEXTS[0]]), past_key_values=cache)
    more = torch.tensor([[9]])
    copied = deepcopy(cache)
    torch.testing.assert_close(
        logits(model, more, past_key_values=copied), logits(model, more, past_key_values=cache)
    )
    cache.crop(-5)  # of 7: the second of the ids is gone
    copied = deepcopy(cache)
    torch.testing.assert_close(
        logits(model, more, past_key_values=cache), logits(llama(), more, past_key_values=copied)
    )


@pytest.mark.parametrize(
    ("name", "how", "rows"),
    [
        ("reorder_cache", torch.tensor([1, 0]), (1, 0)),
        ("batch_select_indices", torch.tensor([1]), (1,)),
        ("batch_repeat_interleave", 2, (0, 0, 1, 1)),
    ],
)
def test_rows_of_a_cache_go_with_their_text(name: str, how: Any, rows: tuple[int, ...]) -> None:
    model = adapted(SPECS[4])
    texts, more = torch.tensor([[5, 7, 3], [5, 3, 7]]), torch.tensor([[9]])
    cache = DynamicCache()
    logits(model, texts, past_key_values=cache)
    cache = deepcopy(cache)
    getattr(cache, name)(how)
    found = logits(model, more.expand(len(rows), 1), past_key_values=cache)
    whole = torch.cat([texts, more.expand(2, 1)], 1)
    torch.testing.assert_close(found[:, 0], logits(model, whole)[[*rows], -1])


def test_encoders_and_decoders_have_texts_of_their_own() -> None:
    untyped.manual_seed(0)
    config = T5Config(vocab_size=11, d_model=12, d_kv=3, d_ff=20, num_layers=1, num_heads=4)
    model = T5Model(config).eval()
    assert stacks_of(model) == (model.encoder, model.decoder)
    seen: list[list[list[bool]]] = []
    for stack in stacks_of(model):
        base: Any = type(stack).forward
        first: Any = cast(Any, stack).block[0].layer[0].SelfAttention.q

        def call(self: nn.Module, *args: Any, base: Any = base, **kwargs: Any) -> Any:
            return placed(self, base, names_of(base), args, kwargs)

        def linear(self: nn.Linear, x: Tensor) -> Tensor:
            seen.append(listed(places(Places("last", (1,)), x)))
            return nn.functional.linear(x, self.weight)

        changed(stack, call)
        changed(first, linear)
    model(
        input_ids=torch.tensor([[1, 2, 0]]),
        attention_mask=torch.tensor([[1, 1, 0]]),
        decoder_input_ids=torch.tensor([[0, 4]]),
    )
    assert seen == [[[False, True, False]], [[False, True]]]


def test_what_is_compiled_is_the_same() -> None:
    model = adapted(GROWING[2])
    with torch.no_grad():
        compiled = untyped.compile(model, fullgraph=True, backend="eager")
        given = padded(left=True)
        torch.testing.assert_close(compiled(**given).logits, logits(model, **given))


def test_checkpoints_compute_it_again() -> None:
    model: Any = adapted(GROWING[2]).train()
    tokens = torch.tensor([TEXTS[0]])

    def gradient() -> Tensor:
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad

    own = gradient()
    model.activation_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        checkpoint = layer._gradient_checkpointing_func

        def again(run: Callable[..., Any], *args: Any, checkpoint: Any = checkpoint) -> Any:
            call = current()

            def within(*args: Any) -> Any:
                with repeated(call):
                    return run(*args)

            return checkpoint(within, *args)

        layer._gradient_checkpointing_func = again
    torch.testing.assert_close(gradient(), own)


# ------------------------------------------------------------------------------------- aLoRA


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_alora_is_pefts() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2,
        lora_alpha=2,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        alora_invocation_tokens=[*IDS],
    )
    theirs: Any = get_peft_model(cast(Any, llama()), config).eval()
    model: Any = adapted(Places("after", IDS))
    for path, module in model.named_modules():
        if path.endswith(("q_proj", "v_proj")):
            a, b = cast(Any, type(module)).forward.__defaults__
            layer = theirs.get_submodule(f"base_model.model.{path}")
            layer.lora_A["default"].weight.data = a.T.contiguous()
            layer.lora_B["default"].weight.data = b.T.contiguous()
    with_none = torch.tensor([[5, 7, 3, 2, 1, 4], [9, 8, 7, 1, 3, 2], [7, 3, 1, 7, 3, 6]])
    for one in (padded(left=True), padded(left=False), {"input_ids": with_none}):
        mine, other = logits(model, **one), logits(theirs, **one)
        kept = one.get("attention_mask", torch.ones_like(one["input_ids"])) == 1
        torch.testing.assert_close(mine[kept], other[kept], rtol=1e-5, atol=1e-6)
    for one in (padded(left=True), {"input_ids": with_none}):
        mask = one.get("attention_mask", torch.ones_like(one["input_ids"]))
        more = {**one, **GENERATED, "attention_mask": mask}
        assert torch.equal(model.generate(**more), theirs.generate(**more))
