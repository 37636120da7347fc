"""Prefixes of keys and values: a text that is kept as one is what it was as a text; and peft's."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, wraps
from typing import Any, cast

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from surgery.calls.prefix_view import NOTHING, Prefix
from surgery.calls.prefixes import check, objection, prefixed, reader, routed, sizes, stored
from surgery.errors import SurgeryError

# Libraries whose types are not complete.
hf: Any = transformers
beside: Any = peft
untyped: Any = torch

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is:FutureWarning"),
]

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 37,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
SPECIAL = {"vocab_size": 37, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHORT = {**GROUPED, "head_dim": 4, "sliding_window": 4}
MIXED = ["sliding_attention", "full_attention"]

# Of each: the class, and its config.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 4, **SPECIAL}),
    "windows": ("MistralForCausalLM", "MistralConfig", SHORT),
    "hybrid": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**SHORT, "layer_types": MIXED}),
    "sharing": (
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            **SHORT,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": MIXED * 2,
            "vocab_size_per_layer_input": 37,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "counted": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 16,
            **SPECIAL,
        },
    ),
    "distances": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 16, "n_layer": 2, "n_head": 4, **SPECIAL},
    ),
}
TEXT = torch.tensor([[5, 17, 8]])
TOKENS = torch.tensor([[9, 4, 31, 12, 6], [22, 7, 15, 3, 28]])
PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
ONES = torch.ones_like(TOKENS)
N, NEW = 3, 4


def model_of(name: str, attention: str | None = None) -> Any:
    """A model of which every matrix matters."""
    made, config, options = MODELS[name]
    return drawn(
        getattr(hf, made)._from_config(
            getattr(hf, config)(**options), attn_implementation=attention
        )
    )


def drawn(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            untyped.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval()


@contextmanager
def mounted(model: Any, prefix: Callable[[], Prefix], cross: Prefix = NOTHING) -> Generator[None]:
    """Let a model have a prefix."""
    module = reader(model)
    check(module)
    base = type(module)
    own: Any = base.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return prefixed(self, own, prefix(), args, kwargs, cross)

    module.__class__ = type(base.__name__, (base,), {"forward": wraps(own)(forward)})
    try:
        yield
    finally:
        module.__class__ = base


def of(kept: tuple[tuple[Tensor, Tensor] | None, ...]) -> Prefix:
    """What a model kept, as a prefix."""
    own = {i: pair for i, pair in enumerate(kept) if pair is not None}
    tokens = next(iter(own.values()))[0].shape[2]

    def layer(pair: tuple[Tensor, Tensor]) -> Callable[[int], tuple[Tensor, Tensor]]:
        return lambda batch: (pair[0].expand(batch, -1, -1, -1), pair[1].expand(batch, -1, -1, -1))

    return Prefix(tokens, {i: layer(pair) for i, pair in own.items()})


def flat(values: Tensor, heads: int, slots: tuple[int, ...]) -> Prefix:
    """As peft has it: [n, slots * heads * head_dim], of which each layer has two slots."""
    every = values.view(values.shape[0], -1, heads, 4).permute(1, 2, 0, 3)[:, None]
    return of(tuple((every[slot], every[slot + 1]) for slot in slots))


def generated(model: Any, tokens: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """What comes after some tokens."""
    untyped.manual_seed(7)
    given = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options}
    out = model.generate(input_ids=tokens, attention_mask=mask, pad_token_id=0, **given)
    return out[:, -NEW:]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


@cache
def kept_by(name: str) -> Prefix:
    return of(stored(model_of(name), TEXT))


def joined(mask: Tensor = ONES) -> tuple[Tensor, Tensor]:
    """The text before the tokens, behind what is padding on the left."""
    rows = zip(TOKENS, mask, strict=True)
    whole = [torch.cat([row[~own.bool()] * 0, TEXT[0], row[own.bool()]]) for row, own in rows]
    before = torch.stack(whole)
    return before, (before != 0).long()


# ------------------------------------------------------------------ a text that is kept is a text


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_kept_text_is_read_as_the_text_itself(name: str) -> None:
    model = model_of(name)
    wanted = model(joined()[0], use_cache=False).logits[:, N:]
    with mounted(model, lambda: kept_by(name)):
        close(model(TOKENS, use_cache=False).logits, wanted)
        close(model(TOKENS, attention_mask=ONES).logits, wanted)
        first = model(TOKENS[:, :2])
        more = model(TOKENS[:, 2:4], past_key_values=first.past_key_values)
        last = model(TOKENS[:, 4:], past_key_values=more.past_key_values)
        close(torch.cat([first.logits, more.logits, last.logits], 1), wanted)
        assert last.past_key_values is first.past_key_values
        assert type(last.past_key_values) is hf.DynamicCache
        assert last.past_key_values.get_seq_length() == TOKENS.shape[1]
        right = model(TOKENS, attention_mask=PADDED.flip(1)).logits
    close(right[1], wanted[1])
    close(right[0, :3], wanted[0, :3])


GENERATIONS: dict[str, tuple[Tensor, dict[str, Any]]] = {
    "greedy": (ONES, {}),
    "beams": (ONES, {"num_beams": 3}),
    "samples": (ONES, {"do_sample": True, "num_return_sequences": 2}),
    "static": (ONES, {"cache_implementation": "static"}),
    "no cache": (ONES, {"use_cache": False}),
    "padded": (PADDED, {}),
    "padded, static": (PADDED, {"cache_implementation": "static"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_generated_behind_a_kept_text_is_what_follows_the_text(name: str) -> None:
    model = model_of(name)
    whole = {mask: joined(mask) for mask in (ONES, PADDED)}
    wanted = {k: generated(model, *whole[m], **given) for k, (m, given) in GENERATIONS.items()}
    with mounted(model, lambda: kept_by(name)):
        for key, (mask, given) in GENERATIONS.items():
            assert generated(model, TOKENS, mask, **given).equal(wanted[key]), key
    assert generated(model, TOKENS, ONES).shape == (2, NEW)


@pytest.mark.parametrize("name", ["windows", "hybrid"])
def test_masks_of_other_attention_are_extended_too(name: str) -> None:
    model = model_of(name, "eager")
    whole = joined(PADDED)
    wanted = generated(model, *whole)
    with mounted(model, lambda: kept_by(name)):
        assert generated(model, TOKENS, PADDED).equal(wanted)


@torch.no_grad()
def test_a_masks_own_columns_stand_behind_the_prefix() -> None:
    model = model_of("llama")
    own = torch.ones(5, 5, dtype=torch.bool).tril()[None, None].expand(2, -1, -1, -1)
    added = torch.zeros(2, 1, 5, 5).masked_fill(~own, torch.finfo(torch.float32).min)
    wanted = model(joined()[0]).logits[:, N:]
    with mounted(model, lambda: kept_by("llama")):
        close(model(TOKENS, attention_mask=own).logits, wanted)
        close(model(TOKENS, attention_mask=added).logits, wanted)


@torch.no_grad()
def test_what_is_called_in_other_ways_is_the_same() -> None:
    model = model_of("llama")
    stack = model.model
    wanted = stack(joined()[0]).last_hidden_state[:, N:]
    positions = torch.arange(5)[None]
    with mounted(model, lambda: kept_by("llama")):
        close(stack(TOKENS, ONES, positions).last_hidden_state, wanted)
        close(stack(inputs_embeds=stack.embed_tokens(TOKENS)).last_hidden_state, wanted)
        found = stack(TOKENS, return_dict=False)
        assert [type(one) for one in found] == [Tensor, hf.DynamicCache]
        close(found[0], wanted)
        assert [type(one) for one in stack(TOKENS, use_cache=False, return_dict=False)] == [Tensor]
        model.to(torch.bfloat16)
        assert stack(TOKENS).last_hidden_state.dtype == torch.bfloat16
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            stack()


@torch.no_grad()
def test_nothing_before_a_text_is_nothing() -> None:
    model = model_of("llama")
    wanted = model(TOKENS).logits
    with mounted(model, lambda: NOTHING):
        assert model(TOKENS).logits.equal(wanted)


@torch.no_grad()
def test_a_kept_text_is_without_what_its_mask_leaves_out() -> None:
    model = model_of("windows")
    padded, mask = torch.tensor([[0, 0, 5, 17, 8, 9]]), torch.tensor([[0, 0, 1, 1, 1, 0]])
    for found, wanted in zip(stored(model, padded, mask), stored(model, TEXT), strict=True):
        assert found is not None
        assert wanted is not None
        assert found[0].equal(wanted[0])
        assert found[1].equal(wanted[1])
    long = stored(model, TOKENS[:1])[0]
    assert long is not None
    assert long[0].shape == (1, 2, 5, 4)
    assert [one is None for one in stored(model_of("sharing"), TEXT)] == [False, False, True, True]


def test_what_a_layer_keeps_has_sizes() -> None:
    assert sizes(model_of("llama")) == ((2, 4, 4),) * 2
    assert sizes(model_of("sharing")) == ((2, 4, 4), (2, 4, 4), None, None)
    assert sizes(encoder_decoder("t5")) == sizes(encoder_decoder("bart")) == ((4, 4, 4),) * 2
    with torch.device("meta"):
        empty = hf.GPT2LMHeadModel(hf.GPT2Config(**MODELS["gpt2"][2])).train()
    full = model_of("gpt2").train()
    before = torch.get_rng_state()
    assert sizes(empty) == sizes(full) == ((4, 4, 4),) * 2
    assert torch.get_rng_state().equal(before)


# ----------------------------------------------------------------------------------------- peft


def peft_of(model: Any, task: str, kind: str = "PrefixTuningConfig", **options: Any) -> Any:
    config = getattr(beside, kind)(task_type=task, num_virtual_tokens=N, **options)
    untyped.manual_seed(5)
    return beside.get_peft_model(deepcopy(model), config).eval()


def same_gradients(found: nn.Module, wanted: nn.Module) -> None:
    ours, theirs = ([*one.parameters()] for one in (found, wanted))
    assert any(one.grad is not None for one in theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            close(one.grad, other.grad)


PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("PrefixTuningConfig", {}),
    "projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 7}),
    "cartridge": ("CartridgeConfig", {"num_frozen_tokens": 1}),
}


@pytest.mark.parametrize("kind", PEFT)
@pytest.mark.parametrize(("name", "heads"), [("llama", 2), ("gpt2", 4)])
def test_a_language_model_is_pefts(name: str, heads: int, kind: str) -> None:
    model = model_of(name)
    other = peft_of(model, "CAUSAL_LM", PEFT[kind][0], **PEFT[kind][1])
    encoder = deepcopy(other.prompt_encoder["default"])
    mask = PADDED.flip(1)
    with mounted(model, lambda: flat(encoder(torch.arange(N)[None])[0], heads, (0, 2))):
        wanted = other(TOKENS, attention_mask=mask, labels=TOKENS)
        found = model(TOKENS, attention_mask=mask, labels=TOKENS)
        close(found.logits, wanted.logits)
        close(found.loss, wanted.loss)
        found.loss.backward()
        wanted.loss.backward()
        same_gradients(encoder, other.prompt_encoder["default"])
        for given in ({}, {"num_beams": 3}):
            assert generated(model, TOKENS, ONES, **given).equal(
                generated(other, TOKENS, ONES, **given)
            )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", [None, PADDED.flip(1)])
def test_an_encoder_is_pefts(attention: str, mask: Tensor | None) -> None:
    config = hf.BertConfig(**SIZES, num_labels=3)
    made = hf.BertForTokenClassification._from_config(config, attn_implementation=attention)
    model = drawn(made)
    other = peft_of(model, "TOKEN_CLS")
    encoder = deepcopy(other.prompt_encoder["default"])
    labels = TOKENS % 3
    with mounted(model, lambda: flat(encoder(torch.arange(N)[None])[0], 4, (0, 2))):
        wanted = other(TOKENS, attention_mask=mask, labels=labels)
        found = model(TOKENS, attention_mask=mask, labels=labels)
        close(found.logits, wanted.logits)
        found.loss.backward()
        wanted.loss.backward()
        same_gradients(encoder, other.prompt_encoder["default"])


def encoder_decoder(name: str) -> Any:
    common = {"d_model": 16, "vocab_size": 37, "pad_token_id": 0, "decoder_start_token_id": 2}
    if name == "t5":
        config = hf.T5Config(d_kv=4, d_ff=24, num_layers=2, num_heads=4, **common)
        return drawn(hf.T5ForConditionalGeneration(config))
    sizes = {
        f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in SIDE.items()
    }
    given = {**SPECIAL, **common, **sizes, "forced_eos_token_id": None}
    return drawn(hf.BartForConditionalGeneration(hf.BartConfig(**given)))


SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 24}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 3},
    {"use_cache": False},
    {"cache_implementation": "static"},
)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_of_two_layers_reads_pefts_first_two_slots_in_both(name: str) -> None:
    model = encoder_decoder(name)
    other = peft_of(model, "SEQ_2_SEQ_LM")
    encoder = deepcopy(other.prompt_encoder["default"])
    labels = TOKENS[:, :4].clone()
    with mounted(model, lambda: flat(encoder(torch.arange(N)[None])[0], 4, (0, 0))):
        for cached in (True, False):
            given = {"attention_mask": PADDED.flip(1), "labels": labels, "use_cache": cached}
            wanted, found = other(TOKENS, **given), model(TOKENS, **given)
            close(found.logits, wanted.logits)
            close(found.loss, wanted.loss)
        found.loss.backward()
        wanted.loss.backward()
        same_gradients(encoder, other.prompt_encoder["default"])
        ours = [generated(model, TOKENS, ONES, **given) for given in OPTIONS]
        assert ours[0].equal(generated(other, TOKENS, ONES))
        assert ours[1].equal(generated(other, TOKENS, ONES, num_beams=3))
        assert ours[0].equal(ours[2])
        assert ours[0].equal(ours[3])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_cross_attention_reads_more_than_the_encoder_says(name: str) -> None:
    """What an encoder says of a text, kept, is as if it stood before what it says of others."""
    model = encoder_decoder(name)
    said = model.get_encoder()
    output = hf.modeling_outputs.BaseModelOutput
    with torch.no_grad():
        first, own = said(TEXT).last_hidden_state, said(TOKENS, attention_mask=PADDED.flip(1))
        both = torch.cat([first.expand(2, -1, -1), own.last_hidden_state], 1)
        kept = model(encoder_outputs=output(first), decoder_input_ids=torch.tensor([[2]]))
        layers = kept.past_key_values.cross_attention_cache.layers
        whole = torch.cat([ONES[:, :N], PADDED.flip(1)], 1)
        wanted = model(encoder_outputs=output(both), attention_mask=whole, labels=TOKENS)
        start = torch.full((2, 1), 2)
        after = [
            model.generate(
                encoder_outputs=output(both.clone()),
                attention_mask=whole,
                decoder_input_ids=start,
                max_new_tokens=NEW,
                eos_token_id=None,
                **given,
            )[:, -NEW:]
            for given in OPTIONS
        ]
    cross = of(tuple((layer.keys, layer.values) for layer in layers))
    with mounted(model, lambda: NOTHING, cross):
        given = {"attention_mask": PADDED.flip(1), "labels": TOKENS}
        close(model(TOKENS, **given).logits, wanted.logits)
        close(model(TOKENS, use_cache=False, **given).logits, wanted.logits)
        for options, expected in zip(OPTIONS, after, strict=True):
            assert generated(model, TOKENS, PADDED.flip(1), **options).equal(expected)


@torch.no_grad()
def test_a_decoder_that_hands_on_its_cache_only_where_it_is_to_fill_it_reads_its_prefix() -> None:
    sizes = {
        f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in SIDE.items()
    }
    given = {**SPECIAL, **sizes, "d_model": 16, "num_mel_bins": 8, "max_source_positions": 10}
    config = hf.WhisperConfig(**given, suppress_tokens=None, begin_suppress_tokens=None)
    model = drawn(hf.WhisperForConditionalGeneration(config))
    sound = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(2))
    wanted = model(sound, decoder_input_ids=joined()[0]).logits[:, N:]
    cache = model(sound, decoder_input_ids=TEXT.expand(2, -1)).past_key_values.self_attention_cache
    kept = of(tuple((layer.keys, layer.values) for layer in cache.layers))
    with mounted(model, lambda: kept):
        for cached in (True, False):
            close(model(sound, decoder_input_ids=TOKENS, use_cache=cached).logits, wanted)


def test_a_kept_text_is_what_peft_keeps() -> None:
    model = model_of("llama")
    other = peft_of(model, "CAUSAL_LM", "CartridgeConfig")
    cache: Any = hf.DynamicCache()
    model(TEXT, past_key_values=cache)
    import peft.tuners.cartridge.utils as utils

    theirs = cast(Any, utils).initialize_kv_prefix_from_past_key_values(
        other, past_key_values=cache
    )
    found, wanted = of(stored(model, TEXT)), flat(theirs, 2, (0, 2))
    for layer in (0, 1):
        for one, two in zip(found.layers[layer](2), wanted.layers[layer](2), strict=True):
            assert one.equal(two)


# ------------------------------------------------------------------------- training and compiling


# The library's own checkpoints of the older kind lose gradients of keys that layers share.
@pytest.mark.parametrize(
    ("name", "reentrant"), [("llama", False), ("llama", True), ("sharing", False)]
)
def test_layers_that_are_run_again_read_their_prefix_again(name: str, reentrant: bool) -> None:
    model = model_of(name).train()
    values = {i: kept_by(name).layers[i](1) for i in kept_by(name).layers}
    grads: list[list[Tensor]] = []
    losses: list[Tensor] = []
    for checkpoints in (False, True):
        own = {i: [one.clone().requires_grad_() for one in pair] for i, pair in values.items()}
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        kept = tuple((own[i][0], own[i][1]) if i in own else None for i in range(4))
        with mounted(model, lambda kept=kept: of(kept)):
            found = model(TOKENS, labels=TOKENS, use_cache=not checkpoints)
        losses.append(found.loss)
        found.loss.backward()
        grads.append([cast(Tensor, one.grad) for pair in own.values() for one in pair])
    close(losses[0], losses[1])
    for one, other in zip(*grads, strict=True):
        close(one, other)
    assert not any("_can_checkpoint_with_cache" in vars(module) for module in model.modules())


@pytest.mark.parametrize(("name", "cached"), [("llama", False), ("hybrid", True)])
@torch.no_grad()
def test_a_compiled_model_is_one_graph(name: str, cached: bool) -> None:
    model, prefix = model_of(name), kept_by(name)
    with mounted(model, lambda: prefix):
        wanted = model(TOKENS, attention_mask=PADDED).logits[PADDED.bool()]
        run = untyped.compile(model, fullgraph=True, backend="eager")
        found = run(TOKENS, attention_mask=PADDED, use_cache=cached).logits
        close(found[PADDED.bool()], wanted)


# ----------------------------------------------------------------------------- samples of their own


@pytest.mark.parametrize(
    ("name", "cached"),
    [("llama", True), ("gpt2", False), ("hybrid", True), ("counted", True), ("distances", False)],
)
def test_each_sample_of_a_routed_batch_gets_what_it_gets_alone(name: str, cached: bool) -> None:
    model = model_of(name)
    short, long = kept_by(name), of(stored(model, TOKENS[1:, :4]))
    parts = [long, None, short, long]
    tokens, mask = TOKENS.repeat(2, 1), PADDED.repeat(2, 1)
    alone: list[Tensor] = []
    for row, own, part in zip(tokens, mask, parts, strict=True):
        with mounted(model, lambda part=part: part or NOTHING):
            alone.append(generated(model, row[None], own[None], use_cache=cached))
    with mounted(model, lambda: routed(parts)):
        assert generated(model, tokens, mask, use_cache=cached).equal(torch.cat(alone))


@torch.no_grad()
def test_a_routed_batch_without_masks_or_positions_is_the_same() -> None:
    model = model_of("llama")
    long = of(stored(model, TOKENS[1:, :4]))
    with mounted(model, lambda: long):
        wanted = model(TOKENS[:1]).logits
    with mounted(model, lambda: routed([long, kept_by("llama")])):
        close(model(TOKENS).logits[:1], wanted)
    with mounted(model, lambda: routed([None, long])):
        close(model(TOKENS, use_cache=False).logits[1:], model_with(model, long, TOKENS[1:]))
    assert routed([None, None]) is NOTHING


def model_with(model: Any, prefix: Prefix, tokens: Tensor) -> Tensor:
    fresh = model_of("llama")
    with mounted(fresh, lambda: prefix):
        return fresh(tokens).logits


# ------------------------------------------------------------------------------- what is refused


def refused(code: str, run: Callable[[], object], text: str) -> None:
    with pytest.raises(SurgeryError, match=text) as caught:
        run()
    assert [one.code for one in caught.value.diagnostics] == [code]
    assert all(one.hint for one in caught.value.diagnostics)


def test_what_keeps_no_keys_and_values_is_refused() -> None:
    mamba = hf.MambaModel(hf.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=37))
    sizes = {**SIZES, "image_size": 8, "patch_size": 4}
    image = hf.ViTModel(
        hf.ViTConfig(**{k: sizes[k] for k in list(sizes)[:4]}, image_size=8, patch_size=4)
    )
    mixed = {"layer_types": ["conv", "full_attention"]}
    hybrid = hf.Lfm2Model(hf.Lfm2Config(**GROUPED, **mixed))
    refused("E475", lambda: check(mamba), "MambaModel takes no cache of keys and values")
    refused("E475", lambda: check(reader(image)), "ViTModel takes no cache")
    refused("E475", lambda: check(reader(hybrid)), "layers that keep something else: conv")
    own: Any = hf.Lfm2Model.forward
    prefix = kept_by("llama")
    refused("E475", lambda: prefixed(hybrid, own, prefix, (TOKENS,), {}), "a recurrent state")
    assert objection(nn.Linear(2, 3)) == "Linear takes no cache of keys and values"
    assert not objection(reader(model_of("sharing")))


def test_tensors_that_do_not_fit_are_refused() -> None:
    model, whole = model_of("llama"), kept_by("llama")
    for prefix, text in (
        (kept_by("gpt2"), r"K of layer 0 is \[2, 4, 3, 4\], where \[2, 2, 3, 4\]"),
        (Prefix(2, whole.layers), r"\[2, 2, 3, 4\], where \[2, 2, 2, 4\]"),
        (Prefix(N, {0: whole.layers[0]}), "layer 1 has no prefix"),
        (routed([whole, None, whole]), "prefixes of 3 samples are asked for 2"),
    ):
        with mounted(model, lambda prefix=prefix: prefix):
            refused("E476", lambda: model(TOKENS), text)
    refused("E476", lambda: routed([whole, Prefix(N, {0: whole.layers[0]})]), "different layers")
    refused("E476", lambda: routed([whole, None]).layers[0](3), "2 samples are asked for 3")


def test_layers_that_do_not_read_their_prefix_are_refused() -> None:
    dropping, model = model_of("gpt2").train(), model_of("llama").train()
    for one in (dropping, model):
        one.gradient_checkpointing_enable()
    with mounted(dropping, lambda: kept_by("gpt2")):
        refused("E477", lambda: dropping(TOKENS), "layers 0, 1 of GPT2Model read no prefix")
    with mounted(model, lambda: kept_by("llama")):
        given = {"past_key_values": hf.DynamicCache()}
        refused("E477", lambda: model(TOKENS, **given), "LlamaModel is given a cache")
    crossed, one_text = encoder_decoder("t5"), {"past_key_values": hf.DynamicCache()}
    with mounted(crossed, lambda: NOTHING, kept_by("llama")):
        run = {"decoder_input_ids": TOKENS, **one_text}
        refused("E477", lambda: crossed(TOKENS, **run), "layers 0, 1 of T5Stack read no prefix")
    shared, two = model_of("sharing"), kept_by("sharing").layers
    more = Prefix(N, {**two, 2: two[0], 3: two[1]})
    with mounted(shared, lambda: more):
        refused("E477", lambda: shared(TOKENS), "layers 2, 3 of Gemma3nTextModel")


def test_masks_and_positions_that_cannot_be_extended_are_refused() -> None:
    model = model_of("llama")
    packed = torch.tensor([[0, 1, 2, 0, 1]]).expand(2, -1)
    with mounted(model, lambda: kept_by("llama")):
        given = {"position_ids": packed, "use_cache": False}
        refused("E478", lambda: model(TOKENS, **given), "several texts are packed in one row")
        odd = {"attention_mask": torch.ones(2, 5, 5)}
        refused("E478", lambda: model(TOKENS, **odd), r"a mask for full_attention \(of shape")
    chunks = {**GROUPED, "head_dim": 4, "intermediate_size_mlp": 24, "attention_chunk_size": 4}
    kinds = ["chunked_attention", "full_attention"]
    config = hf.Llama4TextConfig(**chunks, num_local_experts=2, layer_types=kinds)
    chunked = drawn(hf.Llama4ForCausalLM(config))
    kept = of(stored(chunked, TEXT))
    with mounted(chunked, lambda: kept):
        assert generated(chunked, TOKENS, ONES).shape == (2, NEW)
        run = {"attention_mask": PADDED}
        refused("E478", lambda: chunked(TOKENS, **run), "a mask for chunked_attention")
    counting = hf.RobertaModel(hf.RobertaConfig(**SIZES)).eval()
    pair = (torch.ones(1, 4, N, 4), torch.ones(1, 4, N, 4))
    uneven = routed([of((pair, pair)), None])
    with mounted(counting, lambda: uneven):
        refused("E478", lambda: counting(TOKENS), "RobertaModel counts positions itself")


def test_a_prefix_is_of_one_text() -> None:
    model = model_of("llama")
    refused("E479", lambda: stored(model, TOKENS), r"there are tokens \[2, 5\]")
    nothing = torch.zeros_like(TEXT)
    refused("E479", lambda: stored(model, TEXT, nothing), r"there are tokens \[1, 0\]")
    refused("E479", lambda: stored(encoder_decoder("t5"), TEXT), "T5Stack .* an encoder's too")
