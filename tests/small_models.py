"""Small models of transformers, and their input, on which what peft does is compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

untyped: Any = torch  # whose types are not complete

TOKENS = torch.tensor([[3, 5, 1, 7, 2], [2, 0, 11, 4, 6]])


def llama() -> nn.Module:
    untyped.manual_seed(0)
    config = LlamaConfig(
        vocab_size=13,
        hidden_size=12,
        intermediate_size=30,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=True,
    )
    return LlamaModel(config).eval()


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
