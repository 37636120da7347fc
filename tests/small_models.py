"""Small models of transformers, and their input, on which what peft does is compared."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    ConvNextConfig,
    ConvNextModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralModel,
    OPTConfig,
    OPTModel,
    Qwen2Config,
    Qwen2Model,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperModel,
)

untyped: Any = torch  # whose types are not complete

TOKENS = torch.tensor([[3, 5, 1, 7, 2], [2, 0, 11, 4, 6]])


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    """Of a language model."""
    with torch.no_grad():
        return cast(Any, model)(tokens).logits


def llama_config(**given: Any) -> LlamaConfig:
    """Two layers, whose sizes are all different; some of it may be given otherwise."""
    return LlamaConfig(
        vocab_size=13,
        hidden_size=12,
        intermediate_size=30,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=True,
        **given,
    )


def llama() -> nn.Module:
    untyped.manual_seed(0)
    return LlamaModel(llama_config()).eval()


def language_model(**given: Any) -> nn.Module:
    """A Llama with its head, of two layers."""
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    untyped.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(sizes | given))).eval()


def gpt2() -> nn.Module:
    untyped.manual_seed(1)
    config = GPT2Config(vocab_size=13, n_embd=12, n_head=2, n_layer=2, n_positions=8)
    return GPT2Model(config).eval()


def bert() -> nn.Module:
    untyped.manual_seed(2)
    config = BertConfig(
        vocab_size=13,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    return BertModel(config).eval()


# ------------------------------------------------------------------- ten architectures, in a table
#
# All sides are multiples of 12, so that blocks, shards and groups of every method fit, and those of
# a feed-forward differ.


@dataclass(frozen=True)
class Architecture:
    """A small model, what it is called with, and the names of its layers that methods go to."""

    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    query: str
    value: str
    down: str  # the last projection of the feed-forward
    convolution: str = ""
    transposed: bool = False  # whether its matrices are stored as [in, out]

    def output(self, model: nn.Module) -> Tensor:
        return cast(Any, model)(**self.inputs).last_hidden_state


SIZES: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 2}
DECODER: dict[str, Any] = {
    **SIZES,
    "vocab_size": 13,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
}
HEARD: dict[str, Any] = {
    f"{half}_{name}": value
    for half in ("encoder", "decoder")
    for name, value in {"layers": 1, "attention_heads": 2, "ffn_dim": 36}.items()
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


IDS = {"input_ids": TOKENS}
BOTH = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, 1:]}
PIXELS = {"pixel_values": _drawn(2, 3, 12, 12)}
SOUND = {"input_features": _drawn(2, 5, 12), "decoder_input_ids": TOKENS}

ARCHITECTURES = {
    "llama": Architecture(
        lambda: LlamaModel(LlamaConfig(**DECODER, attention_bias=True)),
        IDS,
        *("q_proj", "v_proj", "down_proj"),
    ),
    "qwen": Architecture(
        lambda: Qwen2Model(Qwen2Config(**DECODER)),
        IDS,
        *("q_proj", "v_proj", "down_proj"),
    ),
    "gpt2": Architecture(
        lambda: GPT2Model(
            GPT2Config(vocab_size=13, n_embd=24, n_inner=36, n_head=2, n_layer=2, n_positions=8)
        ),
        IDS,
        *("c_attn", "c_fc", "mlp.c_proj"),
        transposed=True,
    ),
    "opt": Architecture(
        lambda: OPTModel(
            OPTConfig(
                vocab_size=13,
                hidden_size=24,
                ffn_dim=36,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=8,
                word_embed_proj_dim=24,
            )
        ),
        IDS,
        *("q_proj", "v_proj", "fc2"),
    ),
    "bert": Architecture(
        lambda: BertModel(
            BertConfig(**SIZES, vocab_size=13, num_hidden_layers=2, max_position_embeddings=8)
        ),
        IDS,
        *("query", "value", "output.dense"),
    ),
    "t5": Architecture(
        lambda: T5Model(
            T5Config(vocab_size=13, d_model=24, d_kv=12, d_ff=36, num_layers=1, num_heads=2)
        ),
        BOTH,
        *("q", "v", "wo"),
    ),
    "vit": Architecture(
        lambda: ViTModel(ViTConfig(**SIZES, num_hidden_layers=2, image_size=12, patch_size=4)),
        PIXELS,
        *("q_proj", "v_proj", "fc2"),
        convolution="projection",
    ),
    "convnext": Architecture(
        lambda: ConvNextModel(
            ConvNextConfig(patch_size=2, num_stages=2, hidden_sizes=[12, 24], depths=[1, 1])
        ),
        PIXELS,
        *("pwconv1", "1.layers.0.pwconv1", "pwconv2"),
        convolution="patch_embeddings",
    ),
    "whisper": Architecture(
        lambda: WhisperModel(
            WhisperConfig(
                **SPECIAL,
                **HEARD,
                vocab_size=13,
                d_model=24,
                num_mel_bins=5,
                max_source_positions=6,
                max_target_positions=8,
            )
        ),
        SOUND,
        *("q_proj", "v_proj", "fc2"),
    ),
    "mixtral": Architecture(
        lambda: MixtralModel(MixtralConfig(**DECODER, num_local_experts=3, num_experts_per_tok=2)),
        IDS,
        *("q_proj", "v_proj", "o_proj"),
    ),
}


@cache
def _base(name: str) -> nn.Module:
    """One model for all, with weights that keep the size of what passes them."""
    untyped.manual_seed(5)
    model = ARCHITECTURES[name].make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            matrix = parameter.dim() > 1
            parameter.normal_(std=parameter[0].numel() ** -0.5) if matrix else parameter.add_(
                0.1 * torch.randn(parameter.shape)
            )
    return model


def fresh(name: str) -> nn.Module:
    """A copy of an architecture's model, with the same weights each time."""
    return deepcopy(_base(name))
