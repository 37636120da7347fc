"""What is changed between a module's attention and its output projection."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from threading import Thread
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3Model,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperModel,
)

from surgery.calls.attending import (
    Branch,
    Output,
    Projections,
    attended,
    merged,
    objection,
    projections,
)
from surgery.errors import SurgeryError

untyped: Any = torch  # whose types are not complete

TOKENS = torch.tensor([[3, 5, 1, 7, 2], [2, 0, 11, 4, 6]])
LENGTH = 3


def llama(**given: Any) -> nn.Module:
    """Two layers, with fewer keys than queries."""
    untyped.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, **given)).eval()


def mistral() -> nn.Module:
    """The same with a window, within which the text fits."""
    untyped.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2)).eval()


def gpt2() -> nn.Module:
    """Queries, keys and values of one layer."""
    untyped.manual_seed(0)
    config = GPT2Config(**NARROW, n_layer=2)
    return GPT2LMHeadModel(config).eval()


NARROW: dict[str, Any] = {
    "vocab_size": 13,
    "n_embd": 24,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": None,
    "eos_token_id": None,
}
SMALL: dict[str, Any] = {
    "vocab_size": 13,
    "hidden_size": 24,
    "intermediate_size": 30,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}


def set_in(module: nn.Module, branch: Branch | None, output: Output | None = None) -> None:
    """Let a module's class be one whose forward is changed, as a mounted module's is."""
    base = type(module)
    forward: Any = base.forward

    def changed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return attended(self, forward, branch, args, kwargs, output)

    module.__class__ = type(base.__name__, (base,), {"forward": changed, "surgery_base": base})


def attentions(model: nn.Module) -> list[nn.Module]:
    """The modules that attend through the interface."""
    return [module for module in model.modules() if not objection(module)]


def logits(model: nn.Module, tokens: Tensor = TOKENS, **given: Any) -> Tensor:
    """Of a language model."""
    with torch.no_grad():
        return cast(Any, model)(tokens, **given).logits


# --------------------------------------------------------------------------------- the heads


@pytest.mark.parametrize("attends", ["eager", "sdpa"])
def test_the_heads_are_what_the_equation_says(attends: str) -> None:
    model = llama(attn_implementation=attends)
    own = logits(model)
    for module in attentions(model):
        set_in(module, by_hand)
    torch.testing.assert_close(logits(model), own)


def by_hand(q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
    """The heads of a causal model, computed once more of what they are computed of."""
    assert k.shape == v.shape == (*q.shape[:1], 2, *q.shape[2:])
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    mine = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(mine, o)
    return mine


def test_other_modules_are_left_alone() -> None:
    model = llama()
    own = logits(model)
    first, second = attentions(model)
    set_in(first, lambda q, k, v, o: o)
    torch.testing.assert_close(logits(model), own, rtol=0, atol=0)
    set_in(second, lambda q, k, v, o: 2 * o)
    assert (logits(model) - own).abs().max() > 1e-3


def test_two_threads_do_not_meet() -> None:
    model = llama()
    own = logits(model)
    adapted = deepcopy(model)
    for module in attentions(adapted):
        set_in(module, lambda q, k, v, o: o + q)
    changed = logits(adapted)
    found: dict[str, list[Tensor]] = {"own": [], "changed": []}

    def run(name: str, which: nn.Module) -> None:
        found[name] += [logits(which) for _ in range(5)]

    threads = [Thread(target=run, args=pair) for pair in (("own", model), ("changed", adapted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(x, own) for x in found["own"])
    assert all(torch.equal(x, changed) for x in found["changed"])


def test_what_is_compiled_is_the_same() -> None:
    model = llama()
    for module in attentions(model):
        set_in(module, lambda q, k, v, o: o + 0.5 * q)
    with torch.no_grad():
        compiled = untyped.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(TOKENS).logits, logits(model))


def test_checkpoints_compute_it_again() -> None:
    model = llama().train()
    scale = nn.Parameter(torch.ones(()))
    for module in attentions(model):
        set_in(module, lambda q, k, v, o: o * scale + 0.1 * scale * q)

    def gradient() -> Tensor:
        scale.grad = None
        cast(Any, model)(TOKENS, labels=TOKENS).loss.backward()
        assert scale.grad is not None
        return scale.grad

    own = gradient()
    for reentrant in (False, True):
        cast(Any, model).activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.testing.assert_close(gradient(), own)


# ---------------------------------------------------------------------------- the projections


def bert() -> nn.Module:
    """Attention whose output is projected elsewhere."""
    return BertModel(BertConfig(**SMALL), add_pooling_layer=False).eval()


def vit() -> nn.Module:
    """Attention over patches."""
    sizes = {k: v for k, v in SMALL.items() if "token" not in k and "vocab" not in k}
    return ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4), add_pooling_layer=False).eval()


def whisper() -> nn.Module:
    """An encoder, a decoder, and attention of the one to the other."""
    config = WhisperConfig(
        vocab_size=13,
        d_model=24,
        num_mel_bins=5,
        max_source_positions=4,
        max_target_positions=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=30,
        decoder_ffn_dim=30,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
    )
    return WhisperModel(config).eval()


def t5() -> nn.Module:
    """Attention with a bias of its own."""
    config = T5Config(vocab_size=13, d_model=24, d_kv=5, d_ff=30, num_layers=1, num_heads=4)
    return T5EncoderModel(config).eval()


def neox() -> nn.Module:
    """Queries, keys and values of one layer, by heads."""
    return GPTNeoXModel(GPTNeoXConfig(**SMALL)).eval()


def phi3() -> nn.Module:
    """Queries, keys and values of one layer, with fewer keys."""
    config = Phi3Config(**SMALL, num_key_value_heads=2, pad_token_id=0)
    return Phi3Model(config).eval()


INPUTS: dict[Callable[[], nn.Module], dict[str, Tensor]] = {
    llama: {"input_ids": TOKENS},
    mistral: {"input_ids": TOKENS},
    gpt2: {"input_ids": TOKENS},
    bert: {"input_ids": TOKENS},
    neox: {"input_ids": TOKENS},
    phi3: {"input_ids": TOKENS},
    t5: {"input_ids": TOKENS},
    vit: {"pixel_values": torch.ones(2, 3, 8, 8)},
    whisper: {"input_features": torch.ones(2, 5, 8), "decoder_input_ids": TOKENS},
}


@pytest.mark.parametrize("made", INPUTS)
def test_values_are_projected_as_the_model_does(made: Callable[[], nn.Module]) -> None:
    model = made()
    seen: list[tuple[Projections, Tensor, Tensor, Tensor]] = []

    def changed(module: nn.Module) -> None:
        own = projections(module)
        base: Any = type(module).forward

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            to = kwargs.get("key_value_states")
            attended_to = x if to is None else to

            def branch(q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
                mine = own.value(self, attended_to)
                torch.testing.assert_close(mine, v.repeat_interleave(own.heads // own.kv_heads, 1))
                seen.append((own, q, own.query(self, x), own.key(self, attended_to)))
                assert own.hidden == x.shape[-1]
                assert q.shape[1] == own.heads
                assert k.shape[1] == own.kv_heads
                assert o.shape == (*q.shape[:3], own.value_dim)
                return o

            def output(q: Tensor, k: Tensor, v: Tensor, o: Tensor, y: Tensor) -> Tensor:
                if own.output:
                    torch.testing.assert_close(own.out(self, o), y)
                    bias = getattr(getattr(self, own.output), "bias", None)
                    y0 = y if bias is None else y - bias
                    torch.testing.assert_close(own.out(self, o, bias=False), y0)
                return y

            return attended(self, base, branch, args, kwargs, output)

        module.__class__ = type(type(module).__name__, (type(module),), {"forward": forward})

    for module in attentions(model):
        changed(module)
    with torch.no_grad():
        model(**INPUTS[made])
    assert seen
    for own, q, query, key in seen:
        assert query.shape == q.shape == (*key.shape[:2], q.shape[2], own.head_dim)


def test_an_output_that_is_projected_elsewhere_is_refused() -> None:
    attention = attentions(bert())[0]
    with pytest.raises(SurgeryError, match="E481"):
        projections(attention).out(attention, torch.zeros(4, 5, 6))


def test_queries_that_are_not_those_of_the_heads_are_refused() -> None:
    attention = attentions(llama())[0]
    cast(Any, attention).num_key_value_groups = 1  # as where gates are projected with the queries
    with pytest.raises(SurgeryError, match="E481"):
        projections(attention)


# ---------------------------------------------------------------------------------- refusals


def test_modules_with_an_attention_of_their_own_say_so() -> None:
    assert "MultiheadAttention" in objection(nn.MultiheadAttention(24, 4))
    model = BloomModel(BloomConfig(vocab_size=13, hidden_size=24, n_layer=1, n_head=4))
    assert not attentions(model)


def test_a_call_that_did_not_attend_through_the_interface_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(**NARROW, n_layer=1, reorder_and_upcast_attn=True)).eval()
    cast(Any, model).set_attn_implementation("eager")
    set_in(attentions(model)[0], lambda q, k, v, o: o)
    with pytest.raises(SurgeryError, match="E480"):
        logits(model)


# ------------------------------------------------------------------------------ Llama-Adapter


def llama_adapter(prompt: Tensor, gate: Tensor, own: Projections, module: nn.Module) -> Branch:
    """What the heads get of the prompt [tokens, hidden] (arXiv:2303.16199)."""

    def extra(q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
        key, value = own.key(module, prompt), own.value(module, prompt)
        scores = q @ key.transpose(-2, -1) / own.head_dim**0.5
        return gate * F.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ value

    return extra


def put_on(model: nn.Module, found: dict[str, Tensor], past_output: bool, bias: bool) -> None:
    """Llama-Adapter on a model, with the tensors that peft has.

    past_output: whether it is added to the module's output unprojected. bias: whether the output
    projection's own is added twice.
    """
    paths = dict[str, nn.Module](cast(Any, model).named_modules())
    for path, module in paths.items():
        if f"{path}.adaption_gate" not in found:
            continue
        gate, prompt = (found[f"{path}.adaption_{name}"] for name in ("gate", "prompt"))
        own = projections(module)
        extra = llama_adapter(prompt[0], gate, own, module)

        def inside(q: Tensor, k: Tensor, v: Tensor, o: Tensor, extra: Branch = extra) -> Tensor:
            return o + extra(q, k, v, o)

        def after(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            o: Tensor,
            y: Tensor,
            extra: Branch = extra,
            own: Projections = own,
            module: nn.Module = module,
        ) -> Tensor:
            added = extra(q, k, v, o)
            return y + (merged(added) if past_output else own.out(module, added))

        if past_output or bias:
            set_in(module, None, after)
        else:
            set_in(module, inside)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("made", "past_output", "bias"),
    [
        (llama, False, False),
        (mistral, False, False),
        (gpt2, True, False),
        (lambda: llama(attention_bias=True), False, True),
    ],
    ids=["llama", "mistral", "gpt2", "llama-bias"],
)
def test_llama_adapter_is_pefts(
    made: Callable[[], nn.Module], past_output: bool, bias: bool
) -> None:
    from peft import AdaptionPromptConfig, get_peft_model

    model = made()
    config = AdaptionPromptConfig(adapter_len=LENGTH, adapter_layers=2, task_type="CAUSAL_LM")
    theirs: Any = get_peft_model(cast(Any, deepcopy(model)), config)
    theirs.eval()
    drawn = torch.Generator().manual_seed(1)
    found: dict[str, Tensor] = {}
    trained: dict[str, nn.Parameter] = {}
    for name, parameter in theirs.named_parameters():
        if "adaption_" in name:
            key = name.removeprefix("base_model.model.")
            parameter.data = torch.randn(parameter.shape, generator=drawn)
            found[key] = nn.Parameter(parameter.detach().clone())
            trained[key] = parameter
    assert len(found) == 4
    put_on(model, found, past_output, bias)
    mine, other = (cast(Any, m)(TOKENS, labels=TOKENS) for m in (model, theirs))
    torch.testing.assert_close(mine.logits, other.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.loss, other.loss)
    mine.loss.backward()
    other.loss.backward()
    for key, parameter in trained.items():
        torch.testing.assert_close(found[key].grad, parameter.grad, rtol=1e-5, atol=1e-7)
    given: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(TOKENS)
    written = cast(Any, model).generate(input_ids=TOKENS, attention_mask=mask, **given)
    assert torch.equal(written, theirs.generate(input_ids=TOKENS, attention_mask=mask, **given))
